"""The budget frontier: what a policy loses beside the tokens that it holds, from an evaluation's
JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LOSSES", "Point", "best", "families", "points"]

#: What is lost, by name, and how an axis says it. Less is better in all of them.
LOSSES = {
    "recall": "recall lost against full, points",
    "kl": "KL(full || row), nats a code",
}

#: Settings of a policy that say how much it holds. Rows that differ in nothing else are a family.
_SIZES = ("budget", "frames")

#: What a row says of itself, rather than of what its policy is run with.
_OWN = ("label", "policy", "role")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A row: tokens of history it holds at most (of a branch), and mean, low and high of a loss."""

    row: str
    family: str | None  # None: run with something that the reference is not run with
    held: float
    mean: float
    low: float
    high: float


def points(result: Mapping[str, Any], loss: str) -> list[Point]:
    """Rows of which `loss` (one of `LOSSES`) was asked, and how much they held in the longest
    memory clips; in the result's order, the reference left out."""
    held = {one["row"]: one["held"] for one in result["memory"]}
    if loss == "kl":
        told = {one["row"]: one["kl"] for one in result["replay"]}
    else:
        told = {
            one["row"]: {"mean": one["lost"], "low": one["low"], "high": one["high"]}
            for one in result["primaries"]
            if one["primary"] == loss
        }
    found = []
    for label, row in result["workload"]["rows"].items():
        if row["role"] in ("reference", "floor") or label not in held or label not in told:
            continue
        values = {name: told[label][name] for name in ("mean", "low", "high")}
        family = _family(row, _reference(result))
        found.append(Point(row=label, family=family, held=held[label], **values))
    return found


def families(found: Sequence[Point]) -> dict[str, list[Point]]:
    """Points by family, the smaller before the larger; only where sizes can be compared."""
    told: dict[str, list[Point]] = {}
    for point in found:
        if point.family is not None:
            told.setdefault(point.family, []).append(point)
    return {
        name: sorted(own, key=lambda point: point.held)
        for name, own in told.items()
        if len({point.held for point in own}) > 1
    }


def best(found: Sequence[Point]) -> list[Point]:
    """The point that loses least, for every size."""
    told: dict[float, Point] = {}
    for point in found:
        if point.held not in told or point.mean < told[point.held].mean:
            told[point.held] = point
    return list(told.values())


def _reference(result: Mapping[str, Any]) -> Mapping[str, Any]:
    rows = result["workload"]["rows"].values()
    return next(row for row in rows if row["role"] == "reference")


def _family(row: Mapping[str, Any], reference: Mapping[str, Any]) -> str | None:
    """The policy without its sizes, if it is run as the reference is."""
    if any(row[name] != reference[name] for name in row if name not in _OWN):
        return None
    name, _, settings = row["policy"].partition(":")
    kept = [one for one in settings.split(",") if one and one.split("=")[0] not in _SIZES]
    return ", ".join([name, *kept])
