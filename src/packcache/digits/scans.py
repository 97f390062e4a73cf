"""Handwriting: scikit-learn's digit scans as opacities of 24x24 pixels.

The scans are `load_digits` (UCI optical digits, 8x8 grey). Every fifth one is kept out of training.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import numpy as np

from packcache.errors import InvalidSetting

__all__ = ["SPRITE", "Split", "scan_indices", "sprite"]

SPRITE = 24  # pixels, both sides of a digit's box

#: Every fifth scan is a test scan.
HOLD_OUT = 5

#: Pixels a sample of the scan: strokes that touch its edge still fade out inside the box.
PIXELS_A_SAMPLE = 2.8

Split = Literal["train", "test"]


@functools.lru_cache(maxsize=4096)
def sprite(scan: int, tilt: float = 0.0, width: float = 1.0) -> np.ndarray:
    """Opacity of a scan at 24x24 pixels, float32 0..1: smoothly enlarged, edges made crisp.

    `tilt` turns it clockwise by degrees, `width` stretches it sideways.
    """
    from scipy.ndimage import affine_transform

    images, _ = _scans()
    if not 0 <= scan < len(images):
        raise InvalidSetting(f"scan {scan} does not exist, expected 0 to {len(images) - 1}")
    turn = math.radians(tilt)
    cos, sin = math.cos(turn), math.sin(turn)
    matrix = np.array([[cos, -sin], [sin / width, cos / width]]) / PIXELS_A_SAMPLE  # rows y, x
    middle = (SPRITE - 1) / 2
    soft = affine_transform(
        images[scan],
        matrix,
        offset=(3.5 - matrix @ [middle, middle]).tolist(),  # type: ignore[arg-type]  # a pair is fine
        output_shape=(SPRITE, SPRITE),
        mode="constant",
    )
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
