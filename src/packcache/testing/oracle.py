"""Two slow twins of the engine, in float64 and without its shortcuts: what a fast cache must equal.

`masked_forward` has no cache at all: one forward over the whole sequence, under a mask that lets
each frame see what was held when it was computed. It judges absolute positions.
`UnrotatedCache` keeps every key ever committed, not rotated, and turns them anew in each forward,
the window and the open frame shifted back in time. It judges rebase (DESIGN 4.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packcache.lumos.config import LumosConfig
from packcache.lumos.model import Lumos
from packcache.policies import Policy
from packcache.positions import RebaseRule, rotary_angles, rotate, temporal_pairs
from packcache.timeline import FrameLayout, Ints, Role, Span, Timeline

__all__ = [
    "UnrotatedCache",
    "attend_mask",
    "held_tokens",
    "masked_forward",
    "seen_mask",
    "sequence_positions",
    "whole_forward",
]


def sequence_positions(
    config: LumosConfig, prefix: int, frames: int, layout: FrameLayout
) -> Tensor:
    """Position ids int64 `[5, N]` of a prefix and its frames, token by token (lumos1-spec 2.2)."""
    stride_t, stride_h, stride_w = config.compression
    origin = prefix + layout.header
    rows = [[index] * 4 + [0] for index in range(prefix)]
    for frame in range(frames):
        for offset in range(layout.tokens):
            index = prefix + frame * layout.tokens + offset
            i, j = divmod(offset - layout.header, layout.row_length)
            t, h, w = origin + stride_t * frame, origin + stride_h * i, origin + stride_w * j
            inside = 0 <= offset - layout.header < layout.body
            rows.append([index, t, h, w, 1] if inside else [index] * 4 + [0])
    return torch.tensor(rows).T


def held_tokens(timeline: Timeline) -> Ints:
    """Logical indices of the tokens held, ascending."""
    return np.concatenate([entry.start + entry.held for entry in timeline.entries])


def seen_mask(lengths: Sequence[int], held: Sequence[Ints]) -> Tensor:
    """Who saw whom, bool `[N, N]`: span i saw the tokens `held[i]` and itself, the text causally.

    `lengths` are the tokens of each span, the text prefix first; `held` logical indices.
    """
    seen = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    start = 0
    for number, (length, before) in enumerate(zip(lengths, held, strict=True)):
        rows = slice(start, start + length)
        own = torch.ones(length, length, dtype=torch.bool)
        seen[rows, rows] = own if number else own.tril()
        seen[rows, torch.from_numpy(np.asarray(before, dtype=np.int64))] = True
        start += length
    return seen


def attend_mask(ids: Tensor, image_start: int, image_end: int) -> Tensor:
    """Who may see whom in a whole sequence `[N]`: causal, or in the same latent frame (spec 4)."""
    index = torch.arange(len(ids))
    opened = (ids == image_start).long().cumsum(0)
    closed = (ids == image_end).long().cumsum(0)
    inside = opened > closed - (ids == image_end).long()
    frame = torch.where(inside, opened, -index - 1)
    return (index[None] <= index[:, None]) | (frame[:, None] == frame[None])


@torch.inference_mode()
def masked_forward(model: Lumos, ids: Tensor, position_ids: Tensor, seen: Tensor) -> Tensor:
    """Hidden states `[N, hidden]` of ids `[N]` in one forward; `model` in float64."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attention(q[0], k[0], v[0], seen)[None]

    return model(ids[None], model.rotary(position_ids), attend)[0]


def whole_forward(model: Lumos, ids: Tensor, position_ids: Tensor) -> Tensor:
    """Hidden states `[N, hidden]` of a recorded sequence: upstream's mask, no cache."""
    tokens = model.config.token_ids
    mask = attend_mask(ids, tokens.image_start, tokens.image_end)
    return masked_forward(model, ids, position_ids, mask)


class UnrotatedCache:
    """A cache that evicts nothing, rotates nothing in advance and keeps float64.

        twin.open(span); twin.forward(ids, branch), as often as you like; twin.commit(...)

    `model` is in float64, so the engine to compare with should be too: then they agree to 1e-14.
    Which tokens are seen is the policy's plan, as in `FrameCache`. Window and open frame are
    shifted by -delta on the temporal pairs, border tokens included; anchors and sinks stay.
    `budget` is in tokens. Its delta is stated here a second time, from DESIGN 4.5.
    """

    def __init__(
        self,
        model: Lumos,
        policy: Policy,
        *,
        layout: FrameLayout,
        text: Sequence[int],
        rebase: RebaseRule = "trained",
        budget: int | None = None,
    ) -> None:
        self.model, self.policy, self.layout, self.text = model, policy, layout, tuple(text)
        self.rebase, self.budget = rebase, budget
        self.timeline = Timeline()
        self.delta = 0
        self._span = Span.text(0)
        config = model.config
        empty = torch.empty(config.num_key_value_heads, 0, config.head_dim, dtype=torch.float64)
        self._keys = [[empty] * config.num_hidden_layers for _ in self.text]
        self._values = [[empty] * config.num_hidden_layers for _ in self.text]
        self._draft: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def open(self, span: Span) -> None:
        self._span, self.delta = span, self._due()

    def _due(self) -> int:
        """Latent frames by which the window lies too far from the anchors."""
        history = self.timeline.history
        sinks = sum(self.policy.is_sink(self.timeline, e) for e in history)
        window = [self.timeline.distance(e) for e in history][: len(history) - sinks]
        nearest = sinks + max(window, default=0)
        trained = self.model.config.trained_latent_frames
        if self.rebase == "slide":
            nearest += any(e.span.role is Role.IMAGE for e in self.timeline.entries)
        else:
            nearest = math.inf if trained is None else max(nearest + 1, trained - 1)
        return int(max(0, self.timeline.num_frames - nearest))

    @torch.inference_mode()
    def forward(self, ids: Tensor, branch: int = 0) -> Tensor:
        """Hidden states `[L, hidden]` of the open span's ids `[L]` in one branch."""
        half = self.model.config.head_dim // 2
        unturned = torch.ones(len(ids), half).double(), torch.zeros(len(ids), half).double()
        seen, angles = self._seen(branch)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._draft[branch, layer] = k[0], v[0]
            keys = torch.cat((self._keys[branch][layer], k[0]), dim=1)[:, seen]
            values = torch.cat((self._values[branch][layer], v[0]), dim=1)[:, seen]
            cos, sin = angles.cos(), angles.sin()
            q, keys = rotate(q[0], cos[-len(ids) :], sin[-len(ids) :]), rotate(keys, cos, sin)
            mask = torch.ones(len(ids), keys.shape[1], dtype=torch.bool)
            mask = mask.tril() if self._span.role is Role.TEXT else mask
            return _attention(q, keys, values, mask)[None]

        return self.model(ids[None], unturned, attend)[0]

    def _seen(self, branch: int) -> tuple[Tensor, Tensor]:
        """Indices of the tokens to attend to, the open span last, and their angles `[S, D/2]`."""
        less = self.text[0] - self.text[branch]  # this branch has that many text tokens less
        spans = [(e, e.start + e.held) for e in self.timeline.entries]
        frames = self.timeline.num_frames + (self._span.layout is not None)
        where = sequence_positions(self.model.config, self.text[branch], frames, self.layout)
        seen, shift = [], []
        for entry, tokens in spans:
            own = tokens[: self.text[branch]] if entry.span.role is Role.TEXT else tokens - less
            stays = entry.span.role.is_anchor or self.policy.is_sink(self.timeline, entry)
            seen.append(own)
            shift.append(np.full(len(own), 0 if stays else self.delta))
        start = self._keys[branch][0].shape[1]
        opened = np.arange(start, where.shape[1])
        index = torch.from_numpy(np.concatenate([*seen, opened])).long()
        moved = torch.from_numpy(np.concatenate([*shift, np.full(len(opened), self.delta)]))
        angles = rotary_angles(where[:, index], self.model.inv_freq.double(), self.model.axes)
        pairs = temporal_pairs(self.model.config.head_dim)
        stride = self.model.config.compression[0]
        angles[:, pairs] -= stride * moved[:, None] * self.model.inv_freq.double()[pairs]
        return index, angles

    def commit(self, *, visible: NDArray[np.bool_] | None = None, ids: Ints | None = None) -> None:
        """The last forward of each branch stays for ever; the policy says what is seen of it."""
        for (branch, layer), (k, v) in self._draft.items():
            self._keys[branch][layer] = torch.cat((self._keys[branch][layer], k), dim=1)
            self._values[branch][layer] = torch.cat((self._values[branch][layer], v), dim=1)
        self._draft = {}
        span, frames = self._span, [e.span for e in self.timeline.entries if e.span.layout]
        if span.layout is not None:
            span = Span.of_frame(span.role, span.frame, span.layout, visible=visible, ids=ids)
        self.timeline.append(span, self.policy.rank(span, frames[-1] if frames else None))
        self.timeline.keep(self.policy.plan(self.timeline, self.budget))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of q `[H, L, D]` over k, v `[KV, S, D]` where `mask [L, S]`, written out."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ v
