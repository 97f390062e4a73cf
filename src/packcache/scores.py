"""NUMBERS for orders that ask: how much each token of a latent frame is attended to.

A `QueryWatch` exists only where the policy asks. The attention shows it what it attends with, in
every forward of the open frame, drafts included; at the commit it says one number a token, the mean
over layers of shares that add up to one. Two kinds (methods 3.3):

- `expected` (S6, Expected Attention, 2510.00636): what queries like this frame's would give a key.
  Their mean and variance are taken over all forwards of the frame, of each group of query heads
  that share keys, rotated as they are: it is as if the next frames asked from the same time and
  places. So nothing lasts longer than its frame, and a resumed clip scores as an unbroken one.
- `observed` (S2): what `SAMPLES` queries of the last forward gave it, of content tokens that lie
  evenly over the grid, beside everything else the frame saw.

Axes: H query heads, KV key heads, L queries, S keys, P tokens of a latent frame, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from packcache.errors import InvalidSetting
from packcache.selectors import Score, Scores, low_discrepancy
from packcache.timeline import FrameLayout

__all__ = [
    "SAMPLES", "QueryWatch", "expected_attention", "received_attention", "sampled",
    "scoring_bytes", "watched_bytes",
]  # fmt: skip

#: Queries of a latent frame by which `observed` judges; all content tokens of a smaller one.
SAMPLES = 64


def expected_attention(mean: Tensor, variance: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Shares `[P]` that queries of this mean and variance `[KV, D]` are expected to give, sum 1.

    A normal q gives a key `E exp(q.k / sqrt D) = exp(mean.k / sqrt D + variance.k^2 / 2D)`, here
    times the length of its value; shares of keys and values `[KV, P, D]`, mean over the heads.
    """
    size = keys.shape[-1]
    of_mean = (keys @ mean[..., None])[..., 0] / math.sqrt(size)
    of_spread = (keys.square() @ variance[..., None])[..., 0] / (2 * size)
    length = values.norm(dim=-1).clamp_min(torch.finfo(values.dtype).tiny)
    return (of_mean + of_spread + length.log()).softmax(dim=-1).mean(dim=0)


def received_attention(queries: Tensor, keys: Tensor, first: int, tokens: int) -> Tensor:
    """Shares `[tokens]` of the attention that keys from `first` on receive, sum 1.

    Queries `[H, r, D]` attend to all keys `[KV, S, D]`, so a head that looks elsewhere counts less.
    """
    stacked = queries.reshape(len(keys), -1, queries.shape[-1])  # [KV, H/KV * r, D]
    logits = stacked @ keys.transpose(-1, -2) / math.sqrt(keys.shape[-1])
    received = logits.softmax(dim=-1)[..., first : first + tokens].mean(dim=(0, 1))
    return received / received.sum().clamp_min(torch.finfo(received.dtype).tiny)


def sampled(layout: FrameLayout) -> list[int]:
    """Offsets of the content tokens whose queries are observed, ascending, evenly over the grid."""
    content = layout.content_offsets()
    first = np.argsort(low_discrepancy(layout)[content], kind="stable")[:SAMPLES]
    return sorted(content[first].tolist())


@dataclass
class _Moments:
    """Sum and sum of squares `[KV, D]` of `count` queries each."""

    total: Tensor
    squares: Tensor
    count: int

    def with_more(self, other: _Moments) -> _Moments:
        return _Moments(
            self.total + other.total, self.squares + other.squares, self.count + other.count
        )

    @classmethod
    def of(cls, queries: Tensor, kv_heads: int) -> _Moments:
        """Of queries `[H, L, D]`, pooled by group, without a copy in the wider dtype."""
        pooled = queries.reshape(kv_heads, -1, queries.shape[-1])
        wide = _wider(queries.dtype)
        squares = torch.linalg.vector_norm(pooled, dim=1, dtype=wide).square()
        return cls(pooled.sum(dim=1, dtype=wide), squares, pooled.shape[1])

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        mean = self.total / self.count
        return mean, (self.squares / self.count - mean.square()).clamp_min(0)


class QueryWatch:
    """What one kind of score needs of the open draft, of one branch, gathered as forwards run."""

    def __init__(self, score: Score, *, layers: int, device: torch.device | str) -> None:
        self.score: Score = score
        self.layers, self.device = layers, device
        self.begin([])

    def begin(self, pieces: Sequence[tuple[int, FrameLayout | None]]) -> None:
        """A draft of pieces begins: the tokens of each, and its layout if it is a latent frame."""
        starts = np.cumsum([0, *(tokens for tokens, _ in pieces)]).tolist()
        self._draft = starts[-1]
        self._frames = [
            (start, layout)
            for start, (_, layout) in zip(starts, pieces, strict=False)
            if layout is not None
        ]
        offsets: list[int] = []
        if self.score == "observed":
            offsets = [start + offset for start, own in self._frames for offset in sampled(own)]
        self._sample = torch.tensor(offsets, dtype=torch.int64, device=self.device)
        self.forget()

    def forget(self) -> None:
        """Nothing was seen of the draft yet."""
        self._moments: dict[int, _Moments] = {}
        self._queries: dict[int, Tensor] = {}
        self._attended: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def is_due(self) -> bool:
        """Is a latent frame open?"""
        return bool(self._frames)

    def see(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Queries `[H, L, D]` of a forward, and all `[KV, S, D]` that they attend to.

        The draft's keys lie last. Of some rows only, L below the draft's tokens, just the moments
        are taken: the forward that is committed is one of all rows.
        """
        queries = queries.detach()
        if self.score == "expected":
            new = _Moments.of(queries, len(keys))
            before = self._moments.get(layer)
            self._moments[layer] = new if before is None else before.with_more(new)
        elif queries.shape[1] == self._draft:
            self._queries[layer] = queries.index_select(1, self._sample)
        self._attended[layer] = keys.detach(), values.detach()

    def scores(self) -> list[Scores]:
        """Of each open latent frame, one score a token; raises where a layer was not seen."""
        seen = self._moments if self.score == "expected" else self._queries
        if len(seen) < self.layers:
            raise InvalidSetting(
                f"order {self.score!r} needs the queries of {self.layers} layers, and this model's "
                f"attention showed the cache those of {len(seen)}: use 'visible' or 'spatial'"
            )
        layers = [self._of_layer(layer) for layer in range(self.layers)]
        means = [torch.stack(frame).mean(dim=0) for frame in zip(*layers, strict=True)]
        return [mean.cpu().double().numpy() for mean in means]

    def _of_layer(self, layer: int) -> list[Tensor]:
        """Each frame's shares in one layer."""
        keys, values = self._attended[layer]
        first = keys.shape[1] - self._draft
        places = [(first + start, layout.tokens) for start, layout in self._frames]
        if self.score == "observed":
            queries, keys = _wide(self._queries[layer]), _wide(keys)
            return [received_attention(queries, keys, at, tokens) for at, tokens in places]
        moments = self._moments[layer].mean_and_variance()
        own = [slice(at, at + tokens) for at, tokens in places]
        return [
            expected_attention(*moments, _wide(keys[:, which]), _wide(values[:, which]))
            for which in own
        ]


def _wide(x: Tensor) -> Tensor:
    """At least float32: sums over many queries."""
    return x.to(_wider(x.dtype))


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# --- what it takes ------------------------------------------------------------------------------


def watched_bytes(
    score: Score,
    layout: FrameLayout,
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> int:
    """Bytes that a watch holds of an open latent frame once all layers showed it their queries.

    Of tensors of its own: keys and values it looks at are views of the cache's.
    """
    if score == "expected":  # sums and sums of squares
        return layers * 2 * kv_heads * head_dim * _wider(dtype).itemsize
    each = layers * heads * head_dim * dtype.itemsize + torch.int64.itemsize  # and its place
    return min(SAMPLES, layout.content) * each


def scoring_bytes(
    score: Score,
    layout: FrameLayout,
    slots: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> int:
    """Bytes that making one layer's scores takes beside; `slots` are all that can be attended to.

    `expected` squares the frame's keys; `observed` has logits and shares of all keys. Narrow dtypes
    are copied to float32 first.
    """
    wide = _wider(dtype)
    copies = wide.itemsize if wide != dtype else 0
    if score == "expected":
        return kv_heads * layout.tokens * head_dim * (2 * copies + wide.itemsize)
    rows = heads * min(SAMPLES, layout.content)
    copied = (kv_heads * slots + rows) * head_dim * copies
    return copied + 2 * rows * slots * wide.itemsize
