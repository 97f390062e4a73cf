"""When a token is decided: masks, schedules and draws, against spec 5.3-5.5 written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packcache.errors import InvalidSetting
from packcache.lumos.schedule import (
    KNOWN,
    FrameDraws,
    Sampling,
    cosine_counts,
    gumbel,
    history_mask,
    philox_draws,
    pick,
    remask,
    stack_draws,
    temperatures,
)

# --- history mask -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, cols, ratio, masked, new_lines",
    [(32, 56, 0.7, 1277, 22), (48, 84, 0.7, 2856, 48), (32, 56, 0.3, 547, 10)],
)
def test_published_grids(rows, cols, ratio, masked, new_lines):
    """lumos1-spec 5.4, table."""
    index = history_mask(rows, cols + 1, ratio)
    assert len(index) == masked
    assert int((index % (cols + 1) == cols).sum()) == new_lines


@settings(max_examples=300)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.01, 1))
def test_mask_is_ascending_unique_and_evenly_spaced(rows, length, ratio):
    index = history_mask(rows, length, ratio)
    count = max(1, round(ratio * rows * length))
    assert len(index) == count and index[0] == 0 and index.dtype == np.int32
    assert index[-1] < rows * length
    steps = np.diff(index)
    assert count == 1 or (steps.min() >= 1 and steps.max() - steps.min() <= 1)


def test_the_ends_of_the_ratio():
    assert len(history_mask(4, 5, 0.0)) == 0
    assert history_mask(4, 5, 1.0).tolist() == list(range(20))
    assert history_mask(4, 5, 0.001).tolist() == [0]


# --- counts and temperatures --------------------------------------------------------------------


@settings(max_examples=100)
@given(st.integers(1, 6000), st.integers(1, 100))
def test_counts_fall_to_the_end(tokens, steps):
    counts = cosine_counts(tokens, steps)
    assert len(counts) == steps and counts[-1] == -1
    assert counts == sorted(counts, reverse=True) and counts[0] <= tokens
    exact = [tokens * math.cos(math.pi / 2 * (s + 1) / steps) for s in range(steps)]
    assert all(abs(c - math.floor(e)) <= 1 for c, e in zip(counts[:-1], exact, strict=False))


def test_temperature_is_multiplied_down_to_zero():
    """lumos1-spec 5.5.1 at 50 steps."""
    values = temperatures(50, 1.0)
    assert values[:3] == pytest.approx([0.98, 0.9408, 0.884352])
    assert values[10] == pytest.approx(0.238, abs=5e-4)
    assert values[20] == pytest.approx(0.0042, abs=5e-4)
    assert values[30] == pytest.approx(2e-6, rel=0.5)
    assert values[-1] == 0.0
    assert temperatures(50, 2.0) == pytest.approx([2 * v for v in values])


def test_gumbel_is_finite_at_both_ends():
    ends = torch.tensor([0.0, 1e-30, 0.5, 1 - 2**-24])
    noise = gumbel(ends)
    assert noise.isfinite().all() and (noise.diff()[1:] > 0).all()
    assert noise[2] == pytest.approx(-math.log(-math.log(0.5)))


# --- re-masking ---------------------------------------------------------------------------------


def remask_by_hand(selected, noise, rank, temperature):
    confidence = [
        math.log(max(p, 1e-20)) + temperature * g for p, g in zip(selected, noise, strict=True)
    ]
    cut = sorted(confidence)[rank]
    return [c < cut for c in confidence]


def test_remask_by_hand():
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(2, 20))
        selected, noise = rng.random(count), rng.gumbel(size=count)
        rank, temperature = int(rng.integers(0, count)), float(rng.random())
        got = remask(
            torch.tensor(selected)[None],
            torch.tensor(noise)[None],
            torch.tensor([[rank]]),
            temperature,
        )
        assert got[0].tolist() == remask_by_hand(selected, noise, rank, temperature)
        assert int(got.sum()) == rank


def test_ties_at_the_cut_stay_decided():
    """lumos1-spec 5.5.4: strictly below, so fewer go back than the schedule says."""
    selected = torch.tensor([[1.0, 1.0, 1.0, 0.5, KNOWN]])
    back = remask(selected, torch.zeros(1, 5), torch.tensor([[3]]), 0.0)
    assert back.tolist() == [[False, False, False, True, False]]


def test_each_row_has_its_own_cut():
    selected = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2)
    back = remask(selected, torch.zeros(2, 4), torch.tensor([[1], [3]]), 0.0)
    assert back.sum(dim=1).tolist() == [1, 3]


# --- draws --------------------------------------------------------------------------------------


def test_draws_depend_on_seed_and_frame_alone():
    """DESIGN 5: not on the prompt's place, the batch, or what was drawn before."""
    many, one = philox_draws([3, 9, 4], 5, 16), philox_draws([9], 5, 16)
    many(0, 0), many(2, 7)
    for frame in (7, 0, 3):
        a, b = many(1, frame), one(0, frame)
        assert torch.equal(a.uniform, b.uniform) and torch.equal(a.noise, b.noise)
    assert not torch.equal(one(0, 0).uniform, one(0, 1).uniform)
    assert not torch.equal(many(0, 0).uniform, many(1, 0).uniform)


def test_draws_are_float32_uniforms_of_two_channels():
    """The recorded contract: Philox keyed by (seed, frame), `[S, N, 2]` float32."""
    draws = philox_draws([12], 4, 6)(0, 2)
    key = np.array([12, 2], dtype=np.uint64)
    raw = np.random.Generator(np.random.Philox(key=key)).random((4, 6, 2), dtype=np.float32)
    assert draws.uniform.dtype == torch.float32
    assert np.array_equal(draws.uniform.numpy(), raw[..., 0])
    assert torch.equal(draws.noise, gumbel(torch.from_numpy(raw[..., 1])))
    assert not torch.equal(gumbel(draws.uniform), draws.noise)


def test_draws_are_uniform():
    u = torch.stack([philox_draws([0], 50, 64)(0, f).uniform for f in range(8)])
    assert u.min() >= 0 and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.01)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.005)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seeds_are_64_bit(seed):
    with pytest.raises(InvalidSetting, match=f"seed is {seed}, expected a whole number from 0 to"):
        philox_draws([0, seed], 2, 2)
    philox_draws([(1 << 64) - 1], 2, 2)(0, 0)


def test_stacking_keeps_prompts_apart():
    draws = philox_draws([1, 2], 3, 4)
    both = stack_draws([draws(0, 0), draws(1, 0)], torch.device("cpu"))
    assert both.uniform.shape == (2, 3, 4) and both.tokens is None
    assert torch.equal(both.noise[1], draws(1, 0).noise)


def drawn(uniform: torch.Tensor, tokens=None) -> FrameDraws:
    return FrameDraws(uniform=uniform, noise=torch.zeros_like(uniform), tokens=tokens)


def test_a_draw_is_the_inverse_cdf():
    """The first code whose cumulative probability lies above the uniform, by a plain loop."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(2, 5, 17, generator=generator).softmax(dim=-1)
    uniform = torch.rand(2, 3, 8, generator=generator)
    chosen = torch.tensor([[0, 3, 7, 1, 2], [4, 4, 0, 6, 5]])
    got = pick(probs, drawn(uniform), 1, chosen)
    for b in range(2):
        for row in range(5):
            cdf = probs[b, row].cumsum(0)
            u = uniform[b, 1, chosen[b, row]] * cdf[-1]
            assert got[b, row] == next(i for i in range(17) if cdf[i] > u)


def test_draws_follow_the_probabilities_and_never_the_impossible():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0]).expand(1, 20000, 6)
    uniform = torch.rand(1, 1, 20000, generator=torch.Generator().manual_seed(0))
    codes = pick(probs, drawn(uniform), 0, torch.arange(20000)[None])
    share = codes[0].bincount(minlength=6) / 20000
    assert share[[0, 2, 5]].tolist() == [0, 0, 0]
    assert share[[1, 3, 4]].tolist() == pytest.approx([0.5, 0.25, 0.25], abs=0.01)


def test_the_ends_of_the_uniform():
    probs = torch.tensor([[[0.0, 0.3, 0.7]]])
    for u, code in ((0.0, 1), (1 - 2**-24, 2)):
        assert pick(probs, drawn(torch.full((1, 1, 1), u)), 0, torch.tensor([[0]])) == code


def test_greedy_and_recorded_tokens():
    probs = torch.tensor([[[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]])
    chosen = torch.tensor([[1, 0]])
    uniform = torch.full((1, 2, 2), 0.99)
    assert pick(probs, drawn(uniform), 0, chosen, greedy=True).tolist() == [[1, 0]]
    tokens = torch.tensor([[[7, 8], [9, 10]]])
    assert pick(probs, drawn(uniform, tokens), 1, chosen).tolist() == [[10, 9]]


@pytest.mark.parametrize(
    "settings_, words",
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"history_mask_ratio": 1.1}, "history_mask_ratio is 1.1, expected 0 to 1"),
        ({"history_mask_ratio": math.nan}, "history_mask_ratio is nan, expected 0 to 1"),
        ({"guidance": -1}, "guidance is -1, expected a finite number >= 0"),
        ({"guidance": math.inf}, "guidance is inf, expected a finite number >= 0"),
        ({"temperature": math.nan}, "temperature is nan, expected a finite number >= 0"),
    ],
)
def test_sampling_settings(settings_, words):
    with pytest.raises(InvalidSetting, match=words):
        Sampling(**settings_)
