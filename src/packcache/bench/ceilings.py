"""What this machine can do at a workload's shapes: matrix product, fused attention, copy.

A ceiling is a maximum, so the best of several runs counts; the medians are the rows' business.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from packcache.attention import attend
from packcache.bench.parts import Ceilings, Workload

__all__ = ["head_groups", "measure", "now"]

#: Bytes of the buffer that is copied: more than any cache holds.
COPY_BYTES = 256 << 20

#: Each ceiling is tried at least this often, and then until this many seconds are over.
RUNS, SECONDS = 3, 1.0

#: A run is as many calls as take this long: one call of a small shape is all overhead and clock.
RUN_SECONDS, MOST_CALLS = 0.01, 1000

#: Attention is computed for all groups of heads at once if that is no more operations than this, or
#: on a GPU; else for one: a group of the largest model keeps every core of a CPU busy for a second.
ATTENTION_OPERATIONS = 2e11

#: Keys of so many latent frames: those a packed cache and its open frame hold.
LATENTS = 3


def measure(workload: Workload) -> Ceilings:
    """The three ceilings, measured now: some seconds at any size."""
    with torch.inference_mode():
        return Ceilings(
            matmul=_matmul(workload), attention=_attention(workload), copy=_copy(workload.device)
        )


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def head_groups(workload: Workload, keys: int) -> int:
    """Groups of heads whose attention over so many keys is timed in one call: all, or one."""
    config = workload.config
    queries = config.num_attention_heads * workload.layout.tokens
    small = 4 * queries * keys * config.head_dim <= ATTENTION_OPERATIONS
    return config.num_key_value_heads if small or workload.device.type == "cuda" else 1


def _matmul(workload: Workload) -> float:
    """Operations a second of the MLP's product: both branches' rows, hidden x intermediate."""
    config = workload.config
    rows = workload.sampling.branches * workload.layout.tokens
    x = _random(workload, rows, config.hidden_size)
    weight = _random(workload, config.intermediate_size, config.hidden_size)
    operations = 2 * x.numel() * config.intermediate_size
    return operations / _best(lambda: torch.nn.functional.linear(x, weight), workload.device)


def _attention(workload: Workload) -> float:
    """Operations a second of the engine's attention over the keys of several latent frames."""
    config, tokens = workload.config, workload.layout.tokens
    share = config.num_attention_heads // config.num_key_value_heads
    keys = min(LATENTS, workload.latents) * tokens
    groups = head_groups(workload, keys)
    q = _random(workload, groups * share, tokens, config.head_dim)
    k, v = (_random(workload, groups, keys, config.head_dim) for _ in range(2))
    return 4 * q.numel() * keys / _best(lambda: attend(q, k, v), workload.device)


def _copy(device: torch.device) -> float:
    """Bytes a second, read and written."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)  # its pages exist before the clock runs
    return 2 * COPY_BYTES / _best(lambda: target.copy_(source), device)


def _random(workload: Workload, *shape: int) -> Tensor:
    generator = torch.Generator(workload.device).manual_seed(workload.seed)
    made = torch.randn(shape, generator=generator, device=workload.device)
    return made.to(workload.dtype)


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call in the fastest run."""
    call()  # warm-up: kernels are chosen and loaded
    start = now(device)
    call()
    once = now(device) - start
    calls = max(1, min(MOST_CALLS, int(RUN_SECONDS / max(once, 1e-9))))
    best, runs, begin = once, 0, now(device)
    while runs < RUNS or now(device) - begin < SECONDS:
        start = now(device)
        for _ in range(calls):
            call()
        best = min(best, (now(device) - start) / calls)
        runs += 1
    return best
