"""Video metrics that need no weights, under names that say what is computed (evaluation 8b).

    measured = measure(clip.frames, fps=12, against=full.frames)
    measured.scalars["warp_error_dis"], measured.series["sharpness"]
    measured.lines(), measured.to_json()

They stand beside VBench's dimensions, not for them: whether they agree with those, or with people,
is not known, and none bears a bare VBench name. Flow is DIS of OpenCV (`[eval]`).

What they cannot see (evaluation 4; the tests hold it): blur *raises* smoothness and flicker scores
and lowers the warp error, structures that melt hardly move any, a frozen clip is perfect on all
three, jitter makes a still clip dynamic, and flow undoes it for the warp error. So those three are
never told without motion and the share of frozen pairs, nor motion without smoothness, which falls
under jitter: `Measured` holds them together.

A metric with a curve returns it; the clip's number is its mean. Frames are uint8 `[T, H, W, 3]`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packcache.errors import InputError, InvalidSetting
from packcache.testing.faults import LUMA, checked_clip
from packcache.video import Frames

__all__ = [
    "FROZEN",
    "METRICS",
    "SCHEMA",
    "Flow",
    "Measured",
    "Metric",
    "check_names",
    "contrast",
    "dynamic_dis",
    "flicker_mae",
    "flow_interp_smoothness_dis",
    "flow_motion_top5_dis",
    "frozen_share",
    "hf_share",
    "lab_hist_distance",
    "looks",
    "luminance",
    "measure",
    "psnr",
    "saturation",
    "sharpness",
    "ssim",
    "warp_error_dis",
]

SCHEMA = "packcache.video/1"

#: Mean absolute levels between two frames up to which the pair counts as frozen.
FROZEN = 0.1

#: Decibels of equal frames, whose PSNR has no bound.
PSNR_CAP = 100.0

#: Units of CIE Lab along a histogram's cube: a difference that is seen at a glance.
LAB_CUBE = 8

#: Light of the 256 levels of sRGB (IEC 61966-2-1), and its channels' shares of white's X, Y, Z.
_LEVELS = np.arange(256) / 255
_LIGHT = np.where(_LEVELS > 0.04045, ((_LEVELS + 0.055) / 1.055) ** 2.4, _LEVELS / 12.92)
_XYZ = np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
_XYZ = _XYZ / _XYZ.sum(axis=0)

#: Pixels of a side that the flow and the window of SSIM need.
LEAST_SIDE = 16

Values = NDArray[np.float64]
Field = NDArray[np.floating]

#: What stands beside every number that a still clip scores best at; and beside motion, which
#: jitter raises.
_MOTION = ("flow_motion_top5_dis", "frozen_share")
_STEADY = ("flow_interp_smoothness_dis", "warp_error_dis")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a name stands for: its unit, and the metrics that it is never told without.

    Values of its curve belong to pixel frames `first`, `first + step`, ...
    """

    unit: str = ""
    first: int = 0
    step: int = 1
    beside: tuple[str, ...] = ()


#: All metrics, in the order they are told.
METRICS: dict[str, Metric] = {
    "flow_motion_top5_dis": Metric(unit="px/frame", first=1, beside=_STEADY),
    "dynamic_dis": Metric(beside=_STEADY),
    "frozen_share": Metric(unit="of pairs"),
    "flicker_mae": Metric(unit="of 1", first=1, beside=_MOTION),
    "flow_interp_smoothness_dis": Metric(unit="of 1", first=1, step=2, beside=_MOTION),
    "warp_error_dis": Metric(unit="of 1 squared", first=1, beside=_MOTION),
    "sharpness": Metric(unit="levels squared"),
    "hf_share": Metric(unit="of power"),
    "luminance": Metric(unit="levels"),
    "contrast": Metric(unit="levels"),
    "saturation": Metric(unit="of 1"),
    "lab_hist_distance": Metric(unit="of pixels"),
    "psnr": Metric(unit="dB"),
    "ssim": Metric(unit="of 1"),
}


def check_names(names: Iterable[str]) -> None:
    """Raises InvalidSetting for a name that is no metric."""
    for name in names:
        if name not in METRICS:
            raise InvalidSetting(f"unknown metric {name!r}: known are {', '.join(METRICS)}")


# --- what was measured ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """All numbers of a clip: `scalars` by metric (None: cannot be told), `series` its curves.

    Cannot be made with a number, or a curve, whose metric is to stand beside others that are not
    among the scalars.
    """

    scalars: dict[str, float | bool | None]
    series: dict[str, Values]
    frames: int
    height: int
    width: int
    fps: float

    def __post_init__(self) -> None:
        names = (*self.scalars, *self.series)
        check_names(names)
        for name in names:
            missing = [other for other in METRICS[name].beside if other not in self.scalars]
            if missing:
                raise InvalidSetting(f"{name} misleads without {missing[0]}: give both")

    def only(self, *names: str) -> Measured:
        """These metrics, and those that have to stand beside them."""
        check_names(names)
        absent = [name for name in names if name not in self.scalars]
        if absent:
            raise InvalidSetting(
                f"{absent[0]} was not measured: known here are {', '.join(self.scalars)}; psnr and "
                "ssim need a clip to hold against"
            )
        beside = {other for name in names for other in METRICS[name].beside}
        wanted = {*names, *beside, *(other for name in beside for other in METRICS[name].beside)}
        return replace(
            self,
            scalars={name: value for name, value in self.scalars.items() if name in wanted},
            series={name: curve for name, curve in self.series.items() if name in wanted},
        )

    def frame_numbers(self, name: str) -> NDArray[np.int64]:
        """To which pixel frame each value of a curve belongs; a pair's to its second."""
        metric = METRICS[name]
        return metric.first + metric.step * np.arange(len(self.series[name]))

    def to_json(self) -> dict[str, Any]:
        """Plain data; values that cannot be told are None."""
        return {
            "schema": SCHEMA,
            "flow": "DIS, medium preset",
            "weights": "none",
            "frames": self.frames,
            "height": self.height,
            "width": self.width,
            "fps": self.fps,
            "units": {name: METRICS[name].unit for name in self.scalars},
            "beside": {name: list(METRICS[name].beside) for name in self.scalars},
            "scalars": self.scalars,
            "series": {
                name: {
                    "frames": self.frame_numbers(name).tolist(),
                    "values": [None if math.isnan(v) else v for v in curve.tolist()],
                }
                for name, curve in self.series.items()
            },
        }

    def lines(self) -> list[str]:
        """The scalars as text, each on a line with those that stand beside it."""
        size = f"{self.frames} frames of {self.width}x{self.height}, {self.fps:g} a second"
        lines = [f"{size}; flow by DIS, no weights: aesthetic and imaging quality not measured"]
        for name, value in self.scalars.items():
            metric = METRICS[name]
            line = f"{name:28}{_told(value):>10} {metric.unit:14}"
            beside = ", ".join(f"{other} {_told(self.scalars[other])}" for other in metric.beside)
            lines.append((line + (f" with {beside}" if beside else "")).rstrip())
        return lines


def _told(value: float | bool | None) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return f"{value:.4g}" if abs(value) < 0.1 or abs(value) >= 1000 else f"{value:.4f}"


def measure(frames: Frames, *, fps: float, against: Frames | None = None) -> Measured:
    """Every metric of a clip of at least 3 frames, each flow computed once.

    `against` is the clip that PSNR and SSIM refer to, such as the full cache's. Raises
    InvalidSetting for frames or a rate that cannot be used or without OpenCV, InputError where the
    clips differ in length or size.
    """
    _check_rate(fps)
    frames = checked_clip(frames, least=3)
    _check_alike(frames, against)
    flow = Flow(frames)
    curves: dict[str, Values] = {
        "flicker_mae": flicker_mae(frames),
        "flow_interp_smoothness_dis": flow_interp_smoothness_dis(frames, flow),
        "warp_error_dis": warp_error_dis(frames, flow),
        "flow_motion_top5_dis": flow_motion_top5_dis(frames, flow),
        **looks(frames),
        "lab_hist_distance": lab_hist_distance(frames),
    }
    if against is not None:
        curves |= {metric.__name__: metric(frames, against) for metric in (psnr, ssim)}
    scalars: dict[str, float | bool | None] = {n: _mean(curve) for n, curve in curves.items()}
    scalars["dynamic_dis"] = dynamic_dis(frames, flow, fps=fps)
    scalars["frozen_share"] = frozen_share(frames)
    count, height, width, _ = frames.shape
    return Measured(
        scalars={name: scalars[name] for name in METRICS if name in scalars},
        series={name: curves[name] for name in METRICS if name in curves},
        frames=count,
        height=height,
        width=width,
        fps=float(fps),
    )


# --- between frames ------------------------------------------------------------------------------


def flicker_mae(frames: Frames) -> Values:
    """1 - (mean absolute difference of frames t and t + 1) / 255, `[T - 1]`.

    The mean is VBench's temporal flickering, the same formula.
    """
    return 1 - _differences(frames) / 255


def frozen_share(frames: Frames) -> float:
    """Share of adjacent pairs whose mean absolute difference is at most `FROZEN` levels."""
    return float((_differences(frames) <= FROZEN).mean())


def flow_motion_top5_dis(frames: Frames, flow: Flow | None = None) -> Values:
    """Mean flow magnitude of the fastest 5 % of pixels from frame t to t + 1, pixels, `[T - 1]`."""
    flow = flow or Flow(frames)
    return np.array([flow.speed(t, t + 1) for t in range(len(frames) - 1)])


def dynamic_dis(frames: Frames, flow: Flow | None = None, *, fps: float) -> bool | None:
    """VBench's rule for its dynamic degree, on DIS: does the clip move at all?

    Every k-th frame is kept, k = max(1, round(fps / 8)). A kept pair moves if its fastest 5 % of
    pixels have a mean flow of more than 6 * short_side / 256 pixels; the clip is dynamic if at
    least round(4 * kept / 16) pairs move. None where the rule would ask for no pair at all (fewer
    than 3 kept). Jitter of 2 pixels can make a still clip dynamic: read the smoothness with it.
    """
    _check_rate(fps)
    kept = range(0, len(checked_clip(frames)), max(1, round(fps / 8)))
    needed = round(4 * len(kept) / 16)
    if not needed:
        return None
    flow = flow or Flow(frames)
    limit = 6 * min(frames.shape[1:3]) / 256
    moving = sum(flow.speed(a, b) > limit for a, b in itertools.pairwise(kept))
    return moving >= needed


def flow_interp_smoothness_dis(frames: Frames, flow: Flow | None = None) -> Values:
    """VBench's motion smoothness with DIS in the place of its network, one value an odd frame.

    Odd frames are dropped and made again from their even neighbours a and b: with the flows f of a
    to b and g of b to a, half of a sampled at (g - f) / 4 and half of b at (f - g) / 4 (the flows
    at the midpoint of a straight motion). Value: 1 - (mean absolute difference to the real frame)
    / 255. An odd frame at the end has no second neighbour and does not count, as with VBench.
    """
    checked_clip(frames, least=3)
    flow = flow or Flow(frames)
    values = []
    for odd in range(1, len(frames) - 1, 2):
        before, after = frames[odd - 1].astype(np.float32), frames[odd + 1].astype(np.float32)
        way = (flow.field(odd + 1, odd - 1) - flow.field(odd - 1, odd + 1)) / 4
        made = np.rint((flow.warped(before, way) + flow.warped(after, -way)) / 2)
        values.append(1 - float(np.abs(made - frames[odd]).mean()) / 255)
    return np.array(values)


def warp_error_dis(frames: Frames, flow: Flow | None = None) -> Values:
    """Mean squared difference of frame t and frame t + 1 warped back to it, of levels in 0..1.

    `[T - 1]`, over the pixels that both frames show: those whose flow f ends inside the picture
    and there meets a backward flow g with |f + g|^2 <= 0.01 (|f|^2 + |g|^2) + 0.5. NaN if there
    are none.
    """
    flow = flow or Flow(frames)
    values = []
    for t in range(len(frames) - 1):
        forth, back = flow.field(t, t + 1), flow.field(t + 1, t)
        seen = flow.is_seen(forth, back)
        warped = flow.warped(frames[t + 1].astype(np.float32), forth)
        errors = ((warped - frames[t]) / 255)[seen] ** 2
        values.append(float(errors.mean()) if seen.any() else math.nan)
    return np.array(values)


class Flow:
    """DIS optical flow between the frames of a clip; speeds are remembered, fields are not."""

    def __init__(self, frames: Frames) -> None:
        self._cv2 = _opencv()
        frames = checked_clip(frames, least=2)
        _check_side(frames)
        self._grey = [self._cv2.cvtColor(f, self._cv2.COLOR_RGB2GRAY) for f in frames]
        self._speeds: dict[tuple[int, int], float] = {}
        height, width = frames.shape[1:3]
        columns, rows = np.meshgrid(np.arange(width), np.arange(height))
        self._places = np.stack((columns, rows), axis=-1).astype(np.float32)

    def field(self, first: int, second: int) -> Field:
        """Where each pixel of a frame goes in another, `[H, W, 2]`: pixels right and down."""
        # a new one each time: on small frames DIS changes its own settings when first used
        dis = self._cv2.DISOpticalFlow_create(self._cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        found = dis.calc(self._grey[first], self._grey[second], None)
        self._speeds[first, second] = _fastest(found)
        return found

    def speed(self, first: int, second: int) -> float:
        """Mean magnitude of the fastest 5 % of pixels."""
        if (first, second) not in self._speeds:
            self.field(first, second)
        return self._speeds[first, second]

    def warped(self, picture: Field, way: Field) -> Field:
        """`picture [H, W, C]` sampled where each pixel's way ends; edges repeated."""
        cv2 = self._cv2
        ends = self._places + way
        return cv2.remap(picture, ends, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    def is_seen(self, forth: Field, back: Field) -> NDArray[np.bool_]:
        """Pixels `[H, W]` that are in both frames (Sundaram and others 2010; see warp_error)."""
        met = self.warped(back, forth)
        gap, sizes = _squares(forth + met), _squares(forth) + _squares(met)
        ends, last = self._places + forth, self._places[-1, -1]
        inside = ((ends >= 0) & (ends <= last)).all(-1)
        return inside & (gap <= 0.01 * sizes + 0.5)


def _fastest(field: Field) -> float:
    speeds = np.sqrt(_squares(field)).ravel()
    count = max(1, int(0.05 * len(speeds)))
    return float(np.partition(speeds, -count)[-count:].mean())


def _squares(field: Field) -> Field:
    """Squared lengths `[H, W]`."""
    return field[..., 0] ** 2 + field[..., 1] ** 2


def _differences(frames: Frames) -> Values:
    """Mean absolute levels between frames t and t + 1, `[T - 1]`."""
    wide = checked_clip(frames, least=2).astype(np.int16)
    return np.array([np.abs(b - a).mean() for a, b in itertools.pairwise(wide)])


# --- of a frame ----------------------------------------------------------------------------------


def looks(frames: Frames) -> dict[str, Values]:
    """The curves of what a frame says by itself, without flow: by name, `[T]` each."""
    return {metric.__name__: metric(frames) for metric in _LOOKS}


def luminance(frames: Frames) -> Values:
    """Mean luma (Rec. 601), levels, `[T]`."""
    return _of_luma(frames, lambda luma: luma.mean())


def contrast(frames: Frames) -> Values:
    """Standard deviation of luma, levels, `[T]`."""
    return _of_luma(frames, lambda luma: luma.std())


def sharpness(frames: Frames) -> Values:
    """Variance of luma's Laplacian (four neighbours), levels squared, `[T]`; noise raises it."""

    def laplacian(luma: Values) -> float:
        around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
        return (around - 4 * luma[1:-1, 1:-1]).var()

    _check_side(frames)
    return _of_luma(frames, laplacian)


def hf_share(frames: Frames) -> Values:
    """Share of luma's power above 1/4 cycle a pixel, under a Hann window, mean removed, `[T]`."""
    height, width = checked_clip(frames).shape[1:3]
    window = np.outer(np.hanning(height), np.hanning(width))
    high = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)) > 0.25

    def share(luma: Values) -> float:
        power = np.abs(np.fft.fft2((luma - luma.mean()) * window)) ** 2
        total = power.sum()
        return power[high].sum() / total if total > 1e-6 else 0.0  # a flat frame has rounding only

    return _of_luma(frames, share)


def saturation(frames: Frames) -> Values:
    """Mean of (max - min) / max over the channels, 0 for black pixels, `[T]`."""
    values = []
    for frame in checked_clip(frames):
        channels = np.moveaxis(frame, -1, 0)
        top, low = channels.max(0).astype(np.float64), channels.min(0)
        values.append(float(((top - low) / np.maximum(top, 1)).mean()))
    return np.array(values)


def lab_hist_distance(frames: Frames) -> Values:
    """How far the colours of each frame are from the first frame's, 0 to 1, `[T]`; first is 0.

    Half the absolute difference of two histograms over CIE Lab (sRGB, D65) in cubes of
    `LAB_CUBE` units: the share of pixels that have to change their cube before both agree. It does
    not see where a colour is, nor how far it went once no cube is shared.
    """
    first, *rest = map(_lab_cubes, checked_clip(frames))
    pixels = frames[0, ..., 0].size
    return np.array([0.0, *(np.abs(own - first).sum() / (2 * pixels) for own in rest)])


def _lab_cubes(frame: Frames) -> NDArray[np.int64]:
    """Pixels in each cube, flat."""
    # a and b run from -128 to 128; greys, at 0, lie in the middle of a cube and not on its face
    offset = np.array([0, 128 + LAB_CUBE / 2, 128 + LAB_CUBE / 2])
    sides = np.array([100, 256 + LAB_CUBE, 256 + LAB_CUBE]) // LAB_CUBE + 1
    cubes = np.clip((_lab(frame.reshape(-1, 3)) + offset) // LAB_CUBE, 0, sides - 1)
    numbers = np.ravel_multi_index(tuple(cubes.astype(np.int64).T), tuple(sides))
    return np.bincount(numbers, minlength=int(sides.prod()))


def _lab(pixels: Frames) -> Values:
    """CIE Lab of sRGB pixels `[n, 3]`: lightness 0 to 100, a and b 0 for grey."""
    share = _LIGHT[pixels] @ _XYZ
    root = np.where(share > (6 / 29) ** 3, np.cbrt(share), share * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = root.T
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), axis=1)


def psnr(frames: Frames, against: Frames) -> Values:
    """10 log10(255^2 / mean squared error) to another clip, dB, at most `PSNR_CAP`, `[T]`."""
    _check_alike(checked_clip(frames), against)
    errors = [
        float(((a.astype(np.float64) - b) ** 2).mean())
        for a, b in zip(frames, against, strict=True)
    ]
    least = 255**2 / 10 ** (PSNR_CAP / 10)
    return np.array([10 * math.log10(255**2 / max(error, least)) for error in errors])


def ssim(frames: Frames, against: Frames) -> Values:
    """Structural similarity of luma to another clip, mean over the picture, `[T]`.

    Wang and others 2004: Gaussian window of 11 pixels and sigma 1.5, K 0.01 and 0.03, only where
    the window lies inside the picture.
    """
    cv2 = _opencv()
    _check_alike(checked_clip(frames), against)
    _check_side(frames)

    def around(picture: Values) -> Values:
        return cv2.GaussianBlur(picture, (11, 11), 1.5)[5:-5, 5:-5]

    values = []
    for first, second in zip(frames, against, strict=True):
        a, b = _luma(first), _luma(second)
        mean_a, mean_b = around(a), around(b)
        both = around(a * b) - mean_a * mean_b
        spread = around(a * a) - mean_a**2 + around(b * b) - mean_b**2
        light = (2 * mean_a * mean_b + 2.55**2) / (mean_a**2 + mean_b**2 + 2.55**2)
        values.append(float((light * (2 * both + 7.65**2) / (spread + 7.65**2)).mean()))
    return np.array(values)


_LOOKS = (sharpness, hf_share, luminance, contrast, saturation)


def _of_luma(frames: Frames, number: Callable[[Values], Any]) -> Values:
    return np.array([float(number(_luma(frame))) for frame in checked_clip(frames)])


def _luma(frame: Frames) -> Values:
    return frame.astype(np.float64) @ LUMA


# --- what cannot be used -------------------------------------------------------------------------


def _mean(curve: Values) -> float | None:
    """Mean of what is known."""
    known = curve[~np.isnan(curve)]
    return float(known.mean()) if len(known) else None


def _check_side(frames: Frames) -> None:
    height, width = frames.shape[1:3]
    if min(height, width) < LEAST_SIDE:
        raise InvalidSetting(
            f"frames are {width}x{height}, expected at least {LEAST_SIDE} pixels a side: scale up"
        )


def _check_rate(fps: float) -> None:
    if not (math.isfinite(fps) and fps > 0):
        raise InvalidSetting(f"fps is {fps}, expected frames a second above 0")


def _check_alike(frames: Frames, against: Frames | None) -> None:
    if against is None:
        return
    sizes = [
        f"{len(c)} frames of {c.shape[2]}x{c.shape[1]}" for c in (frames, checked_clip(against))
    ]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the clip has {sizes[0]}, the one to hold it against {sizes[1]}: make both alike"
        )


def _opencv() -> Any:
    """OpenCV, which only the metrics with flow or windows need."""
    try:
        import cv2
    except ImportError as error:
        raise InvalidSetting(
            "these video metrics need OpenCV: pip install 'packcache[eval]'"
        ) from error
    return cv2
