"""What the files of this package are read with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from packcache.errors import InputFileError

__all__ = ["hash_file", "read_json"]


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
