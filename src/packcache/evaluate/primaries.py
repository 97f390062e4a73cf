"""The values of a protocol's primaries, a prompt, from what its parts have found.

primaries = Primaries(protocol, replay, memory, main, reach)
primaries.paired()["recall"]["packcache 2"]          # [prompts], NaN where nothing was asked
primaries.gates()                                    # where "no worse" cannot be asked
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packcache.evaluate.drift import contrast
from packcache.evaluate.memory import CHANCE
from packcache.evaluate.protocol import Protocol, Row
from packcache.evaluate.reach import Reach
from packcache.evaluate.remembering import Remembering
from packcache.evaluate.replay import Replay
from packcache.evaluate.running import BESIDE, Running, beats_still
from packcache.evaluate.statistics import bootstrap, known_mean
from packcache.evaluate.told import Values, by_prompt, difference

__all__ = ["Primaries"]


class Primaries:
    """`main` is the free running that primaries are about; None: there is none."""

    def __init__(
        self,
        protocol: Protocol,
        replay: Replay,
        memory: Remembering,
        main: Running | None,
        reach: Reach,
    ) -> None:
        self.protocol, self.replay, self.memory = protocol, replay, memory
        self.main, self.reach = main, reach

    def paired(self) -> dict[str, dict[str, Values]]:
        """By primary and row, one value a prompt."""
        makers: dict[str, Callable[[Row], Values | None]] = {
            "recall": self._recall, "replay_kl": self._replay_kl,
            "identity_drift": self._identity_drift, "motion_ratio": self._motion,
        }  # fmt: skip
        full = self.protocol.reference.label
        paired: dict[str, dict[str, Values]] = {}
        for primary in self.protocol.primaries:
            rows = {label: makers[primary.name](row) for label, row in self.protocol.rows.items()}
            known = {label: own for label, own in rows.items() if own is not None}
            paired[primary.name] = known if full in known else {}
        return paired

    def versus(self, paired: dict[str, dict[str, Values]]) -> list[dict[str, Any]]:
        """Primaries of every row less those of every baseline, and of a sliding window that holds
        as many tokens: mean difference, paired."""
        pairs = [
            (name, label, base)
            for name, rows in paired.items()
            for label in rows
            for base in rows
            if self._is_base(self.protocol.rows[label], self.protocol.rows[base])
        ]
        return [
            {"row": label, "against": base, "metric": name, **told}
            for name, label, base in pairs
            if (told := difference(*self._both(paired, name, label, base)))
        ]

    def beside_intact(
        self, paired: dict[str, dict[str, Values]]
    ) -> dict[tuple[str, str], tuple[Values, Values]]:
        """By primary and control, its values and those of the row it is a broken copy of."""
        told = {}
        for name, rows in paired.items():
            for control in self.protocol.rows_of("control"):
                intact = self.protocol.intact(control)
                if intact is not None and {control.label, intact.label} <= rows.keys():
                    both = self._both(paired, name, control.label, intact.label)
                    told[name, control.label] = both
        return told

    def _is_base(self, row: Row, base: Row) -> bool:
        if row is base or row.role == "reference":
            return False
        if base.role == "baseline":
            return True
        window = base.role == "policy" and base.policy.partition(":")[0] == "window"
        return window and self.reach.most(row) == self.reach.most(base)

    def _both(
        self, paired: dict[str, dict[str, Values]], name: str, label: str, other: str
    ) -> tuple[Values, Values]:
        """Values of two rows; of the replay over the same latent frames, whoever packs sooner."""
        if name != "replay_kl":
            return paired[name][label], paired[name][other]
        rows = self.protocol.rows
        own, theirs = (
            self._replay_kl(rows[one], rows[two]) for one, two in ((label, other), (other, label))
        )
        assert own is not None and theirs is not None  # they are among the paired
        return own, theirs

    def gates(self) -> dict[str, str]:
        """Primaries on which "no worse" means nothing, since the reference itself fails."""
        gates, full = {}, self.protocol.reference
        recall = self._recall(full)
        if recall is not None:
            interval = bootstrap(recall[~np.isnan(recall)])
            if interval.low <= 100 * CHANCE["object"]:
                gates["recall"] = "the full cache itself recalls no more than chance"
        main = self.main
        if main is not None and main.asked(full.label):
            own, still = (
                known_mean(by_prompt(main.made(label, "identity")))[self._with_image(main)]
                for label in (full.label, BESIDE[1])
            )
            if gate := beats_still(own, still):
                gates["identity_drift"] = gate
        return gates

    def _recall(self, row: Row) -> Values | None:
        """Points, mean over the gaps at which the codec tells the true object from all others. A
        row that drops the image is asked of clips that have one."""
        right, told = (self.memory.values(row.label, n) for n in ("object", "told_apart"))
        if right is None or told is None:
            return None
        count = told.sum(axis=0)
        if row.drops_image:
            count = np.where(self.memory.with_image, count, 0)
        return np.where(count > 0, 100 * (right * told).sum(axis=0) / np.maximum(count, 1), np.nan)

    def _replay_kl(self, row: Row, beside: Row | None = None) -> Values | None:
        """Mean over the frames since a token was given up by the row, or by the one beside it."""
        if row is self.protocol.reference:  # nothing diverges from itself
            return np.zeros(self.protocol.replay.prompts)
        if row.other_draws or not self.replay.knows(row.label):
            return None
        kl = self.replay.values(row.label)["kl"]
        frames = self.protocol.replay.frames
        latents = self.reach.latents(frames)
        means = np.full(len(kl), np.nan)
        for number, case in enumerate(self.replay.cases):
            if row.drops_image and not case.with_image:
                continue
            firsts = [
                self.reach.first_missed(one, frames, case.with_image)
                for one in (row, beside)
                if one is not None
            ]
            first = min((one for one in firsts if one is not None), default=0)
            means[number] = known_mean(kl[number, kl.shape[1] - (latents - first) :])
        return means

    def _identity_drift(self, row: Row) -> Values | None:
        """Points: last 15 % less first 15 %, clips with an image, mean over seeds."""
        main = self.main
        if main is None or not main.asked(row.label):
            return None
        change = 100 * contrast(main.values(row.label, "identity"))
        change[~self._with_image(main)] = np.nan
        return change.mean(axis=1)

    def _motion(self, row: Row) -> Values | None:
        main = self.main
        if main is None or not main.asked(row.label):
            return None
        return main.values(row.label, "flow_motion_top5_dis").mean(axis=1)

    @staticmethod
    def _with_image(running: Running) -> NDArray[np.bool_]:
        """Which prompts begin with an image, the anchor whose identity may drift."""
        return np.array([case.with_image for case in running.cases])
