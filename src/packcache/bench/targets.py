"""What was to be reached, and whether stored results reach it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packcache.bench.compose import CHECKED_WITHIN
from packcache.bench.guarded import counted
from packcache.bench.predict import EXACT, STOCK
from packcache.bench.promised import is_held, promise
from packcache.bench.words import (
    apart,
    composed,
    find,
    label_of,
    measured,
    name_of,
    place,
    short,
)
from packcache.bench.workload import FEW
from packcache.markdown import table
from packcache.policies import FullCache, PackCache, SlidingWindow
from packcache.reuse import PRESETS, StepReuse

__all__ = ["TARGETS", "Beside", "Target", "targets_section"]

#: A kernel on a CPU should reach this share of its ceiling.
KERNEL_AIM = 0.7

#: The engine: the full cache may take so much longer than `torch-full`, PackCache than a window of
#: equally many tokens; and packing and rebase so much of LAST.
LONGER, PACKING = 1.02, 0.01

#: What targets of the largest model are asked of; those of the embedded one are its own.
LARGE = {"size": [672, 384], "steps": 50, "guidance": 15}

#: LAST of the first target should be this close to what was predicted.
PREDICTED_WITHIN = 0.10


@dataclass(frozen=True, kw_only=True)
class Target:
    """What PackCache with a preset should reach: so many times faster at LAST and in TOTAL."""

    where: str
    model: str
    frames: int
    last: float
    total: float
    task: str | None = None
    preset: str = EXACT
    over_stock: bool = False
    as_predicted: bool = False

    @property
    def against(self) -> str:
        return STOCK if self.over_stock else "full cache, exact"

    def fits(self, result: Mapping[str, Any]) -> bool:
        """Is the result of this workload?"""
        work = result["workload"]
        asked = {"model": self.model, "frames": self.frames}
        asked |= {} if self.task is None else {"task": self.task}
        asked |= LARGE if self.model == "3b" else {}
        return all(work[name] == value for name, value in asked.items())

    def told(self, result: Mapping[str, Any]) -> str:
        """Where, with the task of a result that the target leaves open."""
        return self.where if self.task else f"{self.where}, {result['workload']['task']}"

    def rows(self, result: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
        """The row that is judged and the one it is held against, if both were measured often
        enough."""
        row = find(result, label_of(result, repr(PackCache())), self.preset)
        base = STOCK if self.over_stock else label_of(result, repr(FullCache()))
        other = find(result, base, EXACT)
        if row is None or other is None or min(row["repeats"], other["repeats"]) < FEW:
            return None
        return (row, other) if self.over_stock or name_of(other) == result["reference"] else None


TARGETS = (
    Target(where="3b, text-to-video, 48 frames", model="3b", frames=48, task="t2v", last=2.4,
           total=1.7, as_predicted=True),
    Target(where="3b, image-to-video, 48 frames", model="3b", frames=48, task="i2v", last=2.3,
           total=1.6),
    Target(where="3b, 24 frames", model="3b", frames=24, last=1.5, total=1.2),
    Target(where="3b, 48 frames, fast", model="3b", frames=48, preset="fast", last=4, total=2.5),
    Target(where="3b, 48 frames", model="3b", frames=48, over_stock=True, last=4, total=2.5),
    Target(where="3b, 48 frames, fast", model="3b", frames=48, preset="fast", over_stock=True,
           last=6, total=3.5),
    Target(where="embedded model, 384 frames", model="digits", frames=384, last=5, total=2.5),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What decides which speeds count: the guards, and `stock` beside upstream."""

    guards: Sequence[tuple[str, Mapping[str, Any]]]
    stock: Mapping[str, Any] | None

    def counts(self, result: Mapping[str, Any], row: Mapping[str, Any]) -> str:
        """What the guard says of a row, as words behind its name; nothing of one that is exact."""
        reuse, preset = StepReuse(**row["reuse"]), row["preset"]
        if reuse.is_exact:
            return ""
        steps = result["workload"]["steps"]
        if preset not in PRESETS or PRESETS[preset].for_steps(steps) != reuse:
            return " (does not count: the preset is another one now)"
        return counted(self.guards, row["settings"], preset)

    def tells(self, result: Mapping[str, Any], policy: str) -> bool:
        """Does a row count at all? Upstream's way does where it was held against upstream."""
        return policy != STOCK or is_held(self.stock, result["environment"]["dtype"])

    def promise(self, result: Mapping[str, Any]) -> str:
        return promise(self.stock, result["environment"]["dtype"])


def targets_section(results: Sequence[Mapping[str, Any]], beside: Beside) -> str:
    """Every target and what was measured of it, as Markdown."""
    head = ("where", "against", "measured on", "LAST", "aim", "", "TOTAL", "aim", "")
    rows = [row for target in TARGETS for row in _target_rows(target, results, beside)]
    for result in results:
        rows += [*_kernel_rows(result), *_engine_rows(result), *_checked_rows(result)]
    return "## Targets\n\n3B at 672x384; PackCache.\n\n" + table(head, rows) + "\n"


def _target_rows(
    target: Target, results: Sequence[Mapping[str, Any]], beside: Beside
) -> list[list[str]]:
    """A line for each result that tells, or one that says that none does."""
    lines = []
    for result in results:
        rows = target.rows(result) if target.fits(result) else None
        if rows is not None:
            lines.append(_target_row(target, result, *rows, beside))
    return lines or [_not_run(target, "*not run*", beside)]


def _target_row(
    target: Target,
    result: Mapping[str, Any],
    row: Mapping[str, Any],
    other: Mapping[str, Any],
    beside: Beside,
) -> list[str]:
    if not beside.tells(result, other["policy"]):
        return _not_run(target, f"*not run*: {beside.promise(result)}", beside)
    found = row["over"][STOCK] if target.over_stock else row
    counts = beside.counts(result, row)
    held = "" if not counts or counts.startswith(" (guard holds") else "not counted: "
    last, total = found["speedup_last"], found["speedup_total"]
    verdict = held + _verdict(last, target.last)
    if target.as_predicted:
        off = last / found["predicted_last"] - 1
        near = "met" if abs(off) <= PREDICTED_WITHIN else "missed"
        verdict += f"; {off:+.0%} of predicted, {PREDICTED_WITHIN:.0%} allowed: {near}"
    return [
        target.told(result) + counts, target.against,
        place(result) + apart(row, other),
        measured(found, "last"), f">= {target.last:g}x", verdict,
        measured(found, "total"), f">= {target.total:g}x",
        held + _verdict(total, target.total),
    ]  # fmt: skip


def _not_run(target: Target, why: str, beside: Beside) -> list[str]:
    exact = target.preset == EXACT
    counts = "" if exact else counted(beside.guards, repr(PackCache()), target.preset)
    aims = [f">= {aim:g}x" for aim in (target.last, target.total)]
    return [target.where + counts, target.against, why, "-", aims[0], "", "-", aims[1], ""]


def _kernel_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """How near the kernels of the full cache come to this machine's ceilings, on a CPU.

    Not asked of the toy, whose layers are too small to be bound by them.
    """
    row = find(result, label_of(result, repr(FullCache())), EXACT)
    elsewhere = result["environment"]["device"] != "cpu" or result["workload"]["model"] == "toy"
    if elsewhere or row is None or not row["kernel_shares"]:
        return []
    return [
        [
            f"{short(result)}: {kind} kernels", "measured ceiling", place(result),
            f"{share:.0%}", f">= {KERNEL_AIM:.0%}", _verdict(share, KERNEL_AIM, percent=True),
            "", "", "",
        ]
        for kind, share in row["kernel_shares"].items()
        if kind != "head"
    ]  # fmt: skip


def _engine_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """What the engine itself may cost, by the bounds of the intervals.

    Of a composed result packing alone: its rows hold what they compare by construction.
    """
    full, packed, window = (
        find(result, label_of(result, repr(policy)), EXACT)
        for policy in (FullCache(), PackCache(), SlidingWindow())
    )
    plain = find(result, "torch-full", EXACT)
    pairs = (
        (full, plain, "full cache", "torch-full"),
        (packed, window, "packcache", "window"),
    )
    rows = []
    for row, other, name, base in () if composed(result) else pairs:
        if row and other:
            found = row["over"][base]
            low, high = (1 / bound for bound in reversed(found["speedup_last_interval"]))
            took = f"{1 / found['speedup_last']:.3f}x ({low:.3f} to {high:.3f})"
            cells = [f"{short(result)}: time of the {name}", base]
            cells += [place(result) + apart(row, other), took, f"<= {LONGER:g}x"]
            rows.append([*cells, _bounded(low, high, LONGER), "", "", ""])
    share = packed["bookkeeping_share"] if packed else None
    if share is not None:
        cells = [f"{short(result)}: packing and rebase", "LAST", place(result)]
        verdict = _bounded(share, share, PACKING)
        rows.append([*cells, f"{share:.2%}", f"<= {PACKING:.0%}", verdict, "", "", ""])
    return rows


def _checked_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """How near composition comes to networks of few layers that were really run."""
    rows = []
    for made in result["checked"]:
        low, high = made["ratio_interval"]
        near = "met" if abs(made["ratio"] - 1) <= CHECKED_WITHIN else "missed"
        whole = f"{made['layers']} layer{'s' if made['layers'] != 1 else ''}"
        rows.append(
            [
                f"{short(result)}: {made['part']} of {whole}, composed",
                "really run", place(result), f"{made['ratio']:.3f}x ({low:.3f} to {high:.3f})",
                f"within {CHECKED_WITHIN:.0%}", near, "", "", "",
            ]
        )  # fmt: skip
    return rows


def _bounded(low: float, high: float, most: float) -> str:
    if high <= most:
        return "met"
    return "missed" if low > most else "not told: the interval lies on both sides"


def _verdict(value: float, aim: float, *, percent: bool = False) -> str:
    """Met or missed, and by how much."""
    by = f"{abs(value - aim):.0%}" if percent else f"{abs(value - aim):.2f}x"
    return f"met, {by} more" if value >= aim else f"missed by {by}"
