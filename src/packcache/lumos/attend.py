"""What the network's attention attends to: a cache, and what earlier steps of a frame have kept.

Rows are branches: prompt 0 conditional, prompt 0 unconditional, prompt 1 conditional, ... Axes: G
rows, H heads, L tokens of this forward, P tokens of a latent frame, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packcache.attention import attend, attend_causal, attend_lse, merge
from packcache.cache import FrameCache
from packcache.lumos.model import Attend
from packcache.reuse import StepWork

__all__ = ["CachedAttention", "ReusedAttention", "StepRows", "causal_attention"]


class CachedAttention:
    """Attention of an open frame over everything held and itself: one unmasked call per branch."""

    def __init__(self, caches: Sequence[FrameCache], branches: int) -> None:
        self.branches = branches
        self.sources = [(cache, branch) for cache in caches for branch in range(branches)]
        self.work = StepWork.everything()
        self.rows: Tensor | None = None
        self.moved: Tensor | None = None

    def begin(self, work: StepWork, tokens: StepRows) -> None:
        """The forwards that follow are of this step, and of these tokens only."""
        self.work, self.rows, self.moved = work, tokens.rows, tokens.moved

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for g, (cache, branch) in enumerate(self.sources):
            rows = self._of(self.rows, g)
            keys, values = cache.update(layer, k[g], v[g], branch, rows=rows)
            out[g] = self._attend(layer, g, q[g], keys, values)
        return out

    def _attend(self, layer: int, g: int, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attend(q, keys, values)

    def _of(self, index: Tensor | None, g: int) -> Tensor | None:
        """The line of an index `[B, n]` that belongs to row g."""
        return None if index is None else index[g // self.branches]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepRows:
    """The tokens of one denoising step, int64 `[B, n]` each, as many for every prompt.

    `chosen` are the content positions whose codes are drawn and `place` their rows in the forward.
    `rows` are offsets of the tokens forwarded (None: all of the frame), `moved` of those that were
    decided in the step before; of the rows forwarded they are the first, unless all are.
    """

    chosen: Tensor
    place: Tensor
    rows: Tensor | None = None
    moved: Tensor | None = None


class ReusedAttention(CachedAttention):
    """As `CachedAttention`, in two parts: the history's is kept from step to step (methods E4).

    Kept are, for every layer and row, the output `[H, P, D]` over anchors and history and its
    log-sum-exp `[H, P]`, float32: about as much memory as every layer's input. Which queries attend
    to the history anew is told by the step's `StepWork`; the merge with the current frame's part is
    exact.
    """

    def __init__(self, caches: Sequence[FrameCache], branches: int, tokens: int) -> None:
        super().__init__(caches, branches)
        self.tokens = tokens
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def _attend(self, layer: int, g: int, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        held = keys.shape[1] - self.tokens
        past = self._history(layer, g, q, keys[:, :held], values[:, :held])
        return merge(*attend_lse(q, keys[:, held:], values[:, held:]), *past)

    def _history(
        self, layer: int, g: int, q: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the queries over what is held: computed where due, or kept."""
        kept = self._room(layer, g, q)
        rows = self._of(self.rows, g)
        fresh = self.work.fresh if layer else self.work.fresh_first
        if fresh is None:
            new = attend_lse(q, keys, values)
            _keep(kept, new, rows)
            return new
        if fresh:
            moved = self._of(self.moved, g)
            first = q[:, moved] if rows is None else q[:, :fresh]
            _keep(kept, attend_lse(first, keys, values), moved)
        return kept if rows is None else (kept[0][:, rows], kept[1][:, rows])

    def _room(self, layer: int, g: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Where a layer's parts of a row are kept: made once a clip."""
        if layer not in self._kept:
            heads, _, size = q.shape
            shape = (len(self.sources), heads, self.tokens)
            wide = torch.promote_types(q.dtype, torch.float32)
            lse = torch.empty(shape, dtype=wide, device=q.device)
            self._kept[layer] = q.new_empty((*shape, size)), lse
        out, lse = self._kept[layer]
        return out[g], lse[g]


def _keep(kept: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], rows: Tensor | None) -> None:
    for room, part in zip(kept, new, strict=True):
        if rows is None:
            room[:] = part
        else:
            room.index_copy_(1, rows, part.to(room.dtype))


def causal_attention(cache: FrameCache, branch: int) -> Attend:
    """Attention of a text prefix, the first thing in its cache: causal, one branch."""

    def attend_text(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.update(layer, k[0], v[0], branch)
        return attend_causal(q[0], keys, values)[None]

    return attend_text
