"""What several tests share: small timelines, and runs of the engine with every forward kept."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packcache.lumos.decode import Decoder
from packcache.lumos.model import Lumos
from packcache.lumos.schedule import Sampling, philox_draws
from packcache.lumos.vocab import Vocab
from packcache.policies import Policy
from packcache.timeline import FrameLayout, Ints, Role, Span, Timeline

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

#: 76 tokens, the frame of the golden data and of the worked examples.
LAYOUT = FrameLayout(rows=8, cols=8)

#: Prompts of different length, as text ids of the tiny model.
PROMPTS = ([11, 57, 23, 90, 45, 31, 62], [77, 14, 38], [19, 84, 50, 66, 12])


def ranked(policy: Policy, span: Span, before: Span | None) -> Ints | None:
    """A policy's order of a span; one that asks is told scores drawn from the frame's number."""
    if policy.asks is None or span.layout is None:
        return policy.rank(span, before)
    return policy.rank(span, before, np.random.default_rng(span.frame).random(span.tokens))


def commit(timeline: Timeline, policy: Policy, *spans: Span, budget: int | None = None) -> None:
    """Append spans as `FrameCache` does, then let the policy evict."""
    for span in spans:
        frames = [e.span for e in timeline.entries if e.span.layout is not None]
        timeline.append(span, ranked(policy, span, frames[-1] if frames else None))
    timeline.keep(policy.plan(timeline, budget))


def grow(
    policy: Policy, frames: int, *, layout: FrameLayout = LAYOUT, text: int = 5, image: bool = False
) -> Iterator[Timeline]:
    """A clip frame by frame: the timeline after each commit."""
    timeline = Timeline()
    commit(timeline, policy, Span.text(text))
    for frame in range(frames):
        role = Role.IMAGE if image and frame == 0 else Role.HISTORY
        commit(timeline, policy, Span.of_frame(role, frame, layout))
        yield timeline


def counts(timeline: Timeline) -> list[int]:
    """Tokens held per history frame, newest first."""
    return [entry.count for entry in timeline.history]


def trained_on(model: Lumos, latents: int | None) -> Lumos:
    """The same weights under a config that says how long the training clips were."""
    twin = copy.copy(model)
    twin.config = dataclasses.replace(model.config, trained_latent_frames=latents)
    return twin


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """One forward of an open frame: ids `[B, P]` in, `[B, branches, P, hidden]` out."""

    frame: int
    ids: Tensor
    hidden: Tensor


class Recorder(Decoder):
    """The engine, with every forward and every committed K/V byte kept."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)  # type: ignore[arg-type]
        self.forwards: list[Forward] = []
        self.results: list = []
        self.kv: list[list[bytes]] = []

    def _forward(self, ids: Tensor, *arguments: Any) -> Tensor:
        hidden = super()._forward(ids, *arguments)
        self.forwards.append(Forward(self.frame, ids.clone(), hidden.clone()))
        return hidden

    def run(self, latents: int, given: Tensor | None = None) -> Recorder:
        self.latents = latents
        for result in self.frames(given):
            self.results.append(result)
            self.kv.append(kv_bytes_of(self))
        return self

    @property
    def tokens(self) -> Tensor:
        """Clean ids `[B, frames, P]`."""
        return torch.stack([r.ids for r in self.results], dim=1)


def kv_bytes_of(decoder: Decoder) -> list[bytes]:
    """The bytes of all committed keys and values, one entry a branch."""
    return [
        b"".join(bits(x) for pair in store for x in pair)
        for cache in decoder.caches
        for store in cache.stores
    ]


def bits(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def recorder(
    model: Lumos,
    policy: Policy,
    *,
    prompts: Sequence[Sequence[int]] = PROMPTS[:1],
    seeds: Sequence[int] | None = None,
    size: tuple[int, int] = (32, 32),
    steps: int = 3,
    guidance: float = 3.0,
    sampling: Sampling | None = None,
    **settings: object,
) -> Recorder:
    """A small decoder: 16 content tokens a frame (P = 24), three steps."""
    vocab = Vocab(model.config)
    layout = vocab.layout(*size)
    sampling = sampling or Sampling(steps=steps, guidance=guidance)
    seeds = seeds or range(len(prompts))
    settings.setdefault("draws", philox_draws(list(seeds), sampling.steps, layout.content))
    return Recorder(
        model,
        [vocab.prefix(text, seconds=2, fps=4) for text in prompts],
        layout=layout,
        sampling=sampling,
        policy=policy,
        **settings,
    )


def picture(model: Lumos, prompts: int = 1, *, size: tuple[int, int] = (32, 32)) -> Tensor:
    """Codes `[B, 1, rows, cols]` of a condition image."""
    layout = Vocab(model.config).layout(*size)
    rng = np.random.default_rng(3)
    codes = rng.integers(0, model.config.token_ids.num_codes, (layout.rows, layout.cols))
    return torch.from_numpy(codes).expand(prompts, 1, -1, -1)
