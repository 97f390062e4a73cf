"""A whole evaluation, tiny: asked, stopped, gone on with, told, drawn; errors by their text."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

import packcache as pc
from packcache.cli import app
from packcache.environment import environment
from packcache.errors import InputError, InputFileError, InvalidSetting
from packcache.evaluate import evaluation_report
from packcache.evaluate.evaluation import Evaluation
from packcache.evaluate.evaluation_plot import PANELS, draw
from packcache.evaluate.protocol import (
    ClipsPlan,
    MemoryPlan,
    Primary,
    Protocol,
    ReplayPlan,
    Row,
    RunningPlan,
)
from tests.evaluate.asked import small
from tests.tools import ROOT

pytestmark = pytest.mark.usefixtures("quick_reader")

ROWS = (
    Row(label="full", policy="full", role="reference"),
    Row(label="again", policy="full"),
    Row(label="window", policy="window:frames=1"),
    Row(label="no image", policy="packcache", role="control", drops_image=True),
    Row(label="other draws", policy="full", role="floor", other_draws=True),
)
PRIMARIES = (
    Primary(name="recall", part="memory", better="more", no_worse=3.0),
    Primary(name="replay_kl", part="replay", better="less", no_worse=0.02),
    Primary(name="identity_drift", part="running", better="more", no_worse=5.0),
    Primary(name="motion_ratio", part="running", better="near", bounds=(0.8, 1.25)),
)


def protocol(**changed) -> Protocol:
    parts = {
        "replay": ReplayPlan(prompts=5, frames=13, known=(0.0,), true_prompts=1),
        "running": (RunningPlan(frames=13, prompts=5),),
        "memory": MemoryPlan(clips=2, gaps=(1,)),
        "primaries": PRIMARIES,
        "exclusions": ("none",),
    }
    return small(ROWS, **{**parts, **changed})


@pytest.fixture(scope="module")
def pipeline():
    loaded = pc.load("digits")
    return replace(loaded, sampling=replace(loaded.sampling, steps=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def asked(pipeline, folder) -> Evaluation:
    evaluation = Evaluation(pipeline, protocol(), folder)
    evaluation.run()
    return evaluation


@pytest.fixture(scope="module")
def result(asked):
    return asked.result()


def by_row(rows, name="row"):
    return {row[name]: row for row in rows}


def test_every_row_has_its_numbers(result):
    told = {(one["primary"], one["row"]) for one in result["primaries"]}
    everyone = {row.label for row in ROWS[1:]}
    assert {row for primary, row in told if primary == "motion_ratio"} == everyone
    assert {row for primary, row in told if primary == "recall"} == everyone - {"other draws"}
    assert {row for primary, row in told if primary == "replay_kl"} == everyone - {"other draws"}
    (plan,) = result["running"]
    assert set(by_row(plan["rows"])) == everyone | {"full", "ceiling", "floor"}
    assert json.loads(json.dumps(result, allow_nan=False))["schema"] == "packcache.evaluate/4"


def test_what_its_answers_took_is_told_of_all_of_them(asked, result):
    spent = result["spent"]
    assert spent["answers"] == spent["of"] == len(asked.known.found)
    assert spent["core_hours"] == round(sum(asked.known.seconds.values()) / 3600, 3) > 0
    assert spent["machines"] == {environment()["processor"]: spent["of"]}


def test_a_row_that_is_the_same_loses_nothing(result):
    for one in (one for one in result["primaries"] if one["row"] == "again"):
        assert one["lost"] == one["low"] == one["high"] == 0 and one["p"] == 1
    again = by_row(result["running"][0]["rows"])["again"]
    never = {"clips": 5, "never": 1.0, "code": None, "latent": None, "first_latent": None}
    assert again["diverged"] == never and set(again["curves"]["psnr"]["mean"]) == {100.0}
    assert set(again["excess"]["sharpness"]["mean"]) == {0.0}
    assert again["motion_ratio"]["low"] == again["motion_ratio"]["high"] == 1


def test_clips_are_the_full_caches_until_something_is_missed(asked, result):
    rows = by_row(result["running"][0]["rows"])
    assert rows["window"]["first_missed"] == {"text": 2, "image": 3}
    assert rows["full"]["first_missed"] == {"text": None, "image": None}
    diverged = asked.runnings[0].values("window", "diverged")
    kinds = np.array([case.with_image for case in asked.runnings[0].cases])
    assert (diverged[~kinds][~np.isnan(diverged[~kinds])] >= 2).all()
    psnr = rows["window"]["curves"]["psnr"]["mean"]
    assert psnr[:2] == [100.0, 100.0] and psnr[-1] < 100
    assert asked.runnings[0].values("other draws", "diverged")[0, 0] == 0
    assert rows["other draws"]["diverged"]["first_latent"] == 0
    parted = rows["window"]["diverged"]
    each = asked.runnings[0].clips.stored(ROWS[0], 0, 0).codes[0].numel()
    assert parted["first_latent"] >= 2 and parted["latent"] == parted["code"] // each
    assert set(rows["window"]["excess"]["sharpness"]["mean"][:2]) == {0.0}


def test_the_first_code_that_differs_is_found(asked, result):
    """By the stored clips, code by code."""
    running = asked.runnings[0]
    firsts = []
    for number in range(5):
        own, full = (
            running.clips.stored(asked.protocol.rows[label], number, 0)
            for label in ("window", "full")
        )
        pairs = zip(own.codes.flatten().tolist(), full.codes.flatten().tolist(), strict=True)
        firsts.append(next((n for n, (a, b) in enumerate(pairs) if a != b), np.inf))
    told = by_row(result["running"][0]["rows"])["window"]["diverged"]
    assert told["never"] == np.mean(np.isinf(firsts))
    middle = np.median(firsts)
    assert told["code"] == (None if np.isinf(middle) else int(middle))


def test_marks_say_when_a_cache_is_full_packs_and_slides(result):
    (plan,) = result["running"]
    rows = by_row(plan["rows"])
    assert rows["window"]["marks"]["text"] == {"fills": 0, "packs": 1, "slides": 1}
    assert rows["window"]["marks"]["image"] == {"fills": 1, "packs": 2, "slides": 2}
    assert set(rows["full"]["marks"]["text"].values()) == {None}
    assert rows["ceiling"]["marks"] is None


def test_a_given_frame_is_nobodys_work(asked):
    running = asked.runnings[0]
    given = np.array([case.with_image for case in running.cases])
    whole, made = running.values("full", "digit"), running.made("full", "digit")
    assert given.any() and not np.isnan(whole[given][:, :, 0]).any()
    assert np.isnan(made[given][:, :, 0]).all()
    np.testing.assert_array_equal(made[~given], whole[~given])
    np.testing.assert_array_equal(made[:, :, 1:], whole[:, :, 1:])
    told = by_row(asked.result()["running"][0]["rows"])["full"]["true"]["digit"]["mean"]
    assert told == pytest.approx(100 * np.nanmean(np.nanmean(made[:, 0], axis=1)))


def test_survival_is_of_clips_of_one_digit(asked, result):
    one = sum(case.scene.kind == "one" for case in asked.runnings[0].cases)
    assert 0 < one < 5  # the fourth scene has two
    assert by_row(result["running"][0]["rows"])["full"]["survival"]["clips"] == one


def test_what_drops_the_image_is_asked_of_clips_that_have_one(asked, result):
    told = {(one["primary"], one["row"]): one["prompts"] for one in result["primaries"]}
    images = sum(case.with_image for case in asked.replay.cases)
    assert told["replay_kl", "no image"] == images < told["replay_kl", "window"] == 5
    assert told["recall", "no image"] == 1 < told["recall", "window"] == 2  # every other one


def test_a_still_clip_stands_still_and_the_ceiling_is_high(result):
    rows = by_row(result["running"][0]["rows"])
    assert rows["floor"]["clip"]["flow_motion_top5_dis"]["mean"] == pytest.approx(0, abs=0.05)
    assert rows["floor"]["clip"]["frozen_share"]["mean"] == 1
    assert rows["ceiling"]["true"]["identity"]["mean"] > 90
    assert rows["ceiling"]["clip"]["flow_motion_top5_dis"]["mean"] > 1


def test_what_is_whole_misses_nothing(result):
    assert result["missing"] == {} and "COMPLETE" not in evaluation_report.lines(result)[0]


def test_drift_stands_beside_the_full_caches(result):
    rows = by_row(result["running"][0]["rows"])
    assert rows["full"]["drift"]["sharpness"]["excess"] is None
    assert rows["again"]["drift"]["sharpness"]["excess"]["mean"] == 0
    assert rows["window"]["drift"]["luminance"]["vde"] is not None


def test_it_goes_on_where_it_was_stopped(pipeline, folder, asked, result, monkeypatch):
    lines = (folder / "clips.jsonl").read_bytes()
    monkeypatch.setattr(type(pipeline), "run", lambda *a, **k: pytest.fail("asked again"))
    again = Evaluation(pipeline, protocol(), folder)
    again.run()
    assert (folder / "clips.jsonl").read_bytes() == lines
    monkeypatch.undo()
    told = again.result()
    assert json.dumps(told) == json.dumps(result)


def test_another_protocol_is_refused(pipeline, folder, asked):
    with pytest.raises(InputFileError, match="was begun with protocol '0', now it is '1'"):
        Evaluation(pipeline, protocol(hash="1"), folder)


def test_parts_by_themselves(pipeline):
    alone = Evaluation(pipeline, protocol(), parts=("memory",))
    with pytest.raises(InputError, match="nothing was evaluated yet"):
        alone.result()
    alone.run()
    told = alone.result()
    assert told["memory"] and not told["replay"] and not told["running"][0]["rows"]
    # three rows beside full along 5 clips, and all four along one true clip; 5 rows free-running
    # and the two that no policy makes, of each prompt
    assert told["missing"] == {"replay": 3 * 5 + 4, "run 13": 5 * 5 + 5}
    assert "NOT COMPLETE, missing: replay 19 clips" in evaluation_report.lines(told)[0]
    assert {one["primary"] for one in told["primaries"]} == {"recall"}
    assert "recall" in "\n".join(evaluation_report.lines(told))
    assert "<svg" in evaluation_report.render(told)
    with pytest.raises(InvalidSetting, match="unknown part 'memroy': known are memory, replay"):
        Evaluation(pipeline, protocol(), parts=("memroy",))  # type: ignore[arg-type]


def test_a_protocol_of_another_model_is_refused(pipeline):
    other = protocol(clips=ClipsPlan(model="lumos"))
    with pytest.raises(InvalidSetting, match="is of model 'lumos', this is 'digits'"):
        Evaluation(pipeline, other)


# --- what is told --------------------------------------------------------------------------------


def test_lines_say_what_the_controls_say(result):
    text = "\n".join(evaluation_report.lines(result))
    assert "control no image: " in text
    assert re.search(r"window .* lost ", text)
    with pytest.raises(InputFileError, match="this is schema 'x', expected"):
        evaluation_report.lines({"schema": "x"})


def test_the_report_needs_no_network_and_has_motion_before_what_stillness_flatters(result):
    page = evaluation_report.render(result)
    drawn = [panel for panel in PANELS if draw(result, panel) is not None]
    assert drawn == [panel for panel in PANELS if panel != "frontier"]  # no two sizes of anything
    assert not re.search(r'(src|href)="http', page) and page.count("<svg") == len(drawn)
    assert "$" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    for head in re.findall(r"<thead>(.*?)</thead>", page):
        if "smooth" in head or "warp" in head:
            assert head.index("motion") < head.index("frozen") < head.index("smooth")


def test_files_are_written_whole(result, tmp_path):
    paths = evaluation_report.save(result, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(paths)
    assert paths["evaluate.png"].read_bytes()[:4] == b"\x89PNG"
    assert json.loads(paths["evaluate.json"].read_text())["schema"] == "packcache.evaluate/4"


def test_an_unknown_panel(result):
    with pytest.raises(InvalidSetting, match="unknown panel 'pie': known are primaries"):
        draw(result, "pie")


def test_the_command_line_asks_and_makes_the_page(tmp_path):
    """A protocol of two rows and one memory clip; JSON on the terminal, files in the folder."""
    text = (ROOT / "benchmarks" / "protocol.toml").read_text()
    text = text.replace("gaps = [1, 2, 3, 4, 6]", "gaps = [1]").replace("clips = 256", "clips = 1")
    asked, out = tmp_path / "protocol.toml", tmp_path / "out"
    asked.write_text(text)
    command = ["evaluate", "run", "--protocol", str(asked), "--parts", "memory", "--device", "cpu"]
    ran = CliRunner().invoke(app, [*command, "--out", str(out), "--json"])
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert {row["row"] for row in told["memory"]} >= {"full", "rebase off"}
    assert json.loads((out / "evaluate.json").read_text()) == told
    page = tmp_path / "results.md"
    stored = ["--result", str(out / "evaluate.json")]
    ran = CliRunner().invoke(app, ["evaluate", "page", str(page), *stored])
    assert ran.exit_code == 0, ran.output
    assert "**Not complete**" in page.read_text() and "## Memory" in page.read_text()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--protocol none.toml", "none.toml cannot be read"),
        ("--quick 1", "prompts is 1, expected at least 2"),
        ("--quick 2 --parts pixels", "unknown part 'pixels'"),
    ],
)
def test_wrong_use_is_one_line(command, message):
    ran = CliRunner().invoke(app, ["evaluate", "run", *command.split()])
    assert ran.exit_code in (1, 2) and isinstance(ran.exception, SystemExit | Exception)
    assert message in (ran.output + str(ran.exception))


# --- what a review found --------------------------------------------------------------------------


def test_divergence_is_compared_over_the_same_frames(pipeline):
    """A row that gives up its first token later is not worse for having no harmless frames."""
    rows = (
        Row(label="full", policy="full", role="reference"),
        Row(label="soon", policy="window:frames=1", role="baseline"),
        Row(label="late", policy="window:frames=2"),
    )
    asked = small(rows, replay=ReplayPlan(prompts=4, frames=17, known=(0.0,)))
    found = Evaluation(pipeline, asked, parts=("replay",))
    found.run()
    result = found.result()
    soon, late = (found.replay.values(label)["kl"] for label in ("soon", "late"))
    assert (late[:, :3] == 0).all() and (late[:, 3:] > 0).all() and (soon[:, 2:] > 0).all()
    (told,) = (one for one in result["versus"] if one["row"] == "late")
    assert told["against"] == "soon" and told["metric"] == "replay_kl"
    assert told["mean"] == pytest.approx((late[:, 2:] - soon[:, 2:]).mean())
    own = {one["row"]: one["mean"] for one in result["primaries"]}
    assert own["late"] == pytest.approx(late[:, 3:].mean())  # of the row alone: since its own


def test_what_was_told_before_a_metric_was_there_is_asked_again(pipeline, asked, folder, tmp_path):
    ledger = (folder / "clips.jsonl").read_text().splitlines()
    older = []
    for line in map(json.loads, ledger):
        if line.get("key", ["", ""])[1] == "replay":
            line["values"].pop("lost", None)
        if str(line.get("key", ["", ""])[1]).startswith("run "):
            line["values"].pop("jitter", None)
        older.append(json.dumps(line))
    (tmp_path / "clips.jsonl").write_text("\n".join(older) + "\n")
    found = Evaluation(pipeline, protocol(), tmp_path)
    result = found.result()
    assert result["replay"] == [] and result["memory"]
    assert set(result["missing"]) == {"replay", "run 13"}


def test_without_the_still_clip_nothing_is_no_worse(pipeline, asked, folder, tmp_path):
    ledger = (folder / "clips.jsonl").read_text().splitlines()
    kept = [line for line in ledger if json.loads(line).get("key", [""])[0] != "floor"]
    assert len(kept) < len(ledger)
    (tmp_path / "clips.jsonl").write_text("\n".join(kept) + "\n")
    result = Evaluation(pipeline, protocol(), tmp_path).result()
    told = {one["why"] for one in result["primaries"] if one["primary"] == "identity_drift"}
    assert "the clip that stands still was not made: go on" in told
    assert result["missing"] == {"run 13": 5}


def test_machines_are_not_mixed(pipeline, folder, asked):
    moved = json.loads((folder / "clips.jsonl").read_text().splitlines()[0])["identity"]
    assert (moved["device"], moved["dtype"]) == ("cpu", "float32")
