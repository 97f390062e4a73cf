"""The results' tables of rows with one setting moved, from a stored evaluation of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from packcache.evaluate.cells import spanned, spent_words
from packcache.evaluate.claims import ABLATIONS, claims_table
from packcache.markdown import table

__all__ = ["ablations_section", "budgets", "by_frame"]

#: What Appendix A is about, latent frame by latent frame: name, unit, decimals.
CURVES = (("jitter", "px", 2), ("warp_error", "", 5))

#: Latent frames that share a cell.
TOGETHER = 4


def ablations_section(result: Mapping[str, Any], tag: str) -> str:
    """Every row beside the one that all settings are moved from."""
    work = result["workload"]
    base = next(label for label, row in work["rows"].items() if row["role"] == "baseline")
    intro = (
        f"## One setting moved\n\nBeside `{base}`, paired by prompt: {work['replay']['prompts']} "
        f"prompts of the replay, {work['memory']['clips']} memory clips a gap "
        f"(`benchmarks/ablations.toml`, hash `{work['protocol']}`). Tokens held are of "
        "history, in the longest memory clips. KL is over all latent frames; differences of KL are "
        "over those since either row gave up a token. Exploratory: no correction for many "
        f"looks{spent_words(result)} ({tag}).{_left(result)}\n"
    )
    return "\n".join(
        (intro, _rows(result, base, tag), "", claims_table(ABLATIONS, result, tag), "")
    )


def _left(result: Mapping[str, Any]) -> str:
    left = ", ".join(f"{part} {count} clips" for part, count in result["missing"].items())
    return f" **Not complete**: missing are {left}." if left else ""


def _rows(result: Mapping[str, Any], base: str, tag: str) -> str:
    own = {(one["primary"], one["row"]): one["mean"] for one in result["primaries"]}
    own |= {("replay_kl", one["row"]): one["kl"]["mean"] for one in result["replay"]}
    beside = {
        (one["metric"], one["row"]): one for one in result["versus"] if one["against"] == base
    }
    held = {one["row"]: one["held"] for one in result["memory"]}  # of the longest gap
    rows = []
    asked = result["workload"]["rows"].items()
    for label, row in [(label, row) for label, row in asked if row["role"] != "reference"]:
        cells = [label, f"`{row['policy']}`", f"{held[label]:.0f}" if label in held else "-"]
        for name, digits in (("replay_kl", 3), ("recall", 1)):
            mean, other = own.get((name, label)), beside.get((name, label))
            cells.append("-" if mean is None else f"{mean:.{digits}f}")
            cells.append(spanned(other, digits, sign="+"))
        if cells[3:] != ["-"] * 4:
            rows.append(cells)
    head = (
        tag, "policy", "tokens held", "KL, nats a code", f"more than {base}", "recall, %",
        f"more than {base}",
    )  # fmt: skip
    return table(head, rows)


def budgets(plan: Mapping[str, Any], result: Mapping[str, Any], tag: str) -> str:
    """Motion and truth against what is held: rows of one policy at several sizes, each beside the
    full cache, of clips made freely."""
    held = {row["row"]: row["clip"]["held"] for row in plan["rows"]}
    full = next(n for n, row in result["workload"]["rows"].items() if row["role"] == "reference")
    beside = {(one["row"], one["metric"]): one for one in plan["versus"] if one["against"] == full}
    rows = []
    for row in (row for row in plan["rows"] if (row["row"], "identity") in beside):
        own = [beside.get((row["row"], name)) for name in ("flow_motion_top5_dis", "identity")]
        tokens = held[row["row"]]
        rows.append(
            [
                row["row"], f"{tokens['mean']:.0f}" if tokens else "-",
                spanned(row["clip"]["flow_motion_top5_dis"], 2), spanned(own[0], 2, sign="+"),
                spanned(own[1], 1, 100, "+"),
            ]
        )  # fmt: skip
    head = (
        f"motion against budget, {plan['frames']} frames ({tag})", "tokens held", "motion, px",
        "more than full", "identity, points more than full",
    )  # fmt: skip
    return table(head, rows) + "\n" if rows else ""


def by_frame(plan: Mapping[str, Any], tag: str) -> str:
    """Jitter (of digits that are found) and warp error of a plan's rows along the clip, means of a
    few latent frames; none where one of them has no value."""
    starts = range(1, plan["latents"], TOGETHER)
    rows = []
    for name, unit, digits in CURVES:
        for row in plan["rows"]:
            curve = (row["curves"].get(name) or {}).get("mean")
            if curve:
                values = np.array(curve, dtype=np.float64)
                spans = [values[s : s + TOGETHER] for s in starts]
                cells = ["-" if np.isnan(v).any() else f"{v.mean():.{digits}f}" for v in spans]
                moves = spanned(row["clip"]["flow_motion_top5_dis"], 2)
                what = f"{name.replace('_', ' ')} {unit}".strip()
                rows.append([row["row"], moves, what, *cells])
    heads = [f"{s} to {min(s + TOGETHER, plan['latents']) - 1}" for s in starts]
    head = (f"along {plan['frames']} frames ({tag})", "motion, px", "latent frames", *heads)
    return table(head, rows) if rows else ""
