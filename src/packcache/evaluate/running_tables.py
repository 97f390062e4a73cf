"""What clips made freely come to: a table a plan, rows beside the reference and beside each other.

    RunningTables(running, reach).told()          # plain values

Everything here is exploratory: what decides stands in `primaries`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from packcache.evaluate.drift import drift, survival
from packcache.evaluate.protocol import Row
from packcache.evaluate.reach import Reach
from packcache.evaluate.running import BESIDE, SERIES, TRUE_SERIES, Running, beats_still
from packcache.evaluate.statistics import known_mean
from packcache.evaluate.told import Values, by_prompt, curve, difference, log_ratio, summary

__all__ = ["RunningTables", "is_compared"]

#: Numbers of a clip that tables show beside the primaries.
SCALARS = (
    "direction", "speed", "speed_variation", "background", "flow_motion_top5_dis", "dynamic_dis",
    "frozen_share", "flicker_mae", "flow_interp_smoothness_dis", "warp_error_dis", "held",
)  # fmt: skip

#: What rows are compared by, clip by clip, with the reference and with baselines.
VERSUS = (
    "identity", "digit", "colour", "count", "direction", "flow_motion_top5_dis", "warp_error_dis",
    "dynamic_dis", "flow_interp_smoothness_dis", "flicker_mae", "speed_variation", "jitter",
)  # fmt: skip

#: How near pixels are to the reference's clip: divergence, not quality.
LIKENESS = ("psnr", "ssim")

#: Series whose drift is told, beside the full cache's.
DRIFTS = ("identity", "sharpness", "hf_share", "luminance", "contrast", "saturation")


class RunningTables:
    """The tables of one plan."""

    def __init__(self, running: Running, reach: Reach) -> None:
        self.running, self.reach = running, reach
        self.protocol, self.pipeline = running.protocol, running.pipeline

    def told(self) -> dict[str, Any]:
        """Frames, rows that were asked, and what they differ by."""
        labels = (*self.protocol.rows, *BESIDE)
        return {
            "frames": self.running.plan.frames,
            "latents": self.running.latents,
            "rows": [self._row(label) for label in labels if self.running.asked(label)],
            "versus": self._versus(),
            "gate": self._gate(),
        }

    def _versus(self) -> list[dict[str, Any]]:
        """Every row against the reference and against baselines: mean difference, paired."""
        asked = [row for row in self.protocol.rows.values() if self.running.asked(row.label)]
        pairs = [(row, other) for other in asked for row in asked if is_compared(row, other)]
        return [
            {"row": row.label, "against": other.label, "metric": name, **told}
            for row, other in pairs
            for name in VERSUS
            if (told := difference(*self._both(row.label, other.label, name)))
        ]

    def _gate(self) -> str | None:
        """Why no row is "no worse" than the reference in identity; None: one can be."""
        own, still = (
            known_mean(by_prompt(self.running.made(label, "identity")))
            for label in (self.protocol.reference.label, BESIDE[1])
        )
        return beats_still(own, still)

    def _both(self, row: str, other: str, name: str) -> tuple[Values, Values]:
        """What the clips of two rows come to, a prompt: seeds are averaged, and of a series the
        latent frames in which both say something; given frames are left out of what is true."""
        values = self.running.made if name in TRUE_SERIES else self.running.values
        own, theirs = (by_prompt(values(label, name)) for label in (row, other))
        if name not in SERIES:
            return own, theirs
        both = ~(np.isnan(own) | np.isnan(theirs))
        first, second = (known_mean(np.where(both, values, np.nan)) for values in (own, theirs))
        return first, second

    def _row(self, label: str) -> dict[str, Any]:
        row, values = self.protocol.rows.get(label), self.running.values
        frames = self.running.plan.frames
        curves = {name: curve(by_prompt(values(label, name))) for name in SERIES}
        return {
            "row": label,
            "first_missed": row and self.reach.first_of(row, frames),
            "marks": row and self.reach.marks_of(row, frames),
            "diverged": row and self._diverged(row),
            "motion_ratio": row and self._motion_ratio(row),
            "true": {
                name: summary(100 * known_mean(by_prompt(self.running.made(label, name))))
                for name in TRUE_SERIES
            },
            "likeness": {
                name: summary(known_mean(by_prompt(values(label, name)))) for name in LIKENESS
            },
            "clip": {name: summary(by_prompt(values(label, name))) for name in SCALARS},
            "curves": {name: own for name, own in curves.items() if own},
            "excess": row and self._excess(row),
            "drift": {name: self._drift(label, name) for name in DRIFTS},
            "survival": self._survival(label),
        }

    def _diverged(self, row: Row) -> dict[str, Any] | None:
        """Where clips first differ from the reference's of the same prompt and draws: the code,
        counted from the clip's first in the order in which frames lie, and its latent frame.
        Clips that never do count as later than all others; None in place of a median among them.
        """
        if row is self.protocol.reference:
            return None
        firsts, each = [], 1
        for number in range(self.running.plan.count(row.label)):
            for seed in self.running.seeds:
                pair = [
                    self.running.clips.stored(one, number, seed)
                    for one in (row, self.protocol.reference)
                ]
                if any(one is None or len(one) < self.running.latents for one in pair):
                    continue
                own, full = (one.cut(self.running.latents).codes for one in pair if one is not None)
                differ = (own != full).flatten().nonzero()
                each = own[0].numel()
                firsts.append(float(differ[0, 0]) if len(differ) else np.inf)
        if not firsts:
            return None
        middle, least = float(np.median(firsts)), min(firsts)
        return {
            "clips": len(firsts),
            "never": float(np.mean(np.isinf(firsts))),
            "code": None if np.isinf(middle) else int(middle),
            "latent": None if np.isinf(middle) else int(middle // each),
            "first_latent": None if np.isinf(least) else int(least // each),
        }

    def _motion_ratio(self, row: Row) -> dict[str, float] | None:
        """How many times as much a row moves as the reference, prompt by prompt (geometric)."""
        if row is self.protocol.reference:
            return None
        own, full = (
            by_prompt(self.running.values(one, "flow_motion_top5_dis"))
            for one in (row.label, self.protocol.reference.label)
        )
        told = summary(log_ratio(own, full))
        if told is None:
            return None
        return {name: v if name == "clips" else float(np.exp(v)) for name, v in told.items()}

    def _survival(self, label: str) -> dict[str, Any] | None:
        """Kaplan-Meier over clips of one digit, those of a prompt together: one that lost no digit
        was watched to its end."""
        values, asked = (self.running.values(label, name) for name in ("survival", "count"))
        one = np.array([case.scene.kind == "one" for case in self.running.cases])
        made = ~np.isnan(asked).all(axis=-1) & one[:, None]
        times = values[made]
        if not len(times):
            return None
        lost = ~np.isnan(times)
        frames, prompts = self.running.plan.frames, np.nonzero(made)[0].tolist()
        return survival(np.where(lost, times, frames), lost, prompts=prompts).to_json()

    def _excess(self, row: Row) -> dict[str, Any] | None:
        """By latent frame, how much more of a series that may drift than in the reference's clip
        of the same prompt and draws."""
        if row is self.protocol.reference:
            return None
        told = {}
        for name in DRIFTS:
            own, full = (
                self.running.values(label, name)
                for label in (row.label, self.protocol.reference.label)
            )
            told[name] = curve(by_prompt(own - full))
        return told

    def _drift(self, label: str, name: str) -> dict[str, Any] | None:
        """Drift of a series over clips that have all of it, beside the full cache's own."""
        full = self.protocol.reference.label
        own, other = (self.running.values(one, name) for one in (label, full))
        if own.shape != other.shape:  # rows that no policy made have one seed
            other = other[:, : own.shape[1]]
        whole = ~(np.isnan(own) | np.isnan(other)).any(axis=2)
        if not whole.any():
            return None
        found = drift(
            own[whole],
            seconds=self.pipeline.model.config.compression[0] / self.pipeline.fps,
            against=None if label == full else other[whole],
            prompts=np.nonzero(whole)[0].tolist(),
        ).to_json()
        return {name: value for name, value in found.items() if name != "curve"}


def is_compared(row: Row, other: Row) -> bool:
    """Is a row told beside another? Beside the reference, baselines and policies, and beside a
    control that is the same policy run otherwise."""
    if row is other or row.role == "reference":
        return False
    same = row.role == "policy" and other.role == "control" and row.policy == other.policy
    return same or other.role in ("reference", "baseline", "policy")
