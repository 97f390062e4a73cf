"""VBench-I2V's dimensions, and three ways to make one number of them, each with its own name.

Ranges and weights are those of VBench's scripts (evaluation 1). Its script counts a dimension that
was not measured as 0; here there is no official Total then. Which aggregate the paper's table has
is not known: its seven dimensions and its numbers fit a plain mean of raw values best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["DIMENSIONS", "NINE", "PAPER", "Aggregate", "Dimension", "aggregates"]

Half = Literal["quality", "I2V"]


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """How one dimension counts: its half of the Total, weight there, range of raw values.

    `scale`: what the value of a single clip is divided by; VBench's means are divided already.
    """

    half: Half | None
    weight: float = 1.0
    low: float = 0.0
    high: float = 1.0
    scale: float = 1.0

    def normalised(self, raw: float) -> float:
        return (raw - self.low) / (self.high - self.low)


#: All that can be collected; temporal flickering is in no aggregate.
DIMENSIONS: dict[str, Dimension] = {
    "subject_consistency": Dimension(half="quality", low=0.1462),
    "background_consistency": Dimension(half="quality", low=0.2615),
    "motion_smoothness": Dimension(half="quality", low=0.706, high=0.9975),
    "dynamic_degree": Dimension(half="quality", weight=0.5),
    "aesthetic_quality": Dimension(half="quality"),
    "imaging_quality": Dimension(half="quality", scale=100.0),
    "i2v_subject": Dimension(half="I2V", low=0.1462),
    "i2v_background": Dimension(half="I2V", low=0.2615),
    "camera_motion": Dimension(half="I2V", weight=0.1),
    "temporal_flickering": Dimension(half=None),
}

#: The dimensions of the official Total.
NINE = tuple(name for name, dimension in DIMENSIONS.items() if dimension.half is not None)

#: The seven that the paper's table has.
PAPER = tuple(name for name in NINE if name not in ("imaging_quality", "camera_motion"))


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """One number of many, by a name that says which; `value` None: not to be had."""

    key: str
    name: str
    value: float | None
    dimensions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "dimensions": list(self.dimensions)}


def aggregates(means: Mapping[str, float]) -> tuple[Aggregate, Aggregate, Aggregate]:
    """The three aggregates of raw means by dimension: official, its weights, plain."""
    present = tuple(name for name in NINE if name in means)
    paper = tuple(name for name in PAPER if name in means)
    missing = ", ".join(name for name in NINE if name not in means)
    weighted, halves = _total(means, present)
    return (
        Aggregate(
            key="official_total",
            name="official Total" + (f" (not computed without {missing})" if missing else ""),
            value=None if missing else weighted,
            dimensions=present,
        ),
        Aggregate(
            key="official_weights_present",
            name=f"official weights over the {len(present)} present dimensions"
            + (f" ({halves[0]} half alone)" if len(halves) == 1 else ""),
            value=weighted,
            dimensions=present,
        ),
        Aggregate(
            key="plain_mean",
            name=f"plain mean of {len(paper)} raw values (paper-like, unconfirmed)",
            value=sum(means[name] for name in paper) / len(paper) if paper else None,
            dimensions=paper,
        ),
    )


def _total(means: Mapping[str, float], names: Sequence[str]) -> tuple[float | None, list[str]]:
    """The mean of the two halves, each a weighted mean, and which halves have any dimension."""
    halves: dict[str, float] = {}
    for half in get_args(Half):
        own = [DIMENSIONS[name] for name in names if DIMENSIONS[name].half == half]
        raw = [means[name] for name in names if DIMENSIONS[name].half == half]
        if own:
            sums = sum(d.weight * d.normalised(x) for d, x in zip(own, raw, strict=True))
            halves[half] = sums / sum(d.weight for d in own)
    return (sum(halves.values()) / len(halves) if halves else None), list(halves)
