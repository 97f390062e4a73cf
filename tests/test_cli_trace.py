"""`packcache trace` and the leaderboard: what they write and print, and one line for wrong use."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from packcache.cli_trace import app
from packcache.errors import InputFileError, InvalidSetting, OutputError
from packcache.inspect.trace import Trace
from packcache.timeline import Role
from tests.tools import ROOT

TRACES = ROOT / "benchmarks" / "traces"


@pytest.fixture
def trace(capsys):
    """Call `packcache trace` and give back what it printed."""

    def call(*arguments: object) -> str:
        app([str(argument) for argument in arguments], standalone_mode=False)
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("traces") / "some.trace"
    words = ["record", "--clips", 1, "--frames", 17, "--steps", 1, "--queries", 4, "--out", out]
    app([str(word) for word in words], standalone_mode=False)
    return out


def test_record_writes_a_trace_and_says_so(trace, tmp_path):
    out = tmp_path / "a.trace"
    said = trace("record", "--clips", 1, "--frames", 5, "--steps", 1, "--with-image", "--out", out)
    assert said.startswith(f"{out}: clips 1, of 2 latent frames, 3 samples of 6 layers, ")
    made = Trace.load(out)
    assert made.roles == (Role.IMAGE, Role.HISTORY) and made.workload["queries"] == 32


def test_record_takes_prompts_and_prints_json(trace, tmp_path):
    out = tmp_path / "a.trace"
    told = json.loads(
        trace(
            "record", "--prompt", "a red 3", "--prompt", "a blue 4", "--frames", 5, "--steps", 1,
            "--out", out, "--json",
        )
    )  # fmt: skip
    assert told["schema"] == "packcache.trace/1" and told["clips"] == 2
    assert told["bytes"] == out.stat().st_size
    assert told["workload"]["prompts"] == ["a red 3", "a blue 4"]
    assert told["environment"]["torch"] and not told["workload"]["image"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nobody/nothing", "--codec", "x"], "no prompt for nobody/nothing: give"),
        (["--image", "a.png"], "--image without --prompt"),
        (["--prompt", "a red 3", "--with-image"], "--with-image is for scenes"),
        (["--clips", "0"], "clips is 0, expected at least 1"),
        (["--prompt", "a red 3", "--queries", "0"], "queries is 0, expected at least 1"),
    ],
)
def test_wrong_use_of_record(trace, tmp_path, arguments, said):
    with pytest.raises(InvalidSetting, match=said):
        trace("record", "--out", tmp_path / "a.trace", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named_before_the_work(trace, tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        trace("record", "--out", tmp_path / "no" / "a.trace")


def test_score_prints_a_table(trace, recorded):
    lines = trace("score", recorded, "--policies", "full,window,packcache,none").splitlines()
    groups = [line for line in lines if "history tokens held" in line]
    assert [line.split()[0] for line in groups] == ["400", "160", "0"]
    assert any(line.split()[:3] == ["full", "100.0", "100.0"] for line in lines)


def test_score_knows_the_usual_policies_and_prints_json(trace, recorded):
    told = json.loads(trace("score", recorded, "--json"))
    assert told["schema"] == "packcache.trace_score/1"
    assert {"full", "paper", "novelty", "none"} <= {row["policy"] for row in told["results"]}
    assert told["workload"]["traces"][0]["model"] == "digits"


def test_score_takes_policies_of_files(trace, recorded, tmp_path):
    own = "from packcache.policies import SlidingWindow\nlong = SlidingWindow(frames=2)\n"
    (tmp_path / "mine.py").write_text(own)
    for option, where in (("--policy-file", tmp_path / "mine.py"), ("--policies-from", tmp_path)):
        told = json.loads(trace("score", recorded, "--policies", "full", option, where, "--json"))
        assert {row["policy"] for row in told["results"]} == {"full", "mine:long"}


def test_wrong_use_of_score(trace, recorded, tmp_path):
    with pytest.raises(InputFileError, match="is no file: record a trace with packcache trace"):
        trace("score", tmp_path / "no.trace")
    with pytest.raises(InvalidSetting, match="unknown policy 'fifo'"):
        trace("score", recorded, "--policies", "fifo")
    with pytest.raises(InputFileError, match="is no file, expected a Python file"):
        trace("score", recorded, "--policy-file", tmp_path / "no.py")


# --- the leaderboard -----------------------------------------------------------------------------


def test_the_shipped_traces_are_small_and_of_both_kinds():
    paths = sorted(TRACES.glob("*.trace"))
    assert sum(path.stat().st_size for path in paths) < 6_000_000
    found = [Trace.load(path) for path in paths]
    assert {made.roles[0] for made in found} == {Role.IMAGE, Role.HISTORY}
    for made in found:
        assert len(made.clips) == 2 and len(made.roles) == 13
        assert made.workload["frames"] == 49 and made.layers == tuple(range(6))


def test_the_leaderboard_scores_the_librarys_policies_and_dropped_files(
    monkeypatch, capsys, tmp_path
):
    spec = importlib.util.spec_from_file_location(
        "leaderboard", ROOT / "benchmarks" / "leaderboard.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "mine.py").write_text(
        "from packcache.policies import SinkWindow\nmine = SinkWindow(sinks=2, frames=2)\n"
    )
    out = tmp_path / "leaderboard.json"
    words = ["leaderboard.py", "--policies-from", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    module.main()
    told = json.loads(out.read_text())
    assert told["schema"] == "packcache.leaderboard/1" and told["environment"]["python"]
    assert set(told["workload"]["files"]) == {"image.trace", "text.trace"}
    rows = {row["policy"]: row for row in told["results"]}
    assert {"full", "mine:mine", "paper, budget 0.5", "paper, budget 2", "none"} <= set(rows)
    assert {"fademem, budget 1", "deepforcing", "observed, budget 1", "window 2"} <= set(rows)
    assert not {"packcache, budget 1", "novelty x 2, budget 1"} & set(rows)  # each once
    assert rows["full"]["kept"]["mean"] == 1.0
    for row in rows.values():
        assert row["history"]["mean"] <= row["best"]["mean"] + 1e-9
    equal = [rows[f"{name}, budget 1"] for name in ("paper", "uniform", "random", "novelty")]
    assert {round(row["held"]["mean"]) for row in equal} == {160}
    assert f"{len(rows)} policies on 2 traces" in capsys.readouterr().out
    stored = json.loads((ROOT / "benchmarks" / "results" / "leaderboard.json").read_text())
    assert stored["workload"]["files"] == told["workload"]["files"]
    for row in stored["results"]:
        assert row["kept"] == pytest.approx(rows[row["policy"]]["kept"], abs=1e-6), row["policy"]
