"""An evaluation to read: lines of text, and one HTML file that needs no network.

Both are made from the JSON alone. A consistency, smoothness or warp number never stands without the
motion beside it: a clip that stands still is perfect in all of them (evaluation 8b).
"""

from __future__ import annotations

import html
import json
import string
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from packcache.errors import InputFileError
from packcache.evaluate.evaluation import SCHEMA
from packcache.evaluate.evaluation_plot import draw
from packcache.files import replacing, write_json, write_text

__all__ = [
    "COLUMNS",
    "UNITS",
    "lines",
    "nats",
    "power_lines",
    "render",
    "row_cells",
    "save",
    "spent_words",
]

#: What a primary's loss is counted in.
UNITS = {
    "recall": "points", "replay_kl": "nats", "identity_drift": "points",
    "motion_ratio": "log ratio",
}  # fmt: skip

#: Columns of free running: (name, where it stands, head, factor, decimals). Motion comes first.
COLUMNS = (
    ("flow_motion_top5_dis", "clip", "motion, px", 1, 2),
    ("frozen_share", "clip", "frozen, %", 100, 1),
    ("identity", "true", "identity, %", 1, 1),
    ("digit", "true", "digit, %", 1, 1),
    ("colour", "true", "colour, %", 1, 1),
    ("count", "true", "count, %", 1, 1),
    ("direction", "clip", "direction, %", 100, 1),
    ("flow_interp_smoothness_dis", "clip", "smooth", 1, 4),
    ("flicker_mae", "clip", "flicker", 1, 4),
    ("warp_error_dis", "clip", "warp", 1, 5),
    ("held", "clip", "held", 1, 0),
)


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
        unit = UNITS[primary["name"]]
        told.append(f"{primary['name']}, full {rows[0]['reference']:.3g}, lost in {unit}")
        for one in rows:
            lost = f"{one['lost']:+.3g} ({one['low']:+.3g} to {one['high']:+.3g})"
            why = f": {one['why']}" if one["why"] else ""
            told.append(
                f"  {one['row']:22} {one['mean']:9.3g}  lost {lost:32} {one['verdict']}{why}"
            )
    return [*told, "", *power_lines(result)]


def power_lines(result: Mapping[str, Any]) -> list[str]:
    told = []
    for one in result["power"]:
        on = ", ".join(one["on"])
        told.append(
            f"control {one['control']}: told from full on {on}"
            if on
            else f"control {one['control']}: NOT told from full: this suite has no power against it"
        )
    return told


def _subtitle(result: Mapping[str, Any]) -> str:
    work, place = result["workload"], result["environment"]
    cut = f", cut to {work['quick']} prompts: exploratory" if work["exploratory"] else ""
    left = ", ".join(f"{part} {count} clips" for part, count in result["missing"].items())
    cut += f"; NOT COMPLETE, missing: {left}" if left else ""
    return (
        f"model {work['model']}, protocol {work['protocol']}{cut}; {place['device']}, PyTorch "
        f"{place['torch']}, packcache {place['packcache']} at {place['commit']}"
    )


def spent_words(result: Mapping[str, Any]) -> str:
    """What clips and answers took, as the end of a sentence; empty where nobody knows."""
    spent = result["spent"]
    if not spent["answers"]:
        return ""
    part = "" if spent["answers"] == spent["of"] else f" for {spent['answers']} of {spent['of']}"
    return f"; clips and answers took {spent['core_hours']:.1f} hours of one core{part}"


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
    return template.substitute(
        subtitle=html.escape(_subtitle(result)),
        power="".join(f'<p class="strong">{html.escape(line)}</p>' for line in power_lines(result)),
        forest=_figure(result, "primaries"),
        primaries=_primaries(result),
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


def _primaries(result: Mapping[str, Any]) -> str:
    heads = ("row", "primary", "prompts", "full", "row's", "lost", "95 %", "p", "verdict")
    rows = []
    for one in result["primaries"]:
        kind = {"no worse": "good", "worse": "bad", "told apart": "soft"}.get(
            one["verdict"], "soft"
        )
        why = f" ({html.escape(one['why'])})" if one["why"] else ""
        p = one["p_holm"] if one["p_holm"] == one["p_holm"] else one["p"]
        cells = (
            html.escape(one["row"]), one["primary"].replace("_", " "), str(one["prompts"]),
            f"{one['reference']:.3g}", f"{one['mean']:.3g}", f"{one['lost']:+.3g}",
            f"{one['low']:+.3g} to {one['high']:+.3g}", f"{p:.2g}",
        )  # fmt: skip
        rows.append(
            [
                *(f"<td>{cell}</td>" for cell in cells),
                f'<td class="verdict {kind}">{one["verdict"]}{why}</td>',
            ]
        )
    return _table(heads, rows)


def _parts(result: Mapping[str, Any]) -> list[str]:
    """The sections below the primaries, where something was asked."""
    told = []
    if result["replay"]:
        told += ["<h2>Replay</h2>", _figure(result, "replay"), _replay(result)]
    if result["memory"]:
        told += ["<h2>Memory</h2>", _figure(result, "memory")]
    told.append(_figure(result, "frontier"))
    for plan in sorted(result["running"], key=lambda plan: plan["frames"]):
        if plan["rows"]:
            told += [f"<h2>{plan['frames']} frames, made freely</h2>", _running(plan)]
    for panel in ("identity", "survival", "motion"):
        told.append(_figure(result, panel))
    return told


def _replay(result: Mapping[str, Any]) -> str:
    heads = (
        "row",
        "KL, nats",
        "95 %",
        "same first code",
        "attention lost",
        "surprise, nats",
        "full's",
        "true clips, more than full",
    )
    rows = []
    for row in result["replay"]:
        kl, same, lost, own, full = (
            row[name] for name in ("kl", "agreement", "lost", "nll", "nll_full")
        )
        true = row["nll_true"] and row["nll_true"]["more_than_full"]
        cells = (
            html.escape(row["row"]), nats(kl["mean"]), f"{nats(kl['low'])} to {nats(kl['high'])}",
            f"{100 * same['mean']:.1f} %", f"{100 * lost['mean']:.1f} %", f"{own['mean']:.3f}",
            f"{full['mean']:.3f}",
            f"{true['mean']:+.4f}" if true else "-",
        )  # fmt: skip
        rows.append([f"<td>{cell}</td>" for cell in cells])
    return _table(heads, rows)


def nats(value: float) -> str:
    """Four decimals; what rounds to nothing has no sign."""
    return f"{round(value, 4) + 0.0:.4f}"


def _running(plan: Mapping[str, Any]) -> str:
    heads = ("row", *(head for _, _, head, _, _ in COLUMNS))
    rows = []
    for row in plan["rows"]:
        rows.append([f"<td>{html.escape(cell)}</td>" for cell in row_cells(row)])
    return _table(heads, rows)


def row_cells(row: Mapping[str, Any]) -> list[str]:
    """A row of free running: its name, then `COLUMNS`."""
    found = [(row[place].get(name), factor, digits) for name, place, _, factor, digits in COLUMNS]
    told = ["-" if own is None else f"{f * own['mean']:.{digits}f}" for own, f, digits in found]
    return [row["row"], *told]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of cells that are HTML already, tags included."""
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'
