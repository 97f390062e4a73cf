"""docs/results.md, made from a stored evaluation: `packcache evaluate page docs/results.md`.

Numbers are rounded and nowhere typed; the paper's claims are judged by the intervals that were
found. Beside the evaluation: that of its ablations, and the paper's Table 2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packcache.evaluate import cells
from packcache.evaluate.claims import CLAIMS, claims_table, losses_section
from packcache.evaluate.evaluation import SCHEMA
from packcache.evaluate.evaluation_plot import draw
from packcache.evaluate.protocol import REGISTERED, UNREGISTERED
from packcache.evaluate.results_ablations import ablations_section, budgets, by_frame
from packcache.files import read_result, replacing
from packcache.markdown import table

__all__ = ["draw_pictures", "read_evaluation", "render"]

TAG = "*embedded model*"

#: Everything together was to take at most so many hours on a machine of so many cores.
HOURS, CORES = 6, 2

_INTRO = """\
# Results

Made by `packcache evaluate page` from `{name}`; do not edit. All rows share
prompts and draws; differences are paired by prompt, with 95 % bootstrap intervals. {asked}
All of it is of one small model ({tag}); another one has to be asked itself.{cut}
"""

_REGISTERED = """\
What is asked,
and what counts as no worse, was fixed in `{file}` (hash `{hash}`) before the
first result."""

_OTHER = "What is asked stands in a protocol of hash `{hash}`."

#: Pictures of the page, by panel: what stands under and with them.
_PICTURES = {
    "drift": (
        "How much more clips drift than the full cache's own",
        "Latent frame by latent frame, with 95 % bands; marks say when a cache is full, packs and "
        "lets a first frame go.",
    ),
    "frontier": (
        "What is lost beside the tokens of history held",
        "Rows that differ only in size are a line with 95 % intervals, the others dots; the best "
        "of a size is named.",
    ),
}

_CUT = """

**Exploratory**: {why}."""

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
    pictures: Mapping[str, str] | None = None,
) -> str:
    """The whole page as Markdown: an evaluation, the one of its ablations, what a benchmark says of
    the cost (`bench.paper`), and where its pictures lie, by panel."""
    drawn = {panel: _picture(panel, place) for panel, place in (pictures or {}).items()}
    work = result["workload"]
    cut = _CUT.format(why=work["exploratory"]) if work["exploratory"] else ""
    left = ", ".join(f"{part} {count} clips" for part, count in result["missing"].items())
    cut += _LEFT.format(left=left) if left else ""
    file = REGISTERED.get(work["protocol"])
    asked = (_REGISTERED if file else _OTHER).format(file=file, hash=work["protocol"])
    parts = [_INTRO.format(name=name, asked=asked, tag=TAG, cut=cut), _place(result)]
    parts += [_total(result, ablations)] if ablations is not None else []
    parts += [_power(result), _claims(result), losses_section(result, TAG)]
    parts += [_table("## Primaries\n\n", cells.primaries(result))]
    parts += [_running(plan) for plan in cells.plans(result)]
    parts += [drawn.get("drift", "")]
    parts += [_table("## Replay\n\n", cells.replayed(result)), _memory(result), cost]
    parts += [ablations_section(ablations, TAG)] if ablations is not None else []
    parts += [drawn.get("frontier", "")]
    if ablations is not None:
        asked = cells.plans(ablations)
        parts += [budgets(plan, ablations, TAG) for plan in asked[:1]]
        parts += [_running(plan, of=" (settings moved)") for plan in asked]
        parts += [by_frame(plan, TAG) for plan in asked[-1:]]
    return "\n".join(part for part in parts if part).rstrip("\n") + "\n"


def draw_pictures(
    result: Mapping[str, Any], ablations: Mapping[str, Any] | None, folder: Path, *, page: Path
) -> dict[str, str]:
    """Write the page's pictures into a folder, PNG; returns where each lies, seen from the page.

    What there is nothing to draw of is left out. The frontier is that of the ablations, if there
    are any. Raises InvalidSetting without matplotlib.
    """
    told = {"drift": result, "frontier": ablations or result}
    drawn = {panel: draw(told[panel], panel, kind="png") for panel in _PICTURES}
    places: dict[str, str] = {}
    for panel, picture in drawn.items():
        if picture is not None:
            path = folder / f"{panel}.png"
            with replacing(path) as draft:
                draft.write_bytes(picture)
            places[panel] = Path(os.path.relpath(path, page.parent)).as_posix()
    return places


def _picture(panel: str, place: str) -> str:
    what, words = _PICTURES[panel]
    return f"![{what}]({place})\n\n{words} ({TAG})\n"


def _place(result: Mapping[str, Any]) -> str:
    place = result["environment"]
    return (
        f"{place['processor']}, {place['cores']} cores, {place['device']}; PyTorch "
        f"{place['torch']}, Python {place['python']}, packcache {place['packcache']}, "
        f"told at {place['commit']}{cells.spent_words(result)} ({TAG}).\n"
    )


def _total(*results: Mapping[str, Any]) -> str:
    """What everything took, against what the whole was to take; nothing where nobody knows."""
    hours = [result["spent"]["core_hours_of_all"] for result in results]
    if None in hours:
        return ""
    return (
        f"With the settings moved: {sum(hours):.1f} hours of one core, so {sum(hours) / CORES:.1f} "
        f"hours where {CORES} cores share them evenly (computed; the aim: {HOURS} hours; {TAG}).\n"
    )


def _power(result: Mapping[str, Any]) -> str:
    if not cells.power_lines(result):
        return "No control was asked: nothing here says what these clips can tell apart.\n"
    body = "\n".join(f"- {line} ({TAG})" for line in cells.power_lines(result))
    told = _table("", cells.controls(result))
    return (
        "## Can this suite tell?\n\nControls that have to fail. They hold as many tokens as the "
        "packed rows, so all of them differ from the full cache by what the budget costs; what "
        "is broken in them shows beside the same policy unbroken. The control without anchors is "
        f"asked of clips that have an image.\n\n{body}\n\n{told}"
    )


def _claims(result: Mapping[str, Any]) -> str:
    """What the registered protocol was written to judge; another one has rows of its own."""
    if result["workload"]["exploratory"] == UNREGISTERED:
        return ""
    return (
        "## The paper's claims\n\nPackCache holds two latent frames of tokens over four here, "
        "unless a claim says otherwise; the paper's own size is one. Verdicts are by single "
        "intervals; p is corrected over the claims. Exploratory, but for what stands "
        f"among the primaries ({TAG}).\n\n{claims_table(CLAIMS, result, TAG)}\n"
    )


def _table(title: str, told: cells.Table) -> str:
    """A section of one table, its first head tagged; nothing where there is no row."""
    head, rows = told
    if not rows:
        return ""
    return f"{title}{table((f'{head[0]} ({TAG})', *head[1:]), rows)}\n"


def _running(plan: Mapping[str, Any], *, of: str = "") -> str:
    """Clips of one length: what they show, how they leave the full cache's, how they drift."""
    frames = f"{plan['frames']} frames{of}"
    return "\n".join(
        (
            _table(f"## Made freely, {frames}\n\n", cells.made(plan)),
            _table(
                f"Identity in points, paired by prompt, {frames} ({TAG}).\n\n",
                cells.beside_each_other(plan),
            ),
            _table(
                f"Beside the full cache's own clips, {frames} ({TAG}).\n\n", cells.beside_full(plan)
            ),
            _table(
                f"Drift, {frames}: the last 15 % of latent frames less the first. Clean footage "
                f"drifts too (`packcache evaluate drift-null`; {TAG}).\n\n",
                cells.drifted(plan),
            ),
        )
    )


def _memory(result: Mapping[str, Any]) -> str:
    title = "## Memory\n\nRecalled, by latent frames under the curtain.\n\n"
    return _table(title, cells.recalled(result))
