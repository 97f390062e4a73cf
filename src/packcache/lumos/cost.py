"""Operations of a clip, counted from shapes: what a speed-up should be before it is measured.

Multiply-adds count two. Linear layers and the head see every row once a forward; attention sees
`4 L S H D` for L queries over S keys. Sampling, norms and memory traffic are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from packcache.lumos.config import LumosConfig
from packcache.lumos.schedule import Sampling, undecided
from packcache.reuse import EXACT, StepReuse
from packcache.timeline import FrameLayout

__all__ = [
    "Operations", "attention_operations", "attention_share", "clip_work",
    "frame_work", "linear_parameters", "stock_frame_operations",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Operations of a latent frame, all branches and forwards, by the kind of kernel."""

    linear: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.head


def linear_parameters(config: LumosConfig) -> int:
    """Weights of all matrices of the body: projections and MLP, no embedding, no head."""
    kv = config.num_key_value_heads * config.head_dim
    attention = config.hidden_size * (2 * config.hidden_size + 2 * kv)
    return config.num_hidden_layers * (
        attention + 3 * config.hidden_size * config.intermediate_size
    )


def attention_operations(config: LumosConfig, layout: FrameLayout, held: int) -> int:
    """Attention of one forward of a latent frame over `held` tokens and itself, one branch."""
    keys = held + layout.tokens
    return 4 * layout.tokens * keys * config.hidden_size * config.num_hidden_layers


def attention_share(config: LumosConfig, layout: FrameLayout, held: int) -> float:
    """Attention's share of what the layers compute for one latent frame, no head, no sampling."""
    attention = attention_operations(config, layout, held)
    return attention / (attention + 2 * linear_parameters(config) * layout.tokens)


def frame_work(
    config: LumosConfig,
    layout: FrameLayout,
    sampling: Sampling,
    held: int,
    *,
    given: bool = False,
    reuse: StepReuse = EXACT,
) -> Operations:
    """One latent frame on top of `held` tokens: all branches, steps and the commit."""
    rows = attended = 0  # token rows of the network; pairs of a query and a key, layers summed
    left = [] if given else undecided(layout.content, sampling.steps)
    layers = config.num_hidden_layers
    for work in reuse.works(left, layout.tokens):
        through = layout.tokens if work.rows is None else work.rows
        fresh = through if work.fresh is None else work.fresh
        rows += through
        attended += (through * layout.tokens + fresh * held) * layers
    rows += layout.tokens  # the commit
    attended += layout.tokens * (held + layout.tokens) * layers
    codes = config.token_ids.num_codes
    return Operations(
        linear=sampling.branches * 2 * linear_parameters(config) * rows,
        attention=sampling.branches * 4 * config.hidden_size * attended,
        head=2 * config.hidden_size * codes * sum(left),  # guided before it: one for all branches
    )


def stock_frame_operations(
    config: LumosConfig, layout: FrameLayout, sampling: Sampling, held: int
) -> int:
    """As `frame_work`, upstream's way: every row through the head, all ids, commits too."""
    linear = 2 * linear_parameters(config) * layout.tokens
    head = 2 * layout.tokens * config.hidden_size * config.vocab_size
    forward = linear + attention_operations(config, layout, held) + head
    return 2 * (sampling.steps + 1) * forward


def clip_work(
    config: LumosConfig,
    layout: FrameLayout,
    sampling: Sampling,
    held: Sequence[int],
    *,
    given: int = 0,
    reuse: StepReuse = EXACT,
) -> list[Operations]:
    """The work of each latent frame; `held` are the tokens held before each of them."""
    return [
        frame_work(config, layout, sampling, tokens, given=number < given, reuse=reuse)
        for number, tokens in enumerate(held)
    ]
