"""How far clean footage drifts by itself: below that, a drift says nothing (evaluation 4, 8c).

    null = drift_null({"street": frames, "park": others}, frames=48)
    null.series["sharpness"].p90        # 0.12: nine of ten windows change by no more than 12 %
    null.lines(), null.to_json()

People move, clouds pass, a camera sets its exposure: numbers of a picture change where nothing is
wrong. Across a cut they change for another reason, so windows lie within shots, as far as colours
tell them apart: a cut between pictures that are alike, or a slow dissolve, is not seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packcache.errors import InputError, InvalidSetting
from packcache.evaluate.drift import ENDS, relative_contrast
from packcache.evaluate.video_metrics import flicker_mae, lab_hist_distance, looks
from packcache.testing.faults import checked_clip
from packcache.video import Frames

__all__ = [
    "CUT",
    "CUT_LEVELS",
    "SCHEMA",
    "WINDOW",
    "DriftNull",
    "Null",
    "drift_null",
    "shots",
    "windows",
]

SCHEMA = "packcache.drift_null/1"

#: Pixel frames of a window: four seconds at the model's rate, as the reference was measured.
WINDOW = 48

#: At a cut more than this share of pixels changes colour, and pixels change by more than so many
#: levels on average. At the five cuts of a street clip at least 31 % and 52 levels, in all other
#: pairs of that and of two clips without cuts at most 17 % and 21. Fast motion keeps its colours,
#: a fade of flat colours has small steps: neither is a cut.
CUT, CUT_LEVELS = 0.25, 25.0

#: For cuts every so many pixels of both sides are looked at.
_SPARSE = 2

#: Fewer windows than this have no 90th percentile but their largest.
_FEW = 10

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Null:
    """Of one number: size of end less start over start, median and 90th percentile of windows.

    `windows` counts those whose start is not 0; without any the rest is None.
    """

    median: float | None
    p90: float | None
    windows: int


@dataclass(frozen=True, kw_only=True)
class DriftNull:
    """The null level of every per-frame number, over `windows` windows of `frames` frames.

    Of the `shots` of all `clips` those of at least a window count. Windows overlap by half and
    those of a shot are alike: their number is no sample size.
    """

    series: dict[str, Null]
    frames: int
    clips: int
    shots: int
    windows: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"schema": SCHEMA, **asdict(self)}

    def lines(self) -> list[str]:
        """A row a number."""
        lines = [
            f"size of change from the first to the last {ENDS:.0%} of {self.frames} frames, of the "
            f"first; clips: {self.clips}, shots long enough: {self.shots}",
            f"{'':16}{'median':>8}{'9 of 10 below':>16}{'windows':>9}",
        ]
        for name, null in self.series.items():
            lines.append(f"{name:16}{_told(null.median):>8}{_told(null.p90):>16}{null.windows:9}")
        if self.windows < _FEW:
            lines.append(f"rough: fewer than {_FEW} windows; give longer footage, or more")
        return lines


def _told(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def drift_null(
    clips: Mapping[str, Frames] | Iterable[tuple[str, Frames]], *, frames: int = WINDOW
) -> DriftNull:
    """What clean clips, uint8 `[T, H, W, 3]` by name, drift by over windows of so many frames.

    Clips are taken one after the other and none is kept, so a generator may read them. Raises
    InputError for a clip without a shot as long as a window, InvalidSetting for what is no clip.
    """
    _check_window(frames)
    found: list[dict[str, Values]] = []
    count = 0
    for name, clip in clips.items() if isinstance(clips, Mapping) else clips:
        count += 1
        parts = shots(clip)
        longest = max(map(len, parts))
        if longest < frames:
            raise InputError(
                f"{name} has no shot of {frames} frames, a window: the longest has {longest}; give "
                "longer footage, or a shorter window"
            )
        found += [_changes(part, frames) for part in parts if len(part) >= frames]
    if not found:
        raise InvalidSetting("no clip to take the null from: give at least one")
    changes = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
    return DriftNull(
        series={name: _null(change) for name, change in changes.items()},
        frames=frames,
        clips=count,
        shots=len(found),
        windows=len(next(iter(changes.values()))),
    )


def shots(clip: Frames) -> list[Frames]:
    """The clip from cut to cut, as `CUT` and `CUT_LEVELS` say."""
    sparse = checked_clip(clip)[:, ::_SPARSE, ::_SPARSE]
    pairs = [sparse[t - 1 : t + 1] for t in range(1, len(clip))]
    return np.split(clip, [t for t, pair in enumerate(pairs, 1) if _is_cut(pair)])


def _is_cut(pair: Frames) -> bool:
    levels = 255 * (1 - flicker_mae(pair)[0])
    return bool(levels > CUT_LEVELS and lab_hist_distance(pair)[1] > CUT)


def _changes(shot: Frames, frames: int) -> dict[str, Values]:
    """Signed change of every number over each window of a shot."""
    return {name: relative_contrast(windows(own, frames)) for name, own in looks(shot).items()}


def windows(curve: Values, frames: int) -> Values:
    """A curve `[T]` in windows `[n, frames]`, one every half a window."""
    _check_window(frames)
    cut = np.lib.stride_tricks.sliding_window_view(curve, frames)
    return cut[:: frames // 2]


def _check_window(frames: int) -> None:
    if frames < 2:
        raise InvalidSetting(f"frames is {frames}, expected at least 2: one has no end to compare")


def _null(changes: Values) -> Null:
    sizes = np.abs(changes[~np.isnan(changes)])
    if not len(sizes):
        return Null(median=None, p90=None, windows=0)
    median, p90 = np.quantile(sizes, (0.5, 0.9)).tolist()
    return Null(median=median, p90=p90, windows=len(sizes))
