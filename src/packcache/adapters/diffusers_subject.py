"""Wan and SkyReels-V2 of diffusers, tiny and random, as subjects of the conformance kit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Transformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from packcache.adapters.diffusers import install
from packcache.policies import FullCache, Policy
from packcache.testing.subject import Run, Subject
from packcache.timeline import FrameLayout

__all__ = ["DiffusersSubject", "tiny_skyreels", "tiny_wan"]

BRANCHES = ("cond", "uncond")

_TINY: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4,
    "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
}  # fmt: skip


def tiny_wan() -> nn.Module:
    return _random(lambda: WanTransformer3DModel(**_TINY))


def tiny_skyreels() -> nn.Module:
    return _random(lambda: SkyReelsV2Transformer3DModel(**_TINY))


def _random(make: Any) -> nn.Module:
    """Weights larger than at the start of a training, so that attention is not flat."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False)
        for block in model.blocks:
            for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
                nn.init.normal_(linear.weight, std=0.3)
        return model


class DiffusersSubject(Subject):
    """Chunks of three latent frames of 2 x 3 tokens, each forwarded with its own noise level."""

    layout = FrameLayout(rows=2, cols=3, header=0, footer=0, new_line=False)
    text = (0, 0)
    chunk = 3

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model
        draw = torch.Generator().manual_seed(99)
        self.prompt = torch.randn(1, 5, 16, generator=draw)

    def inputs(self, piece: int, seed: int) -> tuple[Tensor, int]:
        draw = torch.Generator().manual_seed(1000 * seed + piece)
        return torch.randn(1, 4, self.chunk, 4, 6, generator=draw), 100 * seed

    def run(self, latents: Tensor, timestep: int = 0) -> Tensor:
        """Outputs `[n, channels of a patch]`, a row a token."""
        out = self.model(
            latents, torch.tensor([timestep]), self.prompt, return_dict=False
        )[0]  # fmt: skip
        out = out.unflatten(3, (-1, 2)).unflatten(5, (-1, 2))
        return out.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(0, 3)

    def begin(self, policy: Policy) -> DiffusersRun:
        return DiffusersRun(self, policy)

    def whole(self, pieces: Sequence[Any], bias: Tensor, branch: int = 0) -> Tensor:
        """The host's own processors, given a mask."""
        attentions = [block.attn1 for block in self.model.blocks]
        stock = [attention.processor for attention in attentions]
        try:
            for attention, own in zip(attentions, stock, strict=True):
                attention.processor = _masked(own, bias)
            return self.run(torch.cat([latents for latents, _ in pieces], dim=2))
        finally:
            for attention, own in zip(attentions, stock, strict=True):
                attention.processor = own

    def off(self) -> tuple[Tensor, Tensor]:
        latents, _ = self.inputs(0, 0)
        stock = self.run(latents)
        installed = install(self.model, FullCache())
        ours = self.run(latents)
        installed.uninstall()
        return stock, ours


def _masked(own: Any, bias: Tensor) -> Any:
    def processor(
        attn: Any, x: Tensor, context: Any = None, mask: Any = None, rotary: Any = None
    ) -> Tensor:
        return own(attn, x, context, bias.to(x.dtype), rotary)

    return processor


class DiffusersRun(Run):
    """One clip in a copy of the model: a transformer has one cache at a time."""

    def __init__(self, subject: DiffusersSubject, policy: Policy) -> None:
        self.subject = copy.copy(subject)
        self.subject.model = copy.deepcopy(subject.model)
        self.installed = install(self.subject.model, policy)
        self.pending: dict[int, Any] = {}

    def forward(self, inputs: Any, branch: int = 0) -> Tensor:
        self.pending[branch] = inputs
        return self._run(inputs, branch, commit=False)

    def _run(self, inputs: Any, branch: int, commit: bool) -> Tensor:
        with self.installed.frame(commit=commit, branch=BRANCHES[branch]):
            return self.subject.run(*inputs)

    def commit(self) -> None:
        """The commit is a forward of its own, as in a pipeline."""
        for branch, inputs in self.pending.items():
            self._run(inputs, branch, commit=True)
        self.pending = {}

    def kv(self, branch: int = 0) -> list[tuple[Tensor, Tensor]]:
        cache = self.installed.caches.get(BRANCHES[branch])
        return [] if cache is None else list(cache.stores[0])

    @property
    def logical_length(self) -> int:
        return self.installed.caches["cond"].logical_length

    @property
    def physical_length(self) -> int:
        return self.installed.caches["cond"].physical_length

    def state(self) -> Any:
        return self.installed.caches
