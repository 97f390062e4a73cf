"""How much memory a moment of the engine takes beside the weights: sums with named terms.

Read off the ops of `model`, `decode` and `schedule`, in the order in which their tensors live; the
planner takes the largest moment. Bytes of tensors only: what a codec, a CUDA context, a kernel's
workspace and an allocator's rounding take is not counted and has an allowance instead.
Axes: A token rows of a forward (branches x prompts x tokens), D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from packcache.lumos.config import LumosConfig
from packcache.lumos.decode import HEAD_BYTES
from packcache.lumos.schedule import Sampling
from packcache.reuse import StepReuse
from packcache.scores import SAMPLES, scoring_bytes, watched_bytes
from packcache.selectors import Score
from packcache.timeline import FrameLayout

__all__ = [
    "ALLOWANCE", "Moment", "Phase", "Term", "forward_moments", "head_moment", "keep_moment",
    "kept_terms", "parts_moment", "reserve_moment", "scoring_moment", "state_terms",
    "watched_terms",
]  # fmt: skip

#: Bytes left free for what is not counted: codec, CUDA context, workspaces, allocator rounding.
ALLOWANCE = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Term:
    """One tensor or group of tensors that is alive: its name, bytes, and how they come about."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A point of the run where memory may peak: all that lives there beside weights and cache."""

    name: str
    terms: tuple[Term, ...]

    @property
    def bytes(self) -> int:
        return sum(term.bytes for term in self.terms)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A moment together with what the cache has allocated then."""

    cache_bytes: int
    moment: Moment

    @property
    def bytes(self) -> int:
        return self.cache_bytes + self.moment.bytes


def forward_moments(
    config: LumosConfig, rows: int, dtype: torch.dtype, held: Sequence[Term] = ()
) -> list[Moment]:
    """The moments of one layer's forward of `rows` tokens; `held` lives throughout.

    A layer's input stays alive until the layer returns, its normed copy as long as the sublayer.
    QK-norm and rotation are float32 inside; SDPA is fused, so no scores are in memory.
    """
    size, wide = dtype.itemsize, max(4, dtype.itemsize)
    queries = rows * config.hidden_size
    keys = rows * config.num_key_value_heads * config.head_dim
    inner = rows * config.intermediate_size
    cast = wide if size < wide else 0  # `.float()` copies narrow numbers only

    def moment(name: str, *terms: tuple[str, int, str]) -> Moment:
        fixed = [Term(name="layer input", bytes=size * queries, how=f"A x D x {size} B")]
        new = [Term(name=n, bytes=b, how=how) for n, b, how in terms if b]
        return Moment(name=name, terms=(*held, *fixed, *new))

    normed = ("normed input", size * queries, f"A x D x {size} B")
    return [
        moment(
            "query norm",
            normed,
            ("raw queries", (size + cast) * queries, f"A x D x ({size} + {cast}) B"),
            ("norm and affine", 2 * wide * queries, f"2 x A x D x {wide} B"),
        ),
        moment(
            "key norm",
            normed,
            ("queries", wide * queries, f"A x D x {wide} B"),
            ("raw keys", (size + cast) * keys, f"A x KV x d x ({size} + {cast}) B"),
            ("norm and affine", 2 * wide * keys, f"2 x A x KV x d x {wide} B"),
        ),
        moment(
            "query rotation",
            normed,
            ("queries", wide * queries, f"A x D x {wide} B"),
            ("rotated halves and their sum", 2 * wide * queries, f"2 x A x D x {wide} B"),
            ("keys and values", (wide + size) * keys, f"A x KV x d x ({wide} + {size}) B"),
        ),
        moment(
            "output projection",
            normed,
            ("queries", size * queries, f"A x D x {size} B"),
            ("keys and values", 2 * size * keys, f"2 x A x KV x d x {size} B"),
            ("attention, flat, projected", 3 * size * queries, f"3 x A x D x {size} B"),
        ),
        moment(
            "MLP",
            ("sum and normed sum", 2 * size * queries, f"2 x A x D x {size} B"),
            (
                "gate, up and product",
                max(3 * size * inner, size * (inner + queries)),
                f"3 x A x F x {size} B, or product and output",
            ),
        ),
    ]


def head_moment(
    config: LumosConfig,
    layout: FrameLayout,
    sampling: Sampling,
    dtype: torch.dtype,
    *,
    prompts: int = 1,
    held: Sequence[Term] = (),
) -> Moment:
    """Head and draw of one slice of rows; a slice has at most `HEAD_BYTES` a float32 copy."""
    branches, codes = sampling.branches, config.token_ids.num_codes
    size = dtype.itemsize
    rows = min(layout.content, max(1, HEAD_BYTES // (4 * codes * prompts)))
    each = prompts * rows * codes
    hidden = prompts * branches * layout.tokens * config.hidden_size * size
    return Moment(
        name="head",
        terms=(
            *held,
            Term(name="hidden states", bytes=hidden, how=f"A x D x {size} B"),
            Term(name="logits", bytes=each * size, how=f"{rows} x {codes} a prompt x {size} B"),
            Term(
                name="shares and running sums",
                bytes=2 * each * 4,
                how=f"2 x {rows} x {codes} a prompt x 4 B, at most {HEAD_BYTES >> 20} MiB each",
            ),
        ),
    )


def state_terms(
    config: LumosConfig,
    layout: FrameLayout,
    sampling: Sampling,
    dtype: torch.dtype,
    *,
    prompts: int = 1,
) -> list[Term]:
    """What lives as long as a latent frame is open."""
    rows = prompts * sampling.branches * layout.tokens
    cells = prompts * layout.content
    return [
        Term(
            name="cos and sin",
            bytes=rows * config.head_dim * dtype.itemsize,
            how=f"A x d x {dtype.itemsize} B",
        ),
        Term(
            name="draws",
            bytes=8 * cells * sampling.steps,
            how="2 x prompts x steps x content tokens x 4 B",
        ),
        Term(
            name="ids and choices",
            bytes=8 * (prompts * layout.tokens + rows) + 29 * cells,
            how="ids as int64; known, chosen, new and their shares a content token",
        ),
    ]


def kept_terms(
    config: LumosConfig,
    layout: FrameLayout,
    sampling: Sampling,
    dtype: torch.dtype,
    *,
    prompts: int = 1,
    reuse: StepReuse,
) -> list[Term]:
    """What lives from the first generated latent frame on: attention kept over steps, if any is."""
    if not reuse.keeps_history:
        return []
    wide, layers = max(4, dtype.itemsize), config.num_hidden_layers
    queries = config.num_key_value_heads * config.head_dim
    row = (config.hidden_size + queries) * dtype.itemsize + config.num_attention_heads * wide
    return [
        Term(
            name="attention to the history",
            bytes=layers * prompts * sampling.branches * layout.tokens * row,
            how=f"layers x A x ((D + KV x d) x {dtype.itemsize} B + heads x {wide} B)",
        )
    ]


def watched_terms(
    config: LumosConfig,
    layout: FrameLayout,
    score: Score | None,
    dtype: torch.dtype,
    *,
    prompts: int = 1,
) -> list[Term]:
    """What an order that goes by scores holds of the queries while a latent frame is open."""
    if score is None or not prompts:
        return []
    each = watched_bytes(
        score, layout, layers=config.num_hidden_layers, dtype=dtype, **_heads(config)
    )
    how = {
        "expected": f"prompts x layers x 2 x KV x d x {max(4, dtype.itemsize)} B",
        "observed": f"prompts x {min(SAMPLES, layout.content)} queries x (layers x D x "
        f"{dtype.itemsize} + 8 B)",
    }
    return [Term(name=f"queries for order {score!r}", bytes=prompts * each, how=how[score])]


def scoring_moment(
    config: LumosConfig,
    layout: FrameLayout,
    score: Score,
    dtype: torch.dtype,
    slots: int,
    held: Sequence[Term] = (),
) -> Moment:
    """Scores at a commit, layer by layer, one prompt at a time; `slots` of a branch at most."""
    new = scoring_bytes(score, layout, slots, dtype=dtype, **_heads(config))
    how = {
        "expected": "keys squared in float32, and what is copied for it",
        "observed": f"logits and shares over {slots} tokens in float32, and what is copied",
    }
    wide = max(4, dtype.itemsize)
    shares = config.num_hidden_layers * layout.tokens * wide
    return Moment(
        name="scoring",
        terms=(
            *held,
            Term(name="one layer's scores", bytes=new, how=how[score]),
            Term(name="shares", bytes=shares, how=f"layers x P x {wide} B"),
        ),
    )


def _heads(config: LumosConfig) -> dict[str, int]:
    return {
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }


def parts_moment(
    config: LumosConfig,
    layout: FrameLayout,
    rows: int,
    dtype: torch.dtype,
    held: Sequence[Term] = (),
) -> Moment:
    """Attention in two parts: one row's, merged in float32, beside the layer's tensors."""
    size, wide = dtype.itemsize, max(4, dtype.itemsize)
    queries, one = rows * config.hidden_size, layout.tokens * config.hidden_size
    keys = rows * config.num_key_value_heads * config.head_dim
    return Moment(
        name="attention in parts",
        terms=(
            *held,
            Term(name="layer input", bytes=size * queries, how=f"A x D x {size} B"),
            Term(name="normed input", bytes=size * queries, how=f"A x D x {size} B"),
            Term(name="queries and outputs", bytes=2 * size * queries, how=f"2 x A x D x {size} B"),
            Term(name="keys and values", bytes=2 * size * keys, how=f"2 x A x KV x d x {size} B"),
            Term(
                name="two parts and their merge",
                bytes=(3 * size + 3 * wide) * one,
                how=f"3 x P x D x ({size} + {wide}) B",
            ),
        ),
    )


def keep_moment(layer_bytes: int, tail_slots: int, held: Sequence[Term] = ()) -> Moment:
    """Packing: one layer's kept keys or values beside themselves, and their slots."""
    return Moment(
        name="packing",
        terms=(
            *held,
            Term(name="kept tail", bytes=layer_bytes, how="one layer's keys or values, one branch"),
            Term(name="slots", bytes=8 * tail_slots, how="8 B a kept token"),
        ),
    )


def reserve_moment(layer_bytes: int, held: Sequence[Term] = ()) -> Moment:
    """Growth: layers are carried over one at a time, so one old buffer lives beside the new."""
    return Moment(
        name="growth",
        terms=(
            *held,
            Term(
                name="old buffer", bytes=layer_bytes, how="one layer's keys or values, one branch"
            ),
        ),
    )
