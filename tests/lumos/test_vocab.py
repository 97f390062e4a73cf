"""Ids and places: prefix, header, frames, numbers (lumos1-spec 1.5, 3)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packcache.errors import InvalidSetting
from packcache.lumos.config import SIZES, LumosConfig, TokenIds
from packcache.lumos.vocab import Vocab, latent_frames, pixel_frames

REAL, TOY = Vocab(SIZES["3b"]), Vocab(SIZES["toy"])


@pytest.mark.parametrize(
    "frames, latents", [(1, 1), (2, 2), (5, 2), (6, 3), (24, 7), (25, 7), (48, 13), (49, 13)]
)
def test_latent_frames(frames, latents):
    """DESIGN 2 and lumos1-spec 3.3."""
    assert latent_frames(frames) == latents
    assert pixel_frames(latents) >= frames > pixel_frames(latents - 1)


@pytest.mark.parametrize("frames", [384, 385])
def test_a_long_clip(frames):
    assert latent_frames(frames) == 97 and pixel_frames(97) == 385


@pytest.mark.parametrize(
    "width, height, rows, cols, grid",
    [(448, 256, 32, 56, [8812, 8818]), (672, 384, 48, 84, [8816, 8825]), (768, 480, 60, 96, None)],
)
def test_grids_of_the_released_sizes(width, height, rows, cols, grid):
    layout = REAL.layout(width, height)
    assert (layout.rows, layout.cols) == (rows, cols)
    ids = REAL.frame(layout)
    assert ids[0] == 8197 and ids[-1] == 8196
    assert ids[1:3].tolist() == (grid or [8804 + 15, 8804 + 24])
    assert int((ids == 8803).sum()) == rows and int((ids == 9003).sum()) == rows * cols


def test_prefix_of_a_prompt():
    """BOS, text, separator, then video start, duration before fps; uncond begins at video start."""
    prefix = REAL.prefix([22807, 16758], seconds=2, fps=12)
    assert prefix.ids == (0, 22807, 16758, 8710, 9004, 8806, 8816)
    assert prefix.video_start == 4
    assert prefix.lengths == (7, 3)
    assert prefix.branch(0) == prefix.ids and prefix.branch(1) == (9004, 8806, 8816)


def test_an_empty_prompt_has_a_prefix():
    assert REAL.prefix([], seconds=1, fps=1).lengths == (5, 3)


def test_codes_there_and_back():
    layout = REAL.layout(64, 32)
    codes = torch.arange(32).view(4, 8) * 1999 % 64000
    ids = REAL.frame(layout, codes)
    assert torch.equal(REAL.codes(layout, ids), codes)
    assert torch.equal(REAL.codes(layout, ids.expand(2, 3, -1)), codes.expand(2, 3, -1, -1))
    assert ids[3] == 65536 and ids[11] == 8803 and ids[12] == 65536 + 8 * 1999


def test_remasking_replaces_body_tokens_only():
    layout = REAL.layout(32, 32)
    ids = REAL.frame(layout, torch.zeros(4, 4, dtype=torch.int64))
    out = REAL.remask(layout, ids, np.array([0, 4, 19], np.int32))
    changed = (out != ids).nonzero().squeeze(1)
    assert changed.tolist() == [3, 7, 22] and (out[changed] == 9003).all()
    assert int((ids == 9003).sum()) == 0
    both = REAL.remask(layout, ids.expand(2, -1), np.array([1], np.int32))
    assert (both[:, 4] == 9003).all()


@pytest.mark.parametrize("vocab, limit", [(REAL, 199), (TOY, 34)], ids=["real", "toy"])
def test_numbers_end_where_the_next_special_token_begins(vocab, limit):
    assert vocab.number(limit - 1, "fps") == vocab.ids.size_zero + limit - 1
    for value in (-1, limit):
        with pytest.raises(
            InvalidSetting, match=f"fps is {value}, expected 0..{limit - 1}: no tok"
        ):
            vocab.number(value, "fps")


NAMES = sorted(TokenIds().specials())


@given(st.lists(st.integers(0, 29), min_size=len(NAMES), max_size=len(NAMES), unique=True))
def test_no_number_is_said_by_an_id_that_means_something_else(named):
    """Wherever the named ids lie, up to the codes at 30."""
    ids = TokenIds(**dict(zip(NAMES, named, strict=True)), video_lo=30, video_hi=40)
    vocab = Vocab(dataclasses.replace(SIZES["toy"], vocab_size=40, token_ids=ids))
    said = [vocab.number(value, "fps") for value in range(len(ids.numbers))]
    assert said == [*range(ids.size_zero, ids.size_zero + len(said))]
    assert not set(said[1:]) & set(named) and said[-1] < 30
    assert said[-1] + 1 in (*named, 30)  # none is left out
    with pytest.raises(InvalidSetting, match=rf"expected 0\.\.{len(said) - 1}: no token says it"):
        vocab.number(len(said), "fps")


@pytest.mark.parametrize("size", [(0, 32), (32, 0), (33, 32), (32, 48), (-32, 32)])
def test_sizes_are_multiples_of_32_pixels(size):
    with pytest.raises(InvalidSetting, match="pixels, expected a positive multiple of 32"):
        REAL.layout(*size)


def test_a_grid_that_no_token_can_say():
    with pytest.raises(InvalidSetting, match=r"frame width / 32 is 200, expected 0\.\.198"):
        REAL.frame(REAL.layout(200 * 32, 32))


def test_every_id_comes_from_the_config():
    """Nothing is typed twice: another vocabulary gives the same layout in its own ids."""
    ids = TokenIds(
        bos=1, image_end=2, image_start=3, sep=4, new_line=5, size_zero=50, mask=6,
        video_start=7, video_end=8, video_lo=100, video_hi=140,
    )  # fmt: skip
    sizes = {**SIZES["toy"].to_dict(), "vocab_size": 140, "token_ids": {}}
    vocab = Vocab(LumosConfig.from_dict({**sizes, "token_ids": vars_of(ids)}))
    assert vocab.prefix([9], seconds=1, fps=2).ids == (1, 9, 4, 7, 51, 52)
    frame = vocab.frame(vocab.layout(32, 32), torch.zeros(4, 4))
    assert frame.tolist() == [3, 51, 51, *[100, 100, 100, 100, 5] * 4, 2]


def vars_of(ids: TokenIds) -> dict[str, int]:
    return {name: getattr(ids, name) for name in ids.__dataclass_fields__}
