"""Caches that come without a model, on the kit's own host: ours, and how to ask about another.

    check(BareSubject("mine", MyRun))

`BareRun` asks a cache for K and V of a layer and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from packcache.cache import FrameCache
from packcache.policies import Policy
from packcache.testing.host import Host, attend_all, token_positions
from packcache.testing.subject import Run, Subject
from packcache.timeline import FrameLayout, Role, Span

__all__ = ["BareRun", "BareSubject", "FrameCacheRun"]


class BareSubject(Subject):
    """The kit's host with caches made by `make(subject, policy)`."""

    layout = FrameLayout(rows=2, cols=3, header=0, footer=0, new_line=False)
    text = (5, 2)

    def __init__(
        self, name: str, make: Callable[[BareSubject, Policy], Run], **changes: Any
    ) -> None:
        self.name, self.make = name, make
        for key, value in changes.items():
            setattr(self, key, value)
        self.host = Host()

    def positions(self, piece: int, branch: int) -> Tensor:
        # frames lie where the longer branch has them, so that both share their keys' rotation
        own = self.text[0] if self.frames(piece) else self.text[branch]
        return token_positions(own, self.frames(piece), self.layout.tokens)

    def inputs(self, piece: int, seed: int) -> tuple[int, int]:
        return piece, seed

    def embed(self, inputs: tuple[int, int], branch: int) -> Tensor:
        piece, seed = inputs
        draw = torch.Generator().manual_seed(1000 * seed + piece)
        count = len(self.positions(piece, branch))
        return torch.randn(count, self.host.width, generator=draw)

    def begin(self, policy: Policy) -> Run:
        return self.make(self, policy)

    def whole(self, pieces: Sequence[Any], bias: Tensor, branch: int = 0) -> Tensor:
        x = torch.cat([self.embed(inputs, branch) for inputs in pieces])
        positions = torch.cat([self.positions(piece, branch) for piece, _ in pieces])
        return self.host(x, positions, lambda _, q, k, v: attend_all(q, k, v, bias))


class BareRun(Run):
    """A run on the kit's host: subclasses say what `attend` does with q, k, v of a layer."""

    def __init__(self, subject: BareSubject, policy: Policy) -> None:
        self.subject, self.policy = subject, policy
        self.piece = 0

    def forward(self, inputs: Any, branch: int = 0) -> Tensor:
        subject = self.subject

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.update(layer, k, v, branch)
            bias = None
            if not subject.frames(self.piece):
                bias = subject.inside(q.shape[1], True).float().log()
            return attend_all(q, keys, values, bias)

        return subject.host(subject.embed(inputs, branch), self.where(branch), attend)

    def where(self, branch: int) -> Tensor:
        """Positions `[n, 2]` of the next piece."""
        return self.subject.positions(self.piece, branch)

    def update(self, layer: int, k: Tensor, v: Tensor, branch: int) -> tuple[Tensor, Tensor]:
        """Take a layer's K and V `[H, n, D]` as a draft; returns what to attend to."""
        raise NotImplementedError

    def commit(self) -> None:
        self.piece += 1


class FrameCacheRun(BareRun):
    """Our own cache."""

    def __init__(self, subject: BareSubject, policy: Policy) -> None:
        super().__init__(subject, policy)
        host = subject.host
        self.cache = FrameCache(
            policy, layers=len(host.blocks), kv_heads=host.heads, head_dim=host.head_dim,
            layout=subject.layout, text=subject.text, positions="absolute",
        )  # fmt: skip
        self._open()

    def _open(self) -> None:
        subject = self.subject
        frames = subject.frames(self.piece)
        spans = [Span.of_frame(Role.HISTORY, f, subject.layout) for f in frames]
        self.cache.open(*spans or [Span.text(subject.text[0])])

    def update(self, layer: int, k: Tensor, v: Tensor, branch: int) -> tuple[Tensor, Tensor]:
        return self.cache.update(layer, k, v, branch)

    def commit(self) -> None:
        self.cache.commit()
        super().commit()
        self._open()

    def kv(self, branch: int = 0) -> list[tuple[Tensor, Tensor]]:
        return list(self.cache.stores[branch])

    @property
    def logical_length(self) -> int:
        return self.cache.logical_length

    @property
    def physical_length(self) -> int:
        return self.cache.physical_length

    def state(self) -> FrameCache:
        return self.cache
