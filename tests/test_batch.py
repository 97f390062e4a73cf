"""Prompts from a file: what a line may say, and each clip made once whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from packcache import batch
from packcache.batch import RESULTS, Job, Summary, read_jobs, run_jobs
from packcache.errors import InputFileError, InvalidSetting, OutputError

ALLOWED = {"image": str, "video": str, "frames": int, "seconds": float, "size": (str, list)}


def write(folder: Path, *lines: object, name: str = "p.jsonl") -> Path:
    path = folder / name
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def jobs_of(folder: Path, *lines: object, **common: object) -> list[Job]:
    return read_jobs(write(folder, *lines), ALLOWED, common)


# --- reading ----------------------------------------------------------------------------------


def test_lines_become_jobs_in_their_order(tmp_path):
    first, second = jobs_of(
        tmp_path,
        {"prompt": "A red 3, moving right!", "frames": 9, "seconds": 2, "size": [96, 96]},
        "  ",
        {"prompt": "a blue 5", "name": "blue_5.v-1"},
    )
    assert first.settings == {"frames": 9, "seconds": 2, "size": [96, 96]}
    assert (first.line, first.prompt) == (1, "A red 3, moving right!")
    assert re.fullmatch(r"a-red-3-moving-right-[0-9a-f]{8}", first.name)
    assert (second.line, second.name, second.settings) == (3, "blue_5.v-1", {})


def test_paths_are_relative_to_the_file(tmp_path):
    elsewhere = str(tmp_path / "b.mp4")
    (job,) = jobs_of(tmp_path, {"prompt": "p", "image": "in/a.png", "video": elsewhere})
    assert job.settings == {"image": str(tmp_path / "in" / "a.png"), "video": elsewhere}


def test_a_mark_at_the_start_windows_line_ends_and_odd_separators_do_no_harm(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n\r\n{"prompt": "c"}\r\n'.encode())
    assert [job.prompt for job in read_jobs(path, {})] == ["a\u2028b", "c"]


def test_equal_lines_are_one_job(tmp_path):
    lines = [{"prompt": "p", "frames": 5}, {"frames": 5, "prompt": "p"}, {"prompt": "p"}]
    assert [job.line for job in jobs_of(tmp_path, *lines)] == [1, 3]
    named = [{"prompt": "p", "name": "a"}] * 2
    assert len(jobs_of(tmp_path, *named)) == 1


def test_the_name_stands_for_everything_that_decides_the_clip(tmp_path):
    def name(line: dict[str, object], **common: object) -> str:
        return jobs_of(tmp_path, {"prompt": "p", **line}, **common)[0].name

    plain = name({})
    assert plain == name({})
    others = {name({"frames": 5}), name({"frames": 6}), name({}, seed=1), name({}, seed=2)}
    assert len(others | {plain}) == 5
    assert name({"frames": 5}) == name({}, frames=5) == name({"frames": 5}, frames=9)


def test_a_picture_counts_by_what_is_in_it_not_by_where_it_lies(tmp_path):
    def name(folder: str, colour: str) -> str:
        (tmp_path / folder / "clip").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), colour).save(tmp_path / folder / "a.png")
        Image.new("RGB", (2, 2), colour).save(tmp_path / folder / "clip" / "0.png")
        lines = [{"prompt": "p", "image": "a.png"}, {"prompt": "p", "video": "clip"}]
        return " ".join(job.name for job in jobs_of(tmp_path / folder, *lines))

    assert name("here", "red") == name("there", "red") != name("here", "blue")
    path = write(tmp_path, {"prompt": "p"})
    given = {
        read_jobs(path, {}, {"image": str(tmp_path / folder / "a.png")})[0].name
        for folder in ("here", "there")
    }
    assert len(given) == 2  # the run's own picture counts the same way


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(min_size=1).filter(str.strip), frames=st.integers())
@example(prompt="赤い数字", frames=1)
@example(prompt="\ud800 lone", frames=1)
@example(prompt="x" * 500, frames=1)
def test_any_prompt_gives_a_safe_name(prompt, frames):
    with tempfile.TemporaryDirectory() as folder:
        (job,) = jobs_of(Path(folder), {"prompt": prompt, "frames": frames})
    assert job.prompt == prompt
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}-[0-9a-f]{8}", job.name)


WRONG = {
    '{"prompt": ""}': '"prompt" is missing or empty, expected an object such as {"prompt":',
    '{"prompt": " "}': '"prompt" is missing or empty',
    '{"frames": 5}': '"prompt" is missing or empty',
    '{"prompt": 3}': "prompt is 3, expected a text",
    '{"prompt": "p", "frames": "5"}': 'frames is "5", expected a whole number',
    '{"prompt": "p", "frames": 5.0}': "frames is 5.0, expected a whole number",
    '{"prompt": "p", "frames": true}': "frames is true, expected a whole number",
    '{"prompt": "p", "seconds": null}': "seconds is null, expected a number",
    '{"prompt": "p", "seconds": NaN}': "NaN is no JSON number",
    '{"prompt": "p", "size": 3}': "size is 3, expected a text or list",
    '{"prompt": "p", "image": ""}': 'image is "", expected the name of a file',
    '{"prompt": "p", "colour": 1}': "unknown key 'colour': known are prompt, name, image,",
    '{"prompt": "p", "prompt": "q"}': "a key is given twice among prompt, prompt",
    '{"prompt": "p", "seed": ' + 5000 * "9" + "}": "holds a number of too many digits, expected",
    '{"prompt": "p", "image": "\\u0000"}': 'image is "\\u0000", expected the name of a file',
    '{"prompt": "p"': "is no JSON object of one line (Expecting ',' delimiter at column 15)",
    '{"prompt": "p"} {}': "is no JSON object of one line (Extra data at column 17)",
    "a red 3": "is 'a red 3', expected a JSON object such as",
    '"a red 3"': "expected a JSON object such as",
    '[{"prompt": "p"}]': "is a JSON array, expected one object a line such as",
    '{"a": ' + "[" * 10**5: "is nested too deep",
    '{"prompt": "p", "name": "../x"}': "name is '../x', expected up to 100 letters, digits",
    '{"prompt": "p", "name": ".x"}': "name is '.x'",
    '{"prompt": "p", "name": ""}': "name is ''",
    '{"prompt": "p", "name": "x\\n"}': "name is 'x\\n'",
    '{"prompt": "p", "name": "results.jsonl"}': "name is 'results.jsonl'",
    '{"prompt": "p", "name": "Taken"}': "name 'Taken' is taken by line 1: give another",
}


@pytest.mark.parametrize("line", WRONG, ids=lambda line: line[:40])
def test_a_bad_line_is_named(tmp_path, line):
    path = write(tmp_path, {"prompt": "q", "name": "taken"}, "", line)
    with pytest.raises(InputFileError) as caught:
        read_jobs(path, ALLOWED)
    text = str(caught.value)
    assert text.startswith("p.jsonl line 3: ") and WRONG[line] in text
    assert "\n" not in text


def test_a_bad_file_is_named(tmp_path):
    with pytest.raises(InputFileError, match=r"prompts file .*no\.jsonl does not exist: check"):
        read_jobs(tmp_path / "no.jsonl", {})
    with pytest.raises(InputFileError, match=r"cannot be read \(Is a directory\): expected lines"):
        read_jobs(tmp_path, {})
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "grün"}'.encode("latin-1"))
    with pytest.raises(InputFileError, match=r"cannot be read \(not UTF-8 text\)"):
        read_jobs(tmp_path / "latin.jsonl", {})
    with pytest.raises(InputFileError, match=r"^p\.jsonl holds no prompt: expected lines such as"):
        jobs_of(tmp_path, "", " ")


# --- running ----------------------------------------------------------------------------------


def job(name: str, digest: str = "") -> Job:
    return Job(line=1, prompt=f"prompt {name}", settings={}, name=name, digest=digest)


def make(job: Job, target: Path) -> dict[str, object]:
    target.write_text(job.prompt)
    return {"total_s": 1.5}


def never(job: Job, target: Path) -> dict[str, object]:
    pytest.fail(f"made {job.name} again")


def rows(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]


@pytest.mark.parametrize(
    "line, common", [(', "policy": "a.json:budget=2"', {}), ("", {"policy": "a.json"})]
)
def test_a_calibration_decides_no_clip(tmp_path, line, common):
    """A changed file would find the clips of the old one made."""
    path = write(tmp_path, '{"prompt": "p"' + line + "}")
    with pytest.raises(
        InputFileError, match=r"line 1: policy 'a\.json' is a file, which may change"
    ):
        read_jobs(path, {"policy": str}, common)


def test_each_job_is_made_reported_and_gets_one_line(tmp_path):
    out, heard = tmp_path / "out", []
    summary = run_jobs([job("a", "1"), job("v1.5", "2")], out, make, report=heard.append)
    assert summary == Summary(made=2)
    assert [(o.job.name, o.status, o.message) for o in heard] == [
        ("a", "made", ""),
        ("v1.5", "made", ""),
    ]
    assert [o.target for o in heard] == [out / "a.mp4", out / "v1.5.mp4"]
    assert (out / "v1.5.mp4").read_text() == "prompt v1.5"
    assert rows(out) == [
        {"name": n, "prompt": f"prompt {n}", "digest": d, "status": "made", "total_s": 1.5}
        for n, d in (("a", "1"), ("v1.5", "2"))
    ]


def test_finished_clips_are_skipped(tmp_path):
    run_jobs([job("a")], tmp_path, make)
    before = (tmp_path / RESULTS).read_bytes()
    summary = run_jobs([job("a"), job("b")], tmp_path, make)
    assert summary == Summary(made=1, skipped=1)
    assert run_jobs([job("a"), job("b")], tmp_path, never) == Summary(skipped=2)
    assert (tmp_path / RESULTS).read_bytes().startswith(before) and len(rows(tmp_path)) == 2


def test_a_folder_of_pictures_is_finished_when_it_holds_something(tmp_path):
    def pictures(job: Job, target: Path) -> dict[str, object]:
        target.mkdir(exist_ok=True)
        (target / "0.png").touch()
        return {}

    (tmp_path / "a").mkdir()
    assert run_jobs([job("a")], tmp_path, pictures, suffix=lambda job: "") == Summary(made=1)
    assert run_jobs([job("a")], tmp_path, never, suffix=lambda job: "") == Summary(skipped=1)


@pytest.mark.parametrize(
    "error, why",
    [
        (InvalidSetting("frames is 0"), "frames is 0"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (RuntimeError("out of memory\nTried to allocate"), "out of memory"),
        (MemoryError(), "MemoryError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failing_job_is_reported_tried_again_and_stops_nobody(tmp_path, error, why):
    def fails(job: Job, target: Path) -> dict[str, object]:
        if job.name == "a":
            raise error
        return make(job, target)

    heard = []
    jobs = [job("a"), job("b")]
    for _ in range(2):  # failing twice leaves one line as well
        summary = run_jobs(jobs, tmp_path, fails, report=heard.append)
    assert summary == Summary(failed=1, skipped=1)
    assert [(o.status, o.message) for o in heard] == [
        ("failed", why), ("made", ""), ("failed", why), ("skipped", ""),
    ]  # fmt: skip
    failed = next(row for row in rows(tmp_path) if row["name"] == "a")
    assert failed["status"] == "failed" and failed["error"] == why

    assert run_jobs(jobs, tmp_path, make) == Summary(made=1, skipped=1)
    assert {row["name"]: row["status"] for row in rows(tmp_path)} == {"a": "made", "b": "made"}
    assert len(rows(tmp_path)) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_and_a_mistake_in_the_program_stop_the_run(tmp_path, error):
    def stops(job: Job, target: Path) -> dict[str, object]:
        raise error

    with pytest.raises(error):
        run_jobs([job("a"), job("b")], tmp_path, stops)
    assert not (tmp_path / RESULTS).exists()
    assert run_jobs([job("a"), job("b")], tmp_path, make) == Summary(made=2)  # no lock is left


def test_a_name_that_stands_for_another_clip_is_not_skipped_silently(tmp_path):
    run_jobs([job("a", "1")], tmp_path, make)
    heard = []
    assert run_jobs([job("a", "2")], tmp_path, never, report=heard.append) == Summary(failed=1)
    assert heard[0].message == (
        "a was made with other settings: give another name, or remove that clip"
    )
    assert [row["digest"] for row in rows(tmp_path)] == ["1"]


# --- after a crash ----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [None, "failed"])
def test_a_clip_without_its_line_gets_one(tmp_path, status):
    if status:
        (tmp_path / RESULTS).write_text(json.dumps({"name": "a", "status": status}) + "\n")
    (tmp_path / "a.mp4").touch()
    written = set()
    for _ in range(2):  # the second run has nothing to write
        assert run_jobs([job("a", "1")], tmp_path, never) == Summary(skipped=1)
        written.add((tmp_path / RESULTS).stat().st_ino)
    assert len(written) == 1
    assert rows(tmp_path) == [{"name": "a", "prompt": "prompt a", "status": "found"}]


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 400), names=st.lists(st.sampled_from("abcd"), unique=True, min_size=1))
def test_results_cut_anywhere_hold_one_line_a_clip_after_the_next_run(cut, names):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        run_jobs([job(name) for name in names], out, make)
        whole = (out / RESULTS).read_bytes()
        (out / RESULTS).write_bytes(whole[:cut])
        run_jobs([job("new")], out, make)  # goes on after the torn line
        assert rows(out)[-1]["name"] == "new"
        assert run_jobs([job(name) for name in names], out, never).skipped == len(names)
        assert Counter(row["name"] for row in rows(out)) == Counter([*names, "new"])


def test_lines_of_others_and_a_missing_line_end_survive(tmp_path):
    before = b'{"name": "x", "note": "a"}\n[1]\nnot json \xff\n{"name": "y"}'
    (tmp_path / RESULTS).write_bytes(before)
    run_jobs([job("a"), job("b")], tmp_path, make)
    lines = (tmp_path / RESULTS).read_bytes().split(b"\n")
    assert lines[:4] == before.split(b"\n")
    assert [json.loads(line)["name"] for line in lines[4:-1]] == ["a", "b"]


def test_a_line_that_cannot_be_written_leaves_the_others_whole(tmp_path, monkeypatch):
    run_jobs([job("a")], tmp_path, make)
    before = (tmp_path / RESULTS).read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(batch.os, "fsync", full)
        with pytest.raises(OutputError, match=r"cannot write .*results\.jsonl \(No space left"):
            run_jobs([job("b"), job("c")], tmp_path, make)
    assert (tmp_path / RESULTS).read_bytes() == before
    assert run_jobs([job("b"), job("c")], tmp_path, make) == Summary(made=1, skipped=1)
    assert [row["status"] for row in rows(tmp_path)] == ["made", "found", "made"]


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, expected a folder"):
        run_jobs([job("a")], tmp_path / "file", make)
    with pytest.raises(OutputError, match="does not exist"):
        run_jobs([job("a")], tmp_path / "no" / "out", make)
    (tmp_path / ".locks").touch()
    with pytest.raises(OutputError, match=r"is not writable \(File exists\)"):
        run_jobs([job("a")], tmp_path, make)


def test_a_lock_that_cannot_be_taken_is_one_line(tmp_path):
    (tmp_path / ".locks" / "a.lock").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"cannot lock in .*locks \(.*\): use another folder or"):
        run_jobs([job("a")], tmp_path, never)


def test_results_locked_for_too_long(tmp_path):
    (tmp_path / ".locks").mkdir()
    results = batch._Results(path=tmp_path / RESULTS, wait=0.1)
    with (
        batch._lock(tmp_path, ".results"),
        pytest.raises(OutputError, match=r"is locked by another process for 0\.1 s: stop that one"),
    ):
        results.add({"name": "a"})


def test_whoever_is_about_to_write_the_line_is_not_forestalled(tmp_path):
    (tmp_path / "a.mp4").touch()
    with batch._lock(tmp_path, "a"):  # made by another process, whose line comes next
        assert run_jobs([job("a")], tmp_path, never) == Summary(skipped=1)
    assert not (tmp_path / RESULTS).exists()


def test_a_clip_finished_just_before_the_lock_was_taken_is_not_made_again(tmp_path, monkeypatch):
    lock = batch._lock

    def late(out: Path, name: str, timeout: float = 0):
        (tmp_path / "a.mp4").touch()
        return lock(out, name, timeout)

    monkeypatch.setattr(batch, "_lock", late)
    assert run_jobs([job("a")], tmp_path, never) == Summary(skipped=1)


# --- several processes ------------------------------------------------------------------------

#: Says "ready", waits for a line, then runs jobs c0, c1, ...; each call of make is logged.
WORKER = """
import os, sys, time
from pathlib import Path
from packcache.batch import Job, run_jobs

def make(job, target):
    with Path(log).open("a") as file:
        file.write(job.name + "\\n")
    time.sleep(float(pause))
    draft = target.with_name(f"draft{os.getpid()}")
    draft.touch()
    draft.replace(target)
    return {}

out, log, number, pause = sys.argv[1:]
jobs = [Job(line=i, prompt="p", settings={}, name=f"c{i}") for i in range(int(number))]
print("ready", flush=True)
sys.stdin.readline()
s = run_jobs(jobs, Path(out), make)
print(s.made, s.skipped, s.failed, s.elsewhere)
"""


def worker(out: Path, log: Path, number: int, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(out), str(log), str(number), str(pause)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def test_two_processes_never_make_the_same_clip(tmp_path):
    out, log, number = tmp_path / "out", tmp_path / "log", 24
    out.mkdir()
    processes = [worker(out, log, number, 0.03) for _ in range(2)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    counts = [[int(n) for n in process.communicate(timeout=60)[0].split()] for process in processes]
    names = {f"c{i}" for i in range(number)}
    assert Counter(log.read_text().split()) == Counter(names)
    assert Counter(row["name"] for row in rows(out)) == Counter(names)
    assert {path.stem for path in out.glob("*.mp4")} == names
    assert all(sum(count) == number and count[2] == 0 for count in counts)
    assert sum(count[0] for count in counts) == number
    assert all(count[0] for count in counts)  # they shared the work


def test_a_clip_in_the_making_is_left_alone_and_taken_over_after_a_kill(tmp_path):
    log = tmp_path / "log"
    process = worker(tmp_path, log, 1, 60)
    process.stdin.write("go\n")
    process.stdin.flush()
    while not log.exists():
        assert process.poll() is None
    assert run_jobs([job("c0"), job("c1")], tmp_path, make) == Summary(made=1, elsewhere=1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert run_jobs([job("c0"), job("c1")], tmp_path, make) == Summary(made=1, skipped=1)
    assert sorted(row["name"] for row in rows(tmp_path)) == ["c0", "c1"]
