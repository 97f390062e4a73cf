"""What the network's attention attends to: a cache, and what earlier steps of a frame have kept.

Rows are branches: prompt 0 conditional, prompt 0 unconditional, prompt 1 conditional, ... Axes: G
rows, H heads, L tokens of this forward, P tokens of a latent frame, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packcache.attention import attend, attend_causal, attend_lse, merge
from packcache.cache import FrameCache
from packcache.lumos.model import Attend
from packcache.reuse import StepWork

__all__ = ["CachedAttention", "ReusedAttention", "causal_attention"]


class CachedAttention:
    """Attention of an open frame over everything held and itself: one unmasked call per branch."""

    def __init__(self, caches: Sequence[FrameCache], branches: int) -> None:
        self.branches = branches
        self.sources = [(cache, branch) for cache in caches for branch in range(branches)]
        self.work = StepWork()
        self.rows: Tensor | None = None

    def begin(self, work: StepWork, rows: Tensor | None) -> None:
        """The forwards that follow are of this step, and of `rows` `[B, n]` of the frame only."""
        self.work, self.rows = work, rows

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for g, (cache, branch) in enumerate(self.sources):
            rows = None if self.rows is None else self.rows[g // self.branches]
            keys, values = cache.update(layer, k[g], v[g], branch, rows=rows)
            if cache.asks:
                cache.observe(layer, q[g], keys, values, branch)
            out[g] = self._attend(layer, g, q[g], keys, values, rows)
        return out

    def _attend(
        self, layer: int, g: int, q: Tensor, keys: Tensor, values: Tensor, rows: Tensor | None
    ) -> Tensor:
        return attend(q, keys, values)


class ReusedAttention(CachedAttention):
    """As `CachedAttention`, in two parts: the history's is kept from step to step (methods E4).

    Kept are, for every layer and row, the output `[H, P, D]` over anchors and history, its
    log-sum-exp `[H, P]` in float32, and the queries `[KV, P, D]` of one head a group, by which is
    told whose queries moved. The merge with the current frame's part is exact, and so is the first
    layer for undecided tokens: nothing but a decision changes a query there.
    """

    def __init__(self, caches: Sequence[FrameCache], branches: int, tokens: int) -> None:
        super().__init__(caches, branches)
        self.tokens = tokens
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def _attend(
        self, layer: int, g: int, q: Tensor, keys: Tensor, values: Tensor, rows: Tensor | None
    ) -> Tensor:
        held = keys.shape[1] - self.tokens
        out, lse = self._history(layer, g, q, keys[:, :held], values[:, :held], rows)
        return merge(*attend_lse(q, keys[:, held:], values[:, held:]), out, lse)

    def _history(
        self, layer: int, g: int, q: Tensor, keys: Tensor, values: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the queries over what is held: computed where due, or kept."""
        kept = self._room(layer, g, q, len(keys))
        group = len(q) // len(keys)
        if self.work.fresh is None:
            new = attend_lse(q, keys, values)
            _keep(kept, (*new, q[::group]), rows)
            return new
        if self.work.fresh:
            before = kept[2] if rows is None else kept[2][:, rows]
            moved = (q[::group] - before).square().sum(dim=(0, 2), dtype=kept[1].dtype)
            most = moved.topk(self.work.fresh, sorted=False).indices
            some = q[:, most]
            new = attend_lse(some, keys, values)
            _keep(kept, (*new, some[::group]), most if rows is None else rows[most])
        return kept[:2] if rows is None else (kept[0][:, rows], kept[1][:, rows])

    def _room(self, layer: int, g: int, q: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where a layer's parts of a row are kept: made once a clip."""
        if layer not in self._kept:
            heads, _, size = q.shape
            count, wide = len(self.sources), torch.promote_types(q.dtype, torch.float32)
            self._kept[layer] = (
                q.new_empty((count, heads, self.tokens, size)),
                torch.empty((count, heads, self.tokens), dtype=wide, device=q.device),
                q.new_empty((count, kv_heads, self.tokens, size)),
            )
        out, lse, queries = self._kept[layer]
        return out[g], lse[g], queries[g]


def _keep(kept: Sequence[Tensor], new: Sequence[Tensor], rows: Tensor | None) -> None:
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
