"""How a result tells numbers: means with their intervals over prompts, curves, paired differences.

Rows of values are prompts; seeds of a prompt are averaged before anything is resampled.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from packcache.evaluate.statistics import bootstrap, known_mean, sign_flip

__all__ = ["Values", "by_prompt", "curve", "difference", "log_ratio", "summary"]

Values = NDArray[np.float64]

#: Ratios of what stands still have no logarithm: this counts as still, in pixels a frame.
_LEAST = 1e-3


def by_prompt(values: Values) -> Values:
    """Mean over the seeds of `[prompts, seeds, ...]`; NaN where there is no seed."""
    return known_mean(np.moveaxis(values, 1, -1))


def summary(values: Values) -> dict[str, float] | None:
    """Mean and 95 % interval over prompts `[n]` that have a value; None where none has."""
    known = values[~np.isnan(values)]
    return bootstrap(known).at() if len(known) else None


def curve(values: Values) -> dict[str, list[float | None]] | None:
    """Mean and band of `[prompts, latents]`, each latent frame over the prompts that have it."""
    if np.isnan(values).all():
        return None
    points = [summary(column) for column in values.T]
    return {
        name: [None if point is None else point[name] for point in points]
        for name in ("mean", "low", "high")
    }


def log_ratio(own: Values, theirs: Values) -> Values:
    """log(own / theirs) of what is at least 0, such as pixels a frame."""
    return np.log(np.maximum(own, _LEAST)) - np.log(np.maximum(theirs, _LEAST))


def difference(own: Values, theirs: Values) -> dict[str, float] | None:
    """Mean of `own - theirs` over prompts that both have, with its interval and sign-flip p."""
    known = ~np.isnan(own) & ~np.isnan(theirs)
    if not known.any():
        return None
    less = (own - theirs)[known]
    return {**(bootstrap(less).at() or {}), "p": sign_flip(less)}
