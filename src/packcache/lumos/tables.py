"""Rotary tables of a clip's latent frames, made once: from frame to frame only time moves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from packcache import positions
from packcache.lumos.model import Lumos
from packcache.lumos.vocab import Vocab
from packcache.timeline import FrameLayout

__all__ = ["FrameTables"]


class FrameTables:
    """cos and sin `[G, 1, P, D/2]` of the open latent frame, one row of tables a branch.

    Content and new-line tokens of a frame share their time, and where they lie never changes, so a
    new frame writes the pairs that carry time and the border tokens' rows, in place. To the bit
    what `Lumos.rotary` gives for the whole frame.

    Args:
        lengths: prefix tokens of each branch.
    """

    def __init__(
        self, model: Lumos, vocab: Vocab, layout: FrameLayout, lengths: Sequence[int]
    ) -> None:
        self.model, self.vocab, self.layout, self.lengths = model, vocab, layout, lengths
        outside = np.flatnonzero(layout.cells()[0] < 0)
        inside = np.flatnonzero(layout.cells()[0] >= 0)
        self._body = slice(int(inside[0]), int(inside[-1]) + 1)
        self._told = torch.from_numpy(
            np.append(outside, inside[0])
        )  # what a new frame must compute
        self._border = torch.from_numpy(outside).to(model.inv_freq.device)
        self._time = positions.temporal_pairs(model.config.head_dim).to(model.inv_freq.device)
        self._tables: tuple[Tensor, Tensor] | None = None
        self._wide: list[bool] = []

    def at(self, frame: int) -> tuple[Tensor, Tensor]:
        """The tables of latent frame `frame`; those given before are overwritten."""
        ids = [self.vocab.frame_positions(n, frame, self.layout) for n in self.lengths]
        wide = [positions.needs_float64(i) for i in ids]
        if self._tables is None or wide != self._wide:
            rows = [self.model.rotary(i) for i in ids]
            cos, sin = (torch.stack(part)[:, None] for part in zip(*rows, strict=True))
            self._tables, self._wide = (cos, sin), wide
            return cos, sin
        for g, i in enumerate(ids):
            told = self.model.rotary(i[:, self._told])
            for table, new in zip(self._tables, told, strict=True):
                own = table[g, 0]
                own.index_copy_(0, self._border, new[:-1])
                time = new[-1:].index_select(1, self._time)
                body = own[self._body]
                body.index_copy_(1, self._time, time.expand(len(body), -1))
        return self._tables
