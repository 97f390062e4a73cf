"""The embedded model's numbers: ids that do not meet, words and headers that have tokens."""

from __future__ import annotations

import pytest

from packcache.digits import prompts, world
from packcache.digits.model import FPS, SAMPLING, SECONDS, WORD_ZERO, digits_config, text_ids
from packcache.lumos.vocab import Vocab


def test_how_a_frame_is_decided():
    assert (SAMPLING.steps, SAMPLING.guidance, SAMPLING.history_mask_ratio) == (12, 3.0, 0.7)
    assert digits_config().trained_latent_frames == 7


def test_a_frame_is_twelve_by_twelve_tokens():
    layout = Vocab(digits_config()).layout(world.SIZE, world.SIZE)
    assert (layout.rows, layout.cols, layout.content, layout.tokens) == (12, 12, 144, 160)


def test_ids_of_words_numbers_and_codes_do_not_meet():
    config = digits_config()
    ids = config.token_ids
    specials = {ids.bos, ids.sep, ids.image_start, ids.image_end}
    specials |= {ids.new_line, ids.mask, ids.video_start, ids.video_end}
    assert len(specials) == 8
    assert max(specials) < WORD_ZERO
    assert WORD_ZERO + len(prompts.WORDS) <= ids.size_zero < ids.video_lo
    assert ids.video_hi - ids.video_lo == ids.num_codes == 1600
    assert ids.video_hi == config.vocab_size


def test_a_prompt_is_its_words_as_ids():
    words = text_ids("a digit behind a curtain")
    assert len(words) == prompts.PROMPT_LENGTH
    said = [prompts.WORDS[n - WORD_ZERO] for n in words[:5]]
    assert " ".join(said) == "a digit behind a curtain"
    assert words[5:] == [WORD_ZERO + prompts.WORDS.index(prompts.PAD)] * 9


@pytest.mark.parametrize("number", [world.SIZE // 32, FPS, SECONDS])
def test_header_and_grid_numbers_have_tokens(number):
    config = digits_config()
    token = Vocab(config).number(number, "number")
    assert config.token_ids.size_zero <= token < config.token_ids.video_lo
