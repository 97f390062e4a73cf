"""Examples run and are short; the paged pool needs no torch and its pages stay constant."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.tools import ROOT

#: The example in the README is run there.
EXAMPLES = sorted(set((ROOT / "examples").glob("*.py")) - {ROOT / "examples" / "generate.py"})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_and_is_short(path):
    result = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert len(path.read_text().splitlines()) <= 40


def test_a_pipeline_of_self_forcings_kind_stays_small():
    path = ROOT / "examples" / "self_forcing.py"
    result = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert result.stdout.splitlines() == [
        "everything kept, equal to the pipeline's own list: True",
        "1440 tokens held of 1440",
        "180 tokens held of 3600",
    ]


def test_a_paged_pool_stays_constant():
    code = (
        "import sys, runpy; sys.argv = ['x']; runpy.run_path(sys.path.pop(), run_name='__main__')"
    )
    path = ROOT / "examples" / "paged_pool.py"
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.append({str(path)!r}); {code}; "
            "assert 'torch' not in sys.modules",
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "frame 0: 6 pages in use, 6 with a full cache"
    assert lines[11] == "frame 11: 6 pages in use, 58 with a full cache"
    assert len(lines) == 12 and all(": 6 pages in use" in line for line in lines)
    assert len(path.read_text().splitlines()) <= 40
