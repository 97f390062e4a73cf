"""The truth table: same clips for the same seed, ceilings and floors in their places, errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import packcache as pc
from packcache.cli import app
from packcache.errors import InvalidSetting
from packcache.evaluate import table as tables

TARGETS = {target.name: target for target in tables.TARGETS}


@pytest.fixture(scope="module")
def pipeline():
    return pc.load("digits")


@pytest.fixture(scope="module")
def small(pipeline) -> tables.Table:
    return tables.truth_table(pipeline, clips=5, frames=9, memory_clips=1, late_clips=0)


def test_cases_are_three_of_one_digit_and_one_of_two_half_with_an_image():
    drawn = tables.cases(64)
    kinds = [case.scene.kind for case in drawn]
    assert kinds.count("two") == 16 and kinds.count("one") == 48
    assert sum(case.with_image for case in drawn) == 32
    assert tables.cases(8) == drawn[:8]
    assert len({case.seed for case in drawn}) == 64


def test_rows_hold_every_target_with_ceiling_and_floor(small):
    rows = {row["name"]: row for row in small.rows()}
    assert list(rows) == list(TARGETS)
    assert rows["digit"]["measured"]["clips"] == 4  # the fifth shows two digits
    assert rows["colour"]["measured"]["clips"] == 5
    assert rows["direction"]["floor"]["mean"] == 0  # a frozen clip goes nowhere
    assert rows["direction"]["ceiling"]["mean"] == 100
    assert rows["late_digit"]["measured"] is None
    assert rows["psnr"]["measured"]["mean"] > rows["psnr_box"]["measured"]["mean"] > 19
    assert 0 <= rows["recall"]["measured"]["mean"] + 100 / 60 <= 100


def test_a_worse_clip_makes_a_worse_row(small):
    """What the table says follows from the clips: dark clips show nothing."""
    case = tables.cases(1)[0]
    dark = tables._attributes(case, case.judge(np.zeros((9, 96, 96, 3), np.uint8)))
    assert dark["digit"] == dark["colour"] == dark["count"] == 0
    assert small.measured["count"][0] > 0


def test_decibels_are_those_of_the_mean_error():
    errors = np.array([0.01, 0.0001, np.nan])
    summary = tables._summary(errors, "dB")
    assert summary and summary["clips"] == 2
    assert summary["mean"] == pytest.approx(-10 * np.log10(0.00505))
    assert summary["low"] <= summary["mean"] <= summary["high"]


def test_json_is_plain_and_names_its_workload(small):
    result = json.loads(json.dumps(small.to_json()))
    assert result["schema"] == "packcache.truth/1"
    assert result["workload"]["clips"] == 5 and result["workload"]["sampling"]["steps"] == 12
    assert 0.97 < result["workload"]["reader_accuracy"] <= 1
    assert {"digit", "digit, from text", "position, from an image"} <= set(result["attributes"])
    assert any("direction right" in line for line in small.lines())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clips": 0}, "clips is 0, expected at least 1"),
        ({"clips": 4, "late_clips": 9}, "late_clips is 9, expected at most the 3 one-digit clips"),
    ],
)
def test_bad_counts_are_one_line(pipeline, settings, message):
    with pytest.raises(InvalidSetting, match=message):
        tables.truth_table(pipeline, **settings)


def run(command: str, *more: str):
    return CliRunner().invoke(app, [*command.split(), *more])


def test_command_writes_json_and_prints_the_table(tmp_path):
    out = tmp_path / "out"
    short = "--clips 1 --frames 5 --memory-clips 0 --late-clips 0"
    made = run(f"evaluate truth {short} --out", str(out))
    assert made.exit_code == 0, made.output
    assert "digit right, one-digit clips" in made.output
    assert json.loads((out / "truth.json").read_text())["workload"]["frames"] == 5
    assert not list(out.glob("*.partial"))


def test_memory_command_writes_json_and_picture(tmp_path):
    short = "--clips 2 --gaps 1 --policies full,window"
    made = run(f"evaluate memory {short} --out", str(tmp_path))
    assert made.exit_code == 0, made.output
    assert "full" in made.output and "held" in made.output
    result = json.loads((tmp_path / "memory_history.json").read_text())
    assert [row["policy"] for row in result["results"]] == ["full", "window"]
    assert (tmp_path / "memory_history.svg").read_text().startswith("<?xml")


def test_json_is_printed_instead_of_a_table():
    for command, schema in (
        ("truth --clips 1 --frames 5 --memory-clips 0 --late-clips 0", "packcache.truth/1"),
        ("memory --clips 1 --gaps 1 --policies full", "packcache.memory/1"),
    ):
        made = run(f"evaluate {command} --json")
        assert json.loads(made.output)["schema"] == schema


def test_the_anchor_source_asks_for_dropped_anchors():
    made = run("evaluate memory --clips 2 --gaps 2 --source anchor")
    assert made.exit_code == 0, made.output
    assert "control dropped anchors at gap 2" in made.output
    assert "window 3" not in made.output  # the policies of the anchor source are fewer


def test_judged_clips_and_the_seed_reach_the_result():
    made = run("evaluate memory --clips 1 --judged 1 --gaps 1 --policies full --seed 5 --json")
    result = json.loads(made.output)
    assert (result["workload"]["judged"], result["workload"]["seed"]) == (1, 5)
    assert result["results"][0]["returned_object"]["clips"] == 1


def test_a_refused_run_leaves_no_folder(tmp_path):
    made = run("evaluate memory --clips 1 --gaps 1,x --out", str(tmp_path / "new"))
    assert made.exception and not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    made = run("evaluate truth --clips 1 --out", str(tmp_path / "file"))
    assert "is a file, expected a folder" in str(made.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gaps", "1,x"], "gaps is '1,x', expected numbers such as 1,2,4"),
        (["--gaps", "0"], "gap is 0"),
        (["--source", "image"], "source is 'image', expected history or anchor"),
    ],
)
def test_wrong_use_of_memory_is_one_line(options, message):
    made = run("evaluate memory --clips 1", *options)
    assert isinstance(made.exception, InvalidSetting) and message in str(made.exception)
