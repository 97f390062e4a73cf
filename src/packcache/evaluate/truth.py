"""Truth metrics: judge what a clip of the digits world shows against what is true.

`judge` holds the objects that a `Reader` finds against a `Scene` (all is known) or an `Expected`
(what a prompt tells), and `recall` against what a curtain hid. Attributes are reported one by one:
a recoloured digit costs colour and nothing else (reference/evaluation.md section 6). A still clip
has perfect background and identity, so read `direction` and `speed` beside them. Ceiling and
floor: `through_codec`, `copy_last`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from packcache.digits.scans import SPRITE, sprite
from packcache.digits.world import (
    CELL,
    COLOURS,
    DIRECTIONS,
    PATTERN_STEP,
    SIZE,
    Curtain,
    Scene,
    corners,
    ground,
    latent_of,
)
from packcache.errors import InvalidSetting
from packcache.evaluate.reading import Found, Reader, Reading, checked, grown, reader

__all__ = [
    "Curves",
    "Expected",
    "ExpectedDigit",
    "Found",
    "Judgement",
    "Reader",
    "Reading",
    "Recall",
    "copy_last",
    "judge",
    "reader",
    "recall",
    "through_codec",
]

TURN = 5.0  # pixels of way back that make a bounce; jitter of 2 pixels goes back 4
MOVES = 4  # frames a direction needs
LOST = 4  # frames, a latent frame, that a digit must be away at the end to be lost


@dataclass(frozen=True, kw_only=True)
class ExpectedDigit:
    """What is told of a digit; None is not told. It is there from latent frame `enters` on."""

    value: int | None = None
    colour: str | None = None
    direction: str | None = None
    enters: int = 0


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a clip should show, without places. The curtain hides the last digit, as in a scene."""

    digits: tuple[ExpectedDigit, ...]
    curtain: Curtain | None = None

    @classmethod
    def from_scene(cls, scene: Scene, *, told: bool = False) -> Expected:
        """All that a scene shows; with `told`, less what its prompt leaves open."""
        open_ = scene.hidden if told else None
        digits = tuple(
            ExpectedDigit(
                value=None if digit is open_ else digit.value,
                colour=None if digit is open_ else digit.colour,
                direction=digit.direction,
                enters=digit.enters,
            )
            for digit in scene.digits
        )
        return cls(digits=digits, curtain=scene.curtain)

    def visible(self, frames: int) -> np.ndarray:
        """Which digits are to be seen in the first frames of a clip, bool `[frames, digits]`."""
        latents = latent_of(np.arange(frames))
        enters = np.array([digit.enters for digit in self.digits], dtype=int)
        seen = latents[:, None] >= enters
        if self.curtain:
            seen[:, -1:] &= ~self.covered(frames)[:, None]
        return seen

    def covered(self, frames: int) -> np.ndarray:
        """In which frames the curtain is down, bool `[frames]`."""
        latents = latent_of(np.arange(frames))
        if not self.curtain:
            return np.zeros(frames, dtype=bool)
        return (latents >= self.curtain.falls) & (latents < self.curtain.rises)


@dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """A judgement frame by frame: float `[T]`, NaN where nothing is asked."""

    digit: np.ndarray
    colour: np.ndarray
    count: np.ndarray
    curtain: np.ndarray
    position: np.ndarray
    jitter: np.ndarray
    background: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """How true a clip is, attribute by attribute; None where it cannot be asked."""

    digit: float | None  # share of visible, told digits that are read right
    colour: float | None  # share of visible, told digits that have their colour
    count: float | None  # share of frames with as many objects as there should be
    curtain: float | None  # share of frames in which the curtain is down, or up, as it should be
    direction: float | None  # share of digits that set out as told; asked if 4 frames show it
    speed: float | None  # pixels a frame on axes that move, between bounces; truth has 2
    speed_variation: float | None  # rms deviation from steady motion, in units of `speed`
    reflection: float | None  # |speed before + speed after| at bounces, pixels a frame
    position: float | None  # pixels from the known centres, of digits found; scenes only
    jitter: float | None  # pixels a frame from steady motion between bounces
    background: float | None  # levels from the known ground, or from the first frame's
    survival: int | None  # frame from which on a digit is lost for good (4 frames at least)
    curves: Curves


@dataclass(frozen=True, kw_only=True)
class Recall:
    """What came out from behind the curtain, read in the first two latent frames without it."""

    found: bool  # there is an object, in at least half of the frames
    digit: bool
    colour: bool
    ground: float | None  # share of that half's pattern cells that are right; None without pattern

    @property
    def both(self) -> bool:
        """Digit and colour are right."""
        return self.digit and self.colour


def judge(
    frames: np.ndarray,
    expected: Expected | Scene,
    reader: Reader | None = None,
    *,
    since: int = 0,
) -> Judgement:
    """Judge a clip, uint8 `[T, 96, 96, 3]`, that starts with the scene's first frame.

    A `Scene` also gives places and ground; an `Expected` asks for what it tells. Frames before
    `since` (given to a model, say) count for the direction only. Frames in which a digit is behind
    the curtain do not count for it.
    """
    frames = checked(frames)
    if not 0 <= since < len(frames):
        raise InvalidSetting(
            f"since = {since} leaves nothing of {len(frames)} frames to judge, "
            f"expected 0 to {len(frames) - 1}"
        )
    scene = expected if isinstance(expected, Scene) else None
    asked = Expected.from_scene(expected) if isinstance(expected, Scene) else expected
    readings = (reader or _default()).read(frames)
    visible = asked.visible(len(frames))
    centres = _centres(scene, len(frames)) if scene else None
    tracks = _tracks(readings, asked, visible, centres)
    paths = [_path(track) for track in tracks]
    right = {
        name: _rights(tracks, [getattr(digit, told) for digit in asked.digits], visible, name)
        for name, told in (("digit", "value"), ("colour", "colour"))
    }
    down = np.array([reading.curtain for reading in readings])
    share = asked.curtain.box[2] * asked.curtain.box[3] / SIZE**2 if asked.curtain else 0.0
    seen = np.array([len(reading.objects) for reading in readings])
    curves = Curves(
        digit=_mean(right["digit"], 1),
        colour=_mean(right["colour"], 1),
        count=(seen == visible.sum(1)).astype(float),
        curtain=(np.abs(down - share * asked.covered(len(frames))) < 0.1).astype(float),
        position=_positions(paths, centres, visible),
        jitter=_jitter(paths, visible),
        background=_background(frames, readings, scene),
    )
    motion = _motion(paths, asked, visible, since)
    scores = {name: _scalar(curve[since:]) for name, curve in vars(curves).items()}
    return Judgement(**scores, **motion, survival=_survival(right, visible), curves=curves)


def recall(frames: np.ndarray, scene: Scene, reader: Reader | None = None) -> Recall:
    """What a memory clip, uint8 `[T, 96, 96, 3]`, shows where its curtain was.

    Raises `InvalidSetting` for a scene without a curtain and for a clip that ends under it.
    """
    frames = checked(frames)
    hidden, curtain = scene.hidden, scene.curtain
    if hidden is None or curtain is None:
        raise InvalidSetting(f"a scene of kind {scene.kind!r} hides nothing, expected a curtain")
    latents = latent_of(np.arange(len(frames)))
    when = (latents >= curtain.rises) & (latents < curtain.rises + 2)
    if not when.any():
        raise InvalidSetting(
            f"the clip's {len(frames)} frames end under the curtain, expected more than "
            f"{4 * curtain.rises - 3}: it rises in latent frame {curtain.rises}"
        )
    left, top, width, height = curtain.box
    readings = (reader or _default()).read(frames[when])
    things = []
    for reading in readings:
        inside = [
            thing
            for thing in reading.objects
            if left <= thing.x < left + width and top <= thing.y < top + height
        ]
        things += inside[:1]
    votes = np.zeros(10)
    colours = dict.fromkeys(COLOURS, 0)
    for thing in things:
        colours[thing.colour] += 1
        if thing.digit is not None:
            votes[thing.digit] += thing.confidence
    found = 2 * len(things) >= len(readings)
    return Recall(
        found=found,
        digit=found and bool(votes.any()) and int(votes.argmax()) == hidden.value,
        colour=found and max(colours, key=lambda name: colours[name]) == hidden.colour,
        ground=_pattern_share(readings, scene, curtain) if scene.pattern is not None else None,
    )


def _pattern_share(readings: Sequence[Reading], scene: Scene, curtain: Curtain) -> float:
    """Share of the curtain's cells, where no digit is, that are as light as the scene's."""
    x, y, width, height = (n // CELL for n in curtain.box)
    cut = (slice(y, y + height), slice(x, x + width))
    true = ground(scene)[CELL // 2 :: CELL, CELL // 2 :: CELL].astype(float)[cut]
    cells = np.stack([reading.cells[cut] for reading in readings])
    known = ~np.isnan(cells[..., 0])
    near = np.abs(np.nan_to_num(cells) - true).mean(-1) < PATTERN_STEP / 2
    return float(near[known].mean()) if known.any() else 0.0


def copy_last(frames: np.ndarray, given: int) -> np.ndarray:
    """The floor: a clip whose frames after the first `given` repeat the last of those."""
    if not 1 <= given <= len(frames):
        raise InvalidSetting(f"given = {given} frames, expected 1 to the clip's {len(frames)}")
    return frames[np.minimum(np.arange(len(frames)), given - 1)]


def through_codec(
    frames: np.ndarray, encode: Callable[[Any], Any], decode: Callable[[Any], Any]
) -> np.ndarray:
    """The ceiling: uint8 frames `[1 + 4n, 96, 96, 3]` coded and decoded, same shape.

    `encode` takes a float tensor `[1, 3, T, H, W]` in [-1, 1] and gives indices, or a tuple that
    starts with them; `decode` takes the indices.
    """
    import torch

    with torch.inference_mode():
        video = torch.from_numpy(checked(frames)).movedim(-1, 0)[None].float() / 255 * 2 - 1
        codes = encode(video)
        back = decode(codes[0] if isinstance(codes, tuple) else codes)
        pixels = ((back[0].clamp(-1, 1) + 1) / 2 * 255).round().to(torch.uint8)
    return pixels.movedim(0, -1).cpu().numpy()


def _default() -> Reader:
    return reader()


def _centres(scene: Scene, frames: int) -> np.ndarray:
    """Centres of ink (x, y) of a scene's digits `[frames, digits, 2]`, as the finder sees them."""
    out = np.zeros((frames, len(scene.digits), 2))
    for number, digit in enumerate(scene.digits):
        alpha = sprite(digit.scan, digit.tilt, digit.width)
        weight = alpha * (alpha > 0.3)
        middle = np.array([weight.sum(0), weight.sum(1)]) @ np.arange(SPRITE) / weight.sum()
        out[:, number] = corners(digit, frames) + middle
    return out


def _tracks(
    readings: Sequence[Reading],
    expected: Expected,
    visible: np.ndarray,
    centres: np.ndarray | None,
) -> list[list[Found | None]]:
    """Which object of each frame is which digit, None if it is missing, `[digits][T]`.

    With known centres the nearest one, a wrong colour counting as 16 pixels; without, the
    assignment that makes most colours and digits right, then the one nearest to where they were.
    """
    tracks: list[list[Found | None]] = [[] for _ in expected.digits]
    last: list[Found | None] = [None] * len(tracks)

    def cost(frame: int, number: int, thing: Found | None) -> float:
        told = expected.digits[number]
        if thing is None:
            return 1000.0
        painted = told.colour not in (None, thing.colour)
        if centres is not None:
            return float(np.hypot(*(centres[frame, number] - (thing.x, thing.y)))) + 16 * painted
        was = last[number]
        way = 0.0 if was is None else float(np.hypot(was.x - thing.x, was.y - thing.y))
        return 100 * painted + 100 * (told.value not in (None, thing.digit)) + min(way / 2, 99)

    for frame, reading in enumerate(readings):
        there = np.flatnonzero(visible[frame]).tolist()
        choice: list[Found | None] = [*reading.objects[:6], *[None] * len(there)]
        costs = [[cost(frame, number, thing) for thing in choice] for number in there]
        orders = itertools.permutations(range(len(choice)), len(there))
        best = min(orders, key=lambda order: sum(c[n] for c, n in zip(costs, order, strict=True)))
        chosen = dict(zip(there, (choice[n] for n in best), strict=True))
        for number, track in enumerate(tracks):
            track.append(chosen.get(number))
            last[number] = track[-1] or last[number]
    return tracks


def _rights(
    tracks: Sequence[Sequence[Found | None]],
    told: Sequence[Any],
    visible: np.ndarray,
    name: str,
) -> np.ndarray:
    """1 where an object's attribute is as told, 0 where not, NaN where not asked, `[T, digits]`."""
    out = np.full(visible.shape, np.nan)
    for number, (track, value) in enumerate(zip(tracks, told, strict=True)):
        if value is not None:
            right = [getattr(thing, name, None) == value for thing in track]
            out[:, number] = np.where(visible[:, number], right, np.nan)
    return out


def _path(track: Sequence[Found | None]) -> np.ndarray:
    """Centres (x, y) of a track, NaN where it is missing, `[T, 2]`."""
    return np.array([(thing.x, thing.y) if thing else (np.nan, np.nan) for thing in track])


def _positions(
    paths: Sequence[np.ndarray], centres: np.ndarray | None, visible: np.ndarray
) -> np.ndarray:
    """Pixels from the known centres, mean over the digits found, `[T]`."""
    away = np.full(visible.shape, np.nan)
    if centres is not None:
        for number, path in enumerate(paths):
            away[:, number] = np.linalg.norm(path - centres[:, number], axis=1)
    return _mean(away, 1)


def _background(frames: np.ndarray, readings: Sequence[Reading], scene: Scene | None) -> np.ndarray:
    """Mean absolute levels from the true ground outside digits and curtain, `[T]`.

    Without a scene, from the first frame, where both show ground.
    """
    free = ~np.stack([reading.inked for reading in readings])
    if scene is None:
        free &= ~grown(np.stack([reading.covered for reading in readings]), 1)
        free &= free[:1].copy()
        true = frames[0]
    else:
        true = ground(scene)
        places = [corners(digit, len(frames)) for digit in scene.digits]
        for frame in range(len(frames)):
            for place in places:
                x, y = place[frame]
                free[frame, y : y + SPRITE, x : x + SPRITE] = False
        if scene.curtain:
            x, y, width, height = scene.curtain.box
            down = Expected.from_scene(scene).covered(len(frames))
            free[down, y : y + height, x : x + width] = False
    levels = np.abs(frames.astype(np.int16) - true).mean(-1)
    area = free.sum((1, 2))
    return np.where(area > 0, (levels * free).sum((1, 2)) / np.maximum(area, 1), np.nan)


def _survival(right: dict[str, np.ndarray], visible: np.ndarray) -> int | None:
    """First frame of an end, at least `LOST` visible frames, in which a digit is never right."""
    whole = np.fmin(right["digit"], right["colour"])
    firsts = []
    for number in range(visible.shape[1]):
        asked = np.flatnonzero(~np.isnan(whole[:, number]))
        kept = np.flatnonzero(whole[asked, number])
        gone = asked[kept[-1] + 1 :] if len(kept) else asked
        firsts += [int(gone[0])] if len(gone) >= LOST else []
    return min(firsts, default=None)


# --- motion ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Leg:
    """Frames `first` to `last` of an axis of a run, from bounce to bounce, and the way made."""

    first: int
    last: int
    way: float  # pixels, signed

    @property
    def moves(self) -> int:
        return self.last - self.first


def _motion(
    paths: Sequence[np.ndarray], expected: Expected, visible: np.ndarray, since: int
) -> dict[str, float | None]:
    """The numbers of a judgement that motion decides, from paths `[T, 2]`."""
    directions, speeds, variations, reflections = [], [], [], []
    for path, digit, seen in zip(paths, expected.digits, visible.T, strict=True):
        told = DIRECTIONS.get(digit.direction or "")
        runs = [(start, path[start:stop]) for start, stop in _runs(seen)]
        if told and runs:
            directions.append(_sets_out(runs[0][1], told))
        axes = [
            [(run[:, axis], _legs(run[:, axis]), start) for start, run in runs] for axis in (0, 1)
        ]
        moves = [any(abs(leg.way) >= TURN for _, legs, _ in axis for leg in legs) for axis in axes]
        if told and not any(moves):
            moves = [bool(step) for step in told]  # too short to see, or still
        steps = [_steps(axis, move, since) for axis, move in zip(axes, moves, strict=True)]
        for axis in axes:
            reflections += _reflections(axis, since)
        if sum(len(step) for step in steps) < 2 * MOVES:
            continue
        means = [step.mean() if move else 0.0 for step, move in zip(steps, moves, strict=True)]
        speed = sum(means) / max(sum(moves), 1)
        square = sum(((step - mean) ** 2).mean() for step, mean in zip(steps, means, strict=True))
        speeds.append(speed)
        variations.append(square**0.5 / speed if speed > 0.25 else np.nan)
    numbers = {
        "direction": directions,
        "speed": speeds,
        "speed_variation": variations,
        "reflection": reflections,
    }
    return {name: _scalar(np.array(values, dtype=float)) for name, values in numbers.items()}


def _jitter(paths: Sequence[np.ndarray], visible: np.ndarray) -> np.ndarray:
    """Pixels by which the way to each frame differs from its leg's mean, over the digits, `[T]`."""
    out = np.full(visible.shape, np.nan)
    for number, (path, seen) in enumerate(zip(paths, visible.T, strict=True)):
        off = np.full(path.shape, np.nan)
        for start, stop in _runs(seen):
            for axis in (0, 1):
                line = path[start:stop, axis]
                for leg in _legs(line):
                    step = np.diff(line[leg.first : leg.last + 1])
                    where = slice(start + leg.first + 1, start + leg.last + 1)
                    off[where, axis] = step - leg.way / leg.moves
        out[:, number] = np.hypot(off[:, 0], off[:, 1])
    return _mean(out, 1)


def _runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and stop of each stretch of a mask `[T]` that is true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(int), [0]))))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _legs(line: np.ndarray) -> list[_Leg]:
    """The legs of an axis `[n]`. What follows the last extreme, no bounce yet, is left out."""
    known = np.flatnonzero(~np.isnan(line))
    if not len(known):
        return []
    low = high = int(known[0])
    marks, sign = [low], 0
    for frame in known.tolist():
        here = line[frame]
        if sign <= 0 and here - line[low] >= TURN:
            marks.append(low)
            sign, high = 1, frame
        elif sign >= 0 and line[high] - here >= TURN:
            marks.append(high)
            sign, low = -1, frame
        high = frame if here > line[high] else high
        low = frame if here < line[low] else low
    marks.append({0: int(known[-1]), 1: high, -1: low}[sign])
    return [
        _Leg(first=first, last=last, way=float(line[last] - line[first]))
        for first, last in itertools.pairwise(marks)
        if last > first
    ]


def _sets_out(run: np.ndarray, told: tuple[int, int]) -> float:
    """1 if a run `[n, 2]` starts in the direction told, 0 if not, NaN if it is too short to say.

    An axis whose wall is less than `MOVES` frames away only has to move: it soon turns.
    """
    if len(run) <= MOVES:
        return np.nan
    for line, sign in zip(run.T, told, strict=True):
        known = line[~np.isnan(line)]
        if len(known) <= MOVES:
            return 0.0
        wall = (SPRITE / 2, 0.0, SIZE - SPRITE / 2)[sign + 1]
        if sign and abs(wall - known[0]) < 2 * MOVES + 4:  # ink is up to 3.2 off its box
            if np.ptp(known) < 3:
                return 0.0
            continue
        leg = next((leg for leg in _legs(line) if leg.moves >= MOVES), None)
        if leg is None or sign != (np.sign(leg.way) if abs(leg.way) >= leg.moves / 2 else 0):
            return 0.0
    return 1.0


def _steps(
    runs: Sequence[tuple[np.ndarray, list[_Leg], int]], moves: bool, since: int
) -> np.ndarray:
    """Pixels a frame of an axis between bounces, those of a moving axis counted along its way."""
    steps = [np.zeros(0)]
    for line, legs, start in runs:
        for leg in legs:
            first = max(leg.first, since - 1 - start)
            step = np.diff(line[first : leg.last + 1])
            if moves:
                step = step * np.sign(leg.way) if abs(leg.way) >= 3 else np.abs(step)
            steps.append(step[~np.isnan(step)])
    return np.concatenate(steps)


def _reflections(runs: Sequence[tuple[np.ndarray, list[_Leg], int]], since: int) -> list[float]:
    """|speed before + speed after| at each bounce, speeds over up to three frames."""
    errors = []
    for line, legs, start in runs:
        step = np.diff(line)
        for before, after in itertools.pairwise(legs):
            turn = after.first
            if min(before.moves, after.moves) >= 2 and turn + start >= since:
                early, late = step[max(turn - 3, before.first) : turn], step[turn : turn + 3]
                late = late[: after.moves]
                if not np.isnan(early).all() and not np.isnan(late).all():
                    errors.append(abs(float(np.nanmean(early) + np.nanmean(late))))
    return errors


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over an axis of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(axis)
    return np.where(known.any(axis), total / np.maximum(known.sum(axis), 1), np.nan)


def _scalar(values: np.ndarray) -> float | None:
    """Mean of what is not NaN, None if nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
