"""What a long evaluation has found so far, clip by clip: a run that is asked again goes on.

    {"schema": "packcache.ledger/1", "identity": {...}}
    {"key": ["full", "recall", 12], "values": {...}, "seconds": 4.1, "on": "AMD EPYC"}

Lines are appended as clips end, with the seconds of cores that the process took since the line
before, and the processor: another one rounds otherwise. A line that was cut off by a kill is
dropped; what it told is asked again. Results of another question are refused, never mixed.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packcache.errors import InputFileError, OutputError

__all__ = ["Ledger"]

SCHEMA = "packcache.ledger/1"

Key = tuple[str | int, ...]


class Ledger:
    """Values by key, in memory and, if there is a path, in that file.

    Args:
        path: JSON lines; made if it is not there, with its folder, gone on with if it is.
        identity: plain values that must be the same for lines to belong together.
        on: what answers are found on.

    Raises InputFileError where the file is of another identity or no ledger, OutputError where it
    cannot be written.
    """

    def __init__(
        self, path: Path | None, identity: Mapping[str, Any], on: str | None = None
    ) -> None:
        self.path = path
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.found: dict[Key, dict[str, Any]] = {}
        self.seconds: dict[Key, float] = {}  # of those whose lines say it
        self.machines: dict[Key, str] = {}  # of those too
        self._on = on
        self._last = time.process_time()
        if path is not None:
            whole = self._read(path) if path.exists() else 0
            self._cut(path, whole)
            if not whole:
                self._append({"schema": SCHEMA, "identity": self.identity})

    def has(self, key: Key, names: set[str]) -> bool:
        """Is all of this known of a key?"""
        return names <= self.found.get(key, {}).keys()

    def add(self, key: Key, values: Mapping[str, Any]) -> None:
        """Keep what was found; of a key told twice, what was told last counts."""
        now = time.process_time()
        self._add(key, values, round(now - self._last, 3), self._on)
        self._last = now

    def spent(self) -> dict[str, Any]:
        """What answers took, in plain values.

        `core_hours` of the `answers` whose lines say it, `of` all; `core_hours_of_all` is computed,
        with the mean of the same row and part (of the part, where no line of the row says it) for
        each that says nothing, None where a whole part says nothing; `machines` has how many
        answers say that they are its.
        """
        total = sum(self.seconds.values())
        silent = [key for key in self.found if key not in self.seconds]
        means = self._means(2) | self._means(1)
        typical = [means.get(key[:2], means.get(key[1:2])) for key in silent]
        known = [one for one in typical if one is not None]
        whole = total + sum(known) if len(known) == len(silent) else None
        return {
            "core_hours": round(total / 3600, 3),
            "core_hours_of_all": None if whole is None else round(whole / 3600, 3),
            "answers": len(self.seconds),
            "of": len(self.found),
            "machines": dict(sorted(Counter(self.machines.values()).items())),
        }

    def _means(self, names: int) -> dict[Key, float]:
        """Mean seconds of answers by the row and the part that keys begin with, or by the part."""
        taken: dict[Key, list[float]] = {}
        for key, seconds in self.seconds.items():
            taken.setdefault(key[2 - names : 2], []).append(seconds)
        return {kind: sum(all_) / len(all_) for kind, all_ in taken.items()}

    def take(self, other: Ledger) -> None:
        """Keep what another one found, what that took, and on what."""
        for key, values in other.found.items():
            self._add(key, values, other.seconds.get(key), other.machines.get(key))

    def _add(
        self, key: Key, values: Mapping[str, Any], seconds: float | None, on: str | None
    ) -> None:
        line = {"key": list(key), "values": dict(values)}
        line |= {} if seconds is None else {"seconds": seconds}
        line |= {} if on is None else {"on": on}
        self._keep(line)
        self._append(line)

    def _keep(self, line: Mapping[str, Any]) -> None:
        key = tuple(line["key"])
        self.found[key] = self.found.get(key, {}) | line["values"]
        if "seconds" in line:
            self.seconds[key] = self.seconds.get(key, 0.0) + float(line["seconds"])
        if "on" in line:
            self.machines[key] = str(line["on"])

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path} ({error.strerror})") from error

    def _read(self, path: Path) -> int:
        """Take in the whole lines of the file, and return their bytes."""
        try:
            told = path.read_bytes()
            whole = told[: told.rfind(b"\n") + 1]
            header, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
            if header is not None:
                self._check(header["schema"], header["identity"])
            for line in lines:
                self._keep(line)
        except OSError as error:
            raise InputFileError(f"{path} cannot be read ({error.strerror}): check it") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputFileError(
                f"{path} is damaged or of something else, expected {SCHEMA}: move it away"
            ) from None
        return len(whole)

    def _check(self, schema: str, identity: Mapping[str, Any]) -> None:
        if schema != SCHEMA:
            raise ValueError
        names = sorted(identity.keys() | self.identity.keys())
        for name in names:
            theirs, ours = identity.get(name), self.identity.get(name)
            if theirs != ours:
                raise InputFileError(
                    f"{self.path} was begun with {name} {theirs!r}, now it is {ours!r}: "
                    "give the same, or another folder"
                )

    def _cut(self, path: Path, whole: int) -> None:
        """Drop the line that a kill cut off, so that the next one begins a line."""
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("ab") as file:
                file.truncate(whole)
        except OSError as error:
            raise OutputError(f"cannot write {path} ({error.strerror})") from error
