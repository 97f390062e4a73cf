"""An evaluation to read: lines of text, and one HTML file that needs no network.

Both are made from the JSON alone; `cells` has the tables.
"""

from __future__ import annotations

import html
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from packcache.errors import InputFileError
from packcache.evaluate import cells
from packcache.evaluate.evaluation import SCHEMA
from packcache.evaluate.evaluation_plot import draw
from packcache.files import replacing, write_json, write_text

__all__ = ["lines", "render", "save"]


def save(result: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Write evaluate.json, report.html and evaluate.png (the primaries) into `folder`."""
    paths = {name: folder / name for name in ("evaluate.json", "report.html", "evaluate.png")}
    write_json(result, paths["evaluate.json"])
    write_text(paths["report.html"], render(result))
    picture = draw(result, "primaries", kind="png")
    if picture is None:
        del paths["evaluate.png"]
    else:
        with replacing(paths["evaluate.png"]) as draft:
            draft.write_bytes(picture)
    return paths


# --- text -----------------------------------------------------------------------------------------


def lines(result: Mapping[str, Any]) -> list[str]:
    """The primaries as a table, and what the controls say of the suite."""
    _check(result)
    told = [_subtitle(result), ""]
    for primary in result["workload"]["primaries"]:
        rows = [one for one in result["primaries"] if one["primary"] == primary["name"]]
        if not rows:
            continue
        unit = cells.UNITS[primary["name"]]
        told.append(f"{primary['name']}, full {rows[0]['reference']:.3g}, lost in {unit}")
        for one in rows:
            lost = f"{one['lost']:+.3g} ({one['low']:+.3g} to {one['high']:+.3g})"
            why = f": {one['why']}" if one["why"] else ""
            told.append(
                f"  {one['row']:22} {one['mean']:9.3g}  lost {lost:32} {one['verdict']}{why}"
            )
    return [*told, "", *cells.power_lines(result)]


def _subtitle(result: Mapping[str, Any]) -> str:
    work, place = result["workload"], result["environment"]
    cut = f", {work['exploratory']}: exploratory" if work["exploratory"] else ""
    left = ", ".join(f"{part} {count} clips" for part, count in result["missing"].items())
    cut += f"; NOT COMPLETE, missing: {left}" if left else ""
    return (
        f"model {work['model']}, protocol {work['protocol']}{cut}; {place['device']}, PyTorch "
        f"{place['torch']}, packcache {place['packcache']} at {place['commit']}"
    )


def _check(result: Mapping[str, Any]) -> None:
    if result.get("schema") != SCHEMA:
        raise InputFileError(
            f"this is schema {result.get('schema')!r}, expected {SCHEMA!r}: give evaluate.json"
        )


# --- HTML -----------------------------------------------------------------------------------------


def render(result: Mapping[str, Any]) -> str:
    """The report as HTML text, pictures inside."""
    _check(result)
    template = string.Template(
        (resources.files("packcache.evaluate") / "evaluation.html").read_text(encoding="utf-8")
    )
    told = cells.power_lines(result)
    return template.substitute(
        subtitle=html.escape(_subtitle(result)),
        power="".join(f'<p class="strong">{html.escape(line)}</p>' for line in told),
        forest=_figure(result, "primaries"),
        primaries=_table(cells.primaries(result)),
        controls=_table(cells.controls(result)),
        parts="".join(_parts(result)),
        workload=html.escape(json.dumps(result["workload"])),
        environment=html.escape(json.dumps(result["environment"])),
    )


def _figure(result: Mapping[str, Any], panel: str) -> str:
    drawn = draw(result, panel)
    if drawn is None:
        return ""
    text = drawn.decode()
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def _parts(result: Mapping[str, Any]) -> list[str]:
    """The sections below the primaries, where something was asked."""
    told = []
    if result["replay"]:
        told += ["<h2>Replay</h2>", _figure(result, "replay"), _table(cells.replayed(result))]
    if result["memory"]:
        told += ["<h2>Memory</h2>", _figure(result, "memory")]
    told.append(_figure(result, "frontier"))
    for plan in cells.plans(result):
        told += [f"<h2>{plan['frames']} frames, made freely</h2>", _table(cells.made(plan))]
        told += [f"<p>{_PAIRED}</p>", _table(cells.beside_each_other(plan))]
        told += [f"<p>{_BESIDE}</p>", _table(cells.beside_full(plan))]
        told += [f"<p>{_DRIFTED}</p>", _table(cells.drifted(plan))]
    for panel in ("identity", "drift", "survival", "motion"):
        told.append(_figure(result, panel))
    return told


_PAIRED = (
    "Identity (digit and colour right) in points, row less row, paired by prompt: intervals that "
    "overlap above may still be told apart here."
)
_BESIDE = (
    "Beside the full cache's clips of the same prompts and draws: PSNR and SSIM say how far pixels "
    "have gone another way, not which way is better."
)
_DRIFTED = (
    "Drift, the last 15 % of latent frames less the first: the full cache's own, and by how much "
    "more every other row changes, clip by clip. Clean footage drifts too."
)

#: How a verdict is coloured.
_KINDS = {"no worse": "good", "worse": "bad"}


def _table(told: cells.Table) -> str:
    """Cells are text; the last of a row is coloured if it is a verdict."""
    heads, rows = told
    kinds = {name: ' class="verdict"' if name == "verdict" else "" for name in heads}
    head = "".join(f"<th{kinds[name]}>{html.escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(_cells(heads, row))}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>' if rows else ""


def _cells(heads: Sequence[str], row: Sequence[str]) -> Iterator[str]:
    for head, cell in zip(heads, row, strict=True):
        if head == "verdict":
            kind = _KINDS.get(cell.partition(":")[0], "soft")
            yield f'<td class="verdict {kind}">{html.escape(cell)}</td>'
        else:
            yield f"<td>{html.escape(cell)}</td>"
