"""Words that the parts of docs/performance.md share; results are as stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "apart", "composed", "find", "label_of", "measured", "name_of", "place", "short", "tag",
]  # fmt: skip


def tag(result: Mapping[str, Any]) -> str:
    """Where its numbers come from, as every page has to say."""
    if result["environment"]["device"] != "cpu":
        return "*GPU run*"
    return "*embedded model*" if result["workload"]["weights"] == "embedded" else "*random weights*"


def composed(result: Mapping[str, Any]) -> str:
    """A word behind the device of rows that were not run."""
    return "" if result["workload"]["layers"] is None else ", composed"


def place(result: Mapping[str, Any]) -> str:
    """On what a target was measured."""
    return f"{result['environment']['device']}{composed(result)}, {tag(result)}"


def apart(row: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Words for rows that were not measured in one process."""
    return "" if row["run"] == other["run"] else ", not side by side"


def short(result: Mapping[str, Any]) -> str:
    """The workload in few words."""
    work = result["workload"]
    width, height = work["size"]
    return f"{work['model']}, {work['task']} {width}x{height}, {work['frames']} frames"


def name_of(row: Mapping[str, Any]) -> str:
    """As `reference` of a result names it."""
    return f"{row['policy']} {row['preset']}"


def label_of(result: Mapping[str, Any], settings: str) -> str | None:
    """What a policy is called in a result."""
    labels = [row["policy"] for row in result["results"] if row["settings"] == settings]
    return labels[0] if labels else None


def find(result: Mapping[str, Any], policy: str | None, preset: str) -> Mapping[str, Any] | None:
    """A finished row."""
    for row in result["results"]:
        if (row["policy"], row["preset"]) == (policy, preset) and row["complete"]:
            return row
    return None


def measured(row: Mapping[str, Any], name: str) -> str:
    """A speed-up, total or last, with its interval."""
    low, high = row[f"speedup_{name}_interval"]
    return f"{row[f'speedup_{name}']:.2f}x ({low:.2f} to {high:.2f})"
