"""A finished clip and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packcache import video
from packcache.environment import environment
from packcache.lumos.decode import FrameResult
from packcache.lumos.schedule import Sampling
from packcache.policies import Policy
from packcache.positions import PositionMode, RebaseRule
from packcache.reuse import StepReuse
from packcache.video import Frames

__all__ = ["Clip", "Stats"]


@dataclass(kw_only=True)
class Stats:
    """What a clip cost, one entry a latent frame. Seconds; bytes of all branches, K and V.

    `prefill_s` is the text prefix, `codec_s` encoding and decoding (in no total); `frame_s` holds
    all steps, the commit and the packing of a latent frame; `kept` maps history frames to the
    tokens they hold after it.
    """

    prefill_s: float = 0.0
    codec_s: float = 0.0
    frame_s: list[float] = field(default_factory=list)
    kept: list[dict[int, int]] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    capacity_bytes: list[int] = field(default_factory=list)
    physical_length: list[int] = field(default_factory=list)
    rebase_frames: list[int] = field(default_factory=list)
    given_latents: int = 0

    @property
    def total_s(self) -> float:
        """TOTAL: prefill to the last commit."""
        return self.prefill_s + sum(self.frame_s)

    @property
    def last_s(self) -> float:
        """LAST: all steps, the commit and the packing of the last latent frame."""
        return self.frame_s[-1]

    def to_json(self) -> dict[str, Any]:
        """A row of a result: totals first, then the lists per latent frame."""
        row = {"total_s": self.total_s, "last_s": self.last_s, **asdict(self)}
        row["kept"] = [{str(frame): count for frame, count in kept.items()} for kept in self.kept]
        return row

    def add(self, result: FrameResult) -> None:
        self.frame_s.append(result.seconds)
        self.given_latents += result.given
        for name in ("kept", "kv_bytes", "capacity_bytes", "physical_length", "rebase_frames"):
            getattr(self, name).append(getattr(result, name))


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """A finished clip: `frames [T, H, W, 3]` uint8, `codes [t, h, w]`, and what it cost."""

    model: str
    prompt: str
    policy: Policy
    sampling: Sampling
    positions: PositionMode
    rebase: RebaseRule
    reuse: StepReuse
    seed: int
    fps: int
    frames: Frames
    codes: Tensor
    stats: Stats
    device: torch.device
    dtype: torch.dtype

    def workload(self) -> dict[str, Any]:
        """What was asked for, as results state it."""
        count, height, width, _ = self.frames.shape
        return {
            "model": self.model,
            "prompt": self.prompt,
            "frames": count,
            "latent_frames": len(self.codes),
            "given_latent_frames": self.stats.given_latents,
            "width": width,
            "height": height,
            "fps": self.fps,
            "seed": self.seed,
            "sampling": asdict(self.sampling),
            "positions": self.positions,
            "rebase": self.rebase,
            "reuse": asdict(self.reuse),
        }

    def to_json(self) -> dict[str, Any]:
        """Schema, environment, workload and the one row of results."""
        return {
            "schema": "packcache.generate/1",
            "environment": environment(self.device, self.dtype),
            "workload": self.workload(),
            "results": [{"policy": repr(self.policy), **self.stats.to_json()}],
        }

    def save(self, path: str | Path) -> Path:
        """Write .mp4, .gif, a picture of a one-frame clip or, without a suffix, a folder of PNG."""
        return video.write_video(self.frames, path, self.fps)
