"""The paper's claims as differences that an evaluation has told, and what comes of them.

A claim holds if the whole 95 % interval is on its side, does not hold if all of it is on the other,
and cannot be told otherwise. One that says "as good as" is asked only where that means something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packcache.evaluate.cells import UNITS, plans, spanned
from packcache.evaluate.statistics import holm
from packcache.evaluate.verdict import MOTION
from packcache.markdown import table

__all__ = ["ABLATIONS", "CLAIMS", "Claim", "claims_table", "judged", "losses_section"]

NOT_RUN = "*not run*"

#: How a metric's difference is printed: factor, decimals, unit.
_SHOWN = {
    "identity": (100, 1, " points"), "dynamic_dis": (100, 1, " points"),
    "flow_motion_top5_dis": (1, 2, " px"), "flow_interp_smoothness_dis": (1, 4, ""),
    "warp_error_dis": (1, 5, ""), "jitter": (1, 3, " px"), "recall": (1, 1, " points"),
    "replay_kl": (1, 3, " nats"),
}  # fmt: skip

#: What stillness flatters: such a difference has that of motion beside it.
_FLATTERED = ("flow_interp_smoothness_dis", "warp_error_dis")
_MOTION = "flow_motion_top5_dis"


def judged(low: float, high: float, least: float) -> str:
    """Is what lies between `low` and `high` more than `least`? In words."""
    if low > least:
        return "holds here"
    return "does not hold here" if high < least else "cannot be told"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper as a difference: `row` less `against` in `metric`.

    `frames` says which clips made freely it is about; None: a primary, as `metric` names it. `sign`
    is -1 where less is better, `least` what the difference times `sign` has to be above: below 0 it
    is a claim of "as good as".
    """

    text: str
    row: str
    against: str
    metric: str
    frames: int | None = None
    least: float = 0.0
    sign: int = 1

    def find(
        self, result: Mapping[str, Any], metric: str | None = None
    ) -> Mapping[str, Any] | None:
        """The difference in a stored evaluation; None: it was not asked."""
        wanted = {"row": self.row, "against": self.against, "metric": metric or self.metric}
        plan = self._plan(result)
        told = result["versus"] if self.frames is None else plan["versus"] if plan else []
        return next((one for one in told if wanted.items() <= one.items()), None)

    def verdict(self, found: Mapping[str, Any] | None, gate: str | None = None) -> str:
        """Words, from the difference that was found; `gate` is why "as good as" says nothing."""
        if found is None:
            return NOT_RUN
        low, high = sorted((self.sign * found["low"], self.sign * found["high"]))
        told = judged(low, high, self.least)
        return f"not asked: {gate}" if gate and self.least < 0 and told == "holds here" else told

    def gate(self, result: Mapping[str, Any]) -> str | None:
        """Why "as good as" says nothing here: the reference itself fails, or the row moves
        otherwise."""
        plan = self._plan(result)
        if plan is None or self.least >= 0:
            return None
        moves = next((r["motion_ratio"] for r in plan["rows"] if r["row"] == self.row), None)
        if moves is not None and not (MOTION[0] <= moves["low"] and moves["high"] <= MOTION[1]):
            return f"it moves {spanned(moves, 2)} times as much"
        return plan["gate"]

    def told(self, result: Mapping[str, Any]) -> str:
        """The difference with its interval and unit, that of motion beside what stillness
        flatters."""
        found = self.find(result)
        if found is None:
            return "-"
        words = _shown(found, self.metric)
        motion = self.find(result, _MOTION) if self.metric in _FLATTERED else None
        return words if motion is None else f"{words}; motion {_shown(motion, _MOTION)}"

    def _plan(self, result: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return next((plan for plan in plans(result) if plan["frames"] == self.frames), None)


def _shown(found: Mapping[str, Any], metric: str) -> str:
    factor, digits, unit = _SHOWN[metric]
    return spanned(found, digits, factor, "+") + unit


#: What the protocol's own rows say.
CLAIMS = (
    Claim(text="24 frames: as good as the full cache (digit and colour, at most 5 points less)",
          frames=25, row="packcache 2", against="full", metric="identity", least=-0.05),
    Claim(text="24 frames: more clips count as dynamic than with the full cache (by our flow)",
          frames=25, row="packcache 2", against="full", metric="dynamic_dis"),
    Claim(text="24 frames: moves more than the full cache (fastest 5 % of flow a frame)", frames=25,
          row="packcache 2", against="full", metric=_MOTION),
    Claim(text="48 frames: better than a sliding window of as many tokens", frames=49,
          row="packcache 2", against="window 2", metric="identity"),
    Claim(text="48 frames: smoother than a sliding window", frames=49, row="packcache 2",
          against="window 2", metric="flow_interp_smoothness_dis"),
    Claim(text="as many tokens over a longer past stay nearer to the full cache than a sliding "
          "window (KL)", row="packcache 2", against="window 2", metric="replay_kl", sign=-1),
    Claim(text="and remember more of it (recall)", row="packcache 2", against="window 2",
          metric="recall"),
    Claim(text="the same at the paper's own size, one latent frame (KL)", row="packcache 1",
          against="window 1", metric="replay_kl", sign=-1),
    Claim(text="and recall at that size", row="packcache 1", against="window 1", metric="recall"),
    Claim(text="long clips, 97 frames: better than a sliding window", frames=97,
          row="packcache 2", against="window 2", metric="identity"),
    Claim(text="long clips, 385 frames: better than a sliding window", frames=385,
          row="packcache 2", against="window 2", metric="identity"),
    Claim(text="rebase: less warp error than without", frames=49, row="packcache 2",
          against="rebase off", metric="warp_error_dis", sign=-1),
    Claim(text="rebase: steadier motion than without (jitter a frame)", frames=49,
          row="packcache 2", against="rebase off", metric="jitter", sign=-1),
)  # fmt: skip

#: What rows with one setting moved say.
ABLATIONS = (
    Claim(text="a minimum share of 3 latent frames is better than none (KL)",
          row="no floor of 5", against="floor 3 of 5", metric="replay_kl"),
    Claim(text="than one of 2", row="floor 2 of 5", against="floor 3 of 5", metric="replay_kl"),
    Claim(text="than one of 4", row="floor 4 of 5", against="floor 3 of 5", metric="replay_kl"),
    Claim(text="than one of 5, which is no decay", row="floor 5 of 5", against="floor 3 of 5",
          metric="replay_kl"),
    Claim(text="exponential decay is better than equal shares (KL)", row="uniform 2",
          against="packcache 2", metric="replay_kl"),
    Claim(text="rebase is better than positions that go on (KL)", row="rebase off",
          against="packcache 2", metric="replay_kl"),
    Claim(text="long clips, 97 frames: more warp error without rebase", frames=97,
          row="rebase off", against="packcache 2", metric="warp_error_dis"),
    Claim(text="long clips, 97 frames: more jitter without rebase (a frame)", frames=97,
          row="rebase off", against="packcache 2", metric="jitter"),
)  # fmt: skip


def claims_table(claims: Sequence[Claim], result: Mapping[str, Any], tag: str) -> str:
    """A row a claim, as Markdown. Verdicts are by single intervals; p is Holm's over the claims
    that say "more" or "less"."""
    found = {claim: claim.find(result) for claim in claims}
    corrected = holm(
        {claim: one["p"] for claim, one in found.items() if one is not None and claim.least == 0}
    )
    rows = []
    for claim, one in found.items():
        p = f"{corrected[claim]:.2g}" if claim in corrected else "-"
        verdict = claim.verdict(one, claim.gate(result))
        rows.append([claim.text, claim.told(result), p, verdict])
    head = (f"claim of the paper, here ({tag})", "difference (95 %)", "p, Holm", "verdict")
    return table(head, rows)


#: What the paper's method is called in the protocol's rows, and the role of what it stands beside.
OURS, REFERENCE = "packcache 2", "reference"
_RIVALS = ("policy", "baseline", REFERENCE)


def losses_section(result: Mapping[str, Any], tag: str) -> str:
    """Where PackCache loses, and where the full cache itself is no measure: told by whole intervals
    of identity (digit and colour) in clips made freely, by verdicts on primaries, and by recall."""
    roles = {label: row["role"] for label, row in result["workload"]["rows"].items()}
    full = next(label for label, role in roles.items() if role == REFERENCE)
    lost = [
        f"- {one['primary'].replace('_', ' ')}: worse than {full}, by {one['lost']:.3g} "
        f"{UNITS[one['primary']]} ({one['low']:.3g} to {one['high']:.3g}; {tag})"
        for one in result["primaries"]
        if one["row"] == OURS and one["verdict"] == "worse"
    ]
    failed = _forgotten(result, full, tag)
    for plan in plans(result):
        failed += _fallen(plan, full, tag)
        for one in (one for one in plan["versus"] if one["metric"] == "identity"):
            role, other = roles[one["row"]], roles[one["against"]]
            line = f"- {plan['frames']} frames: {one['row']} beside {one['against']}, identity: "
            line += f"{spanned(one, 1, 100, '+')} points ({tag})"
            if one["row"] == OURS and other in _RIVALS and one["high"] < 0:
                lost.append(line)
            if other == REFERENCE and role in _RIVALS and one["low"] > 0:
                failed.append(line)
    told = (
        ("Where PackCache loses", lost, "No interval of identity and no verdict says so."),
        ("Where the full cache itself fails", failed, "No interval of identity or recall says so."),
    )
    return "\n".join(f"## {head}\n\n" + "\n".join(own or [no]) + "\n" for head, own, no in told)


def _forgotten(result: Mapping[str, Any], full: str, tag: str) -> list[str]:
    """Gaps after which the full cache recalls less than half of what it does after the shortest."""
    own = [row for row in result["memory"] if row["row"] == full]
    best = own[0] if own else None
    return [
        f"- recall after {row['gap']} latent frames: {spanned(row['recall'], 1)} %, after "
        f"{best['gap']} it was {spanned(best['recall'], 1)} % ({tag})"
        for row in own
        if best and row["recall"]["high"] < best["recall"]["low"] / 2
    ]


def _fallen(plan: Mapping[str, Any], full: str, tag: str) -> list[str]:
    """The full cache's identity, where it falls from a clip's first frames to its last."""
    rows = {row["row"]: row for row in plan["rows"]}
    own = rows[full]["drift"]["identity"] if full in rows else None
    if own is None or own["signed"]["high"] >= 0:
        return []
    level, ceiling = (rows[r]["true"]["identity"] if r in rows else None for r in (full, "ceiling"))
    line = f"- {plan['frames']} frames: its identity falls by {spanned(own['signed'], 1, -100)} "
    line += f"points from the first frames to the last; {spanned(level, 1)} % over the clip"
    if ceiling is not None:
        line += f", {spanned(ceiling, 1)} % of the true clip through the codec"
    return [f"{line} ({tag})"]
