"""Upstream's way of running Lumos-1, in bytes: what its loop keeps alive, and the paper's figures.

Sums over the statements of upstream's loop (lumos1-spec 5.8, methods 1.10): a dense mask in three
dtypes, float32 keys, every layer's cache copied at every step, heads repeated, float32 logits of
all rows and all ids that outlive the step they were made in. Nothing here was measured.
Not counted: the codec, the random VQ model that upstream creates, CUDA context, workspaces.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from packcache.lumos.config import SIZES, LumosConfig
from packcache.lumos.cost import attention_share
from packcache.lumos.course import TEXT_TOKENS
from packcache.lumos.memory import Moment, Phase, Term
from packcache.lumos.units import show_bytes
from packcache.lumos.vocab import HEADER, Vocab, latent_frames
from packcache.lumos.weights import parameter_count
from packcache.timeline import FrameLayout

__all__ = ["PaperRow", "Stock", "paper_figures"]

#: What the paper says of Lumos-1 3B at 672x384, image-to-video (methods 1.2, 1.9, 1.11).
PAPER_FULL, PAPER_PACKED = int(42.66 * 2**30), 38 << 30
PAPER_SHARE = (0.71, 0.76)
PAPER_SIZE = (672, 384)

#: Memory of the paper's cards, in bytes as their names say them.
A40, H200 = 48 << 30, 141 * 10**9

#: A figure of memory within this share of the paper's is taken to reproduce it.
TOLERANCE = 0.10


@dataclass(frozen=True, kw_only=True)
class Stock:
    """Upstream's engine on one clip; guidance is always on, one prompt, `given` latent frames."""

    config: LumosConfig
    layout: FrameLayout
    latents: int
    dtype: torch.dtype = torch.bfloat16
    text_tokens: int = TEXT_TOKENS
    given: int = 1

    @property
    def token_bytes(self) -> int:
        """K in float32, V in the model's dtype, one token of one branch, all layers."""
        return self.config.num_hidden_layers * self._layer_bytes(self.config.num_key_value_heads)

    def lengths(self, frames: int) -> tuple[int, int]:
        """Tokens of the conditional and of the unconditional sequence with that many frames."""
        return (
            self.text_tokens + frames * self.layout.tokens,
            HEADER + frames * self.layout.tokens,
        )

    def kv_bytes(self, frames: int) -> int:
        """Both branches' K and V of that many latent frames."""
        return sum(self.lengths(frames)) * self.token_bytes

    def attention_shares(self) -> list[float]:
        """Attention's share of the layers' work in each latent frame, conditional branch."""
        return [
            attention_share(self.config, self.layout, self.lengths(frame)[0])
            for frame in range(self.latents)
        ]

    def phases(self) -> list[Phase]:
        """Where upstream's loop may peak: its first pass, and three places of its last frame."""
        last = self.latents
        first = min(self.given + 1, last)
        phase = [
            Phase(cache_bytes=self.kv_bytes(first), moment=self._sampling(first, first_pass=True)),
            Phase(cache_bytes=self.kv_bytes(last - 1), moment=self._mask(last)),
            Phase(cache_bytes=self.kv_bytes(last), moment=self._attention(last)),
            Phase(cache_bytes=self.kv_bytes(last), moment=self._sampling(last)),
        ]
        return phase if last > self.given + 1 else [phase[0]]

    def _layer_bytes(self, heads: int) -> int:
        return heads * self.config.head_dim * (4 + self.dtype.itemsize)

    def _logits(self, rows: int) -> int:
        """float32 logits of that many rows over all ids."""
        return 4 * rows * self.config.vocab_size

    def _mask(self, frames: int) -> Moment:
        """The mask is made anew for each frame, beside the one before and all its logits."""
        tokens, before = self.lengths(frames)[0], self.lengths(frames - 1)[0]
        frame, content = self.layout.tokens, self.layout.content
        return Moment(
            name="mask of the last latent frame",
            terms=(
                Term(name="mask, bool", bytes=tokens**2, how="N x N x 1 B"),
                Term(name="mask, int64", bytes=8 * tokens**2, how="N x N x 8 B"),
                Term(name="mask, float32", bytes=4 * tokens**2, how="N x N x 4 B"),
                Term(name="mask of the frame before", bytes=4 * before**2, how="(N - P)^2 x 4 B"),
                Term(
                    name="logits of the commits",
                    bytes=2 * self._logits(frame),
                    how="2 branches x P x V x 4 B",
                ),
                Term(
                    name="logits of the last step",
                    bytes=2 * self._logits(frame),
                    how="2 branches x P x V x 4 B",
                ),
                self._outlived(content),
            ),
        )

    def _outlived(self, content: int) -> Term:
        return Term(
            name="guided logits and shares of the step before",
            bytes=2 * self._logits(content),
            how="2 x content x V x 4 B",
        )

    def _attention(self, frames: int) -> Moment:
        """One layer's attention in a late step, the conditional branch."""
        tokens, frame = self.lengths(frames)[0], self.layout.tokens
        config = self.config
        heads = tokens * config.num_attention_heads * config.head_dim
        return Moment(
            name="attention of the last latent frame",
            terms=(
                Term(name="mask, float32", bytes=4 * tokens**2, how="N x N x 4 B"),
                Term(name="mask rows, low precision", bytes=2 * frame * tokens, how="P x N x 2 B"),
                Term(
                    name="cache concatenated anew",
                    bytes=tokens * self._layer_bytes(config.num_key_value_heads),
                    how="one layer's keys (float32) and values, copied at every step",
                ),
                Term(
                    name="heads repeated",
                    bytes=tokens * self._layer_bytes(config.num_attention_heads),
                    how="keys (float32) and values for every query head",
                ),
                Term(name="keys, low precision", bytes=2 * heads, how="N x H x d x 2 B"),
                Term(
                    name="logits of the step before",
                    bytes=2 * self._logits(frame),
                    how="2 branches x P x V x 4 B",
                ),
                self._outlived(self.layout.content),
            ),
        )

    def _sampling(self, frames: int, *, first_pass: bool = False) -> Moment:
        """Guidance in a step: both branches' logits, their content rows, the difference."""
        content = self.layout.content
        rows = sum(self.lengths(frames)) if first_pass else 2 * self.layout.tokens
        terms = [
            Term(
                name="mask, float32",
                bytes=4 * self.lengths(frames)[0] ** 2 * (3 if first_pass else 1),
                how="N x N x 4 B" + (", and a copy a branch" if first_pass else ""),
            ),
            Term(
                name="logits of both branches",
                bytes=self._logits(rows),
                how="all rows x V x 4 B" + (", prefix included" if first_pass else ""),
            ),
            Term(
                name="content rows and their difference",
                bytes=3 * self._logits(content),
                how="3 x content x V x 4 B",
            ),
        ]
        if not first_pass:
            terms.append(self._outlived(content))
        name = "guidance of the first pass" if first_pass else "guidance of the last latent frame"
        return Moment(name=name, terms=tuple(terms))


# --- against the paper --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One claim of the paper beside our sums; `verdict` follows from the numbers."""

    claim: str
    paper: str
    ours: str
    reproduced: bool

    @property
    def verdict(self) -> str:
        return "reproduced" if self.reproduced else "disputed"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def paper_figures(
    config: LumosConfig = SIZES["3b"],
    *,
    text_tokens: int = TEXT_TOKENS,
    dtype: torch.dtype = torch.bfloat16,
) -> list[PaperRow]:
    """The paper's figures of memory and attention beside sums over upstream's loop.

    Image-to-video at 672x384. A figure of memory is reproduced within 10 %; a card runs out if the
    sum exceeds its memory; a range of shares is reproduced if the clip passes through all of it.
    """
    layout = Vocab(config).layout(*PAPER_SIZE)
    short, long = (
        Stock(
            config=config,
            layout=layout,
            latents=latent_frames(frames, config.compression[0]),
            dtype=dtype,
            text_tokens=text_tokens,
        )
        for frames in (24, 48)
    )
    weights = parameter_count(config) * dtype.itemsize
    full, double = (
        weights + max(phase.bytes for phase in stock.phases()) for stock in (short, long)
    )
    # one history frame beside the image: the reading that the paper's speeds fit (methods 1.8)
    packed = full - (short.kv_bytes(short.latents - 1) - short.kv_bytes(2))
    return [
        _near("full cache, 24 frames: peak memory", PAPER_FULL, full),
        _near("packed, 24 frames: peak memory", PAPER_PACKED, packed),
        _near("24 frames: what packing saves", PAPER_FULL - PAPER_PACKED, full - packed),
        _beyond("full cache, 48 frames: an A40 runs out of memory", A40, double),
        _beyond("full cache, 48 frames: an H200 runs out of memory", H200, double),
        _passes("24 frames: attention's share of a layer's work", short),
        _passes("48 frames: attention's share of a layer's work", long),
    ]


def _near(claim: str, paper: int, ours: int) -> PaperRow:
    close = abs(ours / paper - 1) <= TOLERANCE
    return PaperRow(claim=claim, paper=show_bytes(paper), ours=show_bytes(ours), reproduced=close)


def _beyond(claim: str, card: int, ours: int) -> PaperRow:
    return PaperRow(
        claim=claim,
        paper=f"> {show_bytes(card)}",
        ours=show_bytes(ours),
        reproduced=ours > card,
    )


def _passes(claim: str, stock: Stock) -> PaperRow:
    """Do the shares of the generated frames span the paper's range?"""
    shares = stock.attention_shares()[stock.given :]
    low, high = PAPER_SHARE
    return PaperRow(
        claim=claim,
        paper=f"{low:.0%} to {high:.0%}",
        ours=f"{min(shares):.0%} to {max(shares):.0%}, by operations",
        reproduced=min(shares) <= low and high <= max(shares),
    )
