"""Condition images: which crop an image gets, and how it is cut to size (lumos1-spec 6.1)."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from packcache.errors import InvalidSetting
from packcache.lumos.vocab import GRID_UNIT

__all__ = ["Size", "choose_crop", "crop_sizes", "crop_to", "pick_size"]

#: (width, height) in pixels.
Size = tuple[int, int]

#: Widest and tallest a crop may be.
_MAX_ASPECT = 4.0

#: Beyond any clip; the walk along all sizes takes longer the larger they are.
_MOST = 4096

#: The shape of a clip that no picture decides: 7:4, as upstream's evaluation has it.
_USUAL = (7, 4)


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


def pick_size(
    asked: Size | int | None, *, default: Size, target: int | None = None, picture: Size | None
) -> Size:
    """The size of a clip: as asked, or what suits the picture, or the default.

    A single number asks for about that many pixels squared, in the picture's shape (528 makes
    672x384 of a 7:4 picture); `target` is such a number for when nothing is asked.
    """
    if isinstance(asked, (tuple, list)) and len(asked) == 2:
        return asked[0], asked[1]
    if asked is not None and not (isinstance(asked, int) and GRID_UNIT <= asked <= _MOST):
        raise InvalidSetting(
            f"size is {asked!r}, expected {GRID_UNIT} to {_MOST}, or (width, height)"
        )
    if asked is None:
        asked = target if picture else None
    return default if asked is None else choose_crop(picture or _USUAL, crop_sizes(asked))


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
