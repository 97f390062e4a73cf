"""docs/performance.md, made from stored results: `packcache bench --page docs/performance.md`.

Numbers are rounded and nowhere typed; the only others are the targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packcache.bench.guarded import guard_section, read_guards
from packcache.bench.predict import STOCK
from packcache.bench.promised import read_promise
from packcache.bench.result import SCHEMA
from packcache.bench.table import notes, seconds_text, title
from packcache.bench.targets import Beside, targets_section
from packcache.bench.words import (
    apart,
    composed,
    find,
    label_of,
    measured,
    name_of,
    short,
    tag,
)
from packcache.errors import InputError
from packcache.files import read_result
from packcache.lumos.units import show_bytes
from packcache.markdown import table
from packcache.policies import FullCache

__all__ = ["read_results", "render"]

#: Names of the files that are read.
PATTERN = "bench_*.json"

_INTRO = """\
# Performance

Made by `packcache bench --page docs/performance.md` from `benchmarks/results/bench_*.json`; do
not edit. The rows of a table were measured in one process, taking turns, unless one says that it
was not side by side; those called composed were not run, but put together from pieces that were
measured so. Medians, and bootstrap intervals in brackets. TOTAL is the whole clip, from the prompt
to the last commit; LAST all steps, the commit and the packing of the last latent frame.

Ratios are against the full cache on this package's own engine, exact, not against a slower one.
Beside each stands what was predicted before the run: operations of each kind over the ceiling of
that kind (matrix product, fused attention), which was measured in the same run. The floor is the
least that the same operations can take there, reading included; its share says how much of the
time taken could not be less. `exact`, `balanced` and `fast` say what a denoising step takes over
from earlier ones; a speed with `balanced` or `fast` counts only if the quality guard held, which
stands behind its name. `torch-full` is a plain loop over a contiguous cache, `stock` upstream's way
of computing, told only where it was held against upstream itself.
"""


def read_results(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of each stored result, by name. Raises InputError if there is none."""
    paths = sorted(folder.glob(PATTERN))
    if not paths:
        raise InputError(
            f"no {PATTERN} in {folder}: write one with packcache bench --out, or name another "
            "folder with --results"
        )
    return [(path.name, read_result(path, SCHEMA, "move it away")) for path in paths]


def render(folder: Path) -> str:
    """The whole page as Markdown."""
    results = read_results(folder)
    beside = Beside(guards=read_guards(folder), stock=read_promise(folder))
    parts = [_INTRO, targets_section([result for _, result in results], beside)]
    parts += [guard_section(beside.guards)] if beside.guards else []
    parts += [_section(name, result, beside) for name, result in results]
    return "\n".join(parts)


# --- one result -----------------------------------------------------------------------------------


def _section(name: str, result: Mapping[str, Any], beside: Beside) -> str:
    place, ceilings = result["environment"], result["ceilings"]
    done = [row for row in result["results"] if row["complete"]]
    rows = [row for row in done if beside.tells(result, row["policy"])]
    names = {name_of(row): name_of(row) + beside.counts(result, row) for row in rows}
    parts = [f"## {short(result)}: {place['device']}{composed(result)}\n", f"{title(result)}.\n"]
    parts.append(
        f"{place['processor']}, {place['cores']} cores; PyTorch {place['torch']}, Python "
        f"{place['python']}, packcache {place['packcache']} at {place['commit']}; ceilings "
        f"{ceilings['matmul'] / 1e9:.0f} Gop/s (matrix product), {ceilings['attention'] / 1e9:.0f} "
        f"Gop/s (attention), {ceilings['copy'] / 1e9:.1f} GB/s (copy); {tag(result)}. From "
        f"`{name}`.\n"
    )
    if rows:
        parts += [_times(result, rows, names), "", _parts(result, rows, names), ""]
    if result["equal_reuse"]:
        parts += ["Packing's share: against the full cache with the same preset.\n"]
        parts += [_equal(result, names), ""]
    parts += [f"- {note.removeprefix('note: ')} ({tag(result)})" for note in notes(result)]
    if any(row["policy"] == STOCK for row in done):
        told = "" if STOCK in {row["policy"] for row in rows} else "no row of it: "
        parts.append(f"- {told}{beside.promise(result)}")
    missing = [row for row in result["results"] if row["reason"]]
    parts += [
        f"- {name_of(row)} has no numbers: {row['reason']} ({tag(result)})" for row in missing
    ]
    return "\n".join(parts).rstrip() + "\n"


def _times(
    result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> str:
    base = next(row for row in result["results"] if name_of(row) == result["reference"])
    head = (f"{tag(result)}", "TOTAL", "LAST", *_RATIOS, "floor's share")
    return table(
        head,
        [
            [
                names[name_of(row)] + apart(row, base),
                seconds_text(row["total_s"]), seconds_text(row["last_s"]),
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
        cells += [measured(row, name), f"{row[f'predicted_{name}']:.2f}x"]
    return cells


def _parts(
    result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> str:
    kinds = ("attention", "linear", "head")
    head = (f"LAST by kind, {tag(result)}", *kinds, "packing and rebase", "K/V", "peak")
    lines = []
    for row in rows:
        shares, own = row["shares"] or {}, row["bookkeeping_share"]
        lines.append(
            [
                names[name_of(row)],
                *(f"{shares[kind]:.0%}" if kind in shares else "-" for kind in kinds),
                "-" if own is None else f"{own:.1%}",
                *(_bytes(row[name]) for name in ("kv_bytes", "peak_bytes")),
            ]
        )  # fmt: skip
    return table(head, lines)


def _bytes(size: int | None) -> str:
    return "-" if size is None else show_bytes(size)


def _equal(result: Mapping[str, Any], names: Mapping[str, str]) -> str:
    full, lines = label_of(result, repr(FullCache())), []
    for share in result["equal_reuse"]:
        row, other = (find(result, policy, share["preset"]) for policy in (share["policy"], full))
        words = apart(row, other) if row and other else ""
        lines.append([names[name_of(share)] + words, *_ratios(share)])
    return table((tag(result), *_RATIOS), lines)
