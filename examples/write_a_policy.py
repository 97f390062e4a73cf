"""A new policy is one frozen dataclass: keep every second latent frame whole, newest first."""

from collections.abc import Sequence
from dataclasses import dataclass

import packcache as pc
from packcache.timeline import HeldFrame


@dataclass(frozen=True, kw_only=True, repr=False)
class EverySecond(pc.Policy):
    """The newest frame and every second one before it, at most `frames` of them."""

    frames: int = 3

    @property
    def reach(self) -> int:
        return 2 * self.frames

    def counts(
        self, frames: Sequence[HeldFrame], distances: Sequence[int], budget: int | None
    ) -> list[int]:
        """Even frames stay as they age; an odd one only while it is the newest."""
        keep = [d == 1 or f.span.frame % 2 == 0 for f, d in zip(frames, distances, strict=True)]
        return [
            frame.count if wanted and distance <= self.reach else 0
            for frame, wanted, distance in zip(frames, keep, distances, strict=True)
        ]


timeline, policy = pc.Timeline(), EverySecond()
layout = pc.FrameLayout(rows=8, cols=8)
timeline.append(pc.Span.text(13))
for frame in range(12):
    span = pc.Span.of_frame(pc.Role.HISTORY, frame, layout)
    timeline.append(span, policy.rank(span, None))
    timeline.keep(policy.plan(timeline))
    print(frame, timeline.counts())
