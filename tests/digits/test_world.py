"""The world is a pure function of a scene: 2 pixels a frame, inside the frame, bouncing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from packcache.digits import world
from packcache.errors import InvalidSetting

pytest.importorskip("sklearn", reason="the scans come from scikit-learn")


def scene(**changes: object) -> world.Scene:
    """Any one scene, changed where the test says so."""
    base = world.Scene(digit=3, scan=3, colour="red", direction="right", x=0, y=8)
    return dataclasses.replace(base, **changes)


def test_same_seed_same_pixels():
    first, second = (world.sample_scene(np.random.default_rng(7)) for _ in range(2))
    assert first == second
    assert np.array_equal(world.render(first, 9), world.render(second, 9))
    assert world.sample_scene(np.random.default_rng(8)) != first


def test_what_is_given_stays():
    rng = np.random.default_rng(0)
    drawn = world.sample_scene(rng, digit=5, colour="blue", direction="up")
    assert (drawn.digit, drawn.colour, drawn.direction) == (5, "blue", "up")
    assert drawn.scan in world.scan_indices("train", 5)


def test_scenes_start_on_the_lattice_inside_the_frame():
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng) for _ in range(200)]
    starts = {(s.x, s.y) for s in scenes}
    assert all(v % 4 == 0 and 0 <= v <= 40 for start in starts for v in start)
    assert {v for start in starts for v in start} == set(range(0, 41, 4))


@pytest.mark.parametrize("direction", world.DIRECTIONS)
def test_two_pixels_a_frame_and_never_outside(direction):
    places = world.corners(scene(direction=direction, x=4, y=20), 200)
    assert places.min() >= 0
    assert places.max() <= world.SIZE - world.SPRITE
    moves = np.abs(np.diff(places, axis=0))
    expected = 2 * np.abs(world.DIRECTIONS[direction])
    assert np.array_equal(moves, np.broadcast_to(expected, moves.shape))


def test_bounces_at_the_wall():
    x = world.corners(scene(x=36), 6)[:, 0]
    assert x.tolist() == [36, 38, 40, 38, 36, 34]
    x = world.corners(scene(x=4, direction="left"), 5)[:, 0]
    assert x.tolist() == [4, 2, 0, 2, 4]


def test_up_is_up():
    y = world.corners(scene(direction="up-right", y=20), 2)[:, 1]
    assert y.tolist() == [20, 18]


def test_frames_are_one_moving_picture():
    video = world.render(scene(), 9).astype(int)
    assert np.array_equal(video[4, :, 8:32], video[0, :, 0:24])
    outside = np.ones((64, 64), dtype=bool)
    outside[8:32, 0:24] = False
    assert (video[0][outside] == world.BACKGROUND).all()
    assert np.abs(video[0] - world.BACKGROUND).max() > 150


def test_a_later_part_is_rendered_alone():
    whole = world.render(scene(direction="down-left"), 30)
    assert np.array_equal(world.render(scene(direction="down-left"), 4, first=26), whole[26:])


def test_scans_of_train_and_test_are_disjoint_and_complete():
    train, test = world.scan_indices("train"), world.scan_indices("test")
    assert not set(train) & set(test)
    assert len(train) + len(test) == 1797
    assert len(test) == 1797 // 5
    drawn = [world.sample_scene(np.random.default_rng(n), "test") for n in range(50)]
    assert all(s.scan in test for s in drawn)


def test_a_digit_shows_its_own_scans():
    threes = set(world.scan_indices("train", 3))
    eights = set(world.scan_indices("train", 8))
    assert threes
    assert not threes & eights


def test_unknown_scan_is_refused():
    with pytest.raises(InvalidSetting, match=r"scan 1797 does not exist, expected 0 to 1796"):
        world.sprite(1797)
