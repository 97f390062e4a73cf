"""What the conformance kit asks of an adapter: a host model, and a way to run it with a cache.

A clip comes in *pieces*, one commit each: the text prefix if there is one, then chunks of latent
frames. `Subject` knows the host and begins runs; a `Run` is one clip's cache under way.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from packcache.policies import Policy
from packcache.timeline import FrameLayout

__all__ = ["Run", "Subject"]


class Run(abc.ABC):
    """One clip's cache: draft a piece as often as wanted, then commit the last draft."""

    @abc.abstractmethod
    def forward(self, inputs: Any, branch: int = 0) -> Tensor:
        """Outputs `[n, C]` of the next piece in a branch; leaves no trace unless committed."""

    @abc.abstractmethod
    def commit(self) -> None:
        """The last forward of every branch stays; the policy evicts."""

    @abc.abstractmethod
    def kv(self, branch: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Committed K and V `[..., S, D]` of each layer, as they lie."""

    @property
    @abc.abstractmethod
    def logical_length(self) -> int:
        """Tokens ever committed, branch 0, as the adapter tells them."""

    @property
    @abc.abstractmethod
    def physical_length(self) -> int:
        """Tokens held, branch 0, as the adapter tells them."""

    def reorder(self, order: Tensor) -> None:
        """Hold the same tokens in another order, int64 `[S]`, in every layer of branch 0."""
        for pair in self.kv():
            for tensor in pair:
                tensor.copy_(tensor.index_select(-2, order))

    def state(self) -> Any:
        """The objects that live as long as the clip: what must not grow."""
        return self


class Subject(abc.ABC):
    """A host model and its cache, small, random, on a CPU; the same at every call.

    Attributes:
        name: as reports call it.
        layout: of a latent frame; `layout.tokens` of them lie in the sequence.
        text: tokens of the prefix in each branch; `(0,)` for none.
        chunk: latent frames a commit.
        bounded: can it evict? If not, only what holds for a cache that keeps all is asked.
        tolerance: of outputs, as a share of their standard deviation.
    """

    name: str
    layout: FrameLayout
    text: tuple[int, ...] = (0,)
    chunk: int = 1
    bounded: bool = True
    tolerance: float = 1e-5

    @abc.abstractmethod
    def inputs(self, piece: int, seed: int) -> Any:
        """What the host is given for a piece: clean at its commit, or another seed's as noise."""

    @abc.abstractmethod
    def begin(self, policy: Policy) -> Run:
        """A new clip, true positions (no rebase)."""

    @abc.abstractmethod
    def whole(self, pieces: Sequence[Any], bias: Tensor, branch: int = 0) -> Tensor:
        """Outputs `[N, C]` of all pieces in one forward of the host without any cache.

        `bias [N, N]` is added to the scores of queries (rows) over keys: 0 where seen, -inf where
        not.
        """

    def frames(self, piece: int) -> range:
        """Latent frames of a piece; none in the text."""
        number = piece - (max(self.text) > 0)
        return range(0) if number < 0 else range(number * self.chunk, (number + 1) * self.chunk)

    def inside(self, tokens: int, is_text: bool) -> Tensor:
        """Who sees whom in a piece, bool `[n, n]`: the text causally, frames all of theirs."""
        own = torch.ones(tokens, tokens, dtype=torch.bool)
        return own.tril() if is_text else own

    def off(self) -> tuple[Tensor, Tensor] | None:
        """Outputs of the host as it is, and with the adapter there but off; None: has no off."""
        return None
