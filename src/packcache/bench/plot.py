"""The picture of a benchmark: LAST of every row beside its floor.

Drawn from the JSON of `result.Report` alone, so a stored result can be drawn again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packcache.bench.result import SCHEMA
from packcache.bench.table import title
from packcache.errors import InvalidSetting
from packcache.files import check_folder, replacing

__all__ = ["check_name", "plot"]

_INK, _SOFT, _GRID = "#22242c", "#7d8290", "#e6e8ee"

#: Colours of presets, from exact on, and of the baselines.
_PALETTE = ("#1971c2", "#2f9e44", "#e8590c", "#9c36b5", "#0c8599", "#c2255c")
_BASELINE = "#868e96"

_BAR, _GAP = 0.78, 0.55  # of a row's height; between policies
_LEFT, _WIDE = 0.2, 0.76  # of the picture: where bars begin, and how far they may reach
_EDGE = (0.02 - _LEFT) / _WIDE  # of the bars' width: where titles begin, which are long


def check_name(path: Path) -> None:
    """Raises InvalidSetting for what cannot be drawn."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise InvalidSetting(f"cannot draw {path.name!r}: known are .png and .svg")


def plot(result: Mapping[str, Any], path: str | Path) -> Path:
    """Seconds of the last latent frame as .png or .svg, a bar a row, from `Report.to_json()`.

    Whiskers are 95 % intervals, the mark in a bar is its floor: what the same operations take at
    this machine's ceilings. Numbers are times faster than the reference, in brackets as predicted.
    """
    path = Path(path)
    rows = [row for row in result.get("results", ()) if row["complete"]]
    if result.get("schema") != SCHEMA or not rows:
        raise InvalidSetting(
            f"cannot plot schema {result.get('schema')!r} with {len(rows)} finished rows, expected "
            f"some of {SCHEMA!r}"
        )
    check_name(path)
    check_folder(path.parent)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidSetting("a picture needs matplotlib: pip install 'packcache[plot]'") from error
    figure = Figure(figsize=(8.6, 1.6 + 0.34 * len(rows)), dpi=200, facecolor="white")
    inch = figure.get_figheight()
    axes = figure.add_axes((_LEFT, 0.55 / inch, _WIDE, 1 - 1.1 / inch))
    _frame(axes, result, max(row["last_s_interval"][1] for row in rows))
    _bars(axes, result, rows)
    with replacing(path) as draft:
        figure.savefig(draft)
    return path


def _frame(axes: Any, result: Mapping[str, Any], most: float) -> None:
    """Scales and titles; room on the right for the numbers."""
    axes.set_title("The last latent frame", loc="left", x=_EDGE, fontsize=11, color=_INK, pad=15)
    axes.set_xlabel(
        f"seconds (mark: floor); times faster than {result['reference']} (predicted)",
        fontsize=8,
        color=_INK,
    )
    axes.text(
        _EDGE, 1.005, title(result), transform=axes.transAxes, fontsize=7, color=_SOFT, va="bottom"
    )
    axes.set_xlim(0, 1.28 * most)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="both", labelsize=8, labelcolor=_INK)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _bars(axes: Any, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """A bar a row, policies apart; their colours say the preset."""
    work = result["workload"]
    colours = dict(zip(work["presets"], _PALETTE * len(work["presets"]), strict=False))
    places, place, before = [], 0.0, rows[0]["policy"]
    for row in rows:
        place += 1 + (_GAP if row["policy"] != before else 0)
        before = row["policy"]
        places.append(place)
        base = row["policy"] in work["baselines"]
        _bar(axes, place, row, _BASELINE if base else colours.get(row["preset"], _BASELINE))
    axes.set_yticks(places, [f"{row['policy']}  {row['preset']}" for row in rows])
    axes.set_ylim(places[-1] + 0.7, places[0] - 0.7)


def _bar(axes: Any, place: float, row: Mapping[str, Any], colour: str) -> None:
    low, high = row["last_s_interval"]
    floor = row["predicted"]["floor_last_s"]
    axes.barh(place, row["last_s"], height=_BAR, color=colour, alpha=0.85)
    axes.barh(place, floor, height=_BAR, color=colour, alpha=0.35, hatch="////", edgecolor="white")
    axes.plot([floor, floor], [place - _BAR / 2, place + _BAR / 2], color=_INK, linewidth=1.6)
    axes.plot([low, high], [place, place], color=_INK, linewidth=1.0)
    axes.text(
        high,
        place,
        f"  {row['speedup_last']:.2f}x ({row['predicted_last']:.2f})",
        va="center",
        fontsize=8,
        color=_INK,
    )
