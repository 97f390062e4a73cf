"""A row of the table: raw seconds as they are measured, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from packcache.bench.compose import Composed
from packcache.bench.parts import Ceilings
from packcache.bench.pieces import Estimate
from packcache.bench.timing import Values, lines_between, median, ratio

__all__ = ["OWN_LOOP", "RowResult"]

#: The settings of a baseline, which has none.
OWN_LOOP = "its own loop"


@dataclass(kw_only=True, eq=False)
class RowResult:
    """One engine, policy and preset. Seconds; latent frames counted from 0.

    `seconds[frame]` are the repeats of a latent frame's steps and last forward, `bookkeeping` its
    packing and rebase; `prefill_s` and `given_s` (frames the clip starts with) were measured
    once. `spent` are seconds by kind of kernel in an instrumented run of the last latent frame.
    `reuse` is the preset's, `generated` are the latent frames that are not given. `run` tells rows
    of one process, which were measured side by side, and `ceilings` are that run's. `composed`: put
    together instead, from pieces measured `rounds` times. `reason`: why there are no numbers.
    """

    policy: str
    preset: str
    settings: str
    reuse: dict[str, float]
    generated: range
    ceilings: Ceilings
    run: int = 0
    prefill_s: float | None = None
    given_s: float = 0.0
    seconds: dict[int, list[float]] = field(default_factory=dict)
    bookkeeping: dict[int, float] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    kv_bytes: int | None = None
    capacity_bytes: int | None = None
    peak_bytes: int | None = None
    peak_how: str | None = None
    sampled_steps: int | None = None
    predicted: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    rounds: int = 0
    composed: Composed | None = None

    @property
    def name(self) -> str:
        return f"{self.policy} {self.preset}"

    @property
    def is_baseline(self) -> bool:
        """Is it a loop of its own, without a policy?"""
        return self.settings == OWN_LOOP

    def complete(self, frames: Sequence[int], repeats: int) -> bool:
        """Was everything measured?"""
        if self.reason is not None or self.composed is not None:
            return self.reason is None
        timed = all(len(self.seconds.get(frame, ())) >= repeats for frame in frames)
        committed = all(frame in self.bookkeeping for frame in self.generated)
        return timed and committed and self.kv_bytes is not None

    @property
    def repeats(self) -> int:
        """How often each number was measured, at least."""
        return self.rounds or min(map(len, self.seconds.values()), default=0)

    @property
    def sampled_frames(self) -> list[int] | None:
        """The latent frames that were measured, if not all."""
        measured = sorted(self.seconds)
        return None if self.composed or measured == list(self.generated) else measured

    # --- what follows ---------------------------------------------------------------------------

    def total(self) -> Estimate:
        """TOTAL: prefill to the last commit."""
        own = self.composed and self.composed.total
        return own or median(self.totals())

    def last(self) -> Estimate:
        """LAST: all steps, the commit and packing of the last latent frame."""
        own = self.composed and self.composed.last
        return own or median(self.frame_seconds()[:, -1])

    def frames(self) -> list[float]:
        """Seconds of every generated latent frame, medians."""
        if self.composed:
            return [self.composed.frames[frame].total for frame in self.generated]
        return np.median(self.frame_seconds(), axis=0).tolist()

    def speedup_total(self, over: RowResult) -> Estimate:
        """How many times faster than another row the whole clip is."""
        if self.composed and over.composed:
            return over.total().over(self.total())
        return ratio(over.totals(), self.totals(), paired=self.run == over.run)

    def speedup_last(self, over: RowResult) -> Estimate:
        """How many times faster than another row the last latent frame is."""
        if self.composed and over.composed:
            return over.last().over(self.last())
        own, other = self.frame_seconds()[:, -1], over.frame_seconds()[:, -1]
        return ratio(other, own, paired=self.run == over.run)

    def shares(self) -> dict[str, float] | None:
        """How the time of the last latent frame divides: by kind of kernel, and bookkeeping."""
        if not self.spent:
            return None
        spent = {**self.spent, "bookkeeping": self.bookkeeping.get(self.generated[-1], 0.0)}
        return {kind: seconds / sum(spent.values()) for kind, seconds in spent.items()}

    def frame_seconds(self) -> Values:
        """Seconds of every generated latent frame `[repeats, frames]`, bookkeeping included."""
        own = [self.bookkeeping.get(frame, 0.0) for frame in self.generated]
        return lines_between(self.seconds, self.generated) + np.array(own)

    def totals(self) -> Values:
        """TOTAL of each repeat."""
        return (self.prefill_s or 0.0) + self.given_s + self.frame_seconds().sum(axis=1)

    def bookkeeping_share(self) -> float | None:
        """Packing and rebase as a share of LAST."""
        last = self.bookkeeping.get(self.generated[-1])
        return None if last is None else last / self.last().value

    # --- kept -----------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """What was measured, in plain values; `from_json` reads it again."""
        return {
            **{name: getattr(self, name) for name in _kept()},
            "generated": [self.generated.start, self.generated.stop],
            "ceilings": asdict(self.ceilings),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RowResult:
        """A row that was really run; the pieces of a composed one are in no file."""
        kept = {name: data[name] for name in _kept()}
        for name in ("seconds", "bookkeeping"):  # keys of objects are text in JSON
            kept[name] = {int(frame): value for frame, value in kept[name].items()}
        kept["ceilings"] = Ceilings(**kept["ceilings"])
        return cls(**{**kept, "generated": range(*kept["generated"])})


def _kept() -> list[str]:
    """Names of what a file holds of a row."""
    return [f.name for f in fields(RowResult) if f.name != "composed"]
