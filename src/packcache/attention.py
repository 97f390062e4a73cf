"""Attention over plain tensors: one unmasked call, or parts of it that are put together exactly.

Attention over two sets of keys is a mean of the attentions over each, weighted by how much of the
softmax lies there. Whoever knows a part's log-sum-exp can therefore keep it and add the other later
(methods 3.7, E4). Axes: H query heads, KV key heads, L queries, S keys, D head size.

Where the log-sum-exp comes from: on a CPU and on CUDA the fused kernel computes it, for a backward
pass, and returns it. That is `_scaled_dot_product_flash_attention_for_cpu` there and
`_scaled_dot_product_flash_attention` here, or, where that one cannot run (float32, old cards),
`_scaled_dot_product_efficient_attention`. Anywhere else it comes from scores in plain operations,
which hold `H L S` numbers in memory.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "attend_causal", "attend_lse", "attend_lse_plain", "merge"]

#: First compute capability whose cards run the flash kernel.
_FLASH_FROM = (8, 0)


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Unmasked attention of q `[H, L, D]` over `[KV, S, D]`, as q.

    Without a mask the queries of a group of heads can lie behind one another, so that no key is
    repeated.
    """
    out = F.scaled_dot_product_attention(_stacked(q, keys), keys[None], values[None])
    return out.reshape(q.shape)  # some kernels give the groups in another memory layout


def attend_causal(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of q `[H, L, D]` over as many keys `[KV, L, D]`, as q."""
    group = q.shape[0] // keys.shape[0]
    keys, values = (x.repeat_interleave(group, dim=0) for x in (keys, values))
    return F.scaled_dot_product_attention(q[None], keys[None], values[None], is_causal=True)[0]


def attend_lse(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """As `attend`, with each query's log-sum-exp of its scores `[H, L]`, float32 (float64 as q)."""
    parts = _fused(_stacked(q, keys), keys[None], values[None])
    if parts is None:
        return attend_lse_plain(q, keys, values)
    out, lse = parts
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def attend_lse_plain(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """As `attend_lse`, in plain operations: for any device, and to judge the kernels by."""
    stacked = _stacked(q, keys)[0]  # [KV, H/KV * L, D]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = stacked.to(wide) @ keys.to(wide).transpose(-1, -2) / math.sqrt(q.shape[-1])
    lse = scores.logsumexp(dim=-1, keepdim=True)
    out = (scores - lse).exp() @ values.to(wide)
    return out.to(q.dtype).reshape(q.shape), lse.reshape(q.shape[:2])


def merge(one: Tensor, one_lse: Tensor, two: Tensor, two_lse: Tensor) -> Tensor:
    """Attention over the keys of both parts, outputs `[..., D]` with log-sum-exp `[...]` each.

    Exact but for rounding, which happens once: `(e^a o_a + e^b o_b) / (e^a + e^b)` in the dtype of
    the log-sum-exp.
    """
    share = torch.sigmoid(one_lse - two_lse)[..., None]  # e^a / (e^a + e^b)
    return torch.lerp(two.to(share.dtype), one.to(share.dtype), share).to(one.dtype)


def _stacked(q: Tensor, keys: Tensor) -> Tensor:
    """Queries `[1, KV, H/KV * L, D]`: the heads of a group behind one another."""
    return q.reshape(1, keys.shape[0], -1, q.shape[-1])


def _fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp `[1, KV, L]` of the device's fused kernel, if there is one."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return None
    old = torch.cuda.is_available() and torch.cuda.get_device_capability(q.device) < _FLASH_FROM
    if q.dtype != torch.float32 and not old:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return out, lse[..., : q.shape[-2]]  # its rows are rounded up to whole blocks
