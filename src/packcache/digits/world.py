"""The digits world: handwritten digits that slide over a ground, bounce, and hide behind a curtain.

Everything is a pure function of a `Scene`. Digits move 2 pixels a frame, so four frames (one
latent frame of the codec) are 8 pixels, one token: motion is a shift of tokens. Starting points lie
on a 4-pixel lattice, which leaves four phases to learn instead of 64.

Four kinds of clip:

    one     a digit that moves in one of eight directions; the prompt says all of it
    two     two digits, each in its own half of the picture, moving along it
    hidden  a digit that the prompt leaves open; a curtain covers its half, then rises
    enters  a digit that the prompt tells, and a second one that appears in the other half in
            latent frame 1, untold; the curtain covers the half of the second

In the last two, the *memory clips*, only the frames themselves say what is behind the curtain. Its
last latent frame is lighter than the others: when the curtain rises can be seen, what appears
must be remembered. A third of all clips stands on a random pattern that nothing tells either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from packcache.digits.scans import SPRITE, Split, scan_indices, sprite

__all__ = [
    "BACKGROUNDS",
    "CELL",
    "COLOURS",
    "CURTAIN",
    "CURTAIN_LAST",
    "DIRECTIONS",
    "FPS",
    "GROUP",
    "KINDS",
    "MEMORY_KINDS",
    "PATTERN_STEP",
    "SIZE",
    "SPRITE",
    "Curtain",
    "Digit",
    "Kind",
    "Scene",
    "corners",
    "ground",
    "latent_of",
    "render",
    "sample_scene",
]

SIZE = 96  # pixels, both sides of a frame
SPEED = 2  # pixels a frame on each axis that moves
LATTICE = 4  # pixels between starting points
FPS = 12
GROUP = 4  # pixel frames of a latent frame

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (236, 64, 58),
    "green": (64, 208, 84),
    "blue": (66, 124, 250),
    "yellow": (250, 216, 56),
    "purple": (206, 84, 236),
    "cyan": (52, 214, 226),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "night": (20, 22, 30),
    "slate": (54, 60, 76),
    "moss": (24, 50, 40),
}

#: A pattern lightens every other cell (drawn at random) of this many pixels by this much.
CELL, PATTERN_STEP = 16, 30

#: The curtain, and the curtain in the last latent frame before it rises.
CURTAIN, CURTAIN_LAST = (128, 126, 122), (196, 192, 184)

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

Kind = Literal["one", "two", "hidden", "enters"]
#: Share of each kind: a third are memory clips, a quarter have two digits.
KINDS: dict[Kind, float] = {"one": 0.56, "two": 0.11, "hidden": 0.19, "enters": 0.14}
MEMORY_KINDS: tuple[Kind, ...] = ("hidden", "enters")
PATTERNED = 1 / 3

#: Latent frames in which a curtain may fall, by kind, and how long it stays in training.
FALLS: dict[Kind, tuple[int, ...]] = {"hidden": (1, 2), "enters": (2, 3)}
TRAINED_GAPS = (1, 2, 3, 4)

#: Starting points across a lane: halves of the picture, with room between their digits.
_LANES = (range(0, 21, LATTICE), range(52, 73, LATTICE))
_TILT, _WIDTH = 10.0, 0.1


@dataclass(frozen=True, kw_only=True)
class Digit:
    """A digit: which scan of it, in which colour, from where (box corner), whither.

    It is there from latent frame `enters` on; `x`, `y` is where it would be in frame 0.
    """

    value: int
    scan: int
    colour: str
    direction: str
    x: int
    y: int
    tilt: float = 0.0
    width: float = 1.0
    enters: int = 0


@dataclass(frozen=True, kw_only=True)
class Curtain:
    """Covers the box (x, y, width, height) in latent frames `falls` to `rises - 1`."""

    box: tuple[int, int, int, int]
    falls: int
    rises: int

    @property
    def gap(self) -> int:
        """Latent frames under it."""
        return self.rises - self.falls


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A clip of any length. In memory clips the curtain hides the last of the digits.

    `pattern` seeds the ground's random cells; None leaves it flat.
    """

    kind: Kind = "one"
    digits: tuple[Digit, ...]
    background: str = "night"
    pattern: int | None = None
    curtain: Curtain | None = None

    @property
    def hidden(self) -> Digit | None:
        """The digit behind the curtain."""
        return self.digits[-1] if self.curtain else None


def latent_of(frames: np.ndarray) -> np.ndarray:
    """The latent frames that hold pixel frames: 0, then four each."""
    return -(-frames // GROUP)


def sample_scene(
    rng: np.random.Generator,
    split: Split = "train",
    *,
    kind: Kind | None = None,
    gap: int | None = None,
    patterned: bool | None = None,
) -> Scene:
    """Draw a scene; what is given stays fixed. The same generator state gives the same scene."""
    kinds = list(KINDS)
    drawn = kinds[int(rng.choice(len(kinds), p=list(KINDS.values())))]
    kind = drawn if kind is None else kind
    with_pattern = bool(rng.random() < PATTERNED) if patterned is None else patterned
    background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    pattern = int(rng.integers(1 << 32))
    across = int(rng.integers(2))  # 0: lanes lie one above the other, digits move sideways
    lane = int(rng.integers(2))
    if kind == "one":
        digits = (_draw_digit(rng, split, list(DIRECTIONS), None, across),)
    else:
        lanes = [lane] if kind == "hidden" else [lane, 1 - lane]
        along = ["up", "down"] if across else ["right", "left"]
        enters = [0, 1] if kind == "enters" else [0, 0]
        digits = tuple(
            _draw_digit(rng, split, along, _LANES[which], across, start)
            for which, start in zip(lanes, enters, strict=False)
        )
        lane = lanes[-1]
    falls = int(rng.choice(FALLS.get(kind, (1,))))
    drawn_gap = int(rng.choice(TRAINED_GAPS))
    curtain = None
    if kind in MEMORY_KINDS:
        rises = falls + (drawn_gap if gap is None else gap)
        curtain = Curtain(box=_half(across, lane), falls=falls, rises=rises)
    return Scene(
        kind=kind,
        digits=digits,
        background=background,
        pattern=pattern if with_pattern else None,
        curtain=curtain,
    )


def _draw_digit(
    rng: np.random.Generator,
    split: Split,
    directions: list[str],
    lane: range | None,
    across: int,
    enters: int = 0,
) -> Digit:
    """A random digit, in a lane if one is given."""
    value = int(rng.integers(10))
    scans = scan_indices(split, value)
    place = [int(n) for n in LATTICE * rng.integers((SIZE - SPRITE) // LATTICE + 1, size=2)]
    if lane is not None:
        place[1 - across] = int(rng.choice(lane))  # x is place[0]
    return Digit(
        value=value,
        scan=int(scans[rng.integers(len(scans))]),
        colour=list(COLOURS)[int(rng.integers(len(COLOURS)))],
        direction=directions[int(rng.integers(len(directions)))],
        x=place[0],
        y=place[1],
        tilt=round(float(rng.uniform(-_TILT, _TILT)), 1),
        width=round(float(rng.uniform(1 - _WIDTH, 1 + _WIDTH)), 2),
        enters=enters,
    )


def _half(across: int, lane: int) -> tuple[int, int, int, int]:
    """The box (x, y, width, height) of a lane."""
    half = SIZE // 2
    return (lane * half, 0, half, SIZE) if across else (0, lane * half, SIZE, half)


def corners(digit: Digit, frames: int, first: int = 0) -> np.ndarray:
    """Upper left corners (x, y) of the digit's box from frame `first` on, int64 `[frames, 2]`."""
    time = np.arange(first, first + frames)[:, None]
    step = SPEED * np.array(DIRECTIONS[digit.direction])
    room = SIZE - SPRITE
    folded = (np.array([digit.x, digit.y]) + step * time) % (2 * room)
    return np.minimum(folded, 2 * room - folded)


def ground(scene: Scene) -> np.ndarray:
    """What lies behind digits and curtain, uint8 RGB `[96, 96, 3]`."""
    picture = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    picture[:] = BACKGROUNDS[scene.background]
    if scene.pattern is not None:
        cells = SIZE // CELL
        light = np.random.default_rng(scene.pattern).integers(2, size=(cells, cells))
        picture += (PATTERN_STEP * light.repeat(CELL, 0).repeat(CELL, 1)).astype(np.uint8)[
            ..., None
        ]
    return picture


def render(scene: Scene, frames: int, first: int = 0) -> np.ndarray:
    """Frames `first` to `first + frames - 1` of a scene, uint8 RGB `[frames, 96, 96, 3]`."""
    video = np.empty((frames, SIZE, SIZE, 3), dtype=np.uint8)
    video[:] = ground(scene)
    latents = latent_of(np.arange(first, first + frames))
    for digit in scene.digits:
        alpha = sprite(digit.scan, digit.tilt, digit.width)[:, :, None]
        ink = alpha * np.array(COLOURS[digit.colour], dtype=np.float32)
        places = corners(digit, frames, first)
        for frame in np.flatnonzero(latents >= digit.enters):
            x, y = places[frame]
            box = video[frame, y : y + SPRITE, x : x + SPRITE]
            box[:] = np.rint(ink + (1 - alpha) * box)
    if scene.curtain:
        _draw_curtain(scene.curtain, video, latents)
    return video


def _draw_curtain(curtain: Curtain, video: np.ndarray, latents: np.ndarray) -> None:
    x, y, width, height = curtain.box
    last = curtain.rises - 1
    for colour, when in (
        (CURTAIN, (latents >= curtain.falls) & (latents < last)),
        (CURTAIN_LAST, latents == last),
    ):
        video[when, y : y + height, x : x + width] = colour
