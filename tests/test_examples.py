"""Examples run; the paged pool needs no torch and its pages stay constant."""

from __future__ import annotations

import subprocess
import sys

from tests.tools import ROOT


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
