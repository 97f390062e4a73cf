"""HOW MUCH: water-filling against an exhaustive oracle, the worked examples, and the units."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packcache.budget import (
    allocate,
    budget_tokens,
    decay_weights,
    fixed_shares,
    half_life_weights,
)
from packcache.errors import InvalidSetting
from packcache.policies import PackCache, SlidingWindow
from tests.tools import counts, grow

N = 4084


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", range(1, 60))
def test_eq_7_is_a_partition_of_unity(window):
    """Paper Eq. 7: the shares of the window add up to one exactly, whatever W."""
    assert sum(map(Fraction, half_life_weights(window))) == 1


def test_weights_of_the_printed_windows():
    assert half_life_weights(1) == [1.0]
    assert half_life_weights(4) == [1 / 2, 1 / 4, 1 / 8, 1 / 8]
    assert half_life_weights(3, half_life=2) == [2**-0.5, 2**-1, 2**-1]
    assert decay_weights([1, 2, 5]) == [1 / 2, 1 / 4, 1 / 32]
    assert decay_weights([1, 2, 5], last=3) == [1 / 2, 1 / 4, 1 / 8]


def test_weights_refuse_what_is_no_window_or_half_life():
    with pytest.raises(InvalidSetting, match="window is 0, expected at least 1 history frame"):
        half_life_weights(0)
    for bad in (0, -1, math.inf, math.nan):
        with pytest.raises(InvalidSetting, match=f"half_life is {bad}, expected a finite number"):
            decay_weights([1], bad)


# --- water-filling ------------------------------------------------------------------------------


def exhaustive(caps, floors, weights, budget) -> list[Fraction]:
    """Every frame at its floor, free, or at its cap: the one combination that satisfies KKT."""
    target = min(budget, sum(caps))
    for state in itertools.product(("floor", "free", "cap"), repeat=len(caps)):
        rows = list(zip(state, caps, floors, weights, strict=True))
        fixed = sum(m if s == "floor" else n for s, n, m, w in rows if s != "free")
        free = sum((w for s, n, m, w in rows if s == "free"), Fraction(0))
        if free:
            levels = [(target - fixed) / free]
        elif fixed == target:  # lambda is any level between the floors and the caps
            levels = [Fraction(max((n / w for s, n, m, w in rows if s == "cap"), default=0))]
        else:
            continue
        for level in levels:
            k = [min(Fraction(n), max(Fraction(m), level * w)) for s, n, m, w in rows]
            if sum(k) == target:
                return k
    raise AssertionError("no solution")


def rounded(exact: list[Fraction]) -> list[int]:
    """One token each to the largest fractional parts, the newer frame first among equals."""
    k = [math.floor(x) for x in exact]
    for _ in range(int(sum(exact)) - sum(k)):
        best = max(range(len(k)), key=lambda i: (exact[i] - k[i], -i))
        k[best] += 1
    return k


@st.composite
def problems(draw, frames=4, most=40):
    count = draw(st.integers(1, frames))
    caps = draw(st.lists(st.integers(0, most), min_size=count, max_size=count))
    floors = [draw(st.integers(0, 1 + n // 3)) for n in caps]
    weights = [Fraction(draw(st.integers(1, 64)), 64) for _ in caps]
    return caps, floors, weights, draw(st.integers(0, sum(caps) + 5))


@settings(max_examples=600)
@given(problems())
def test_allocation_is_the_exhaustive_solution(problem):
    """KKT of methods 3.1 by trying every combination, then largest remainder, exactly."""
    caps, floors, weights, budget = problem
    floors = [min(m, n) for m, n in zip(floors, caps, strict=True)]
    kept = len(caps)
    while sum(floors[:kept]) > budget:
        kept -= 1
    exact = exhaustive(caps[:kept], floors[:kept], weights[:kept], budget)
    want = rounded(exact) + [0] * (len(caps) - kept)
    assert allocate(caps, budget, weights=weights, floors=floors) == want


def test_allocation_is_the_bisected_level():
    """Larger problems: lambda by bisection in fractions; each count within one token."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        count = int(rng.integers(1, 13))
        caps = rng.integers(0, 500, count).tolist()
        floors = [min(n, int(m)) for n, m in zip(caps, rng.integers(0, 4, count), strict=True)]
        weights = [Fraction(int(w), 100) for w in rng.integers(1, 100, count)]
        budget = int(rng.integers(sum(floors), sum(caps) + 10))
        low, high = Fraction(0), Fraction(10**6)
        rows = list(zip(caps, floors, weights, strict=True))
        for _ in range(60):
            level = (low + high) / 2
            total = sum(min(Fraction(n), max(Fraction(m), level * w)) for n, m, w in rows)
            low, high = (level, high) if total < min(budget, sum(caps)) else (low, level)
        got = allocate(caps, budget, weights=weights, floors=floors)
        assert sum(got) == min(budget, sum(caps))
        for k, (n, m, w) in zip(got, rows, strict=True):
            assert m <= k <= n
            assert abs(k - min(n, max(m, high * w))) < 1 + Fraction(1, 1000)


@settings(max_examples=600)
@given(problems(frames=9))
def test_sums_caps_floors_and_what_is_dropped(problem):
    """Inside the budget, inside caps and floors; only the oldest are dropped, only if they must."""
    caps, floors, weights, budget = problem
    got = allocate(caps, budget, weights=weights, floors=floors)
    floors = [min(m, n) for m, n in zip(floors, caps, strict=True)]
    dropped = next((i for i in range(len(caps) + 1) if sum(floors[: i + 1]) > budget), len(caps))
    assert sum(got) == min(budget, sum(caps[:dropped]))
    assert all(m <= k <= n for k, m, n in list(zip(got, floors, caps, strict=True))[:dropped])
    assert not any(got[dropped:])


@settings(max_examples=300)
@given(st.integers(1, 9), st.integers(0, 800), st.integers(1, 100))
def test_counts_never_grow_with_age(frames, budget, n):
    """Equal frames and a falling kernel: the newer frame never holds less."""
    got = allocate([n] * frames, budget, weights=half_life_weights(frames))
    assert got == sorted(got, reverse=True)


def test_floors_default_to_one_token_and_the_oldest_leave_first():
    assert allocate([9, 9, 9], 3, weights=[1, 0, 0]) == [1, 1, 1]
    assert allocate([9, 9, 9], 2, weights=[1, 1, 1]) == [1, 1, 0]
    assert allocate([9, 0, 9], 2, weights=[1, 1, 1]) == [1, 0, 1]
    assert allocate([9, 9, 9], 10, weights=[1, 1, 1], floors=[4, 4, 4]) == [5, 5, 0]
    assert allocate([9, 9], 0, weights=[1, 1]) == [0, 0]
    assert allocate([], 5, weights=[]) == []


def test_ties_go_to_the_newer_frame():
    assert allocate([9, 9, 9], 7, weights=[1, 1, 1]) == [3, 2, 2]
    assert allocate([9, 9, 9], 8, weights=[1, 1, 1]) == [3, 3, 2]
    assert allocate([76] * 4, 76, weights=half_life_weights(4)) == [38, 19, 10, 9]


def test_weightless_frames_take_what_is_left_newest_first():
    assert allocate([4, 9, 9], 10, weights=[1, 0, 0], floors=[0, 0, 0]) == [4, 6, 0]


@pytest.mark.parametrize(
    "frames, shares",
    [(1, [0.5, 0.25, 0.125, 0.125]), (2, [1, 0.5, 0.25, 0.25]), (3, [1, 1, 0.5, 0.5])],
)
def test_shares_of_methods_3_1(frames, shares):
    got = allocate([N] * 4, frames * N, weights=half_life_weights(4), floors=[0] * 4)
    assert sum(got) == frames * N
    assert all(abs(k - share * N) <= 0.5 for k, share in zip(got, shares, strict=True))


def test_shares_of_methods_3_1_at_three_and_a_half_frames():
    got = allocate([N] * 4, 7 * N // 2, weights=half_life_weights(4), floors=[0] * 4)
    assert got == [N, N, 3 * N // 4, 3 * N // 4]


@pytest.mark.parametrize(
    "args, words",
    [
        ({"available": [1, 2], "weights": [1]}, "1 weights for 2 frames: expected one each"),
        ({"available": [1], "weights": [1], "floors": [1, 1]}, "2 floors for 1 frames"),
        ({"available": [-1], "weights": [1]}, "must not be negative"),
        ({"available": [1], "weights": [1], "floors": [-1]}, "must not be negative"),
        ({"available": [1], "weights": [1], "budget": -1}, "must not be negative"),
        ({"available": [1], "weights": [-0.5]}, r"weights are \[-0.5\], expected finite numbers"),
        ({"available": [1], "weights": [math.nan]}, r"weights are \[nan\], expected finite"),
        ({"available": [1], "weights": [math.inf]}, r"weights are \[inf\], expected finite"),
    ],
)
def test_wrong_arguments(args, words):
    with pytest.raises(ValueError, match=words):
        allocate(**{"budget": 1, **args})


# --- fixed shares -------------------------------------------------------------------------------


def test_fixed_shares_redistribute_nothing():
    """methods 1.3 read literally: a ratio of each frame, capped at what is held."""
    assert fixed_shares([76] * 4, 76, weights=half_life_weights(4)) == [38, 19, 10, 9]
    assert fixed_shares([76], 76, weights=half_life_weights(4)[:1]) == [38]
    assert fixed_shares([76, 5], 76, weights=half_life_weights(4)[:2]) == [38, 5]


# --- the worked example -------------------------------------------------------------------------


def test_the_worked_example():
    """DESIGN 4.2: 76 tokens, W = 4, half-life 1, from the first commit on."""
    held = [counts(timeline) for timeline in grow(PackCache(), 20)]
    assert held[:4] == [[76], [51, 25], [43, 22, 11], [38, 19, 10, 9]]
    assert held[4:] == [[38, 19, 10, 9]] * 16


def test_the_literal_example():
    """Nothing is redistributed while the window fills."""
    held = [counts(timeline) for timeline in grow(PackCache.paper_literal(), 7)]
    assert held == [[76], [38, 19], [38, 19, 9], *[[38, 19, 10, 9]] * 4]


def test_a_literal_budget_fills_once():
    """After the first packing the counts stay, though Eq. 7 leaves part of the budget unused."""
    policy = PackCache(budget=3.5, redistribute=False)
    held = [counts(timeline) for timeline in grow(policy, 9)]
    assert held[:3] == [[76], [76, 76], [76, 76, 76]]
    assert held[4:] == [[76, 67, 33, 33]] * 5


def test_filling_whole_frames_packs_when_the_window_is_full():
    held = [counts(timeline) for timeline in grow(PackCache(fill="window"), 6)]
    assert held[:3] == [[76], [76, 76], [76, 76, 76]]
    assert held[3:] == [[38, 19, 10, 9]] * 3


def test_the_sliding_window_is_the_budget_of_one_frame():
    held = [counts(timeline) for timeline in grow(SlidingWindow(), 4)]
    assert held == [[76]] * 4


# --- units --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget, tokens",
    [
        (None, None),
        (1, 4084),
        (0.5, 2042),
        (3.0, 12252),
        (np.float64(0.25), 1021),
        ("4084tok", 4084),
        (" 12 tok ", 12),
        ("7.9tok", 7),
        ("1KiB", 1024 // 8),
        ("512MiB", 512 * 2**20 // 8),
        ("1.5GiB", 3 * 2**29 // 8),
    ],
)
def test_units_of_a_budget(budget, tokens):
    assert budget_tokens(budget, frame_tokens=N, token_bytes=8) == tokens


def test_a_budget_in_frames_is_taken_as_written():
    """0.57 of 100 tokens are 57, though 0.57 * 100 is 56.99999999999999 in binary."""
    assert [budget_tokens(b / 100, frame_tokens=100) for b in range(1, 101)] == [*range(1, 101)]


@pytest.mark.parametrize("budget", [0, -1, 0.0, math.nan, math.inf, -math.inf, True, False])
def test_a_budget_is_a_finite_number_above_zero(budget):
    with pytest.raises(InvalidSetting, match=f"budget is {budget}, expected latent frames above 0"):
        budget_tokens(budget, frame_tokens=N)


@pytest.mark.parametrize("budget", ["", "4084", "4084 tokens", "1MB", "-1tok", "1e3tok", "tok"])
def test_a_budget_in_words_has_a_known_unit(budget):
    with pytest.raises(InvalidSetting, match=r"expected latent frames .*4084tok.*512MiB"):
        budget_tokens(budget, frame_tokens=N, token_bytes=8)


@pytest.mark.parametrize("budget, n", [(0.0001, N), ("0tok", N), ("0.5tok", N), ("0.001KiB", N)])
def test_a_budget_below_one_token(budget, n):
    with pytest.raises(InvalidSetting, match=f"budget {budget} is below one token: give more"):
        budget_tokens(budget, frame_tokens=n, token_bytes=8)


def test_a_budget_in_bytes_must_know_the_bytes_of_a_token():
    with pytest.raises(InvalidSetting, match="'1MiB' is in bytes, but the bytes of a token are un"):
        budget_tokens("1MiB", frame_tokens=N)


@pytest.mark.parametrize("budget", ["3tok", 0.01])
def test_a_budget_below_one_token_per_window_frame(budget):
    with pytest.raises(InvalidSetting, match=r"is . tokens for a window of 4 latent frames"):
        PackCache(budget=budget).budget_for(frame_tokens=300)
    assert PackCache(budget="4tok").budget_for(frame_tokens=300) == 4
