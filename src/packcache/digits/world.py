"""The digits world: one handwritten digit that slides over a flat background and bounces.

Everything is a pure function of a `Scene`. The digit moves 2 pixels a frame, so four frames (one
latent frame of the codec) are 8 pixels, one token: motion is a shift of tokens. Starting points lie
on a 4-pixel lattice, which leaves four phases to learn instead of 64.

The scans are scikit-learn's digits (`load_digits`, UCI optical digits). Every fifth one is kept
out of training.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from packcache.errors import InvalidSetting

__all__ = [
    "BACKGROUND",
    "COLOURS",
    "DIRECTIONS",
    "FPS",
    "SIZE",
    "SPRITE",
    "Scene",
    "corners",
    "prompt",
    "render",
    "sample_scene",
    "scan_indices",
    "sprite",
]

SIZE = 64  # pixels, both sides of a frame
SPRITE = 24  # pixels, both sides of a digit's box
SPEED = 2  # pixels a frame on each axis that moves
LATTICE = 4  # pixels between starting points
FPS = 12

#: Every fifth scan is a test scan.
HOLD_OUT = 5

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (236, 64, 58),
    "green": (64, 208, 84),
    "blue": (66, 124, 250),
    "yellow": (250, 216, 56),
    "purple": (206, 84, 236),
    "cyan": (52, 214, 226),
}

BACKGROUND = (20, 22, 30)

#: Unit steps (x to the right, y downwards).
DIRECTIONS: dict[str, tuple[int, int]] = {
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up-right": (1, -1),
    "up-left": (-1, -1),
    "down-right": (1, 1),
    "down-left": (-1, 1),
}

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One clip of any length: which scan, in which colour, from where (box corner), whither."""

    digit: int
    scan: int
    colour: str
    direction: str
    x: int
    y: int
    background: tuple[int, int, int] = BACKGROUND


def prompt(scene: Scene) -> str:
    """The sentence that describes a scene: "a red 3 moving right"."""
    return f"a {scene.colour} {scene.digit} moving {scene.direction}"


def sample_scene(
    rng: np.random.Generator,
    split: Split = "train",
    *,
    digit: int | None = None,
    colour: str | None = None,
    direction: str | None = None,
) -> Scene:
    """Draw a scene; what is given stays fixed. The same generator state gives the same scene."""
    drawn_digit = int(rng.integers(10))
    drawn_colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
    drawn_direction = list(DIRECTIONS)[int(rng.integers(len(DIRECTIONS)))]
    digit = drawn_digit if digit is None else digit
    scans = scan_indices(split, digit)
    x, y = LATTICE * rng.integers((SIZE - SPRITE) // LATTICE + 1, size=2)
    return Scene(
        digit=digit,
        scan=int(scans[rng.integers(len(scans))]),
        colour=drawn_colour if colour is None else colour,
        direction=drawn_direction if direction is None else direction,
        x=int(x),
        y=int(y),
    )


def corners(scene: Scene, frames: int, first: int = 0) -> np.ndarray:
    """Upper left corners (x, y) of the digit's box from frame `first` on, int64 `[frames, 2]`."""
    time = np.arange(first, first + frames)[:, None]
    step = SPEED * np.array(DIRECTIONS[scene.direction])
    room = SIZE - SPRITE
    folded = (np.array([scene.x, scene.y]) + step * time) % (2 * room)
    return np.minimum(folded, 2 * room - folded)


def render(scene: Scene, frames: int, first: int = 0) -> np.ndarray:
    """Frames `first` to `first + frames - 1` of a scene, uint8 RGB `[frames, 64, 64, 3]`."""
    back = np.array(scene.background, dtype=np.float32)
    alpha = sprite(scene.scan)[:, :, None]
    box = back + alpha * (np.array(COLOURS[scene.colour], dtype=np.float32) - back)
    video = np.empty((frames, SIZE, SIZE, 3), dtype=np.uint8)
    video[:] = scene.background
    for frame, (x, y) in zip(video, corners(scene, frames, first), strict=True):
        frame[y : y + SPRITE, x : x + SPRITE] = np.rint(box)
    return video


@functools.lru_cache(maxsize=4096)
def sprite(scan: int) -> np.ndarray:
    """Opacity of a scan at 24x24 pixels, float32 0..1: smoothly enlarged, edges made crisp."""
    images, _ = _scans()
    if not 0 <= scan < len(images):
        raise InvalidSetting(f"scan {scan} does not exist, expected 0 to {len(images) - 1}")
    weights = _enlarge()
    soft = weights @ images[scan] @ weights.T
    alpha = np.clip((soft - 0.5) * 1.7 + 0.5, 0.0, 1.0).astype(np.float32)
    alpha.flags.writeable = False
    return alpha


@functools.lru_cache(maxsize=32)
def scan_indices(split: Split, digit: int | None = None) -> np.ndarray:
    """Indices of the scans of a split, of one digit or of all, int64 ascending."""
    _, labels = _scans()
    index = np.arange(len(labels))
    held_out = index % HOLD_OUT == HOLD_OUT - 1
    chosen = held_out if split == "test" else ~held_out
    if digit is not None:
        chosen &= labels == digit
    index = index[chosen]
    index.flags.writeable = False
    return index


@functools.lru_cache(maxsize=1)
def _enlarge() -> np.ndarray:
    """Cubic (Catmull-Rom) interpolation of 8 samples to 24 pixels, float64 `[24, 8]`.

    2.8 pixels a sample: strokes that touch the scan's edge still fade out inside the box.
    """
    centre = (np.arange(SPRITE) + 0.5 - SPRITE / 2) / 2.8 + 3.5
    d = np.abs(centre[:, None] - np.arange(8)[None])
    near = 1.5 * d**3 - 2.5 * d**2 + 1
    far = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0.0))


@functools.lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Grey scans 0..1 `[1797, 8, 8]` and their labels `[1797]`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InvalidSetting(
            "the digits world needs scikit-learn's digits: pip install 'packcache[eval]'"
        ) from error
    bundle: Any = load_digits()  # its declared type is a union that hides the fields
    return bundle.images / 16.0, bundle.target
