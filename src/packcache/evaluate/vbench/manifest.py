"""How the clips of one policy were made: a file beside the clips, written anew after each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from packcache import files
from packcache.errors import InputError, InputFileError
from packcache.evaluate.vbench.names import Layout
from packcache.evaluate.vbench.probe import Facts
from packcache.files import read_json

__all__ = ["SCHEMA", "Manifest", "Mode", "Row", "Source", "read_manifest", "read_manifests"]

SCHEMA = "packcache.vbench.clips/1"

#: How VBench will be run: on its own suite, or on clips and images of one's own.
Mode = Literal["standard", "custom"]

#: Where frames come from; those of a video were encoded once before.
Source = Literal["generated", "pictures", "video"]

_EXPECTED = f"a manifest of packcache vbench export ({SCHEMA})"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One clip. `environment` is the place in the manifest's list, None where it is not known."""

    file: str
    prompt: str
    index: int
    seed: int
    image: str
    caption: str
    sha256: str
    source: Source
    environment: int | None
    facts: Facts


@dataclass(kw_only=True)
class Manifest:
    """`workload` is the same for all clips; `rows` by file name.

    A run that goes on elsewhere adds an environment.
    """

    workload: dict[str, Any]
    environments: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.workload["label"]

    def place(self, environment: Mapping[str, Any] | None) -> int | None:
        """Where an environment stands in the list, added if it is new."""
        if environment is None:
            return None
        told = dict(environment)
        if told not in self.environments:
            self.environments.append(told)
        return self.environments.index(told)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "environments": self.environments,
            "workload": self.workload,
            "clips": [asdict(row) for row in self.rows.values()],
        }

    def save(self, path: Path) -> None:
        files.write_json(self.to_json(), path)

    def check_same(self, workload: Mapping[str, Any], path: Path) -> None:
        """Clips of different settings are refused, never mixed. Raises InputFileError."""
        asked = json.loads(json.dumps(workload))
        for name in sorted(asked.keys() | self.workload.keys()):
            theirs, ours = self.workload.get(name), asked.get(name)
            if theirs != ours:
                raise InputFileError(
                    f"{path} was begun with {name} {theirs!r}, now it is {ours!r}: give the same, "
                    "or another folder"
                )


def read_manifest(path: Path) -> Manifest:
    told = read_json(path, _EXPECTED)
    try:
        if told["schema"] != SCHEMA:
            raise ValueError
        rows = [Row(**{**row, "facts": Facts(**row["facts"])}) for row in told["clips"]]
        found = Manifest(
            workload=told["workload"],
            environments=list(told["environments"]),
            rows={row.file: row for row in rows},
        )
        if not isinstance(found.label, str):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise InputFileError(f"{path} is of something else: expected {_EXPECTED}") from None
    return found


def read_manifests(layout: Layout) -> dict[str, Manifest]:
    """Those of all policies, by label. Raises InputError if there is none."""
    found = [read_manifest(path) for path in sorted(layout.manifests.glob("*.json"))]
    if not found:
        raise InputError(f"{layout.out} holds no clips: expected the folder of vbench export")
    return {manifest.label: manifest for manifest in found}
