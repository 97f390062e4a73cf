"""docs/performance.md, made from stored results: `packcache bench --page docs/performance.md`.

Numbers are rounded here and nowhere typed; the only others are the targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packcache.bench.guarded import counted, guard_section, read_guards
from packcache.bench.result import SCHEMA
from packcache.bench.table import notes, seconds_text, title
from packcache.errors import InputError, InputFileError
from packcache.lumos.config import read_json
from packcache.lumos.units import show_bytes
from packcache.policies import FullCache, PackCache

__all__ = ["TARGETS", "Target", "read_results", "render"]

#: Names of the files that are read.
PATTERN = "bench_*.json"

#: A kernel on a CPU should reach this share of its ceiling.
KERNEL_AIM = 0.7

#: The engine: the full cache may take so much longer than `torch-full`, PackCache than a window of
#: equally many tokens; and packing and rebase so much of a latent frame.
LONGER, PACKING = 1.02, 0.01

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
    preset: str = "exact"
    over_stock: bool = False
    as_predicted: bool = False

    @property
    def against(self) -> str:
        return "stock" if self.over_stock else "full cache, exact"

    def fits(self, result: Mapping[str, Any]) -> bool:
        """Is the result of this workload?"""
        work = result["workload"]
        large = self.model == "digits" or work["size"] == [672, 384]
        same = (work["model"], work["frames"]) == (self.model, self.frames) and large
        return same and self.task in (None, work["task"])

    def reached(self, result: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The measured ratios, if there are any."""
        full, packed = (_label(result, repr(policy)) for policy in (FullCache(), PackCache()))
        row = _row(result, packed, self.preset)
        if row is None or self.over_stock:
            return row and row["over"].get("stock")
        return row if result["reference"] == f"{full} exact" else None


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

_INTRO = """\
# Performance

Made by `packcache bench --page docs/performance.md` from `benchmarks/results/bench_*.json`; do
not edit. Every row of a table was measured in one process, side by side with the others: medians,
and bootstrap intervals in brackets. TOTAL is the whole clip, from the prompt to the last commit;
LAST all steps, the commit and the packing of the last latent frame.

Ratios are against the full cache on this package's own engine, exact, not against a slower one.
Beside each stands what was predicted before the run: operations of each kind over the ceiling of
that kind (matrix product, fused attention), which was measured in the same run. The floor is the
least that the same operations can take there, reading included; its share says how much of the
time taken could not be less. `exact`, `balanced` and `fast` say what a denoising step takes over
from earlier ones. `torch-full` is a plain loop over a contiguous cache, `stock` upstream's way of
computing.
"""


def read_results(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of each stored result, by name. Raises InputError if there is none."""
    found = [(path.name, read_json(path)) for path in sorted(folder.glob(PATTERN))]
    if not found:
        raise InputError(
            f"no {PATTERN} in {folder}: write one with packcache bench --out, or name another "
            "folder with --results"
        )
    for name, result in found:
        if result.get("schema") != SCHEMA:
            raise InputFileError(
                f"{name} has schema {result.get('schema')!r}, expected {SCHEMA!r}: move it away"
            )
    return found


def render(folder: Path) -> str:
    """The whole page as Markdown."""
    results, guards = read_results(folder), read_guards(folder)
    parts = [_INTRO, _targets([result for _, result in results], guards)]
    parts += [guard_section(guards)] if guards else []
    parts += [_section(name, result) for name, result in results]
    return "\n".join(parts)


# --- targets --------------------------------------------------------------------------------------


def _targets(
    results: Sequence[Mapping[str, Any]], guards: Sequence[tuple[str, Mapping[str, Any]]]
) -> str:
    head = ("where", "against", "measured on", "LAST", "aim", "", "TOTAL", "aim", "")
    rows = [row for target in TARGETS for row in _target_rows(target, results, guards)]
    rows += [row for result in results for row in (*_kernel_rows(result), *_engine_rows(result))]
    return "## Targets\n\n3B at 672x384; PackCache.\n\n" + _table(head, rows) + "\n"


def _target_rows(
    target: Target,
    results: Sequence[Mapping[str, Any]],
    guards: Sequence[tuple[str, Mapping[str, Any]]],
) -> list[list[str]]:
    """A line for each result that tells, or one that says that none does."""
    counts = "" if target.preset == "exact" else counted(guards, repr(PackCache()), target.preset)
    aims = (f">= {target.last:g}x", f">= {target.total:g}x")
    lines = []
    for result in results:
        found = target.reached(result) if target.fits(result) else None
        if found is not None:
            last, total = found["speedup_last"], found["speedup_total"]
            verdict = _verdict(last, target.last)
            if target.as_predicted:
                off = last / found["predicted_last"] - 1
                near = "met" if abs(off) <= PREDICTED_WITHIN else "missed"
                verdict += f"; {off:+.0%} of predicted, {PREDICTED_WITHIN:.0%} allowed: {near}"
            cells = [_measured(found, "last"), aims[0], verdict]
            cells += [_measured(found, "total"), aims[1], _verdict(total, target.total)]
            lines.append([target.where + counts, target.against, _place(result), *cells])
    none = [target.where + counts, target.against, "*not run*", "-", aims[0], "", "-", aims[1], ""]
    return lines or [none]


def _kernel_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """How near the kernels of the full cache come to this machine's ceilings, on a CPU.

    Not asked of the toy, whose layers are too small to be bound by them.
    """
    row = _row(result, _label(result, repr(FullCache())), "exact")
    elsewhere = result["environment"]["device"] != "cpu" or result["workload"]["model"] == "toy"
    if elsewhere or row is None or not row["kernel_shares"]:
        return []
    return [
        [
            f"{_short(result)}: {kind} kernels", "measured ceiling", _place(result),
            f"{share:.0%}", f">= {KERNEL_AIM:.0%}", _verdict(share, KERNEL_AIM, percent=True),
            "", "", "",
        ]
        for kind, share in row["kernel_shares"].items()
        if kind != "head"
    ]  # fmt: skip


def _engine_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """What the engine itself may cost, by the bounds of the intervals."""
    full, packed = (
        _row(result, _label(result, repr(policy)), "exact") for policy in (FullCache(), PackCache())
    )
    rows = []
    for row, name, other in ((full, "full cache", "torch-full"), (packed, "packcache", "window")):
        found = row["over"].get(other) if row else None
        if found is not None:
            low, high = (1 / bound for bound in reversed(found["speedup_last_interval"]))
            took = f"{1 / found['speedup_last']:.3f}x ({low:.3f} to {high:.3f})"
            cells = [f"{_short(result)}: time of the {name}", other, _place(result), took]
            rows.append([*cells, f"<= {LONGER:g}x", _bounded(low, high, LONGER), "", "", ""])
    share = packed["bookkeeping_share"] if packed else None
    if share is not None:
        cells = [f"{_short(result)}: packing and rebase", "a latent frame", _place(result)]
        verdict = _bounded(share, share, PACKING)
        rows.append([*cells, f"{share:.2%}", f"<= {PACKING:.0%}", verdict, "", "", ""])
    return rows


def _bounded(low: float, high: float, most: float) -> str:
    if high <= most:
        return "met"
    return "missed" if low > most else "not told: the interval lies on both sides"


def _verdict(value: float, aim: float, *, percent: bool = False) -> str:
    """Met or missed, and by how much."""
    by = f"{abs(value - aim):.0%}" if percent else f"{abs(value - aim):.2f}x"
    return f"met, {by} more" if value >= aim else f"missed by {by}"


# --- one result -----------------------------------------------------------------------------------


def _section(name: str, result: Mapping[str, Any]) -> str:
    place, ceilings = result["environment"], result["ceilings"]
    rows = [row for row in result["results"] if row["complete"]]
    parts = [f"## {_short(result)}: {place['device']}{_composed(result)}\n", f"{title(result)}.\n"]
    parts.append(
        f"{place['processor']}, {place['cores']} cores; PyTorch {place['torch']}, Python "
        f"{place['python']}, packcache {place['packcache']} at {place['commit']}; ceilings "
        f"{ceilings['matmul'] / 1e9:.0f} Gop/s (matrix product), {ceilings['attention'] / 1e9:.0f} "
        f"Gop/s (attention), {ceilings['copy'] / 1e9:.1f} GB/s (copy); {_tag(result)}. From "
        f"`{name}`.\n"
    )
    if rows:
        parts += [_times(result, rows), "", _parts(result, rows), ""]
    if result["equal_reuse"]:
        parts += ["Packing's share: against the full cache with the same preset.\n"]
        parts += [_equal(result), ""]
    parts += [f"- {note.removeprefix('note: ')} ({_tag(result)})" for note in notes(result)]
    missing = [row for row in result["results"] if row["reason"]]
    parts += [f"- {_name(row)} has no numbers: {row['reason']} ({_tag(result)})" for row in missing]
    return "\n".join(parts).rstrip() + "\n"


def _times(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    head = (f"{_tag(result)}", "TOTAL", "LAST", *_RATIOS, "floor's share")
    return _table(
        head,
        [
            [
                _name(row), seconds_text(row["total_s"]), seconds_text(row["last_s"]),
                *_ratios(row), f"{row['floor_share']:.0%}",
            ]
            for row in rows
        ],
    )  # fmt: skip


_RATIOS = ("TOTAL faster (95 %)", "predicted", "LAST faster (95 %)", "predicted")


def _ratios(row: Mapping[str, Any]) -> list[str]:
    """Measured with the interval, and predicted."""
    cells = []
    for name in ("total", "last"):
        cells += [_measured(row, name), f"{row[f'predicted_{name}']:.2f}x"]
    return cells


def _measured(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"speedup_{name}_interval"]
    return f"{row[f'speedup_{name}']:.2f}x ({low:.2f} to {high:.2f})"


def _parts(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    kinds = ("attention", "linear", "head")
    head = (f"LAST by kind, {_tag(result)}", *kinds, "packing and rebase", "K/V", "peak")
    lines = []
    for row in rows:
        shares, own = row["shares"] or {}, row["bookkeeping_share"]
        lines.append(
            [
                _name(row), *(f"{shares[kind]:.0%}" if kind in shares else "-" for kind in kinds),
                "-" if own is None else f"{own:.1%}",
                *(_bytes(row[name]) for name in ("kv_bytes", "peak_bytes")),
            ]
        )  # fmt: skip
    return _table(head, lines)


def _bytes(size: int | None) -> str:
    return "-" if size is None else show_bytes(size)


def _equal(result: Mapping[str, Any]) -> str:
    rows = [[_name(row), *_ratios(row)] for row in result["equal_reuse"]]
    return _table((_tag(result), *_RATIOS), rows)


# --- words ----------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _tag(result: Mapping[str, Any]) -> str:
    """Where its numbers come from, as every page has to say."""
    if result["environment"]["device"] != "cpu":
        return "*GPU run*"
    return "*embedded model*" if result["workload"]["weights"] == "embedded" else "*random weights*"


def _composed(result: Mapping[str, Any]) -> str:
    return "" if result["workload"]["layers"] is None else ", composed"


def _place(result: Mapping[str, Any]) -> str:
    """On what a target was measured."""
    return f"{result['environment']['device']}{_composed(result)}, {_tag(result)}"


def _short(result: Mapping[str, Any]) -> str:
    work = result["workload"]
    width, height = work["size"]
    return f"{work['model']}, {work['task']} {width}x{height}, {work['frames']} frames"


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['policy']} {row['preset']}"


def _label(result: Mapping[str, Any], settings: str) -> str | None:
    """What a policy is called in a result."""
    labels = [row["policy"] for row in result["results"] if row["settings"] == settings]
    return labels[0] if labels else None


def _row(result: Mapping[str, Any], policy: str | None, preset: str) -> Mapping[str, Any] | None:
    """A finished row."""
    for row in result["results"]:
        if (row["policy"], row["preset"]) == (policy, preset) and row["complete"]:
            return row
    return None
