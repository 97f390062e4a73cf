"""The page of results: claims by their intervals, nothing typed, tags everywhere."""

from __future__ import annotations

import copy
import json
import re

import pytest
from typer.testing import CliRunner

from packcache.bench.paper import cost_section, read_benchmark
from packcache.cli import app
from packcache.errors import InputFileError, OutputError
from packcache.evaluate import cells
from packcache.evaluate.cells import DRIFTS
from packcache.evaluate.claims import ABLATIONS, CLAIMS, Claim
from packcache.evaluate.protocol import REGISTERED, read_protocol
from packcache.evaluate.results_page import read_evaluation, render
from packcache.evaluate.running_tables import is_compared
from tests.test_docs import NUMBER, TAGS, blocks
from tests.tools import ROOT

SUMMARY = {"clips": 8, "mean": 0.5, "low": 0.4, "high": 0.6}
SIGNED = {"mean": -0.5, "low": -0.6, "high": -0.4}
ROW = {
    "row": "packcache 2",
    "true": dict.fromkeys(("identity", "digit", "colour", "count"), SUMMARY),
    "clip": {"flow_motion_top5_dis": SUMMARY, "direction": SUMMARY, "held": SUMMARY},
    "diverged": {"clips": 8, "never": 0.25, "code": 532, "latent": 3, "first_latent": 2},
    "likeness": {"psnr": SUMMARY, "ssim": SUMMARY},
    "motion_ratio": {"mean": 1.0, "low": 0.9, "high": 1.1},
    "survival": {"steps": [{"survival": 1.0, "low": 0.9, "high": 1.0},
                           {"survival": 0.5, "low": 0.25, "high": 0.75}]},
    "drift": {name: {"signed": SIGNED, "excess": SIGNED} for name, _, _, _ in DRIFTS},
}  # fmt: skip
FULL = {
    **ROW, "row": "full", "diverged": None, "motion_ratio": None,
    "drift": {name: {"signed": SIGNED, "excess": None} for name, _, _, _ in DRIFTS},
}  # fmt: skip
RESULT = {
    "schema": "packcache.evaluate/4",
    "missing": {"run 49": 3},
    "spent": {
        "core_hours": 7.25, "core_hours_of_all": 9.5, "answers": 30, "of": 40,
        "machines": {"one": 5, "two": 10},
    },
    "environment": {
        "processor": "a", "cores": 2, "device": "cpu", "torch": "2", "python": "3",
        "packcache": "0", "commit": "c",
    },
    "workload": {
        "protocol": "abc", "exploratory": "cut to 8 prompts", "quick": 8, "model": "digits",
        "primaries": [{"name": "recall"}],
        "rows": {
            "full": {"role": "reference"}, "packcache 2": {"role": "policy"},
            "window 2": {"role": "baseline"},
        },
    },
    "primaries": [
        {
            "primary": "recall", "row": "window 2", "against": "full", "prompts": 8,
            "reference": 50.0, "mean": 10.0, "lost": 40.0, "low": 30.0, "high": 50.0, "p": 0.001,
            "p_holm": 0.01, "verdict": "worse", "why": "",
        }
    ],
    "controls": [
        {
            "primary": "recall", "row": "random drop", "against": "packcache 2", "prompts": 8,
            "reference": 50.0, "mean": 38.0, "lost": 12.0, "low": 11.0, "high": 13.0, "p": 0.001,
            "p_holm": 0.003, "verdict": "told apart", "why": "",
        }
    ],
    "power": [
        {"control": "random drop", "on": ["recall"], "against": "packcache 2",
         "beside": ["recall"]},
        {"control": "rebase off", "on": [], "against": "packcache 2", "beside": []},
    ],
    "versus": [
        {
            "row": "packcache 2", "against": "window 2", "metric": "recall", "mean": -2.0,
            "low": -3.0, "high": -1.0, "p": 0.01,
        }
    ],
    "memory": [
        {
            "row": "full", "gap": 1, "held": 1280.0,
            "recall": {"mean": 90.0, "low": 80.0, "high": 95.0},
        }
    ],
    "replay": [
        {
            "row": "window 2", "kl": SUMMARY, "agreement": SUMMARY, "lost": SUMMARY,
            "nll": SUMMARY,
            "nll_full": SUMMARY, "nll_true": None,
        }
    ],
    "running": [
        {
            "frames": 49, "latents": 13, "rows": [FULL, ROW], "gate": None,
            "versus": [
                {
                    "row": "packcache 2", "against": "window 2", "metric": "identity", "mean": 0.1,
                    "low": 0.05, "high": 0.15, "p": 0.02,
                }
            ],
        }
    ],
}  # fmt: skip


def test_a_claim_is_judged_by_the_whole_interval():
    claim = CLAIMS[2]
    up, down, both = ({"low": a, "high": b} for a, b in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1)))
    assert claim.verdict(up) == "holds here"
    assert claim.verdict(down) == "does not hold here"
    assert claim.verdict(both) == "cannot be told"
    assert claim.verdict(None) == "*not run*"
    less = Claim(text="", row="", against="", metric="", sign=-1)
    assert less.verdict(up) == "does not hold here" and less.verdict(down) == "holds here"
    near = Claim(text="", row="", against="", metric="", least=-0.15)
    assert near.verdict(both) == "holds here"


def test_as_good_as_is_asked_only_where_it_means_something():
    near = CLAIMS[0]
    same = {"row": near.row, "against": near.against, "metric": near.metric, "mean": 0.0,
            "low": -0.01, "high": 0.01, "p": 1.0}  # fmt: skip
    plan = {**RESULT["running"][0], "frames": near.frames, "versus": [same]}

    def verdict(gate: str | None, low: float, high: float) -> str:
        row = {**ROW, "motion_ratio": {"mean": 1.0, "low": low, "high": high}}
        told = {**RESULT, "running": [{**plan, "gate": gate, "rows": [FULL, row]}]}
        return near.verdict(near.find(told), near.gate(told))

    assert verdict(None, 0.9, 1.1) == "holds here"
    assert verdict("a still clip", 0.9, 1.1) == "not asked: a still clip"
    assert verdict(None, 0.7, 1.1) == "not asked: it moves 1.00 (0.70 to 1.10) times as much"
    same.update(low=-0.3, high=-0.2)  # what is worse is worse all the same
    assert verdict("a still clip", 0.9, 1.1) == "does not hold here"


def test_what_stillness_flatters_has_motion_beside_it():
    claims = [c for c in (*CLAIMS, *ABLATIONS) if c.metric.startswith(("warp", "flow_interp"))]
    assert len(claims) == 3
    for claim in claims:
        pair = {"row": claim.row, "against": claim.against, "p": 0.5, **SUMMARY}
        told = [{**pair, "metric": name} for name in (claim.metric, "flow_motion_top5_dis")]
        plan = {**RESULT["running"][0], "frames": claim.frames, "versus": told}
        words = claim.told({**RESULT, "running": [plan]})
        assert words.endswith("; motion +0.50 (+0.40 to +0.60) px")


def test_no_page_wears_a_name_of_vbench():
    """Their dimensions are measured with their networks; ours have names of their own."""
    names = "subject consistency|background consistency|temporal flickering|motion smoothness"
    names += "|dynamic degree|aesthetic quality|imaging quality|i2v subject|i2v background"
    wears = re.compile(names.replace(" ", "[ _]"), re.IGNORECASE)
    assert wears.search("dynamic degree") and wears.search("Motion_Smoothness")
    assert not wears.search(render(RESULT, "evaluate.json", ablations=ABLATED))
    assert not wears.search((ROOT / "docs" / "results.md").read_text())


def test_the_page_says_what_was_found():
    page = render(RESULT, "evaluate.json")
    assert (
        "| 48 frames: better than a sliding window of as many tokens | "
        "+10.0 (+5.0 to +15.0) points | 0.02 | holds here |" in page
    )
    assert (
        "| and remember more of it (recall) | -2.0 (-3.0 to -1.0) points | 0.02 | "
        "does not hold here |" in page
    )
    assert page.count("*not run*") == len(CLAIMS) - 2
    assert "stands in a protocol of hash `abc`" in page and "was fixed in" not in page
    told = "told from full on recall; from packcache 2 on recall"
    assert f"control random drop: {told} (" in page
    assert (
        "NOT told from full: this suite has no power against it; from packcache 2 on noth" in page
    )
    assert "| random drop | packcache 2 | recall | 8 | +12 (+11 to +13) points | 0.003 |" in page
    assert "| packcache 2 | 25 % | 532 (latent frame 3) | 0.5 (0.4 to 0.6) |" in page
    assert "| 50 % (25 to 75) | 1.00 (0.90 to 1.10) |" in page
    assert "| packcache 2 | more than full's | -50.0 (-60.0 to -40.0) |" in page
    assert "| packcache 2 | 8 | 0.50 (0.40 to 0.60) |" in page  # prompts, then motion
    assert "| full | its own | -50.0 (-60.0 to -40.0) |" in page
    assert "What it buys" not in page and "One setting moved" not in page
    assert "NOT told from full" in page and "**Exploratory**: cut to 8 prompts" in page
    assert "worse" in page and "90 %" in page
    assert "| window 2 | 0.5000 (0.4000 to 0.6000) |" in page
    assert "told at c; clips and answers took 7.2 hours of one core for 30 of 40, some 9.5 " in page
    assert "by means of their kind (5 on one; 10 on two; the others do not say) (*emb" in page
    whole = copy.deepcopy(RESULT)
    whole["spent"]["core_hours_of_all"] = None
    assert "for 30 of 40 (5 on one" in render(whole, "evaluate.json")
    whole["spent"]["of"] = 30
    whole["spent"]["machines"] = {"one": 30}
    assert "took 7.2 hours of one core (30 on one) (*emb" in render(whole, "evaluate.json")
    whole["spent"]["answers"] = 0
    assert "told at c (" in render(whole, "evaluate.json")
    whole["workload"]["exploratory"], whole["missing"] = None, {}
    whole["workload"]["protocol"] = next(iter(REGISTERED))
    assert "**Not complete**: missing are run 49 3 clips." in page
    told = render(whole, "evaluate.json")
    assert "**Exploratory**" not in told and "Not complete" not in told
    assert "was fixed in `benchmarks/protocol.toml`" in told


def test_what_everything_took_stands_beside_what_it_was_to_take():
    page = render(RESULT, "evaluate.json", ablations=ABLATED)
    assert "19.0 hours of one core, so 9.5 hours where 2 cores share them evenly (comp" in page
    silent = copy.deepcopy(ABLATED)
    silent["spent"]["core_hours_of_all"] = None
    assert "share them" not in render(RESULT, "evaluate.json", ablations=silent)


ABLATED = {
    **copy.deepcopy(RESULT),
    "workload": {
        "protocol": "def", "exploratory": "not by a registered protocol", "quick": None,
        "replay": {"prompts": 48},
        "memory": {"clips": 48},
        "rows": {
            "full": {"policy": "full", "role": "reference"},
            "packcache 2": {"policy": "packcache:budget=2", "role": "baseline"},
            "floor 3 of 5": {"policy": "packcache:budget=5", "role": "baseline"},
            "floor 2 of 5": {"policy": "packcache:budget=5,min_share=0.25", "role": "policy"},
        },
    },
    "memory": [{"row": "floor 2 of 5", "gap": gap, "held": 100.0 * gap} for gap in (1, 6)],
    "primaries": [
        {"primary": "replay_kl", "row": "packcache 2", "mean": 0.5},
        {"primary": "replay_kl", "row": "floor 2 of 5", "mean": 0.75},
        {"primary": "recall", "row": "floor 2 of 5", "mean": 40.0},
    ],
    "versus": [
        {"row": "floor 2 of 5", "against": base, "metric": "replay_kl", "mean": 0.25, "low": 0.2,
         "high": 0.3, "p": 0.03}
        for base in ("packcache 2", "floor 3 of 5")
    ],
    "running": [
        {
            "frames": 97, "latents": 10, "gate": None,
            "versus": [
                {"row": "packcache 2", "against": "full", "metric": name, "p": 0.5, **SUMMARY}
                for name in ("identity", "flow_motion_top5_dis")
            ],
            "rows": [{**ROW, "curves": {"jitter": {"mean": [None, *range(9)]}}}],
        }
    ],
}  # fmt: skip
BENCH = json.loads((ROOT / "benchmarks" / "results" / "bench_3b_i2v_48.json").read_text())
COST = cost_section([BENCH])


def test_what_rounds_to_nothing_has_no_sign():
    other = copy.deepcopy(RESULT)
    other["replay"][0]["kl"] = {"mean": -6e-10, "low": -1e-9, "high": 4e-11}
    assert "| window 2 | 0.0000 (0.0000 to 0.0000) |" in render(other, "evaluate.json")


def test_losses_are_told_by_whole_intervals():
    page = render(RESULT, "evaluate.json")
    assert "No interval of identity and no verdict says so." in page
    falls = "49 frames: its identity falls by 50.0 (40.0 to 60.0) points from the first frames to"
    assert falls in page and "No interval of identity or recall says so." not in page
    other = copy.deepcopy(RESULT)
    versus = other["running"][0]["versus"]
    common = {"against": "full", "metric": "identity", "p": 0.01}
    versus.append({"row": "packcache 2", "mean": -0.2, "low": -0.3, "high": -0.1, **common})
    versus.append({"row": "window 2", "mean": 0.2, "low": 0.1, "high": 0.3, **common})
    versus.append({"row": "window 2", "mean": 0.2, "low": -0.1, "high": 0.3, **common})
    page = render(other, "evaluate.json")
    lost, failed = page.split("## Where the full cache itself fails")
    assert "49 frames: packcache 2 beside full, identity: -20.0 (-30.0 to -10.0) points (" in lost
    told = "- 49 frames: window 2 beside full, identity: +20.0 (+10.0 to +30.0) points ("
    assert failed.count(told) == 1
    forgets = {"row": "full", "gap": 6, "held": 1.0, "recall": {"mean": 20.0, "low": 15.0}}
    for high, count in ((39.0, 1), (41.0, 0)):  # half of 80, the least after the shortest gap
        forgets["recall"]["high"] = high
        again = render({**RESULT, "memory": [*RESULT["memory"], forgets]}, "evaluate.json")
        assert again.count("- recall after 6 latent frames: 20.0 (15.0 to") == count
    other["primaries"][0]["row"] = "packcache 2"
    told = "- recall: worse than full, by 40 points (30 to 50; *embedded model*)"
    assert told in render(other, "evaluate.json")


@pytest.mark.parametrize(
    "claims, protocol", [(CLAIMS, "protocol.toml"), (ABLATIONS, "ablations.toml")]
)
def test_every_claim_is_about_rows_that_are_told_beside_each_other(claims, protocol):
    asked = read_protocol(ROOT / "benchmarks" / protocol)
    for claim in claims:
        row, against = asked.rows[claim.row], asked.rows[claim.against]
        if claim.frames is None:
            window = against.policy.startswith("window:")
            assert against.role == "baseline" or window, claim.text
            continue
        (plan,) = [plan for plan in asked.running if plan.frames == claim.frames]
        assert plan.count(row.label) and plan.count(against.label), claim.text
        assert is_compared(row, against), claim.text


def test_settings_that_were_moved_stand_beside_the_base():
    page = render(RESULT, "evaluate.json", ablations=ABLATED)
    told = "| floor 2 of 5 | `packcache:budget=5,min_share=0.25` | 600 | 0.750 | +0.250"
    assert f"{told} (+0.200 to +0.300) | 40.0 | - |" in page
    assert "| packcache 2 | `packcache:budget=2` | - | 0.500 | - | - | - |" in page
    assert "| full | `full` |" not in page
    assert "| than one of 2 | +0.250 (+0.200 to +0.300) nats | 0.03 | holds here |" in page
    assert page.count("*not run*") == len(CLAIMS) - 2 + len(ABLATIONS) - 1
    # latent frames 1 to 4 hold 0, 1, 2, 3; 9 alone holds 8
    assert "| motion, px | latent frames | 1 to 4 | 5 to 8 | 9 to 9 |" in page
    assert "| packcache 2 | 0.50 (0.40 to 0.60) | jitter px | 1.50 | 5.50 | 8.00 |" in page
    # motion against budget: what is held, motion, and both differences from full
    half, points = "+0.50 (+0.40 to +0.60)", "+50.0 (+40.0 to +60.0)"
    assert f"| packcache 2 | 0 | 0.50 (0.40 to 0.60) | {half} | {points} |" in page


def test_speed_is_told_from_stored_benchmarks_beside_the_papers():
    page = render(RESULT, "evaluate.json", cost=cost_section([BENCH]))
    (row,) = [
        line
        for line in page.splitlines()
        if "48 frames, cpu, composed, *random weights* | packcache" in line
    ]
    found = next(
        one for one in BENCH["results"] if (one["policy"], one["preset"]) == ("packcache", "exact")
    )
    low, high = found["speedup_total_interval"]
    assert f"| {found['speedup_total']:.2f} ({low:.2f} to {high:.2f}) |" in row
    assert "TOTAL 1.75, LAST 2.64" in row
    other = copy.deepcopy(BENCH)
    for one in other["results"]:
        one["speedup_total_interval"], one["speedup_last_interval"] = [1.0, 1.7], [2.0, 3.0]
    page = render(RESULT, "evaluate.json", cost=cost_section([other]))
    assert "TOTAL does not hold here, LAST cannot be told" in page


def test_the_command_takes_all_three(tmp_path):
    for name, result in (("a.json", RESULT), ("b.json", ABLATED), ("c.json", BENCH)):
        (tmp_path / name).write_text(json.dumps(result))
    page = tmp_path / "results.md"
    call = ["evaluate", "page", str(page), "--result", str(tmp_path / "a.json")]
    call += ["--ablations", str(tmp_path / "b.json"), "--bench", str(tmp_path / "c.json")]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert page.read_text() == render(
        RESULT, "a.json", ablations=ABLATED, cost=cost_section([BENCH])
    )


def test_pictures_lie_where_the_page_says(tmp_path):
    page, folder = tmp_path / "pages" / "results.md", tmp_path / "images"
    for made in (page.parent, folder):
        made.mkdir()
    result = ROOT / "benchmarks" / "results" / "quick" / "evaluate.json"
    call = ["evaluate", "page", str(page), "--result", str(result), "--pictures", str(folder)]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    told = page.read_text()
    for panel in ("drift", "frontier"):
        assert f"](../images/{panel}.png)" in told
        assert (folder / f"{panel}.png").read_bytes().startswith(b"\x89PNG")
    assert told.index("drift.png") < told.index("## Replay") < told.index("frontier.png")


def test_what_there_is_nothing_to_draw_of_is_left_out(tmp_path):
    bare = {**copy.deepcopy(RESULT), "memory": [], "running": []}
    (tmp_path / "a.json").write_text(json.dumps(bare))
    call = ["evaluate", "page", str(tmp_path / "p.md"), "--result", str(tmp_path / "a.json")]
    done = CliRunner().invoke(app, [*call, "--pictures", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "![" not in (tmp_path / "p.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "p.md"]


def test_a_folder_for_pictures_that_is_missing_leaves_no_page(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RESULT))
    call = ["evaluate", "page", str(tmp_path / "p.md"), "--result", str(tmp_path / "a.json")]
    error = CliRunner().invoke(app, [*call, "--pictures", str(tmp_path / "no")]).exception
    assert isinstance(error, OutputError) and "no does not exist: create it" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_is_no_benchmark_is_refused(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"schema": "x"}))
    with pytest.raises(InputFileError, match=r"has schema .x., expected .packcache\.bench/1"):
        read_benchmark(path)


def test_every_number_has_its_tag():
    for block in blocks(
        render(RESULT, "evaluate.json", ablations=ABLATED, cost=cost_section([BENCH]))
    ):
        if NUMBER.search(re.sub(r"`[^`]*`", "", block)):
            assert any(f"*{tag}*" in block for tag in TAGS), block


def test_what_is_no_evaluation_is_refused(tmp_path):
    path = tmp_path / "evaluate.json"
    path.write_text(json.dumps({"schema": "x"}))
    with pytest.raises(InputFileError, match=r"has schema .x., expected .packcache\.evaluate"):
        read_evaluation(path)
    with pytest.raises(InputFileError, match=r"none\.json does not exist: .* evaluate run --out$"):
        read_evaluation(tmp_path / "none.json")


def test_rows_are_told_beside_the_first_ones():
    """Paired, in points of identity; a row is not told beside itself, nor the reference at all."""
    pair = {"metric": "identity", "mean": 0.1, "low": 0.05, "high": 0.15, "prompts": 9, "p": 0.1}
    labels = ["full", "a", "b", "c", "d"]
    plan = {
        "rows": [{"row": label} for label in [*labels, "still"]],
        "versus": [
            {**pair, "row": row, "against": other}
            for other in labels
            for row in labels[1:]
            if row != other
        ],
    }
    head, rows = cells.beside_each_other(plan)
    assert head == ("row", *(f"more than {other}" for other in ("full", "a", "b", "c")))
    told = "+10.0 (+5.0 to +15.0)"
    assert rows == [
        ["a", told, "-", told, told],
        ["b", told, told, "-", told],
        ["c", told, told, told, "-"],
        ["d", told, told, told, told],
    ]
    assert cells.beside_each_other({**plan, "versus": []})[1] == []
