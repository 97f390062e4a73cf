"""What the guard said stands beside the speeds: a fast row counts only if it held."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from packcache.bench.guarded import counted, guard_section, read_guards
from packcache.errors import InputFileError
from packcache.evaluate.guard import METRICS, Guard
from packcache.policies import FullCache, PackCache
from packcache.reuse import EXACT, PRESETS, StepReuse


def guard(
    lost: float,
    *,
    policy: str = "packcache",
    clips: int = 400,
    steps: int = 12,
    fast: StepReuse | None = None,
) -> dict:
    """A guard in which a preset loses that share of digits, and nothing else."""
    values = {metric: np.ones((1, 2, clips)) for metric in METRICS}
    values["digit"][0, 1, : round(lost * clips)] = 0
    values["kl"][:] = 0.001
    made = Guard(
        policies=(policy,),
        presets={"exact": EXACT, "fast": fast or PRESETS["fast"].for_steps(steps)},
        values=values,
        workload={
            "clips": clips, "frames": 25, "recall_clips": clips, "sampling": {"steps": steps},
            "limits": {"digit": 2.0, "recall": 3.0},
        },
        environment={},
    )  # fmt: skip
    return json.loads(json.dumps(made.to_json()))


@pytest.mark.parametrize(
    "lost, words",
    [
        (0, " (guard holds at 12 steps)"),
        (0.015, " (does not count: guard undecided at 12 steps)"),
        (0.1, " (does not count: guard breaks at 12 steps)"),
    ],
)
def test_a_row_counts_if_its_guard_held(lost, words):
    assert counted([("guard.json", guard(lost))], repr(PackCache()), "fast") == words


def test_a_row_whose_guard_was_not_run_says_so():
    found = [("guard.json", guard(0))]
    assert counted(found, repr(FullCache()), "fast") == " (guard: *not run*)"
    assert counted(found, repr(PackCache()), "balanced") == " (guard: *not run*)"


def test_the_worst_of_several_guards_counts():
    both = [("a", guard(0)), ("b", guard(0.1, steps=50)), ("c", guard(0.1, steps=24))]
    assert counted(both, repr(PackCache()), "fast") == (
        " (does not count: guard breaks at 24 and 50 steps)"
    )


@pytest.mark.parametrize(
    "other",
    [
        {"steps": 1},  # in which nothing can be taken over
        {"fast": replace(PRESETS["fast"].for_steps(12), rest_every=5)},
        {"fast": replace(PRESETS["fast"].for_steps(12), history_share=0.5)},
        {"steps": 24, "fast": PRESETS["fast"].for_steps(12)},
    ],
)
def test_a_guard_of_exact_steps_or_of_another_preset_says_nothing(other):
    """The name alone is not what was guarded."""
    found = [("guard.json", guard(0, **other))]
    assert counted(found, repr(PackCache()), "fast") == " (guard: *not run*)"
    assert counted([*found, ("b", guard(0))], repr(PackCache()), "fast") == (
        " (guard holds at 12 steps)"
    )


def test_a_preset_that_is_no_more_has_no_guard():
    assert counted([("a", guard(0))], repr(PackCache()), "faster") == " (guard: *not run*)"


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
