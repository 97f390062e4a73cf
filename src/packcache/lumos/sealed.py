"""Files known by their seal: size and CRC-32, which find damage, not forgery."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from packcache.errors import OutputError
from packcache.files import PARTIAL, take_place

__all__ = ["EMPTY", "Damage", "Seal", "check", "extend", "replace", "unwritable"]

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
        take_place(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return Seal(bytes=length, crc32=crc)


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


def unwritable(folder: Path, error: Exception, way_out: str) -> OutputError:
    """The one line for a folder that cannot be written to."""
    why = getattr(error, "strerror", None) or error
    return OutputError(f"{folder} cannot be written ({why}): {way_out}")
