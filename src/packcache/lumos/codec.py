"""Pixels to codes and back: what a codec must offer, and the quantiser that all of them share."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from packcache.digits.fsq import FSQ

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
