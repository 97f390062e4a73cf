"""Medians of repeated measurements, what their ratios are, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packcache.bench.pieces import Estimate

__all__ = ["lines_between", "median", "ratio"]

RESAMPLES = 4000
_SEED = 0

Values = NDArray[np.float64]


def median(values: ArrayLike) -> Estimate:
    """The median of measurements `[n]`, which are resampled; one alone has an interval of no width.

    Calls with equally many values share their resamples.
    """
    numbers = np.asarray(values, dtype=np.float64)
    return Estimate.of(float(np.median(numbers)), _medians(numbers, _SEED))


def ratio(above: ArrayLike, below: ArrayLike, *, paired: bool = True) -> Estimate:
    """How many times larger `above [n]` is than `below [m]`.

    Paired measurements were taken side by side, so that what slows the machine slows both: the
    median of the pairs' ratios, pairs resampled. Otherwise the ratio of the medians, each resampled
    on its own.
    """
    one, two = (np.asarray(values, dtype=np.float64) for values in (above, below))
    if paired:
        return median(one / two)
    drawn = _medians(one, _SEED) / _medians(two, _SEED + 1)
    return Estimate.of(float(np.median(one) / np.median(two)), drawn)


def _medians(numbers: Values, seed: int) -> Values:
    """Medians of resamples."""
    drawn = np.random.default_rng(seed).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    return np.median(numbers[drawn], axis=1)


def lines_between(known: Mapping[int, Sequence[float]], places: Sequence[int]) -> Values:
    """Values `[n, places]`: each repeat's straight lines between the places where it is known."""
    at = sorted(known)
    rows = np.array([known[place] for place in at], dtype=np.float64)  # [known, n]
    return np.stack([np.interp(places, at, repeat) for repeat in rows.T])
