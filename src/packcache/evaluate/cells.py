"""The tables of an evaluation as text, made from its JSON alone, for every kind of page.

    head, rows = primaries(result)           # a page writes them as Markdown or HTML

A consistency, smoothness or warp number never stands without the motion beside it: a clip that
stands still is perfect in all of them (evaluation 8b).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "COLUMNS",
    "DRIFTS",
    "UNITS",
    "Table",
    "beside_each_other",
    "beside_full",
    "controls",
    "drifted",
    "made",
    "nats",
    "plans",
    "power_lines",
    "primaries",
    "recalled",
    "replayed",
    "spanned",
    "spent_words",
]

#: Heads of the columns, then rows of as many cells. The first cell of a row is its name.
Table = tuple[Sequence[str], Sequence[Sequence[str]]]

#: What a primary's loss is counted in.
UNITS = {
    "recall": "points", "replay_kl": "nats", "identity_drift": "points",
    "motion_ratio": "log ratio",
}  # fmt: skip

#: Columns of free running: (name, where it stands, head, factor, decimals, with its interval).
#: Motion comes first.
COLUMNS = (
    ("flow_motion_top5_dis", "clip", "motion, px", 1, 2, True),
    ("dynamic_dis", "clip", "dynamic_dis, %", 100, 1, False),
    ("frozen_share", "clip", "frozen, %", 100, 1, False),
    ("identity", "true", "identity, %", 1, 1, True),
    ("digit", "true", "digit, %", 1, 1, False),
    ("colour", "true", "colour, %", 1, 1, False),
    ("count", "true", "count, %", 1, 1, False),
    ("direction", "clip", "direction, %", 100, 1, False),
    ("flow_interp_smoothness_dis", "clip", "smooth", 1, 4, False),
    ("flicker_mae", "clip", "flicker", 1, 4, False),
    ("warp_error_dis", "clip", "warp", 1, 5, True),
    ("held", "clip", "held", 1, 0, False),
)

#: Rows that all others are told beside: the first ones of a plan.
_AGAINST = 4

#: Series whose drift is told: (name, head, factor, decimals).
DRIFTS = (
    ("identity", "identity, points", 100, 1),
    ("sharpness", "sharpness", 1, 1),
    ("hf_share", "high frequencies, points", 100, 2),
    ("luminance", "luminance", 1, 2),
    ("contrast", "contrast", 1, 2),
    ("saturation", "saturation", 1, 3),
)


def spanned(found: Mapping[str, Any] | None, digits: int, factor: float = 1, sign: str = "") -> str:
    """A mean with its interval; a dash where there is none."""
    if found is None:
        return "-"
    mean = _rounded(factor * found["mean"], digits)
    low, high = sorted(_rounded(factor * found[n], digits) for n in ("low", "high"))
    return f"{mean:{sign}.{digits}f} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"


def nats(value: float) -> str:
    """Four decimals; what rounds to nothing has no sign."""
    return f"{_rounded(value, 4):.4f}"


def _rounded(value: float, digits: int) -> float:
    return round(value, digits) + 0.0


def plans(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Clips made freely, the shorter first, where any were made."""
    asked = (plan for plan in result["running"] if plan["rows"])
    return sorted(asked, key=lambda plan: plan["frames"])


# --- what decides ---------------------------------------------------------------------------------


def primaries(result: Mapping[str, Any]) -> Table:
    rows = [
        [
            one["primary"].replace("_", " "), one["row"], str(one["prompts"]),
            f"{one['reference']:.3g}", f"{one['mean']:.3g}",
            f"{one['lost']:+.3g} ({one['low']:+.3g} to {one['high']:+.3g})",
            "-" if one["p_holm"] is None else f"{one['p_holm']:.2g}",
            one["verdict"] + (f": {one['why']}" if one["why"] else ""),
        ]
        for one in result["primaries"]
    ]  # fmt: skip
    return ("primary", "row", "prompts", "full", "row's", "lost (95 %)", "p, Holm", "verdict"), rows


def controls(result: Mapping[str, Any]) -> Table:
    """Every control beside the row that it is a broken copy of."""
    rows = [
        [
            one["row"], one["against"], one["primary"].replace("_", " "), str(one["prompts"]),
            f"{one['lost']:+.3g} ({one['low']:+.3g} to {one['high']:+.3g}) {UNITS[one['primary']]}",
            f"{one['p_holm']:.2g}", one["verdict"],
        ]
        for one in result["controls"]
    ]  # fmt: skip
    head = ("control", "beside", "primary", "prompts", "worse by (95 %)", "p, Holm", "verdict")
    return head, rows


def power_lines(result: Mapping[str, Any]) -> list[str]:
    """A sentence a control: from what, and on which primaries, it is told."""
    told = []
    for one in result["power"]:
        on, beside = (", ".join(one[name]).replace("_", " ") for name in ("on", "beside"))
        line = (
            f"control {one['control']}: told from full on {on}"
            if on
            else f"control {one['control']}: NOT told from full: this suite has no power against it"
        )
        if one["against"]:
            line += f"; from {one['against']} on {beside or 'nothing'}"
        told.append(line)
    return told


def spent_words(result: Mapping[str, Any]) -> str:
    """What clips and answers took, as the end of a sentence; empty where nobody knows."""
    spent = result["spent"]
    if not spent["answers"]:
        return ""
    part = "" if spent["answers"] == spent["of"] else f" for {spent['answers']} of {spent['of']}"
    words = f"; clips and answers took {spent['core_hours']:.1f} hours of one core{part}"
    if part and spent["core_hours_of_all"] is not None:
        words += f", some {spent['core_hours_of_all']:.1f} for all, computed by means of their kind"
    machines = [f"{count} on {name}" for name, count in spent["machines"].items()]
    rest = ["the others do not say"] if sum(spent["machines"].values()) < spent["of"] else []
    return words + (f" ({'; '.join([*machines, *rest])})" if machines else "")


# --- what is beside it ----------------------------------------------------------------------------


def made(plan: Mapping[str, Any]) -> Table:
    """Clips made freely: what is true in them, and how they move. A row may have fewer prompts."""
    rows = []
    for row in plan["rows"]:
        moved = row["clip"]["flow_motion_top5_dis"]
        cells = [row["row"], "-" if moved is None else str(moved["clips"])]
        for name, place, _, factor, digits, whole in COLUMNS:
            own = row[place].get(name)
            if whole or own is None:
                cells.append(spanned(own, digits, factor))
            else:
                cells.append(f"{_rounded(factor * own['mean'], digits):.{digits}f}")
        rows.append(cells)
    return ("row", "prompts", *(head for _, _, head, _, _, _ in COLUMNS)), rows


def beside_full(plan: Mapping[str, Any]) -> Table:
    """Where clips leave the full cache's, how far they go, and when a digit is lost for good."""
    rows = []
    for row in plan["rows"]:
        parted, lost, alike = row["diverged"], row["survival"], row["likeness"]
        code = "-"
        if parted:
            code = f"{parted['code']} (latent frame {parted['latent']})"
            code = "never, for most" if parted["code"] is None else code
        kept = "-"
        if lost:
            last = lost["steps"][-1]
            kept = " ".join(
                (f"{100 * last['survival']:.0f} %",
                 f"({100 * last['low']:.0f} to {100 * last['high']:.0f})")
            )  # fmt: skip
        rows.append(
            [
                row["row"], f"{100 * parted['never']:.0f} %" if parted else "-", code,
                spanned(alike["psnr"], 1), spanned(alike["ssim"], 3), kept,
                spanned(row["motion_ratio"], 2),
            ]
        )  # fmt: skip
    head = (
        "row", "clips never different", "first code that differs, median", "PSNR to full, dB",
        "SSIM to full", "no digit lost to the end", "motion, times full's",
    )  # fmt: skip
    return head, rows


def beside_each_other(plan: Mapping[str, Any]) -> Table:
    """By how many points of identity a row is better than the first rows, paired by prompt: two
    intervals that overlap in the table of clips may still be told apart."""
    pairs = {
        (one["row"], one["against"]): one for one in plan["versus"] if one["metric"] == "identity"
    }
    known = {other for _, other in pairs}
    against = [row["row"] for row in plan["rows"] if row["row"] in known][:_AGAINST]
    rows = [
        [row["row"], *(spanned(pairs.get((row["row"], other)), 1, 100, "+") for other in against)]
        for row in plan["rows"]
        if any((row["row"], other) in pairs for other in against)
    ]
    return ("row", *(f"more than {other}" for other in against)), rows


def drifted(plan: Mapping[str, Any]) -> Table:
    """End less start: the reference's own, and by how much more every other row's changes."""
    rows = []
    for row in plan["rows"]:
        cells = []
        for name, _, factor, digits in DRIFTS:
            own = row["drift"][name]
            told = own and (own["excess"] or own["signed"])
            cells.append(spanned(told, digits, factor, "+"))
        first = next((own for own in row["drift"].values() if own), None)
        own = first is None or first["excess"] is None
        rows.append([row["row"], "its own" if own else "more than full's", *cells])
    return ("row", "end less start", *(head for _, head, _, _ in DRIFTS)), rows


def replayed(result: Mapping[str, Any]) -> Table:
    rows = []
    for row in result["replay"]:
        kl, same = row["kl"], row["agreement"]
        true = row["nll_true"] and row["nll_true"]["more_than_full"]
        rows.append(
            [
                row["row"], spanned(kl, 4), f"{100 * same['mean']:.1f} %",
                f"{100 * row['lost']['mean']:.1f} %", f"{row['nll']['mean']:.3f}",
                f"{row['nll_full']['mean']:.3f}", f"{true['mean']:+.4f}" if true else "-",
            ]
        )  # fmt: skip
    head = (
        "row", "KL, nats a code", "same first code", "attention lost", "surprise",
        "the full cache's", "true clips, more than full",
    )  # fmt: skip
    return head, rows


def recalled(result: Mapping[str, Any]) -> Table:
    found = {(row["row"], row["gap"]): row["recall"] for row in result["memory"]}
    gaps = sorted({gap for _, gap in found})
    rows = [
        [label, *(f"{found[label, gap]['mean']:.0f} %" for gap in gaps)]
        for label in dict.fromkeys(row for row, _ in found)
    ]
    return ("row", *map(str, gaps)), rows
