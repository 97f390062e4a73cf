"""`packcache inspect` and `packcache calibrate`: what they print and write, and wrong input."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from packcache import cli_inspect
from packcache.errors import PackCacheError
from packcache.inspect.calibrate import TOLERANCE
from packcache.policies import PackCache
from tests.inspect.synthetic import exponential, flat, trace

app = typer.Typer()
app.command()(cli_inspect.inspect)
app.command()(cli_inspect.calibrate)


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def refusal(*words: object) -> PackCacheError:
    """The one line that a command fails with."""
    error = run(*words).exception
    assert isinstance(error, PackCacheError), error
    assert "\n" not in str(error)
    return error


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "half.trace"
    trace(exponential(0.5), frames=6, clips=2, noise=0.05, layers=2, steps=(0, 9, -1)).save(path)
    return path


def test_inspect_prints_roles_and_decay(file):
    out = run("inspect", file)
    assert out.exit_code == 0, out.output
    lines = out.output.splitlines()
    assert lines[0].split() == ["attention,", "%", "text", "condition", "image", "history",
                                "current"]  # fmt: skip
    assert lines[1].split()[:3] == ["all", "20.0", "20.0"]
    heads = [" ".join(line.split()[:2]) for line in lines]
    for head in ("layer 0", "layer 1", "step 0", "step 9"):
        assert head in heads
    assert any(line.startswith("commit ") for line in lines)
    (fit,) = [line for line in lines if line.startswith("all ") and "exponential" in line]
    assert float(fit.split()[1]) == pytest.approx(0.5, rel=0.05)
    assert lines[-1].startswith("all: the slope of log mu is -0.69")


def test_inspect_as_json(file):
    told = json.loads(run("inspect", file, "--json").output)
    assert told["schema"] == "packcache.inspect/1"
    assert told["workload"]["clips"] == 2 and told["environment"]["device"] == "cpu"
    assert told["distance"]["fits"]["all"]["verdict"] == "exponential"
    assert np.shape(told["roles"]["by_layer"]["mean"]) == (2, 4)


def test_inspect_writes_pictures(file, tmp_path):
    pytest.importorskip("matplotlib")
    out = run("inspect", file, "--out", tmp_path / "seen", "--policies", "full,packcache")
    assert out.exit_code == 0, out.output
    names = sorted(path.name for path in (tmp_path / "seen").iterdir())
    assert names == ["attention.png", "inspect.json", "kept.png"]
    assert "attention.png" in out.output.splitlines()[-1]


def test_a_trace_of_the_embedded_model_is_recorded_on_the_spot(file, monkeypatch):
    from packcache.inspect import record as recorder
    from packcache.inspect.trace import Trace

    asked = []
    monkeypatch.setattr(
        recorder, "record", lambda *_, **settings: asked.append(settings) or Trace.load(file)
    )
    assert run("inspect", "digits", "--seed", 3).exit_code == 0
    assert asked[0]["seed"] == 3


def test_calibrate_prints_the_frontier_and_the_settings(file):
    out = run("calibrate", file, "--tolerance", 0.2)
    assert out.exit_code == 0, out.output
    lines = out.output.splitlines()
    assert lines[0].split() == ["budget", "window", "half-life", "floor", "order", "lost"]
    chosen = [line for line in lines if line.endswith("<-")]
    assert len(chosen) == 1 and chosen[0] == lines[-3]
    assert lines[-2].startswith("PackCache(budget=") and "tolerated 20.0%" in lines[-2]
    assert " on clips held out, " in lines[-2] and "trained range is not known" in lines[-2]
    assert lines[-1].startswith("decay: exponential, the slope of log mu is -0.7")


def test_calibrate_marks_what_reaches_beyond_the_trained_range(file):
    out = run("calibrate", file, "--tolerance", 0.01, "--trained", 4)
    assert out.exit_code == 0, out.output
    marked = [line for line in out.output.splitlines() if "beyond the trained range" in line]
    assert marked and all(int(line.split()[1]) > 2 for line in marked)
    assert not any(line.endswith("<-") for line in marked)
    told = json.loads(run("calibrate", file, "--trained", 4, "--json").output)
    assert told["trained_latent_frames"] == 4 and told["beyond_trained"] is False
    assert told["tolerance"] == TOLERANCE


def test_calibrate_writes_what_from_file_loads(file, tmp_path):
    path = tmp_path / "settings.json"
    out = run("calibrate", file, "--tolerance", 0.2, "--out", path)
    assert out.output.splitlines()[-1] == (
        f"wrote {path}: --policy {path} and PackCache.from_file load it"
    )
    told = json.loads(path.read_text())
    assert told["schema"] == "packcache.calibration/1"
    assert PackCache.from_file(path) == PackCache(**told["settings"])
    again = json.loads(run("calibrate", file, "--tolerance", 0.2, "--json").output)
    assert again == told


def test_calibrate_says_when_nothing_meets_the_tolerance(tmp_path):
    path = tmp_path / "flat.trace"
    trace(flat, frames=6, clips=1, steps=(-1,), layers=1, anchors=0.05).save(path)
    out = run("calibrate", path, "--tolerance", 0.001)
    assert out.exit_code == 0
    assert "nothing tried keeps the loss within 0.1%: the best loses" in out.output


# --- wrong input -------------------------------------------------------------------------------

both = pytest.mark.parametrize("command", ["inspect", "calibrate"])


@both
def test_a_missing_file(command, tmp_path):
    error = refusal(command, tmp_path / "none.trace")
    assert "none.trace does not exist: expected a trace" in str(error)
    assert "or digits, which is traced on the spot" in str(error)
    assert error.exit_code == 1


@both
def test_a_file_that_is_no_trace(command, tmp_path):
    (tmp_path / "notes.txt").write_text("a red 3")
    error = refusal(command, tmp_path / "notes.txt")
    assert "notes.txt" in str(error) and error.exit_code == 1


@both
def test_a_trace_without_history(command, tmp_path):
    path = tmp_path / "short.trace"
    trace(flat, frames=2, clips=1).save(path)
    error = refusal(command, path)
    assert "the trace has no history" in str(error) and error.exit_code == 1


@both
def test_no_run_to_inspect(command, tmp_path):
    path = tmp_path / "empty.trace"
    dataclasses.replace(trace(flat, frames=3, clips=1), samples=[]).save(path)
    error = refusal(command, path)
    assert "the trace has no samples: record it again" in str(error) and error.exit_code == 1


@pytest.mark.parametrize("tolerance", ["0", "1", "-1", "nan"])
def test_tolerance_out_of_range(file, tolerance):
    error = refusal("calibrate", file, f"--tolerance={tolerance}")
    assert "expected a share of attention above 0 and below 1" in str(error)
    assert error.exit_code == 2


def test_a_trained_range_that_is_none(file):
    error = refusal("calibrate", file, "--trained", 0)
    assert "trained_latent_frames is 0, expected latent frames" in str(error)
    assert error.exit_code == 2


def test_a_clip_that_is_not_there(file, tmp_path):
    error = refusal("inspect", file, "--out", tmp_path / "a", "--clip", 2)
    assert "clip is 2, expected 0 to 1" in str(error) and error.exit_code == 2
    assert not (tmp_path / "a").exists()


UNFIT = [
    (["--clip", 4], "clip is 4, expected 0 to 3, the clips of the trace"),
    (["--clip=-1"], "clip is -1, expected 0 to 3"),
    (
        ["--policies", "packcache:order=expected"],
        "goes by 'expected' scores, and a trace holds non",
    ),
    (["--policies", "packcache:budget=2tok"], "budget 2tok is 2 tokens for a window of 4 latent"),
]


@pytest.mark.parametrize(("words", "says"), UNFIT)
def test_what_cannot_be_drawn_leaves_nothing_behind(words, says, tmp_path, monkeypatch):
    """Neither of a file nor of clips, which nobody records in vain."""
    from packcache.inspect import record as recorder

    path = tmp_path / "four.trace"
    trace(exponential(0.5), frames=4, clips=4, layers=1, steps=(-1,)).save(path)
    monkeypatch.setattr(recorder, "record", lambda *_, **__: pytest.fail("recorded in vain"))
    for source in (path, "digits"):
        error = refusal("inspect", source, "--out", tmp_path / "seen", *words)
        assert says in str(error) and error.exit_code == 2
        assert not (tmp_path / "seen").exists()


def test_what_is_drawn_needs_a_folder(file):
    for words in (["--clip", 0], ["--policies", "full"]):
        error = refusal("inspect", file, *words)
        assert f"{words[0]} {words[1]} without --out" in str(error) and error.exit_code == 2


def test_unknown_policies_and_folders(file, tmp_path):
    assert "unknown policy 'lru'" in str(refusal("inspect", file, "--policies", "lru"))
    there = tmp_path / "no" / "out"
    assert "does not exist: create it" in str(refusal("inspect", file, "--out", there))
    assert "does not exist: create it" in str(refusal("calibrate", file, "--out", there / "a.json"))


def test_without_matplotlib_nothing_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = refusal("inspect", "digits", "--out", tmp_path / "seen")
    assert "pip install 'packcache[plot]'" in str(error) and error.exit_code == 2
    assert not (tmp_path / "seen").exists()
