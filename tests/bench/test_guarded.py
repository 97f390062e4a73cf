"""What the guard said stands beside the speeds: a fast row counts only if it held."""

from __future__ import annotations

import json

import numpy as np
import pytest

from packcache.bench.guarded import counted, guard_section, read_guards
from packcache.errors import InputFileError
from packcache.evaluate.guard import METRICS, Guard
from packcache.policies import FullCache, PackCache
from packcache.reuse import EXACT, StepReuse


def guard(lost: float, *, policy: str = "packcache", clips: int = 400) -> dict:
    """A guard in which a preset loses that share of digits, and nothing else."""
    values = {metric: np.ones((1, 2, clips)) for metric in METRICS}
    values["digit"][0, 1, : round(lost * clips)] = 0
    values["kl"][:] = 0.001
    made = Guard(
        policies=(policy,),
        presets={"exact": EXACT, "fast": StepReuse(rest_every=4)},
        values=values,
        workload={
            "clips": clips, "frames": 25, "recall_clips": clips, "sampling": {"steps": 12},
            "limits": {"digit": 2.0, "recall": 3.0},
        },
        environment={},
    )  # fmt: skip
    return json.loads(json.dumps(made.to_json()))


@pytest.mark.parametrize(
    "lost, words",
    [
        (0, " (guard holds)"),
        (0.015, " (does not count: guard undecided)"),
        (0.1, " (does not count: guard breaks)"),
    ],
)
def test_a_row_counts_if_its_guard_held(lost, words):
    assert counted([("guard.json", guard(lost))], repr(PackCache()), "fast") == words


def test_a_row_whose_guard_was_not_run_says_so():
    found = [("guard.json", guard(0))]
    assert counted(found, repr(FullCache()), "fast") == " (guard: *not run*)"
    assert counted(found, repr(PackCache()), "balanced") == " (guard: *not run*)"


def test_the_worst_of_several_guards_counts():
    both = [("a", guard(0)), ("b", guard(0.1))]
    assert "breaks" in counted(both, repr(PackCache()), "fast")


def test_the_section_has_a_row_a_preset_and_tags():
    text = guard_section([("guard_x.json", guard(0.1, policy="full"))])
    rows = [line for line in text.splitlines() if line.startswith("| full ")]
    assert [row.split("|")[1].strip() for row in rows] == ["full exact", "full fast"]
    assert "| 90.0 % | 10.0 (" in rows[1] and rows[1].endswith("| breaks |")
    assert "at most 2 points and recall by at most 3" in text and "`guard_x.json`" in text
    assert "12 steps" in text and "*embedded model*" in text


def test_files_are_read_by_name_and_schema(tmp_path):
    assert read_guards(tmp_path) == []
    (tmp_path / "guard_full.json").write_text(json.dumps(guard(0)))
    assert [name for name, _ in read_guards(tmp_path)] == ["guard_full.json"]
    (tmp_path / "guard_old.json").write_text('{"schema": "other/1"}')
    with pytest.raises(InputFileError, match=r"guard_old.json has schema 'other/1', expected"):
        read_guards(tmp_path)
