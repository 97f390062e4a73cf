"""A small host for caches that come without a model: attention, rotary, MLP, random weights.

    host = Host()
    out = host(inputs, positions, attend)     # attend(layer, q, k, v) -> [H, n, D]

Frames see all of themselves, the text is causal; a token is rotated by its latent frame on one half
of the pairs and by its place in the frame on the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from packcache.positions import inverse_frequencies, rotate

__all__ = ["Host", "attend_all", "token_positions"]

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Host:
    """Some layers of a transformer; `inputs [n, width]`, `positions [n, 2]` of frame and place."""

    def __init__(
        self, *, layers: int = 2, heads: int = 2, head_dim: int = 16, width: int = 24, seed: int = 0
    ) -> None:
        self.heads, self.head_dim, self.width = heads, head_dim, width
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = [_Block(width, heads * head_dim) for _ in range(layers)]
        self.freq = inverse_frequencies(head_dim // 2, 100.0)

    @torch.inference_mode()
    def __call__(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Outputs `[n, width]`; `attend` is given q, k, v `[H, n, D]`, rotated."""
        angles = (positions[:, :, None] * self.freq).flatten(1)
        cos, sin = angles.cos(), angles.sin()
        for number, block in enumerate(self.blocks):
            q, k, v = (self._heads(part) for part in block.qkv(block.norm1(x)).chunk(3, dim=-1))
            out = attend(number, rotate(q, cos, sin), rotate(k, cos, sin), v)
            x = x + block.out(out.transpose(0, 1).flatten(1))
            x = x + block.mlp(block.norm2(x))
        return x

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(0, 1)


class _Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * inner)
        self.out = nn.Linear(inner, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        nn.init.normal_(self.qkv.weight, std=0.4)  # attention that is not flat, so errors show


def attend_all(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of q `[H, n, D]` over all of k, v `[H, S, D]`."""
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def token_positions(text: int, frames: range, tokens: int) -> Tensor:
    """`[n, 2]` of latent frames, or of the text itself if there are none."""
    if not frames:
        return torch.stack((torch.zeros(text), torch.arange(text)), dim=1)
    t = text + torch.tensor(list(frames)).repeat_interleave(tokens)
    place = torch.arange(tokens).repeat(len(frames))
    return torch.stack((t, place), dim=1).float()
