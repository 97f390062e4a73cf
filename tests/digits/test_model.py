"""The embedded model is what its configuration says, and fits into the package."""

from __future__ import annotations

import json
from importlib import resources

import pytest

from packcache.digits import prompts
from packcache.digits.model import FPS, SAMPLING, SECONDS, digits_config, load_model, text_ids
from packcache.lumos.config import LumosConfig
from packcache.lumos.model import Lumos
from packcache.lumos.vocab import Vocab

WEIGHTS = resources.files("packcache.digits") / "weights"


def test_shipped_configuration_is_the_code_s():
    shipped = LumosConfig.from_dict(json.loads((WEIGHTS / "config.json").read_text()))
    assert shipped == digits_config()


def test_at_most_three_million_parameters_and_twelve_steps():
    assert sum(p.numel() for p in Lumos(digits_config()).parameters()) < 3_000_000
    assert SAMPLING.steps <= 12
    assert SAMPLING.history_mask_ratio == 0.3


def test_weights_are_small_and_finite():
    names = ("codec.safetensors", "model.safetensors")
    assert sum(len((WEIGHTS / name).read_bytes()) for name in names) < 8_000_000
    assert all(p.isfinite().all() for p in load_model().parameters())


def test_ids_of_words_numbers_and_codes_do_not_meet():
    ids = digits_config().token_ids
    words = text_ids("a red 3 moving right")
    assert len(words) == prompts.PROMPT_LENGTH
    specials = {getattr(ids, name) for name in ("bos", "sep", "image_start", "image_end")}
    specials |= {ids.new_line, ids.mask, ids.video_start, ids.video_end}
    highest_word = text_ids("a red 3")[-1] + len(prompts.WORDS) - 1
    assert max(specials) < min(words)
    assert highest_word < ids.size_zero < ids.video_lo


@pytest.mark.parametrize("number", [2, FPS, SECONDS])
def test_header_and_grid_numbers_have_tokens(number):
    config = digits_config()
    token = Vocab(config).number(number, "number")
    assert config.token_ids.size_zero <= token < config.token_ids.video_lo
