"""Pixels to codes and back: what a codec must offer, and the quantiser that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["FSQ", "Codec"]


class Codec(Protocol):
    """A causal video codec with the interface of the Cosmos tokenizer (lumos1-spec 6).

    The first frame makes the first latent frame, each later group of `t` frames one more.
    """

    def encode(self, video: Tensor, /) -> tuple[Tensor, Tensor]:
        """`[B, 3, T, H, W]` in [-1, 1] to int32 `[B, t, h, w]` and codes `[B, dims, t, h, w]`."""
        ...

    def decode(self, indices: Tensor, /) -> Tensor:
        """Video `[B, 3, 1 + 4(t-1), 8h, 8w]`, nominal range [-1, 1], of indices `[B, t, h, w]`."""
        ...


class FSQ(nn.Module):
    """Finite scalar quantisation with the numbers of the Cosmos tokenizer (lumos1-spec 6).

    A grid of `levels[i]` values in [-1, 1] on each axis; the axis is the last dimension.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        sizes = torch.tensor(list(levels), dtype=torch.int64)
        basis = torch.cat((torch.ones(1, dtype=torch.int64), sizes.cumprod(0)[:-1]))
        self.register_buffer("levels", sizes, persistent=False)
        self.register_buffer("basis", basis, persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """Squash to just within the grid, before rounding."""
        half = (self.levels - 1) * 1.001 / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half)
        return torch.tanh(z + shift) * half - offset

    def quantise(self, z: Tensor) -> Tensor:
        """Codes in [-1, 1] of `z [..., dims]`; gradients pass straight through the rounding."""
        bounded = self.bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self.levels // 2)

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Indices int64 `[...]` of codes `[..., dims]`."""
        half = self.levels // 2
        return ((codes * half).round().long() + half).mul(self.basis).sum(-1)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes `[..., dims]` of indices `[...]`."""
        half = self.levels // 2
        digits = indices.unsqueeze(-1).long() // self.basis % self.levels
        return (digits - half) / half
