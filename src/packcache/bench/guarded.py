"""What the quality guard said of presets, beside their speed: a fast row counts only if it held.

Reads the results of `packcache evaluate guard`; nothing of it is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from packcache.evaluate.guard import SCHEMA
from packcache.files import read_result
from packcache.markdown import table
from packcache.policies import parse_policy
from packcache.reuse import EXACT, PRESET_STEPS, PRESETS

__all__ = ["PATTERN", "counted", "guard_section", "read_guards"]

#: Names of the files that are read.
PATTERN = "guard*.json"

Found = Sequence[tuple[str, Mapping[str, Any]]]


def read_guards(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of each stored guard, by name; there may be none."""
    paths = sorted(folder.glob(PATTERN))
    return [(path.name, read_result(path, SCHEMA, "move it away")) for path in paths]


def counted(guards: Found, settings: str, preset: str) -> str:
    """Whether a row of a policy (its repr) with a preset counts, as words behind its name.

    Only guards of what the preset is today are heard, and only where it was not exact: in few
    steps nothing is taken over.
    """
    found: dict[str, set[int]] = {}  # steps by verdict
    for _, guard in guards:
        steps = guard["workload"]["sampling"]["steps"]
        reuse = PRESETS[preset].for_steps(steps) if preset in PRESETS else EXACT
        for row in guard["results"]:
            own = row["preset"] == preset and {**row, **asdict(reuse)} == row
            if own and not reuse.is_exact and repr(parse_policy(row["policy"])) == settings:
                found.setdefault(row["verdict"], set()).add(steps)
    if not found:
        return " (guard: *not run*)"
    if set(found) == {"holds"}:
        return f" (guard {_told('holds', found)})"
    bad = (_told(verdict, found) for verdict in sorted(found) if verdict != "holds")
    return f" (does not count: guard {' and '.join(bad)})"


def _told(verdict: str, found: Mapping[str, set[int]]) -> str:
    return f"{verdict} at {' and '.join(map(str, sorted(found[verdict])))} steps"


def guard_section(guards: Found) -> str:
    """What the presets cost in quality, as Markdown."""
    head = (
        "*embedded model*", "digit read", "lost, points", "recalled", "lost, points", "KL, nats",
        "same first code", "verdict",
    )  # fmt: skip
    limits = guards[0][1]["workload"]["limits"]
    lines = [
        "## What the presets cost\n",
        "`packcache evaluate guard` on the embedded model, paired by clip: digits read in clips "
        "made freely, objects recalled when a curtain rises, and, step by step along the exact "
        "run, the divergence of the codes' distribution. A speed counts only if digits fall by at "
        f"most {limits['digit']:g} points and recall by at most {limits['recall']:g}, by the upper "
        "bound of the 95 % interval (*embedded model*); where little is recalled to begin with, "
        "little can be lost. Presets are shares of the schedule, told "
        f"for {PRESET_STEPS} steps and scaled to the model's own.\n",
    ]
    for name, guard in guards:
        work = guard["workload"]
        rows = [_row(row) for row in guard["results"]]
        lines += [
            f"{work['clips']} clips of {work['frames']} frames, {work['recall_clips']} memory "
            f"clips, {work['sampling']['steps']} steps, from `{name}`:\n",
            table(head, rows),
            "",
        ]
    return "\n".join(lines)


def _row(row: Mapping[str, Any]) -> list[str]:
    drops = row["drops"] or {}
    cells = [f"{row['policy']} {row['preset']}"]
    for metric in ("digit", "recall"):
        found = row[metric]
        cells += [f"{100 * found['mean']:.1f} %" if found else "-", _lost(drops.get(metric))]
    for metric, text in (("kl", "{:.2g}"), ("agreement", "{:.1%}")):
        found = row[metric]
        cells.append(text.format(found["mean"]) if found and drops else "-")
    return [*cells, row["verdict"] or "-"]


def _lost(fall: Mapping[str, Any] | None) -> str:
    return "-" if fall is None else f"{fall['mean']:.1f} ({fall['low']:.1f} to {fall['high']:.1f})"
