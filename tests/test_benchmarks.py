"""The benchmarks for large machines run here at toy size: their files say what they promise to."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from packcache.lumos.config import SIZES
from packcache.lumos.decode import Decoder
from packcache.lumos.plan import plan
from packcache.lumos.schedule import Sampling
from packcache.models import SIZE
from packcache.policies import FullCache, PackCache
from tests.tools import ROOT

TOY = ["--model", "toy", "--size", "64", "32"]
GIB = 1 << 30


@pytest.fixture(scope="module")
def gpu_clip() -> ModuleType:
    """The script as a module."""
    source = ROOT / "benchmarks" / "gpu_clip.py"
    spec = importlib.util.spec_from_file_location("gpu_clip", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ran(gpu_clip, monkeypatch):
    """The script's main with the toy's options and others."""

    def call(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["gpu_clip.py", *TOY, *options])
        gpu_clip.main()

    return call


@pytest.fixture(scope="module")
def bench(gpu_clip):
    """Toy weights in bfloat16 on the CPU, one step."""
    model = gpu_clip.random_model(SIZES["toy"], torch.device("cpu"), torch.bfloat16)
    return gpu_clip.Bench(name="toy", model=model, size=(64, 32), sampling=Sampling(steps=1))


# --- gpu_clip -----------------------------------------------------------------------------------


def test_every_policy_runs_at_every_length(ran, tmp_path, capsys):
    out = tmp_path / "new" / "clip.json"
    ran("--device", "cpu", "--steps", "2", "--out", str(out))
    assert len(capsys.readouterr().out.splitlines()) == 4
    result = json.loads(out.read_text())
    assert result["schema"] == "packcache.gpu_clip/1"
    assert result["environment"]["dtype"] == "bfloat16"
    work = result["workload"]
    assert (work["model"], work["width"], work["height"], work["steps"]) == ("toy", 64, 32, 2)
    assert work["sampled"] is True and work["weights"] == "random"
    rows = [(row["frames"], row["policy"], row["latent_frames_done"]) for row in result["results"]]
    assert rows == [(24, "full", 7), (24, "packcache", 7), (48, "full", 13), (48, "packcache", 13)]
    for row in result["results"]:
        made = plan(
            SIZES["toy"], size=(64, 32), frames=row["frames"], sampling=Sampling(steps=2),
            policy=FullCache() if row["policy"] == "full" else PackCache(),
        )  # fmt: skip
        assert row["outcome"] == "done"
        assert row["kv_bytes"][-1] == row["planned_kv_bytes"] == made.kv_bytes
        assert row["planned_peak_bytes"] == made.total_bytes
        assert row["total_s"] == pytest.approx(row["prefill_s"] + sum(row["frame_s"]))
        assert row["last_s"] == row["frame_s"][-1] > 0
        peaks = [value for name, value in row.items() if name.startswith("peak_")]
        assert peaks == [None] * 3
        assert row["promised_bytes"] is row["promise_holds"] is None
        assert (row["relative_total"] == 1) == (row["policy"] == "full")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--device", "cuda:99"], "device is cuda:99, but torch sees"),
        (["--device", "cpu", "--policies", "fuller"], "unknown policy 'fuller'"),
        (["--device", "cpu", "--steps", "0"], "steps is 0, expected at least 1"),
        (["--device", "cpu", "--size", "64", "33"], "height is 33 pixels"),
        (["--device", "cpu", "--memory", "16GiB"], "memory can be capped on a CUDA device only"),
        (["--device", "cpu", "--memory", "16"], "invalid parse_bytes value: '16'"),
    ],
)
def test_wrong_use_is_refused_in_one_line(ran, tmp_path, capsys, options, words):
    with pytest.raises(SystemExit) as stopped:
        ran(*options, "--out", str(tmp_path / "clip.json"))
    said = stopped.value.code if isinstance(stopped.value.code, str) else capsys.readouterr().err
    assert words in said.splitlines()[-1]
    assert not (tmp_path / "clip.json").exists()


def stops_at(monkeypatch, frame: int, error: Exception) -> None:
    """From here on a forward of that latent frame raises."""
    forward = Decoder._forward

    def broken(self, *args):
        if self.frame == frame:
            raise error
        return forward(self, *args)

    monkeypatch.setattr(Decoder, "_forward", broken)


def test_a_clip_that_does_not_fit_is_a_row(gpu_clip, bench, monkeypatch):
    stops_at(monkeypatch, 2, torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    row = gpu_clip.measure(bench, "full", FullCache(), frames=24)
    assert (row["outcome"], row["latent_frames_done"]) == ("out of memory", 2)
    assert "total_s" not in row and "out of memory in latent frame 2" in gpu_clip.line(row)
    (same,) = gpu_clip.compared([row])
    assert same["relative_total"] is None


def test_another_failure_is_no_row(gpu_clip, bench, monkeypatch):
    stops_at(monkeypatch, 1, RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu_clip.run(bench, FullCache(), frames=24)


def test_times_are_shares_of_the_full_cache_at_the_same_length(gpu_clip):
    rows = [
        {"policy": policy, "frames": frames, "outcome": "done", "total_s": total, "last_s": last}
        for policy, frames, total, last in [
            ("full", 24, 8.0, 2.0),
            ("packcache", 24, 6.0, 1.0),
            ("packcache", 48, 9.0, 1.0),
        ]
    ]
    got = [(row["relative_total"], row["relative_last"]) for row in gpu_clip.compared(rows)]
    assert got == [(1.0, 1.0), (0.75, 0.5), (None, None)]


@pytest.mark.parametrize(
    "name, size, policy, peak, outcome, expected",
    [
        ("3b", SIZE, PackCache(), 14 * GIB, "done", (14 * GIB, True)),
        ("3b", SIZE, PackCache(), 14 * GIB + 1, "done", (14 * GIB, False)),
        ("1b", SIZE, PackCache(), 7 * GIB, "done", (6 * GIB, False)),
        ("1b", SIZE, PackCache(), 5 * GIB, "out of memory", (6 * GIB, False)),
        ("3b", SIZE, PackCache(), None, "done", (14 * GIB, None)),
        ("3b", SIZE, FullCache(), GIB, "done", (None, None)),
        ("3b", (448, 256), PackCache(), GIB, "done", (None, None)),
        ("toy", SIZE, PackCache(), GIB, "done", (None, None)),
    ],
)
def test_a_promise_is_judged_where_it_was_given(
    gpu_clip, bench, name, size, policy, peak, outcome, expected
):
    asked = replace(bench, name=name, size=size)
    row = {"peak_allocated_bytes": peak, "outcome": outcome}
    assert tuple(gpu_clip.promise(asked, policy, row).values()) == expected


def test_random_weights_are_a_whole_network_of_one_dtype(gpu_clip, bench):
    again = gpu_clip.random_model(SIZES["toy"], torch.device("cpu"), torch.bfloat16)
    assert {weight.dtype for weight in again.parameters()} == {torch.bfloat16}
    for name, weight in bench.model.named_parameters():
        assert not weight.is_meta and not weight.requires_grad
        assert torch.equal(weight, again.get_parameter(name)), name
        assert weight.float().std() < 0.1 and weight.isfinite().all()
    assert again.model.norm.weight.float().mean() == pytest.approx(1, abs=0.01)
    assert again.inv_freq.dtype == torch.float32 and not again.axes.is_meta


# --- full_size ----------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_full_size_loads_steps_and_clears_up(tmp_path):
    out, scratch = tmp_path / "full.json", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "benchmarks/full_size.py", *TOY]
    command += ["--scratch", str(scratch), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(scratch.iterdir()) == []
    result = json.loads(out.read_text())
    assert result["schema"] == "packcache.full_size/1"
    (row,) = result["results"]
    assert row["weights_bytes"] == 2 * result["workload"]["parameters"]
    assert row["tokens_per_frame"] == 40 and row["branches"] == 2
    assert min(row[name] for name in ("build_s", "load_s", "prefill_s", "step_s")) > 0
    assert min(row["anonymous_before_bytes"], row["anonymous_loaded_bytes"]) > 0


def test_self_forcings_own_code_is_asked_for_by_name(tmp_path):
    script = ROOT / "benchmarks" / "self_forcing_upstream.py"
    command = [sys.executable, str(script), "--upstream", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().endswith(
        "has no wan/modules/causal_model.py: give a checkout's folder"
    )


@pytest.mark.parametrize(("name", "recached"), [("self_forcing", None), ("longlive", 6)])
def test_their_own_code_was_equal_to_the_bit(name, recached):
    """What the guide says of it is what was stored, of the cases that the script asks today."""
    stored = json.loads((ROOT / f"benchmarks/results/{name}_upstream.json").read_text())
    assert stored["workload"]["encoded_anew_after"] == recached
    script = (ROOT / "benchmarks/self_forcing_upstream.py").read_text()
    for row in stored["results"]:
        sinks = re.search(r"frames=(\d+), sinks=(\d+)", row["policy"])
        assert (f"({sinks[2]}, {sinks[1]})" if sinks else "None") in script
    assert [row["equal"] for row in stored["results"]] == [True] * 4
    assert stored["table_difference"] == 0


def test_what_adapters_gain_is_measured_at_any_size(tmp_path):
    """The script for a quiet machine, at a small size: its rows hold as many tokens as it says."""
    script, out = ROOT / "benchmarks" / "adapters.py", tmp_path / "adapters.json"
    command = [sys.executable, str(script), "--size", "64", "64", "--shrink", "64"]
    command += ["--repeats", "1", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    full, sinks, packed = found["wan"]["rows"]
    assert full["history_tokens"] == 18 * found["wan"]["tokens_per_frame"]
    assert sinks["history_tokens"] == packed["history_tokens"] == full["history_tokens"] // 3
    assert packed["kv_gib"] == pytest.approx(full["kv_gib"] / 3)
    # 30 layers, keys and values of 1536 channels in bfloat16
    bytes_ = full["history_tokens"] * 30 * 2 * 1536 * 2
    assert full["kv_gib"] == pytest.approx(bytes_ / GIB)
    assert {row["history"] for row in found["staged"]} == {2048, 8192}
    theirs = found["self_forcing"]
    assert [row["history_tokens"] for row in theirs["rows"]] == [18 * 16, 6 * 16, 6 * 16]
    assert theirs["own_dicts"]["kv_gib"] == pytest.approx(theirs["rows"][0]["kv_gib"] * 21 / 18)
    token = found["emu3"]
    assert [row["history_tokens"] for row in token["rows"]] == [20 * 64, 7 * 64, 7 * 64]
    assert min(row["token_s"] for row in token["rows"]) > 0
