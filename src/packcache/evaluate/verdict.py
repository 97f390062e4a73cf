"""What the numbers say: each row against the full cache, on the primaries of a protocol.

    found = judge_rows(protocol, paired, first_eviction)       # by primary and row

Rows are prompts: seeds of a prompt are averaged before anything is compared. Differences have a
bootstrap interval over prompts and a sign-flip p; all p of primaries x rows, controls among them,
are one Holm family. "No worse" is said only where the full cache itself beats a clip that stands
still, and where a row moves as much as the full cache does; otherwise the verdict says what kept it
from being asked (evaluation 8d). What is worse is worse all the same.

A packed row differs from the full cache by its budget alone, and so does every control. So controls
also stand beside the row that they are a broken copy of (`beside_intact`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from packcache.evaluate.protocol import Better, Primary, Protocol
from packcache.evaluate.statistics import bootstrap, holm, sign_flip
from packcache.evaluate.told import Values, log_ratio

__all__ = ["Compared", "Power", "beside_intact", "compare", "judge_rows", "power"]

#: Chance of being told apart by luck.
LEVEL = 0.05

#: Where the primary `motion_ratio` is not declared, a row must still move like this.
MOTION = (0.8, 1.25)

Verdict = Literal["no worse", "worse", "undecided", "not asked", "told apart", "not told apart"]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A row against the reference on one primary: means, difference with its interval, p, verdict.

    `prompts` were paired; `lost` is by how much the row is worse, mean and 95 % bounds: positive is
    worse whatever the primary; of what is to be near it is the logarithm of the ratio. `why` says
    what a verdict rests on; `p_holm` is None for what is in no family.
    """

    primary: str
    row: str
    against: str
    prompts: int
    reference: float
    mean: float
    lost: float
    low: float
    high: float
    p: float
    p_holm: float | None = None
    verdict: Verdict = "undecided"
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    primary: Primary, row: str, own: Values, full: Values, *, against: str = "full"
) -> Compared | None:
    """Paired by prompt `[n]`; prompts with NaN in either are left out. None if none is left."""
    both = ~np.isnan(own) & ~np.isnan(full)
    own, full = own[both], full[both]
    if not len(own):
        return None
    lost = _lost(primary.better, own, full)
    interval = bootstrap(lost)
    return Compared(
        primary=primary.name,
        row=row,
        against=against,
        prompts=len(own),
        reference=float(full.mean()),
        mean=float(own.mean()),
        lost=float(interval.mean),
        low=float(interval.low),
        high=float(interval.high),
        p=sign_flip(lost),
    )


def _lost(better: Better, own: Values, full: Values) -> Values:
    """What is lost prompt by prompt; of what is to be near, the logarithm of the ratio."""
    if better == "near":
        return log_ratio(full, own)
    return full - own if better == "more" else own - full


def judge_rows(
    protocol: Protocol,
    paired: Mapping[str, Mapping[str, Values]],
    *,
    gates: Mapping[str, str] | None = None,
) -> list[Compared]:
    """Every primary and row that has numbers, with Holm's p and its verdict.

    Args:
        paired: by primary, then by row, one value a prompt `[n]`, the reference among the rows.
        gates: by primary, why "no worse" cannot be asked, where the reference itself fails.
    """
    full = protocol.reference.label
    found = [
        made
        for primary in protocol.primaries
        for row, own in paired.get(primary.name, {}).items()
        if row != full
        and (made := compare(primary, row, own, paired[primary.name][full], against=full))
    ]
    family = {(c.primary, c.row): c.p for c in found if _in_family(protocol, c.row)}
    corrected = holm(family)
    odd = _odd_motion(protocol, found)
    told = []
    for one in found:
        p = corrected.get((one.primary, one.row))
        gate = (gates or {}).get(one.primary) or odd.get(one.row)
        verdict, why = _verdict(protocol, one, one.p if p is None else p, gate)
        told.append(replace(one, p_holm=p, verdict=verdict, why=why))
    return told


def _in_family(protocol: Protocol, row: str) -> bool:
    return protocol.rows[row].role in ("baseline", "policy", "control")


def _odd_motion(protocol: Protocol, found: list[Compared]) -> dict[str, str]:
    """Rows of which nobody can say that they move as the reference does, and why; none where the
    protocol does not ask for motion."""
    (primary,) = [p for p in protocol.primaries if p.better == "near"] or [None]
    if primary is None:
        return {}
    odd = dict.fromkeys(protocol.rows, "how it moves when it runs freely was not asked")
    for one in (one for one in found if one.primary == primary.name):
        low, high = primary.bounds or MOTION
        least, mean, most = (float(np.exp(-v)) for v in (one.high, one.lost, one.low))
        odd[one.row] = (
            f"moves {mean:.2f} times as much as the full cache ({least:.2f} to {most:.2f})"
            if not (low <= least and most <= high)
            else ""
        )
    return odd


def _verdict(protocol: Protocol, one: Compared, p: float, gate: str | None) -> tuple[Verdict, str]:
    """`p` is Holm's where the row is in the family; `gate` why "no worse" cannot be said."""
    if protocol.rows[one.row].role in ("control", "floor"):
        return ("told apart" if p < LEVEL else "not told apart"), ""
    primary = next(p for p in protocol.primaries if p.name == one.primary)
    if primary.better == "near":
        low, high = primary.bounds or MOTION
        least, most = np.exp(-one.high), np.exp(-one.low)
        if low <= least and most <= high:
            return "no worse", f"{low} to {high} times"
        outside = most < low or least > high
        return ("worse" if outside else "undecided"), f"{low} to {high} times"
    if one.low > primary.no_worse:
        return "worse", ""
    if gate:
        return "not asked", gate
    if one.high <= primary.no_worse:
        return "no worse", f"at most {primary.no_worse} worse"
    return "undecided", ""


def beside_intact(
    protocol: Protocol, pairs: Mapping[tuple[str, str], tuple[Values, Values]]
) -> list[Compared]:
    """Every control beside the row it is a broken copy of: one Holm family of their own.

    Args:
        pairs: by primary and control, its values and the intact row's, one a prompt `[n]` each.
    """
    by_name = {primary.name: primary for primary in protocol.primaries}
    found = []
    for (name, label), (own, intact) in pairs.items():
        row = protocol.intact(protocol.rows[label])
        against = "" if row is None else row.label
        if made := compare(by_name[name], label, own, intact, against=against):
            found.append(made)
    corrected = holm({(one.primary, one.row): one.p for one in found})
    told = []
    for one in found:
        p = corrected[one.primary, one.row]
        verdict: Verdict = "told apart" if p < LEVEL else "not told apart"
        told.append(replace(one, p_holm=p, verdict=verdict))
    return told


@dataclass(frozen=True, kw_only=True)
class Power:
    """Can the suite tell a control from the full cache, and from the row it is a broken copy of?
    Names of the primaries on which it can, and on which the control is the worse one."""

    control: str
    on: tuple[str, ...]
    against: str
    beside: tuple[str, ...]

    @property
    def told(self) -> bool:
        return bool(self.on)


def power(
    protocol: Protocol, found: Sequence[Compared], intact: Sequence[Compared] = ()
) -> list[Power]:
    """One line a control; a control that is not told apart on any primary says: no power.

    Args:
        found: by `judge_rows`.
        intact: by `beside_intact`.
    """

    def told(label: str, among: Sequence[Compared]) -> tuple[str, ...]:
        own = (one for one in among if one.row == label and one.verdict == "told apart")
        return tuple(one.primary for one in own if one.lost > 0)

    return [
        Power(
            control=row.label,
            on=told(row.label, found),
            against=next((one.against for one in intact if one.row == row.label), ""),
            beside=told(row.label, intact),
        )
        for row in protocol.rows_of("control")
    ]
