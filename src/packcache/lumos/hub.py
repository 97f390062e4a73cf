"""Where a model's files are: a folder on this machine, or a Hugging Face hub id that becomes one.

Only what is read is downloaded: never pickles, and never TorchScript, which runs code.
"""

from __future__ import annotations

import glob
import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal

from packcache.errors import InputFileError, InvalidSetting
from packcache.lumos.text import TOKENIZER_FILE

__all__ = ["resolve"]

Need = Literal["model", "config", "tokenizer"]

#: Files to look for, as patterns of names; of the tokenizer's, the one at the top counts too.
_WANTED: dict[Need, tuple[str, ...]] = {
    "model": ("config.json", "*.safetensors", "*.safetensors.index.json", TOKENIZER_FILE),
    "config": ("config.json",),
    "tokenizer": (TOKENIZER_FILE,),
}

#: Files without which a download is of no use.
_NEEDED: dict[Need, tuple[str, ...]] = {
    "model": ("config.json", "*.safetensors"),
    "config": ("config.json",),
    "tokenizer": (TOKENIZER_FILE,),
}

#: `organisation/name`; what else a hub id must be is the hub's to say.
_HUB_ID = re.compile(r"[A-Za-z0-9][^/\\\s]*/[^/\\\s]+")


def resolve(name: str | Path, subfolder: str | None = None, *, need: Need = "model") -> Path:
    """The local folder of a model: `name` itself, or the snapshot of the hub id `name`.

    A folder that exists is taken as it is. Anything else of the form `organisation/name` is
    downloaded into the local hub cache, or found there when the hub's offline mode is on.

    Args:
        name: a folder, or a hub id.
        subfolder: a folder inside it, such as "3B/stage-2-joint".
        need: "config" and "tokenizer" leave the weights where they are. "tokenizer" gives `name`
            itself where only that, and not the subfolder, has the file; then `name` may be the
            file, too.

    Raises:
        InvalidSetting: the subfolder leads outside, or the extra `[hf]` is not installed.
        InputFileError: no such folder, or the hub has no such files for us.
    """
    inside = _checked(subfolder)
    text = str(name)
    folder = _local(text)
    if text and folder.is_dir():
        if not (folder / inside).is_dir():
            raise InputFileError(f"{folder} has no folder {inside}: check the subfolder's name")
        return _settle(folder, inside, need)
    if folder.is_file() and need == "tokenizer":
        return folder
    if folder.is_file():
        raise InputFileError(f"{text} is a file, expected a model folder: name the folder it is in")
    if not _HUB_ID.fullmatch(text):
        raise InputFileError(
            f"folder {text!r} does not exist: expected a model folder, or a hub id such as "
            "organisation/name"
        )
    snapshot = _download(text, inside, need)
    found = _settle(snapshot, inside, need)
    _check_complete(found, text, inside, need)
    return found


def _checked(subfolder: str | None) -> PurePosixPath:
    inside = PurePosixPath(subfolder or "")
    if inside.is_absolute() or ".." in inside.parts:
        raise InvalidSetting(
            f"subfolder is {subfolder!r}, expected a relative path inside the model folder"
        )
    return inside


def _local(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # `~name` of a user that does not exist
        return Path(text)


def _settle(root: Path, inside: PurePosixPath, need: Need) -> Path:
    folder = root / inside
    at_top = (root / TOKENIZER_FILE).is_file() and not (folder / TOKENIZER_FILE).is_file()
    return root if need == "tokenizer" and at_top else folder


def _patterns(inside: PurePosixPath, need: Need) -> tuple[list[str], list[str]]:
    """What to take and what to leave. On the hub `*` matches `/`, so deeper folders are left."""
    base = "".join(f"{glob.escape(part)}/" for part in inside.parts)
    return [*(base + name for name in _WANTED[need]), TOKENIZER_FILE], [f"{base}*/*"]


def _download(name: str, inside: PurePosixPath, need: Need) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InvalidSetting(
            f"{name!r} is no folder here, and hub ids need huggingface_hub: "
            "pip install 'packcache[hf]', or name a folder"
        ) from None
    take, leave = _patterns(inside, need)
    try:
        return Path(snapshot_download(name, allow_patterns=take, ignore_patterns=leave))
    except Exception as error:  # its network library, and so its errors, differ between versions
        raise InputFileError(f"{name} {_reason(error, _way_out(name, inside))}") from error


def _reason(error: Exception, way_out: str) -> str:
    """What the hub refused and the way out, in one line."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return f"is no hub id ({error}): expected organisation/name, or a folder that exists"
    if isinstance(error, errors.GatedRepoError):
        return "is gated on the hub: accept its terms there, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "is neither a folder here nor, for us, on the hub: check the name, or log in with "
            "`hf auth login` if it is private"
        )
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        lacking = re.search(r"missing \((.+?)\)\.", str(error))  # only where partly cached
        state = f"lacks {lacking[1]}" if lacking else "is not"
        why = "offline mode is on" if _offline() else _short(error.__cause__ or error)
        return f"{state} in the local hub cache and cannot be fetched ({why}): {way_out}"
    return f"cannot be downloaded ({_short(error)}): {way_out}"


def _short(error: BaseException) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _way_out(name: str, inside: PurePosixPath) -> str:
    part = f" --include '{inside}/*'" if inside.parts else ""
    return (
        f"run `hf download {name}{part}` on a machine with network and copy its hub cache, "
        "or name a folder with the files"
    )


def _check_complete(folder: Path, name: str, inside: PurePosixPath, need: Need) -> None:
    """A snapshot may lack what it was not asked for before, or what the hub never had."""
    present = [path.name for path in folder.glob("*") if path.is_file()]  # no dangling links
    missing = [p for p in _NEEDED[need] if not any(fnmatchcase(n, p) for n in present)]
    if not missing:
        return
    place = f"{name}, folder {inside}," if inside.parts else name
    if _offline():
        raise InputFileError(
            f"{place} lacks {', '.join(missing)} in the local hub cache and cannot be fetched "
            f"(offline mode is on): {_way_out(name, inside)}"
        )
    raise InputFileError(
        f"{place} lacks {', '.join(missing)}, expected on a hub that can be reached: name the "
        "subfolder that has them (pickled weights are never read)"
    )
