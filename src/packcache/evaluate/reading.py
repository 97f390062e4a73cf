"""Reading: what frames of the digits world show, from pixels alone.

A `Reader`, fitted on training scans only, finds the objects of every frame (value, colour, place),
the curtain and the ground. Grounds and curtains are grey next to digits, and a ground pattern
lightens all channels alike. So digits are found by hue, a colour less the mean of its channels,
which is blind to the pattern.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from packcache.digits.scans import SPRITE, Split, scan_indices, sprite
from packcache.digits.world import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    CURTAIN,
    CURTAIN_LAST,
    PATTERN_STEP,
    SIZE,
    Scene,
    ground,
)
from packcache.errors import InvalidSetting

__all__ = ["Found", "Reader", "Reading", "checked", "grown", "reader"]

INK = 40.0  # levels of hue from the ground at which a pixel is ink; curtains differ by up to 25
LEAST_INK = 30.0  # pixels of full ink that make an object; the thinnest scan has 88
CURTAIN_LEVELS = 24  # a pixel this near to a curtain's colour in all channels is curtain
RECOGNISED = 0.35  # score below which no digit is recognisable; a clean digit has 0.9

_WINDOW = 28  # pixels, a crop: the box and the room that centring by ink needs
_REACH = 2  # pixels that ink reaches: strokes 4 apart are one object, lanes are 8 apart
_HALO = 3  # pixels around ink that are neither ink nor ground
_WIDTH, _RIDGE, _COPIES = 0.2, 0.03, 4  # kernel 1/length^2, its ridge, renders of each scan
_READABLE, _NOISE = (0.0, 1.4), 6.0  # blur in pixels and levels of noise, drawn for each frame
_UNREADABLE = (2.4, 4.0)  # blur that leaves no digit, trained as none: each second scan

_NAMES = tuple(COLOURS)
_HUES = np.array(list(COLOURS.values()), dtype=np.float32)
_HUES -= _HUES.mean(-1, keepdims=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """An object of a frame: `digit` is None if none is recognisable, `confidence` about 0 to 1."""

    digit: int | None
    confidence: float
    colour: str
    x: float  # centre of its ink, pixels
    y: float
    ink: float  # pixels of full ink
    box: tuple[int, int, int, int]  # x, y, width, height of its ink


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What a frame shows: objects, those with most ink first, and what lies behind them."""

    objects: tuple[Found, ...]
    curtain: float  # share of the frame that is curtain-coloured
    background: str  # nearest of BACKGROUNDS
    cells: np.ndarray  # mean colour of each pattern cell outside digits [6, 6, 3], or NaN
    inked: np.ndarray  # where objects are, with their halo, bool [96, 96]
    covered: np.ndarray  # where curtain colour is, bool [96, 96]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Object:
    """An object before it is read: hue strengths cut out around its centre."""

    frame: int
    colour: int
    x: float
    y: float
    ink: float
    box: tuple[int, int, int, int]
    crop: np.ndarray


class Reader:
    """Kernel ridge regression of opacity crops on ten digits; far from its training, scores are 0.

    Deterministic. `accuracy` is measured on held-out scans, clean renders.
    """

    def __init__(self, *, copies: int = _COPIES, seed: int = 0) -> None:
        _need_scipy()
        from scipy.linalg import cho_factor, cho_solve

        scans = scan_indices("train")
        good, labels = _lessons(np.tile(scans, copies), seed, _READABLE, _NOISE)
        blurred, _ = _lessons(scans[::2], seed, _UNREADABLE, _NOISE)
        crops = np.concatenate((good, blurred))
        kernel = _kernel(crops, crops)
        kernel[np.diag_indices(len(kernel))] += _RIDGE
        one_hot = np.zeros((len(crops), 10), dtype=np.float32)
        one_hot[np.arange(len(good)), labels] = 1
        self._crops = crops
        self._weights = cho_solve(cho_factor(kernel, lower=True, overwrite_a=True), one_hot)

    @functools.cached_property
    def accuracy(self) -> float:
        """Share of held-out digits read right, unrecognised ones counted as wrong."""
        crops, labels = _lessons(np.tile(scan_indices("test"), 3), 1, (0.0, 0.0), 0.0)
        scores = self._scores(crops)
        return float(((scores.argmax(1) == labels) & (scores.max(1) >= RECOGNISED)).mean())

    def read(self, frames: np.ndarray) -> list[Reading]:
        """What each of uint8 frames `[T, 96, 96, 3]` shows."""
        frames = checked(frames)
        objects, inked, covered = _find(frames)
        scores = self._scores(np.array([thing.crop for thing in objects]))
        found: list[list[Found]] = [[] for _ in frames]
        for thing, score in zip(objects, scores, strict=True):
            confidence = float(score.max())
            found[thing.frame].append(
                Found(
                    digit=int(score.argmax()) if confidence >= RECOGNISED else None,
                    confidence=confidence,
                    colour=_NAMES[thing.colour],
                    x=thing.x,
                    y=thing.y,
                    ink=thing.ink,
                    box=thing.box,
                )
            )
        cells, backgrounds = _grounds(frames, inked, covered)
        return [
            Reading(
                objects=tuple(sorted(found[t], key=lambda thing: -thing.ink)),
                curtain=float(covered[t].mean()),
                background=backgrounds[t],
                cells=cells[t],
                inked=inked[t],
                covered=covered[t],
            )
            for t in range(len(frames))
        ]

    def _scores(self, crops: np.ndarray) -> np.ndarray:
        """Scores `[N, 10]` of crops `[N, pixels]`."""
        if not len(crops):
            return np.zeros((0, 10), dtype=np.float32)
        return _kernel(crops, self._crops) @ self._weights


@functools.lru_cache(maxsize=1)
def reader() -> Reader:
    """The reader, fitted on first use (seconds)."""
    return Reader()


def _need_scipy() -> None:
    try:
        import scipy.ndimage  # noqa: F401
    except ImportError as error:
        raise InvalidSetting(
            "reading clips needs scipy and scikit-learn: pip install 'packcache[eval]'"
        ) from error


def checked(frames: np.ndarray) -> np.ndarray:
    shape, kind = np.shape(frames), getattr(frames, "dtype", type(frames).__name__)
    if len(shape) != 4 or not shape[0] or shape[1:] != (SIZE, SIZE, 3) or kind != np.uint8:
        raise InvalidSetting(
            f"frames are {kind} of shape {shape}, expected uint8 [T, {SIZE}, {SIZE}, 3] with "
            "T >= 1: scale to 0..255, channels last"
        )
    return np.asarray(frames)


def _kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    squares = (left * left).sum(1)[:, None] + (right * right).sum(1) - 2 * left @ right.T
    return np.exp(-_WIDTH * np.maximum(squares, 0))


def _lessons(
    scans: np.ndarray, seed: int, blur: tuple[float, float], noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Crops `[N, pixels]` and digits `[N]` of scans, nine to a frame, through the finder.

    Colours, grounds, tilts and widths are drawn as the world draws them; each frame is blurred by
    up to `blur` pixels and gets up to `noise` levels.
    """
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    splits: tuple[Split, ...] = ("train", "test")
    labels = {int(n): digit for s in splits for digit in range(10) for n in scan_indices(s, digit)}
    parts = np.split(scans, range(9, len(scans), 9))
    seen = np.empty((len(parts), SIZE, SIZE, 3), dtype=np.uint8)
    for number, part in enumerate(parts):
        pattern = int(rng.integers(1 << 32)) if rng.random() < 0.5 else None
        background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
        frame = ground(Scene(digits=(), background=background, pattern=pattern)).astype(np.float32)
        for place, scan in enumerate(part):
            y, x = (32 * n + 4 for n in divmod(place, 3))
            tilt, width = round(rng.uniform(-10, 10), 1), round(rng.uniform(0.9, 1.1), 2)
            alpha = sprite(int(scan), tilt, width)[:, :, None]
            ink = alpha * np.array(COLOURS[_NAMES[int(rng.integers(len(_NAMES)))]], np.float32)
            box = frame[y : y + SPRITE, x : x + SPRITE]
            box[:] = ink + (1 - alpha) * box
        sigma = rng.uniform(*blur)
        frame = gaussian_filter(frame, (sigma, sigma, 0)) if sigma > 0.3 else frame
        if noise:
            frame += rng.uniform(0, noise) * rng.standard_normal(frame.shape, dtype=np.float32)
        seen[number] = np.clip(np.rint(frame), 0, 255)
    crops, digits = [], []
    for thing in _find(seen)[0]:
        part, place = parts[thing.frame], 3 * int(thing.y // 32) + int(thing.x // 32)
        if place < len(part):
            crops.append(thing.crop)
            digits.append(labels[int(part[place])])
    return np.array(crops), np.array(digits)


# --- finding -----------------------------------------------------------------------------------


def _find(frames: np.ndarray) -> tuple[list[_Object], np.ndarray, np.ndarray]:
    """Objects of frames `[T, 96, 96, 3]`, and where ink and curtain are, bool `[T, 96, 96]`."""
    from scipy.ndimage import find_objects, label

    # [3, T, 96, 96], contiguous: reducing a last axis of 3 is slow.
    colours = np.ascontiguousarray(np.moveaxis(frames, -1, 0), dtype=np.float32)
    near = [
        np.abs(colours - np.array(curtain, np.float32)[:, None, None, None]).max(0)
        <= CURTAIN_LEVELS
        for curtain in (CURTAIN, CURTAIN_LAST)
    ]
    covered = near[0] | near[1]
    hues = colours - colours.mean(0)
    free = ((hues * hues).sum(0) < INK**2) & ~covered
    still = ((hues * free).sum((2, 3)) / np.maximum(free.sum((1, 2)), 1)).T  # [T, 3]
    hues -= still.T[:, :, None, None]  # the ground's hue is 0 from here on
    bright = ((hues * hues).sum(0) > INK**2) & ~covered
    flat = np.zeros((3, 3, 3), dtype=bool)
    flat[1] = True  # objects do not reach from one frame into the next
    marked: Any = label(grown(bright, _REACH), flat)
    labels: np.ndarray = marked[0]
    objects, inked = [], np.zeros_like(bright)
    for number, place in enumerate(find_objects(labels), start=1):
        own = labels[place][0] == number
        around = np.moveaxis(hues[(slice(None), *place)][:, 0], 0, -1)
        thing = _object(around, own, bright[place][0] & own, place, still)
        if thing is not None:
            objects.append(thing)
            inked[place][0][own] = True
    return objects, grown(inked, _HALO - _REACH), covered


def _object(
    hues: np.ndarray, own: np.ndarray, ink: np.ndarray, place: tuple[slice, ...], still: np.ndarray
) -> _Object | None:
    """The object on the pixels `own` of a box, `ink` where it is strong; None for a speck."""
    frame, y, x = (part.start for part in place)
    pixels = hues[ink]
    strength = (pixels * pixels).sum(-1)
    strongest = pixels[np.argsort(strength, kind="stable")[-len(pixels) // 4 :]].mean(0)
    palette = _HUES - still[frame]
    lengths = np.sqrt((palette * palette).sum(-1))
    # Blur and light strokes weaken a hue and keep its direction.
    colour = int((palette @ strongest / lengths).argmax())
    alpha = np.clip(hues @ palette[colour] / lengths[colour] ** 2, 0, 1) * own
    weight = alpha * ink
    mass = float(weight.sum())
    if mass < LEAST_INK:
        return None
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    middle_y = float(weight.sum(1) @ np.arange(len(alpha))) / mass
    middle_x = float(weight.sum(0) @ np.arange(alpha.shape[1])) / mass
    height, width = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
    return _Object(
        frame=frame,
        colour=colour,
        x=x + middle_x,
        y=y + middle_y,
        ink=mass,
        box=(x + int(columns[0]), y + int(rows[0]), width, height),
        crop=_crop(alpha, middle_x, middle_y),
    )


def _crop(alpha: np.ndarray, x: float, y: float) -> np.ndarray:
    """Opacities around (x, y) at half size, float32 `[14 * 14]`; bilinear, so shifts leave it."""
    left, top = x - (_WINDOW - 1) / 2, y - (_WINDOW - 1) / 2
    column, row = int(np.floor(left)), int(np.floor(top))
    window = np.zeros((_WINDOW + 1, _WINDOW + 1), dtype=np.float32)
    height, width = alpha.shape
    rows = slice(max(row, 0), min(row + _WINDOW + 1, height))
    columns = slice(max(column, 0), min(column + _WINDOW + 1, width))
    inside = alpha[rows, columns]
    y0, x0 = rows.start - row, columns.start - column
    window[y0 : y0 + inside.shape[0], x0 : x0 + inside.shape[1]] = inside
    window = window[:-1] + (top - row) * (window[1:] - window[:-1])
    window = window[:, :-1] + (left - column) * (window[:, 1:] - window[:, :-1])
    half = _WINDOW // 2
    return window.reshape(half, 2, half, 2).mean((1, 3)).ravel()


def grown(mask: np.ndarray, by: int) -> np.ndarray:
    """A mask `[T, H, W]` with `by` pixels more on all sides."""
    for _ in range(by):
        for axis in (1, 2):
            before = mask.swapaxes(0, axis)
            wide = before.copy()
            wide[1:] |= before[:-1]
            wide[:-1] |= before[1:]
            mask = wide.swapaxes(0, axis)
    return mask


def _grounds(
    frames: np.ndarray, inked: np.ndarray, covered: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """Mean colours of pattern cells outside ink `[T, 6, 6, 3]`, and the backgrounds they fit."""
    count = SIZE // CELL
    grid = (len(frames), count, CELL, count, CELL)
    free = (~inked).reshape(grid).sum((2, 4))
    total = (frames * ~inked[..., None]).reshape(*grid, 3).sum((2, 4), dtype=np.float32)
    cells = total / np.maximum(free, 1)[..., None]
    cells[free < CELL * CELL / 4] = np.nan
    bare = (covered.reshape(grid).sum((2, 4)) < CELL) & ~np.isnan(cells[..., 0])
    bases = np.array(list(BACKGROUNDS.values()), dtype=np.float32)
    levels = np.stack((bases, bases + PATTERN_STEP), axis=1)  # [3, 2, 3]
    misfit = np.abs(cells[..., None, None, :] - levels).mean(-1).min(-1)
    misfit = np.where(bare[..., None], misfit, 0).sum((1, 2))
    return cells, [list(BACKGROUNDS)[int(n)] for n in misfit.argmin(-1)]
