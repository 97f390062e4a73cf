"""What tells the files of this package apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

from packcache.errors import InputFileError

__all__ = ["hash_file"]


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal. Raises InputFileError."""
    told = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                told.update(block)
    except OSError as error:
        raise InputFileError(f"{path} cannot be read ({error.strerror}): check it") from None
    return told.hexdigest()
