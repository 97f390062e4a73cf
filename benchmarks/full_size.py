"""Does the largest model load and run as planned here? A rehearsal with random weights.

    python benchmarks/full_size.py            # 3B, about 7 GB of disk for some minutes

Builds a folder of released shapes (random bf16 weights, sharded) outside the tree, loads it in a
process of its own, makes one denoising step of a latent frame, and removes the folder again.
Memory is anonymous resident memory; pages of the mapped files, which the system takes back when it
likes, are told apart. Writes benchmarks/results/full_size.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from packcache.environment import environment
from packcache.files import write_json
from packcache.lumos.config import SIZES, read_config
from packcache.lumos.decode import Decoder
from packcache.lumos.random_weights import write_random
from packcache.lumos.schedule import Sampling, philox_draws
from packcache.lumos.vocab import Vocab
from packcache.lumos.weights import load_model, parameter_count
from packcache.policies import PackCache

SHARD_BYTES = 2 << 30
TEXT_TOKENS = 150


class Memory(threading.Thread):
    """Peak of anonymous and of mapped resident bytes, looked at every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.base = self.now()["RssAnon"]
        self.peak = {"RssAnon": 0, "RssFile": 0}
        self.over = threading.Event()

    @staticmethod
    def now() -> dict[str, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        return {name: int(values[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}

    def look(self) -> None:
        for name, value in self.now().items():
            self.peak[name] = max(self.peak[name], value)

    def run(self) -> None:
        while not self.over.wait(0.005):
            self.look()

    def end(self) -> dict[str, int]:
        self.over.set()
        self.join()
        self.look()
        return self.peak


def rehearse(folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Load the folder, then one step of the first latent frame; seconds and bytes."""
    config = read_config(folder)
    memory = Memory()
    memory.start()
    start = time.perf_counter()
    model = load_model(folder, config)
    load_s = time.perf_counter() - start
    peak, loaded = memory.end(), Memory.now()
    weights = sum(weight.nbytes for weight in model.parameters())
    vocab = Vocab(config)
    layout, sampling = vocab.layout(*size), Sampling(steps=1)
    decoder = Decoder(
        model,
        [vocab.prefix([1] * TEXT_TOKENS, seconds=2, fps=12)],
        layout=layout,
        sampling=sampling,
        policy=PackCache(),
        draws=philox_draws([0], 1, layout.content),
        latents=1,
    )
    decoder.prefill()
    start = time.perf_counter()
    decoder.predict()
    return {
        "weights_bytes": weights,
        "load_s": load_s,
        "anonymous_before_bytes": memory.base,
        "anonymous_loaded_bytes": loaded["RssAnon"],
        "anonymous_peak_bytes": peak["RssAnon"],
        "peak_over_weights": (peak["RssAnon"] - memory.base) / weights,
        "mapped_peak_bytes": peak["RssFile"],
        "prefill_s": decoder.prefill_s,
        "step_s": time.perf_counter() - start,
        "tokens_per_frame": layout.tokens,
        "branches": decoder.branches,
    }


def build(folder: Path, model: str) -> float:
    start = time.perf_counter()
    write_random(folder, SIZES[model], seed=0, dtype=torch.bfloat16, shard_bytes=SHARD_BYTES)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="3b", choices=sorted(SIZES))
    parser.add_argument("--size", type=int, nargs=2, default=(448, 256), metavar=("W", "H"))
    parser.add_argument("--scratch", type=Path, help="folder for the weights [the system's]")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/full_size.json"))
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # the process of its own
    arguments = parser.parse_args()
    size = tuple(arguments.size)
    if arguments.load:
        print(json.dumps(rehearse(arguments.load, size)))
        return
    scratch = Path(tempfile.mkdtemp(prefix="packcache-", dir=arguments.scratch))
    try:
        build_s = build(scratch / "model", arguments.model)
        command = [sys.executable, __file__, "--load", str(scratch / "model")]
        command += ["--size", *map(str, size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        shutil.rmtree(scratch)
    row = {"build_s": build_s, **json.loads(done.stdout.splitlines()[-1])}
    result = {
        "schema": "packcache.full_size/1",
        "environment": environment(dtype=torch.bfloat16),
        "workload": {
            "model": arguments.model,
            "parameters": parameter_count(SIZES[arguments.model]),
            "width": size[0],
            "height": size[1],
            "text_tokens": TEXT_TOKENS,
            "shard_bytes": SHARD_BYTES,
            "weights": "random",
        },
        "results": [row],
    }
    for name, value in row.items():
        print(f"{name:24} {value / 2**30:.3f} GiB" if "bytes" in name else f"{name:24} {value:.3f}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, arguments.out)


if __name__ == "__main__":
    main()
