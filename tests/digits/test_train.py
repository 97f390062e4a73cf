"""Training sees what the engine will see: two copies, one mask, the same logits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from packcache.digits.model import digits_config, text_ids
from packcache.lumos.model import Lumos

RECIPE = Path(__file__).parents[2] / "recipes" / "digits"


@pytest.fixture(scope="module")
def train():
    sys.path.insert(0, str(RECIPE))
    try:
        import train as module
    finally:
        sys.path.remove(str(RECIPE))
    return module


@pytest.fixture(scope="module")
def model() -> Lumos:
    torch.manual_seed(0)
    return Lumos(digits_config()).eval().requires_grad_(False)


def free_attention(prefix: int, frame_tokens: int, length: int):
    """Attention by the spec's rule: causal, and a frame sees all of itself (lumos1-spec 4)."""
    index = torch.arange(length)
    frame = torch.where(index < prefix, -1 - index, (index - prefix) // frame_tokens)
    mask = (index <= index[:, None]) | (frame == frame[:, None])

    def attend(_, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_current_frame_sees_prefix_and_committed_history(train, model, with_text, given):
    frames, last = 3, 2
    clips = train.Clips(
        codes=torch.randint(0, 1000, (1, frames, 64)),
        text=torch.tensor([text_ids("a red 3 moving right")]),
    )
    shape = train.TwoCopies(model, frames, with_text)
    hidden = torch.rand(1, frames, 64) < 0.5
    ids = shape.ids(clips, torch.tensor([given]), hidden)
    logits = shape.logits(model, ids, hidden)

    n, p = len(shape.prefix), shape.layout.tokens
    plain = torch.cat((ids[:, : n + last * p], ids[:, -p:]), dim=1)
    assert bool((plain[0, n : n + p] == model.config.token_ids.mask).any()) is not given
    position_ids = torch.cat(
        [shape._positions()[:, :n]]
        + [shape.vocab.frame_positions(n, f, shape.layout) for f in range(frames)],
        dim=1,
    )
    attend = free_attention(n, p, plain.shape[1])
    states = model(plain, model.rotary(position_ids), attend)[0, -p:][shape.content]
    expected = model.head(states[hidden[0, last]], model.config.token_ids.video_lo)
    assert torch.allclose(logits[-len(expected) :], expected, atol=1e-4)


def test_masks_cover_all_or_a_part(train):
    import numpy as np

    masks = train.draw_masks(np.random.default_rng(0), 200, 4, 64)
    share = masks.float().mean(-1)
    assert 0.2 < (share == 1).float().mean() < 0.35
    assert share.min() < 0.1
