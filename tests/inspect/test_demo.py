"""The clip of `packcache demo`: what is shipped is what the world draws."""

import hashlib
import json
from importlib import resources

import numpy as np
import pytest

from packcache.cli import DEMO_POLICIES
from packcache.digits import world
from packcache.digits.prompts import prompt
from packcache.inspect.demo import load_clip
from packcache.policies import parse_policies


@pytest.fixture(scope="module")
def clip():
    return load_clip()


def test_the_clip_is_the_test_scene_of_seed_0(clip):
    drawn = world.sample_scene(np.random.default_rng(0), "test", kind="enters", gap=2)
    assert clip.scene == drawn and clip.prompt == prompt(drawn) and clip.seed == 0


def test_the_true_frames_are_given_up_to_the_last_under_the_curtain(clip):
    assert np.array_equal(clip.given, world.render(clip.scene, len(clip.given)))
    x, y, width, height = clip.scene.curtain.box
    under, risen = world.render(clip.scene, 2, len(clip.given) - 1)
    assert (under[y : y + height, x : x + width] == world.CURTAIN_LAST).all()
    assert not (risen[y : y + height, x : x + width] == world.CURTAIN_LAST).all(-1).any()


def test_its_standing_is_measured_for_what_the_demo_compares(clip):
    assert list(clip.standing["policies"]) == list(parse_policies(DEMO_POLICIES))
    for own in clip.standing["policies"].values():
        assert 0 < own["percentile"] < 100 and 0 <= own["known"] <= clip.standing["clips"] == 64
    facts = (resources.files("packcache.digits") / "demo" / "demo.json").read_text()
    assert {"schema", "environment", "standing"} <= set(json.loads(facts))


def test_its_standing_belongs_to_the_shipped_weights():
    """After a retraining `recipes/digits/demo.py` has to measure again."""
    folder = resources.files("packcache.digits")
    digest = hashlib.sha256()
    for name in ("codec", "model"):
        digest.update((folder / "weights" / f"{name}.safetensors").read_bytes())
    facts = json.loads((folder / "demo" / "demo.json").read_text())
    assert facts["weights"] == digest.hexdigest()


def test_about_names_the_clip_its_place_and_what_was_read(clip):
    about = clip.about({"full": "digit and colour right", "window": "cannot be read"})
    what, how = about.paragraphs
    assert "Seed 0" in what and "first 17 frames are given" in what and "a blue 7" in what
    assert "64 of its kind" in how and "read from the first 8 frames" in how
    head, full, window, *_ = about.rows
    own = clip.standing["policies"]["full"]
    place, known = f"{own['percentile']:g}", f"{own['known']} of 64"
    assert head == ["policy", "percentile of seed 0 among 64", "known", "came back"]
    assert full == ["full", place, known, "digit and colour right"]
    assert window[0] == "window" and window[3] == "cannot be read"
    unread = clip.about({})
    assert unread.rows[1] == ["full", place, known] and "read" not in unread.paragraphs[1]
