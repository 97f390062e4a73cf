"""Ids and places: how a prompt, a header and latent frames become one token sequence.

    [bos] text... [sep] [video start] [duration] [fps]  frame 0  frame 1 ...
    frame: [image start] [h] [w]  (w codes [new line]) x h  [image end]        (lumos1-spec 3)

No number is typed here: every id comes from `LumosConfig.token_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from packcache import positions
from packcache.errors import InputError, InvalidSetting
from packcache.lumos.config import LumosConfig
from packcache.timeline import FrameLayout, Ints

#: Pixels a grid token counts in: token n says n * 32 pixels.
GRID_UNIT = 32

#: Tokens of the header: video start, duration, fps.
HEADER = 3

__all__ = ["GRID_UNIT", "HEADER", "Prefix", "Vocab", "latent_frames", "pixel_frames"]


def latent_frames(frames: int, temporal: int = 4) -> int:
    """Latent frames that hold `frames` pixel frames: 24 and 25 are 7, 48 and 49 are 13."""
    return -(-(frames - 1) // temporal) + 1


def pixel_frames(latents: int, temporal: int = 4) -> int:
    """Pixel frames that `latents` latent frames decode to: 7 are 25."""
    return 1 + temporal * (latents - 1)


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """What stands before the first latent frame, for one prompt.

    `ids [n]` are BOS, text, separator and header; `video_start` is the index of the video-start
    token, where the unconditional branch begins.
    """

    ids: tuple[int, ...]
    video_start: int

    @property
    def lengths(self) -> tuple[int, int]:
        """Prefix tokens of the conditional and of the unconditional branch."""
        return len(self.ids), len(self.ids) - self.video_start

    def branch(self, index: int) -> tuple[int, ...]:
        return self.ids if index == 0 else self.ids[self.video_start :]


class Vocab:
    """The layout of one model's sequences."""

    def __init__(self, config: LumosConfig) -> None:
        self.config = config
        self.ids = config.token_ids

    def number(self, value: int, name: str) -> int:
        """The token that says `value`; numbers end where the next special token begins."""
        numbers = self.ids.numbers
        if not 0 <= value < len(numbers):
            raise InvalidSetting(
                f"{name} is {value}, expected 0..{len(numbers) - 1}: no token says it"
            )
        return numbers[value]

    def layout(self, width: int, height: int) -> FrameLayout:
        """The token grid of a `width x height` clip in pixels; both multiples of 32."""
        for name, size in (("width", width), ("height", height)):
            if size < GRID_UNIT or size % GRID_UNIT:
                raise InvalidSetting(
                    f"{name} is {size} pixels, expected a positive multiple of {GRID_UNIT}"
                )
        _, sh, sw = self.config.compression
        return FrameLayout(rows=height // sh, cols=width // sw)

    def prefix(self, text: Sequence[int], *, seconds: int, fps: int) -> Prefix:
        """BOS, text ids, separator, then the header: duration in seconds before fps."""
        outside = [i for i in text if not 0 <= i < self.config.vocab_size]
        if outside:
            raise InputError(
                f"text id {outside[0]} lies outside the vocabulary, expected 0.."
                f"{self.config.vocab_size - 1}: the tokenizer belongs to another model"
            )
        head = (self.ids.bos, *text, self.ids.sep)
        header = (
            self.ids.video_start,
            self.number(seconds, "duration in seconds"),
            self.number(fps, "fps"),
        )
        return Prefix(ids=head + header, video_start=len(head))

    def frame(self, layout: FrameLayout, codes: Tensor | None = None) -> Tensor:
        """Token ids int64 `[P]` of a latent frame; `codes` (0-based, row-major) or all mask."""
        _, sh, sw = self.config.compression
        ids = torch.full((layout.tokens,), self.ids.mask, dtype=torch.int64)
        ids[0] = self.ids.image_start
        ids[1] = self.number(layout.rows * sh // GRID_UNIT, "frame height / 32")
        ids[2] = self.number(layout.cols * sw // GRID_UNIT, "frame width / 32")
        ids[-1] = self.ids.image_end
        ids[_offsets(layout, layout.cols)] = self.ids.new_line
        if codes is not None:
            ids[self.content(layout)] = codes.reshape(-1).to(torch.int64) + self.ids.video_lo
        return ids

    def content(self, layout: FrameLayout) -> Tensor:
        """Offsets int64 `[rows * cols]` of the content tokens in a frame."""
        return torch.from_numpy(layout.content_offsets().astype(np.int64))

    def codes(self, layout: FrameLayout, ids: Tensor) -> Tensor:
        """Codec codes int64 `[..., rows, cols]` of finished frames `[..., P]`."""
        content = ids[..., self.content(layout)] - self.ids.video_lo
        return content.unflatten(-1, (layout.rows, layout.cols))

    def remask(self, layout: FrameLayout, ids: Tensor, history: Ints) -> Tensor:
        """A copy of frames `[..., P]` with body positions `history` replaced by the mask token."""
        out = ids.clone()
        out[..., layout.header + torch.from_numpy(history).long()] = self.ids.mask
        return out

    def frame_positions(self, prefix_length: int, frame: int, layout: FrameLayout) -> Tensor:
        """Position ids `[5, P]` of a latent frame in a branch with that many prefix tokens."""
        stride_t, stride_h, stride_w = self.config.compression
        return positions.frame_positions(
            prefix_length + frame * layout.tokens,
            frame,
            layout,
            origin=prefix_length + layout.header,
            time_stride=stride_t,
            space_strides=(stride_h, stride_w),
        )


def _offsets(layout: FrameLayout, column: int) -> Tensor:
    y, x = layout.cells()
    return torch.from_numpy(np.flatnonzero((x == column) & (y >= 0)))
