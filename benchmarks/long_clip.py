"""Is the packed cache constant, and how much faster is it? The embedded model against full cache.

    python benchmarks/long_clip.py            # writes benchmarks/results/long_clip.json

One clip of 384 frames per policy, taking turns latent frame by latent frame; then interleaved
pairs of 48-frame clips, whose TOTAL ratio gets a median and a 95 % interval.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np

import packcache as pc
from packcache.environment import environment
from packcache.files import write_json
from packcache.inspect.compare import compare
from packcache.inspect.picture import readable_bytes
from packcache.policies import parse_policies

PROMPT = "a red 3 moving right"
POLICIES = "full,window,packcache"


def long_clip(gen: pc.Pipeline, frames: int) -> dict[str, Any]:
    """One run of every policy; KV bytes over time, TOTAL and LAST with their predictions."""
    result = compare(gen, PROMPT, parse_policies(POLICIES), frames=frames).to_json()
    for row in result["results"]:
        print(
            f"{frames} frames  {row['policy']:10} TOTAL {row['total_s']:7.2f} s "
            f"({row['speedup_total']:.2f}x, expected {row['predicted_total']:.2f}x)  "
            f"LAST {row['last_s']:.3f} s ({row['speedup_last']:.2f}x, "
            f"expected {row['predicted_last']:.2f}x)  KV {readable_bytes(row['kv_bytes'][-1])}"
        )
    return result


def pairs(gen: pc.Pipeline, frames: int, count: int) -> dict[str, Any]:
    """TOTAL(full) / TOTAL(packcache) of interleaved pairs; bootstrap interval of the median."""
    ratios = []
    for seed in range(-1, count):
        comparison = compare(
            gen, PROMPT, parse_policies("full,packcache"), frames=frames, seed=max(0, seed)
        )
        if seed >= 0:  # the first pair warms up
            ratios.append(comparison.speedups(comparison.entries[1])["speedup_total"])
    low, high = median_interval(ratios)
    print(
        f"{frames} frames  {count} pairs: TOTAL(full) / TOTAL(packcache) median "
        f"{statistics.median(ratios):.3f}, 95 % interval {low:.3f} to {high:.3f}"
    )
    return {
        "frames": frames,
        "ratios": ratios,
        "median": statistics.median(ratios),
        "interval_95": [low, high],
        "predicted_total": comparison.speedups(comparison.entries[1])["predicted_total"],
    }


def median_interval(values: list[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, size=(draws, len(values))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=384)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/long_clip.json"))
    arguments = parser.parse_args()
    gen = pc.load("digits")
    gen.generate(PROMPT, frames=9)  # warm up
    result = {
        "schema": "packcache.long_clip/1",
        "environment": environment(),
        "long": long_clip(gen, arguments.frames),
        "short": pairs(gen, 48, arguments.pairs),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, arguments.out)


if __name__ == "__main__":
    main()
