"""diffusers' AnyFlow on its cached path, asked by the kit: zero keys that nothing masks.

`AnyFlowCausalAttnProcessor` pads queries, and keys and values with them, to a multiple of 128
tokens. Reading from its cache there is no mask, so zero keys take their share of every softmax. The
class is the released one (diffusers 0.42.1); written down in docs/conformance.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_anyflow_far import AnyFlowAttention, apply_rotary_emb
from torch import Tensor

from packcache.policies import Policy
from packcache.testing.causal_wan import rotary_table
from packcache.testing.conformance import check
from packcache.testing.subject import Run, Subject
from packcache.timeline import FrameLayout

HEADS, SIZE, LAYERS = 2, 24, 2
WIDTH = HEADS * SIZE


class AnyFlowSubject(Subject):
    """Layers of the released attention class; one latent frame a chunk, everything kept."""

    bounded = False

    def __init__(self, tokens: int) -> None:
        self.name = f"anyflow, {tokens} tokens a frame"
        self.layout = FrameLayout(rows=1, cols=tokens, header=0, footer=0, new_line=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = [AnyFlowAttention(WIDTH, HEADS, SIZE).eval() for _ in range(LAYERS)]
        self.table = rotary_table(4096, SIZE)

    def inputs(self, piece: int, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(1000 * seed + piece)
        return torch.randn(1, self.layout.tokens, WIDTH, generator=draw)

    def begin(self, policy: Policy) -> AnyFlowRun:
        return AnyFlowRun(self)

    def whole(self, pieces: Sequence[Tensor], bias: Tensor, branch: int = 0) -> Tensor:
        """The same modules and the same rotary embedding around plain attention."""
        x = torch.cat(list(pieces), dim=1)
        for attn in self.layers:
            parts = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
            q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
            q, k = (apply_rotary_emb(part, self.table[: x.shape[1]]) for part in (q, k))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = x + attn.to_out[0](out.transpose(1, 2).flatten(2))
        return x[0]


class AnyFlowRun(Run):
    """The model's own dicts and flags: one read a forward, keys and values written at a commit."""

    def __init__(self, subject: AnyFlowSubject) -> None:
        self.subject, self.held = subject, 0
        size = 2, 1, HEADS, 16 * subject.layout.tokens, SIZE
        self.caches = [
            {"full_cache": torch.zeros(size), "compressed_cache": torch.zeros(size)}
            for _ in subject.layers
        ]
        self.seen: list[Tensor] = []

    def forward(self, inputs: Tensor, branch: int = 0) -> Tensor:
        table = self.subject.table
        end = self.held + inputs.shape[1]
        flag = {
            "is_cache_step": False, "num_cached_full_tokens": self.held,
            "num_cached_compressed_tokens": 0,
        }  # fmt: skip
        self.seen, x = [], inputs
        for attn, cache in zip(self.subject.layers, self.caches, strict=True):
            self.seen.append(x)
            rotary: Any = {"query": table[self.held : end], "key": table[:end]}
            x = x + attn(x, rotary_emb=rotary, kv_cache=cache, kv_cache_flag=flag)
        return x[0]

    def commit(self) -> None:
        """Its own cache step encodes the whole prefix again; this writes what it would write."""
        end = self.held + self.subject.layout.tokens
        for attn, cache, x in zip(self.subject.layers, self.caches, self.seen, strict=True):
            for place, part in enumerate((attn.norm_k(attn.to_k(x)), attn.to_v(x))):
                rows = part.unflatten(2, (HEADS, -1)).transpose(1, 2)
                cache["full_cache"][place, :, :, self.held : end] = rows
        self.held = end

    def kv(self, branch: int = 0) -> list[tuple[Tensor, Tensor]]:
        both = [cache["full_cache"][:, 0, :, : self.held] for cache in self.caches]
        return [(pair[0], pair[1]) for pair in both]

    @property
    def logical_length(self) -> int:
        return self.held

    @property
    def physical_length(self) -> int:
        return self.held


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("tokens", "least"), [(6, 0.5), (120, 0.01)])
def test_zero_keys_without_a_mask_are_found(tokens, least):
    """122 and 8 of them: outputs are apart by more than `least` of their deviation."""
    report = check(AnyFlowSubject(tokens), only=["unlimited", "draft", "lengths"])
    assert report.failed == ["unlimited"], "\n".join(report.lines())
    (found,) = (f for f in report.findings if f.check == "unlimited")
    apart = re.match(r"apart by (\S+) of the outputs' deviation", found.told)
    assert apart and float(apart[1]) > least


@pytest.mark.filterwarnings("ignore")
def test_where_nothing_is_padded_it_is_right():
    """A frame of 128 tokens needs no padding: the same classes, the same subject, and it passes."""
    report = check(AnyFlowSubject(128), only=["unlimited", "draft", "lengths"])
    assert report.ok, "\n".join(report.lines())
