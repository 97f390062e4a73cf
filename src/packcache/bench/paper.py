"""The paper's Table 2, ours: seconds of a clip and of its last frames, from stored benchmarks.

The paper tells how many times as fast as the full cache a whole clip (TOTAL) and its last four
pixel frames (LAST) are made. Rows are those of `packcache bench`, exact presets alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packcache.bench.predict import EXACT
from packcache.bench.result import SCHEMA
from packcache.bench.words import place
from packcache.evaluate.claims import judged
from packcache.files import read_result
from packcache.markdown import table

__all__ = ["PAPER", "cost_section", "read_benchmark"]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How many times as fast as the full cache the paper is, on an A40 (methods 1.8)."""

    frames: int
    what: str
    times: float


PAPER = (
    Speed(frames=24, what="total", times=1.26), Speed(frames=24, what="last", times=1.63),
    Speed(frames=48, what="total", times=1.75), Speed(frames=48, what="last", times=2.64),
)  # fmt: skip


#: Rows beside the full cache, as the paper has them.
_BESIDE = ("window", "packcache")


def read_benchmark(path: Path) -> dict[str, Any]:
    """A stored benchmark. Raises InputFileError for a file that is none."""
    return read_result(path, SCHEMA, "make one with packcache bench --out")


def cost_section(results: Sequence[Mapping[str, Any]]) -> str:
    """The table and its claims as Markdown; nothing without benchmarks."""
    if not results:
        return ""
    rows = [cells for result in results for cells in _rows(result)]
    head = (
        "model and clip",
        "policy",
        "TOTAL, times as fast",
        "LAST",
        "the paper's, A40",
        "as fast",
    )
    body = table(head, rows)
    return (
        "## What it buys\n\nPackCache and a window of as many tokens beside the full cache, exact "
        "steps, medians and their intervals over rounds, of stored benchmarks; docs/performance.md "
        f"has all of them.\n\n{body}\n"
    )


def _rows(result: Mapping[str, Any]) -> list[list[str]]:
    work = result["workload"]
    name = (
        f"{work['model']} {work['task']} {work['size'][0]}x{work['size'][1]}, "
        f"{work['frames']} frames, {place(result)}"
    )
    return [
        [name, row["policy"], *_speeds(row), _paper(work, row), _verdict(work, row)]
        for row in result["results"]
        if row["preset"] == EXACT and row["policy"] in _BESIDE and row.get("speedup_total")
    ]


def _speeds(row: Mapping[str, Any]) -> list[str]:
    told = []
    for what in ("total", "last"):
        low, high = row[f"speedup_{what}_interval"]
        told.append(f"{row[f'speedup_{what}']:.2f} ({low:.2f} to {high:.2f})")
    return told


def _of_paper(work: Mapping[str, Any], row: Mapping[str, Any]) -> list[Speed]:
    """The paper's figures for this clip: its method, an image-to-video clip of its size."""
    same = work["size"] == [672, 384] and work["task"] == "i2v" and row["policy"] == "packcache"
    return [speed for speed in PAPER if same and speed.frames == work["frames"]]


def _paper(work: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    told = [f"{speed.what.upper()} {speed.times}" for speed in _of_paper(work, row)]
    return ", ".join(told) or "-"


def _verdict(work: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Is it as fast as the paper says? By the whole interval."""
    told = []
    for speed in _of_paper(work, row):
        low, high = row[f"speedup_{speed.what}_interval"]
        told.append(f"{speed.what.upper()} {judged(low, high, speed.times)}")
    return ", ".join(told) or "-"
