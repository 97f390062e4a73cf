"""The pictures of an evaluation, drawn from its JSON alone: forest, curves, drift, survival,
memory, frontier."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from packcache.errors import InvalidSetting
from packcache.evaluate import frontier
from packcache.evaluate.cells import DRIFTS

__all__ = ["PANELS", "draw"]

_INK, _SOFT, _GRID = "#22242c", "#7d8290", "#e6e8ee"
_PALETTE = (
    "#343a46", "#1971c2", "#0c8599", "#2f9e44", "#e8590c", "#c2255c", "#6741d9", "#e8a200",
    "#868e96", "#a0522d", "#f06595", "#9c36b5", "#74b816",
)  # fmt: skip

#: Families of the frontier: a policy has the colour of its row in the protocol's other pictures,
#: further families of the same policy one of the others.
_FAMILIES = {"window": "#1971c2", "sink": "#0c8599", "uniform": "#2f9e44", "packcache": "#e8590c"}
_OTHERS = ("#6741d9", "#e8a200", "#c2255c", "#74b816")

#: How a row is drawn by what it is for.
_STYLES = {
    "reference": "-", "baseline": "-", "policy": "-", "control": (0, (4, 2)),
    "floor": (0, (1, 1.5)),
}  # fmt: skip

#: What a cache does at a latent frame's commit: marker and words.
_SHAPES = {
    "fills": ("^", "history is full"), "packs": ("v", "a first token goes"),
    "slides": ("s", "a first frame is gone"),
}  # fmt: skip

#: Panels by name; each gets axes and the result, and says whether it had something to draw.
PANELS = (
    "primaries", "replay", "identity", "drift", "survival", "memory", "motion", "frontier",
)  # fmt: skip


def draw(result: Mapping[str, Any], panel: str, *, kind: str = "svg") -> bytes | None:
    """One panel as SVG or PNG; None where the result holds nothing of it."""
    if panel not in PANELS:
        raise InvalidSetting(f"unknown panel {panel!r}: known are {', '.join(PANELS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidSetting("a picture needs matplotlib: pip install 'packcache[plot]'") from error
    figure = Figure(figsize=(9.2, 4.6), dpi=160, facecolor="white", layout="constrained")
    painters = {
        "primaries": _primaries, "replay": _replay, "identity": _identity, "survival": _survival,
        "memory": _memory, "motion": _motion, "frontier": _frontier, "drift": _drift,
    }  # fmt: skip
    if not painters[panel](figure, result):
        return None
    held = io.BytesIO()
    figure.savefig(held, format=kind)
    return held.getvalue()


def _colour(result: Mapping[str, Any], row: str) -> str:
    labels = list(result["workload"]["rows"])
    return _PALETTE[labels.index(row) % len(_PALETTE)] if row in labels else _SOFT


def _style(result: Mapping[str, Any], row: str) -> Any:
    rows = result["workload"]["rows"]
    return _STYLES[rows[row]["role"]] if row in rows else (0, (1, 2))


def _axes(figure: Any, title: str, x: str, y: str) -> Any:
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _legend(axes: Any) -> None:
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=8,
        labelcolor="linecolor", handlelength=2.8, labelspacing=0.6,
    )  # fmt: skip


def _line(
    axes: Any, result: Mapping[str, Any], row: str, x: Sequence[float], curve: Mapping[str, Any]
) -> None:
    """A mean with its band; gaps where nothing was asked."""
    mean, low, high = (
        [float("nan") if v is None else v for v in curve[n]] for n in ("mean", "low", "high")
    )
    colour = _colour(result, row)
    axes.plot(x, mean, color=colour, linestyle=_style(result, row), linewidth=1.7, label=row)
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def _mark(axes: Any, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """When each row's cache is full, packs and slides, a line a row at the foot of the axes. Until
    it packs nothing is the cache's doing."""
    where = axes.get_xaxis_transform()
    packing = [row for row in rows if _first(row, "packs") is not None]
    for number, row in enumerate(packing):
        for name, (shape, _) in _SHAPES.items():
            latent = _first(row, name)
            if latent is not None:
                axes.plot(
                    [latent], [0.025 + 0.028 * number], marker=shape, markersize=4, clip_on=False,
                    color=_colour(result, row["row"]), linestyle="none", transform=where,
                    alpha=0.85,
                )  # fmt: skip


def _shapes(figure: Any) -> None:
    """What the marks mean, below the axes."""
    from matplotlib.lines import Line2D

    known = [
        Line2D([], [], marker=shape, linestyle="none", color=_SOFT, markersize=5, label=words)
        for shape, words in _SHAPES.values()
    ]
    figure.legend(
        handles=known, loc="outside lower left", ncols=len(known), frameon=False, fontsize=8,
        labelcolor=_SOFT, handletextpad=0.2,
    )  # fmt: skip


def _first(row: Mapping[str, Any], name: str) -> int | None:
    """The latent frame of a mark, of the kind of clip in which it comes first."""
    kinds = (row["marks"] or {}).values()
    known = [marks[name] for marks in kinds if marks["packs"] is not None]
    return min((latent for latent in known if latent is not None), default=None)


def _primaries(figure: Any, result: Mapping[str, Any]) -> bool:
    """What each row loses on each primary, with its interval; the margin as a line."""
    found = result["primaries"]
    names = [
        p["name"]
        for p in result["workload"]["primaries"]
        if any(f["primary"] == p["name"] for f in found)
    ]
    if not names:
        return False
    labels = [row for row in result["workload"]["rows"] if any(f["row"] == row for f in found)]
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for own, name in zip(axes, names, strict=True):
        about = next(p for p in result["workload"]["primaries"] if p["name"] == name)
        own.set_title(name.replace("_", " "), fontsize=10, color=_INK)
        own.axvline(0, color=_SOFT, linewidth=0.9)
        if about["better"] != "near":
            own.axvline(about["no_worse"], color="#c92a2a", linewidth=0.9, linestyle=(0, (4, 3)))
        for one in (f for f in found if f["primary"] == name):
            y = labels.index(one["row"])
            colour = _colour(result, one["row"])
            own.plot([one["low"], one["high"]], [y, y], color=colour, linewidth=1.6)
            own.plot([one["lost"]], [y], marker="o", markersize=4.5, color=colour)
        own.set_yticks(range(len(labels)), labels, fontsize=8)
        own.set_ylim(len(labels) - 0.5, -0.5)
        own.set_xlabel(
            "lost against full" if about["better"] != "near" else "log ratio lost", fontsize=8
        )
        own.tick_params(axis="x", labelsize=8)
        own.spines[["top", "right"]].set_visible(False)
        own.grid(axis="x", color=_GRID, linewidth=0.8)
    return True


def _replay(figure: Any, result: Mapping[str, Any]) -> bool:
    """KL per latent frame along the full cache's clips."""
    rows = result["replay"]
    if not rows:
        return False
    axes = _axes(
        figure, "Teacher-forced: how far from the full cache", "latent frame",
        "KL(full || row), nats a code",
    )  # fmt: skip
    count = max(len(row["curves"]["kl"]["mean"]) for row in rows)
    latents = -(-(result["workload"]["replay"]["frames"] - 1) // 4) + 1
    x = list(range(latents - count, latents))
    for row in rows:
        _line(axes, result, row["row"], x, row["curves"]["kl"])
    top = axes.get_ylim()[1]
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= top])
    axes.set_ylim(-0.028 * (len(rows) + 2) * top, top)  # the marks lie below the curves
    _mark(axes, result, rows)
    _shapes(figure)
    _legend(axes)
    return True


def _identity(figure: Any, result: Mapping[str, Any]) -> bool:
    """Digit and colour right, latent frame by latent frame, in the longest clips."""
    plans = [plan for plan in result["running"] if plan["rows"]]
    if not plans:
        return False
    plan = plans[-1]
    axes = _axes(
        figure, f"Made freely, {plan['frames']} frames: digit and colour right", "latent frame",
        "share of frames",
    )  # fmt: skip
    for row in plan["rows"]:
        if "identity" in row["curves"]:
            _line(axes, result, row["row"], range(plan["latents"]), row["curves"]["identity"])
    axes.set_ylim(-0.08, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    _mark(axes, result, plan["rows"])
    _shapes(figure)
    _legend(axes)
    return True


def _drift(figure: Any, result: Mapping[str, Any]) -> bool:
    """What drifts, by how much more than in the full cache's clip of the same prompt and draws;
    controls and noise left out."""
    plans = [plan for plan in result["running"] if plan["rows"]]
    if not plans:
        return False
    plan, rows = plans[0], result["workload"]["rows"]
    told = [
        row
        for row in plan["rows"]
        if row["excess"] and rows[row["row"]]["role"] in ("baseline", "policy")
    ]
    if not told:
        return False
    panels = figure.subplots(2, 3, sharex=True).ravel()
    for axes, (name, head, factor, _) in zip(panels, DRIFTS, strict=True):
        axes.axhline(0, color=_INK, linewidth=1.2)
        for row in (row for row in told if row["excess"][name]):
            curve = {
                bound: [None if v is None else factor * v for v in values]
                for bound, values in row["excess"][name].items()
            }
            _line(axes, result, row["row"], range(plan["latents"]), curve)
        axes.set_title(head, loc="left", fontsize=10, color=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.3 * (high - low), high)  # room for the marks
        _mark(axes, result, told)
    for axes in panels[3:]:
        axes.set_xlabel("latent frame", fontsize=8, color=_INK)
    figure.suptitle(
        f"Made freely, {plan['frames']} frames: more than the full cache's clip of the same draws",
        x=0.01, ha="left", fontsize=11, color=_INK,
    )  # fmt: skip
    _shapes(figure)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right upper", frameon=False, fontsize=8,
        labelcolor="linecolor",
    )  # fmt: skip
    return True


def _survival(figure: Any, result: Mapping[str, Any]) -> bool:
    """Kaplan-Meier: clips in which no digit was lost for good."""
    plans = [plan for plan in result["running"] if any(r["survival"] for r in plan["rows"])]
    if not plans:
        return False
    plan = plans[-1]
    axes = _axes(
        figure, f"Made freely, {plan['frames']} frames: no digit lost for good", "frame",
        "share of clips",
    )  # fmt: skip
    for row in (r for r in plan["rows"] if r["survival"]):
        curve = row["survival"]
        axes.step(
            [*(step["time"] for step in curve["steps"]), curve["until"]],
            [*(step["survival"] for step in curve["steps"]), curve["steps"][-1]["survival"]],
            where="post", color=_colour(result, row["row"]), linestyle=_style(result, row["row"]),
            linewidth=1.7, label=row["row"],
        )  # fmt: skip
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    _legend(axes)
    return True


def _memory(figure: Any, result: Mapping[str, Any]) -> bool:
    """Recall against the gap."""
    if not result["memory"]:
        return False
    axes = _axes(
        figure, "What was behind the curtain? Teacher-forced", "latent frames under the curtain",
        "object right, %",
    )  # fmt: skip
    for label in dict.fromkeys(row["row"] for row in result["memory"]):
        rows = [r for r in result["memory"] if r["row"] == label and r["recall"]]
        curve = {name: [r["recall"][name] for r in rows] for name in ("mean", "low", "high")}
        _line(axes, result, label, [r["gap"] for r in rows], curve)
    axes.set_ylim(-2, 102)
    _legend(axes)
    return True


def _motion(figure: Any, result: Mapping[str, Any]) -> bool:
    """Identity beside motion: what stands still keeps everything."""
    plans = [plan for plan in result["running"] if plan["rows"]]
    if not plans:
        return False
    axes = _axes(
        figure, f"Identity and motion, {plans[0]['frames']} frames",
        "fastest 5 % of flow, pixels a frame", "digit and colour right, % of frames",
    )  # fmt: skip
    for row in plans[0]["rows"]:
        x, y = row["clip"]["flow_motion_top5_dis"], row["true"]["identity"]
        if x is None or y is None:
            continue
        colour = _colour(result, row["row"])
        axes.errorbar(
            [x["mean"]], [y["mean"]],
            xerr=[[x["mean"] - x["low"]], [x["high"] - x["mean"]]],
            yerr=[[y["mean"] - y["low"]], [y["high"] - y["mean"]]],
            color=colour, marker="o", markersize=5, linewidth=1.1, label=row["row"],
        )  # fmt: skip
    axes.set_xlim(left=0)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=8,
        labelcolor="linecolor",
    )  # fmt: skip
    return True


def _frontier(figure: Any, result: Mapping[str, Any]) -> bool:
    """What is lost beside what is held: rows of one family as a line with intervals, the others as
    dots, of which the best at its size is named."""
    found = {loss: frontier.points(result, loss) for loss in frontier.LOSSES}
    lines = {loss: frontier.families(own) for loss, own in found.items()}
    if not any(lines.values()):
        return False
    colours = _family_colours(dict.fromkeys(name for own in lines.values() for name in own))
    for own, loss in zip(figure.subplots(1, len(found)), found, strict=True):
        for name, family in lines[loss].items():
            _measured(own, family, colours[name], fmt="-o", linewidth=1.7, markersize=5, label=name)
        lone = [point for point in found[loss] if point.family not in lines[loss]]
        dots = [point.held for point in lone], [point.mean for point in lone]
        own.plot(*dots, "o", color=_SOFT, markersize=3.5, alpha=0.55)
        for point in (p for p in frontier.best(found[loss]) if p in lone):
            own.annotate(
                point.row, (point.held, point.mean), (7, 0), textcoords="offset points",
                fontsize=8, color=_SOFT, va="center", path_effects=_halo(),
            )  # fmt: skip
        own.set_xlabel("tokens of history held", color=_INK)
        own.set_title(frontier.LOSSES[loss], loc="left", fontsize=10, color=_INK)
        own.set_xlim(left=0)
        if all(point.low >= 0 for point in found[loss]):
            own.set_ylim(bottom=0)
        else:  # a row may lose less than nothing
            own.axhline(0, color=_INK, linewidth=0.9)
        own.spines[["top", "right"]].set_visible(False)
        own.grid(color=_GRID, linewidth=0.8)
        own.set_axisbelow(True)
    figure.axes[0].legend(frameon=False, fontsize=8, labelcolor="linecolor", handlelength=2.8)
    return True


def _family_colours(names: Iterable[str]) -> dict[str, str]:
    told: dict[str, str] = {}
    others = itertools.cycle(_OTHERS)
    for name in names:
        own = _FAMILIES.get(name.partition(",")[0])
        told[name] = own if own is not None and own not in told.values() else next(others)
    return told


def _halo() -> list[Any]:
    """Words that stay readable over lines."""
    from matplotlib import patheffects

    return [patheffects.withStroke(linewidth=2.5, foreground="white")]


def _measured(axes: Any, found: Sequence[frontier.Point], colour: str, **how: Any) -> None:
    """Points with their intervals."""
    means = [point.mean for point in found]
    bounds = [[p.mean - p.low for p in found], [p.high - p.mean for p in found]]
    axes.errorbar(
        [p.held for p in found], means, yerr=bounds, color=colour, elinewidth=0.9, **how
    )  # fmt: skip
