"""`packcache generate` with everything but the embedded model's defaults."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import packcache as pc
from packcache.video import read_video

PROMPT = "a red 3 moving right"
QUICK = ("--frames", 5, "--steps", 1)


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_frame_is_a_picture(run, tmp_path):
    code, printed, err = run("generate", PROMPT, "--frames", 1, "--out", tmp_path / "one.png")
    assert code == 0 and err == "" and "1 frames" in printed
    assert Image.open(tmp_path / "one.png").size == (96, 96)
    code, _, err = run("generate", PROMPT, *QUICK, "--out", tmp_path / "five.png")
    assert code == 2 and "cannot write 5 frames to 'five.png', expected 1 for .png" in err


def test_a_clip_is_continued(run, tmp_path, caplog):
    made = pc.load("digits").generate(PROMPT, frames=14, steps=2)
    made.save(tmp_path / "first")
    code, *_ = run(
        "generate", PROMPT, "--video", tmp_path / "first", "--frames", 20, "--steps", 1,
        "--out", tmp_path / "more",
    )  # fmt: skip
    assert code == 0
    assert "the video is 14 frames of 96x96: resized and cropped to 96x96, first 1" in caplog.text
    frames, _ = read_video(tmp_path / "more")
    assert frames.shape == (20, 96, 96, 3)
    gen = pc.load("digits")
    assert np.array_equal(frames[:13], gen.pixels(gen.encode_video(made.frames[1:])))


def test_size_rate_and_duration_are_stated(run, tmp_path):
    code, printed, _ = run(
        "generate", PROMPT, *QUICK, "--size", "64x32", "--fps", 8, "--out", tmp_path / "c.mp4",
        "--json",
    )  # fmt: skip
    work = json.loads(printed)["workload"]
    assert code == 0 and (work["width"], work["height"], work["fps"]) == (64, 32, 8)


def test_steps_that_reuse_earlier_ones_are_asked_for(run, tmp_path):
    options = ("--frames", 5, "--steps", 12, "--json", "--out", tmp_path / "c.mp4")
    fast = pc.parse_reuse("fast", 12)
    assert not fast.is_exact
    for reuse, settings in (("fast", fast), ("exact", pc.StepReuse())):
        code, printed, _ = run("generate", PROMPT, *options, "--reuse", reuse)
        work = json.loads(printed)["workload"]
        assert code == 0 and pc.StepReuse(**work["reuse"]) == settings
    lines = write_lines(tmp_path / "p.jsonl", {"prompt": PROMPT, "reuse": "rest_every=2"})
    code, printed, _ = run("generate", "--prompts", lines, *options[:-1], tmp_path / "many")
    assert code == 0
    made = json.loads((tmp_path / "many" / "results.jsonl").read_text())
    assert made["workload"]["reuse"]["rest_every"] == 2


@pytest.mark.parametrize(
    "options, text",
    [
        ((), "expected a prompt, or --prompts FILE.jsonl, and not both"),
        ((PROMPT, "--prompts", "x.jsonl"), "expected a prompt, or --prompts FILE.jsonl"),
        ((PROMPT, "--size", "big"), "--size is 'big', expected WIDTHxHEIGHT such as 672x384, or"),
        ((PROMPT, "--size", "64x30"), "height is 30 pixels, expected a positive multiple of 32"),
        ((PROMPT, "--size", "16"), "size is 16, expected 32 to 4096, or (width, height)"),
        (
            (PROMPT, "--checkpoint", "a", "--resume", "a"),
            "both --checkpoint and --resume are given: --resume keeps it up too",
        ),
        ((PROMPT, "--positions", "here"), "positions is 'here', expected absolute or rebase"),
        ((PROMPT, "--reuse", "most"), "reuse is 'most', expected exact, balanced, fast, or"),
        ((PROMPT, "--fps", 0), "fps is 0, expected at least 1"),
        ((PROMPT, "--seconds", -1), "seconds is -1, expected at least 1"),
        ((PROMPT, "--size", "0"), "size is 0, expected 32 to 4096"),
        ((PROMPT, "--model", "a/b"), "no codec: give codec=, the folder with encoder.jit"),
        ((PROMPT, "--model", "nothing"), "unknown model 'nothing': known are digits, folders"),
        ((PROMPT, "--dtype", "int8"), "dtype is int8, expected one of float32"),
        ((PROMPT, "--device", "nowhere"), "device is 'nowhere', expected"),
    ],
    ids=str,
)
def test_wrong_use_gets_one_clear_line(run, tmp_path, options, text):
    code, printed, err = run("generate", *options, *QUICK, "--out", tmp_path / "c.mp4")
    assert code == 2 and printed == "" and text in err
    assert len(err.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_wrong_options_are_found_before_the_weights_are_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr("packcache.models.load", lambda *_, **__: pytest.fail("loaded"))
    for options in (("--rebase", "x"), ("--seed", -1), ("--steps", 0), ("--video", "none.mp4")):
        code, _, err = run("generate", PROMPT, *options, "--anyway", "--out", tmp_path / "c.mp4")
        assert code in (1, 2) and len(err.splitlines()) == 1


@pytest.mark.parametrize("option, name", [("--image", "a.png"), ("--video", "a.mp4")])
def test_files_that_are_not_there(run, tmp_path, option, name):
    code, _, err = run(
        "generate", PROMPT, option, tmp_path / name, *QUICK, "--out", tmp_path / "c.mp4"
    )
    assert code == 1 and f"{name} does not exist: check the name" in err
    assert len(err.splitlines()) == 1


def test_a_model_that_is_not_there(run, tmp_path):
    code, _, err = run(
        "generate", PROMPT, "--model", tmp_path / "none", *QUICK, "--codec", tmp_path,
        "--out", tmp_path / "c.mp4",
    )  # fmt: skip
    assert code == 1 and "does not exist" in err and len(err.splitlines()) == 1


def test_what_cannot_fit_is_refused_before_the_weights_are_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr("packcache.lumos.plan.found_memory", lambda device: 1 << 30)
    monkeypatch.setattr("packcache.models.load", lambda *_, **__: pytest.fail("loaded"))
    arguments = ("generate", PROMPT, "--policy", "full", "--frames", 9, "--out", tmp_path / "c.mp4")
    code, _, err = run(*arguments)
    assert code == 1 and len(err.splitlines()) == 1
    assert "this clip needs 1." in err and "and 1.00 GiB are there" in err


def test_what_is_said_not_to_fit_can_be_tried(run, tmp_path, monkeypatch):
    monkeypatch.setattr("packcache.lumos.plan.found_memory", lambda device: 1 << 20)
    code, *_ = run("generate", PROMPT, *QUICK, "--anyway", "--out", tmp_path / "c.mp4")
    assert code == 0 and (tmp_path / "c.mp4").exists()


# --- prompts from a file --------------------------------------------------------------------------


def test_prompts_from_a_file(run, tmp_path):
    """Clips by name, results line by line; a failing one does not stop the rest."""
    out = tmp_path / "clips"
    file = write_lines(
        tmp_path / "prompts.jsonl",
        {"prompt": PROMPT, "name": "one"},
        {"prompt": "a zebra", "name": "two"},
        {"prompt": "a blue 7", "name": "three", "frames": 9, "seed": 4},
    )
    code, printed, err = run("generate", "--prompts", file, *QUICK, "--out", out)
    assert code == 1 and "2 made, 0 finished before, 0 made elsewhere, 1 failed" in printed
    lines = err.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["made", "failed", "made"]
    assert lines[3] == "packcache: 1 of 3 clips failed: run again to retry"
    assert len(read_video(out / "one.mp4")[0]) == 5 and len(read_video(out / "three.mp4")[0]) == 9
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row["name"], row["status"]) for row in rows] == [
        ("one", "made"), ("two", "failed"), ("three", "made"),
    ]  # fmt: skip
    assert rows[2]["workload"]["seed"] == 4 and rows[2]["total_s"] > 0


def test_finished_clips_are_skipped_and_new_ones_made(run, tmp_path):
    out, file = tmp_path / "clips", tmp_path / "prompts.jsonl"
    write_lines(file, {"prompt": PROMPT})
    run("generate", "--prompts", file, *QUICK, "--out", out)
    (first,) = out.glob("*.mp4")
    stamp = first.stat().st_mtime_ns
    write_lines(file, {"prompt": "a blue 7"}, {"prompt": PROMPT})
    code, printed, _ = run("generate", "--prompts", file, *QUICK, "--out", out, "--json")
    assert code == 0
    assert json.loads(printed) == {
        "schema": "packcache.prompts/1", "made": 1, "skipped": 1, "failed": 0, "elsewhere": 0,
    }  # fmt: skip
    assert first.stat().st_mtime_ns == stamp
    code, printed, _ = run("generate", "--prompts", file, "--frames", 6, "--steps", 1, "--out", out)
    assert code == 0 and "2 made, 0 finished before" in printed  # other settings, other clips


def test_one_impossible_line_does_not_stop_the_rest(run, tmp_path):
    file = write_lines(
        tmp_path / "p.jsonl",
        {"prompt": PROMPT, "name": "none", "image": "missing.png"},
        {"prompt": PROMPT, "name": "short", "frames": 0},
        {"prompt": PROMPT, "name": "huge", "frames": 10**5, "policy": "full"},
        {"prompt": PROMPT, "name": "good"},
    )
    code, printed, err = run("generate", "--prompts", file, *QUICK, "--out", tmp_path / "clips")
    assert code == 1 and "1 made, 0 finished before, 0 made elsewhere, 3 failed" in printed
    lines = err.splitlines()
    assert "missing.png does not exist" in lines[0] and "frames is 0" in lines[1]
    assert "this clip needs" in lines[2] and lines[3].split() == ["made", "good"]


def test_each_line_has_its_own_kind_of_file(run, tmp_path):
    file, clips = tmp_path / "p.jsonl", tmp_path / "clips"
    write_lines(file, {"prompt": PROMPT, "name": "still", "frames": 1})
    run("generate", "--prompts", file, *QUICK, "--out", clips)
    write_lines(
        file, {"prompt": PROMPT, "name": "still", "frames": 1}, {"prompt": PROMPT, "name": "moving"}
    )
    code, printed, _ = run("generate", "--prompts", file, *QUICK, "--out", clips)
    assert code == 0 and "1 made, 1 finished before" in printed
    assert {path.name for path in clips.glob("[!.]*.*4")} == {"moving.mp4"}
    assert (clips / "still.png").exists()


def test_a_prompts_file_with_a_wrong_line_makes_nothing(run, tmp_path):
    file = write_lines(tmp_path / "p.jsonl", {"prompt": PROMPT}, {"prompt": PROMPT, "colour": 1})
    code, printed, err = run("generate", "--prompts", file, "--out", tmp_path / "clips")
    assert code == 1 and printed == "" and "p.jsonl line 2: unknown key 'colour'" in err
    assert not (tmp_path / "clips").exists()


def test_pictures_from_a_file(run, tmp_path):
    file = write_lines(tmp_path / "p.jsonl", {"prompt": PROMPT, "name": "still"})
    code, *_ = run("generate", "--prompts", file, "--frames", 1, "--out", tmp_path / "clips")
    assert code == 0 and Image.open(tmp_path / "clips" / "still.png").size == (96, 96)


def test_two_programs_share_a_folder(tmp_path):
    file = write_lines(tmp_path / "p.jsonl", *({"prompt": f"a red {n}"} for n in range(8)))
    command = [
        sys.executable, "-m", "packcache", "generate", "--prompts", str(file), "--frames", "5",
        "--steps", "1", "--out", str(tmp_path / "clips"), "--json",
    ]  # fmt: skip
    programs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [json.loads(program.communicate()[0]) for program in programs]
    assert [program.returncode for program in programs] == [0, 0]
    assert sum(count["made"] for count in counts) == 8
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 8
    assert len((tmp_path / "clips" / "results.jsonl").read_text().splitlines()) == 8


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_clip_goes_on_where_it_was_left(run, tmp_path):
    kept = tmp_path / "kept"
    quick = ("--steps", 2, "--seed", 3)
    run("generate", PROMPT, *quick, "--frames", 21, "--out", tmp_path / "whole")
    code, *_ = run(
        "generate", PROMPT, *quick, "--frames", 9, "--checkpoint", kept, "--out", tmp_path / "part"
    )
    assert code == 0
    code, printed, err = run(
        "generate", PROMPT, *quick, "--frames", 21, "--resume", kept, "--out", tmp_path / "rest"
    )
    assert code == 0 and err == "" and "21 frames" in printed
    whole, rest = (read_video(tmp_path / name)[0] for name in ("whole", "rest"))
    assert np.array_equal(whole, rest)


@pytest.mark.parametrize(
    "change, text",
    [
        (("--policy", "window"), "policy"),
        (("--seed", 9), "seeds"),
        (("--steps", 3), "sampling.steps"),
        (("--guidance", 2), "sampling.guidance"),
        (("--positions", "absolute"), "positions"),
        (("--size", "64x64"), "width"),
        (("--dtype", "bfloat16"), "dtype"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run_is_refused_by_name(run, tmp_path, change, text):
    kept, out = tmp_path / "kept", tmp_path / "c.mp4"
    base = ("generate", PROMPT, "--frames", 5, "--steps", 1, "--out", out)
    assert run(*base, "--checkpoint", kept)[0] == 0
    out.unlink()
    code, printed, err = run(*base, *change, "--resume", kept)
    assert code == 1 and printed == "" and text in err and len(err.splitlines()) == 1
    assert not out.exists()


def test_wrong_checkpoint_folders_get_one_clear_line(run, tmp_path):
    base = ("generate", PROMPT, *QUICK, "--out", tmp_path / "c.mp4")
    code, _, err = run(*base, "--resume", tmp_path / "nothing")
    assert code == 1 and len(err.splitlines()) == 1 and "nothing" in err
    (tmp_path / "file").write_text("here")
    code, _, err = run(*base, "--checkpoint", tmp_path / "file")
    assert code == 1 and len(err.splitlines()) == 1 and "is a file" in err
    run(*base, "--checkpoint", tmp_path / "kept")
    code, _, err = run(*base, "--checkpoint", tmp_path / "kept")
    assert code == 1 and len(err.splitlines()) == 1 and "--resume" in err


def test_every_clip_of_a_file_goes_on_from_its_own_checkpoint(run, tmp_path):
    """A clip that was stopped half-way is not begun again; a finished one leaves nothing."""
    settings = {"frames": 21, "steps": 2, "policy": pc.PackCache()}
    (tmp_path / "kept").mkdir()
    half = pc.load("digits").run([PROMPT], checkpoint=tmp_path / "kept" / "one", **settings)
    assert len(list(itertools.islice(half, 3))) == 3
    del half  # and with it the lock
    (tmp_path / "kept" / "two").mkdir()  # killed before anything was finished
    (tmp_path / "kept" / "two" / "lock").touch()
    file = write_lines(
        tmp_path / "p.jsonl",
        {"prompt": PROMPT, "name": "one"},
        {"prompt": "a red 3", "name": "two"},
    )
    code, printed, err = run(
        "generate", "--prompts", file, "--frames", 21, "--steps", 2, "--out", tmp_path / "clips",
        "--checkpoint", tmp_path / "kept",
    )  # fmt: skip
    assert code == 0 and "2 made" in printed, err
    assert list((tmp_path / "kept").iterdir()) == []
    whole = pc.load("digits").generate(PROMPT, **settings)
    assert len(read_video(tmp_path / "clips" / "one.mp4")[0]) == len(whole.frames) == 21
    first, _ = (tmp_path / "clips" / "results.jsonl").read_text().splitlines()
    assert json.loads(first)["total_s"] > 0
