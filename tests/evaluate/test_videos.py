"""Clips of one's own beside each other: what is equal, what is worse, what is no pair."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from packcache.cli import app
from packcache.digits import world
from packcache.errors import InputError, InvalidSetting
from packcache.evaluate.table import cases
from packcache.evaluate.video_metrics import METRICS, measure
from packcache.evaluate.videos import compare, lines
from packcache.video import read_video, write_video

FRAMES, CLIPS = 13, 3


def fading(clip: np.ndarray) -> np.ndarray:
    """Loses its colour from the first frame to the last."""
    grey = clip.mean(axis=-1, keepdims=True)
    share = np.linspace(0, 1, len(clip))[:, None, None, None]
    return ((1 - share) * clip + share * grey).astype(np.uint8)


def still(clip: np.ndarray) -> np.ndarray:
    return np.repeat(clip[:1], len(clip), axis=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    made = {"full": lambda clip: clip, "again": lambda clip: clip, "fading": fading, "still": still}
    for label, change in made.items():
        (root / label).mkdir()
        for number, case in enumerate(cases(CLIPS)):
            clip = change(world.render(case.scene, FRAMES))
            write_video(clip, root / label / f"{number}.mp4", 12)
    return {label: root / label for label in made}


@pytest.fixture(scope="module")
def told(folders):
    return compare(folders)


def row(told, label):
    return next(one for one in told["rows"] if one["row"] == label)


def test_equal_clips_differ_in_nothing(told):
    again = row(told, "again")
    assert set(again["versus"]) == set(METRICS) - {"psnr", "ssim"}
    for name, less in again["versus"].items():
        assert less["mean"] == less["low"] == less["high"] == 0 and less["p"] == 1, name
    assert again["clip"]["psnr"]["mean"] == 100 and again["clip"]["ssim"]["mean"] == 1
    assert all(own["excess"]["mean"] == 0 for own in again["drift"].values())
    assert row(told, "full")["versus"] == {} and "psnr" not in row(told, "full")["clip"]


def test_a_clip_that_stands_still_moves_less_and_one_that_fades_drifts(told):
    frozen, faded = row(told, "still"), row(told, "fading")
    assert frozen["versus"]["flow_motion_top5_dis"]["high"] < 0
    assert frozen["clip"]["frozen_share"]["mean"] == 1
    assert frozen["versus"]["warp_error_dis"]["high"] < 0  # flattered: motion stands beside it
    assert faded["drift"]["saturation"]["excess"]["high"] < -0.05
    assert frozen["drift"]["saturation"]["signed"]["mean"] == pytest.approx(0, abs=1e-3)


def test_numbers_are_those_of_the_clips(told, folders):
    found = [measure(read_video(folders["full"] / f"{n}.mp4")[0], fps=12) for n in range(CLIPS)]
    for name in ("flicker_mae", "sharpness"):
        mean = np.mean([one.scalars[name] for one in found])
        assert row(told, "full")["clip"][name]["mean"] == pytest.approx(mean)
    assert told["workload"]["clips"] == ["0", "1", "2"] and told["workload"]["frames"] == FRAMES


def test_what_misleads_alone_brings_what_stands_beside_it(folders):
    one = compare({"full": folders["full"]}, metrics=["warp_error_dis"])
    names = list(one["rows"][0]["clip"])
    assert "warp_error_dis" in names and "flow_motion_top5_dis" in names
    assert "sharpness" not in names
    text = lines(one)
    motion = next(n for n, line in enumerate(text) if line.startswith("flow_motion"))
    warp = next(n for n, line in enumerate(text) if line.startswith("warp_error"))
    assert motion < warp


def test_the_command_writes_what_it_says(folders, tmp_path):
    call = ["evaluate", "videos", *(f"{name}={path}" for name, path in folders.items())]
    call += ["--frames", "9", "--out", str(tmp_path / "out")]
    ran = CliRunner().invoke(app, call)
    assert ran.exit_code == 0, ran.output
    assert "3 clips, 9 frames of 96x96, 12 a second" in ran.output
    assert "drift of saturation, end less start" in ran.output
    stored = json.loads((tmp_path / "out" / "videos.json").read_text())
    assert stored["schema"] == "packcache.videos/1" and stored["workload"]["frames"] == 9
    assert str(tmp_path) not in json.dumps(stored)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["{full}"], InvalidSetting, "expected label=folder, such as full=clips"),
        (["a={full}", "a={still}"], InvalidSetting, "label 'a' is there twice"),
        (["a={full}", "--metrics", "motion_smoothness"], InvalidSetting, "unknown metric 'motion_"),
        (["a={full}", "--frames", "2"], InvalidSetting, "frames is 2, expected at least 3"),
        (["a={full}", "--frames", "99"], InputError, "has 13 frames, expected at least 99"),
        (["a={full}", "--temporal", "0"], InvalidSetting, "temporal is 0, expected at least 1"),
        (["a=nowhere"], InputError, "a: nowhere is no folder, expected one of clips"),
        (["a={empty}"], InputError, "a: no clip in"),
        (["a={full}", "b={fewer}"], InputError, "a has a clip '2', b has none: give the same"),
        (["a={fewer}", "b={full}"], InputError, "b has a clip '2', a has none: give the same"),
        (["a={full}", "b={short}"], InputError, "is 9 frames of 96x96, the first clip 13 of 96x96"),
        (["a={full}", "b={fast}"], InputError, "24 frames a second, the first clip 12"),
    ],
)
def test_what_is_no_pair_is_one_line(folders, tmp_path, arguments, kind, message):
    made = {**folders, **{name: tmp_path / name for name in ("empty", "fewer", "short", "fast")}}
    for name in ("empty", "fewer", "short", "fast"):
        made[name].mkdir()
    for number in range(CLIPS):
        source = folders["full"] / f"{number}.mp4"
        clip = read_video(source)[0]
        if number < 2:
            shutil.copy(source, made["fewer"])
        write_video(clip[:9], made["short"] / source.name, 12)
        write_video(clip, made["fast"] / source.name, 24)
    call = ["evaluate", "videos", *(one.format(**made) for one in arguments)]
    error = CliRunner().invoke(app, [*call, "--out", str(tmp_path / "out")]).exception
    assert isinstance(error, kind) and message in str(error), error
    assert "\n" not in str(error) and not (tmp_path / "out").exists()
