"""Free running with common random numbers: clips made with each row's own cache, then judged.

    running = Running(load("digits"), protocol, protocol.running[0], ledger)
    running.run(); running.values("packcache 2", "identity")   # [prompts, seeds, latent frames]

Draws are keyed by seed and latent frame and do not depend on the policy, so all rows share them
(evaluation 8d.2). Of each clip are kept: what is true in it, latent frame by latent frame; from
which code on it differs from the full cache's; video metrics that need no weights; and its distance
in pixels from the full cache's clip, a measure of divergence and not of quality. Two more rows are
no policies: `ceiling`, the true clip through the codec, and `floor`, the first frame repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packcache.digits import world
from packcache.evaluate import truth
from packcache.evaluate.clips import BATCH, WHOLE, Clips, Made, Share, batches, place_of
from packcache.evaluate.drift import by_latent
from packcache.evaluate.ledger import Ledger
from packcache.evaluate.protocol import Protocol, Row, RunningPlan
from packcache.evaluate.statistics import bootstrap
from packcache.evaluate.table import Case, cases
from packcache.evaluate.video_metrics import measure, psnr, ssim
from packcache.lumos.pipeline import Pipeline
from packcache.lumos.vocab import latent_frames, pixel_frames
from packcache.video import Frames

__all__ = ["BESIDE", "SERIES", "TRUE_SERIES", "Running", "beats_still"]

#: Rows that no policy made.
BESIDE = ("ceiling", "floor")

#: What is kept latent frame by latent frame; everything else is one number a clip.
TRUE_SERIES = ("digit", "colour", "count", "identity")
SERIES = (
    *TRUE_SERIES, "jitter", "warp_error", "psnr", "ssim", "sharpness", "hf_share", "luminance",
    "contrast", "saturation",
)  # fmt: skip

Values = NDArray[np.float64]


class Running:
    """One plan of a protocol. What a ledger does not know yet is made, the reference first.

    With a `share` only its batches are.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        protocol: Protocol,
        plan: RunningPlan,
        known: Ledger,
        on_step: Callable[[int, int], None] | None = None,
        *,
        share: Share = WHOLE,
    ) -> None:
        self.pipeline, self.protocol, self.plan = pipeline, protocol, plan
        self.known, self.on_step, self.share = known, on_step, share
        self.cases = cases(plan.prompts, protocol.clips.seed)
        self.clips = Clips(pipeline, protocol, known)
        self.latents = latent_frames(plan.frames, pipeline.model.config.compression[0])
        self.part = f"run {plan.frames}"
        reference = protocol.reference
        others = [row for row in protocol.rows.values() if row is not reference]
        self.rows = [row for row in (reference, *others) if plan.count(row.label)]
        self.total = plan.seeds * sum(plan.count(row.label) for row in self.rows) + plan.prompts
        self.done = 0

    def run(self) -> None:
        """All clips of all rows, and the two that no policy makes."""
        for row in self.rows:
            for seed in self.seeds:
                count = self.plan.count(row.label)
                for numbers in batches(self.cases, range(count), BATCH):
                    missing = [n for n in numbers if not self._knows(row.label, n, seed)]
                    if missing and self.share.takes(place_of(self.cases, numbers)):
                        self._make(row, missing, seed)
                    self.done += len(numbers)
                    if self.on_step:
                        self.on_step(self.done, self.total)
        for number, case in enumerate(self.cases):
            if self.share.takes(number) and not self._knows_beside(number):
                self._beside(case, number)
            self.done += 1
            if self.on_step:
                self.on_step(self.done, self.total)

    @property
    def missing(self) -> int:
        """Clips of all rows that are not known yet, and prompts without those no policy makes."""
        return sum(
            not self._knows(row.label, number, seed)
            for row in self.rows
            for seed in self.seeds
            for number in range(self.plan.count(row.label))
        ) + sum(not self._knows_beside(number) for number in range(self.plan.prompts))

    def _key(self, label: str, number: int, seed: int) -> tuple[str, str, int, int]:
        return label, self.part, number, seed

    def _knows(self, label: str, number: int, seed: int) -> bool:
        return self.known.has(self._key(label, number, seed), {"identity", "jitter"})

    def _knows_beside(self, number: int) -> bool:
        return all(self._knows(label, number, 0) for label in BESIDE)

    # --- making -------------------------------------------------------------------------------

    def _make(self, row: Row, numbers: Sequence[int], seed: int) -> None:
        clips = self.clips.get(row, numbers, seed=seed, latents=self.latents)
        for number, clip in zip(numbers, clips, strict=True):
            frames = self._pixels(clip)
            found = self._judged(self.cases[number], frames)
            if row is not self.protocol.reference:
                found |= self._beside_full(frames, clip, number, seed)
            found["held"] = float(clip.held[-1])
            self.known.add(self._key(row.label, number, seed), found)

    def _pixels(self, clip: Made) -> Frames:
        return self.pipeline.pixels(clip.codes)[: self.plan.frames]

    def _beside(self, case: Case, number: int) -> None:
        """What the codec leaves of the truth, and a clip that stands still."""
        whole = pixel_frames(self.latents, self.pipeline.model.config.compression[0])
        true = world.render(case.scene, whole)
        back = truth.through_codec(true, self.pipeline.codec.encode, self.pipeline.codec.decode)
        still = truth.copy_last(back, 1)
        for label, frames in zip(BESIDE, (back, still), strict=True):
            found = self._judged(case, frames[: self.plan.frames])
            self.known.add(self._key(label, number, 0), found)

    def _beside_full(self, frames: Frames, clip: Made, number: int, seed: int) -> dict[str, Any]:
        """Against the reference's clip of the same prompt and seed, where it is as long."""
        stored = self.clips.stored(self.protocol.reference, number, seed)
        if stored is None or len(stored) < self.latents:
            return {"diverged": None}
        theirs = stored.cut(self.latents)
        differ = (clip.codes != theirs.codes).flatten(1).any(dim=1).nonzero()
        other = self._pixels(theirs)
        series = {metric.__name__: _by_latent(metric(frames, other)) for metric in (psnr, ssim)}
        return {"diverged": int(differ[0, 0]) if len(differ) else None, **series}

    # --- judging ------------------------------------------------------------------------------

    def _judged(self, case: Case, frames: Frames) -> dict[str, Any]:
        judgement = case.judge(frames)
        curves = judgement.curves
        identity = (
            curves.digit * curves.colour if case.scene.kind == "one" else curves.digit * np.nan
        )
        measured = measure(frames, fps=self.pipeline.fps)
        series = {
            "digit": curves.digit, "colour": curves.colour, "count": curves.count,
            "identity": identity, "jitter": curves.jitter,
            "warp_error": np.concatenate(([np.nan], measured.series["warp_error_dis"])),
        }  # fmt: skip
        found: dict[str, Any] = {name: _by_latent(values) for name, values in series.items()}
        for name in ("direction", "speed", "speed_variation", "background", "survival"):
            found[name] = getattr(judgement, name)
        found |= {n: None if v is None else float(v) for n, v in measured.scalars.items()}
        looks = {n: own for n, own in measured.series.items() if n in SERIES}
        return found | {name: _by_latent(own) for name, own in looks.items()}

    # --- what was found -----------------------------------------------------------------------

    def asked(self, label: str) -> bool:
        """Is anything known of a row?"""
        return any(key[:2] == (label, self.part) for key in self.known.found)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of draws, for each prompt."""
        return self.protocol.clips.seeds[: self.plan.seeds]

    def values(self, label: str, name: str) -> Values:
        """`[prompts, seeds]` of a number, `[prompts, seeds, latents]` of a series; NaN where there
        is none. Rows that no policy made have one seed."""
        seeds = (0,) if label in BESIDE else self.seeds
        tail = (self.latents,) if name in SERIES else ()
        found = np.full((self.plan.prompts, len(seeds), *tail), np.nan)
        for number in range(self.plan.prompts):
            for place, seed in enumerate(seeds):
                own = self.known.found.get(self._key(label, number, seed), {}).get(name)
                if own is not None:
                    found[number, place] = np.array(own, dtype=np.float64)
        return found

    def made(self, label: str, name: str) -> Values:
        """`values` of a series without what was given: a condition image is nobody's work."""
        found = self.values(label, name)
        found[[case.with_image for case in self.cases], :, 0] = np.nan
        return found


def beats_still(own: Values, still: Values) -> str | None:
    """Why "no worse" means nothing of the reference's frames `[prompts]`, shares that are right: a
    clip that stands still keeps as many, or may. None: it means something."""
    known = ~np.isnan(own) & ~np.isnan(still)
    if not known.any():
        return "the clip that stands still was not made: go on"
    if bootstrap((own - still)[known]).low > 0:
        return None
    return (
        f"a clip that stands still keeps as much: {100 * still[known].mean():.0f} % of frames "
        f"right, the full cache {100 * own[known].mean():.0f} %"
    )


def _by_latent(values: Values) -> list[float | None]:
    """Means over the pixel frames of each latent frame; None where nothing is asked."""
    _, curve = by_latent(values, temporal=world.GROUP)
    return [None if np.isnan(value) else float(value) for value in curve]
