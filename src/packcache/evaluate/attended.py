"""Attention mass lost: what the full cache looks at and a policy holds no more (evaluation 8d.1).

seen = Attended(decoder)              # of the full cache
with seen.looking():
    decoder.predict()
mass = seen.take()                    # by clip, shares [S] of every token, sum 1
lost = 1 - mass[0][held_tokens(other.caches[0].timeline, tokens)].sum()
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packcache.lumos.attend import CachedAttention
from packcache.lumos.decode import Decoder
from packcache.scores import received_attention, sampled
from packcache.timeline import Timeline

__all__ = ["Attended", "held_tokens"]


class Attended(CachedAttention):
    """A decoder's attention, which does what it always did and remembers where queries look.

    Of the conditional branch, sampled content queries, mean over layers, heads and the forwards
    that were looked at.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder.caches, decoder.branches)
        self._rows = torch.tensor(sampled(decoder.layout), device=decoder.device)
        self._mass: dict[int, Tensor] = {}
        self._on = False
        decoder.attend = self

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Forwards in here count."""
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def take(self) -> list[NDArray[np.float64]]:
        """What was seen since the last time, by clip, shares `[S]` in logical order, sum 1."""
        found, self._mass = self._mass, {}
        return [(found[g] / found[g].sum()).cpu().numpy() for g in sorted(found)]

    def _attend(
        self, layer: int, g: int, q: Tensor, keys: Tensor, values: Tensor, rows: Tensor | None
    ) -> Tensor:
        if self._on and g % self.branches == 0:
            own = received_attention(q[:, self._rows].float(), keys.float(), 0, keys.shape[1])
            before = self._mass.get(g)
            self._mass[g] = own.double() if before is None else before + own
        return super()._attend(layer, g, q, keys, values, rows)


def held_tokens(timeline: Timeline, tokens: int) -> NDArray[np.bool_]:
    """Which tokens of the clip so far, in logical order, are held; the next frame's own all are."""
    held = np.zeros(timeline.logical_length + tokens, dtype=bool)
    for entry in timeline.entries:
        held[entry.start + entry.held] = True
    held[timeline.logical_length :] = True
    return held
