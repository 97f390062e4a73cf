"""Files and folders of results: looked at before the work, replaced whole, locked while in use."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packcache.errors import InputFileError, OutputError

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = [
    "PARTIAL",
    "check_folder",
    "check_output_folder",
    "lock",
    "read_json",
    "read_result",
    "replacing",
    "take_place",
    "write_json",
    "write_text",
]

#: How the name of a file ends until all of it is on the disk.
PARTIAL = ".partial"


def check_folder(folder: Path) -> Path:
    """The folder, if it exists and can be written to (tried, not guessed)."""
    if not folder.is_dir():
        raise OutputError(f"folder {folder} does not exist: create it or choose another")
    try:
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OutputError(
            f"folder {folder} is not writable ({error.strerror}): choose another"
        ) from error


def check_output_folder(path: Path) -> Path:
    """The path, if it is a folder that can be written to, or one can be made there."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, expected a folder: choose another --out")
    check_folder(path if path.is_dir() else path.parent)
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place at the end, or vanishes on failure."""
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))
    try:
        draft = work / path.name
        yield draft
        take_place(draft, path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; nothing was left there"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def take_place(draft: Path, path: Path) -> None:
    """Give a finished file, or a folder of files, its name once all of it is on the disk.

    A file of that name is replaced, a folder only if it is empty. Raises OSError.
    """
    if draft.is_dir():
        for file in draft.iterdir():
            _sync(file)
        _sync_folder(draft)
        if path.is_dir():
            path.rmdir()
    else:
        _sync(draft)
    draft.replace(path)
    _sync_folder(path.parent)


def _sync(file: Path) -> None:
    with file.open("r+b") as opened:  # some systems sync only what may be written
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    """A new name is on the disk when its folder is."""
    if os.name == "nt":
        return  # it cannot open folders
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """UTF-8, whole or not there. Raises OutputError."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(value: Any, path: Path) -> None:
    """Plain data as JSON, whole or not there. Raises OutputError."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, expected: str) -> Any:
    """What a JSON file holds. Raises InputFileError that says what was expected."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputFileError(f"{path} does not exist: expected {expected}") from None
    except OSError as error:
        raise InputFileError(f"{path} cannot be read ({error.strerror}): check it") from None
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path} is not JSON ({error}): expected {expected}") from None


def read_result(path: Path, schema: str, way_out: str) -> dict[str, Any]:
    """A stored result of ours. Raises InputFileError, with the way out, for a file that is none."""
    result = read_json(path, f"{schema}; {way_out}")
    found = result.get("schema") if isinstance(result, dict) else None
    if found != schema:
        raise InputFileError(f"{path} has schema {found!r}, expected {schema!r}: {way_out}")
    return result


def lock(path: Path, timeout: float = 0) -> FileLock | None:
    """Hold a lock file, which the system takes back when this process dies.

    None if somebody else kept it through `timeout` seconds. Raises OutputError where files cannot
    be locked.
    """
    from filelock import FileLock, Timeout

    held = FileLock(path, thread_local=False)
    try:
        held.acquire(timeout=timeout)
    except Timeout:
        return None
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", None) or error
        raise OutputError(
            f"cannot lock in {path.parent} ({why}): use another folder or disk"
        ) from error
    return held
