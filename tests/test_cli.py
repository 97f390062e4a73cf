"""The program: what it writes, what it prints, and one clear line for every wrong use."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import packcache
from packcache import console
from packcache.evaluate import reading

PROMPT = "a red 3 moving right"


def read(path: Path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate)


def test_generate_writes_exactly_the_frames_asked_for(run, tmp_path):
    out = tmp_path / "clip.mp4"
    code, printed, err = run("generate", PROMPT, "--frames", 7, "--out", out, "--steps", 2)
    assert code == 0 and err == ""
    assert "7 frames with PackCache(budget=1, window=4)" in printed
    frames, fps = read(out)
    assert frames.shape == (7, 96, 96, 3) and fps == 12
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("name", ["clip.gif", "clip"])
def test_generate_writes_gif_and_png(run, tmp_path, name):
    code, *_ = run("generate", PROMPT, "--frames", 3, "--steps", 1, "--out", tmp_path / name)
    assert code == 0
    if name == "clip":
        files = sorted(p.name for p in (tmp_path / name).iterdir())
        assert files == ["00000.png", "00001.png", "00002.png"]
    else:
        assert Image.open(tmp_path / name).n_frames == 3


def test_generate_prints_json(run, tmp_path):
    out = tmp_path / "clip.mp4"
    code, printed, _ = run(
        "generate",
        PROMPT,
        "--frames",
        9,
        "--steps",
        1,
        "--out",
        out,
        "--policy",
        "window",
        "--json",
    )
    result = json.loads(printed)
    assert code == 0 and result["schema"] == "packcache.generate/1"
    assert set(result) == {"schema", "environment", "workload", "results"}
    (row,) = result["results"]
    assert row["policy"] == "SlidingWindow(frames=1)"
    assert len(row["frame_s"]) == len(row["kv_bytes"]) == 3
    assert row["total_s"] >= row["last_s"] > 0


def test_budget_and_window_reach_the_policy(run, tmp_path):
    code, printed, _ = run(
        "generate", PROMPT, "--frames", 5, "--steps", 1, "--out", tmp_path / "c.mp4",
        "--policy", "packcache:half_life=2", "--budget", "0.5", "--window", 3,
    )  # fmt: skip
    assert code == 0 and "PackCache(budget=0.5, window=3, half_life=2)" in printed


def test_compare_writes_video_report_strip_and_json(run, tmp_path):
    out = tmp_path / "out"
    code, printed, err = run(
        "compare", PROMPT, "--policies", "full,window,packcache:budget=1,window=2,none",
        "--frames", 13, "--steps", 2, "--out", out, "--json",
    )  # fmt: skip
    assert code == 0 and err == ""
    result = json.loads(printed)
    assert result["schema"] == "packcache.compare/1"
    labels = [row["policy"] for row in result["results"]]
    assert labels == ["full", "window", "packcache:budget=1,window=2", "none"]
    for row in result["results"]:
        assert {"total_s", "last_s", "frame_s", "kv_bytes"} <= set(row)
        assert len(row["kv_bytes"]) == 4
    assert json.loads((out / "results.json").read_text()) == result
    assert sorted(p.name for p in out.iterdir()) == [
        "compare.mp4", "report.html", "results.json", "strip.png",
    ]  # fmt: skip
    frames, fps = read(out / "compare.mp4")
    assert len(frames) == 13 and fps == 12


def test_report_needs_no_network(run, tmp_path):
    run("compare", PROMPT, "--frames", 5, "--steps", 1, "--out", tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert PROMPT in page and "data:video/mp4;base64," in page
    for outside in ("http:", "https:", "<script", "<link", "@import", "url("):
        assert outside not in page


def test_demo_ends_with_three_numbers_and_a_report_of_what_was_remembered(run, tmp_path):
    out = tmp_path / "new" / "demo"
    code, printed, err = run("demo", "--frames", 21, "--out", out)
    lines = printed.strip().splitlines()
    assert code == 0 and err == "" and len(lines) == 4
    assert "MB" in lines[0] and "faster" in lines[1] and "faster" in lines[2]
    assert "report.html" in lines[3]
    page = (out / "report.html").read_text()
    assert "Its first 17 frames are given" in page
    assert re.search("<td>packcache</td><td>[0-9.]+</td><td>[0-9]+ of 64</td>", page)
    assert re.search("<tr><td>full</td>.{,40}<td>digit and colour right</td></tr>", page)


def test_demo_needs_no_scikit_learn(run, tmp_path, monkeypatch):
    """A plain install draws no scans and fits no reader."""
    for name in ("sklearn", "sklearn.datasets", "scipy", "scipy.ndimage", "scipy.linalg"):
        monkeypatch.setitem(sys.modules, name, None)
    reading.reader.cache_clear()
    code, printed, err = run("demo", "--frames", 18, "--out", tmp_path / "demo")
    assert code == 0 and err == "" and "report.html" in printed
    page = (tmp_path / "demo/report.html").read_text()
    assert "percentile of seed 0 among 64" in page and "came back" not in page


def test_a_demo_that_ends_under_the_curtain_is_wrong_use(run, tmp_path):
    code, printed, err = run("demo", "--frames", 17, "--out", tmp_path / "demo")
    assert code == 2 and printed == ""
    assert err == (
        "packcache: video has 17 frames of a clip of 17: expected fewer, or more frames\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_image_is_resized_with_a_note(run, tmp_path, caplog):
    Image.new("RGBA", (200, 100), (255, 0, 0, 128)).save(tmp_path / "wide.png")
    code, _, _ = run(
        "generate", PROMPT, "--image", tmp_path / "wide.png", "--frames", 5, "--steps", 1,
        "--out", tmp_path / "c.mp4",
    )  # fmt: skip
    assert code == 0
    assert "the image is 200x100: resized and cropped to 96x96" in caplog.text


WRONG = {
    "empty prompt": (["generate", ""], 2, "the prompt is empty"),
    "unknown words": (
        ["generate", "a pink 3 jumping right"], 2, "does not know 'pink', 'jumping'",
    ),
    "frames": (["generate", PROMPT, "--frames", 0], 2, "frames is 0, expected at least 1"),
    "frames word": (["generate", PROMPT, "--frames", "many"], 2, "--frames"),
    "budget 0": (["generate", PROMPT, "--budget", 0], 2, "budget is 0, expected latent frames"),
    "budget nan": (["generate", PROMPT, "--budget", "nan"], 2, "budget is nan"),
    "budget -1": (["generate", PROMPT, "--budget=-1"], 2, "budget is -1"),
    "budget word": (["generate", PROMPT, "--budget", "lots"], 2, "budget is 'lots'"),
    "budget below one token a frame": (
        ["generate", PROMPT, "--budget", "3tok"], 2, "3 tokens for a window of 4 latent frames",
    ),
    "window": (["generate", PROMPT, "--window", 0], 2, "window is 0, expected a whole number"),
    "policy": (["generate", PROMPT, "--policy", "magic"], 2, "unknown policy 'magic': known are"),
    "policies": (["compare", PROMPT, "--policies", "full,magic"], 2, "unknown policy 'magic'"),
    "policy setting": (
        ["generate", PROMPT, "--policy", "packcache:size=3"], 2, "no setting 'size'",
    ),
    "model": (["generate", PROMPT, "--model", "huge"], 2, "unknown model 'huge': known are digits"),
    "suffix": (["generate", PROMPT, "--out", "clip.avi"], 2, "known are .mp4, .gif"),
    "steps": (["generate", PROMPT, "--steps", 0], 2, "steps is 0, expected at least 1"),
    "guidance": (["generate", PROMPT, "--guidance", "nan"], 2, "guidance is nan"),
    "seed": (["generate", PROMPT, "--seed=-1"], 2, "seed is -1, expected a whole number from 0"),
    "positions": (["generate", PROMPT, "--positions", "up"], 2, "positions is 'up'"),
    "command": (["explode"], 2, "No such command 'explode'"),
    "out folder": (["generate", PROMPT, "--out", "no/clip.mp4"], 1, "folder no does not exist"),
    "compare folder": (["compare", PROMPT, "--out", "no/dir"], 1, "folder no does not exist"),
    "image": (["generate", PROMPT, "--image", "no.png"], 1, "image no.png does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_wrong_use_gets_one_clear_line(run, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, expected, text = WRONG[case]
    code, printed, err = run(*arguments)
    assert code == expected
    assert printed == ""
    assert text in err and err.startswith("packcache: ") and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_unreadable_and_empty_images(run, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    for name, text in (("empty.png", "is empty"), ("text.png", "cannot be read")):
        code, _, err = run(
            "generate", PROMPT, "--image", tmp_path / name, "--out", tmp_path / "c.mp4"
        )
        assert code == 1 and text in err and len(err.splitlines()) == 1
    assert not (tmp_path / "c.mp4").exists()


def test_closed_folder_is_found_before_generating(run, tmp_path, monkeypatch):
    def closed(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("packcache.files.tempfile.TemporaryFile", closed)
    monkeypatch.setattr("packcache.models.load", lambda *_, **__: pytest.fail("loaded"))
    code, _, err = run("generate", PROMPT, "--out", tmp_path / "c.mp4")
    assert code == 1 and "is not writable (Permission denied)" in err


def test_full_disk_leaves_nothing(run, tmp_path, monkeypatch):
    def full(frames, path, fps):
        path.write_bytes(b"half a video")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("packcache.video.write_mp4", full)
    out = tmp_path / "c.mp4"
    code, _, err = run("generate", PROMPT, "--frames", 1, "--steps", 1, "--out", out)
    assert code == 1 and "No space left on device" in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_interrupt_while_writing_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupted(frames, path, fps):
        path.write_bytes(b"half a video")
        raise KeyboardInterrupt

    monkeypatch.setattr("packcache.video.write_mp4", interrupted)
    out = tmp_path / "c.mp4"
    code, _, err = run("generate", PROMPT, "--frames", 1, "--steps", 1, "--out", out)
    assert code == 130 and "interrupted" in err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_a_real_process(tmp_path):
    command = [sys.executable, "-m", "packcache", "generate", PROMPT, "--frames", "4000"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "c.mp4")],
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts its jobs in the background lets them ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_nan_weights_are_reported(run, tmp_path, monkeypatch):
    from packcache import models

    broken = models.load("digits")
    broken.model.lm_head.weight.data.fill_(float("nan"))
    monkeypatch.setitem(models.MODELS, "digits", lambda *_: broken)
    code, _, err = run("generate", PROMPT, "--frames", 5, "--out", tmp_path / "c.mp4")
    assert code == 1 and "NaN or infinite logits in latent frame 0" in err
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_command(run):
    code, printed, _ = run("--help")
    assert code == 0
    for command in ("generate", "compare", "demo", "evaluate"):
        assert command in printed


def test_version(run):
    assert run("--version") == (0, f"packcache {packcache.__version__}\n", "")


def test_progress_is_silent_when_piped(run, tmp_path):
    assert not console.err.is_terminal
    _, _, err = run("generate", PROMPT, "--frames", 1, "--steps", 1, "--out", tmp_path / "c.mp4")
    assert err == ""
