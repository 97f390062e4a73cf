"""Pixels to codes and back: what a codec must offer, long clips in pieces, and the quantiser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from packcache.errors import InvalidSetting

__all__ = ["CHUNK", "FSQ", "Codec", "check_overlap", "chunk_differences", "decode_chunks"]

#: Latent frames that are decoded at a time: 32 pixel frames of a codec that makes 4 of each.
CHUNK = 8


class Codec(Protocol):
    """A causal video codec with the interface of the Cosmos tokenizer (lumos1-spec 6).

    The first frame makes the first latent frame, each later group of `t` frames one more.
    `overlap` is the number of latent frames that a later part of a clip decodes again before its
    own, so that its pixels are (nearly) those of decoding all at once.
    """

    overlap: int

    def encode(self, video: Tensor, /) -> tuple[Tensor, Tensor]:
        """`[B, 3, T, H, W]` in [-1, 1] to int32 `[B, t, h, w]` and codes `[B, dims, t, h, w]`."""
        ...

    def decode(self, indices: Tensor, /) -> Tensor:
        """Video `[B, 3, 1 + 4(t-1), 8h, 8w]`, nominal range [-1, 1], of indices `[B, t, h, w]`."""
        ...


def check_overlap(overlap: int) -> int:
    """The overlap, if it is at least 1: the first latent frame decoded makes one frame only."""
    if overlap < 1:
        raise InvalidSetting(
            f"overlap is {overlap} latent frames, expected at least 1: a part that starts with its "
            "own latent frame lacks frames"
        )
    return overlap


def decode_chunks(
    codec: Codec, indices: Tensor, *, chunk: int = CHUNK, overlap: int | None = None
) -> Iterator[Tensor]:
    """The video of `indices [B, t, h, w]` in pieces `[B, 3, T_i, H, W]`, in bounded memory.

    Together they have exactly the frames of `codec.decode(indices)`. Each piece is `chunk` latent
    frames; all but the first are decoded with up to `overlap` latent frames before their own
    (default: the codec's), whose frames are dropped.
    """
    overlap = check_overlap(codec.overlap if overlap is None else overlap)
    if chunk < 1:
        raise InvalidSetting(f"chunk is {chunk} latent frames, expected at least 1")
    # a clip without latent frames is handed on as well: refusing it is the codec's business
    return (
        _piece(codec, indices[:, max(0, start - overlap) : start + chunk], min(overlap, start))
        for start in range(0, max(1, indices.shape[1]), chunk)
    )


def _piece(codec: Codec, indices: Tensor, again: int) -> Tensor:
    """The frames of `indices [B, t, h, w]` without those of the first `again` latent frames."""
    video = codec.decode(indices)
    if not again:
        return video
    group = (video.shape[2] - 1) // (indices.shape[1] - 1)
    return video[:, :, 1 + group * (again - 1) :]


def chunk_differences(
    codec: Codec, indices: Tensor, overlaps: Sequence[int] = (1, 2, 4), *, chunk: int = CHUNK
) -> dict[int, float]:
    """How far `decode_chunks` is from decoding all at once, for each overlap.

    The largest absolute difference of a pixel, in levels of 8 bits before they are rounded.
    `indices [B, t, h, w]` must be more than one chunk, or there is no seam to look at.
    """
    if indices.shape[1] <= chunk:
        raise InvalidSetting(
            f"a clip of {indices.shape[1]} latent frames has no seam at chunk {chunk}: give a "
            "longer clip or a smaller chunk"
        )
    whole = _levels(codec.decode(indices))
    found = {}
    for overlap in overlaps:
        worst, shown = [], 0
        for piece in decode_chunks(codec, indices, chunk=chunk, overlap=overlap):
            same = whole[:, :, shown : shown + piece.shape[2]]
            worst.append((_levels(piece) - same).abs().max())
            shown += piece.shape[2]
        found[overlap] = torch.stack(worst).max().item()  # of tensors: NaN is not lost
    return found


def _levels(video: Tensor) -> Tensor:
    """Pixels in [-1, 1] in levels of 8 bits around the middle one."""
    return video.float().clamp(-1, 1) * 127.5


class FSQ(nn.Module):
    """Finite scalar quantisation with the numbers of the Cosmos tokenizer (lumos1-spec 6).

    A grid of `levels[i]` values in [-1, 1] on each axis; the axis is the last dimension.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        sizes = torch.tensor(list(levels), dtype=torch.int64)
        basis = torch.cat((torch.ones(1, dtype=torch.int64), sizes.cumprod(0)[:-1]))
        self.register_buffer("levels", sizes, persistent=False)
        self.register_buffer("basis", basis, persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """Squash to just within the grid, before rounding."""
        half = (self.levels - 1) * 1.001 / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half)
        return torch.tanh(z + shift) * half - offset

    def quantise(self, z: Tensor) -> Tensor:
        """Codes in [-1, 1] of `z [..., dims]`; gradients pass straight through the rounding."""
        bounded = self.bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self.levels // 2)

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Indices int64 `[...]` of codes `[..., dims]`."""
        half = self.levels // 2
        return ((codes * half).round().long() + half).mul(self.basis).sum(-1)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes `[..., dims]` of indices `[...]`."""
        half = self.levels // 2
        digits = indices.unsqueeze(-1).long() // self.basis % self.levels
        return (digits - half) / half
