"""A small causal video model with Wan's rotary embedding and Self-Forcing's cache protocol.

Random weights, a few layers: a host for checks of `adapters.self_forcing`. What a pipeline of that
kind does with its list of dicts, its window and its sinks, this model does too; `deferred` in the
way of LongLive 1.x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CausalWan", "dict_cache", "rotary_table"]


def rotary_table(positions: int, head_dim: int) -> Tensor:
    """Complex `[positions, D/2]`: a third of the pairs an axis, time those that are left over."""
    pairs = head_dim // 2
    parts = []
    for own in (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3):
        freq = 1.0 / 10000 ** (torch.arange(own, dtype=torch.float64) / own)
        angles = torch.outer(torch.arange(positions, dtype=torch.float64), freq)
        parts.append(torch.polar(torch.ones_like(angles), angles))
    return torch.cat(parts, dim=1)


def dict_cache(model: CausalWan, slots: int, batch: int = 1) -> list[dict[str, Tensor]]:
    """A cache as these pipelines make it: a buffer of a fixed size and two counters a layer."""
    size = batch, slots, model.heads, model.head_dim
    return [
        {
            "k": torch.zeros(size, dtype=block.out.weight.dtype),
            "v": torch.zeros(size, dtype=block.out.weight.dtype),
            "global_end_index": torch.zeros(1, dtype=torch.long),
            "local_end_index": torch.zeros(1, dtype=torch.long),
        }
        for block in model.blocks
    ]


class CausalWan:
    """`layers` blocks; `grid` tokens a latent frame; the window and the sinks in latent frames.

    `deferred`: each layer writes to a copy of its buffer and reads sinks and window apart; buffers
    are written when all layers are through. Frames that are encoded again leave sinks as they are.
    `hidden` is the width between the two layers of an MLP [as outside].
    """

    def __init__(
        self,
        *,
        layers: int = 2,
        heads: int = 2,
        head_dim: int = 24,
        grid: tuple[int, int] = (2, 3),
        local_attn_size: int = -1,
        sink_size: int = 0,
        deferred: bool = False,
        hidden: int | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.heads, self.head_dim, self.grid = heads, head_dim, grid
        self.width = heads * head_dim
        self.local_attn_size, self.sink_size = local_attn_size, sink_size
        self.deferred, self._later = deferred, list[Callable[[], None]]()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            blocks = [_Block(self.width, hidden or self.width) for _ in range(layers)]
        self.blocks = [block.to(dtype) for block in blocks]
        self.freqs = rotary_table(1024, head_dim)

    @torch.inference_mode()
    def __call__(
        self,
        x: Tensor,
        *,
        timestep: float = 0.0,
        kv_cache: Sequence[dict[str, Any]] | None = None,
        current_start: int = 0,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Outputs of whole latent frames `x [B, n, width]`; without a cache under `bias`."""
        x = x + timestep
        for layer, block in enumerate(self.blocks):
            q, k, v = (
                part.unflatten(-1, (self.heads, self.head_dim))
                for part in block.qkv(block.norm1(x)).chunk(3, dim=-1)
            )
            q, k = self.rotate(q, current_start), self.rotate(k, current_start)
            if kv_cache is not None:
                through = self._through_copy if self.deferred else self._through
                k, v = through(kv_cache[layer], k, v, current_start)
            heads = (part.transpose(1, 2) for part in (q, k, v))
            out = nn.functional.scaled_dot_product_attention(*heads, attn_mask=bias)
            x = x + block.out(out.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        for write in self._later:
            write()
        self._later.clear()
        return x

    def rotate(self, x: Tensor, start: int) -> Tensor:
        """`[B, n, H, D]` turned by frame, row and column, from token `start` of the video on."""
        rows, cols = self.grid
        size, pairs = rows * cols, self.head_dim // 2
        frames = torch.arange(start // size, start // size + x.shape[1] // size)
        time, height, width = self.freqs.split([pairs - 2 * (pairs // 3)] + [pairs // 3] * 2, dim=1)
        shape = len(frames), rows, cols, -1
        table = torch.cat(
            (
                time[frames][:, None, None].expand(shape),
                height[:rows][None, :, None].expand(shape),
                width[:cols][None, None, :].expand(shape),
            ),
            dim=-1,
        ).reshape(x.shape[1], 1, pairs)
        turned = torch.view_as_complex(x.double().unflatten(-1, (pairs, 2))) * table
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)

    def _through(
        self, cache: dict[str, Any], k: Tensor, v: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """Write a chunk into one layer's dict, and what is then to attend to."""
        new, end = k.shape[1], start + k.shape[1]
        local, known = int(cache["local_end_index"]), int(cache["global_end_index"])
        over = local + new - cache["k"].shape[1]
        if self.local_attn_size != -1 and end > known and over > 0:
            sink = self.sink_size * self.grid[0] * self.grid[1]
            for name in ("k", "v"):
                moved = cache[name][:, sink + over : local].clone()
                cache[name][:, sink : sink + moved.shape[1]] = moved
            local -= over
        local += end - known
        cache["k"][:, local - new : local] = k
        cache["v"][:, local - new : local] = v
        cache["global_end_index"].fill_(end)
        cache["local_end_index"].fill_(local)
        return cache["k"][:, :local], cache["v"][:, :local]

    def _through_copy(
        self, cache: dict[str, Any], k: Tensor, v: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """As `_through`, on a copy; the buffers and counters follow after the last layer."""
        size, new, end = self.grid[0] * self.grid[1], k.shape[1], start + k.shape[1]
        local, known = int(cache["local_end_index"]), int(cache["global_end_index"])
        slots, sink = cache["k"].shape[1], self.sink_size * size
        grows = self.local_attn_size != -1 and end > known
        over = max(0, local + new - slots) if grows else 0
        last = local - over + end - known
        first = last - new
        again = end <= known and start > 0
        left = max(0, sink - first) if again else 0

        def write(buffers: dict[str, Any]) -> None:
            for name, own in (("k", k), ("v", v)):
                if over:
                    moved = buffers[name][:, sink + over : local].clone()
                    buffers[name][:, sink : sink + moved.shape[1]] = moved
                buffers[name][:, first + left : last] = own[:, left:]

        def later() -> None:
            write(cache)
            if not again:
                cache["global_end_index"].fill_(end)
                cache["local_end_index"].fill_(last)

        copies = {name: cache[name].clone() for name in ("k", "v")}
        write(copies)
        self._later.append(later)
        window = slots if self.local_attn_size == -1 else self.local_attn_size * size
        begin = max(sink, last - (window - sink))
        parts = [(0, sink), (begin, last)] if sink else [(begin, last)]
        keys, values = (
            torch.cat([copies[name][:, a:b] for a, b in parts], dim=1) for name in ("k", "v")
        )
        return keys, values


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        nn.init.normal_(self.qkv.weight, std=0.3)  # attention that is not flat, so errors show
