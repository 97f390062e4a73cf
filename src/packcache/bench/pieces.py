"""Measured pieces of a forward, taken in turns, and sums of them with intervals.

    pieces = interleave(probes, repeats=7)                # every probe once a round
    pieces.estimate({piece: 28.0, other: 2.0})            # 28 of one and 2 of the other, 95 %

A sum counts the medians of its pieces. All sums of the same pieces share their resampled rounds, so
a ratio of two of them is paired.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from packcache.errors import InvalidSetting, PackCacheError

__all__ = ["Estimate", "Piece", "Pieces", "Probe", "Weights", "interleave", "knots"]

#: How often the rounds are drawn anew for an interval.
RESAMPLES = 2000

#: What the bounds of an interval leave out, half below and half above.
OUTSIDE = 0.05


@dataclass(frozen=True, order=True)
class Piece:
    """Something that is timed: its kind, for `rows` token rows of a branch, over `held` tokens.

    Pieces of the cache have a policy's `label` and the number of a latent frame as `rows`.
    """

    kind: str
    rows: int
    held: int = 0
    label: str = ""

    def __str__(self) -> str:
        told = [self.kind, f"rows {self.rows}"]
        told += [f"held {self.held}"] if self.held else []
        return ", ".join([*told, self.label] if self.label else told)


#: How often each piece counts in a sum.
Weights = Mapping[Piece, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """Something that times some pieces at once: `make` prepares it, what that returns is run."""

    pieces: tuple[Piece, ...]
    make: Callable[[], Callable[[], Sequence[float]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A number in seconds, or a ratio, with its 95 % interval; `draws` are its resamples."""

    value: float
    low: float
    high: float
    draws: NDArray[np.float64] = field(repr=False)

    @classmethod
    def of(cls, value: float, draws: NDArray[np.float64]) -> Estimate:
        low, high = np.quantile(draws, (OUTSIDE / 2, 1 - OUTSIDE / 2))
        return cls(value=value, low=float(low), high=float(high), draws=draws)

    def over(self, other: Estimate) -> Estimate:
        """This number divided by another of the same rounds, resample by resample."""
        return Estimate.of(self.value / other.value, self.draws / other.draws)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """Seconds `[rounds]` of each piece; `failed` says why others have none."""

    seconds: Mapping[Piece, NDArray[np.float64]]
    failed: Mapping[Piece, str]
    seed: int = 0

    @property
    def rounds(self) -> int:
        return max((len(times) for times in self.seconds.values()), default=0)

    def between(self, piece: Piece) -> dict[Piece, float]:
        """The piece as one that was measured, or on the straight line between its neighbours.

        Raises InvalidSetting where there are none: nothing is extrapolated.
        """
        if piece in self.seconds or piece in self.failed:
            return {piece: 1.0}
        known = self._known.get((piece.kind, piece.held, piece.label), [])
        below = max((rows for rows in known if rows < piece.rows), default=None)
        above = min((rows for rows in known if rows > piece.rows), default=None)
        if below is None or above is None:
            raise InvalidSetting(
                f"{piece} was not measured, and it does not lie between rows that were "
                f"({', '.join(map(str, known)) or 'none'}): measure the pieces of this workload"
            )
        share = (piece.rows - below) / (above - below)
        ends = ((below, 1 - share), (above, share))
        return {Piece(piece.kind, rows, piece.held, piece.label): part for rows, part in ends}

    def reason(self, weights: Weights) -> str | None:
        """Why a sum cannot be told, if a piece of it failed."""
        return next((f"{p}: {self.failed[p]}" for p in weights if p in self.failed), None)

    def value(self, weights: Weights) -> float:
        """The sum of medians of pieces, each as often as it counts."""
        return sum(times * self._medians[piece] for piece, times in weights.items())

    def estimate(self, weights: Weights) -> Estimate:
        """That sum with its interval."""
        draws = np.zeros(RESAMPLES)
        for piece, times in weights.items():
            draws += times * self._drawn[piece]
        return Estimate.of(self.value(weights), draws)

    @functools.cached_property
    def _known(self) -> dict[tuple[str, int, str], list[int]]:
        """Row counts of all pieces that were tried, by everything else."""
        known: dict[tuple[str, int, str], list[int]] = {}
        for piece in sorted((*self.seconds, *self.failed)):
            known.setdefault((piece.kind, piece.held, piece.label), []).append(piece.rows)
        return known

    @functools.cached_property
    def _medians(self) -> dict[Piece, float]:
        return {piece: float(np.median(times)) for piece, times in self.seconds.items()}

    @functools.cached_property
    def _drawn(self) -> dict[Piece, NDArray[np.float64]]:
        """Medians of each piece over resampled rounds, the same rounds for all pieces."""
        rng = np.random.default_rng(self.seed)
        drawn = rng.integers(max(1, self.rounds), size=(RESAMPLES, max(1, self.rounds)))
        return {piece: np.median(times[drawn], axis=1) for piece, times in self.seconds.items()}


def interleave(
    probes: Iterable[Probe],
    repeats: int,
    *,
    seed: int = 0,
    on_run: Callable[[int, int], None] | None = None,
    on_round: Callable[[Pieces], None] | None = None,
) -> Pieces:
    """Each probe once to warm up, then once in each of `repeats` rounds, always in this order.

    A probe that fails is left out from there on, with its reason. `on_run(done, all)` is called
    after each run of a probe, `on_round` after each round with what there is so far.
    """
    if repeats < 1:
        raise InvalidSetting(f"repeats is {repeats}, expected at least 1")
    asked = list(probes)
    ready: dict[int, Callable[[], Sequence[float]]] = {}
    times: dict[Piece, list[float]] = {piece: [] for probe in asked for piece in probe.pieces}
    failed: dict[Piece, str] = {}
    for turn in range(repeats + 1):
        for number, probe in enumerate(asked):
            if probe.pieces[0] not in failed:
                try:
                    run = ready.get(number) or ready.setdefault(number, probe.make())
                    seconds = run()
                except (PackCacheError, RuntimeError, MemoryError) as error:
                    ready.pop(number, None)  # and with it the memory it holds
                    failed |= dict.fromkeys(probe.pieces, _in_one_line(error))
                else:
                    for piece, taken in zip(probe.pieces, seconds if turn else (), strict=False):
                        times[piece].append(taken)
            if on_run:
                on_run(turn * len(asked) + number + 1, (repeats + 1) * len(asked))
        if turn and on_round:
            on_round(_measured(times, failed, seed))
    return _measured(times, failed, seed)


def _measured(times: dict[Piece, list[float]], failed: dict[Piece, str], seed: int) -> Pieces:
    good = {piece: np.asarray(own) for piece, own in times.items() if piece not in failed}
    return Pieces(seconds=good, failed=dict(failed), seed=seed)


def _in_one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def knots(counts: Iterable[int], ratio: float = 2.0) -> list[int]:
    """Row counts to measure so that all `counts` lie between two of them: some of their own.

    From the largest down, each the smallest one that is at least 1/`ratio` of the one before; the
    work of all of them is then a small multiple of the largest's. The smallest is always there.
    """
    left = sorted(set(counts), reverse=True)
    chosen = left[:1]
    for count, smaller in zip(left[1:], [*left[2:], 0], strict=False):
        if smaller * ratio < chosen[-1]:
            chosen.append(count)
    return chosen[::-1]
