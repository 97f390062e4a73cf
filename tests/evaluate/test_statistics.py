"""Intervals and tests agree with hand-computed values, with SciPy, and with what they mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcache.errors import InvalidSetting
from packcache.evaluate.statistics import (
    bootstrap,
    holm,
    known_mean,
    mcnemar,
    sign_flip,
    versus,
    wilson,
)

stats = pytest.importorskip("scipy.stats", reason="SciPy comes with the extra [eval]")

numbers = st.lists(st.floats(-100, 100), min_size=1, max_size=12)
outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30)


# --- bootstrap ---------------------------------------------------------------------------------


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).normal(1, 2, 80)
    ours = bootstrap(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile")
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.05)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.05)


def test_bootstrap_of_two_rows_by_hand():
    """Means 0, 1/2, 1 with chances 1/4, 1/2, 1/4: the 95 % bounds are the ends."""
    interval = bootstrap([0.0, 1.0])
    assert (interval.mean, interval.low, interval.high) == (0.5, 0, 1)
    narrow = bootstrap([0.0, 1.0], level=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_bootstrap_columns_share_their_resamples():
    values = np.random.default_rng(1).normal(size=(20, 2, 3))
    together = bootstrap(values, resamples=500)
    assert together.mean.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        alone = bootstrap(values[:, i, j], resamples=500)
        assert alone.low == pytest.approx(together.low[i, j], abs=1e-12)
        assert alone.high == pytest.approx(together.high[i, j], abs=1e-12)


def test_bootstrap_in_blocks_is_the_same(monkeypatch):
    values = np.random.default_rng(2).normal(size=30)
    whole = bootstrap(values, resamples=1000)
    monkeypatch.setattr("packcache.evaluate.statistics._BLOCK", 77)
    blocks = bootstrap(values, resamples=1000)
    assert (whole.low, whole.high) == (blocks.low, blocks.high)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    intervals = [bootstrap(rng.normal(size=50), resamples=400, seed=n) for n in range(300)]
    covered = np.mean([i.low <= 0 <= i.high for i in intervals])
    assert 0.89 <= covered <= 0.98


@given(numbers, st.floats(-10, 10))
def test_bootstrap_lies_around_the_mean_and_moves_along(values, shift):
    interval = bootstrap(values, resamples=200)
    spread = 1e-9 * (1 + max(abs(v) for v in values))
    assert min(values) - spread <= interval.low <= interval.high <= max(values) + spread
    moved = bootstrap(np.add(values, shift), resamples=200)
    assert moved.low == pytest.approx(interval.low + shift, abs=1e-9)
    assert interval.mean == pytest.approx(np.mean(values), abs=1e-9)


def test_bootstrap_leaves_out_incomplete_rows_of_all_columns():
    values = np.array([[0.0, 1], [np.nan, 5], [2, 3]])
    interval = bootstrap(values, skip_incomplete=True)
    assert interval.at(1) == {"clips": 2, "mean": 2, "low": 1, "high": 3}
    nothing = bootstrap(values[1:2], skip_incomplete=True)
    assert nothing.mean.shape == (2,) and nothing.at(0) is None


def test_bootstrap_depends_on_its_seed_alone():
    values = np.random.default_rng(4).normal(size=40)
    assert bootstrap(values).low == bootstrap(values).low
    assert bootstrap(values, seed=1).low != bootstrap(values).low


# --- shares ------------------------------------------------------------------------------------


def test_wilson_by_hand():
    """z = 1.96, 8 of 10: (0.8 + 0.192) / 1.384 -+ 1.96 sqrt(0.016 + 0.0096) / 1.384."""
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)


def test_wilson_at_the_ends_keeps_its_width():
    low, high = wilson(0, 20)
    assert low == 0
    assert high == pytest.approx(0.1611, abs=1e-4)
    assert wilson(20, 20)[0] == pytest.approx(1 - high)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_is_symmetric(case):
    hits, total = case
    low, high = wilson(hits, total)
    assert 0 <= low <= hits / total + 1e-12 and hits / total - 1e-12 <= high <= 1
    other = wilson(total - hits, total)
    assert other == pytest.approx((1 - high, 1 - low), abs=1e-9)


# --- paired tests ------------------------------------------------------------------------------


def pairs(gained: int, lost: int, same: int = 5) -> tuple[list[bool], list[bool]]:
    """Outcomes of two methods that differ in so many pairs."""
    a = [True] * gained + [False] * lost + [True, False] * same
    b = [False] * gained + [True] * lost + [True, False] * same
    return a, b


@pytest.mark.parametrize(
    "gained, lost, p",
    [(0, 0, 1.0), (1, 0, 1.0), (6, 0, 2 / 64), (1, 9, 22 / 1024), (5, 5, 1.0)],
)
def test_mcnemar_by_hand(gained, lost, p):
    """Twice the tail of a fair coin: 1 of 10 is 2 (1 + 10) / 2^10."""
    assert mcnemar(*pairs(gained, lost)) == pytest.approx(p)


@given(outcomes)
def test_mcnemar_is_the_exact_sign_flip_test(rows):
    """For outcomes of 0 and 1 the two tests are the same one."""
    a, b = np.array(rows).T
    assert mcnemar(a, b) == pytest.approx(mcnemar(b, a))
    if (a != b).sum() <= 10:
        assert sign_flip(a.astype(float) - b) == pytest.approx(mcnemar(a, b))


def test_sign_flip_by_hand():
    """Of the 8 sums of -+1 -+2 -+3, two are as large as 6, four as large as 4."""
    assert sign_flip([1, 2, 3]) == 2 / 8
    assert sign_flip([-1, 2, 3]) == 4 / 8
    assert sign_flip([0, 0]) == 1


def test_sign_flip_agrees_with_scipy():
    """Few enough rows for SciPy, which draws from an unseeded generator, to try all signs."""
    values = np.random.default_rng(5).normal(0.4, 1, 12)
    theirs = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", vectorized=True, n_resamples=10_000
    )
    assert sign_flip(values) == pytest.approx(theirs.pvalue)


@given(st.lists(st.floats(-5, 5), min_size=14, max_size=20))
def test_drawn_signs_give_a_p_that_ignores_the_sign(values):
    p = sign_flip(values, resamples=99)
    assert 0 < p <= 1
    assert sign_flip(np.negative(values), resamples=99) == p


def test_sign_flip_drawn_is_near_exact():
    values = np.random.default_rng(6).normal(0.5, 1, 12)
    exact = sign_flip(values)
    assert sign_flip(values, resamples=4_000) == pytest.approx(exact, abs=0.03)
    assert sign_flip(np.ones(40)) == pytest.approx(1 / 10_001)


# --- several tests at once ---------------------------------------------------------------------


def test_holm_by_hand():
    """0.01 x 4, then 0.02 x 3, then 0.03 x 2 and 0.04 x 1 may not fall below it."""
    corrected = holm({"d": 0.04, "a": 0.01, "b": 0.02, "c": 0.03})
    assert corrected == pytest.approx({"d": 0.06, "a": 0.04, "b": 0.06, "c": 0.06})
    assert list(corrected) == ["d", "a", "b", "c"]
    assert holm({}) == {}


@given(st.dictionaries(st.integers(), st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_and_lies_between_raw_and_bonferroni(p):
    corrected = holm(p)
    for label, value in p.items():
        assert value <= corrected[label] <= min(1, len(p) * value)
        assert all(corrected[label] <= corrected[o] for o in p if value < p[o])


def test_versus_counts_pairs_and_corrects_over_methods():
    full, window = pairs(7, 0)
    rows = versus({"full": full, "window": window, "same": full}, "full")
    assert rows["window"] == {"gained": 0, "lost": 7, "p": 2 / 2**7, "p_holm": 4 / 2**7}
    assert rows["same"] == {"gained": 0, "lost": 0, "p": 1, "p_holm": 1}
    assert versus({"full": full}, "full") == {}


# --- wrong use ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: bootstrap([]), "at least one row"),
        (lambda: bootstrap([1.0, float("nan")]), "NaN"),
        (lambda: bootstrap([1.0], level=1.0), "level is 1.0, expected above 0 and below 1"),
        (lambda: bootstrap([1.0], resamples=0), "resamples is 0"),
        (lambda: wilson(3, 2), "3 hits of 2"),
        (lambda: mcnemar([True], [True, False]), "one entry for each pair"),
        (lambda: mcnemar([0.5], [1]), "true and false"),
        (lambda: sign_flip([]), "one finite number for each pair"),
        (lambda: bootstrap([np.inf, 1.0], skip_incomplete=True), "NaN or infinity"),
        (lambda: versus({"a": [True]}, "b"), "reference 'b' is none of a"),
        (lambda: holm({"a": 1.2}), "p of 'a' is 1.2"),
    ],
)
def test_wrong_use_is_told(call, says):
    with pytest.raises(InvalidSetting, match=says):
        call()


def test_a_mean_of_what_is_known():
    values = np.array([[1.0, 3.0, np.nan], [np.nan] * 3, [2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(known_mean(values), [2.0, np.nan, 2.0])
    assert known_mean(values[None]).shape == (1, 3)
