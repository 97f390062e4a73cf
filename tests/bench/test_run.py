"""A run: who is measured when, what becomes of the numbers, and of rows that fail."""

from __future__ import annotations

import itertools
import json
import weakref

import pytest
import torch

from packcache.bench import run as running
from packcache.bench.predict import course_workload
from packcache.bench.run import bench
from packcache.bench.table import notes
from packcache.errors import CacheStateError, InvalidSetting
from packcache.lumos import course
from packcache.lumos.weights import parameter_count
from packcache.policies import FullCache, PackCache
from packcache.reuse import StepReuse
from tests.bench.fakes import CEILINGS, Fake, Log, maker
from tests.bench.workloads import workload

TWO = {"full": FullCache(), "packcache": PackCache()}
PRESETS = {"exact": StepReuse(), "fast": StepReuse(history_every=2, rest_every=2)}


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    monkeypatch.setattr(running, "measure", lambda _: CEILINGS)


def asked(**settings):
    """Latent frames 0 (given) to 4; 1, 2 and 4 are measured."""
    settings = {"policies": TWO, "presets": PRESETS, "repeats": 3, **settings}
    return workload(**{"measured_frames": (1, 2, 4), **settings})


def by_name(report):
    return {row.name: row for row in report.rows}


# --- who is measured when -----------------------------------------------------------------------


def test_rows_go_through_the_clip_together_and_take_turns():
    log = Log()
    bench(asked(), make=maker(log))
    rehearsed = [(frame, name) for event, name, frame in log.events if event == "rehearse"]
    assert [frame for frame, _ in rehearsed] == sorted(frame for frame, _ in rehearsed)
    names = ["full exact", "full fast", "packcache exact", "packcache fast"]
    warm, first = rehearsed[:4], [name for frame, name in rehearsed if frame == 1][4:]
    assert [name for _, name in warm] == names
    assert [first[n : n + 4] for n in (0, 4, 8)] == [names, names[::-1], names]
    last = [name for frame, name in rehearsed if frame == 4]  # once for the memory it takes
    assert last == names + names + names[::-1] + names
    advanced = [(frame, name) for event, name, frame in log.events if event == "advance"]
    assert advanced == list(itertools.product(range(5), names))


def test_baselines_stand_beside_the_reference():
    log = Log()
    bench(asked(baselines=("torch-full", "stock")), make=maker(log))
    order = [name for event, name, frame in log.events if event == "rehearse" and frame == 4]
    assert order[:3] == ["full exact", "torch-full exact", "stock exact"]


def test_all_is_predicted_before_anything_is_measured():
    log = Log()

    def start(report):
        assert log.events == [] and not report.complete
        assert all(row.predicted["last_s"] > 0 for row in report.rows)

    report = bench(asked(), make=maker(log), on_start=start)
    assert report.complete


def test_progress_ends_where_it_said():
    seen = []
    bench(asked(), make=maker(Log()), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 36) for n in range(1, 37)]


# --- numbers ------------------------------------------------------------------------------------


def test_last_and_total_are_sums_with_straight_lines_between():
    """Frames 1, 2, 4 take 2, 3, 5 s beside the forward's 0.5 and the packing of 0.001 x frame."""
    report = bench(asked(), make=maker(Log(), lambda name, frame, n: frame + 1.0))
    row = by_name(report)["full exact"]
    frames = [frame + 1.5 + 0.001 * (frame + 1) for frame in (1, 2, 3, 4)]
    assert row.frames() == pytest.approx(frames)
    assert row.last().value == pytest.approx(frames[-1])
    assert row.total().value == pytest.approx(0.25 + row.given_s + sum(frames))
    assert 0 <= row.given_s < 0.1
    assert row.sampled_frames == [1, 2, 4]
    assert row.kv_bytes == 5000


def test_medians_ignore_a_slow_moment_and_ratios_are_of_pairs():
    """The machine is ten times slower in every other repeat, for both rows alike."""

    def seconds(name, frame, n):
        return (4.0 if name == "full exact" else 1.5) * (10 if n % 2 else 1)

    report = bench(asked(repeats=7), make=maker(Log(), seconds))
    rows = by_name(report)
    faster = rows["packcache exact"].speedup_last(rows["full exact"])
    assert 2 < faster.low <= faster.value <= faster.high < 2.7
    itself = rows["full exact"].speedup_last(rows["full exact"])
    assert (itself.low, itself.high) == (1, 1)


def test_steps_are_sampled_in_exact_rows_only():
    log = Log()
    report = bench(asked(sampled_steps=2), make=maker(log))
    steps = {name: [s for n, s in log.steps if n == name] for name in by_name(report)}
    turns, warm = [[1, 3], []] * 3, [[0, 1]]  # each turn's once more, without any step
    assert steps["full exact"] == warm + turns + turns + warm + turns
    assert steps["packcache fast"] == [None] * (1 + 3 + 3 + 1 + 3)
    rows = by_name(report)
    assert rows["full exact"].seconds[1] == [2 * 1.0 + 0.5] * 3  # 2 of 4 steps stand for all
    assert rows["full fast"].seconds[1] == [1.5] * 3
    assert rows["full exact"].sampled_steps == 2 and rows["full fast"].sampled_steps is None


def test_what_a_frame_pays_once_does_not_count_for_every_step(monkeypatch):
    """0.2 of the second that two of four steps take are draws and tables."""
    monkeypatch.setattr(Fake, "once", 0.2)
    rows = by_name(bench(asked(sampled_steps=2), make=maker(Log())))
    assert rows["full exact"].seconds[4] == pytest.approx([0.2 + 2 * 0.8 + 0.5] * 3)
    assert rows["full fast"].seconds[4] == [1.5] * 3


def test_the_peak_has_the_work_of_the_last_frame_which_may_be_more(monkeypatch):
    """A frame's work makes a thousand bytes for each frame held, on top of 9000 allocated."""
    real = Fake.rehearse

    def rehearse(self, steps=None):
        made = torch.empty(1000 * self.frame, dtype=torch.uint8)
        return real(self, steps) if made.nbytes else None

    monkeypatch.setattr(Fake, "rehearse", rehearse)
    want = asked()
    weights = parameter_count(want.config) * want.dtype.itemsize
    for row in bench(want, make=maker(Log())).rows:
        assert row.peak_bytes == weights + 9000 + 4000
        assert row.peak_how == "sum: weights, cache, tensors counted of a frame's work"


# --- rows that fail -----------------------------------------------------------------------------


def failing(where, error):
    def fail(name, event, frame):
        if (name, event, frame) == where:
            raise error

    return fail


@pytest.mark.parametrize(
    "where, error, text",
    [
        (
            ("full fast", "rehearse", 2),
            RuntimeError("CUDA out of memory. Tried 9 GiB\nand more lines"),
            "CUDA out of memory. Tried 9 GiB",
        ),
        (("full exact", "advance", 0), RuntimeError("can't allocate memory"), "can't allocate"),
        (("packcache exact", "prefill", 0), InvalidSetting("no such thing"), "no such thing"),
    ],
    ids=["rehearse", "advance", "prefill"],
)
def test_a_row_that_fails_says_so_and_the_others_go_on(where, error, text):
    report = bench(asked(), make=maker(Log(), fail=failing(where, error)))
    rows = by_name(report)
    assert report.complete and rows[where[0]].reason.startswith(text)
    assert "\n" not in rows[where[0]].reason
    data = {f"{row['policy']} {row['preset']}": row for row in report.to_json()["results"]}
    assert data[where[0]]["total_s"] is None and data[where[0]]["speedup_last"] is None
    others = [row for name, row in data.items() if name != where[0]]
    assert len(others) == 3 and all(row["total_s"] > 0 for row in others)


def test_a_bug_is_not_taken_for_a_row_that_does_not_fit_and_leaves_what_was_measured():
    kept = []
    fail = failing(("packcache exact", "advance", 4), CacheStateError("a stale draft"))
    with pytest.raises(CacheStateError, match="a stale draft"):
        bench(asked(), make=maker(Log(), fail=fail), on_row=lambda r: kept.append(r.to_json()))
    last = kept[-1]["results"][0]
    assert not kept[-1]["complete"] and sorted(last["seconds"]) == [1, 2, 4]


def test_ctrl_c_keeps_finished_rows():
    """In the last repeat of the last frame, where rows go forwards: the third one is reached. Its
    first rehearsal there was for the memory."""
    calls = itertools.count(1)

    def fail(name, event, frame):
        if (name, event, frame) == ("packcache exact", "rehearse", 4) and next(calls) == 4:
            raise KeyboardInterrupt

    kept = []
    report = bench(asked(), make=maker(Log(), fail=fail), on_row=lambda r: kept.append(r))
    assert kept[-1] is report and not report.complete
    done = [row["complete"] for row in json.loads(json.dumps(report.to_json()))["results"]]
    assert done == [True, True, False, False]
    assert len(by_name(report)["packcache exact"].seconds[4]) == 2


def test_a_row_without_its_last_commit_is_not_finished():
    """Ctrl-C between its last measurement and the packing, without which LAST is not told."""
    fail = failing(("packcache exact", "advance", 4), KeyboardInterrupt())
    report = bench(asked(), make=maker(Log(), fail=fail))
    rows = {f"{row['policy']} {row['preset']}": row for row in report.to_json()["results"]}
    assert len(rows["packcache exact"]["seconds"][4]) == 3
    assert [row["complete"] for row in rows.values()] == [True, True, False, False]
    for row in rows.values():
        assert not row["complete"] or (row["kv_bytes"] == 5000 and 4 in row["bookkeeping"])


def test_rows_that_do_not_fit_beside_the_others_are_not_begun(monkeypatch):
    """The second full cache fits on top of the first; work on top is counted once."""
    need = bench(asked(), make=maker(Log())).rows[0].predicted["live_bytes"]
    full = course_workload(asked()).course(FullCache(), 5).step_bytes
    for memory, fitting in ((need, 1), (need + full, 2), (need - 1, 0)):
        monkeypatch.setattr(running, "found_memory", lambda _, memory=memory: memory)
        log = Log()
        exact = {"exact": StepReuse()}
        policies = {"full": FullCache(), "again": FullCache(), "third": FullCache()}
        report = bench(asked(presets=exact, policies=policies), make=maker(log))
        assert len({name for _, name, _ in log.events}) == fitting and report.complete
        assert [row.reason is None for row in report.rows] == [n < fitting for n in range(3)]
        for row in report.rows[fitting:]:
            assert "beside the weights and the other rows" in row.reason
            assert "ask for fewer rows at once" in row.reason


def test_a_row_that_ran_out_of_memory_gives_back_what_it_held_at_once():
    held = []

    def fail(name, event, frame):
        if (name, event, frame) == ("full exact", "rehearse", 1):
            raise RuntimeError("out of memory")
        held.append([ref() is not None for ref in refs])

    log, refs = Log(), []
    real = maker(log, fail=fail)

    def make(policy, preset):
        made = real(policy, preset)
        if policy == "full":
            refs.append(weakref.ref(made))
        return made

    bench(asked(presets={"exact": StepReuse()}), make=make)
    after = held[log.events.index(("rehearse", "full exact", 1)) :]
    assert after and not any(map(any, after))


def test_a_policy_that_cannot_fit_is_a_row_without_numbers():
    log = Log()
    policies = {"full": FullCache(), "narrow": PackCache(budget="2tok")}
    report = bench(asked(policies=policies), make=maker(log))
    rows = by_name(report)
    assert "budget 2tok is 2 tokens for a window of 4" in rows["narrow exact"].reason
    assert "narrow exact" not in {name for _, name, _ in log.events}
    assert report.to_json()["results"][0]["total_s"] > 0


# --- the real engine ----------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_real_engine_at_toy_size(task):
    """K/V to the byte as planned; memory counted is near what was planned; all parts are there."""
    given = int(task == "i2v")
    want = asked(task=task, repeats=1, measured_frames=(given, 4), baselines=("torch-full",))
    report = bench(want)
    weights = parameter_count(want.config) * want.dtype.itemsize
    for row in report.rows:
        assert row.reason is None and row.total().value > row.last().value > 0
        assert row.peak_bytes > weights + row.capacity_bytes and row.peak_how[:3] == "sum"
        assert row.peak_bytes <= 1.1 * row.predicted["live_bytes"]
        if row.policy in TWO:
            shares = row.shares()
            assert sum(shares.values()) == pytest.approx(1)
            assert set(shares) == {"attention", "linear", "head", "bookkeeping"}
            assert all(share > 0 for share in shares.values())
            clip = course.Workload(
                config=want.config, layout=want.layout, sampling=want.sampling, dtype=want.dtype,
                text_tokens=want.text_tokens, image=bool(given), prompts=1, positions="rebase",
                rebase="trained",
            )  # fmt: skip
            assert row.kv_bytes == clip.course(TWO[row.policy], want.latents).kv_bytes


def test_sampled_steps_count_the_commit_once_in_shares():
    """With every step sampled and with a few, shares are of a whole frame."""

    def shares(self, steps=None):
        return {"attention": 2.0 + 3.0 * len(steps), "head": 1.0 * len(steps)}

    log = Log()
    make = maker(log)

    def instrumented(policy, preset):
        fake = make(policy, preset)
        fake.shares = shares.__get__(fake)
        return fake

    report = bench(asked(sampled_steps=2, presets={"exact": StepReuse()}), make=instrumented)
    assert report.rows[0].spent == {"attention": 2.0 + 3.0 * 4, "head": 4.0}


def test_composed_rows_are_labelled_and_have_every_frame():
    baselines = "torch-full", "stock"
    want = asked(layers=1, repeats=2, baselines=baselines, measured_frames=(1, 2, 3, 4))
    report = bench(want, check=(1,))
    data = report.to_json()
    assert report.complete and data["workload"]["layers"] == 1
    *rows, plain, stock = data["results"]
    assert plain["reason"] == "torch-full is not composed: run it without --layers"
    assert stock["shares"] is None and stock["kernel_shares"] is None
    assert all("stock" in row["over"] for row in rows)
    assert sum("stock, composed: a step" in line for line in notes(data)) == 1
    for row in [*rows, stock]:
        assert row["composed"] and row["total_s"] > row["last_s"] > 0 and row["kv_bytes"] > 0
        assert len(row["frame_s"]) == 4 and row["sampled_frames"] is None
        assert row["peak_how"] == "planned" and row["peak_bytes"] == row["predicted"]["live_bytes"]
    assert [(one["layers"], one["part"]) for one in data["checked"]] == [
        (1, "steps"),
        (1, "forward"),
    ]


def interrupted(want, after):
    """A composed run that is stopped after so many runs of its probes, and their number a round."""
    seen, kept = [], []

    def progress(done, everything):
        seen.append(everything // (want.repeats + 1))
        if done == after(seen[0]):
            raise KeyboardInterrupt

    return bench(want, on_progress=progress, on_row=lambda r: kept.append(r.to_json())), kept


def test_ctrl_c_keeps_the_rounds_of_a_composed_run():
    """Two of nine rounds and a half, after the warm-up: rows are composed from two."""
    want = asked(layers=1, repeats=9, baselines=("torch-full",), measured_frames=(1, 2, 3, 4))
    report, kept = interrupted(want, lambda probes: 3 * probes + probes // 2)
    data = report.to_json()
    assert not report.complete and not data["complete"]
    *rows, plain = data["results"]
    assert len(rows) == 4 and plain["reason"].startswith("torch-full is not composed")
    for row in rows:
        assert row["complete"] and row["repeats"] == 2 and row["total_s"] > row["last_s"] > 0
    assert [one["results"][0]["repeats"] for one in kept] == [1, 2, 2]
    told = "\n".join(notes(data))
    assert "2 repeats: fewer than 7" in told and "not complete" in told


def test_ctrl_c_in_the_first_round_of_a_composed_run_leaves_no_row():
    want = asked(layers=1, repeats=2, measured_frames=(1, 2, 3, 4))
    report, _ = interrupted(want, lambda probes: probes + 1)
    assert not any(row["complete"] for row in report.to_json()["results"])
    assert report.reference is None


def test_weights_are_shared_and_the_device_is_asked(monkeypatch):
    from packcache.bench import candidates

    made = []
    real = candidates.make_model
    monkeypatch.setattr(candidates, "make_model", lambda w: made.append(w) or real(w))
    make = candidates.maker(asked())
    one, two = make("full", "exact"), make("packcache", "fast")
    assert len(made) == 1 and one.decoder.model is two.decoder.model
    assert one.decoder.device == torch.device("cpu")
