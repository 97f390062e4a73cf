"""How a batch lies in a cache: its rows are more heads."""

from __future__ import annotations

from torch import Tensor

__all__ = ["heads_first", "heads_last"]


def heads_first(x: Tensor) -> Tensor:
    """`[B, n, H, D]` as `[B * H, n, D]`."""
    return x.transpose(1, 2).flatten(0, 1)


def heads_last(x: Tensor, batch: int) -> Tensor:
    """`[B * H, S, D]` as `[B, S, H, D]`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)
