"""A look at exported clips before anyone spends hours of a GPU on scoring them.

Every kind of problem is one line: how many, the first of them, the way out. Each clip is read and
decoded whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packcache.errors import InputFileError
from packcache.evaluate.vbench.manifest import Manifest, read_manifests
from packcache.evaluate.vbench.names import Layout, clip_name, name_fault, twins
from packcache.evaluate.vbench.probe import Facts, probe
from packcache.evaluate.vbench.records import hash_file
from packcache.evaluate.vbench.suite import Sample, read_sample

__all__ = ["KINDS", "SCHEMA", "Report", "check"]

SCHEMA = "packcache.vbench.check/1"

#: Every kind of problem, and what to do about it.
KINDS = {
    "unusable names": "change these prompts and draw the sample again",
    "missing clips": "run the export again",
    "stray files": "VBench would trip over them or score them: move them out",
    "changed clips": "they are not what was exported: remove them and run the export again",
    "unreadable clips": "remove them and run the export again",
    "missing images": "custom mode wants PROMPT.png of each: run the export again",
    "frame counts that differ": "clips of one prompt must be equally long for every policy",
    "frame rates that differ": "the rate changes dynamic degree: export with one fps",
    "sizes that differ": "export all policies with one size",
    "encoders that differ": "the encoder changes scores: export every policy with this program",
    "frames encoded twice": "not of all policies: take all from pictures, or all from videos",
    "settings that differ": "policies can be compared only with the same",
}

#: Settings that all policies must share, where they have them.
_SHARED = ("model", "mode", "seed", "steps", "guidance", "positions", "rebase", "reuse")


@dataclass(kw_only=True)
class Report:
    """What was found: `problems` by kind, in the order they were met."""

    policies: tuple[str, ...]
    clips: int = 0
    problems: dict[str, list[str]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    def add(self, kind: str, what: str) -> None:
        said = self.problems.setdefault(kind, [])
        if what not in said:
            said.append(what)

    def lines(self) -> list[str]:
        if self.ok:
            return [f"{self.clips} clips of {', '.join(self.policies)}: all is well"]
        return [
            f"{kind}: {len(self.problems[kind])}, such as {self.problems[kind][0]}; {way_out}"
            for kind, way_out in KINDS.items()
            if kind in self.problems
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "policies": list(self.policies),
            "clips": self.clips,
            "ok": self.ok,
            "problems": self.problems,
        }


def check(out: Path, *, on_clip: Callable[[int, int], None] | None = None) -> Report:
    """Look at all policies of a folder of exports.

    Raises InputError where there is nothing to look at.
    """
    layout = Layout(out=out)
    sample = read_sample(layout.sample)
    manifests = read_manifests(layout)
    report = Report(policies=tuple(manifests))
    _check_names(report, sample)
    _check_settings(report, manifests)
    _check_sources(report, manifests)
    total = len(manifests) * len(list(sample.asked()))
    found: dict[str, dict[str, Facts]] = {}
    for label, manifest in manifests.items():
        _check_folder(report, sample, layout, manifest)
        found[label] = {}
        for entry, index in sample.asked():
            name = clip_name(entry.prompt, index)
            facts = _look(report, layout, manifest, name)
            if facts is not None:
                found[label][name] = facts
            report.clips += 1
            if on_clip:
                on_clip(report.clips, total)
    _check_facts(report, found)
    return report


def _check_names(report: Report, sample: Sample) -> None:
    prompts = [entry.prompt for entry in sample.entries]
    for prompt in prompts:
        if fault := name_fault(prompt):
            report.add("unusable names", f"{prompt[:60]!r}, which {fault}")
    for prompt in twins(prompts):
        report.add("unusable names", f"{prompt!r}, which is there twice")


def _check_settings(report: Report, manifests: Mapping[str, Manifest]) -> None:
    """Against the first policy; what one of them does not have is not compared."""
    (first, reference), *others = manifests.items()
    for label, manifest in others:
        for name in _SHARED:
            own, other = manifest.workload.get(name), reference.workload.get(name)
            if None not in (own, other) and own != other:
                report.add("settings that differ", f"{name} {other} of {first}, {own} of {label}")
        for name in ("device", "dtype"):
            own, other = _places(manifest, name), _places(reference, name)
            if own and other and own != other:
                said = f"{name} {' and '.join(other)} of {first}, {' and '.join(own)} of {label}"
                report.add("settings that differ", said)


def _check_sources(report: Report, manifests: Mapping[str, Manifest]) -> None:
    """Frames of a video were encoded once before: fair only if those of all policies were."""
    once = [
        label for label, m in manifests.items() if any(r.source != "video" for r in m.rows.values())
    ]
    for label, manifest in manifests.items():
        twice = [row.file for row in manifest.rows.values() if row.source == "video"]
        if twice and once:
            report.add("frames encoded twice", f"{label}/{twice[0]}, not those of {once[0]}")


def _places(manifest: Manifest, name: str) -> list[str]:
    return sorted({str(place.get(name)) for place in manifest.environments})


def _check_folder(report: Report, sample: Sample, layout: Layout, manifest: Manifest) -> None:
    folder, label = layout.clips(manifest.label), manifest.label
    asked = {clip_name(entry.prompt, index) for entry, index in sample.asked()}
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for name in sorted(there - asked):
        report.add("stray files", f"{label}/{name}")
    if manifest.workload.get("mode") == "custom":
        for entry in sample.entries:
            if not (layout.images / f"{entry.prompt}.png").is_file():
                report.add("missing images", f"{entry.prompt}.png")


def _look(report: Report, layout: Layout, manifest: Manifest, name: str) -> Facts | None:
    """One clip: there, unchanged, readable."""
    path, row = layout.clips(manifest.label) / name, manifest.rows.get(name)
    called = f"{manifest.label}/{name}"
    if row is None or not path.is_file():
        report.add("missing clips", called)
        return None
    try:
        facts = probe(path)
    except InputFileError as error:
        report.add("unreadable clips", str(error))
        return None
    if hash_file(path) != row.sha256:
        report.add("changed clips", called)
    return facts


def _check_facts(report: Report, found: Mapping[str, Mapping[str, Facts]]) -> None:
    """Clip by clip against the first policy that has it; encoders against the usual one."""
    for name in sorted(set().union(*found.values())):
        (first, reference), *others = [(p, own[name]) for p, own in found.items() if name in own]
        for label, facts in others:
            for kind, ours, theirs in (
                ("frame counts that differ", facts.frames, reference.frames),
                ("frame rates that differ", facts.fps, reference.fps),
                ("sizes that differ", facts.size, reference.size),
            ):
                if ours != theirs:
                    report.add(kind, f"{name!r}, {theirs} of {first}, {ours} of {label}")
    used = Counter(facts.encoder for own in found.values() for facts in own.values())
    usual = used.most_common(1)[0][0] if used else ""
    for label, own in found.items():
        for name, facts in own.items():
            if facts.encoder != usual:
                report.add("encoders that differ", f"{label}/{name}, {facts.encoder}, not {usual}")
