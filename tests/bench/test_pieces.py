"""Pieces are measured in turns, lie on straight lines between, and carry their intervals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcache.bench.pieces import Estimate, Piece, Pieces, Probe, interleave, knots
from packcache.errors import InvalidSetting

A, B, C = Piece("a", 1), Piece("b", 1), Piece("c", 1)


def probe(*pieces: Piece, log: list | None = None, seconds: float = 1.0, fails_at: int = -1):
    """A probe that notes its runs; the run number `fails_at` fails, 0 is making it."""
    runs = []

    def fail():
        raise RuntimeError("out of memory: 1 GiB\nand a long story")

    def run():
        runs.append(None)
        if log is not None:
            log.append(pieces[0].kind)
        if len(runs) == fails_at:
            fail()
        return [seconds * len(runs)] * len(pieces)

    return Probe(pieces=pieces, make=lambda: fail() if fails_at == 0 else run)


def measured(**seconds: list[float]) -> Pieces:
    """Pieces by name with these seconds."""
    return Pieces(
        seconds={Piece(name, 1): np.array(times) for name, times in seconds.items()}, failed={}
    )


# --- measuring ----------------------------------------------------------------------------------


def test_probes_take_turns_after_a_warm_up():
    log: list[str] = []
    pieces = interleave([probe(A, log=log), probe(B, C, log=log)], repeats=3)
    assert log == ["a", "b"] * 4
    assert {piece: times.tolist() for piece, times in pieces.seconds.items()} == {
        piece: [2.0, 3.0, 4.0] for piece in (A, B, C)
    }
    assert pieces.rounds == 3 and not pieces.failed


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_a_probe_that_fails_is_left_out_and_the_others_go_on(fails_at):
    log: list[str] = []
    pieces = interleave([probe(A, B, log=log, fails_at=fails_at), probe(C, log=log)], repeats=4)
    assert pieces.failed == dict.fromkeys((A, B), "out of memory: 1 GiB")
    assert list(pieces.seconds) == [C] and len(pieces.seconds[C]) == 4
    assert log.count("a") == fails_at and log.count("c") == 5
    assert pieces.reason({C: 2.0}) is None
    assert pieces.reason({C: 2.0, B: 1.0}) == "b, rows 1: out of memory: 1 GiB"


def test_a_mistake_is_not_taken_for_a_piece_that_did_not_fit():
    def run():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleave([Probe(pieces=(A,), make=lambda: run)], repeats=1)


def test_progress_is_told():
    told: list[tuple[int, int]] = []
    interleave([probe(A), probe(B)], repeats=2, on_run=lambda *of: told.append(of))
    assert told == [(done, 6) for done in range(1, 7)]


def test_each_round_tells_what_there_is_so_far():
    told: list[Pieces] = []
    interleave([probe(A, fails_at=3), probe(B)], repeats=3, on_round=told.append)
    assert [pieces.rounds for pieces in told] == [1, 2, 3]
    assert [set(pieces.seconds) for pieces in told] == [{A, B}, {B}, {B}]
    assert [set(pieces.failed) for pieces in told] == [set(), {A}, {A}]
    assert told[1].seconds[B].tolist() == [2.0, 3.0]


def test_repeats_below_one():
    with pytest.raises(InvalidSetting, match=r"^repeats is 0, expected at least 1$"):
        interleave([probe(A)], repeats=0)


# --- between ------------------------------------------------------------------------------------


@given(st.sets(st.integers(1, 500), min_size=2), st.floats(0, 9), st.floats(0, 0.1), st.randoms())
def test_straight_lines_are_kept_and_knots_are_exact(rows, start, slope, random):
    pieces = Pieces(seconds={Piece("a", n): np.full(3, start + slope * n) for n in rows}, failed={})
    for n in rows:
        assert pieces.between(Piece("a", n)) == {Piece("a", n): 1.0}
    n = random.randint(min(rows), max(rows))
    weights = pieces.between(Piece("a", n))
    assert sum(weights.values()) == pytest.approx(1)
    assert min(weights.values()) >= 0
    assert pieces.estimate(weights).value == pytest.approx(start + slope * n)


def test_neighbours_are_of_the_same_kind_keys_and_label():
    known = [Piece("a", 1, 5), Piece("a", 9, 5), Piece("a", 4, 6), Piece("b", 5, 5)]
    pieces = Pieces(seconds={piece: np.ones(1) for piece in known}, failed={})
    assert pieces.between(Piece("a", 5, 5)) == {known[0]: 0.5, known[1]: 0.5}


@pytest.mark.parametrize("rows", [1, 9])
def test_nothing_is_extrapolated(rows):
    pieces = Pieces(seconds={Piece("a", n): np.ones(1) for n in (2, 8)}, failed={})
    with pytest.raises(
        InvalidSetting,
        match=rf"^a, rows {rows} was not measured, and it does not lie between rows that were "
        r"\(2, 8\): measure the pieces of this workload$",
    ):
        pieces.between(Piece("a", rows))


def test_a_failed_neighbour_is_a_reason():
    pieces = Pieces(seconds={Piece("a", 2): np.ones(1)}, failed={Piece("a", 8): "no room"})
    assert pieces.reason(pieces.between(Piece("a", 5))) == "a, rows 8: no room"


@given(st.sets(st.integers(1, 5000), min_size=1), st.sampled_from([1.5, 2.0, 3.0]))
def test_knots_are_some_of_the_counts_and_never_far_apart(counts, ratio):
    chosen = knots(counts, ratio)
    assert chosen == sorted(set(chosen)) and set(chosen) <= counts
    assert {min(counts), max(counts)} <= set(chosen)
    for low, high in itertools.pairwise(chosen):
        between = [n for n in counts if low < n < high]
        assert low * ratio >= high or not between
    assert sum(chosen[2:]) <= 2 * max(counts) * ratio / (ratio - 1)


def test_knots_of_a_schedule():
    assert knots([*range(100, 1001)]) == [100, 125, 250, 500, 1000]
    assert knots([1000, 10, 9]) == [9, 10, 1000]
    assert knots([7, 7]) == [7]


# --- sums ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=9), st.floats(0.5, 50))
def test_intervals_hold_their_value(times, often):
    found = measured(a=times).estimate({A: often})
    assert found.value == pytest.approx(often * np.median(times))
    assert found.low <= found.value * (1 + 1e-9) and found.high >= found.value * (1 - 1e-9)
    assert often * min(times) <= found.low * (1 + 1e-9)
    assert found.high <= often * max(times) * (1 + 1e-9)


def test_a_sum_is_one_of_medians_with_its_interval():
    pieces = measured(a=[1, 2, 9], b=[10, 10, 10])
    assert pieces.estimate({A: 3.0, B: -0.5}).value == 3 * 2 - 5
    still = pieces.estimate({B: 2.0})
    assert (still.low, still.value, still.high) == (20, 20, 20)
    moving = pieces.estimate({A: 1.0})
    assert (moving.low, moving.high) == (1, 9)


def test_ratios_are_paired():
    """A machine that is slow in a round is slow for both: their ratio does not move."""
    pieces = measured(a=[1, 2, 3, 9, 4, 8, 6], b=[2, 4, 6, 18, 8, 16, 12])
    own, other = pieces.estimate({A: 1.0}), pieces.estimate({B: 1.0})
    assert own.low < own.high
    ratio = other.over(own)
    assert (ratio.low, ratio.value, ratio.high) == (2, 2, 2)


def test_the_interval_is_of_95_percent():
    draws = np.arange(1001) / 1000
    found = Estimate.of(0.5, draws)
    assert (found.low, found.high) == pytest.approx((0.025, 0.975))


def test_the_same_seed_gives_the_same_interval():
    times = {A: np.random.default_rng(1).random(7)}
    found = [Pieces(seconds=times, failed={}, seed=seed).estimate({A: 1.0}) for seed in (1, 1, 2)]
    assert (found[0].draws == found[1].draws).all()
    assert not (found[0].draws == found[2].draws).all()
