"""Faults put into clips on purpose: a metric is worth what it answers to them (evaluation 4).

    worse = inject("blur", frames)              # by name, default strength
    worse = noise(frames, seed=1, sigma=40)     # or one of them, with its own

Frames are uint8 `[T, H, W, 3]`, in and out. Faults that grow begin at nothing in the first frame
and have their full strength in the last, so they are drift; the others act on all frames alike.
Everything is a pure function of frames, seed and strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from packcache.errors import InvalidSetting
from packcache.video import Frames

__all__ = [
    "FAULTS",
    "LUMA",
    "blur",
    "checked_clip",
    "exposure",
    "flicker",
    "freeze",
    "inject",
    "jitter",
    "melt",
    "noise",
    "saturation",
    "shuffle",
]

#: Weights of red, green and blue in the luma of Rec. 601.
LUMA = np.array([0.299, 0.587, 0.114])

Picture = NDArray[np.floating]


def checked_clip(frames: Frames, *, least: int = 1) -> Frames:
    """The frames, if they are a clip of at least so many. Raises InvalidSetting."""
    shape, kind = np.shape(frames), getattr(frames, "dtype", type(frames).__name__)
    if len(shape) != 4 or shape[3] != 3 or not all(shape) or kind != np.uint8:
        raise InvalidSetting(
            f"frames are {kind} of shape {shape}, expected uint8 [T, H, W, 3]: scale to 0..255, "
            "channels last"
        )
    if shape[0] < least:
        raise InvalidSetting(
            f"the clip has {shape[0]} frame{'s' * (shape[0] != 1)}, expected at least {least}: "
            "give a longer one"
        )
    return frames


def blur(frames: Frames, *, seed: int = 0, sigma: float = 3.0) -> Frames:
    """Gaussian blur that grows to `sigma` pixels."""
    return _each(frames, lambda picture, share: _smoothed(picture, sigma * share))


def noise(frames: Frames, *, seed: int = 0, sigma: float = 25.0) -> Frames:
    """White noise, new in each frame, that grows to `sigma` levels."""
    rng = np.random.default_rng(seed)

    def noisy(picture: Picture, share: float) -> Picture:
        return picture + sigma * share * rng.standard_normal(picture.shape, dtype=np.float32)

    return _each(frames, noisy)


def melt(frames: Frames, *, seed: int = 0, amount: float = 0.05) -> Frames:
    """Structures dissolve: pixels drift apart along one smooth random field.

    Their way grows to `amount` of the short side (root mean square), so it is slow: local detail
    and brightness stay, what the picture shows does not.
    """
    height, width = checked_clip(frames).shape[1:3]
    short = min(height, width)
    drawn = np.random.default_rng(seed).standard_normal((height, width, 2), dtype=np.float32)
    field = _smoothed(drawn, short / 20)
    field *= amount * short / max(math.sqrt(2 * float((field**2).mean())), 1e-6)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)

    def melted(picture: Picture, share: float) -> Picture:
        return _sampled(picture, rows + share * field[..., 0], columns + share * field[..., 1])

    return _each(frames, melted)


def saturation(frames: Frames, *, seed: int = 0, factor: float = 2.0) -> Frames:
    """Colours move away from grey of the same luma, by a factor that grows to `factor`."""

    def richer(picture: Picture, share: float) -> Picture:
        grey = (picture @ LUMA)[..., None]
        return grey + (1 + (factor - 1) * share) * (picture - grey)

    return _each(frames, richer)


def exposure(frames: Frames, *, seed: int = 0, factor: float = 1.6) -> Frames:
    """Levels times a factor that grows to `factor`; what is brighter than white is cut."""
    return _each(frames, lambda picture, share: picture * (1 + (factor - 1) * share))


def flicker(frames: Frames, *, seed: int = 0, share: float = 0.06) -> Frames:
    """Levels up and down by `share` from frame to frame, all of a frame alike."""
    signs = iter(np.resize((1, -1), len(checked_clip(frames))).tolist())
    return _each(frames, lambda picture, _: picture * (1 + share * next(signs)))


def jitter(frames: Frames, *, seed: int = 0, pixels: int = 2) -> Frames:
    """Each frame moved by `pixels` left or right and up or down, at random; edges repeated."""
    count, height, width, _ = checked_clip(frames).shape
    moves = np.random.default_rng(seed).choice((0, 2 * pixels), size=(count, 2)).tolist()
    wide = np.pad(frames, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
    return np.stack([wide[t, y : y + height, x : x + width] for t, (y, x) in enumerate(moves)])


def freeze(frames: Frames, *, seed: int = 0) -> Frames:
    """The first frame, again and again."""
    return np.repeat(checked_clip(frames)[:1], len(frames), axis=0)


def shuffle(frames: Frames, *, seed: int = 0) -> Frames:
    """The same frames in random order."""
    return frames[np.random.default_rng(seed).permutation(len(checked_clip(frames)))]


#: Faults by name, at the strengths that evaluation 4 was measured with.
FAULTS: dict[str, Callable[..., Frames]] = {
    "blur": blur,
    "noise": noise,
    "melt": melt,
    "saturation": saturation,
    "exposure": exposure,
    "flicker": flicker,
    "jitter": jitter,
    "freeze": freeze,
    "shuffle": shuffle,
}


def inject(name: str, frames: Frames, *, seed: int = 0, **strength: Any) -> Frames:
    """The clip with the named fault; `strength` as the fault calls it."""
    if name not in FAULTS:
        raise InvalidSetting(f"unknown fault {name!r}: known are {', '.join(FAULTS)}")
    return FAULTS[name](frames, seed=seed, **strength)


def _each(frames: Frames, change: Callable[[Picture, float], Picture]) -> Frames:
    """Every frame through `change(picture, share)`; the share of the clip gone by is 0 to 1."""
    shares = np.linspace(0, 1, len(checked_clip(frames))).tolist()
    changed = np.empty_like(frames)
    for number, share in enumerate(shares):
        levels = change(frames[number].astype(np.float32), share)
        changed[number] = np.rint(levels).clip(0, 255)
    return changed


def _smoothed(picture: Picture, sigma: float) -> Picture:
    """`[H, W, C]` under a Gaussian of `sigma` pixels, edges repeated."""
    if sigma <= 0:
        return picture
    radius = math.ceil(3 * sigma)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2).astype(np.float32)
    taps /= taps.sum()
    for _ in range(2):  # down the columns; turned, and so along the rows
        wide = np.pad(picture, ((radius, radius), (0, 0), (0, 0)), mode="edge")
        windows = sliding_window_view(wide, len(taps), axis=0)
        picture = np.einsum("abck,k->bac", windows, taps)
    return picture


def _sampled(picture: Picture, rows: Picture, columns: Picture) -> Picture:
    """Bilinear values `[H, W, C]` at those places `[H, W]`, the nearest inside the picture."""
    height, width = picture.shape[:2]
    rows, columns = rows.clip(0, height - 1), columns.clip(0, width - 1)
    top, left = rows.astype(np.intp), columns.astype(np.intp)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    down, along = (rows - top)[..., None], (columns - left)[..., None]
    above = picture[top, left] * (1 - along) + picture[top, right] * along
    below = picture[bottom, left] * (1 - along) + picture[bottom, right] * along
    return above * (1 - down) + below * down
