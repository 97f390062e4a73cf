"""What both recipes share: the clock and checkpoint of a run, its curve, rendering in parallel."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing

CHECKPOINT_SECONDS = 60
PACKAGE_WEIGHTS = Path("src/packcache/digits/weights")


def add_options(parser: argparse.ArgumentParser, name: str, *, minutes: float) -> None:
    """The options of both recipes; everything is relative to the repository's root."""
    add = parser.add_argument
    add("--minutes", type=float, default=minutes, help="training time, resumed time included")
    add("--device", default="cpu")
    add("--workers", type=int, default=0, help="processes that render, besides this one")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path(f"build/digits/{name}.safetensors"))
    add("--curve", type=Path, default=Path(f"recipes/digits/curves/{name}.jsonl"))
    add("--resume", action="store_true", help="go on from the checkpoint beside --out")
    add("--export", action="store_true", help="put the trained weights into the package, and stop")


def to_float(frames: Tensor) -> Tensor:
    """uint8 `[..., T, H, W, 3]` to float32 `[..., 3, T, H, W]` in [-1, 1]."""
    return frames.movedim(-1, -4).float() / 255 * 2 - 1


def in_parallel(function: Callable[[int], Any], seeds: list[int], workers: int) -> Iterator[Any]:
    """`function` of every seed, in order. Workers start at once: before CUDA forbids it.

    A few results at a time: they wait in shared memory.
    """
    if not workers:
        return map(function, seeds)
    pool = multiprocessing.get_context("fork").Pool(workers, torch.set_num_threads, (1,))
    return _in_waves(pool, function, seeds, 2 * workers)


def _in_waves(
    pool: Any, function: Callable[[int], Any], seeds: list[int], wave: int
) -> Iterator[Any]:
    with pool:
        for start in range(0, len(seeds), wave):
            yield from pool.map(function, seeds[start : start + wave], chunksize=1)


class Run:
    """Steps and minutes of a training run, kept over interruptions in a checkpoint beside `--out`.

    `state` maps names to whatever has `state_dict` and `load_state_dict`.
    """

    def __init__(self, args: argparse.Namespace, state: dict[str, Any]) -> None:
        self.path = Path(args.out).with_suffix(".checkpoint.pt")
        self.limit = args.minutes
        self.state = state
        self.step = 0
        self._before = 0.0
        if args.resume and self.path.exists():
            saved = torch.load(self.path, map_location=args.device)
            self.step, self._before = saved["step"], saved["minutes"]
            for name, part in state.items():
                part.load_state_dict(saved[name])
        self._start = self._saved = time.perf_counter()

    @property
    def minutes(self) -> float:
        return self._before + (time.perf_counter() - self._start) / 60

    @property
    def share(self) -> float:
        """How much of the time is gone, 0..1."""
        return min(1.0, self.minutes / self.limit)

    def advance(self) -> bool:
        """Count a step; every minute write the checkpoint and answer True."""
        self.step += 1
        if time.perf_counter() - self._saved < CHECKPOINT_SECONDS:
            return False
        self.save()
        return True

    def save(self) -> None:
        """Write under a temporary name, then rename: a checkpoint is whole or not there."""
        saved = {name: part.state_dict() for name, part in self.state.items()}
        temporary = self.path.with_suffix(".tmp")
        torch.save({"step": self.step, "minutes": self.minutes, **saved}, temporary)
        temporary.replace(self.path)
        self._saved = time.perf_counter()


class Curve:
    """The curve of a run as JSON lines, printed as it grows."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.write_text("")

    def add(self, **values: float) -> None:
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps(rounded)
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
