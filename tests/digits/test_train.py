"""Training sees what the engine will see: two copies, one mask, the same logits."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from packcache.digits.model import digits_config, text_ids
from packcache.lumos.model import Lumos

RECIPE = Path(__file__).parents[2] / "recipes" / "digits"


@pytest.fixture(scope="module")
def recipe():
    """The recipe's modules, which are scripts beside the package."""
    sys.path.insert(0, str(RECIPE))
    try:
        import clips
        import sequences
        import train
    finally:
        sys.path.remove(str(RECIPE))
    return SimpleNamespace(train=train, Clips=clips.Clips, Sequences=sequences.Sequences)


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


def plain_logits(model, shape, ids, hidden, frames):
    """Logits of the masked tokens of the last of `frames` frames, one after the other."""
    n, p = len(shape.prefix), shape.layout.tokens
    position_ids = torch.cat(
        [shape._positions()[:, :n]]
        + [shape.vocab.frame_positions(n, f, shape.layout) for f in range(frames)],
        dim=1,
    )
    attend = free_attention(n, p, ids.shape[1])
    states = model(ids, model.rotary(position_ids), attend)[0, -p:][shape.content]
    return model.head(states[hidden], model.config.token_ids.video_lo)


def some_clip(recipe, frames):
    return recipe.Clips(
        codes=torch.randint(0, 1000, (1, frames, 144)),
        text=torch.tensor([text_ids("a red 3 moving right")]),
    )


@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("clean", [0, 1, 2])
def test_current_frame_sees_prefix_and_committed_history(recipe, model, with_text, clean):
    frames = 3
    clips = some_clip(recipe, frames)
    shape = recipe.Sequences(model, frames, with_text)
    hidden = torch.rand(1, frames, 144) < 0.5
    ids = shape.ids(clips, torch.tensor([clean]), hidden, ratio=0.7)
    logits = shape.logits(model, ids, hidden)

    n, p = len(shape.prefix), shape.layout.tokens
    plain = torch.cat((ids[:, : n + 2 * p], ids[:, -p:]), dim=1)
    masked = (plain[0, n : n + 2 * p] == model.config.token_ids.mask).view(2, p).sum(-1)
    assert masked.tolist() == [0 if frame < clean else 109 for frame in range(2)]
    expected = plain_logits(model, shape, plain, hidden[0, -1], frames)
    assert torch.allclose(logits[-len(expected) :], expected, atol=1e-4)


def test_tubes_are_one_masked_copy(recipe, model):
    frames = 3
    shape = recipe.Sequences(model, frames, True, tube=True)
    hidden = recipe.train.draw_tubes(torch.Generator().manual_seed(0), 1, frames, 144)
    assert bool((hidden == hidden[:, :1]).all())
    ids = shape.ids(some_clip(recipe, frames), torch.tensor([0]), hidden, ratio=0.7)
    assert ids.shape[1] == len(shape.prefix) + frames * shape.layout.tokens
    expected = plain_logits(model, shape, ids, hidden[0, -1], frames)
    assert torch.allclose(shape.logits(model, ids, hidden)[-len(expected) :], expected, atol=1e-4)


def test_masks_cover_all_or_a_part(recipe):
    masks = recipe.train.draw_masks(torch.Generator().manual_seed(0), 200, 4, 144)
    share = masks.float().mean(-1)
    assert 0.2 < (share == 1).float().mean() < 0.35
    assert share.min() < 0.1


def test_some_clips_are_given_in_part(recipe):
    given = recipe.train.draw_given(torch.Generator().manual_seed(0), 2000, 7)
    share = torch.bincount(given, minlength=7) / len(given)
    assert share[:2].tolist() == pytest.approx([0.5, 0.35], abs=0.05)
    assert len(share) == 7
    assert share[2:].tolist() == pytest.approx([0.03] * 5, abs=0.015)
