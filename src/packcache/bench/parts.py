"""The words of a benchmark: what is asked, what a row is, what was measured of a latent frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from packcache.lumos.config import LumosConfig
from packcache.lumos.schedule import Sampling
from packcache.policies import Policy
from packcache.reuse import StepReuse
from packcache.timeline import FrameLayout

__all__ = ["Candidate", "Ceilings", "FrameTime", "Instrumented", "Task", "Workload"]

Task = Literal["t2v", "i2v"]

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is timed: a model, a clip, and the rows: policies by label x presets by name.

    `config` has the full depth; `layers` cuts it (composed rows), None does not. `latents` latent
    frames, of which i2v gives the first. `repeats` measurements of each number are interleaved.
    `measured_frames` are the latent frames that are timed, the first and the last generated one
    among them; TOTAL is a sum over all frames, straight lines between those. `sampled_steps` of
    the steps are timed in exact rows, None times all.
    """

    model: str
    config: LumosConfig
    layout: FrameLayout
    sampling: Sampling
    task: Task
    size: tuple[int, int]
    frames: int
    latents: int
    policies: Mapping[str, Policy]
    presets: Mapping[str, StepReuse]
    baselines: Sequence[str] = ()
    device: torch.device = _CPU
    dtype: torch.dtype = torch.float32
    text_tokens: int = 200
    layers: int | None = None
    repeats: int = 7
    measured_frames: Sequence[int] = ()
    sampled_steps: int | None = None
    seed: int = 0

    @property
    def given(self) -> int:
        """Latent frames that the clip starts with."""
        return int(self.task == "i2v")


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this machine can do, measured in the same run.

    `matmul` and `attention` in operations a second, of a matrix product and of a fused attention
    call at the workload's shapes; `copy` in bytes a second, read and written.
    """

    matmul: float
    attention: float
    copy: float


@dataclass(frozen=True, kw_only=True)
class FrameTime:
    """Seconds of one latent frame: `steps` and the commit's `forward`, and `bookkeeping`.

    Bookkeeping is what the cache does besides holding: packing at the commit, rebase at the
    opening. `shares` are seconds of kinds of kernels in an instrumented run, by name: attention,
    linear, head.
    """

    steps: float
    forward: float
    bookkeeping: float
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.steps + self.forward + self.bookkeeping


class Candidate(Protocol):
    """An engine that can be timed at any latent frame of a clip, leaving no trace there."""

    def prefill(self) -> float:
        """Commit the text; seconds."""
        ...

    def advance(self) -> float:
        """Commit the next latent frame (given first, then as if generated): seconds of packing
        and rebase. One forward, no denoising step."""
        ...

    def rehearse(self, steps: Sequence[int] | None = None) -> tuple[float, float]:
        """Seconds of the steps of the next latent frame (all, or those numbers), and of the forward
        of its commit; it is forgotten again."""
        ...

    def statistics(self) -> dict[str, Any]:
        """`kv_bytes`, `capacity_bytes`, `held` tokens now."""
        ...


@runtime_checkable
class Instrumented(Protocol):
    """A candidate that can tell where its time goes."""

    def shares(self, steps: Sequence[int] | None = None) -> Mapping[str, float]:
        """Seconds by kind of kernel of one rehearsal of these steps and the commit's forward:
        `attention`, `linear`, `head` (and sampling). Not to be timed: it waits for each."""
        ...
