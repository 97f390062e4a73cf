"""Whatever moment a process is killed at, its clip goes on as if nothing had been.

The killing is done by `tests.kills` in a process of its own, which may fork.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.tools import ROOT


def killed(*arguments: str) -> dict:
    """What the harness reports."""
    command = [sys.executable, "-m", "tests.kills", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.nightly)])
def test_clips_killed_at_random_moments_go_on_as_if_nothing_had_been(kills):
    """None before the second frame, three in ten inside a checkpoint being written."""
    report = killed("--kills", str(kills), "--seed", str(kills))
    assert report["kills"] == kills and report["earliest"] >= 2
    assert report["inside"] >= 0.3 * kills and report["temporary"] > 0
    assert report["equal"] == report["clips"] > 0
    assert report["lost"] == 0 and report["warnings"] == []


def test_a_checkpoint_may_end_before_everything_it_does_to_the_disk():
    report = killed("--boundaries")
    assert report["kills"] >= 20 and report["inside"] >= 0.8 * report["kills"]
    assert report["equal"] == report["clips"] == report["kills"]
    assert report["lost"] == 0 and report["warnings"] == []


def test_files_named_before_they_are_written_are_noticed():
    """Mutation: every clip still goes on, from the other state, but a whole one was spoilt."""
    report = killed("--boundaries", "--mutation", "in-place")
    assert report["warnings"]
