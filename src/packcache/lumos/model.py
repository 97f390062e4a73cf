"""The Lumos-1 network in one file (lumos1-spec 1 and 2).

A decoder-only transformer: RMSNorm, QK-norm, MM-RoPE, grouped-query attention, SwiGLU. It knows
nothing of caches: attention over whatever is to be seen is a function it is given, called once a
layer with this forward's queries, keys and values. Axes: G branches, L tokens, H heads, D size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packcache import positions
from packcache.lumos.config import LumosConfig

__all__ = ["Attend", "Lumos", "RMSNorm"]

Rotary = tuple[Tensor, Tensor]


class Attend(Protocol):
    """Attention as the network sees it: q `[G, H, L, D]`, k and v `[G, KV, L, D]`, out as q."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor: ...


class RMSNorm(nn.Module):
    """Root-mean-square norm: float32 inside (float64 stays), the weight in the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class HeadNorm(nn.Module):
    """QK-norm: a LayerNorm over the head size; row r of the affine serves the r-th share of heads.

    Statistics and affine in float32, as upstream's autocast has them (lumos1-spec 1.2, 2.4).
    """

    EPS = 1e-5

    def __init__(self, parts: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(parts, head_dim))
        self.bias = nn.Parameter(torch.zeros(parts, head_dim))

    def forward(self, x: Tensor) -> Tensor:  # [G, L, H, D] -> float32 (float64 stays)
        wide = x if x.dtype == torch.float64 else x.float()
        share = x.shape[-2] // self.weight.shape[0]
        weight = self.weight.to(wide.dtype).repeat_interleave(share, dim=0)  # [H, D]
        bias = self.bias.to(wide.dtype).repeat_interleave(share, dim=0)
        return F.layer_norm(wide, wide.shape[-1:], eps=self.EPS) * weight + bias


class Attention(nn.Module):
    def __init__(self, config: LumosConfig) -> None:
        super().__init__()
        dim, head = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(dim, self.heads * head, bias=False)
        self.k_proj = nn.Linear(dim, self.kv_heads * head, bias=False)
        self.v_proj = nn.Linear(dim, self.kv_heads * head, bias=False)
        self.o_proj = nn.Linear(self.heads * head, dim, bias=False)
        self.q_norm = HeadNorm(config.model_parallel_size, head)
        self.k_norm = HeadNorm(config.model_parallel_size, head)

    def forward(self, x: Tensor, rotary: Rotary, layer: int, attend: Attend) -> Tensor:
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, -1)))  # [G, L, H, D]
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.kv_heads, -1)))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)  # [G, KV, L, D]
        cos, sin = rotary
        q = positions.rotate(q.transpose(1, 2), cos, sin).to(v.dtype)  # [G, H, L, D]
        k = positions.rotate(k.transpose(1, 2), cos, sin).to(v.dtype)
        out = attend(layer, q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: LumosConfig) -> None:
        super().__init__()
        dim, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(dim, inner, bias=False)
        self.up_proj = nn.Linear(dim, inner, bias=False)
        self.down_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LumosConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_after = config.swin_norm

    def forward(self, x: Tensor, rotary: Rotary, layer: int, attend: Attend) -> Tensor:
        if self.norm_after:  # lumos1-spec 1.3
            x = x + self.input_layernorm(self.self_attn(x, rotary, layer, attend))
            return x + self.post_attention_layernorm(self.mlp(x))
        x = x + self.self_attn(self.input_layernorm(x), rotary, layer, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Everything but the head; the name matches the checkpoint's `model.` prefix."""

    def __init__(self, config: LumosConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Lumos(nn.Module):
    """The network. Parameter names are upstream's state-dict keys (lumos1-spec 1.6)."""

    inv_freq: Tensor
    axes: Tensor

    def __init__(self, config: LumosConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        frequencies = positions.inverse_frequencies(config.head_dim, config.rope_theta)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("axes", positions.pair_axes(config.head_dim).clone(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Lumos:
        """As `nn.Module`; narrow dtypes leave the frequencies in float32 (lumos1-spec 2.4)."""
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype.itemsize < torch.float32.itemsize:
            self.inv_freq = exact.float().to(self.inv_freq.device)
        return self

    def forward(self, ids: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """Hidden states `[G, L, hidden]` of token ids `[G, L]`, after the last norm.

        `rotary` is cos and sin, `[L, D/2]` for all branches or `[G, 1, L, D/2]` for each its own.
        """
        x = self.model.embed_tokens(ids)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, rotary, index, attend)
        return self.model.norm(x)

    def rotary(self, position_ids: Tensor) -> Rotary:
        """cos and sin `[L, D/2]` for position ids `[5, L]`, rounded once to the weights' dtype."""
        dtype = self.lm_head.weight.dtype
        cos, sin = positions.rotary_table(position_ids, self.inv_freq, self.axes)
        return cos.to(dtype), sin.to(dtype)

    def head(self, hidden: Tensor, low: int | None = None, high: int | None = None) -> Tensor:
        """Logits of ids `low..high-1` (default all) for hidden states `[..., hidden]`, as these."""
        return F.linear(hidden, self.lm_head.weight[low:high])
