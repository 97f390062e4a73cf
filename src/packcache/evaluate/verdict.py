"""What the numbers say: each row against the full cache, on the primaries of a protocol.

    found = judge_rows(protocol, paired, first_eviction)       # by primary and row

Rows are prompts: seeds of a prompt are averaged before anything is compared. Differences have a
bootstrap interval over prompts and a sign-flip p; all p of primaries x rows, controls among them,
are one Holm family. "No worse" is asked only where the full cache itself beats a clip that stands
still, and where a row moves as much as the full cache does; otherwise the verdict says what kept it
from being asked (evaluation 8d).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from packcache.evaluate.protocol import Better, Primary, Protocol
from packcache.evaluate.statistics import bootstrap, holm, sign_flip

__all__ = ["Compared", "Power", "compare", "judge_rows", "power"]

#: Chance of being told apart by luck.
LEVEL = 0.05

#: Where the primary `motion_ratio` is not declared, a row must still move like this.
MOTION = (0.8, 1.25)

Values = NDArray[np.float64]
Verdict = Literal["no worse", "worse", "undecided", "not asked", "told apart", "not told apart"]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A row against the reference on one primary: means, difference with its interval, p, verdict.

    `prompts` were paired; `lost` is by how much the row is worse, mean and 95 % bounds: positive is
    worse whatever the primary. `why` says what a verdict rests on.
    """

    primary: str
    row: str
    prompts: int
    reference: float
    mean: float
    lost: float
    low: float
    high: float
    p: float
    p_holm: float = float("nan")
    verdict: Verdict = "undecided"
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(primary: Primary, row: str, own: Values, full: Values) -> Compared | None:
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
        return np.log(np.maximum(full, _LEAST)) - np.log(np.maximum(own, _LEAST))
    return full - own if better == "more" else own - full


#: Ratios of what stands still have no logarithm: this counts as still, in pixels a frame.
_LEAST = 1e-3


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
        if row != full and (made := compare(primary, row, own, paired[primary.name][full]))
    ]
    family = {(c.primary, c.row): c.p for c in found if _in_family(protocol, c.row)}
    corrected = holm(family)
    moves = _motion(protocol, found)
    told = []
    for one in found:
        p = corrected.get((one.primary, one.row), float("nan"))
        verdict, why = _verdict(protocol, one, p, (gates or {}).get(one.primary), moves)
        told.append(Compared(**{**asdict(one), "p_holm": p, "verdict": verdict, "why": why}))
    return told


def _in_family(protocol: Protocol, row: str) -> bool:
    return protocol.rows[row].role in ("baseline", "policy", "control")


def _motion(protocol: Protocol, found: list[Compared]) -> dict[str, str]:
    """Rows that do not move as the reference does, and how much they do."""
    (primary,) = [p for p in protocol.primaries if p.better == "near"] or [None]
    low, high = (primary.bounds if primary and primary.bounds else None) or MOTION
    odd = {}
    for one in found:
        if primary and one.primary == primary.name:
            ratio = float(np.exp(-one.lost))
            if not low <= ratio <= high:
                odd[one.row] = f"moves {ratio:.2f} times as much as the full cache"
    return odd


def _verdict(
    protocol: Protocol, one: Compared, p: float, gate: str | None, moves: Mapping[str, str]
) -> tuple[Verdict, str]:
    role = protocol.rows[one.row].role
    if role in ("control", "floor"):
        apart = (p if role == "control" else one.p) < LEVEL
        return ("told apart" if apart else "not told apart"), ""
    primary = next(p for p in protocol.primaries if p.name == one.primary)
    if primary.better == "near":
        low, high = primary.bounds or MOTION
        least, most = np.exp(-one.high), np.exp(-one.low)
        if low <= least and most <= high:
            return "no worse", f"{low} to {high} times"
        outside = most < low or least > high
        return ("worse" if outside else "undecided"), f"{low} to {high} times"
    if gate is not None:
        return "not asked", gate
    if one.row in moves:
        return "not asked", moves[one.row]
    if one.high <= primary.no_worse:
        return "no worse", f"at most {primary.no_worse} worse"
    return ("worse" if one.low > primary.no_worse else "undecided"), ""


@dataclass(frozen=True, kw_only=True)
class Power:
    """Can the suite tell a control from the full cache, and on which primaries?"""

    control: str
    on: tuple[str, ...]

    @property
    def told(self) -> bool:
        return bool(self.on)


def power(protocol: Protocol, found: list[Compared]) -> list[Power]:
    """One line a control; a control that is not told apart on any primary says: no power."""
    return [
        Power(
            control=row.label,
            on=tuple(
                one.primary
                for one in found
                if one.row == row.label and one.verdict == "told apart" and one.lost > 0
            ),
        )
        for row in protocol.rows_of("control")
    ]
