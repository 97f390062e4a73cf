"""Several processes find what one does, whoever is killed in between."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import packcache as pc
from packcache.cli import app
from packcache.errors import GenerationError, InvalidSetting, OutputError
from packcache.evaluate import workers
from packcache.evaluate.clips import Share, batches, place_of
from packcache.evaluate.evaluation import Evaluation
from packcache.evaluate.protocol import MemoryPlan, Protocol, ReplayPlan, Row, RunningPlan
from packcache.evaluate.table import cases
from packcache.evaluate.workers import Job, gather, locked, run_in
from tests.evaluate.asked import small
from tests.tools import ROOT

pytestmark = pytest.mark.usefixtures("quick_reader")

ROWS = (
    Row(label="full", policy="full", role="reference"),
    Row(label="window", policy="window:frames=1"),
)


def protocol() -> Protocol:
    return small(
        ROWS,
        replay=ReplayPlan(prompts=5, frames=9, known=(0.0,), true_prompts=1),
        running=(RunningPlan(frames=9, prompts=5, prompts_of={"window": 1}),),
        memory=MemoryPlan(clips=2, gaps=(1, 2)),
    )


@pytest.fixture(scope="module")
def pipeline():
    loaded = pc.load("digits")
    return replace(loaded, sampling=replace(loaded.sampling, steps=1))


@pytest.fixture(scope="module")
def alone(pipeline, tmp_path_factory):
    whole = Evaluation(pipeline, protocol(), tmp_path_factory.mktemp("alone"))
    whole.run()
    return whole


@pytest.fixture(scope="module")
def shared(pipeline, alone, tmp_path_factory):
    """The folder of two shares that ran, one after another, and were not taken in yet."""
    folder = tmp_path_factory.mktemp("shared")
    Evaluation(pipeline, protocol(), folder)
    keys = []
    for number in range(2):
        own = Evaluation(pipeline, protocol(), folder, share=Share(number=number, of=2))
        own.run()
        keys.append(set(own.known.found))
    assert keys[0] and keys[1] and not keys[0] & keys[1]  # nothing is made twice
    return folder


def test_shares_together_are_the_whole(pipeline, alone, shared):
    pieces = sorted(path.name for path in shared.glob("clips.*.jsonl"))
    assert pieces == ["clips.0.jsonl", "clips.1.jsonl"]
    found = Evaluation(pipeline, protocol(), shared)
    assert not found.known.found
    gather(found.known, shared)
    assert found.known.found == alone.known.found and found.missing == {}
    assert [path.name for path in shared.iterdir()] == ["clips.jsonl"]
    assert Evaluation(pipeline, protocol(), shared).known.found == alone.known.found


def test_a_share_knows_what_the_folder_does(pipeline, alone):
    folder = alone.known.path.parent
    own = Evaluation(pipeline, protocol(), folder, share=Share(number=1, of=2))
    assert own.missing == {} and own.known.path.name == "clips.1.jsonl"
    own.known.path.unlink()


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_a_batch_has_one_place_however_many_clips_there_are(of):
    """So that a process finds its own shorter clips and its own reference."""
    shares = [Share(number=number, of=of) for number in range(of)]
    places: dict[int, int] = {}
    for count in (4, 32, 128):
        chosen = cases(count)
        for numbers in batches(chosen, range(count), 8):
            place = place_of(chosen, numbers)
            assert places.setdefault(numbers[0], place) == place
            assert sum(share.takes(place) for share in shares) == 1


def cut_down(tmp_path):
    """The shipped protocol, cut to what takes seconds: memory of two rows."""
    text = (ROOT / "benchmarks" / "protocol.toml").read_text()
    head, *rows = text.split("[[row]]")
    kept = [row for row in rows[:-1] if '"full"\npolicy' in row or '"window 1"' in row]
    tail = rows[-1][rows[-1].index("\n# At most four") :]
    start = head[: head.index("# Clips made with each row's own cache")]
    memory = "running = []\n\n[memory]\nclips = 2\ngaps = [1, 2]\n\n"
    schema, rest = start.split("\n[clips]", 1)
    running, gaps = memory.split("\n", 1)
    path = tmp_path / "small.toml"
    path.write_text(
        f"{schema}{running}\n\n[clips]{rest}{gaps}"
        + "".join("[[row]]" + row for row in kept)
        + tail
    )
    return path


def test_progress_is_of_the_parts_that_are_wanted(pipeline, tmp_path):
    whole = Evaluation(pipeline, protocol(), tmp_path)
    assert whole.left == sum(whole.missing.values())
    memory = Evaluation(pipeline, protocol(), tmp_path, parts=("memory",))
    assert memory.left == memory.missing["memory"] == 2 * 2 * 2
    freely = Evaluation(pipeline, protocol(), tmp_path, parts=("running",))
    prompts = protocol().running[0].prompts  # of each two more that no policy makes
    assert freely.left == freely.missing["run 9"] == 6 + prompts


def test_two_processes_by_command(tmp_path):
    asked, out = cut_down(tmp_path), tmp_path / "out"
    out.mkdir()
    call = ["evaluate", "run", "--protocol", str(asked), "--parts", "memory", "--out", str(out)]
    done = CliRunner().invoke(app, [*call, "--workers", "2"])
    assert done.exit_code == 0, done.output
    result = json.loads((out / "evaluate.json").read_text())
    assert {row["row"] for row in result["memory"]} == {"full", "window 1"}
    assert "memory" not in result["missing"]
    assert not list(out.glob("clips.*.jsonl"))


def test_a_process_that_fails_is_told_and_the_rest_is_kept(pipeline, shared, monkeypatch, tmp_path):
    class Dead:
        exitcode = 1

        def __init__(self, target, args, daemon):
            job, folder, share, _ = args
            own = Evaluation(pipeline, job.protocol, folder, share=share)
            own.known.add((f"of {share.number}",), {"identity": 1})

        def start(self): ...
        def join(self, seconds=0): ...
        def terminate(self): ...
        def is_alive(self):
            return False

    class Context:
        Process = Dead

    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda kind: Context)
    whole = Evaluation(pipeline, protocol(), tmp_path)
    job = Job(protocol=protocol(), parts=("memory",))
    with pytest.raises(GenerationError, match=r"^2 of 2 processes failed \(exit code 1\)"):
        run_in(tmp_path, whole, job, workers=2)
    assert set(whole.known.found) == {("of 0",), ("of 1",)}
    with pytest.raises(InvalidSetting, match=r"^workers is 0, expected at least 1$"):
        run_in(tmp_path, whole, job, workers=0)


def test_a_folder_is_one_runs_at_a_time(pipeline, tmp_path):
    busy = pytest.raises(OutputError, match=r" is in use by another evaluation: wait for it$")
    with locked(tmp_path / "new"), busy, locked(tmp_path / "new"):
        pass
    with locked(tmp_path / "new"):  # it was given back
        whole = Evaluation(pipeline, protocol(), tmp_path / "new", parts=("memory",))
        run_in(tmp_path / "new", whole, Job(protocol=protocol(), parts=("memory",)))
    assert whole.left == 0


def test_a_busy_folder_is_left_as_it_is(tmp_path):
    """Its ledger is not even read: reading drops what looks like a line that was cut off."""
    out = tmp_path / "out"
    with locked(out):
        (out / "clips.jsonl").write_text("half a li")
        call = ["evaluate", "run", "--quick", "2", "--parts", "memory", "--out", str(out)]
        done = CliRunner().invoke(app, call)
    assert isinstance(done.exception, OutputError)
    assert (out / "clips.jsonl").read_text() == "half a li"


def _wait(told, folder):
    """A process that goes on for a minute unless its parent is gone."""
    import threading

    threading.Thread(target=workers._end_with_parent, daemon=True).start()
    (folder / "child").write_text(str(os.getpid()))
    told.set()
    time.sleep(60)


def _parent(folder):
    context = multiprocessing.get_context("spawn")
    told = context.Event()
    child = context.Process(target=_wait, args=(told, folder), daemon=True)
    child.start()
    told.wait()
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_end_with_a_parent_that_was_killed(tmp_path):
    """They would write beside those of the next run."""
    parent = multiprocessing.get_context("spawn").Process(target=_parent, args=(tmp_path,))
    parent.start()
    parent.join()
    child = int((tmp_path / "child").read_text())
    for _ in range(200):
        if not _lives(child):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the process outlived its parent")


def _lives(number: int) -> bool:
    """Does a process run? One that ended and was not waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{number}/status").read_text()
    except OSError:
        return False


def test_processes_need_a_folder():
    done = CliRunner().invoke(app, ["evaluate", "run", "--workers", "2"])
    assert isinstance(done.exception, InvalidSetting)
    assert str(done.exception) == "workers is 2 without a folder to write to: add --out"
