"""The adapters that come with the package, as subjects of the conformance kit.

    for name, make in SUBJECTS.items(): check(make())

Those in other libraries live beside their adapters and are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from packcache.adapters.self_forcing import SelfForcingCache
from packcache.errors import InvalidSetting
from packcache.policies import FullCache, Policy
from packcache.testing.bare import BareSubject, FrameCacheRun
from packcache.testing.causal_wan import CausalWan, dict_cache
from packcache.testing.subject import Run, Subject
from packcache.timeline import FrameLayout

__all__ = ["SUBJECTS", "SelfForcingSubject", "find_subject"]


class SelfForcingSubject(Subject):
    """A small causal Wan model, its list of dicts replaced, one a branch; chunks of three.

    `settings` are the model's: LongLive 1.x writes when all layers are through, and reads sinks and
    window apart.
    """

    layout = FrameLayout(rows=2, cols=3, header=0, footer=0, new_line=False)
    text = (0, 0)
    chunk = 3

    def __init__(self, name: str = "self-forcing", **settings: Any) -> None:
        self.name = name
        self.model = CausalWan(grid=(self.layout.rows, self.layout.cols), **settings)

    def inputs(self, piece: int, seed: int) -> tuple[Tensor, float]:
        draw = torch.Generator().manual_seed(1000 * seed + piece)
        tokens = torch.randn(1, self.chunk * self.layout.tokens, self.model.width, generator=draw)
        return tokens, 0.1 * seed

    def begin(self, policy: Policy) -> SelfForcingRun:
        return SelfForcingRun(self, policy)

    def whole(
        self, pieces: Sequence[tuple[Tensor, float]], bias: Tensor, branch: int = 0
    ) -> Tensor:
        return self.model(torch.cat([x for x, _ in pieces], dim=1), bias=bias)[0]

    def off(self) -> tuple[Tensor, Tensor]:
        """The pipeline's own dicts, and ours that keep everything."""
        chunks = [self.inputs(piece, 0)[0] for piece in range(4)]
        plain = dict_cache(self.model, 4 * chunks[0].shape[1])
        ours = SelfForcingCache(FullCache(), layers=len(self.model.blocks), grid=self.model.grid)
        stock, cached = (
            torch.cat(
                [
                    self.model(x, kv_cache=cache, current_start=i * x.shape[1])
                    for i, x in enumerate(chunks)
                ]
            )
            for cache in (plain, ours)
        )
        return stock, cached


class SelfForcingRun(Run):
    """The model's own loop: every forward is given the list and where its chunk begins."""

    def __init__(self, subject: SelfForcingSubject, policy: Policy) -> None:
        model = subject.model
        self.model, self.start = model, 0
        self.caches = [
            SelfForcingCache(policy, layers=len(model.blocks), grid=model.grid)
            for _ in subject.text
        ]
        self.tokens = 0

    def forward(self, inputs: tuple[Tensor, float], branch: int = 0) -> Tensor:
        x, timestep = inputs
        self.tokens = x.shape[1]
        cache = self.caches[branch]
        return self.model(x, timestep=timestep, kv_cache=cache, current_start=self.start)[0]

    def commit(self) -> None:
        for cache in self.caches:
            cache.commit()
        self.start += self.tokens

    def kv(self, branch: int = 0) -> list[tuple[Tensor, Tensor]]:
        if not self.start:
            return []
        return list(self.caches[branch].cache.stores[0])

    @property
    def logical_length(self) -> int:
        return self.caches[0].cache.logical_length

    @property
    def physical_length(self) -> int:
        return self.caches[0].cache.physical_length

    def state(self) -> list[SelfForcingCache]:
        return self.caches


def _in_library(library: str, name: str) -> Callable[[], Subject]:
    """A tiny model of transformers or diffusers, imported when it is asked for.

    Raises InvalidSetting with the extra's name where the library is not installed.
    """

    def make() -> Subject:
        importlib.import_module(f"packcache.adapters.{library}")  # says what is missing
        theirs = importlib.import_module(f"packcache.adapters.{library}_subject")
        kind = getattr(theirs, f"{library.capitalize()}Subject")
        return kind(name, getattr(theirs, f"tiny_{name}")())

    return make


def find_subject(name: str) -> Callable[[], Subject]:
    """An adapter of ours by name, or anybody's as `module:Subject`. Raises InvalidSetting."""
    if name in SUBJECTS:
        return SUBJECTS[name]
    module, colon, attribute = name.partition(":")
    try:
        if colon:
            return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidSetting(f"{name!r} cannot be imported ({error})") from None
    raise InvalidSetting(
        f"unknown adapter {name!r}: known are {', '.join(SUBJECTS)}, or yours as module:Subject"
    )


#: Every adapter by the name `packcache check` knows.
SUBJECTS: dict[str, Callable[[], Subject]] = {
    "cache": lambda: BareSubject("cache", FrameCacheRun),
    "self-forcing": SelfForcingSubject,
    "longlive": lambda: SelfForcingSubject("longlive", deferred=True, sink_size=2),
    "emu3": _in_library("transformers", "emu3"),
    "chameleon": _in_library("transformers", "chameleon"),
    "wan": _in_library("diffusers", "wan"),
    "skyreels": _in_library("diffusers", "skyreels"),
}
