"""K/V memory of one branch, all layers: preallocated, written in place, packed in place.

    [ committed tokens | draft | free ]

A draft overwrites the draft region; a commit moves the fence behind it; `keep` closes the gaps.
Knows nothing of roles, frames or policies. Axes: H key/value heads, S slots, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from packcache.errors import CacheStateError
from packcache.timeline import Ints

__all__ = ["KVStore"]


class KVStore:
    """Keys and values `[H, capacity, D]` of each layer of one branch."""

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.dtype, self.device = dtype, torch.device(device)
        self.length = 0
        self.draft = 0
        self._keys = [self._empty(0) for _ in range(layers)]
        self._values = [self._empty(0) for _ in range(layers)]
        self._written = [False] * layers  # whole draft, since it was opened or rolled back
        self._begun = [0] * layers  # tokens of it, where they come a few at a time
        self._filled = [False] * layers  # whole draft written since it was opened

    def _empty(self, capacity: int) -> Tensor:
        size = (self.kv_heads, capacity, self.head_dim)
        # a host's inference mode must not decide from where the cache may be written
        with torch.inference_mode(False):
            return torch.empty(size, dtype=self.dtype, device=self.device)

    @property
    def capacity(self) -> int:
        """Slots allocated."""
        return self._keys[0].shape[1]

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token over all layers, K and V."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` slots; committed tokens are carried over layer by layer."""
        if capacity <= self.capacity:
            return
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                new = self._empty(capacity)
                new[:, : self.length] = old[:, : self.length]
                tensors[layer] = new

    def open(self, draft: int) -> None:
        """Expect `draft` tokens behind the committed ones from every layer."""
        if self.length + draft > self.capacity:
            raise CacheStateError(
                f"{self.length} committed + {draft} draft tokens exceed capacity {self.capacity}"
            )
        self.draft = draft
        self._filled = [False] * self.layers
        self.rollback()

    def update(
        self, layer: int, keys: Tensor, values: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's draft `[H, draft, D]`; returns views of all K and V to attend to.

        With `rows` (int64 `[n]`, offsets into the draft) keys and values `[H, n, D]` replace those
        of a draft that was written whole before; a commit needs a whole one again.
        """
        count = self.draft if rows is None else len(rows)
        if rows is not None and not self._filled[layer]:
            raise CacheStateError(
                f"layer {layer} was given {count} rows of a draft of {self.draft} tokens that was "
                "never written whole: give all rows first"
            )
        self._check(keys, values, count)
        end = self.length + self.draft
        for tensor, new in ((self._keys[layer], keys), (self._values[layer], values)):
            draft = tensor[:, self.length : end]
            if rows is None:
                draft[:] = new
            else:
                draft.index_copy_(1, rows, new)
        self._written[layer] = rows is None
        self._filled[layer] = True
        return self._keys[layer][:, :end], self._values[layer][:, :end]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's next draft tokens `[H, n, D]`; returns views of all K and V so far."""
        start = self.length + self._begun[layer]
        end = start + keys.shape[1]
        if end > self.length + self.draft:
            raise CacheStateError(
                f"layer {layer} was given {keys.shape[1]} tokens after {self._begun[layer]} of a "
                f"draft of {self.draft}: open what comes next first"
            )
        self._check(keys, values, keys.shape[1])
        self._keys[layer][:, start:end] = keys
        self._values[layer][:, start:end] = values
        self._begun[layer] = end - self.length
        self._written[layer] = self._filled[layer] = self._begun[layer] == self.draft
        return self._keys[layer][:, :end], self._values[layer][:, :end]

    def shorten(self, tokens: int) -> None:
        """Take back the last `tokens` of the draft that were written, in every layer."""
        if tokens > self.begun:
            raise CacheStateError(
                f"{tokens} tokens are to be taken back, expected at most {self.begun}: what was "
                "committed stays"
            )
        self._begun = [count - tokens for count in self._begun]
        self._written, self._filled = [False] * self.layers, [False] * self.layers

    @property
    def begun(self) -> int:
        """Tokens of the draft that every layer was given by `extend`."""
        return min(self._begun)

    def _check(self, keys: Tensor, values: Tensor, count: int) -> None:
        expected = (self.kv_heads, count, self.head_dim)
        if tuple(keys.shape) != expected or tuple(values.shape) != expected:
            raise CacheStateError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)}, "
                f"expected {expected} (heads, opened tokens, head size)"
            )
        if keys.dtype != self.dtype or values.dtype != self.dtype:
            raise CacheStateError(
                f"keys are {keys.dtype}, expected {self.dtype} as the cache holds"
            )

    def rollback(self) -> None:
        """Forget the draft: it must be written again before a commit."""
        self._written = [False] * self.layers
        self._begun = [0] * self.layers

    @property
    def complete(self) -> bool:
        """Has every layer written the draft since it was opened or rolled back?"""
        return all(self._written)

    def commit(self) -> None:
        """The draft stays."""
        if not self.complete:
            missing = [i for i, written in enumerate(self._written) if not written]
            raise CacheStateError(
                f"commit without a forward: layers {missing} wrote no K/V since the last rollback"
            )
        self.length += self.draft
        self.draft = 0
        self.rollback()

    def keep(self, slots: Ints) -> None:
        """Hold only these slots (ascending, on the host). Extra memory: one layer's kept tail."""
        count = len(slots)
        moved = int((slots == np.arange(count)).sum())  # the untouched head
        tail = torch.from_numpy(slots[moved:].astype(np.int64)).to(self.device)
        for tensor in (*self._keys, *self._values):
            tensor[:, moved:count] = tensor.index_select(1, tail)
        self.length = count

    def select_heads(self, heads: Tensor) -> None:
        """Hold these heads (int64 `[n]`), in this order, some perhaps twice."""
        with torch.inference_mode(False):
            self._keys, self._values = (
                [tensor.index_select(0, heads.to(tensor.device)) for tensor in tensors]
                for tensors in (self._keys, self._values)
            )
        self.kv_heads = len(heads)

    def keys(self, layer: int) -> Tensor:
        """Committed keys `[H, S, D]`, a view."""
        return self._keys[layer][:, : self.length]

    def values(self, layer: int) -> Tensor:
        """Committed values `[H, S, D]`, a view."""
        return self._values[layer][:, : self.length]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((self.keys(i), self.values(i)) for i in range(self.layers))
