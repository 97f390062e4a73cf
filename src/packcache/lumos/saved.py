"""A committed entry of the cache as a file, and back: every prompt's share, one after the other.

A share is the entry's index arrays, then K and V as `FrameCache.export` gives them. The bytes are
raw; what they are is plain data for a manifest, so the file's size is a plain sum.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packcache.cache import FrameCache
from packcache.timeline import FrameLayout, HeldFrame, Ints, Role, Span

__all__ = ["INDEX_BYTES", "Share", "pack", "raw", "read_entry", "read_tensors", "share_out"]

#: Index arrays of an entry, one number a token, in the order they lie in its file.
_ARRAYS = {"rank": np.dtype(np.int32), "visible": np.dtype(bool), "ids": np.dtype(np.int32)}

#: Bytes of a token in an entry that has all of them.
INDEX_BYTES = sum(dtype.itemsize for dtype in _ARRAYS.values())


class Share(TypedDict):
    """What lies from byte `at` on: the named arrays `[tokens]`, then tensors.

    `offsets` are the tokens saved (see `pack`); `shapes` are run-length coded: (count, shape).
    """

    at: int
    role: str
    frame: int
    start: int
    tokens: int
    offsets: str
    arrays: list[str]
    shapes: list[tuple[int, list[int]]]


def pack(offsets: Ints, tokens: int) -> str:
    """Offsets below `tokens`, ascending: "all", or a bit each in base64 (684 letters for 4084)."""
    if len(offsets) == tokens:
        return "all"
    mask = np.zeros(tokens, dtype=bool)
    mask[offsets] = True
    return base64.b64encode(np.packbits(mask).tobytes()).decode()


def _unpack(packed: str, tokens: int) -> Ints:
    if packed == "all":
        return np.arange(tokens, dtype=np.int32)
    bits = np.frombuffer(base64.b64decode(packed), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(bits, count=tokens)).astype(np.int32)


# --- out ----------------------------------------------------------------------------------------


def share_out(
    caches: Sequence[FrameCache], entries: Sequence[HeldFrame | None]
) -> tuple[list[Share | None], list[Tensor | NDArray[Any]]]:
    """What each prompt holds of an entry (None: nothing), and the pieces of the file, in order."""
    shares: list[Share | None] = []
    pieces: list[Tensor | NDArray[Any]] = []
    for cache, entry in zip(caches, entries, strict=True):
        if entry is None:
            shares.append(None)
            continue
        arrays, tensors = _arrays(entry), cache.export(entry)
        shares.append(_share(entry, list(arrays), tensors, at=sum(p.nbytes for p in pieces)))
        pieces += [*arrays.values(), *tensors]
    return shares, pieces


def _arrays(entry: HeldFrame) -> dict[str, NDArray[Any]]:
    """The index arrays that an entry has."""
    found = {"rank": entry.rank, "visible": entry.span.visible, "ids": entry.span.ids}
    return {
        name: np.ascontiguousarray(array, _ARRAYS[name])
        for name, array in found.items()
        if array is not None
    }


def _share(entry: HeldFrame, arrays: list[str], tensors: Sequence[Tensor], at: int) -> Share:
    runs = itertools.groupby(list(tensor.shape) for tensor in tensors)
    return Share(
        at=at,
        role=entry.span.role.value,
        frame=entry.span.frame,
        start=entry.start,
        tokens=entry.span.tokens,
        offsets=pack(entry.held, entry.span.tokens),
        arrays=arrays,
        shapes=[(len(list(run)), shape) for shape, run in runs],
    )


def raw(piece: Tensor | NDArray[Any]) -> memoryview:
    """The bytes of an array, or of a tensor of any dtype and device."""
    array: Any = piece
    if isinstance(piece, Tensor):
        array = piece.contiguous().cpu().view(torch.uint8).numpy()
    return memoryview(array).cast("B")


# --- back ---------------------------------------------------------------------------------------


def read_entry(path: Path, share: Share, held: str, layout: FrameLayout) -> HeldFrame:
    """An entry of the timeline, holding the tokens `held` (see `pack`) of it now."""
    tokens = share["tokens"]
    with path.open("rb") as file:
        file.seek(share["at"])
        arrays: dict[str, NDArray[Any]] = {
            name: np.frombuffer(file.read(_ARRAYS[name].itemsize * tokens), _ARRAYS[name])
            for name in share["arrays"]
        }
    span = Span(
        role=Role(share["role"]),
        tokens=tokens,
        frame=share["frame"],
        layout=None if share["role"] == Role.TEXT.value else layout,
        visible=arrays.get("visible"),
        ids=arrays.get("ids"),
    )
    return HeldFrame(span, share["start"], _unpack(held, tokens), arrays.get("rank"))


def read_tensors(path: Path, share: Share, held: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """K and V of the tokens `held` as `FrameCache.export` orders them, one at a time in memory."""
    index = sum(_ARRAYS[name].itemsize for name in share["arrays"]) * share["tokens"]
    which = None  # all: so is the text, of which a branch holds a part
    if held != share["offsets"]:
        saved, now = (_unpack(packed, share["tokens"]) for packed in (share["offsets"], held))
        which = torch.from_numpy(np.searchsorted(saved, now))
    with path.open("rb") as file:
        file.seek(share["at"] + index)
        for count, shape in share["shapes"]:
            for _ in range(count):
                tensor = _read_tensor(file, shape, dtype)
                yield tensor if which is None else tensor[:, which]


def _read_tensor(file: BufferedReader, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    data = bytearray(int(np.prod(shape)) * dtype.itemsize)
    file.readinto(data)
    return torch.frombuffer(data, dtype=dtype).reshape(list(shape))
