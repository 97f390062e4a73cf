"""The world is a pure function of a scene: digits, patterns and curtains are where it says."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from packcache.digits import world
from packcache.digits.prompts import prompt
from packcache.digits.scans import scan_indices, sprite
from packcache.digits.world import SIZE, SPRITE, Curtain, Digit, Scene
from packcache.errors import InvalidSetting

pytest.importorskip("sklearn", reason="the scans come from scikit-learn")

FRAMES = 41  # 11 latent frames: every trained curtain has risen by then


def digit(**changes: object) -> Digit:
    """Any one digit, changed where the test says so."""
    base = Digit(value=3, scan=3, colour="red", direction="right", x=0, y=8)
    return dataclasses.replace(base, **changes)


def drawn(count: int, split: world.Split = "train", **given: object) -> list[Scene]:
    return [world.sample_scene(np.random.default_rng(n), split, **given) for n in range(count)]


def without(scene: Scene, **parts: object) -> np.ndarray:
    """The clip of a scene that lacks its curtain, its digits, ..."""
    return world.render(dataclasses.replace(scene, **parts), FRAMES)


def part(video: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    x, y, width, height = box
    return video[:, y : y + height, x : x + width]


# --- scenes --------------------------------------------------------------------------------------


def test_same_seed_same_pixels():
    for first, second in zip(drawn(40), drawn(40), strict=True):
        assert first == second
        assert np.array_equal(world.render(first, 9), world.render(second, 9))
    assert len(set(drawn(40))) == 40


def test_kinds_have_their_shares():
    scenes = drawn(3000)
    share = {kind: count / 3000 for kind, count in Counter(s.kind for s in scenes).items()}
    assert share == pytest.approx(world.KINDS, abs=0.03)
    assert sum(bool(s.curtain) for s in scenes) / 3000 == pytest.approx(1 / 3, abs=0.03)
    assert sum(len(s.digits) == 2 for s in scenes) / 3000 == pytest.approx(1 / 4, abs=0.03)
    assert sum(s.pattern is not None for s in scenes) / 3000 == pytest.approx(1 / 3, abs=0.03)
    for choices, names in (
        ([s.background for s in scenes], world.BACKGROUNDS),
        ([s.digits[0].value for s in scenes], range(10)),
        ([s.digits[0].colour for s in scenes], world.COLOURS),
    ):
        count = Counter(choices)
        assert set(count) == set(names)
        assert min(count.values()) > 0.8 * 3000 / len(names)


@pytest.mark.parametrize("kind", world.KINDS)
def test_a_kind_has_its_digits_and_its_curtain(kind):
    scenes = drawn(200, kind=kind)
    memory = kind in world.MEMORY_KINDS
    assert {s.kind for s in scenes} == {kind}
    assert {len(s.digits) for s in scenes} == {2 if kind in ("two", "enters") else 1}
    assert {bool(s.curtain) for s in scenes} == {memory}
    assert all(s.hidden == (s.digits[-1] if memory else None) for s in scenes)
    assert {s.digits[-1].enters for s in scenes} == {1 if kind == "enters" else 0}
    if memory:
        assert {s.curtain.falls for s in scenes} == {1, 2} if kind == "hidden" else {2, 3}
        assert {s.curtain.gap for s in scenes} == {1, 2, 3, 4}
        assert all(s.hidden.enters < s.curtain.falls for s in scenes)  # it is seen before
    else:
        directions = {d.direction for s in scenes for d in s.digits}
        assert len(directions) == (8 if kind == "one" else 4)


@pytest.mark.parametrize("kind", world.MEMORY_KINDS)
def test_a_scene_is_the_same_at_every_gap(kind):
    states = []
    for seed in range(20):
        rngs = [np.random.default_rng(seed) for _ in range(3)]
        near, middle, far = (
            world.sample_scene(rng, "test", kind=kind, gap=gap)
            for rng, gap in zip(rngs, (1, 4, 12), strict=True)
        )
        for scene, gap in ((near, 1), (middle, 4), (far, 12)):
            rises = near.curtain.falls + gap
            assert scene.curtain == dataclasses.replace(near.curtain, rises=rises)
            assert dataclasses.replace(scene, curtain=None) == dataclasses.replace(
                near, curtain=None
            )
        states.append({str(rng.bit_generator.state) for rng in rngs})
    assert [len(state) for state in states] == [1] * 20


def test_what_is_given_stays():
    assert all(scene.pattern is None for scene in drawn(40, patterned=False))
    assert all(scene.pattern is not None for scene in drawn(40, patterned=True))
    assert {s.curtain.gap for s in drawn(40, kind="hidden", gap=7)} == {7}


def test_digits_start_on_the_lattice_and_lean_a_little():
    digits = [d for s in drawn(1000) for d in s.digits]
    starts = {n for d in digits for n in (d.x, d.y)}
    assert starts == set(range(0, SIZE - SPRITE + 1, 4))
    tilts, widths = [d.tilt for d in digits], [d.width for d in digits]
    assert (min(tilts), max(tilts)) == pytest.approx((-10, 10), abs=0.2)
    assert max(abs(tilt) for tilt in tilts) <= 10
    assert (min(widths), max(widths)) == pytest.approx((0.9, 1.1), abs=0.011)
    assert 0.9 <= min(widths) <= max(widths) <= 1.1


# --- scans ---------------------------------------------------------------------------------------


def test_scans_of_train_and_test_are_disjoint_and_complete():
    train, test = scan_indices("train"), scan_indices("test")
    assert not set(train) & set(test)
    assert len(train) + len(test) == 1797
    assert len(test) == 1797 // 5


@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_show_scans_of_their_split_and_digit(split):
    other = set(scan_indices("train" if split == "test" else "test"))
    digits = [d for s in drawn(500, split) for d in s.digits]
    assert not {d.scan for d in digits} & other
    assert all(d.scan in scan_indices(split, d.value) for d in digits)
    assert len({d.scan for d in digits}) > 200


def test_strokes_fade_out_inside_their_box():
    for scene in drawn(300):
        alpha = sprite(scene.digits[0].scan, scene.digits[0].tilt, scene.digits[0].width)
        assert alpha.shape == (SPRITE, SPRITE)
        assert alpha.min() == 0 and alpha.max() == 1
        rim = np.concatenate((alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]))
        assert rim.max() < 0.5


def test_width_stretches_sideways_and_tilt_turns_clockwise():
    bar = int(scan_indices("train", 1)[0])

    def spread(tilt: float, width: float) -> np.ndarray:
        alpha = sprite(bar, tilt, width)
        y, x = np.mgrid[:SPRITE, :SPRITE]
        return np.cov(np.stack((x.ravel(), y.ravel())), aweights=alpha.ravel())

    plain, wide = spread(0, 1), spread(0, 1.1)
    assert wide[0, 0] / plain[0, 0] == pytest.approx(1.1**2, rel=0.05)
    assert wide[1, 1] == pytest.approx(plain[1, 1], rel=0.02)
    left, right = (np.linalg.eigh(spread(tilt, 1))[1][:, 1] for tilt in (-10, 10))
    turned = np.degrees(np.arctan2(right[1], right[0]) - np.arctan2(left[1], left[0]))
    assert (turned + 90) % 180 - 90 == pytest.approx(20, abs=2)  # y is down: clockwise is positive


def test_unknown_scan_is_refused():
    with pytest.raises(InvalidSetting, match=r"scan 1797 does not exist, expected 0 to 1796"):
        sprite(1797)


# --- motion --------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", world.DIRECTIONS)
def test_two_pixels_a_frame_and_never_outside(direction):
    places = world.corners(digit(direction=direction, x=4, y=20), 200)
    assert places.min() == 0 or direction in ("left", "right", "up", "down")
    assert 0 <= places.min() <= places.max() <= SIZE - SPRITE
    moves = np.abs(np.diff(places, axis=0))
    expected = 2 * np.abs(world.DIRECTIONS[direction])
    assert np.array_equal(moves, np.broadcast_to(expected, moves.shape))


def test_bounces_at_the_wall():
    x = world.corners(digit(x=68), 6)[:, 0]
    assert x.tolist() == [68, 70, 72, 70, 68, 66]
    x = world.corners(digit(x=4, direction="left"), 5)[:, 0]
    assert x.tolist() == [4, 2, 0, 2, 4]


def test_sets_out_as_it_is_told():
    for name, step in world.DIRECTIONS.items():
        places = world.corners(digit(x=40, y=40, direction=name), 2)
        assert (places[1] - places[0]).tolist() == [2 * n for n in step]
    up_right = world.corners(digit(x=40, y=40, direction="up-right"), 2)
    assert up_right[1].tolist() == [42, 38]


def test_digits_of_a_clip_keep_their_distance():
    for scene in drawn(150, kind="two") + drawn(150, kind="enters"):
        first, second = (world.corners(d, 80) for d in scene.digits)
        gap = np.abs(first - second) - SPRITE  # between the boxes, on each axis
        assert gap.max(axis=1).min() >= 4


# --- pixels --------------------------------------------------------------------------------------


def test_frames_are_one_moving_picture():
    scene = Scene(digits=(digit(),))
    video = world.render(scene, 9).astype(int)
    assert video.shape == (9, SIZE, SIZE, 3)
    assert np.array_equal(video[4, :, 8:32], video[0, :, 0:24])
    outside = np.ones((SIZE, SIZE), dtype=bool)
    outside[8:32, 0:24] = False
    assert (video[0][outside] == world.BACKGROUNDS["night"]).all()
    assert np.abs(video[0, 8:32, :24] - world.COLOURS["red"]).sum(-1).min() == 0


@pytest.mark.parametrize("kind", world.KINDS)
def test_chunks_are_the_whole(kind):
    for scene in drawn(5, kind=kind):
        whole = world.render(scene, FRAMES)
        chunks = [world.render(scene, min(7, FRAMES - n), first=n) for n in range(0, FRAMES, 7)]
        assert np.array_equal(np.concatenate(chunks), whole)
        assert np.array_equal(world.render(scene, 9), whole[:9])


def test_latent_frames_hold_one_frame_then_four_each():
    assert world.latent_of(np.arange(10)).tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_a_pattern_lightens_cells_of_16_pixels_by_30():
    lightened = []
    for scene in drawn(30, patterned=True):
        flat = world.ground(dataclasses.replace(scene, pattern=None)).astype(int)
        assert (flat == world.BACKGROUNDS[scene.background]).all()
        step = world.ground(scene) - flat
        cells = step[::16, ::16]
        assert np.array_equal(step, cells.repeat(16, 0).repeat(16, 1))
        assert set(np.unique(cells)) == {0, 30}
        lightened.append(cells[..., 0] == 30)
        assert prompt(scene) == prompt(dataclasses.replace(scene, pattern=None))
    assert np.mean(lightened) == pytest.approx(0.5, abs=0.05)
    assert len({cells.tobytes() for cells in lightened}) == 30


@pytest.mark.parametrize("kind", world.MEMORY_KINDS)
def test_the_curtain_covers_its_half_in_its_gap_and_nothing_else(kind):
    for scene in drawn(25, kind=kind):
        video, open_ = world.render(scene, FRAMES), without(scene, curtain=None)
        latents = world.latent_of(np.arange(FRAMES))
        down = (latents >= scene.curtain.falls) & (latents < scene.curtain.rises)
        assert down.sum() == 4 * scene.curtain.gap
        assert np.array_equal(video[~down], open_[~down])
        covered, box = video.copy(), scene.curtain.box
        part(covered, box)[down] = part(open_, box)[down]
        assert np.array_equal(covered, open_)  # nothing changes outside its box
        last = latents == scene.curtain.rises - 1
        assert (part(video, box)[down & last] == world.CURTAIN_LAST).all()
        assert (part(video, box)[down & ~last] == world.CURTAIN).all()


@pytest.mark.parametrize("kind", world.MEMORY_KINDS)
def test_nothing_of_the_hidden_digit_shows_while_the_curtain_is_down(kind):
    for scene in drawn(100, kind=kind):
        x, y, width, height = scene.curtain.box
        places = world.corners(scene.hidden, FRAMES)
        assert (places >= (x, y)).all()
        assert (places + SPRITE <= (x + width, y + height)).all()
        if kind == "enters":  # the other one is never covered
            other = world.corners(scene.digits[0], FRAMES)
            apart = (other >= (x + width, y + height)) | (other + SPRITE <= (x, y))
            assert apart.any(axis=1).all()


def test_an_entering_digit_is_there_from_latent_frame_1_on():
    for scene in drawn(25, kind="enters"):
        video = without(scene, curtain=None)
        alone = without(scene, curtain=None, digits=scene.digits[:1])
        differs = (video != alone).any(axis=(1, 2, 3))
        assert differs.tolist() == [False] + [True] * (FRAMES - 1)


def test_a_curtain_knows_its_gap():
    assert Curtain(box=(0, 0, 96, 48), falls=2, rises=5).gap == 3
