"""What stands in the JSON and in the table, and how rows of two runs come together."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from packcache.bench import run as running
from packcache.bench.compose import Checked
from packcache.bench.pieces import Estimate
from packcache.bench.predict import frame_traffic, predict_row
from packcache.bench.result import SCHEMA, Report, earlier_rows
from packcache.bench.rows import RowResult
from packcache.bench.table import measured_lines, notes, predicted_lines, seconds_text, title
from packcache.errors import InputError
from packcache.lumos.units import show_bytes
from packcache.policies import FullCache, PackCache, SlidingWindow
from packcache.reuse import StepReuse
from tests.bench.fakes import CEILINGS, Log, maker, report
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
    row.spent = {"attention": 3.0, "linear": 1.0, "head": 0.0}
    row.bookkeeping = dict.fromkeys(row.generated, 0.0)
    data = made.to_json()["results"][0]
    assert data["shares"]["attention"] == 0.75
    wanted = row.predicted["kernel_s"]["attention"] / (0.75 * data["last_s"])
    assert data["kernel_shares"]["attention"] == pytest.approx(wanted)
    assert set(data["kernel_shares"]) == {"attention", "linear"}


def test_upstreams_parts_are_not_held_against_kernels(made):
    *_, stock = made.rows
    stock.spent = {"attention": 3.0, "linear": 1.0, "commit": 1.0}
    data = made.to_json()["results"][-1]
    assert data["policy"] == "stock" and data["shares"] and data["kernel_shares"] is None


def test_packing_is_told_as_a_share_of_the_last_frame(made):
    """The frames before the first eviction pack nothing."""
    row = made.rows[0]
    assert row.bookkeeping[4] == max(row.bookkeeping.values()) == 0.005
    assert row.bookkeeping_share() == pytest.approx(0.005 / 4.005)


def test_operations_and_bytes_are_said_by_kind(made):
    want = made.workload
    for row in made.rows[:2]:
        said = row.predicted
        whole = predict_row(want, FullCache(), want.presets[row.preset], CEILINGS)
        assert said["operations"]["last"] == dataclasses.asdict(whole.work[-1])
        assert sum(said["operations"]["total"].values()) == sum(whole.operations)
        held, reuse = said["held"], want.presets[row.preset]
        read = [frame_traffic(want, held[0], given=True, reuse=reuse)]
        read += [frame_traffic(want, tokens, reuse=reuse) for tokens in held[1:]]
        assert said["bytes"]["last"] == dataclasses.asdict(read[-1])
        assert said["bytes"]["total"]["attention"] == sum(one.attention for one in read)


# --- rows of two runs ---------------------------------------------------------------------------


def test_rows_are_read_as_they_were_written(made):
    data = json.loads(json.dumps(made.to_json()))
    for row, one in zip(made.rows, data["results"], strict=True):
        again = RowResult.from_json(one)
        assert again.composed is None and again.ceilings == CEILINGS
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
    text = "\n".join(measured_lines(second))
    assert "not side by side" in text
    assert "note: full exact, full fast: latent frames 1, 4 were measured, straight" in text
    assert "note: packcache exact, packcache fast: latent frames 1, 2, 4 were measured" in text


def test_predictions_of_two_runs_meet_at_the_ceilings_of_one(monkeypatch):
    """The second run finds the machine half as fast at matrices: ratios are by its ceilings."""
    want = asked(policies={"full": FullCache()}, presets={"exact": StepReuse()})
    first = json.loads(json.dumps(report(want, seconds).to_json()))
    slow = dataclasses.replace(CEILINGS, matmul=CEILINGS.matmul / 2)
    monkeypatch.setattr(running, "measure", lambda _: slow)
    more = asked(policies={"packcache": PackCache()}, presets={"exact": StepReuse()})
    made = running.bench(more, make=maker(Log(), seconds), before=earlier_rows(first, more))
    full, packed = json.loads(json.dumps(made.to_json()))["results"]
    said = [predict_row(more, p, StepReuse(), slow) for p in (FullCache(), PackCache())]
    assert packed["predicted_last"] == pytest.approx(said[0].last_s / said[1].last_s)
    assert packed["predicted_total"] == pytest.approx(said[0].total_s / said[1].total_s)
    assert packed["predicted"]["speedup_last"] == packed["predicted_last"]
    for row, own in ((full, CEILINGS), (packed, slow)):
        assert row["ceilings"] == dataclasses.asdict(own)
        policy = FullCache() if row is full else PackCache()
        floor = predict_row(more, policy, StepReuse(), own).floor_s[-1]
        assert row["floor_share"] == pytest.approx(floor / row["last_s"])


def failed(text):
    def fail(name, event, frame):
        if (name, event, frame) == ("full exact", "rehearse", 4):
            raise RuntimeError(text) if text else KeyboardInterrupt

    return fail


@pytest.mark.parametrize("text", ["out of memory: 9 GiB", ""], ids=["memory", "ctrl-c"])
def test_a_row_that_cannot_be_measured_again_stays(text):
    want = asked(policies={"full": FullCache()})
    first = json.loads(json.dumps(report(want, seconds).to_json()))
    again = report(want, seconds, before=earlier_rows(first, want), fail=failed(text))
    full, fast = again.to_json()["results"]
    assert (full["run"], full["complete"], full["last_s"]) == (
        0,
        True,
        first["results"][0]["last_s"],
    )
    assert (fast["run"], fast["complete"]) == (1 if text else 0, True)
    told = "full exact: the earlier row stays, it could not be measured again: out of memory: 9 GiB"
    assert (told in "\n".join(measured_lines(again.to_json()))) == bool(text)
    assert again.complete == bool(text)


def test_a_row_that_did_not_fit_says_so_after_more_rows_too():
    want = asked(policies={"full": FullCache()})
    first = report(want, seconds, fail=failed("out of memory: 9 GiB")).to_json()
    more = asked(policies={"packcache": PackCache()})
    second = report(more, seconds, before=earlier_rows(json.loads(json.dumps(first)), more))
    data = json.loads(json.dumps(second.to_json()))
    assert [row["complete"] for row in data["results"]] == [False, True, True, True]
    assert "full exact: no numbers: out of memory: 9 GiB" in measured_lines(data)
    third = report(want, seconds, before=earlier_rows(data, want)).to_json()
    names = [(row["policy"], row["preset"], row["complete"]) for row in third["results"]]
    assert sorted(names) == [(p, r, True) for p in ("full", "packcache") for r in ("exact", "fast")]


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
        (("environment", "commit"), "0ld", "the result there was measured with commit '0ld'"),
        (("environment", "python"), "2.7", "the result there was measured with python '2.7'"),
        (("environment", "packcache"), "0", "the result there was measured with packcache '0'"),
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


def test_composed_rows_are_not_added_to():
    """Neither by another composed run nor by a real one."""
    want = asked(layers=1, measured_frames=(1, 2, 3, 4), policies={"full": FullCache()})
    data = json.loads(json.dumps(report(want).to_json()))
    assert all(row["composed"] is True and row["complete"] for row in data["results"])
    for other in (want, asked()):
        with pytest.raises(InputError) as error:
            earlier_rows(data, other)
        assert str(error.value) == (
            "the rows there are composed, and the pieces they are made of are in no file: measure "
            "all rows in one run, without --append"
        )


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
    fast = made.find("packcache", "fast")
    assert line[44:55].strip() == seconds_text(sum(fast.frames()) / 4) == "0.503 s"


def test_bytes_are_printed_before_the_run(made):
    (head,) = (x for x in predicted_lines(made.to_json()) if x.startswith("predicted"))
    (line,) = (x for x in predicted_lines(made.to_json()) if x.startswith("window fast"))
    read = sum(made.find("window", "fast").predicted["bytes"]["total"].values())
    assert head.split()[1:3] == ["operations", "reads"]
    assert line[:47].endswith(show_bytes(read))


def test_predictions_refer_to_the_full_cache_wherever_it_stands():
    want = asked(policies={"packcache": PackCache(), "full": FullCache()})
    begun = Report.begin(want, CEILINGS).to_json()
    lines = predicted_lines(begun)
    assert any(line.startswith("* times faster than full exact") for line in lines)
    (full,) = (line for line in lines if line.startswith("full exact"))
    assert full.count("1.00x") == 2
    made = report(want, seconds).to_json()
    for said, row in zip(begun["results"], made["results"], strict=True):
        assert said["predicted"]["speedup_last"] == row["predicted_last"]


def test_composed_stands_in_the_title_and_its_check_has_a_verdict():
    want = asked(layers=1, measured_frames=(1, 2, 3, 4), policies={"full": FullCache()})
    made = report(want)
    assert "toy (random weights, composed), image-to-video" in title(made.to_json())
    assert ", composed" not in title(report(asked(), seconds).to_json())
    one = Estimate.of(1.0, [1.0])
    for ratio, verdict in ((1.04, "met"), (0.94, "missed")):
        made.checked = [
            Checked(layers=4, part=part, frame=1, steps=(0,), repeats=3, measured=one,
                    composed=one, ratio=Estimate.of(ratio, [ratio]))
            for part in ("steps", "forward")
        ]  # fmt: skip
        steps, commit = (line for line in notes(made.to_json()) if "really run" in line)
        assert "4 layers, steps 0 of latent frame 1, medians of 3: 1.00 s and 1.00 s" in steps
        assert "4 layers, commit of latent frame 1" in commit
        assert steps.endswith(f"within 5%: {verdict}")


def test_a_preset_that_reuses_nothing_is_said():
    presets = {"exact": StepReuse(), "fast": StepReuse(), "both": StepReuse(rest_every=2)}
    made = report(asked(policies={"full": FullCache()}, presets=presets)).to_json()
    told = [line for line in notes(made) if "preset" in line]
    assert told == ["note: preset fast reuses nothing with 4 steps: its rows are exact"]


def test_enough_repeats_need_no_note_but_for_what_was_measured_once():
    made = report(asked(repeats=7, measured_frames=(1, 2, 3, 4)), seconds).to_json()
    assert [line for line in measured_lines(made) if line.startswith("note")] == [
        "note: packing and rebase, prefill and given frames were measured once: intervals leave "
        "out how they vary"
    ]


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
    ]


@pytest.mark.parametrize(
    "seconds, text",
    [(1234.4, "1234 s"), (12.34, "12.3 s"), (1.234, "1.23 s"), (0.1234, "0.123 s"),
     (0.001234, "1.23 ms")],
)  # fmt: skip
def test_seconds_in_words(seconds, text):
    assert seconds_text(seconds) == text
