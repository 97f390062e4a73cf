"""Small workloads for the tests of the benchmark."""

from __future__ import annotations

from typing import Any

import torch

from packcache.bench.parts import Workload
from packcache.lumos.config import SIZES
from packcache.lumos.schedule import Sampling
from packcache.lumos.vocab import Vocab, latent_frames
from packcache.policies import FullCache, PackCache, SlidingWindow
from packcache.reuse import StepReuse

POLICIES = {"full": FullCache(), "window": SlidingWindow(), "packcache": PackCache()}

PRESETS = {
    "exact": StepReuse(),
    "rest": StepReuse(rest_every=3),
    "both": StepReuse(history_every=2, rest_every=4),
}


def workload(model: str = "toy", **settings: Any) -> Workload:
    """A clip of five latent frames of 76 tokens, four steps, image-to-video."""
    config = SIZES[model]
    size, frames = settings.get("size", (64, 64)), settings.setdefault("frames", 17)
    defaults = {
        "size": size,
        "layout": Vocab(config).layout(*size),
        "latents": latent_frames(frames, config.compression[0]),
        "sampling": Sampling(steps=4, guidance=3.0),
        "task": "i2v",
        "policies": POLICIES,
        "presets": PRESETS,
        "repeats": 2,
        "text_tokens": 11,
        "dtype": torch.float32,
    }
    return Workload(model=model, config=config, **{**defaults, **settings})
