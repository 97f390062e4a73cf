"""Condition images: which crop an image gets, and how it is cut to size (lumos1-spec 6.1)."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from packcache.lumos.vocab import GRID_UNIT

__all__ = ["choose_crop", "crop_sizes", "crop_to"]

#: Widest and tallest a crop may be.
_MAX_ASPECT = 4.0


def crop_sizes(target: int) -> list[tuple[int, int]]:
    """Candidate (width, height) in pixels with about `target^2` pixels, widest first.

    A walk along the hyperbola of `n = (target // 32)^2` patches: 352 gives 31 sizes.
    """
    patches = (target // GRID_UNIT) ** 2
    wide, high = patches, 1
    sizes: list[tuple[int, int]] = []
    while wide > 0:
        if max(wide, high) / min(wide, high) <= _MAX_ASPECT:
            sizes.append((wide * GRID_UNIT, high * GRID_UNIT))
        if (high + 1) * wide <= patches:
            high += 1
        else:
            wide -= 1
    return sizes


def choose_crop(size: tuple[int, int], candidates: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The candidate that loses least of an image of `size` (width, height); ties to the larger."""

    def fit(crop: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        scales = crop[0] / size[0], crop[1] / size[1]
        return min(scales) / max(scales), crop

    return max(candidates, key=fit)


def crop_to(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale and centre-crop to `size`: halve by a box filter while twice as large, then bicubic."""
    width, height = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    scaled = (round(image.width * scale), round(image.height * scale))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
