"""What stands in the JSON and in the table, and how rows of two runs come together."""

from __future__ import annotations

import copy
import json

import pytest

from packcache.bench.result import SCHEMA, Report, earlier_rows
from packcache.bench.rows import RowResult
from packcache.bench.table import measured_lines, predicted_lines, seconds_text, title
from packcache.errors import InputError
from packcache.policies import FullCache, PackCache, SlidingWindow
from packcache.reuse import StepReuse
from tests.bench.fakes import CEILINGS, report
from tests.bench.workloads import workload

POLICIES = {"full": FullCache(), "window": SlidingWindow(), "packcache": PackCache()}
PRESETS = {"exact": StepReuse(), "fast": StepReuse(history_every=2, rest_every=2)}

#: What issue 5 wants of a row.
WANTED = {
    "policy", "preset", "total_s", "last_s", "frame_s", "kv_bytes", "peak_bytes", "speedup_total",
    "speedup_last", "predicted_total", "predicted_last", "floor_share", "composed",
}  # fmt: skip


def asked(**settings):
    settings = {"policies": POLICIES, "presets": PRESETS, "repeats": 3, **settings}
    return workload(**{"measured_frames": (1, 4), **settings})


def seconds(name, frame, repeat):
    """Full 4 s, window 2, packcache 1, stock 8; fast is half of it."""
    policy, preset = name.split()
    whole = {"full": 4.0, "window": 2.0, "packcache": 1.0, "stock": 8.0}[policy]
    return whole / (2 if preset == "fast" else 1) - 0.5


@pytest.fixture(scope="module")
def made() -> Report:
    return report(asked(baselines=("stock",)), seconds)


def test_a_result_says_all_that_was_asked_for(made):
    data = json.loads(json.dumps(made.to_json()))
    assert data["schema"] == SCHEMA and data["complete"]
    assert {"environment", "workload", "ceilings", "results"} <= set(data)
    assert data["ceilings"] == {"matmul": 4e9, "attention": 1e9, "copy": 1e12}
    assert data["reference"] == "full exact"
    work = data["workload"]
    assert work["policies"]["packcache"] == "PackCache(budget=1, window=4)"
    assert work["presets"]["fast"] == {"history_every": 2, "history_share": 0.0, "rest_every": 2}
    assert list(work["policies"]) == list(POLICIES) and work["baselines"] == ["stock"]
    for row in data["results"]:
        assert set(row) >= WANTED and row["complete"]
        assert len(row["frame_s"]) == 4
        for name in ("total_s", "last_s", "speedup_total", "speedup_last"):
            low, high = row[f"{name}_interval"]
            assert low <= row[name] <= high
    rows = [(row["policy"], row["preset"]) for row in data["results"]]
    assert rows == [(p, r) for p in POLICIES for r in PRESETS] + [("stock", "exact")]


def test_ratios_are_against_the_full_cache_exact(made):
    rows = {f"{r['policy']} {r['preset']}": r for r in made.to_json()["results"]}
    assert rows["full exact"]["speedup_last"] == rows["full exact"]["predicted_last"] == 1
    assert rows["packcache exact"]["speedup_last"] == pytest.approx(4, rel=0.02)
    assert rows["packcache fast"]["speedup_last"] == pytest.approx(8, rel=0.02)
    assert rows["stock exact"]["speedup_last"] == pytest.approx(0.5, rel=0.02)
    assert rows["packcache fast"]["over"]["stock"]["speedup_last"] == pytest.approx(16, rel=0.02)
    assert rows["packcache fast"]["over"]["window"]["speedup_last"] == pytest.approx(2, rel=0.02)
    said = rows["packcache fast"]["predicted"]
    first = rows["full exact"]["predicted"]
    assert rows["packcache fast"]["predicted_last"] == first["last_s"] / said["last_s"] > 1
    share = rows["full exact"]["floor_share"]
    assert share == pytest.approx(first["floor_last_s"] / rows["full exact"]["last_s"])


def test_packings_share_is_told_at_equal_reuse(made):
    shares = {(s["policy"], s["preset"]): s for s in made.to_json()["equal_reuse"]}
    assert set(shares) == {(p, r) for p in ("window", "packcache") for r in PRESETS}
    assert shares["packcache", "fast"]["speedup_last"] == pytest.approx(4, rel=0.02)
    assert (
        shares["packcache", "fast"]["predicted_last"]
        < shares["packcache", "exact"]["predicted_last"]
    )


def test_without_a_full_cache_the_first_row_is_the_reference():
    made = report(asked(policies={"window": SlidingWindow()}), seconds).to_json()
    assert made["reference"] == "window exact" and made["equal_reuse"] == []


def test_kernels_are_held_against_their_ceilings():
    """Attention 3 s of 4: its share of the ceiling is what was predicted over 3 s."""
    made = report(asked(presets={"exact": StepReuse()}), seconds)
    row = made.rows[0]
    row.spent, row.bookkeeping = {"attention": 3.0, "linear": 1.0, "head": 0.0}, {}
    data = made.to_json()["results"][0]
    assert data["shares"]["attention"] == 0.75
    wanted = row.predicted["kernel_s"]["attention"] / (0.75 * data["last_s"])
    assert data["kernel_shares"]["attention"] == pytest.approx(wanted)
    assert set(data["kernel_shares"]) == {"attention", "linear"}


# --- rows of two runs ---------------------------------------------------------------------------


def test_rows_are_read_as_they_were_written(made):
    data = json.loads(json.dumps(made.to_json()))
    for row, one in zip(made.rows, data["results"], strict=True):
        again = RowResult.from_json({**one, "composed": None})
        assert again.seconds == row.seconds and again.bookkeeping == row.bookkeeping
        assert again.total().value == row.total().value and again.frames() == row.frames()


def test_a_second_run_adds_its_rows_and_refers_to_the_first():
    want = asked(policies={"full": FullCache()})
    first = json.loads(json.dumps(report(want, seconds).to_json()))
    more = asked(policies={"packcache": PackCache()}, measured_frames=(1, 2, 4))
    second = report(more, seconds, before=earlier_rows(first, more)).to_json()
    names = [f"{row['policy']} {row['preset']}" for row in second["results"]]
    assert names == ["full exact", "full fast", "packcache exact", "packcache fast"]
    assert second["reference"] == "full exact"
    assert [row["paired"] for row in second["results"]] == [True, True, False, False]
    assert [row["run"] for row in second["results"]] == [0, 0, 1, 1]
    assert second["results"][2]["speedup_last"] == pytest.approx(4, rel=0.02)
    assert set(second["workload"]["policies"]) == {"full", "packcache"}
    assert second["results"][0]["sampled_frames"] == [1, 4]
    assert "not side by side" in "\n".join(measured_lines(second))


def test_a_row_measured_again_takes_the_olds_place():
    want = asked(policies={"full": FullCache()})
    first = report(want, seconds).to_json()
    again = report(want, seconds, before=earlier_rows(first, want))
    assert [(row.name, row.run) for row in again.rows] == [("full exact", 1), ("full fast", 1)]


@pytest.mark.parametrize(
    "path, value, text",
    [
        (("schema",), "packcache.plan/1", "the result there has schema 'packcache.plan/1'"),
        (("environment", "torch"), "1.0", "the result there was measured with torch '1.0'"),
        (("workload", "steps"), 50, "the result there was measured with steps 50, this run has 4"),
        (("workload", "size"), [9, 9], "the result there was measured with size [9, 9]"),
    ],
)
def test_rows_of_something_else_are_refused(made, path, value, text):
    data = copy.deepcopy(made.to_json())
    target = data
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value
    with pytest.raises(InputError) as error:
        earlier_rows(data, asked())
    assert str(error.value).startswith(text) and str(error.value).endswith("choose another --out")


# --- the table ----------------------------------------------------------------------------------


def test_the_table_fits_a_console_and_has_every_row(made):
    data = made.to_json()
    for lines in (predicted_lines(data), measured_lines(data)):
        assert max(map(len, lines)) <= 120
        for row in made.rows:
            assert any(line.startswith(f"{row.name} ") for line in lines)
    text = "\n".join(measured_lines(data))
    assert "3 repeats: fewer than 7, intervals say little" in text
    assert "latent frames 1, 4 were measured, straight lines between them" in text
    assert "packing's share" in text and "times faster than full exact" in text
    (line,) = (x for x in measured_lines(data) if x.startswith("packcache fast") and "%" in x[80:])
    assert "(" in line and "x " in line


def test_enough_repeats_need_no_note():
    made = report(asked(repeats=7, measured_frames=(1, 2, 3, 4)), seconds).to_json()
    assert not any(line.startswith("note") for line in measured_lines(made))


def test_rows_without_numbers_say_why():
    def fail(name, event, frame):
        if name == "window fast" and frame == 4:
            raise RuntimeError("out of memory: 9 GiB")

    made = report(asked(), seconds, fail=fail).to_json()
    lines = measured_lines(made)
    assert lines[-1] == "window fast: no numbers: out of memory: 9 GiB"
    assert sum(line.startswith("window fast") for line in lines) == 1


def test_sampled_steps_and_interruptions_are_said():
    made = report(asked(sampled_steps=2), seconds).to_json()
    assert "2 of 4 steps were measured" in "\n".join(measured_lines(made))
    made["complete"] = False
    assert "not complete" in "\n".join(measured_lines(made))


def test_predictions_stand_before_any_measurement():
    begun = Report.begin(asked(), CEILINGS).to_json()
    lines = predicted_lines(begun)
    assert lines[0] == title(begun) and lines[1].startswith("ceilings: matrix product 4 G")
    assert [line[:18] for line in measured_lines(begun)] == [
        "note: not complete",
        "note: 3 repeats: f",
        "note: latent frame",
    ]


@pytest.mark.parametrize(
    "seconds, text",
    [(1234.4, "1234 s"), (12.34, "12.3 s"), (1.234, "1.23 s"), (0.1234, "0.123 s"),
     (0.001234, "1.23 ms")],
)  # fmt: skip
def test_seconds_in_words(seconds, text):
    assert seconds_text(seconds) == text
