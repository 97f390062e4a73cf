"""What VBench found, joined clip by clip over the policies.

VBench writes {dimension: [mean, [{video_path, video_results}, ...]]}. Traps (evaluation 1): a
clip's imaging quality is 0 to 100 while the mean is 0 to 1; a clip's dynamic degree is true or
false; camera motion has means by class, NaN where a class has no clip, between its mean and its
clips. Means are computed anew, over the clips that all policies have; clips of one image count as
one in intervals.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from packcache.errors import InputError, InputFileError, InvalidSetting
from packcache.evaluate.statistics import bootstrap
from packcache.evaluate.vbench.manifest import Manifest, read_manifests
from packcache.evaluate.vbench.names import Layout, slug
from packcache.evaluate.vbench.total import DIMENSIONS, NINE, Aggregate, aggregates
from packcache.files import read_json

__all__ = ["SCHEMA", "Against", "Collected", "Measured", "collect", "read_results"]

SCHEMA = "packcache.vbench.scores/1"

_EXPECTED = "what VBench's evaluation writes, {dimension: [mean, clips]}"

#: A mean that VBench states may lie so far from that of its clips: it pools two dimensions over
#: frames, so long clips weigh more. Farther away the two are not of the same clips or scale.
_FAR, _NEAR = 0.05, 1e-4

#: Rounding beyond the range of a score.
_ROUNDING = 1e-3

#: Prompt and seed.
Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One dimension of one policy: VBench's own mean, and every clip's value by file name."""

    stated: float
    values: Mapping[str, float]

    @property
    def mean(self) -> float:
        return sum(self.values.values()) / len(self.values)


@dataclass(frozen=True, kw_only=True)
class Against:
    """A policy's difference from the reference, image by image, with its 95 % interval."""

    images: int
    mean: float
    low: float
    high: float
    higher: int
    lower: int

    def __str__(self) -> str:
        return (
            f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f}); higher on {self.higher}, "
            f"lower on {self.lower} of {self.images} images"
        )


@dataclass(kw_only=True)
class Collected:
    """`means` and `against` by policy and dimension; `clips`, of each policy, by dimension."""

    reference: str
    policies: tuple[str, ...]
    means: dict[str, dict[str, float]]
    against: dict[str, dict[str, Against]]
    clips: dict[str, int]
    workloads: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def aggregates(self) -> dict[str, tuple[Aggregate, ...]]:
        return {label: aggregates(self.means[label]) for label in self.policies}

    def lines(self) -> list[str]:
        """A block a dimension, then the three aggregates by their names."""
        wide = max(map(len, self.policies))
        lines = [f"differences from {self.reference}, image by image, 95 % intervals"]
        for dimension, count in self.clips.items():
            lines.append(f"{dimension}, {count} clips of each")
            for label in self.policies:
                line = f"  {label:{wide}}  {self.means[label][dimension]:.4f}"
                other = self.against[label].get(dimension)
                lines.append(line if other is None else f"{line}  {other}")
        for row in zip(*self.aggregates().values(), strict=True):
            lines.append(row[0].name)
            if row[0].value is not None:
                for label, aggregate in zip(self.policies, row, strict=True):
                    lines.append(f"  {label:{wide}}  {aggregate.value:.4f}")
        return lines + [f"note: {note}" for note in self.notes]

    def to_json(self) -> dict[str, Any]:
        told = self.aggregates()
        return {
            "schema": SCHEMA,
            "workload": {"reference": self.reference, "clips": self.clips},
            "results": [
                {
                    "policy": label,
                    "made": self.workloads[label],
                    "means": self.means[label],
                    "against_reference": {k: asdict(v) for k, v in self.against[label].items()},
                    "aggregates": {aggregate.key: aggregate.to_json() for aggregate in told[label]},
                }
                for label in self.policies
            ],
            "notes": self.notes,
        }


def collect(out: Path, *, reference: str = "full", results: Path | None = None) -> Collected:
    """Join the results of all policies of a folder of exports.

    Args:
        out: the folder that `export` wrote.
        reference: the policy that others are compared with.
        results: a folder with one folder a policy, of what VBench wrote; default OUT/results.

    Raises InputError where results are missing, damaged, or of other clips.
    """
    layout = Layout(out=out)
    manifests = read_manifests(layout)
    if reference not in manifests:
        raise InvalidSetting(f"reference {reference!r} is none of {', '.join(manifests)}")
    folder = layout.results if results is None else results
    there = {label: folder / slug(label) for label in manifests}
    if not there[reference].is_dir():
        raise InputError(
            f"{there[reference]} does not exist: let VBench write its results there, or name "
            "another folder"
        )
    missing = [label for label, path in there.items() if not path.is_dir()]
    notes = [f"{label} is left out: no folder {there[label]}" for label in missing]
    labels = [reference, *(n for n in manifests if n != reference and n not in missing)]
    measured = {label: read_results(there[label]) for label in labels}
    keyed = {label: _by_key(label, own, manifests[label], notes) for label, own in measured.items()}
    return _join(keyed, manifests, notes)


# --- reading ----------------------------------------------------------------------------------


def read_results(folder: Path) -> dict[str, Measured]:
    """Every dimension that the JSON files of a folder hold; values 0 to 1.

    Lists are passed over: beside its results VBench writes what it was asked.
    """
    found: dict[str, Measured] = {}
    origin: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        told = read_json(path, _EXPECTED)
        if isinstance(told, list):
            continue
        if not isinstance(told, dict):
            raise InputFileError(f"{path} is of something else: expected {_EXPECTED}")
        for dimension, value in told.items():
            if dimension not in DIMENSIONS:
                known = ", ".join(DIMENSIONS)
                raise InputFileError(f"{path}: unknown dimension {dimension!r}: known are {known}")
            if dimension in origin:
                raise InputFileError(
                    f"{dimension} is in {origin[dimension].name} and in {path.name} of {folder}: "
                    "keep one of them"
                )
            origin[dimension] = path
            found[dimension] = _measured(path, dimension, value)
    if not found:
        raise InputFileError(f"{folder} holds no results: expected {_EXPECTED}")
    return found


def _measured(path: Path, dimension: str, told: Any) -> Measured:
    scale = DIMENSIONS[dimension].scale
    try:
        stated, clips = told[0], told[-1]
        if len(told) not in (2, 3) or not clips:
            raise ValueError
        values: dict[str, float] = {}
        for clip in clips:
            name = re.split(r"[/\\]", clip["video_path"])[-1]
            if name in values:
                raise InputFileError(f"{path}: {dimension} has clip {name!r} twice")
            values[name] = _score(path, dimension, name, clip["video_results"]) / scale
            _check_range(path, dimension, name, values[name])
        found = Measured(stated=_score(path, dimension, "the mean", stated), values=values)
    except (KeyError, TypeError, ValueError, IndexError):
        raise InputFileError(
            f"{path}: {dimension} is not as VBench writes it: expected [mean, clips], each clip "
            "with video_path and video_results"
        ) from None
    if abs(found.mean - found.stated) > _FAR:
        raise InputFileError(
            f"{path}: {dimension} states a mean of {found.stated:.4f}, its clips have "
            f"{found.mean:.4f}: they are not of the same clips or scale"
        )
    return found


def _score(path: Path, dimension: str, name: str, value: Any) -> float:
    """A number, or true and false as 1 and 0."""
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
        raise InputFileError(f"{path}: {dimension} of {name!r} is {value!r}, expected a number")
    return float(value)


def _check_range(path: Path, dimension: str, name: str, value: float) -> None:
    if not -_ROUNDING <= value <= 1 + _ROUNDING:
        scale = DIMENSIONS[dimension].scale
        raise InputFileError(
            f"{path}: {dimension} of {name!r} is {value * scale:g}, expected 0 to {scale:g}"
        )


# --- joining ----------------------------------------------------------------------------------


def _by_key(
    label: str, measured: Mapping[str, Measured], manifest: Manifest, notes: list[str]
) -> dict[str, dict[Key, float]]:
    """Values by prompt and seed, as the manifest knows them by file name."""
    found: dict[str, dict[Key, float]] = {}
    for dimension, own in measured.items():
        strange = [name for name in own.values if name not in manifest.rows]
        if strange:
            raise InputFileError(
                f"{dimension} of {label} has clip {strange[0]!r}, which was not exported: results "
                "of other clips?"
            )
        if abs(own.mean - own.stated) > _NEAR:
            notes.append(
                f"{dimension} of {label}: VBench states {own.stated:.4f}, its clips have "
                f"{own.mean:.4f} (it may pool over frames); the latter counts here"
            )
        rows = {name: manifest.rows[name] for name in own.values}
        found[dimension] = {
            (rows[name].prompt, rows[name].seed): value for name, value in own.values.items()
        }
    return found


def _join(
    keyed: Mapping[str, Mapping[str, Mapping[Key, float]]],
    manifests: Mapping[str, Manifest],
    notes: list[str],
) -> Collected:
    """The first policy is the reference."""
    labels = tuple(keyed)
    dimensions = _shared(keyed, notes)
    common = {
        d: _common(d, {label: keyed[label][d] for label in labels}, notes) for d in dimensions
    }
    images = {(row.prompt, row.seed): row.image for row in manifests[labels[0]].rows.values()}
    values = {
        label: {d: [keyed[label][d][key] for key in common[d]] for d in dimensions}
        for label in labels
    }
    return Collected(
        reference=labels[0],
        policies=labels,
        means={
            label: {d: sum(own) / len(own) for d, own in values[label].items()} for label in labels
        },
        against={
            label: {
                d: _against(values[label][d], values[labels[0]][d], [images[k] for k in common[d]])
                for d in (dimensions if label != labels[0] else ())
            }
            for label in labels
        },
        clips={d: len(common[d]) for d in dimensions},
        workloads={label: manifests[label].workload for label in labels},
        notes=notes,
    )


def _shared(keyed: Mapping[str, Mapping[str, Any]], notes: list[str]) -> list[str]:
    """Dimensions that every policy has, in VBench's order."""
    shared = []
    for dimension in DIMENSIONS:
        without = [label for label, own in keyed.items() if dimension not in own]
        if not without:
            shared.append(dimension)
        elif len(without) < len(keyed):
            notes.append(f"{dimension} is left out: no results of {', '.join(without)}")
    if not shared:
        raise InputError("no dimension has results of every policy: run VBench on the others")
    if "dynamic_degree" not in shared and any(name in NINE for name in shared):
        notes.append(
            "dynamic degree was not measured: still clips score high on consistency and smoothness"
        )
    return shared


def _common(dimension: str, own: Mapping[str, Mapping[Key, float]], notes: list[str]) -> list[Key]:
    """Clips that every policy has, by prompt and seed."""
    keys = sorted(set.intersection(*(set(values) for values in own.values())))
    if not keys:
        raise InputError(
            f"no clip of {dimension} is in the results of every policy: prompts and seeds differ"
        )
    for label, values in own.items():
        if len(values) > len(keys):
            left = len(values) - len(keys)
            notes.append(f"{dimension}: {left} clips of {label} are left out, others lack them")
    return keys


def _against(ours: Collection[float], theirs: Collection[float], images: list[str]) -> Against:
    """Clips of one image first become one number: they are not independent."""
    difference = np.subtract(list(ours), list(theirs))
    _, group = np.unique(images, return_inverse=True)
    rows = np.bincount(group, weights=difference) / np.bincount(group)
    interval = bootstrap(rows)
    return Against(
        images=len(rows),
        mean=float(interval.mean),
        low=float(interval.low),
        high=float(interval.high),
        higher=int((rows > 0).sum()),
        lower=int((rows < 0).sum()),
    )
