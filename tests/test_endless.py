"""A stream may go on for ever: memory and time per frame do not grow (benchmarks/endless.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools import ROOT


@pytest.mark.parametrize("frames", [1000, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_memory_and_time_stay_flat(frames, tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory is read from /proc")
    out = tmp_path / "endless.json"
    command = [sys.executable, "benchmarks/endless.py", "--frames", str(frames), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (row,) = json.loads(out.read_text())["results"]
    assert row["slope_percent_per_1000_frames"] <= 0.1
    assert row["late_over_early_time"] <= 1.05
