"""docs/results.md, made from a stored evaluation: `packcache evaluate page docs/results.md`.

Numbers are rounded and nowhere typed; the paper's claims are judged by the intervals that were
found. Beside the evaluation: that of its ablations, and the paper's Table 2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packcache.errors import InvalidSetting
from packcache.evaluate.claims import CLAIMS, claims_table, losses_section
from packcache.evaluate.evaluation import SCHEMA
from packcache.evaluate.evaluation_plot import draw
from packcache.evaluate.evaluation_report import COLUMNS, nats, power_lines, row_cells, spent_words
from packcache.evaluate.results_ablations import ablations_section, by_frame
from packcache.files import read_result, replacing
from packcache.markdown import table

__all__ = ["draw_frontier", "read_evaluation", "render"]

TAG = "*embedded model*"

_INTRO = """\
# Results

Made by `packcache evaluate page` from `{name}`; do not edit. All rows share
prompts and draws; differences are paired by prompt, with 95 % bootstrap intervals. What is asked,
and what counts as no worse, was fixed in `benchmarks/protocol.toml` (hash `{hash}`) before the
first result. All of it is of one small model ({tag}); another one has to be asked itself.{cut}
"""

_FRONTIER = """\
![What is lost beside the tokens of history held]({picture})

Rows that differ only in size are a line with 95 % intervals, the others dots; the best of a size is
named (*embedded model*).
"""

_CUT = """

**Exploratory**: cut to {quick} prompts. The protocol's own tables take hours."""

_LEFT = """

**Not complete**: missing are {left}."""


def read_evaluation(path: Path) -> dict[str, Any]:
    """A stored evaluation. Raises InputFileError for a file that is none."""
    return read_result(path, SCHEMA, "make one with packcache evaluate run --out")


def render(
    result: Mapping[str, Any],
    name: str,
    *,
    ablations: Mapping[str, Any] | None = None,
    cost: str = "",
    picture: str = "",
) -> str:
    """The whole page as Markdown: an evaluation, the one of its ablations, what a benchmark says of
    the cost (`bench.paper`), and where the picture of the frontier lies."""
    work = result["workload"]
    cut = _CUT.format(quick=work["quick"]) if work["exploratory"] else ""
    left = ", ".join(f"{part} {count} clips" for part, count in result["missing"].items())
    cut += _LEFT.format(left=left) if left else ""
    parts = [_INTRO.format(name=name, hash=work["protocol"], tag=TAG, cut=cut), _place(result)]
    parts += [_power(result), _claims(result), losses_section(result, TAG), _primaries(result)]
    parts += [_running(plan) for plan in _plans(result)]
    parts += [_replay(result), _memory(result), cost]
    parts += [ablations_section(ablations, TAG)] if ablations is not None else []
    parts += [_FRONTIER.format(picture=picture)] if picture else []
    if ablations is not None:
        parts += [_running(plan, of=" (settings moved)") for plan in _plans(ablations)]
        parts += [by_frame(plan, TAG) for plan in _plans(ablations)[-1:]]
    return "\n".join(part for part in parts if part)


def draw_frontier(result: Mapping[str, Any], path: Path, *, page: Path) -> str:
    """Write the frontier's picture; returns where it lies, seen from the page. Raises
    InvalidSetting for a name that is no PNG, and where there is nothing to draw."""
    if path.suffix.lower() != ".png":
        raise InvalidSetting(f"cannot draw {path.name!r}: known is .png")
    drawn = draw(result, "frontier", kind="png")
    if drawn is None:
        raise InvalidSetting("no frontier: no two rows differ only in what they hold")
    with replacing(path) as draft:
        draft.write_bytes(drawn)
    return Path(os.path.relpath(path, page.parent)).as_posix()


def _plans(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(result["running"], key=lambda plan: plan["frames"])


def _place(result: Mapping[str, Any]) -> str:
    place = result["environment"]
    return (
        f"{place['processor']}, {place['cores']} cores, {place['device']}; PyTorch "
        f"{place['torch']}, Python {place['python']}, packcache {place['packcache']}, "
        f"told at {place['commit']}{spent_words(result)} ({TAG}).\n"
    )


def _power(result: Mapping[str, Any]) -> str:
    body = "\n".join(f"- {line} ({TAG})" for line in power_lines(result))
    return (
        "## Can this suite tell?\n\nControls that have to fail. They hold as many tokens as the "
        "packed rows: that they are told from the full cache includes what the budget costs, and "
        f"the claims say whether a control is told from the same policy.\n\n{body}\n"
    )


def _claims(result: Mapping[str, Any]) -> str:
    return "## The paper's claims\n\n" + claims_table(CLAIMS, result, TAG) + "\n"


def _primaries(result: Mapping[str, Any]) -> str:
    rows = [
        [
            one["primary"].replace("_", " "), one["row"], f"{one['reference']:.3g}",
            f"{one['mean']:.3g}", f"{one['lost']:+.3g} ({one['low']:+.3g} to {one['high']:+.3g})",
            "-" if one["p_holm"] != one["p_holm"] else f"{one['p_holm']:.2g}",
            one["verdict"] + (f": {one['why']}" if one["why"] else ""),
        ]
        for one in result["primaries"]
    ]  # fmt: skip
    head = (f"primary ({TAG})", "row", "full", "row's", "lost (95 %)", "p, Holm", "verdict")
    return "## Primaries\n\n" + table(head, rows) + "\n" if rows else ""


def _running(plan: Mapping[str, Any], *, of: str = "") -> str:
    rows = [row_cells(row) for row in plan["rows"]]
    head = (TAG, *(head for _, _, head, _, _ in COLUMNS))
    return (
        f"## Made freely, {plan['frames']} frames{of}\n\n" + table(head, rows) + "\n"
        if rows
        else ""
    )


def _replay(result: Mapping[str, Any]) -> str:
    rows = []
    for row in result["replay"]:
        kl, same = row["kl"], row["agreement"]
        true = row["nll_true"] and row["nll_true"]["more_than_full"]
        mean, low, high = (nats(kl[name]) for name in ("mean", "low", "high"))
        rows.append(
            [
                row["row"], f"{mean} ({low} to {high})",
                f"{100 * same['mean']:.1f} %", f"{100 * row['lost']['mean']:.1f} %",
                f"{row['nll']['mean']:.3f}",
                f"{row['nll_full']['mean']:.3f}", f"{true['mean']:+.4f}" if true else "-",
            ]
        )  # fmt: skip
    head = (
        TAG,
        "KL, nats a code",
        "same first code",
        "attention lost",
        "surprise",
        "the full cache's",
        "true clips, more than full",
    )
    return "## Replay\n\n" + table(head, rows) + "\n" if rows else ""


def _memory(result: Mapping[str, Any]) -> str:
    found = {(row["row"], row["gap"]): row["recall"] for row in result["memory"]}
    if not found:
        return ""
    gaps = sorted({gap for _, gap in found})
    rows = [
        [label, *(f"{found[label, gap]['mean']:.0f} %" for gap in gaps)]
        for label in dict.fromkeys(row for row, _ in found)
    ]
    head = (f"recalled, by latent frames under the curtain ({TAG})", *map(str, gaps))
    return "## Memory\n\n" + table(head, rows) + "\n"
