"""Statistics of paired comparisons: what a difference is worth (evaluation 8d).

    interval = bootstrap(recalled - recalled_full)            # mean and its 95 % bounds
    p = mcnemar(recalled, recalled_full)                      # the same pairs, as a test
    holm({"window": 0.01, "sink": 0.04})                      # several tests at once

Rows are clips, the unit that is resampled. Every function is deterministic for its seed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packcache.errors import InvalidSetting

__all__ = [
    "RESAMPLES",
    "Interval",
    "bootstrap",
    "holm",
    "known_mean",
    "mcnemar",
    "sign_flip",
    "versus",
    "wilson",
]

RESAMPLES = 10_000

#: Resampled clips drawn at once: 32 MB of indices.
_BLOCK = 4_000_000

#: Sums of the same numbers in another order differ by rounding; they still count as equal.
_ROUNDING = 1e-12

Label = TypeVar("Label", bound=Hashable)


@dataclass(frozen=True, kw_only=True, eq=False)
class Interval:
    """A mean and the bounds of its interval, `[...]` each: one entry a column; `rows` counted."""

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    rows: int

    def at(self, *column: int) -> dict[str, float] | None:
        """One column in plain values, for a result; None if no row was counted."""
        if not self.rows:
            return None
        bounds = {name: float(getattr(self, name)[column]) for name in ("mean", "low", "high")}
        return {"clips": self.rows, **bounds}


def bootstrap(
    values: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    skip_incomplete: bool = False,
) -> Interval:
    """Percentile interval of the mean over rows of `values [n, ...]`, resampled row by row.

    Give differences `a - b` of paired rows for the interval of a mean difference. All columns share
    their resamples, and so do calls with the same seed and number of rows. With one row the
    interval has no width: there is nothing to resample.

    NaN is refused. With `skip_incomplete` a row that holds one in any column is left out of all
    columns, which stay paired; with no row left everything is NaN.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim == 0 or not len(rows):
        raise InvalidSetting(f"values have shape {rows.shape}, expected at least one row")
    _between("level", level)
    _at_least_one("resamples", resamples)
    flat = rows.reshape(len(rows), -1)
    if skip_incomplete:
        flat = flat[~np.isnan(flat).any(axis=1)]
    if not np.isfinite(flat).all():
        raise InvalidSetting("values hold NaN or infinity: leave such rows out and say how many")
    low, high = _bounds(flat, level, resamples, seed) if len(flat) else (flat.sum(0) * np.nan,) * 2
    mean = flat.mean(axis=0) if len(flat) else low
    mean, low, high = (bound.reshape(rows.shape[1:]) for bound in (mean, low, high))
    return Interval(mean=mean, low=low, high=high, rows=len(flat))


def _bounds(
    flat: NDArray[np.float64], level: float, resamples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Quantiles of the resampled means of rows `[n, columns]`."""
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, flat.shape[1]))
    block = max(1, _BLOCK // len(flat))
    for start in range(0, resamples, block):
        drawn = rng.integers(len(flat), size=(min(block, resamples - start), len(flat)))
        # How often each row was drawn: one matrix product then serves all columns.
        line = np.arange(len(drawn))[:, None] * len(flat)
        times = np.bincount((drawn + line).ravel(), minlength=drawn.size).reshape(drawn.shape)
        means[start : start + len(drawn)] = times @ flat / len(flat)
    tail = (1 - level) / 2
    low, high = np.quantile(means, (tail, 1 - tail), axis=0)
    return low, high


def known_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis of what is no NaN; NaN where nothing is known."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(axis=-1)
    return np.where(known.any(axis=-1), total / np.maximum(known.sum(axis=-1), 1), np.nan)


def wilson(hits: int, total: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share `hits / total`; sensible at 0 and at 1 too."""
    if not 0 <= hits <= total or total < 1:
        raise InvalidSetting(f"{hits} hits of {total}, expected 0 <= hits <= total, total >= 1")
    _between("level", level)
    interval = _stats().binomtest(hits, total).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Exact two-sided McNemar p of paired outcomes (true or false) `[n]`.

    Only pairs that disagree speak: under the null each falls either way with chance 1/2.
    """
    a, b = _pair(first, second)
    gained, lost = int((a & ~b).sum()), int((~a & b).sum())
    if gained + lost == 0:
        return 1.0
    return float(_stats().binomtest(gained, gained + lost).pvalue)


def sign_flip(differences: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p of paired differences `[n]`: how often random signs give as large a mean.

    All signs are tried where that is no more than `resamples`, which makes p exact; otherwise
    random ones are drawn and the observed one counts among them, so p is never 0.
    """
    rows = np.asarray(differences, dtype=np.float64)
    if rows.ndim != 1 or not len(rows) or not np.isfinite(rows).all():
        raise InvalidSetting(
            f"differences have shape {rows.shape}, expected one finite number for each pair"
        )
    _at_least_one("resamples", resamples)
    rows = rows[rows != 0]  # the sign of a zero changes nothing
    least = abs(rows.sum()) - _ROUNDING * np.abs(rows).sum()
    if 2 ** len(rows) <= resamples:
        bits = np.arange(2 ** len(rows))[:, None] >> np.arange(len(rows)) & 1
        return float((np.abs((1 - 2 * bits) @ rows) >= least).mean())
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(rows))
    as_large = 0
    for start in range(0, resamples, block):
        signs = rng.integers(2, size=(min(block, resamples - start), len(rows)), dtype=np.int8)
        as_large += int((np.abs((1 - 2 * signs) @ rows) >= least).sum())
    return (1 + as_large) / (1 + resamples)


def holm(p: Mapping[Label, float]) -> dict[Label, float]:
    """p values corrected for their number by Holm's step-down rule, in the order given."""
    for label, value in p.items():
        if not 0 <= value <= 1:
            raise InvalidSetting(f"p of {label!r} is {value}, expected 0 to 1")
    corrected: dict[Label, float] = {}
    highest = 0.0
    for rank, label in enumerate(sorted(p, key=lambda name: p[name])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[label]))
        corrected[label] = highest
    return {label: corrected[label] for label in p}


def versus(outcomes: Mapping[Label, ArrayLike], reference: Label) -> dict[Label, dict[str, Any]]:
    """Each method against the reference on the same clips: pairs gained and lost, McNemar's p.

    `outcomes[method] [n]` are true or false. `p_holm` is corrected for the number of methods.
    """
    if reference not in outcomes:
        raise InvalidSetting(f"reference {reference!r} is none of {', '.join(map(str, outcomes))}")
    others = [method for method in outcomes if method != reference]
    raw = {method: mcnemar(outcomes[method], outcomes[reference]) for method in others}
    corrected = holm(raw)
    rows: dict[Label, dict[str, Any]] = {}
    for method in others:
        own, other = _pair(outcomes[method], outcomes[reference])
        pairs = {"gained": int((own & ~other).sum()), "lost": int((~own & other).sum())}
        rows[method] = {**pairs, "p": raw[method], "p_holm": corrected[method]}
    return rows


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    a, b = np.asarray(first), np.asarray(second)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise InvalidSetting(
            f"outcomes have shapes {a.shape} and {b.shape}, expected one entry for each pair"
        )
    for outcomes in (a, b):
        if not np.isin(outcomes, (0, 1)).all():
            raise InvalidSetting("outcomes hold other values than true and false")
    return a.astype(bool), b.astype(bool)


def _between(name: str, value: float) -> None:
    if not (math.isfinite(value) and 0 < value < 1):
        raise InvalidSetting(f"{name} is {value}, expected above 0 and below 1")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise InvalidSetting(f"{name} is {value}, expected at least 1")


def _stats() -> Any:
    """scipy.stats, which takes half a second to import and comes with scikit-learn."""
    try:
        from scipy import stats
    except ImportError as error:
        raise InvalidSetting(
            "these statistics need SciPy: pip install 'packcache[eval]'"
        ) from error
    return stats
