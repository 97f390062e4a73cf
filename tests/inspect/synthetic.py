"""Traces with known answers: attention is written down, not recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from packcache.inspect.trace import Sample, Trace
from packcache.timeline import FrameLayout, Role

#: 76 tokens a frame.
LAYOUT = FrameLayout(rows=8, cols=8)

Kernel = Callable[[np.ndarray], np.ndarray]


def exponential(rho: float) -> Kernel:
    return lambda d: rho**d


def power_law(p: float) -> Kernel:
    return lambda d: d**-p


def periodic(period: float, depth: float = 0.8) -> Kernel:
    return lambda d: 1 + depth * np.cos(2 * np.pi * d / period)


def flat(d: np.ndarray) -> np.ndarray:
    return np.ones_like(d)


def trace(
    kernel: Kernel = flat,
    *,
    frames: int = 12,
    clips: int = 4,
    steps: Sequence[int] = (0, 4, 8, -1),
    anchors: float = 0.4,
    current: Callable[[int], float] = lambda step: 0.3,
    layers: int = 2,
    text: int = 5,
    image: bool = True,
    noise: float = 0.0,
    within: np.ndarray | None = None,
    visible: np.ndarray | None = None,
    ids: bool = True,
    seed: int = 0,
    layout: FrameLayout = LAYOUT,
) -> Trace:
    """Anchors get `anchors` in all, text and image half each, the current frame `current(step)`.

    History gets the rest, shared by `kernel(d)` over the frames there are; `noise` is the relative
    error of each frame's share. `within [P]` shares a frame's attention over its tokens.
    """
    rng = np.random.default_rng(seed)
    roles = (Role.IMAGE if image else Role.HISTORY, *[Role.HISTORY] * (frames - 1))
    spread = np.ones(layout.tokens) if within is None else np.asarray(within, dtype=float)
    first = int(image)
    samples = []
    for clip in range(clips):
        for frame in range(first, frames):
            for step in steps:
                rows = []
                for _ in range(layers):
                    d = np.arange(frame - first, 0, -1, dtype=float)  # oldest first
                    share = kernel(d) * (1 + noise * rng.standard_normal(len(d))).clip(0.05)
                    rest = 1 - anchors - current(step)
                    share = share / share.sum() * rest if len(d) else share
                    own = 1 - anchors - share.sum()
                    parts = [anchors / 2] * image + [*share, own]
                    head = np.full(text, (anchors / 2 if image else anchors) / text)
                    body = np.outer(parts, spread / spread.sum()).ravel()
                    rows.append(np.concatenate((head, body)))
                mass = np.array(rows, dtype=np.float32)
                samples.append(
                    Sample(clip=clip, frame=frame, step=step, steps=10, branch=0, mass=mass)
                )
    shape = (frames, layout.tokens)
    numbers = [rng.integers(0, 9, shape).astype(np.int32) if ids else None for _ in range(clips)]
    return Trace(
        layout=layout,
        text=text,
        roles=roles,
        layers=tuple(range(layers)),
        num_layers=layers,
        visible=visible,
        ids=numbers if ids else [],
        samples=samples,
        value_norm=np.ones(layers, dtype=np.float32),
        workload={"model": "written down", "clips": clips},
        environment={"device": "cpu"},
    )
