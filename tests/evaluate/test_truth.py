"""Truth metrics: true clips are read as they are, and each fault moves its own numbers only."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

from packcache.digits import world
from packcache.digits.world import Curtain, Digit, Scene
from packcache.errors import InvalidSetting
from packcache.evaluate import reading, truth
from packcache.evaluate.truth import Expected, ExpectedDigit

ndimage = pytest.importorskip("scipy.ndimage", reason="the finder labels with scipy")
pytest.importorskip("sklearn", reason="the scans come from scikit-learn")

FRAMES = 25
SHARES = ("digit", "colour", "count", "curtain", "direction")
MOTION = ("speed", "speed_variation", "reflection", "position")


@pytest.fixture(scope="session")
def eyes() -> truth.Reader:
    return truth.reader()


def drawn(kind: world.Kind, count: int = 40, **given: object) -> list[Scene]:
    rng = np.random.default_rng(11)
    return [world.sample_scene(rng, "test", kind=kind, **given) for _ in range(count)]


def scan_of(value: int) -> int:
    return int(world.scan_indices("test", value)[0])


def one(**changes: object) -> Scene:
    """A red 3 on flat ground in the upper half, moving right, with a bounce in frame 20."""
    digit = Digit(value=3, scan=scan_of(3), colour="red", direction="right", x=32, y=8)
    return Scene(digits=(dataclasses.replace(digit, **changes),))


def memory(**changes: object) -> Scene:
    """A green 7 in the lower half on a pattern; a curtain covers it in latent frames 2 to 4."""
    digit = Digit(value=7, scan=scan_of(7), colour="green", direction="left", x=64, y=60)
    return Scene(
        kind="hidden",
        digits=(dataclasses.replace(digit, **changes),),
        pattern=5,
        curtain=Curtain(box=(0, 48, 96, 48), falls=2, rises=4),
    )


def spliced(first: Scene, second: Scene, at: int) -> np.ndarray:
    """The clip of one scene up to frame `at`, of another from there on."""
    whole = world.render(first, FRAMES)
    whole[at:] = world.render(second, FRAMES - at, first=at)
    return whole


def same_but(got: truth.Judgement, *moved: str) -> None:
    """All numbers that a fault must not touch are those of a true clip."""
    for name in SHARES:
        assert name in moved or getattr(got, name) in (None, 1.0), name
    for name, least in (("position", 1.5), ("background", 0.1)):
        assert name in moved or getattr(got, name) in (None, pytest.approx(0, abs=least)), name
    if "speed" not in moved:
        assert got.speed == pytest.approx(2, abs=0.1)
    if "speed_variation" not in moved:
        assert got.speed_variation == pytest.approx(0, abs=0.1)
    assert "survival" in moved or got.survival is None


# --- true clips --------------------------------------------------------------------------------


def test_held_out_scans_are_read(eyes):
    assert eyes.accuracy >= 0.98


@pytest.mark.parametrize("kind", world.KINDS)
def test_true_clips_are_read_as_they_are(eyes, kind):
    scenes = drawn(kind)
    got = [truth.judge(world.render(scene, FRAMES), scene, eyes) for scene in scenes]
    assert np.mean([judged.digit for judged in got]) >= 0.95
    assert all(judged.colour == 1 for judged in got)
    assert np.mean([judged.count for judged in got]) >= 0.99
    assert all(judged.curtain == 1 for judged in got)
    asked = [judged.direction for judged in got if judged.direction is not None]
    assert asked == [1.0] * len(asked)
    assert len(asked) >= (10 if kind == "hidden" else len(got))
    assert max(judged.position for judged in got) < 1.5
    assert all(judged.background == 0 for judged in got)
    assert np.mean([judged.survival is None for judged in got]) >= 0.95
    for judged in got:
        assert judged.speed == pytest.approx(2, abs=0.01)
        assert judged.speed_variation == pytest.approx(0, abs=0.02)
        assert judged.reflection in (None, pytest.approx(0, abs=0.02))


@pytest.mark.parametrize("kind", world.KINDS)
def test_without_places_the_same_is_seen(eyes, kind):
    for scene in drawn(kind, 8):
        clip = world.render(scene, FRAMES)
        known = truth.judge(clip, scene, eyes)
        told = truth.judge(clip, Expected.from_scene(scene), eyes)
        for name in (*SHARES, "speed", "reflection", "survival"):
            assert getattr(told, name) == getattr(known, name)
        assert told.position is None
        assert told.background == 0


@pytest.mark.parametrize("kind", world.MEMORY_KINDS)
def test_what_comes_out_from_behind_the_curtain_is_read(eyes, kind):
    scenes = drawn(kind, 20, patterned=True)
    got = [truth.recall(world.render(s, 4 * s.curtain.rises + 5), s, eyes) for s in scenes]
    assert all(recalled.found and recalled.colour for recalled in got)
    assert np.mean([recalled.both for recalled in got]) >= 0.95
    assert all(recalled.ground == 1 for recalled in got)


def test_a_frame_tells_its_objects_curtain_and_ground(eyes):
    scene = dataclasses.replace(memory(), background="slate")
    readings = eyes.read(world.render(scene, FRAMES))
    first, under, last = readings[0], readings[8], readings[15]
    (thing,) = first.objects
    assert (thing.digit, thing.colour) == (7, "green")
    assert thing.confidence > 0.8
    assert (thing.x, thing.y) == (pytest.approx(64 + 11.5, abs=3), pytest.approx(60 + 11.5, abs=3))
    x, y, width, height = thing.box
    assert x >= 64
    assert y >= 60
    assert max(x + width - 64, y + height - 60) <= world.SPRITE
    assert thing.ink == pytest.approx(world.sprite(scan_of(7)).sum(), rel=0.15)
    assert (first.curtain, under.curtain, last.curtain) == (0, 0.5, 0)
    assert not under.objects
    assert {reading.background for reading in readings} == {"slate"}
    true = world.ground(scene)[8::16, 8::16]
    known = ~np.isnan(first.cells[..., 0])
    assert known.sum() >= 30
    assert np.array_equal(first.cells[known], true[known])


def test_only_the_first_leg_is_the_direction(eyes):
    for scene in (one(x=72), one(x=68), one(x=0, direction="left"), one(direction="down-left")):
        assert truth.judge(world.render(scene, 45), scene, eyes).direction == 1


@pytest.mark.parametrize("told", world.DIRECTIONS)
def test_each_direction_is_told_from_the_others(eyes, told):
    clip = world.render(one(direction=told, y=32), 9)
    judged = {
        name: truth.judge(clip, Expected(digits=(ExpectedDigit(direction=name),)), eyes).direction
        for name in world.DIRECTIONS
    }
    assert judged == {name: float(name == told) for name in world.DIRECTIONS}


def test_too_short_for_a_direction(eyes):
    got = truth.judge(world.render(one(), 4), one(), eyes)
    assert got.direction is None
    assert truth.judge(world.render(one(), 1), one(), eyes).speed is None
    assert got.reflection is None


def test_what_is_not_told_is_not_asked(eyes):
    scene = memory()
    told = Expected.from_scene(scene, told=True)
    assert told.digits == (ExpectedDigit(direction="left"),)
    got = truth.judge(world.render(scene, FRAMES), told, eyes)
    assert (got.digit, got.colour, got.survival) == (None, None, None)
    assert (got.count, got.curtain, got.direction) == (1, 1, 1)


def test_curves_ask_nothing_behind_the_curtain(eyes):
    curves = truth.judge(world.render(memory(), FRAMES), memory(), eyes).curves
    assert np.flatnonzero(np.isnan(curves.digit)).tolist() == list(range(5, 13))
    assert {len(curve) for curve in vars(curves).values()} == {FRAMES}


# --- faults ------------------------------------------------------------------------------------


def test_mild_blur_and_noise_cost_nothing(eyes):
    rng = np.random.default_rng(0)
    for scene in drawn("one", 5):
        clip = ndimage.gaussian_filter(world.render(scene, FRAMES).astype(float), (0, 1, 1, 0))
        clip = np.clip(clip + rng.normal(0, 6, clip.shape), 0, 255).astype(np.uint8)
        same_but(truth.judge(clip, scene, eyes), "background")


def test_strong_blur_costs_the_digit(eyes):
    before, after = [], []
    for scene in drawn("one", 12, patterned=False):
        clip = world.render(scene, 9)
        before.append(truth.judge(clip, scene, eyes).digit)
        blurred = ndimage.gaussian_filter(clip.astype(float), (0, 2.5, 2.5, 0)).astype(np.uint8)
        got = truth.judge(blurred, scene, eyes)
        after.append(got.digit)
        assert got.direction == 1
    assert np.mean(after) < np.mean(before) - 0.7


def test_recolouring_costs_the_colour_only(eyes):
    got = truth.judge(spliced(one(), one(colour="cyan"), 13), one(), eyes)
    same_but(got, "colour", "survival")
    assert (got.colour, got.survival) == (pytest.approx(13 / 25), 13)


def test_another_identity_costs_the_digit_only(eyes):
    got = truth.judge(spliced(one(), one(value=8, scan=scan_of(8)), 13), one(), eyes)
    same_but(got, "digit", "survival", "speed_variation")  # the new ink has its own centre
    assert (got.digit, got.survival) == (pytest.approx(13 / 25), 13)
    assert got.speed_variation < 0.3


def test_a_frozen_clip_goes_nowhere(eyes):
    frozen = truth.copy_last(world.render(one(), FRAMES), 1)
    got = truth.judge(frozen, one(), eyes)
    same_but(got, "direction", "position", *MOTION)
    assert (got.direction, got.speed, got.speed_variation) == (0, 0, None)
    assert got.position > 15


def test_going_the_other_way_costs_direction_and_place(eyes):
    clip = world.render(one(direction="up", y=60), FRAMES)
    same_but(got := truth.judge(clip, one(y=60), eyes), "direction", "position")
    assert got.direction == 0
    assert got.position > 20


def test_jitter_shows_in_the_variation_of_speed(eyes):
    rng = np.random.default_rng(0)
    places = world.corners(one(x=8).digits[0], FRAMES) + rng.integers(-2, 3, (FRAMES, 2))
    frames = [world.render(one(x=int(x), y=int(y)), 1)[0] for x, y in places]
    got = truth.judge(np.array(frames), one(x=8), eyes)
    same_but(got, "speed_variation", "position", "speed")
    assert got.speed == pytest.approx(2, abs=0.4)
    assert got.speed_variation > 0.8
    assert 1 < got.position < 3


def test_jitter_is_known_frame_by_frame(eyes):
    """One frame that is 3 pixels too low: the ways to it and from it are off, and no others."""
    places = world.corners(one(x=8).digits[0], FRAMES)
    places[7, 1] += 3
    frames = [world.render(one(x=int(x), y=int(y)), 1)[0] for x, y in places]
    got = truth.judge(np.array(frames), one(x=8), eyes)
    assert np.isnan(got.curves.jitter[0])
    np.testing.assert_allclose(got.curves.jitter[7:9], 3, atol=0.1)
    others = np.delete(got.curves.jitter, [0, 7, 8])
    assert (others < 0.2).all()
    assert got.jitter == pytest.approx(np.nanmean(got.curves.jitter))


def test_a_bounce_is_no_jitter(eyes):
    got = truth.judge(world.render(one(), 41), one(), eyes)
    assert got.reflection == 0 and np.nanmax(got.curves.jitter) < 0.2


def test_half_the_speed_is_measured(eyes):
    slow = world.render(one(x=8), FRAMES)[np.arange(FRAMES) // 2]
    got = truth.judge(slow, one(x=8), eyes)
    assert got.speed == pytest.approx(1, abs=0.1)
    assert (got.direction, got.digit) == (1, 1)


def test_a_bounce_that_slows_down_is_a_reflection_error(eyes):
    before, after = world.render(one(), 21), world.render(one(x=72, direction="left"), 21)
    clip = np.concatenate((before, after[np.arange(1, 21) // 2]))
    got = truth.judge(clip, one(), eyes)
    assert got.reflection == pytest.approx(1, abs=0.5)
    assert truth.judge(world.render(one(), 41), one(), eyes).reflection == 0


def test_a_spurious_digit_costs_the_count_only(eyes):
    extra = Digit(value=3, scan=scan_of(3), colour="blue", direction="right", x=8, y=64)
    both = Scene(digits=(*one().digits, extra))
    for expected in (one(), Expected.from_scene(one())):
        got = truth.judge(spliced(one(), both, 5), expected, eyes)
        same_but(got, "count")
        assert got.count == pytest.approx(5 / 25)


def test_specks_are_no_objects(eyes):
    clip = world.render(one(), FRAMES)
    clip[:, 70:74, 10:14] = world.COLOURS["green"]
    clip[:, 80:83, 60:66] = world.COLOURS["red"]
    same_but(got := truth.judge(clip, one(), eyes), "background")
    assert 0 < got.background < 3


def test_a_lost_digit_costs_all_that_is_asked_of_it(eyes):
    clip = world.render(one(), FRAMES)
    clip[9:] = world.ground(one())
    got = truth.judge(clip, one(), eyes)
    same_but(got, "digit", "colour", "count", "survival")
    assert got.digit == got.colour == got.count == pytest.approx(9 / 25)
    assert got.survival == 9
    assert truth.judge(clip[:12], one(), eyes).survival is None  # shorter than a latent frame


def test_never_there_is_lost_from_the_start(eyes):
    empty = np.tile(world.ground(one()), (FRAMES, 1, 1, 1))
    got = truth.judge(empty, one(), eyes)
    assert (got.digit, got.colour, got.count, got.direction, got.survival) == (0, 0, 0, 0, 0)
    assert (got.speed, got.position, got.background) == (None, None, 0)


def test_the_wrong_ground_costs_the_background_only(eyes):
    clip = spliced(one(), dataclasses.replace(one(), pattern=5), 5)
    same_but(got := truth.judge(clip, one(), eyes), "background")
    assert got.background > 5
    same_but(got := truth.judge(clip, Expected.from_scene(one()), eyes), "background")
    assert got.background > 5


def test_a_curtain_that_never_rises_hides_what_should_be_seen(eyes):
    stuck = dataclasses.replace(memory(), curtain=Curtain(box=(0, 48, 96, 48), falls=2, rises=99))
    clip = world.render(stuck, FRAMES)
    got = truth.judge(clip, memory(), eyes)
    same_but(got, "digit", "colour", "count", "curtain", "background", "survival")
    assert got.curtain == got.count == pytest.approx(13 / 25)
    assert got.digit == got.colour == pytest.approx(5 / 17)
    assert got.background > 15
    assert got.survival == 13
    assert truth.recall(clip, memory(), eyes) == truth.Recall(
        found=False, digit=False, colour=False, ground=0.0
    )


@pytest.mark.parametrize(
    ("changes", "digit", "colour"),
    [
        ({}, True, True),
        ({"value": 2, "scan": scan_of(2)}, False, True),
        ({"colour": "purple"}, True, False),
        ({"value": 0, "scan": scan_of(0), "colour": "blue"}, False, False),
    ],
)
def test_another_object_after_the_curtain(eyes, changes, digit, colour):
    clip = spliced(memory(), memory(**changes), 13)
    got = truth.recall(clip, memory(), eyes)
    assert got == truth.Recall(found=True, digit=digit, colour=colour, ground=1.0)
    assert got.both == (digit and colour)
    judged = truth.judge(clip, memory(), eyes)
    same_but(judged, "digit", "colour", "survival")
    assert judged.digit == pytest.approx(1 if digit else 5 / 17)
    assert judged.colour == pytest.approx(1 if colour else 5 / 17)
    assert judged.survival == (None if got.both else 13)


def test_another_pattern_after_the_curtain(eyes):
    other = dataclasses.replace(memory(), pattern=6)
    clip = spliced(memory(), other, 13)
    got = truth.recall(clip, memory(), eyes)
    light = [world.ground(scene)[56::16, 8::16, 0] for scene in (memory(), other)]
    assert (got.found, got.both) == (True, True)
    assert got.ground == pytest.approx((light[0] == light[1]).mean(), abs=0.15)
    same_but(judged := truth.judge(clip, memory(), eyes), "background")
    assert judged.background > 5
    flat = dataclasses.replace(memory(), pattern=None)
    assert truth.recall(world.render(flat, FRAMES), flat, eyes).ground is None


# --- floor, ceiling, rules ---------------------------------------------------------------------


def test_only_frames_since_count(eyes):
    clip = spliced(one(colour="cyan"), one(), 9)
    assert truth.judge(clip, one(), eyes, since=9).colour == 1
    assert truth.judge(clip, one(), eyes).colour == pytest.approx(16 / 25)


def test_the_floor_repeats_the_last_given_frame(eyes):
    clip = world.render(memory(), FRAMES)
    floor = truth.copy_last(clip, 9)
    assert np.array_equal(floor[:9], clip[:9])
    assert (floor[9:] == clip[8]).all()
    assert truth.recall(floor, memory(), eyes).found is False
    assert np.array_equal(truth.copy_last(clip, FRAMES), clip)


def test_the_ceiling_goes_through_a_codec():
    torch = pytest.importorskip("torch")
    clip = world.render(one(), 5)
    shapes = []

    def encode(video):
        shapes.append((tuple(video.shape), float(video.min()) >= -1, video.dtype))
        return video, "codes"

    assert np.array_equal(truth.through_codec(clip, encode, lambda codes: 3 * codes / 3), clip)
    assert shapes == [((1, 3, 5, 96, 96), True, torch.float32)]
    assert np.array_equal(truth.through_codec(clip, lambda video: video, lambda codes: codes), clip)


def test_the_same_reader_twice(eyes):
    again = reading.Reader()
    assert np.array_equal(again._weights, eyes._weights)
    clip = world.render(drawn("two", 1)[0], 9)
    one_, two_ = (r.read(clip) for r in (eyes, again))
    assert [r.objects for r in one_] != []
    assert [[vars(o) for o in r.objects] for r in one_] == [
        [vars(o) for o in r.objects] for r in two_
    ]
    assert truth.reader() is eyes


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        (np.zeros((2, 96, 96, 3)), r"float64 of shape \(2, 96, 96, 3\), expected uint8"),
        (np.zeros((3, 96, 96), np.uint8), r"shape \(3, 96, 96\), expected uint8 \[T, 96, 96, 3\]"),
        (np.zeros((0, 96, 96, 3), np.uint8), "with T >= 1: scale to 0..255, channels last"),
    ],
)
def test_frames_of_another_kind_are_refused(eyes, frames, text):
    with pytest.raises(InvalidSetting, match=text):
        eyes.read(frames)
    with pytest.raises(InvalidSetting, match=text):
        truth.judge(frames, one(), eyes)


def test_wrong_use_is_refused(eyes):
    clip = world.render(memory(), 13)
    with pytest.raises(
        InvalidSetting, match="13 frames end under the curtain, expected more than 13"
    ):
        truth.recall(clip[:13], memory(), eyes)
    with pytest.raises(InvalidSetting, match="kind 'one' hides nothing, expected a curtain"):
        truth.recall(clip, one(), eyes)
    with pytest.raises(InvalidSetting, match="given = 14 frames, expected 1 to the clip's 13"):
        truth.copy_last(clip, 14)
    with pytest.raises(InvalidSetting, match=r"since = 13 leaves nothing of 13 frames .* 0 to 12"):
        truth.judge(clip, memory(), eyes, since=13)


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(InvalidSetting, match=r"pip install 'packcache\[eval\]'"):
        reading.Reader()
