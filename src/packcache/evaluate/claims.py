"""The paper's claims as differences that an evaluation has told, and what comes of them.

A claim holds if the whole 95 % interval is on its side, does not hold if all of it is on the other,
and cannot be told otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packcache.evaluate.evaluation_report import UNITS
from packcache.markdown import table

__all__ = ["ABLATIONS", "CLAIMS", "Claim", "claims_table", "judged", "losses_section"]

NOT_RUN = "*not run*"


def judged(low: float, high: float, least: float) -> str:
    """Is what lies between `low` and `high` more than `least`? In words."""
    if low > least:
        return "holds here"
    return "does not hold here" if high < least else "cannot be told"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper as a difference: `row` less `against` in `metric`.

    `frames` says which clips made freely it is about; None: a primary, as `metric` names it. `sign`
    is -1 where less is better, `least` what the difference times `sign` has to be above.
    """

    text: str
    row: str
    against: str
    metric: str
    frames: int | None = None
    least: float = 0.0
    sign: int = 1

    def find(self, result: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The difference in a stored evaluation; None: it was not asked."""
        wanted = {"row": self.row, "against": self.against, "metric": self.metric}
        told = result["versus"]
        if self.frames is not None:
            plans = [plan for plan in result["running"] if plan["frames"] == self.frames]
            told = [one for plan in plans for one in plan["versus"]]
        return next((one for one in told if wanted.items() <= one.items()), None)

    def verdict(self, found: Mapping[str, Any] | None) -> str:
        """Words, from the difference that was found."""
        if found is None:
            return NOT_RUN
        low, high = sorted((self.sign * found["low"], self.sign * found["high"]))
        return judged(low, high, self.least)


#: What the protocol's own rows say.
CLAIMS = (
    Claim(text="24 frames: as good as the full cache (digit and colour, at most 5 points less)",
          frames=25, row="packcache 2", against="full", metric="identity", least=-0.05),
    Claim(text="24 frames: moves more than the full cache (dynamic degree)", frames=25,
          row="packcache 2", against="full", metric="flow_motion_top5_dis"),
    Claim(text="48 frames: better than a sliding window of as many tokens", frames=49,
          row="packcache 2", against="window 2", metric="identity"),
    Claim(text="48 frames: smoother than a sliding window", frames=49, row="packcache 2",
          against="window 2", metric="flow_interp_smoothness_dis"),
    Claim(text="as many tokens over a longer past stay nearer to the full cache than a sliding "
          "window (KL, nats)", row="packcache 2", against="window 2", metric="replay_kl", sign=-1),
    Claim(text="and remember more of it (recall, points)", row="packcache 2", against="window 2",
          metric="recall"),
    Claim(text="long clips, 97 frames: better than a sliding window", frames=97,
          row="packcache 2", against="window 2", metric="identity"),
    Claim(text="long clips, 385 frames: better than a sliding window", frames=385,
          row="packcache 2", against="window 2", metric="identity"),
    Claim(text="rebase: less warp error than without", frames=49, row="packcache 2",
          against="rebase off", metric="warp_error_dis", sign=-1),
    Claim(text="rebase: steadier motion than without (jitter, pixels a frame)", frames=49,
          row="packcache 2", against="rebase off", metric="jitter", sign=-1),
)  # fmt: skip

#: What rows with one setting moved say.
ABLATIONS = (
    Claim(text="a minimum share of 3 latent frames is better than none (KL, nats)",
          row="no floor of 5", against="floor 3 of 5", metric="replay_kl"),
    Claim(text="than one of 2", row="floor 2 of 5", against="floor 3 of 5", metric="replay_kl"),
    Claim(text="than one of 4", row="floor 4 of 5", against="floor 3 of 5", metric="replay_kl"),
    Claim(text="than one of 5, which is no decay", row="floor 5 of 5", against="floor 3 of 5",
          metric="replay_kl"),
    Claim(text="exponential decay is better than equal shares (KL, nats)", row="uniform 2",
          against="packcache 2", metric="replay_kl"),
    Claim(text="rebase is better than positions that go on (KL, nats)", row="rebase off",
          against="packcache 2", metric="replay_kl"),
    Claim(text="long clips, 97 frames: more warp error without rebase", frames=97,
          row="rebase off", against="packcache 2", metric="warp_error_dis"),
    Claim(text="long clips, 97 frames: more jitter without rebase (pixels a frame)", frames=97,
          row="rebase off", against="packcache 2", metric="jitter"),
)  # fmt: skip


def claims_table(claims: Sequence[Claim], result: Mapping[str, Any], tag: str) -> str:
    """A row a claim, as Markdown."""
    rows = []
    for claim in claims:
        found = claim.find(result)
        rows.append([claim.text, _difference(found), claim.verdict(found)])
    return table((f"claim of the paper, here ({tag})", "difference (95 %)", "verdict"), rows)


#: What the paper's method is called in the protocol's rows, and the role of what it stands beside.
OURS, REFERENCE = "packcache 2", "reference"
_RIVALS = ("policy", "baseline", REFERENCE)


def losses_section(result: Mapping[str, Any], tag: str) -> str:
    """Where PackCache loses, and where the full cache itself is no measure: told by whole intervals
    of identity (digit and colour) in clips made freely, and by verdicts on primaries."""
    roles = {label: row["role"] for label, row in result["workload"]["rows"].items()}
    full = next(label for label, role in roles.items() if role == REFERENCE)
    lost = [
        f"- {one['primary'].replace('_', ' ')}: worse than {full}, by {one['lost']:.3g} "
        f"{UNITS[one['primary']]} ({one['low']:.3g} to {one['high']:.3g}; {tag})"
        for one in result["primaries"]
        if one["row"] == OURS and one["verdict"] == "worse"
    ]
    failed = []
    for plan in sorted(result["running"], key=lambda plan: plan["frames"]):
        for one in (one for one in plan["versus"] if one["metric"] == "identity"):
            role, other = roles[one["row"]], roles[one["against"]]
            mean, low, high = (f"{100 * one[name]:+.1f}" for name in ("mean", "low", "high"))
            line = f"- {plan['frames']} frames: {one['row']} beside {one['against']}, identity: "
            line += f"{mean} points ({low} to {high}; {tag})"
            if one["row"] == OURS and other in _RIVALS and one["high"] < 0:
                lost.append(line)
            if other == REFERENCE and role in _RIVALS and one["low"] > 0:
                failed.append(line)
    told = (
        ("Where PackCache loses", lost, "No interval of identity and no verdict says so."),
        ("Where the full cache itself fails", failed, "No interval of identity says so."),
    )
    return "\n".join(f"## {head}\n\n" + "\n".join(own or [no]) + "\n" for head, own, no in told)


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:+.3g} ({found['low']:+.3g} to {found['high']:+.3g})"
