"""The shipped weights do what is claimed of them: sizes, codec, clips, memory; no training."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import packcache as pc
from packcache.digits import world
from packcache.digits.model import digits_config
from packcache.digits.prompts import prompt
from packcache.evaluate.memory import horizon
from packcache.evaluate.truth import Expected, Judgement, Reader, judge, through_codec
from packcache.lumos.config import LumosConfig
from packcache.lumos.pipeline import Pipeline

PICTURES = Path(pc.__file__).parent / "digits" / "pictures"
WEIGHTS = resources.files("packcache.digits") / "weights"
FRAMES = 25  # 7 latent frames, the trained length


@pytest.fixture(scope="module")
def gen() -> Pipeline:
    return pc.load("digits")


@pytest.fixture(scope="module")
def eyes() -> Reader:
    """Half the usual lessons: fitted in seconds."""
    pytest.importorskip("sklearn", reason="the scans come from scikit-learn")
    return Reader(copies=2)


def drawn(numbers: range, kind: world.Kind | None = None) -> list[world.Scene]:
    """Scenes of held-out scans, by number."""
    pytest.importorskip("sklearn", reason="the scans come from scikit-learn")
    return [world.sample_scene(np.random.default_rng((0, n)), "test", kind=kind) for n in numbers]


# --- files ---------------------------------------------------------------------------------------


def test_shipped_configuration_is_the_code_s():
    shipped = LumosConfig.from_dict(json.loads((WEIGHTS / "config.json").read_text()))
    assert shipped == digits_config()


def test_at_most_six_million_parameters_all_finite(gen):
    weights = list(gen.model.parameters())
    assert sum(p.numel() for p in weights) <= 6_000_000
    assert all(p.isfinite().all() for p in [*weights, *gen.codec.parameters()])


def test_the_weights_are_at_most_15_megabytes():
    names = ("codec.safetensors", "model.safetensors", "config.json")
    assert sum(len((WEIGHTS / name).read_bytes()) for name in names) <= 15_000_000


# --- the codec -----------------------------------------------------------------------------------


def test_held_out_clips_come_back_through_the_codec(gen, eyes):
    """The ceiling of all that the model can make."""
    whole, boxes, judged = [], [], []
    for scene in drawn(range(12)):
        true = world.render(scene, FRAMES)
        back = through_codec(true, gen.codec.encode, gen.codec.decode)
        error = (back / 255 - true / 255) ** 2
        digit = scene.digits[0]
        inside = [
            error[t, y : y + world.SPRITE, x : x + world.SPRITE]
            for t, (x, y) in enumerate(world.corners(digit, FRAMES))
            if digit is not scene.hidden or t == 0
        ]
        whole.append(error.mean())
        boxes.append(np.mean(inside))
        judged.append(judge(back, scene, eyes))
    assert decibel(whole) >= 30
    assert decibel(boxes) >= 22
    assert mean(judged, "digit") >= 0.97


def decibel(errors: list[float]) -> float:
    return float(-10 * np.log10(np.mean(errors)))


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_clips_show_what_the_prompt_tells(gen, eyes):
    """A dozen clips with the full cache: 6 from text, 3 of two digits from text, 3 from a picture.

    Scene n is drawn from seed (0, n) and made with seed n. One test, for the clips are the cost.
    """
    scenes = [*drawn(range(6), "one"), *drawn(range(6, 9), "two"), *drawn(range(9, 12), "one")]
    clips = gen.generate_many(
        [prompt(scene) for scene in scenes[:9]],
        frames=FRAMES,
        policy=pc.FullCache(),
        seed=list(range(9)),
    )
    clips += [
        gen.generate(
            prompt(scene),
            frames=FRAMES,
            policy=pc.FullCache(),
            seed=seed,
            image=Image.fromarray(world.render(scene, 1)[0]),
        )
        for seed, scene in enumerate(scenes[9:], start=9)
    ]
    judged = [
        judge(clip.frames, Expected.from_scene(scene, told=True), eyes, since=int(seed >= 9))
        for seed, (clip, scene) in enumerate(zip(clips, scenes, strict=True))
    ]
    assert mean(judged, "digit") >= 0.75
    assert mean(judged, "colour") >= 0.92
    assert mean(judged, "count") >= 0.90
    # Two digits from text often set out in each other's direction: docs/digits.md has the number.
    one_digit = [j for j, scene in zip(judged, scenes, strict=True) if scene.kind == "one"]
    assert len(one_digit) == 9
    assert mean(one_digit, "direction") >= 0.85


def mean(judged: list[Judgement], name: str) -> float:
    """Over the clips that can be asked."""
    return float(np.mean([value for j in judged if (value := getattr(j, name)) is not None]))


@pytest.mark.parametrize("path", sorted(PICTURES.iterdir()), ids=lambda path: path.stem)
def test_shipped_pictures_show_what_they_are_called(eyes, path):
    frame = np.asarray(Image.open(path))
    assert frame.shape == (world.SIZE, world.SIZE, 3)
    (thing,) = eyes.read(frame[None])[0].objects
    assert f"{thing.colour}-{thing.digit}" == path.stem


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_full_cache_remembers_what_a_one_frame_window_forgets(gen):
    policies = {"full": "full", "window 1": "window:frames=1"}
    full, window = horizon(gen, policies, gaps=(2,), clips=8).values["object"][:, 0]
    assert full.mean() >= 0.75
    assert window.mean() <= 0.25
