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


def test_record_samples_a_long_clip_and_says_so(trace, tmp_path):
    out = tmp_path / "a.trace"
    said = trace(
        "record", "--clips", 1, "--frames", 17, "--steps", 1, "--clip-memory", "150kB", "--out", out
    )
    assert "of 5 latent frames, 3 of them sampled, 6 samples of 6 layers" in said
    made = Trace.load(out)
    assert made.workload["sampled_latent_frames"] == [0, 2, 4]
    table = trace("score", out, "--policies", "window,packcache:order=observed")
    assert "160 history tokens held" in table
    with pytest.raises(InvalidSetting, match=r"clip memory is 9\.8 KiB, expected at least .* KiB"):
        trace("record", "--clips", 1, "--frames", 17, "--clip-memory", "10kB", "--out", out)


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


def test_a_calibration_is_a_row(trace, recorded, tmp_path):
    """Where policies are given by name, so is what `packcache calibrate` wrote."""
    file = tmp_path / "mine.json"
    told = {"schema": "packcache.calibration/1", "settings": {"budget": 1, "window": 3}}
    file.write_text(json.dumps(told))
    spelled = "packcache:budget=1,window=3"
    mine, own = (
        trace("score", recorded, "--policies", f"full,{text}").splitlines()
        for text in (file, spelled)
    )
    row = next(line for line in mine if line.split()[0] == "mine")
    assert row.split()[1:] == next(line for line in own if spelled in line).split()[1:]


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


def test_a_label_that_is_known_is_refused(trace, recorded, tmp_path):
    """Two files of one stem, each with a policy of one name: one row would hide the other."""
    for folder, frames in (("a", 2), ("b", 3)):
        own = f"from packcache.policies import SlidingWindow\nlong = SlidingWindow(frames={frames})"
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(own)
    one, other = (["--policy-file", tmp_path / folder / "mine.py"] for folder in "ab")
    for more in (other, ["--policies-from", tmp_path / "b"]):
        with pytest.raises(InvalidSetting, match="policy 'mine:long' is there twice") as raised:
            trace("score", recorded, "--policies", "full", *one, *more)
        assert "SlidingWindow(frames=2) and SlidingWindow(frames=3)" in str(raised.value)
        assert "\n" not in str(raised.value)


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


@pytest.fixture
def leaderboard(monkeypatch, tmp_path, capsys):
    """Run the script as it is run, its stored result and folder of policies elsewhere."""
    spec = importlib.util.spec_from_file_location(
        "leaderboard", ROOT / "benchmarks" / "leaderboard.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STORED", tmp_path / "stored.json")
    monkeypatch.setattr(module, "OWN", tmp_path / "policies")

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["leaderboard.py", *map(str, words)])
        module.main()
        return capsys.readouterr().out

    return run


MINE = "from packcache.policies import SinkWindow\nmine = SinkWindow(sinks=2, frames=2)\n"


def same(stored, found) -> None:
    """Equal in every name, and in every number but for rounding."""
    assert type(stored) is type(found)
    if isinstance(stored, dict):
        assert stored.keys() == found.keys()
        for name, value in stored.items():
            same(value, found[name])
    elif isinstance(stored, list):
        for one, other in zip(stored, found, strict=True):
            same(one, other)
    else:
        assert stored == (pytest.approx(found, abs=1e-6) if type(found) is float else found)


def test_the_leaderboard_is_what_is_stored(leaderboard, tmp_path):
    """Every row and every number of it, in seconds; the stored one has a commit to go back to."""
    said = leaderboard()
    told = json.loads((tmp_path / "stored.json").read_text())
    stored = json.loads((ROOT / "benchmarks" / "results" / "leaderboard.json").read_text())
    for result in (told, stored):
        assert result["schema"] == "packcache.leaderboard/1" and result["environment"]["python"]
        assert set(result["workload"]["files"]) == {"image.trace", "text.trace"}
        assert result["workload"].pop("seconds") < 300
    assert not stored["environment"]["commit"].endswith("+")
    same(stored["workload"], told["workload"])
    same(stored["results"], told["results"])
    assert f"{len(told['results'])} policies on 2 traces" in said


def test_a_number_that_differs_would_be_seen():
    for one, other in (({"a": [1.0]}, {"a": [1.1]}), ({"a": 1}, {"b": 1}), ([1], [1, 2]), (0.0, 0)):
        with pytest.raises((AssertionError, ValueError)):
            same(one, other)


def test_the_leaderboard_scores_the_librarys_policies_and_dropped_files(leaderboard, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    leaderboard("--policies-from", tmp_path, "--out", tmp_path / "mine.json")
    told = json.loads((tmp_path / "mine.json").read_text())
    rows = {row["policy"]: row for row in told["results"]}
    assert {"full", "mine:mine", "paper, budget 0.5", "paper, budget 2", "none"} <= set(rows)
    assert {"fademem, budget 1", "deepforcing", "observed, budget 1", "window 2"} <= set(rows)
    assert not {"packcache, budget 1", "novelty x 2, budget 1"} & set(rows)  # each once
    assert rows["full"]["kept"]["mean"] == 1.0
    for row in rows.values():
        assert row["history"]["mean"] <= row["best"]["mean"] + 1e-9
    equal = [rows[f"{name}, budget 1"] for name in ("paper", "uniform", "random", "novelty")]
    assert {round(row["held"]["mean"]) for row in equal} == {160}


@pytest.mark.parametrize("words", [[], ["--policies-from", "named"]])
def test_rows_of_files_are_printed_and_leave_the_stored_result_alone(
    leaderboard, tmp_path, monkeypatch, words
):
    """Of the folder that is always looked into, and of one that is named."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ("named" if words else "policies")
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    said = leaderboard(*words)
    assert "  mine:mine " in said and "nothing was written, with rows of" in said
    assert "name a file with --out" in said and not (tmp_path / "stored.json").exists()
