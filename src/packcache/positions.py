"""WHERE survivors say they are: position ids, rotary angles, and the rebase of the anchors.

Position ids are integers `[5, L]` with the rows `text, t, h, w, flag`: a token whose flag is 1 is
rotated by its (t, h, w), any other token by its 1-D index (lumos1-spec 2.1). Which rotary pair
listens to which axis is a table, so that other models can bring their own.

What this module does not do: decide which tokens stay (policies) or hold them (store).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from packcache.timeline import FrameLayout

PositionMode = Literal["absolute", "rebase"]
RebaseRule = Literal["trained", "slide"]

#: Rotary pair m of a group of 16 listens to axis t (0), h (1) or w (2): 2/8, 3/8, 3/8 of the pairs.
MM_ROPE_AXES = (0, 0, 0, 0, 1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2)

#: From this index on a float32 product position x frequency is too coarse (error above 0.03 rad).
FLOAT64_FROM = 1 << 20

TEXT, T, H, W, FLAG = range(5)


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """`1 / theta^(2m/D)` for m = 0..D/2-1, float32 `[D/2]` (lumos1-spec 2.1)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / (theta**exponents)


@functools.lru_cache(maxsize=32)
def pair_axes(head_dim: int, table: tuple[int, ...] = MM_ROPE_AXES) -> Tensor:
    """Axis (0 t, 1 h, 2 w) of each rotary pair, int64 `[D/2]`: the table, repeated."""
    pairs = head_dim // 2
    if head_dim % 2 or pairs % len(table):
        raise ValueError(
            f"head size {head_dim} does not hold whole groups of {len(table)} rotary pairs: "
            f"expected a multiple of {2 * len(table)}"
        )
    # cached, so whatever default device a caller has set must not decide
    return torch.tensor(table, device="cpu").repeat(pairs // len(table))


def temporal_pairs(head_dim: int, table: tuple[int, ...] = MM_ROPE_AXES) -> Tensor:
    """Indices of the pairs that carry time, int64 `[D/8]` for MM-RoPE."""
    return (pair_axes(head_dim, table) == 0).nonzero().squeeze(1)


def needs_float64(position_ids: Tensor) -> bool:
    """Do these ids `[5, L]` reach so far that float32 angles are too coarse?"""
    return int(position_ids[:FLAG].abs().max()) >= FLOAT64_FROM


def rotary_angles(position_ids: Tensor, inv_freq: Tensor, axes: Tensor) -> Tensor:
    """Angles `[L, D/2]` of position ids `[5, L]`: float32 products, float64 beyond `FLOAT64_FROM`.

    The order float32(position) * float32(frequency) is upstream's and is kept to the bit. Give the
    ids on the host: how far they reach decides the precision, and a device would have to be asked.
    """
    wide = inv_freq.dtype == torch.float64 or needs_float64(position_ids)
    position_ids = position_ids.to(inv_freq.device)
    spatial = position_ids[1 + axes].T  # [L, D/2]: each pair looks up its own axis
    index = position_ids[TEXT].unsqueeze(1)  # [L, 1]
    positions = torch.where(position_ids[FLAG].bool().unsqueeze(1), spatial, index)
    dtype = torch.float64 if wide else torch.float32
    return positions.to(dtype) * inv_freq.to(dtype)


def rotary_table(position_ids: Tensor, inv_freq: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin `[L, D/2]` in the dtype of `inv_freq`."""
    angles = rotary_angles(position_ids, inv_freq, axes)
    return angles.cos().to(inv_freq.dtype), angles.sin().to(inv_freq.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (m, m + D/2) of `x [..., L, D]` by cos and sin `[..., L, D/2]`."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """What a rebase must know of a model's rotary embedding.

    `pairs [n]` are the indices of the rotary pairs that carry time, `freq [n]` their inverse
    frequencies, `stride` the position units per latent frame. Pair m is channels m and m + D/2, or
    2m and 2m + 1 where they are `interleaved` (Wan).
    """

    pairs: Tensor
    freq: Tensor
    stride: int = 4
    interleaved: bool = False

    def channels(self, head_dim: int) -> Tensor:
        """Where time lies in a head, int64 `[2n]`: the first of each pair, then the second."""
        if self.interleaved:
            return torch.cat((2 * self.pairs, 2 * self.pairs + 1))
        return torch.cat((self.pairs, self.pairs + head_dim // 2))

    @classmethod
    def mm_rope(cls, inv_freq: Tensor, stride: int = 4) -> Rotation:
        """Lumos-1: a quarter of the pairs, those with m mod 16 in 0..3 (lumos1-spec 2.1, 2.3)."""
        pairs = temporal_pairs(2 * len(inv_freq)).to(inv_freq.device)
        return cls(pairs=pairs, freq=inv_freq[pairs], stride=stride)


def advance_keys(keys: Tensor, frames: int, rotation: Rotation) -> Tensor:
    """Keys `[..., D]` turned by `frames` latent frames on the temporal pairs only."""
    out = keys.clone()
    turned = _turn(_temporal(keys, rotation), frames, rotation)
    out[..., rotation.channels(keys.shape[-1])] = turned
    return out


class AnchorKeys:
    """The anchors' keys of one branch, kept as committed on the channels that carry time.

    A rebase turns the anchors forward instead of the window back, always from this copy, so that
    rounding does not add up (methods 3.5, P2). Costs a quarter of the anchors' keys. On the device
    "meta" only sizes are kept, for plans.
    """

    def __init__(self, rotation: Rotation) -> None:
        self.rotation = rotation
        self._layers: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._layers)

    def remember(self, keys: list[Tensor]) -> None:
        """Take anchors that are new: keys `[H, A, D]` of each layer, earlier ones at the front."""
        if not self._layers:
            channels = 2 * len(self.rotation.pairs)
            self._layers = [k.new_empty(k.shape[0], 0, channels) for k in keys]
        known = self._layers[0].shape[1]
        if keys[0].shape[1] > known:
            self._layers = [
                self._with_new(old, k[:, known:]) for old, k in zip(self._layers, keys, strict=True)
            ]

    def select_heads(self, heads: Tensor) -> None:
        """Keep these heads, in this order."""
        self._layers = [layer.index_select(0, heads.to(layer.device)) for layer in self._layers]

    def forget(self, count: int) -> None:
        """Keep the first `count` anchors only."""
        self._layers = [layer[:, :count] for layer in self._layers]

    def advance(self, keys: list[Tensor], frames: int) -> None:
        """Write the anchors, advanced by `frames` latent frames, to the front of `[H, S, D]`."""
        if keys[0].is_meta:
            return
        channels = self.rotation.channels(keys[0].shape[-1])
        for pristine, target in zip(self._layers, keys, strict=True):
            target[:, : pristine.shape[1], channels] = _turn(pristine, frames, self.rotation)

    def _with_new(self, old: Tensor, new: Tensor) -> Tensor:
        if new.is_meta:  # indexing there imports sympy, 1 s and 70 MB, for numbers nobody reads
            return old.new_empty(len(old), old.shape[1] + new.shape[1], old.shape[2])
        return torch.cat((old, _temporal(new, self.rotation)), dim=1)


def _temporal(keys: Tensor, rotation: Rotation) -> Tensor:
    """Copy of the temporal channels `[..., 2n]`: first halves of the pairs, then second halves."""
    return keys[..., rotation.channels(keys.shape[-1])]


def _turn(temporal: Tensor, frames: int, rotation: Rotation) -> Tensor:
    """Rotate temporal channels `[..., 2n]`; angles in float64, products in float32 or wider."""
    angle = rotation.freq.double() * (frames * rotation.stride)
    work = torch.promote_types(temporal.dtype, torch.float32)
    cos, sin = angle.cos().to(work), angle.sin().to(work)
    return rotate(temporal.to(work), cos, sin).to(temporal.dtype)


def rebase_delta(
    *,
    frame: int,
    oldest_distance: int,
    sinks: int,
    trained_latent_frames: int | None,
    rule: RebaseRule = "trained",
    image_frames: int = 1,
) -> int:
    """How many latent frames the anchors are advanced when latent frame `frame` opens.

    `frame` counts given frames, `oldest_distance` is D of the oldest non-sink history frame that
    still holds a token (0 with none), `sinks` the sink frames held, `image_frames` is 0 without a
    condition image. `trained` moves only as far as the trained range demands (DESIGN 4.5);
    `slide` closes every gap: one latent frame at each slide (the paper, methods 1.7).
    Zero as long as nothing was evicted.
    """
    if rule == "slide":
        return max(0, frame - (oldest_distance + sinks + image_frames))
    if trained_latent_frames is None:
        return 0
    return max(0, frame - max(trained_latent_frames - 1, oldest_distance + sinks + 1))


def text_positions(start: int, length: int) -> Tensor:
    """Position ids int64 `[5, length]` of tokens with a 1-D index from `start` (text, header)."""
    index = torch.arange(start, start + length)
    return torch.stack((index, index, index, index, torch.zeros_like(index)))


def frame_positions(
    start: int,
    frame: int,
    layout: FrameLayout,
    *,
    origin: int,
    time_stride: int,
    space_strides: tuple[int, int],
) -> Tensor:
    """Position ids int64 `[5, P]` of one latent frame whose first token has index `start`.

    `origin` is O, the index of the first content token of the first frame; content and new-line
    tokens sit at `(O + time_stride*f, O + sh*i, O + sw*j)`, border tokens keep their 1-D index
    (lumos1-spec 2.2).
    """
    ids = text_positions(start, layout.tokens)
    y, x = (torch.from_numpy(a).long() for a in layout.cells())
    inside = y >= 0
    ids[T, inside] = origin + time_stride * frame
    ids[H, inside] = origin + space_strides[0] * y[inside]
    ids[W, inside] = origin + space_strides[1] * x[inside]
    ids[FLAG, inside] = 1
    return ids
