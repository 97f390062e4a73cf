"""HOW MUCH each history frame keeps: decay weights and water-filling. Integers, no tensors.

    >>> allocate([76, 51, 25], 76, weights=half_life_weights(4)[:3])
    [43, 22, 11]

Frames are listed newest first (distance d = 1, 2, ...). All arithmetic is exact (`fractions`).
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Sequence
from fractions import Fraction

from packcache.errors import InvalidSetting

__all__ = [
    "Budget",
    "allocate",
    "budget_tokens",
    "decay_weights",
    "fixed_shares",
    "half_life_weights",
]

#: A budget: latent frames (a number), or "4084tok", or "512MiB" of both branches' K and V.
Budget = float | str

_UNITS = {"tok": None, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(tok|KiB|MiB|GiB)\s*")


def half_life_weights(window: int, half_life: float = 1.0) -> list[float]:
    """`w_d = 2^(-min(d, W-1) / half_life)` for d = 1..W (paper Eq. 7 with rho = 1/2).

    With half-life 1 and no caps the weights sum to one: the shares of one total budget.
    """
    if window < 1:
        raise InvalidSetting(f"window is {window}, expected at least 1 history frame")
    return decay_weights(range(1, window + 1), half_life, last=window - 1)


def decay_weights(
    distances: Sequence[int], half_life: float = 1.0, *, last: int | None = None
) -> list[float]:
    """`2^(-min(d, last) / half_life)` for any distances; no `last`: the kernel has no window."""
    if not (half_life > 0 and math.isfinite(half_life)):
        raise InvalidSetting(
            f"half_life is {half_life}, expected a finite number of frames above 0"
        )
    return [2.0 ** (-(d if last is None else min(d, last)) / half_life) for d in distances]


def allocate(
    available: Sequence[int],
    budget: int,
    *,
    weights: Sequence[float | Fraction],
    floors: Sequence[int] | None = None,
) -> list[int]:
    """Share `budget` tokens over frames by weight under caps and floors: water-filling.

    The result is `k_d = min(n_d, max(m_d, lambda w_d))` with the one lambda for which the sum is
    `min(budget, sum n_d)`, rounded by largest remainder, ties to the newer frame. Floors are
    clipped to what is available (default: one token where a frame has any); if the floors alone
    exceed the budget, the oldest frames are dropped until they fit.

    Args:
        available: n_d, tokens frame d holds now, newest first.
        budget: B, tokens in all.
        weights: w_d >= 0, as many as frames.
        floors: m_d, tokens a frame keeps at least.

    Returns:
        k_d, newest first, as long as `available`; 0 for a dropped frame.

    Source: methods 3.1; with no caps and B = n this is paper Eq. 7.
    """
    _check(available, budget, weights, floors)
    count = len(available)
    floor = [1] * count if floors is None else list(floors)
    floor = [min(m, n) for m, n in zip(floor, available, strict=True)]
    kept = count
    while kept and sum(floor[:kept]) > budget:
        kept -= 1
    caps = list(available[:kept])
    exact = _water_fill(caps, floor[:kept], [Fraction(w) for w in weights[:kept]], budget)
    return _largest_remainder(exact, caps, min(budget, sum(caps))) + [0] * (count - kept)


def fixed_shares(
    available: Sequence[int], frame_tokens: int, *, weights: Sequence[float | Fraction]
) -> list[int]:
    """`k_d = n * w_d` of a whole frame's n tokens, capped at what is held, nothing redistributed.

    The literal reading of paper Eq. 7 (methods 1.3). Rounded by largest remainder, ties to the
    newer frame.
    """
    exact = [frame_tokens * Fraction(w) for w in weights]
    counts = _largest_remainder(exact, [frame_tokens] * len(exact), math.floor(sum(exact)))
    return [min(k, n) for k, n in zip(counts, available, strict=True)]


def budget_tokens(
    budget: Budget | None, *, frame_tokens: int, token_bytes: int | None = None
) -> int | None:
    """A budget in tokens: a number counts latent frames, a string says tokens or bytes.

    `token_bytes` is what one token takes over all layers and both branches, K and V.
    """
    if budget is None:
        return None
    if isinstance(budget, str):
        tokens = _parse(budget, token_bytes)
    elif isinstance(budget, bool) or not math.isfinite(budget) or budget <= 0:
        raise InvalidSetting(
            f"budget is {budget}, expected latent frames above 0 such as 1 or 0.5, "
            'or a string such as "4084tok" or "512MiB"'
        )
    else:
        tokens = math.floor(Fraction(str(budget)) * frame_tokens)  # as written: 0.57 of 100 is 57
    if tokens < 1:
        raise InvalidSetting(f"budget {budget} is below one token: give more")
    return tokens


def _parse(budget: str, token_bytes: int | None) -> int:
    match = _SIZE.fullmatch(budget)
    if not match:
        raise InvalidSetting(
            f'budget is {budget!r}, expected latent frames (1, 0.5), "4084tok" or "512MiB"'
        )
    unit = _UNITS[match[2]]
    if unit is None:
        return math.floor(Fraction(match[1]))
    if not token_bytes:
        raise InvalidSetting(f"budget {budget!r} is in bytes, but the bytes of a token are unknown")
    return math.floor(Fraction(match[1]) * unit / token_bytes)


def _check(
    available: Sequence[int],
    budget: int,
    weights: Sequence[float | Fraction],
    floors: Sequence[int] | None,
) -> None:
    if len(weights) != len(available):
        raise ValueError(f"{len(weights)} weights for {len(available)} frames: expected one each")
    if floors is not None and len(floors) != len(available):
        raise ValueError(f"{len(floors)} floors for {len(available)} frames: expected one each")
    if budget < 0 or any(n < 0 for n in available) or any(m < 0 for m in floors or ()):
        raise ValueError("budget, available and floors must not be negative")
    if not all(w >= 0 and math.isfinite(w) for w in weights):
        raise ValueError(f"weights are {list(weights)}, expected finite numbers >= 0")


def _water_fill(
    caps: list[int], floors: list[int], weights: list[Fraction], budget: int
) -> list[Fraction]:
    """The real-valued solution: lambda on the piecewise linear F(lambda) = sum clip(lambda w)."""
    if sum(caps) <= budget:
        return [Fraction(n) for n in caps]

    def clipped(level: Fraction) -> list[Fraction]:
        return [
            min(Fraction(n), max(Fraction(m), level * w))
            for n, m, w in zip(caps, floors, weights, strict=True)
        ]

    rows = list(zip(caps, floors, weights, strict=True))
    breaks = sorted({Fraction(0)} | {b / w for n, m, w in rows if w > 0 for b in (m, n)})
    index = bisect.bisect_right(breaks, budget, key=lambda level: sum(clipped(level)))
    below = breaks[index - 1]
    if index == len(breaks):  # every weighted frame is full: the rest goes to the weightless ones
        return _spill(clipped(below), caps, budget)
    base = clipped(below)
    slope = sum(w for n, m, w in rows if w > 0 and m / w <= below < n / w)
    return clipped(below + (budget - sum(base)) / slope) if slope else base


def _spill(counts: list[Fraction], caps: list[int], budget: int) -> list[Fraction]:
    """Give what is left of the budget to the newest frames with room."""
    left = budget - sum(counts)
    for i, cap in enumerate(caps):
        extra = min(left, cap - counts[i])
        counts[i] += extra
        left -= extra
    return counts


def _largest_remainder(exact: list[Fraction], caps: list[int], total: int) -> list[int]:
    """Integers with that total: floors, then one token each to the largest fractional parts."""
    counts = [math.floor(x) for x in exact]
    by_fraction = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    left = total - sum(counts)
    for i in by_fraction:
        if left <= 0:
            break
        if counts[i] < caps[i]:
            counts[i] += 1
            left -= 1
    return counts
