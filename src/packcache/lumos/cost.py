"""Operations of a clip, counted from shapes: what a speed-up should be before it is measured.

Multiply-adds count two. Linear layers and the head see every row once a forward; attention sees
`4 L S H D` for L queries over S keys. Sampling, norms and memory traffic are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from packcache.lumos.config import LumosConfig
from packcache.lumos.schedule import Sampling, cosine_counts
from packcache.timeline import FrameLayout

__all__ = [
    "attention_operations", "attention_share", "clip_operations", "frame_operations",
    "linear_parameters", "stock_frame_operations",
]  # fmt: skip


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


def frame_operations(
    config: LumosConfig, layout: FrameLayout, sampling: Sampling, held: int, *, given: bool = False
) -> int:
    """Operations of one latent frame on top of `held` tokens: branches, steps and the commit."""
    forwards = 1 if given else sampling.steps + 1
    linear = 2 * linear_parameters(config) * layout.tokens
    attention = attention_operations(config, layout, held)
    rows = 0 if given else layout.content
    for count in [] if given else cosine_counts(layout.content, sampling.steps)[:-1]:
        rows += max(1, count)
    head = 2 * rows * config.hidden_size * config.token_ids.num_codes
    return sampling.branches * (forwards * (linear + attention) + head)


def stock_frame_operations(
    config: LumosConfig, layout: FrameLayout, sampling: Sampling, held: int
) -> int:
    """As `frame_operations`, upstream's way: every row through the head, all ids, commits too."""
    linear = 2 * linear_parameters(config) * layout.tokens
    head = 2 * layout.tokens * config.hidden_size * config.vocab_size
    forward = linear + attention_operations(config, layout, held) + head
    return 2 * (sampling.steps + 1) * forward


def clip_operations(
    config: LumosConfig,
    layout: FrameLayout,
    sampling: Sampling,
    held: Sequence[int],
    *,
    given: int = 0,
) -> list[int]:
    """Operations of each latent frame; `held` are the tokens held before each of them."""
    return [
        frame_operations(config, layout, sampling, tokens, given=number < given)
        for number, tokens in enumerate(held)
    ]
