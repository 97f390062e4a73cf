"""Files that are on the disk whole, and a folder that one process writes to.

A sealed file is known by its size and CRC-32, which find damage, not forgery.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from filelock import FileLock, Timeout

from packcache.errors import OutputError

__all__ = ["EMPTY", "PARTIAL", "Damage", "Seal", "check", "extend", "lock", "replace", "unwritable"]

#: What a file is called until all of it is on the disk.
PARTIAL = ".partial"

#: Bytes read at once while a file is checked.
_CHUNK = 1 << 20


class Seal(TypedDict):
    """How long a file is and its CRC-32."""

    bytes: int
    crc32: int


EMPTY = Seal(bytes=0, crc32=0)


class Damage(Exception):
    """A file is not what its seal says."""


def replace(path: Path, pieces: Iterable[bytes | memoryview]) -> Seal:
    """Write a file, whatever had its name before: it has it when all of it is on the disk."""
    draft = path.with_name(path.name + PARTIAL)
    length = crc = 0
    try:
        with draft.open("wb") as file:
            for piece in pieces:
                file.write(piece)
                length, crc = length + len(piece), zlib.crc32(piece, crc)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return Seal(bytes=length, crc32=crc)


def _sync_folder(folder: Path) -> None:
    """A new name is on the disk when its folder is."""
    if os.name == "nt":
        return  # it cannot open folders
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def extend(path: Path, seal: Seal, data: bytes | memoryview) -> Seal:
    """Append to a file that is as sealed; what lies behind that, a torn tail, is cut off."""
    with path.open("r+b") as file:
        file.truncate(seal["bytes"])
        file.seek(seal["bytes"])
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Seal(bytes=seal["bytes"] + len(data), crc32=zlib.crc32(data, seal["crc32"]))


def check(path: Path, seal: Seal, *, grows: bool = False) -> None:
    """Raises Damage unless the file is as sealed; one that grows may be longer."""
    left, crc = seal["bytes"], 0
    try:
        size = path.stat().st_size
        if size < left or (size > left and not grows):
            raise Damage(f"{path.name} has {size} bytes, expected {left}")
        with path.open("rb") as file:
            while left and (piece := file.read(min(left, _CHUNK))):
                left, crc = left - len(piece), zlib.crc32(piece, crc)
    except FileNotFoundError:
        raise Damage(f"{path.name} is missing") from None
    except OSError as error:
        raise Damage(f"{path.name} cannot be read: {error.strerror or error}") from error
    if crc != seal["crc32"]:
        raise Damage(f"{path.name} has CRC-32 {crc:08x}, expected {seal['crc32']:08x}")


def lock(path: Path) -> FileLock:
    """Hold a lock file, which the system takes back when this process dies. Raises OutputError."""
    held = FileLock(path, timeout=0, thread_local=False)
    try:
        held.acquire()
    except Timeout:
        raise OutputError(
            f"{path.parent} is in use by another process: wait for it, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise unwritable(path.parent, error, "choose another folder") from error
    return held


def unwritable(folder: Path, error: Exception, way_out: str) -> OutputError:
    """The one line for a folder that cannot be written to."""
    why = getattr(error, "strerror", None) or error
    return OutputError(f"{folder} cannot be written ({why}): {way_out}")
