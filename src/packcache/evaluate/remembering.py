"""The memory horizon of a protocol's rows: recall of what was behind the curtain, teacher-forced.

remembering = Remembering(load("digits"), protocol, ledger)
remembering.run(); remembering.values("packcache 2", "object")     # [gaps, clips]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from packcache.evaluate.clips import WHOLE, Share
from packcache.evaluate.ledger import Ledger
from packcache.evaluate.memory import horizon, memory_scenes
from packcache.evaluate.protocol import Protocol, Row
from packcache.lumos.pipeline import Pipeline

__all__ = ["METRICS", "Remembering"]

#: What is kept of a clip.
METRICS = ("object", "told_apart", "held")

#: Clips that are asked at a time: what they ask is encoded once for all rows.
TOGETHER = 16

Values = NDArray[np.float64]


class Remembering:
    """Asks what a ledger does not know yet.

    Args:
        pipeline: the model that the protocol names.
        on_step: called with clips done and all there are, over gaps.
        share: the batches that are asked.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        protocol: Protocol,
        known: Ledger,
        on_step: Callable[[int, int], None] | None = None,
        *,
        share: Share = WHOLE,
    ) -> None:
        self.pipeline, self.protocol, self.known = pipeline, protocol, known
        self.plan, self.on_step, self.share = protocol.memory, on_step, share
        self.rows = [row for row in protocol.rows.values() if row.role != "floor"]

    def run(self) -> None:
        """All gaps, some clips at a time, rows that run alike together."""
        done, total = 0, self.plan.clips * len(self.plan.gaps)
        for turn, gap in enumerate(self.plan.gaps):
            for place, start in enumerate(range(0, self.plan.clips, TOGETHER)):
                if not self.share.takes(turn + place):
                    continue
                numbers = range(start, min(start + TOGETHER, self.plan.clips))
                for rule in dict.fromkeys(map(_rule, self.rows)):
                    self._ask([row for row in self.rows if _rule(row) == rule], gap, numbers)
                done += len(numbers)
                if self.on_step:
                    self.on_step(done, total)

    @property
    def missing(self) -> int:
        """Clips of all rows and gaps that are not known yet."""
        return sum(
            not self.known.has(_key(row, gap, number), set(METRICS))
            for row in self.rows
            for gap in self.plan.gaps
            for number in range(self.plan.clips)
        )

    def values(self, label: str, name: str) -> Values | None:
        """`[gaps, clips]` of a row, None if it was not asked about all of them."""
        row, clips = self.protocol.rows[label], range(self.plan.clips)
        found = [
            [self.known.found.get(_key(row, gap, number), {}).get(name) for number in clips]
            for gap in self.plan.gaps
        ]
        whole = all(value is not None for own in found for value in own)
        return np.array(found, dtype=np.float64) if whole else None

    @property
    def with_image(self) -> Values:
        """Which clips `[clips]` begin with a condition image: those that something enters."""
        scenes = memory_scenes(self.plan.clips, self.plan.gaps[0], self.protocol.clips.seed)
        return np.array([scene.kind == "enters" for scene in scenes])

    def _ask(self, rows: Sequence[Row], gap: int, numbers: range) -> None:
        """Clips of one gap for rows of one rule of positions, as far as they are not known."""
        missing = [
            row
            for row in rows
            if not all(self.known.has(_key(row, gap, n), set(METRICS)) for n in numbers)
        ]
        if not missing:
            return
        curve = horizon(
            self.pipeline, {row.label: row.make() for row in missing}, gaps=(gap,), only=numbers,
            clips=self.plan.clips, seed=self.protocol.clips.seed,
            positions=missing[0].positions, rebase=missing[0].rebase,
        )  # fmt: skip
        for place, row in enumerate(missing):
            for number in numbers:
                own = {name: float(curve.values[name][place, 0, number]) for name in METRICS}
                self.known.add(_key(row, gap, number), own)


def _key(row: Row, gap: int, number: int) -> tuple[str, str, int, int]:
    return row.label, "memory", gap, number


def _rule(row: Row) -> tuple[str, str]:
    """How a row's positions are made."""
    return row.positions, row.rebase
