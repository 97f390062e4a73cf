"""When a token is decided: the cosine schedule, the confidence cut, the history tube mask.

Pure functions of tensors and the step (lumos1-spec 5.3-5.5). A *draw* gives every position two
uniforms: one picks the token by inverse CDF, one is the noise on its confidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from packcache.errors import InvalidSetting
from packcache.timeline import Ints

__all__ = [
    "UPSTREAM",
    "Draws",
    "FrameDraws",
    "Sampling",
    "cosine",
    "cosine_counts",
    "gumbel",
    "history_mask",
    "philox_draws",
    "pick",
    "remask",
    "stack_draws",
    "temperatures",
    "undecided",
]

KNOWN = torch.finfo(torch.float32).max
_TINY = 1e-20


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a latent frame is decided. Defaults are upstream's evaluation settings (lumos1-spec 5.1).

    `reset_temperature` starts every frame with fresh confidence noise; upstream multiplies the
    temperature down to 0 in its first generated frame and never resets it. `greedy` takes the
    most likely token instead of a draw.
    """

    steps: int = 50
    guidance: float = 15.0
    history_mask_ratio: float = 0.7
    temperature: float = 1.0
    reset_temperature: bool = False
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InvalidSetting(f"steps is {self.steps}, expected at least 1")
        if not 0 <= self.history_mask_ratio <= 1:
            raise InvalidSetting(
                f"history_mask_ratio is {self.history_mask_ratio}, expected 0 to 1"
            )
        for name in ("guidance", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidSetting(f"{name} is {value}, expected a finite number >= 0")

    @property
    def branches(self) -> int:
        """Sequences of a prompt: guidance 1 needs no unconditional one."""
        return 1 if self.guidance == 1 else 2


#: Upstream's evaluation settings, where nothing else is said.
UPSTREAM = Sampling()


def history_mask(rows: int, row_length: int, ratio: float) -> Ints:
    """Body positions re-masked at commit, int32 ascending: evenly spaced, the same for every frame.

    `round(ratio * Lb)` positions of the body `Lb = rows * row_length`, new lines included, from
    index 0 on, at half-to-even roundings of float32 multiples of the step (lumos1-spec 5.4).
    Ratio 0 re-masks nothing.
    """
    if ratio == 0:
        return np.empty(0, dtype=np.int32)
    length = rows * row_length
    count = max(1, round(ratio * length))
    step = np.float32(length / count)
    index = np.rint(np.arange(count, dtype=np.float32) * step)
    return np.unique(np.clip(index, 0, length - 1)).astype(np.int32)


def cosine(steps: int) -> Tensor:
    """Share of tokens left masked after each step, `cos(pi/2 (s+1)/S)`, float32 `[S]`."""
    ratio = (torch.arange(1, steps + 1, dtype=torch.float64) / steps).float()
    return torch.cos(ratio * (math.pi / 2))


def cosine_counts(tokens: int, steps: int) -> list[int]:
    """Raw count of tokens left masked after each step: `floor(N cos(pi/2 r))`; ends at -1."""
    return torch.floor(tokens * cosine(steps)).int().tolist()


def undecided(tokens: int, steps: int) -> list[int]:
    """Tokens still masked when each step begins, `[S]`: each step decides one at least.

    Equal confidences at the cut are decided together, so there may be fewer (lumos1-spec 5.5.4).
    """
    left = [tokens]
    for count in cosine_counts(tokens, steps)[:-1]:
        left.append(max(1, min(left[-1] - 1, count)))
    return left


def temperatures(steps: int, start: float) -> list[float]:
    """Confidence temperature of each step of a frame; the last is exactly 0 (lumos1-spec 5.3.8)."""
    out, current = [], start
    for step in range(steps):
        current *= 1 - (step + 1) / steps
        out.append(current)
    return out


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise `-log(-log u)` of uniforms in [0, 1), clamped at 1e-20 as upstream."""
    return -torch.log((-torch.log(uniform.clamp_min(_TINY))).clamp_min(_TINY))


def remask(selected: Tensor, noise: Tensor, num_mask: Tensor, temperature: float) -> Tensor:
    """Which positions go back to mask: confidence strictly below the cut, bool `[R, N]`.

    `selected [R, N]` is the probability of the chosen token, `KNOWN` where already decided;
    `num_mask [R, 1]` is the 0-based rank of the cut. Ties at the cut stay decided (spec 5.5.4).
    """
    confidence = torch.log(selected.clamp_min(_TINY)) + temperature * noise
    cut = confidence.sort(dim=-1).values.gather(-1, num_mask)
    return confidence < cut


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameDraws:
    """The randomness of one latent frame, `[..., S, N]` over steps and content positions.

    `uniform` draws tokens by inverse CDF, `noise` is the Gumbel noise on confidences. `tokens`
    (0-based codes) replaces the draw altogether, for replaying recorded runs.
    """

    uniform: Tensor
    noise: Tensor
    tokens: Tensor | None = None


class Draws(Protocol):
    """Randomness by prompt number and latent frame."""

    def __call__(self, prompt: int, frame: int, /) -> FrameDraws: ...


def philox_draws(seeds: Sequence[int], steps: int, positions: int) -> Draws:
    """Counter-based draws keyed by (seed, latent frame): float32 uniforms `[S, N, 2]`.

    They depend on nothing else, so policies share their noise, runs repeat and resume, and a
    batch draws what its prompts would draw alone (DESIGN 5).
    """
    for seed in seeds:
        if not 0 <= seed < 1 << 64:
            raise InvalidSetting(f"seed is {seed}, expected a whole number from 0 to 2^64 - 1")

    def draw(prompt: int, frame: int) -> FrameDraws:
        key = np.array([seeds[prompt], frame], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        uniforms = torch.from_numpy(generator.random((steps, positions, 2), dtype=np.float32))
        return FrameDraws(uniform=uniforms[..., 0], noise=gumbel(uniforms[..., 1]))

    return draw


def stack_draws(draws: Sequence[FrameDraws], device: torch.device) -> FrameDraws:
    """Several prompts' draws as one, `[B, S, N]`, copied to the device once a frame."""
    tokens = [d.tokens for d in draws if d.tokens is not None]
    return FrameDraws(
        uniform=torch.stack([d.uniform for d in draws]).to(device),
        noise=torch.stack([d.noise for d in draws]).to(device),
        tokens=torch.stack(tokens).to(device) if tokens else None,
    )


def pick(
    probs: Tensor, draws: FrameDraws, step: int, chosen: Tensor, *, greedy: bool = False
) -> Tensor:
    """A code for each chosen position, int64 `[B, rows]`, from probabilities `[B, rows, codes]`."""
    if draws.tokens is not None:
        return draws.tokens[:, step].gather(1, chosen)
    if greedy:
        return probs.argmax(dim=-1)
    cdf = probs.cumsum(dim=-1)
    uniform = draws.uniform[:, step].gather(1, chosen)[..., None]
    codes = torch.searchsorted(cdf, uniform * cdf[..., -1:], right=True)[..., 0]
    return codes.clamp_max(probs.shape[-1] - 1)
