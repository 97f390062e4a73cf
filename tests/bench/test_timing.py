"""Medians, intervals, ratios of pairs, straight lines."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packcache.bench.timing import lines_between, median, ratio

SECONDS = st.lists(st.floats(0.01, 100), min_size=1, max_size=9)


@settings(max_examples=30)
@given(values=SECONDS, times=st.floats(0.1, 10))
def test_intervals_hold_what_was_measured_and_scale(values, times):
    made = median(values)
    assert min(values) <= made.low <= made.value <= made.high <= max(values)
    scaled = median([times * value for value in values])
    for name in ("value", "low", "high"):
        assert getattr(scaled, name) == pytest.approx(times * getattr(made, name))


def test_one_measurement_has_no_width():
    made = median([2.5])
    assert made.low == made.value == made.high == 2.5


def test_the_interval_covers_the_true_median_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    made = [median(rng.normal(10, 1, size=11)) for _ in range(150)]
    assert 0.85 <= np.mean([one.low <= 10 <= one.high for one in made]) <= 1


def test_pairs_take_out_what_slows_both():
    slow = np.array([1, 3, 1, 9, 2, 1, 5.0])
    paired = ratio(2 * slow, slow)
    assert (paired.low, paired.value, paired.high) == (2, 2, 2)
    alone = ratio(2 * slow, slow, paired=False)
    assert alone.value == 2 and alone.low < 1.5 and alone.high > 2.5


def test_runs_of_other_lengths_are_compared_unpaired():
    assert ratio([4.0] * 3, [2.0] * 7, paired=False).value == 2


@given(
    known=st.dictionaries(st.integers(0, 20), st.floats(0, 10), min_size=2, max_size=6),
)
def test_lines_meet_what_is_known_and_bend_nowhere_else(known):
    first, last = min(known), max(known)
    places = range(first, last + 1)
    (line,) = lines_between({place: [value] for place, value in known.items()}, places)
    at = dict(zip(places, line, strict=True))
    assert all(at[place] == pytest.approx(value) for place, value in known.items())
    for place in range(first + 1, last):
        if place not in known:
            assert at[place] == pytest.approx((at[place - 1] + at[place + 1]) / 2)


def test_every_repeat_has_its_own_line():
    lines = lines_between({0: [0.0, 10.0], 2: [2.0, 20.0]}, [0, 1, 2])
    assert lines.tolist() == [[0, 1, 2], [10, 15, 20]]
