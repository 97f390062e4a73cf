"""docs/results.md, made from a stored evaluation: `packcache evaluate page docs/results.md`.

Numbers are rounded and nowhere typed; the paper's claims are judged by the intervals that were
found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packcache.errors import InputError
from packcache.evaluate.evaluation import SCHEMA
from packcache.evaluate.evaluation_report import COLUMNS, power_lines, row_cells
from packcache.lumos.config import read_json

__all__ = ["CLAIMS", "Claim", "read_evaluation", "render"]

TAG = "*embedded model*"

_INTRO = """\
# Results

Made by `packcache evaluate page docs/results.md` from `{name}`; do not edit. All rows share
prompts and draws; differences are paired by prompt, with 95 % bootstrap intervals. What is asked,
and what counts as no worse, was fixed in `benchmarks/protocol.toml` (hash `{hash}`) before the
first result. All of it is of one small model ({tag}); another one has to be asked itself.{cut}
"""

_CUT = """

**Exploratory**: cut to {quick} prompts. The protocol's own tables take hours."""

_LEFT = """

**Not complete**: missing are {left}."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper as a difference: `row` less `against` in `metric` at `frames`.

    It holds if the whole interval is above `least`, does not hold if all of it is below, and cannot
    be told otherwise. `sign` -1 where less is better.
    """

    text: str
    frames: int
    row: str
    against: str
    metric: str
    least: float = 0.0
    sign: int = 1

    def verdict(self, found: Mapping[str, Any] | None) -> str:
        """Words, from the difference that was found."""
        if found is None:
            return "*not run*"
        low, high = sorted((self.sign * found["low"], self.sign * found["high"]))
        if low > self.least:
            return "holds here"
        return "does not hold here" if high < self.least else "cannot be told"


CLAIMS = (
    Claim(text="24 frames: as good as the full cache (digit and colour, at most 5 points less)",
          frames=25, row="packcache 2", against="full", metric="identity", least=-0.05),
    Claim(text="24 frames: moves more than the full cache (dynamic degree)", frames=25,
          row="packcache 2", against="full", metric="flow_motion_top5_dis"),
    Claim(text="48 frames: better than a sliding window of as many tokens", frames=49,
          row="packcache 2", against="window 2", metric="identity"),
    Claim(text="48 frames: smoother than a sliding window", frames=49, row="packcache 2",
          against="window 2", metric="flow_interp_smoothness_dis"),
    Claim(text="long clips, 97 frames: better than a sliding window", frames=97,
          row="packcache 2", against="window 2", metric="identity"),
    Claim(text="long clips, 385 frames: better than a sliding window", frames=385,
          row="packcache 2", against="window 2", metric="identity"),
    Claim(text="rebase: less warp error than without", frames=49, row="packcache 2",
          against="rebase off", metric="warp_error_dis", sign=-1),
    Claim(text="rebase: steadier motion than without", frames=49, row="packcache 2",
          against="rebase off", metric="speed_variation", sign=-1),
)  # fmt: skip


def read_evaluation(path: Path) -> dict[str, Any]:
    """A stored evaluation. Raises InputError for a file that is none."""
    result = read_json(path)
    if result.get("schema") != SCHEMA:
        raise InputError(
            f"{path} has schema {result.get('schema')!r}, expected {SCHEMA!r}: make one with "
            "packcache evaluate run --out"
        )
    return result


def render(result: Mapping[str, Any], name: str) -> str:
    """The whole page as Markdown."""
    work = result["workload"]
    cut = _CUT.format(quick=work["quick"]) if work["exploratory"] else ""
    left = ", ".join(f"{part} {count} clips" for part, count in result["missing"].items())
    cut += _LEFT.format(left=left) if left else ""
    parts = [_INTRO.format(name=name, hash=work["protocol"], tag=TAG, cut=cut), _place(result)]
    parts += [_power(result), _claims(result), _primaries(result)]
    parts += [_running(plan) for plan in sorted(result["running"], key=lambda p: p["frames"])]
    parts += [_replay(result), _memory(result)]
    return "\n".join(part for part in parts if part)


def _place(result: Mapping[str, Any]) -> str:
    place = result["environment"]
    return (
        f"{place['processor']}, {place['cores']} cores, {place['device']}; PyTorch "
        f"{place['torch']}, Python {place['python']}, packcache {place['packcache']} at "
        f"{place['commit']} ({TAG}).\n"
    )


def _power(result: Mapping[str, Any]) -> str:
    body = "\n".join(f"- {line} ({TAG})" for line in power_lines(result))
    return "## Can this suite tell?\n\nControls that have to fail:\n\n" + body + "\n"


def _claims(result: Mapping[str, Any]) -> str:
    rows = []
    for claim in CLAIMS:
        found = _found(result, claim)
        rows.append([claim.text, _difference(found), claim.verdict(found)])
    head = (f"claim of the paper, here ({TAG})", "difference (95 %)", "verdict")
    return "## The paper's claims\n\n" + _table(head, rows) + "\n"


def _found(result: Mapping[str, Any], claim: Claim) -> Mapping[str, Any] | None:
    wanted = {"row": claim.row, "against": claim.against, "metric": claim.metric}
    for plan in result["running"]:
        if plan["frames"] == claim.frames:
            for one in plan["versus"]:
                if wanted.items() <= one.items():
                    return one
    return None


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:+.3g} ({found['low']:+.3g} to {found['high']:+.3g})"


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
    return "## Primaries\n\n" + _table(head, rows) + "\n" if rows else ""


def _running(plan: Mapping[str, Any]) -> str:
    rows = [row_cells(row) for row in plan["rows"]]
    head = (TAG, *(head for _, _, head, _, _ in COLUMNS))
    return (
        f"## Made freely, {plan['frames']} frames\n\n" + _table(head, rows) + "\n" if rows else ""
    )


def _replay(result: Mapping[str, Any]) -> str:
    rows = []
    for row in result["replay"]:
        kl, same = row["kl"], row["agreement"]
        true = row["nll_true"] and row["nll_true"]["more_than_full"]
        rows.append(
            [
                row["row"], f"{kl['mean']:.4f} ({kl['low']:.4f} to {kl['high']:.4f})",
                f"{100 * same['mean']:.1f} %", f"{row['nll']['mean']:.3f}",
                f"{row['nll_full']['mean']:.3f}", f"{true['mean']:+.4f}" if true else "-",
            ]
        )  # fmt: skip
    head = (
        TAG,
        "KL, nats a code",
        "same first code",
        "surprise",
        "the full cache's",
        "true clips, more than full",
    )
    return "## Replay\n\n" + _table(head, rows) + "\n" if rows else ""


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
    return "## Memory\n\n" + _table(head, rows) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
