"""Many clips from a file of prompts, each made once, whatever is killed or fails on the way.

A clip is finished when its file stands under its final name. Who makes one holds its lock, which
the system takes back when a process dies; so a run may be killed, repeated, or shared by several
processes on one folder. `results.jsonl` holds one line a clip, the last thing that became of it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from packcache.errors import InputFileError, OutputError, PackCacheError
from packcache.files import check_output_folder, lock, replacing
from packcache.policies import check_stored

__all__ = ["RESULTS", "Job", "Outcome", "Status", "Summary", "read_jobs", "run_jobs"]

RESULTS = "results.jsonl"

Status = Literal["made", "skipped", "failed", "elsewhere"]

#: Settings that name a file: relative to the prompts file, told apart by content.
_PATHS = ("image", "video")

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")

_IN_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}

_EXAMPLE = '{"prompt": "a red 3"}'


@dataclass(frozen=True, kw_only=True)
class Job:
    """One clip to make: `settings` are its own, `name` that of its file, without suffix.

    `digest` stands for all that decides the clip, the run's common settings included.
    """

    line: int
    prompt: str
    settings: dict[str, Any]
    name: str
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job in this run: made, skipped (was finished), failed, or elsewhere.

    `elsewhere`: another process is making it. `message` says why it failed.
    """

    job: Job
    target: Path
    status: Status
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How many jobs of a run ended which way."""

    made: int = 0
    skipped: int = 0
    failed: int = 0
    elsewhere: int = 0

    def plus(self, status: Status) -> Summary:
        return replace(self, **{status: getattr(self, status) + 1})


# --- reading ----------------------------------------------------------------------------------


def read_jobs(
    path: str | os.PathLike[str],
    allowed: Mapping[str, type | tuple[type, ...]],
    common: Mapping[str, Any] | None = None,
) -> list[Job]:
    """The jobs of a JSON Lines file, in its order; a line that repeats another is dropped.

    Each line is an object with "prompt", perhaps "name", and settings of the `allowed` names and
    types. `common` are the settings of the whole run, which a line may override. Without a "name"
    a clip is called by its prompt and a hash, so that another setting is another clip.
    """
    path = Path(path)
    content = functools.cache(_content)
    seen: dict[str, Job] = {}
    for number, text in enumerate(_read_lines(path), 1):
        if not text.strip():
            continue
        try:
            job = _job(_parse(text), number, path.parent, allowed, common or {}, content)
            twin = seen.setdefault(job.name.lower(), job)  # some systems know no capitals
            if twin.digest != job.digest:
                raise ValueError(f"name {job.name!r} is taken by line {twin.line}: give another")
        except ValueError as error:
            raise InputFileError(f"{path.name} line {number}: {error}") from None
    if not seen:
        raise InputFileError(f"{path.name} holds no prompt: expected lines such as {_EXAMPLE}")
    return list(seen.values())


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # a text may hold U+2028
    except FileNotFoundError:
        raise InputFileError(f"prompts file {path} does not exist: check the name") from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputFileError(
            f"prompts file {path} cannot be read ({why}): expected lines such as {_EXAMPLE}"
        ) from None


def _parse(text: str) -> dict[str, Any]:
    text = text.strip()
    if text.startswith("["):
        raise ValueError(f"is a JSON array, expected one object a line such as {_EXAMPLE}")
    if not text.startswith("{"):
        raise ValueError(f"is {text[:40]!r}, expected a JSON object such as {_EXAMPLE}")
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"is no JSON object of one line ({error.msg} at column {error.colno}): expected one "
            f"such as {_EXAMPLE}"
        ) from None
    except _Wrong:
        raise
    except ValueError:  # what Python says of an int of thousands of digits is not for users
        raise ValueError("holds a number of too many digits, expected a smaller one") from None
    except RecursionError:
        raise ValueError(f"is nested too deep, expected an object such as {_EXAMPLE}") from None


class _Wrong(ValueError):
    """Something in a line that we found ourselves."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Wrong(f"a key is given twice among {', '.join(key for key, _ in pairs)}")
    return found


def _no_constant(text: str) -> NoReturn:
    raise _Wrong(f"{text} is no JSON number, expected a finite one")


def _job(
    data: dict[str, Any],
    line: int,
    folder: Path,
    allowed: Mapping[str, type | tuple[type, ...]],
    common: Mapping[str, Any],
    content: Callable[[str], str],
) -> Job:
    known = {"prompt": str, "name": str, **allowed}
    for key, value in data.items():
        if key not in known:
            raise ValueError(f"unknown key {key!r}: known are {', '.join(known)}")
        _check_type(key, value, known[key])
    settings = {key: value for key, value in data.items() if key not in ("prompt", "name")}
    for key in settings.keys() & set(_PATHS):
        settings[key] = str(folder / settings[key])
    if not (prompt := data.get("prompt", "")).strip():
        raise ValueError(f'"prompt" is missing or empty, expected an object such as {_EXAMPLE}')
    deciding = {**common, **settings, "prompt": prompt}
    check_stored(str(deciding.get("policy", "")))  # or a changed file would find its clips made
    digest = _digest(deciding, content)
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "clip"
    name = data.get("name", f"{slug}-{digest[:8]}")
    if not _NAME.fullmatch(name) or name.lower() == RESULTS:
        raise ValueError(
            f"name is {name!r}, expected up to 100 letters, digits, . _ - and no leading dot"
        )
    return Job(line=line, prompt=prompt, settings=settings, name=name, digest=digest)


def _check_type(key: str, value: Any, types: type | tuple[type, ...]) -> None:
    types = types if isinstance(types, tuple) else (types,)
    fits = type(value) in types or (type(value) is int and float in types)  # True is no number
    if not fits:
        words = " or ".join(_IN_WORDS.get(kind, kind.__name__) for kind in types)
        raise ValueError(f"{key} is {json.dumps(value)}, expected {words}")
    if key in _PATHS and (not value or "\0" in str(value)):
        raise ValueError(f"{key} is {json.dumps(value)}, expected the name of a file")


def _digest(deciding: dict[str, Any], content: Callable[[str], str]) -> str:
    """16 hex digits of everything that decides a clip; files by what is in them."""
    for key in deciding.keys() & set(_PATHS):
        if deciding[key] is not None:
            deciding[key] = content(str(deciding[key]))
    text = json.dumps(deciding, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _content(name: str) -> str:
    """A hash of a file, or of the files of a folder; the name itself where nothing can be read."""
    path, found = Path(name), hashlib.blake2b(digest_size=16)
    try:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            found.update(hashlib.blake2b(file.read_bytes()).digest())
    except OSError:
        return name
    return found.hexdigest()


# --- running ----------------------------------------------------------------------------------


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    make: Callable[[Job, Path], Mapping[str, Any]],
    *,
    suffix: Callable[[Job], str] = lambda job: ".mp4",
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> Summary:
    """Make what is not finished in folder `out`, in order; `report` hears of each job.

    `make(job, target)` writes the target whole or not at all and returns a row that JSON can hold.
    What it raises for one job (PackCacheError, OSError, RuntimeError, MemoryError) is a failure of
    that job, tried again on the next run. OutputError if the folder or its results cannot be
    written.
    """
    check_output_folder(out)
    try:
        (out / ".locks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"folder {out} is not writable ({error.strerror})") from error
    results = _Results(path=out / RESULTS)
    summary = Summary()
    for job in jobs:
        outcome = _run(job, out / f"{job.name}{suffix(job)}", make, results)
        summary = summary.plus(outcome.status)
        report(outcome)
    return summary


def _run(
    job: Job, target: Path, make: Callable[[Job, Path], Mapping[str, Any]], results: _Results
) -> Outcome:
    end = functools.partial(Outcome, job=job, target=target)
    finished = _is_finished(target)
    with _lock(target.parent, job.name) as mine:
        if not mine:
            return end(status="skipped" if finished else "elsewhere")
        if _is_finished(target):  # perhaps since we looked
            return end(**_recognize(job, results))
        row = {"name": job.name, "prompt": job.prompt, "digest": job.digest}
        try:
            made = make(job, target)
        except (PackCacheError, OSError, RuntimeError, MemoryError) as error:
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
            results.add({**row, "status": "failed", "error": why})
            return end(status="failed", message=why)
        results.add({**row, "status": "made", **made})
        return end(status="made")


def _recognize(job: Job, results: _Results) -> dict[str, Any]:
    """Status and message of a clip that is finished; it gets its line if it has none."""
    row = results.find(job.name)
    if row.get("status") not in ("made", "found"):  # killed between the file and its line
        results.add({"name": job.name, "prompt": job.prompt, "status": "found"})
    elif job.digest and row.get("digest", job.digest) != job.digest:
        why = f"{job.name} was made with other settings: give another name, or remove that clip"
        return {"status": "failed", "message": why}
    return {"status": "skipped"}


def _is_finished(target: Path) -> bool:
    """The file is there, or a folder with something in it."""
    return any(target.iterdir()) if target.is_dir() else target.exists()


@contextlib.contextmanager
def _lock(out: Path, name: str, timeout: float = 0) -> Iterator[bool]:
    """Hold the lock of that name; yields False if another process kept it through `timeout` s."""
    held = lock(out / ".locks" / f"{name}.lock", timeout)
    try:
        yield held is not None
    finally:
        if held is not None:
            held.release()


@dataclass(frozen=True, kw_only=True)
class _Results:
    """The lines of `results.jsonl`, one a clip; several processes may add to it."""

    path: Path
    wait: float = 60.0  # seconds; a line takes milliseconds

    def find(self, name: str) -> dict[str, Any]:
        """The row of that clip; {} if there is none."""
        return next((_row(line) for line in self._lines() if _is_of(line, name)), {})

    def add(self, row: dict[str, Any]) -> None:
        """Append the row, durably and whole; an older line of that clip goes."""
        line = json.dumps(row).encode() + b"\n"
        with _lock(self.path.parent, ".results", self.wait) as mine:  # no job's name has the dot
            if not mine:
                raise OutputError(
                    f"{self.path} is locked by another process for {self.wait:g} s: stop that one"
                )
            before = self._lines()
            kept = [old for old in before if not _is_of(old, row["name"])]
            if len(kept) == len(before) and self._size() == sum(map(len, before)):
                self._append(line)
            else:  # an older line of the clip, or one torn by a crash
                with replacing(self.path) as draft:
                    draft.write_bytes(b"".join([*kept, line]))

    def _lines(self) -> list[bytes]:
        """Whole lines; one at the end that was torn by a crash is not among them."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        *lines, tail = data.split(b"\n")
        return [line + b"\n" for line in ([*lines, tail] if _row(tail) else lines)]

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _append(self, line: bytes) -> None:
        size = self._size()
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise OutputError(f"cannot write {self.path} ({error.strerror or error})") from error


def _is_of(line: bytes, name: str) -> bool:
    return json.dumps(name).encode() in line and _row(line).get("name") == name


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
