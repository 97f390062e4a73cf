"""The picture of a memory horizon: recall against gap, one line a policy.

Drawn from the JSON of `memory.Horizon` alone, so a stored result can be drawn again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packcache.errors import InvalidSetting
from packcache.evaluate.memory import METRICS, SCHEMA, SHARES
from packcache.files import check_folder, replacing

__all__ = ["plot"]

_INK, _SOFT = "#22242c", "#7d8290"
_SPREAD = 0.3  # gaps, over which the intervals of all policies stand side by side
_PALETTE = ("#343a46", "#1971c2", "#2f9e44", "#9c36b5", "#e8590c")
_PALETTE += ("#0c8599", "#c2255c", "#e8a200", "#6741d9", "#74b816", "#a0522d", "#868e96", "#f06595")

#: Styles of lines by how many latent frames of history a policy may hold: up to, style, name.
_GROUPS: tuple[tuple[float, Any, str], ...] = (
    (0.0, (0, (1, 1.5)), "none"),
    (1.5, "-", "1 frame"),
    (5.0, (0, (6, 2)), "2 to 5 frames"),
    (float("inf"), (0, (7, 1.5, 1, 1.5)), "all"),
)


def plot(result: Mapping[str, Any], path: str | Path, *, metric: str = "object") -> Path:
    """Recall against gap as .png or .svg, from `Horizon.to_json()` alone; one line a policy.

    Bars are Wilson's 95 % intervals (the bootstrap's for `nll` and `ground`). A line's style says
    how many history tokens its policy may hold; names stand in the order of the means.
    """
    path = Path(path)
    if result.get("schema") != SCHEMA or metric not in METRICS:
        raise InvalidSetting(
            f"cannot plot {metric!r} of schema {result.get('schema')!r}, expected one of "
            f"{', '.join(METRICS)} of {SCHEMA!r}"
        )
    if path.suffix.lower() not in (".png", ".svg"):
        raise InvalidSetting(f"cannot draw {path.name!r}: known are .png and .svg")
    check_folder(path.parent)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidSetting("a picture needs matplotlib: pip install 'packcache[plot]'") from error
    figure = Figure(figsize=(8, 5), dpi=200, facecolor="white")
    axes = figure.add_axes((0.1, 0.11, 0.66, 0.76))
    _frame(axes, result["workload"], metric)
    drawn = _lines(axes, result, metric)
    if not drawn:
        raise InvalidSetting(f"the result holds no {metric!r}: nothing of the kind was asked")
    _names(axes, drawn)
    with replacing(path) as draft:
        figure.savefig(draft)
    return path


def _frame(axes: Any, workload: Mapping[str, Any], metric: str) -> None:
    """Scales, title, chance."""
    gaps, chance = sorted(workload["gaps"]), workload["chance"].get(metric.split("_")[-1])
    seen = {"history": "earlier frames", "anchor": "the condition image"}[workload["source"]]
    axes.set_title(
        f"What is behind the curtain? Seen in {seen}, {workload['clips']} clips",
        loc="left",
        fontsize=11,
        color=_INK,
        pad=26,
    )
    axes.set_xlabel("latent frames under the curtain", color=_INK)
    axes.set_ylabel(metric.replace("_", " ") + (" right" if chance else ""), color=_INK)
    axes.set_xticks(range(len(gaps)), [str(gap) for gap in gaps])
    axes.set_xlim(-0.2, len(gaps) - 0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8ee", linewidth=0.8)
    axes.set_axisbelow(True)
    if metric in SHARES or chance:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    if chance:
        axes.axhline(chance, color=_SOFT, linewidth=0.9)
        axes.text(axes.get_xlim()[0], chance + 0.008, " chance", color=_SOFT, fontsize=8)


def _lines(axes: Any, result: Mapping[str, Any], metric: str) -> list[tuple[float, str, Any]]:
    """Draws lines and intervals, side by side; returns each line's mean, its name and itself."""
    drawn: list[tuple[float, str, Any]] = []
    groups: dict[str, Any] = {}
    gaps, policies = sorted(result["workload"]["gaps"]), result["policies"]
    for number, policy in enumerate(policies):
        rows = [r for r in result["results"] if r["policy"] == policy["policy"] and r[metric]]
        if not rows:
            continue
        rows.sort(key=lambda row: row["gap"])
        bound = policy["bound_tokens"]
        frames = None if bound is None else bound / result["workload"]["tokens_per_frame"]
        _, style, group = next(
            (g for g in _GROUPS if frames is not None and frames <= g[0]), _GROUPS[-1]
        )
        cells = [row[metric] for row in rows]
        aside = (number / max(1, len(policies) - 1) - 0.5) * _SPREAD
        x, y = [gaps.index(row["gap"]) + aside for row in rows], [cell["mean"] for cell in cells]
        bounds = [cell.get("wilson", (cell["low"], cell["high"])) for cell in cells]
        colour = _PALETTE[number % len(_PALETTE)]
        axes.vlines(x, *zip(*bounds, strict=True), color=colour, alpha=0.4, linewidth=1.1)
        (line,) = axes.plot(
            x, y, linestyle=style, color=colour, linewidth=1.7, marker="o", markersize=3.5
        )
        groups.setdefault(group, axes.plot([], [], linestyle=style, color=_INK, linewidth=1.4)[0])
        drawn.append((sum(y) / len(y), policy["policy"], line))
    if groups:
        order = [group for _, _, group in _GROUPS if group in groups]
        legend = axes.legend(
            [groups[group] for group in order],
            [f"holds {group}" for group in order],
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=len(order),
            frameon=False,
            fontsize=8,
            handlelength=3.2,
            columnspacing=1.6,
        )
        axes.add_artist(legend)  # a second legend would replace it
    return drawn


def _names(axes: Any, drawn: Sequence[tuple[float, str, Any]]) -> None:
    """Names right of the axes in the order of their means, each with its line."""
    ordered = sorted(drawn, key=lambda line: -line[0])
    axes.legend(
        [line for _, _, line in ordered],
        [name for _, name, _ in ordered],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        fontsize=9,
        labelcolor="linecolor",
        handlelength=3.2,
        labelspacing=0.7,
    )
