"""Does an endless clip stay small and fast? Resident memory and time per frame of `stream()`.

    python benchmarks/endless.py     # 10,000 latent frames; writes benchmarks/results/endless.json

A tiny random model with the embedded codec, 4x4 tokens, one step a frame. Memory is the slope of
the resident set over the last half of the clip. Time is that of late frames over early ones: a
second clip starts when the first is at its end, and the two take turns, so a machine that slows
down slows both.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import packcache as pc
from packcache.environment import environment
from packcache.files import write_json
from packcache.lumos.random_weights import random_model

PROMPT = "a red 3 moving right"
SETTINGS = {"size": (32, 32), "steps": 1}
GROUP = 4  # pixel frames of a latent frame
WARM = 50  # latent frames until window, buffers and allocator are as they will stay


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmRSS in /proc/self/status: this benchmark runs on Linux")


def latent(stream: Iterator[Any], frames: int = 1) -> None:
    for _ in range(GROUP * frames):
        next(stream)


def grow(stream: Iterator[Any], frames: int) -> list[tuple[int, int]]:
    """(latent frame, resident bytes), sampled a thousand times while the clip grows."""
    every = max(1, frames // 1000)
    samples = []
    for done in range(every, frames + 1, every):
        latent(stream, every)
        if done % (50 * every) == 0:
            gc.collect()
        samples.append((done, resident_bytes()))
    return samples


def slope(samples: list[tuple[int, int]]) -> float:
    """Growth of the last half in percent per 1,000 latent frames, least squares."""
    late = np.array(samples[len(samples) // 2 :], dtype=float)
    per_frame = np.polyfit(late[:, 0], late[:, 1], 1)[0]
    return float(1000 * per_frame / late[:, 1].mean() * 100)


def late_over_early(gen: pc.Pipeline, late: Iterator[Any], rounds: int) -> float:
    """Median ratio of CPU seconds, latent frame by latent frame in turns."""
    early = gen.stream(PROMPT, **SETTINGS)
    next(early)
    latent(early, WARM)
    ratios = []
    for _ in range(rounds):
        spent = []
        for stream in (late, early):
            start = time.process_time()
            latent(stream)
            spent.append(time.process_time() - start)
        ratios.append(spent[0] / spent[1])
    return statistics.median(ratios)


def tiny() -> pc.Pipeline:
    """The embedded model's language and codec around a network of two layers."""
    gen = pc.load("digits")
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = replace(gen.model.config, **small, **heads)
    return replace(gen, name="tiny, random weights", model=random_model(config))


def measure(frames: int) -> dict[str, Any]:
    gen = tiny()
    stream = gen.stream(PROMPT, **SETTINGS)
    next(stream)
    start = time.perf_counter()
    samples = grow(stream, frames)
    seconds = time.perf_counter() - start
    return {
        "schema": "packcache.endless/1",
        "environment": environment(),
        "workload": {
            "model": gen.name,
            "prompt": PROMPT,
            "latent_frames": frames,
            "policy": repr(pc.PackCache()),
            **SETTINGS,
        },
        "results": [
            {
                "resident_mb": samples[-1][1] / 1e6,
                "slope_percent_per_1000_frames": slope(samples),
                "late_over_early_time": late_over_early(gen, stream, rounds=min(400, frames // 4)),
                "frame_s": seconds / frames,
            }
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/endless.json"))
    arguments = parser.parse_args()
    result = measure(arguments.frames)
    for name, value in result["results"][0].items():
        print(f"{name:32} {value:.4f}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, arguments.out)


if __name__ == "__main__":
    main()
