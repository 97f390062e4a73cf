"""How a batch and its latent frames lie in a cache: rows of the batch are more heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from packcache.errors import CacheStateError
from packcache.timeline import FrameLayout, Role, Span

__all__ = ["check_same", "frame_spans", "heads_first", "heads_last"]


def heads_first(x: Tensor) -> Tensor:
    """`[B, n, H, D]` as `[B * H, n, D]`."""
    return x.transpose(1, 2).flatten(0, 1)


def heads_last(x: Tensor, batch: int) -> Tensor:
    """`[B * H, S, D]` as `[B, S, H, D]`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def frame_spans(numbers: Iterable[int], layout: FrameLayout, roles: Sequence[Role]) -> list[Span]:
    """Latent frames by number; `roles` are those of a clip's first ones, the rest is history."""
    return [Span.of_frame(roles[n] if n < len(roles) else Role.HISTORY, n, layout) for n in numbers]


def check_same(
    sizes: tuple[int, ...], dtype: torch.dtype, known: tuple[int, ...], held: torch.dtype
) -> None:
    """Raise CacheStateError for another batch, heads `(B, H, D)` or dtype than is held."""
    if (sizes, dtype) != (known, held):
        raise CacheStateError(
            f"batch, heads and head size are {sizes} in {dtype}, and were {known} in {held}: "
            "reset() before another clip"
        )
