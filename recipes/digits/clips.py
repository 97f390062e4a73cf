"""Clips as the model meets them: rendered, tokenised, with their prompts."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch
from common import in_parallel, to_float
from torch import Tensor

from packcache.digits import prompts, world
from packcache.digits.codec import DigitsCodec
from packcache.digits.model import text_ids
from packcache.lumos.vocab import pixel_frames

CHUNK = 100  # clips rendered by one call
#: Share of prompts that leave the directions out.
NO_DIRECTION = 0.1


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Tokenised clips: codes int64 `[N, F, tokens]` and prompt token ids int64 `[N, words]`."""

    codes: Tensor
    text: Tensor

    def __len__(self) -> int:
        return len(self.codes)

    def pick(self, index: Tensor, frames: int) -> Clips:
        index = index.to(self.codes.device)
        return Clips(codes=self.codes[index, :frames].long(), text=self.text[index])


def draw_scenes(seed: int, split: world.Split) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, split) for _ in range(CHUNK)]


def render_scenes(scenes: list[world.Scene], latents: int) -> Tensor:
    """uint8 `[N, T, 96, 96, 3]`."""
    return torch.from_numpy(np.stack([world.render(s, pixel_frames(latents)) for s in scenes]))


def draw_chunk(seed: int, split: world.Split, latents: int) -> tuple[Tensor, Tensor]:
    """Frames and text ids `[N, words]` of random clips."""
    scenes = draw_scenes(seed, split)
    rng = np.random.default_rng((seed, 1))
    told = [prompts.prompt(s, directions=rng.random() >= NO_DIRECTION) for s in scenes]
    return render_scenes(scenes, latents), torch.tensor([text_ids(text) for text in told])


def encode(codec: DigitsCodec, frames: Tensor) -> Tensor:
    """Codes int16 `[N, F, tokens]` of frames, on the codec's device."""
    device = next(codec.parameters()).device
    indices, _ = codec.encode(to_float(frames.to(device)))
    return indices.flatten(2).short()


def make_clips(
    codec: DigitsCodec, device: str, seed: int, count: int, split: world.Split, latents: int,
    workers: int = 0,
) -> Clips:  # fmt: skip
    """Render and encode `count` clips, on `device`."""
    seeds = [seed * 1_000_000 + n for n in range(-(-count // CHUNK))]
    chunks = in_parallel(
        functools.partial(draw_chunk, split=split, latents=latents), seeds, workers
    )
    codec = codec.to(device)
    parts = [(encode(codec, frames), text.to(device)) for frames, text in chunks]
    codes, text = (torch.cat(part) for part in zip(*parts, strict=True))
    return Clips(codes=codes, text=text)


def inked(codec: DigitsCodec, scenes: list[world.Scene], latents: int) -> Tensor:
    """Which tokens a digit changes, bool `[N, F, tokens]`."""
    bare = [replace(scene, digits=()) for scene in scenes]
    return encode(codec, render_scenes(scenes, latents)) != encode(
        codec, render_scenes(bare, latents)
    )
