"""Emu3 and Chameleon, tiny and random, as subjects of the conformance kit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3ForCausalLM,
    Emu3TextConfig,
    PreTrainedModel,
)

from packcache.adapters.transformers import PackedCache, make_cache
from packcache.policies import FullCache, Policy
from packcache.testing.subject import Run, Subject
from packcache.timeline import FrameLayout

__all__ = ["TransformersSubject", "tiny_chameleon", "tiny_emu3"]

#: Ids enough for every token of a clip to have one of its own: the kit tells tokens by them.
VOCAB, _SEEDS = 4096, 1300

_TINY: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "initializer_range": 0.25, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny_emu3() -> PreTrainedModel:
    """Grouped heads, a 1-D rotary index."""
    return _random(lambda: Emu3ForCausalLM(Emu3TextConfig(**_TINY)))


def tiny_chameleon() -> PreTrainedModel:
    """As Emu3, with norms of queries and keys."""
    vocabulary = {"<image>": 8} | {f"IMGIMG{chr(65 + i)}Z": 10 + i for i in range(8)}
    vq = {
        "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "embed_dim": 8,
        "num_embeddings": 8, "latent_channels": 8, "resolution": 16, "attn_resolutions": [],
    }  # fmt: skip
    config = ChameleonConfig(**_TINY, vq_config=vq, vocabulary_map=vocabulary)
    return _random(lambda: ChameleonForConditionalGeneration(config))


def _random(make: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


class TransformersSubject(Subject):
    """A text, then latent frames, each forwarded whole; causal inside, as these models are."""

    layout = FrameLayout(rows=2, cols=3, header=0, footer=0, new_line=False)
    text = (5, 2)

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.name, self.model = name, model

    def inputs(self, piece: int, seed: int) -> tuple[int, int]:
        return piece, seed

    def ids(self, inputs: tuple[int, int], branch: int) -> Tensor:
        piece, seed = inputs
        count, first = self.layout.tokens if piece else self.text[branch], 20 + _SEEDS * seed
        start = first + max(self.text) + piece * self.layout.tokens
        return torch.arange(start, start + count)[None]

    def inside(self, tokens: int, is_text: bool) -> Tensor:
        return torch.ones(tokens, tokens, dtype=torch.bool).tril()

    def begin(self, policy: Policy) -> TransformersRun:
        return TransformersRun(self, policy)

    def whole(self, pieces: Sequence[Any], bias: Tensor, branch: int = 0) -> Tensor:
        ids = torch.cat([self.ids(inputs, branch) for inputs in pieces], dim=1)
        seen = self.run(ids, attention_mask=bias[None, None], use_cache=False)
        return seen[0]

    def run(self, ids: Tensor, **settings: Any) -> Tensor:
        """Hidden states `[1, n, hidden]`: logits of what is never drawn would hide all others."""
        return self.model.model(ids, **settings).last_hidden_state  # type: ignore[operator]

    def off(self) -> tuple[Tensor, Tensor]:
        """Before and after a cache was made for the model and not given to it."""
        ids = self.ids((1, 0), 0)
        stock = self.run(ids)
        cache = make_cache(self.model, FullCache(), self.layout)
        ours = self.run(ids)
        cache.reset()  # until here it was there
        return stock, ours


class TransformersRun(Run):
    """A cache a branch, given as `past_key_values`."""

    def __init__(self, subject: TransformersSubject, policy: Policy) -> None:
        self.subject = subject
        self.caches: list[PackedCache] = [
            make_cache(subject.model, policy, subject.layout, staged=True) for _ in subject.text
        ]

    def forward(self, inputs: Any, branch: int = 0) -> Tensor:
        ids = self.subject.ids(inputs, branch)
        return self.subject.run(ids, past_key_values=self.caches[branch])[0]

    def commit(self) -> None:
        for cache in self.caches:
            cache.commit()

    def kv(self, branch: int = 0) -> list[tuple[Tensor, Tensor]]:
        cache = self.caches[branch]
        return list(cache.held.stores[0]) if cache.physical_length else []

    @property
    def logical_length(self) -> int:
        return self.caches[0].get_seq_length()

    @property
    def physical_length(self) -> int:
        return self.caches[0].physical_length

    def state(self) -> list[PackedCache]:
        return self.caches
