"""What the cache gains in other models: memory, seconds a chunk, and what it costs when it is off.

    python benchmarks/adapters.py                  # Wan 1.3B widths at 480x832, one layer; minutes

Full attention over the window that the model was trained with, sink and window, and PackCache of as
many tokens, on diffusers' own `WanTransformer3DModel` with random weights: one forward of a chunk
after as many latent frames as fill the cache, in turns. Depth is cut; a chunk's seconds are put
together from that: a forward, embeddings and head with it, so many times as there are layers, for
each draft and the commit. Histories are random keys and values, written without the network.
Overhead when off: the transformer as it is, and with a cache installed that is off.
Then the same for Self-Forcing's protocol (its list of dicts, and ours that keep everything), and
what a draft costs in transformers: `DynamicCache` with `crop`, and a staged cache.
Writes benchmarks/results/adapters.json.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from transformers import DynamicCache

from packcache.adapters.diffusers import Installed, install
from packcache.adapters.self_forcing import SelfForcingCache
from packcache.cache import FrameCache
from packcache.environment import environment
from packcache.evaluate.statistics import bootstrap
from packcache.files import write_json
from packcache.policies import FullCache, PackCache, Policy, SinkWindow, SlidingWindow
from packcache.testing.causal_wan import CausalWan, dict_cache
from packcache.timeline import FrameLayout, Role, Span

#: Layers of the model that is cut, drafts of a chunk before its commit, latent frames a chunk.
DEPTH, DRAFTS, CHUNK = 30, 4, 3

#: The window that these models were trained with, the open chunk among it.
TRAINED = 21

Turn = Callable[[], object]


def policies() -> dict[str, Policy]:
    """History beside the open chunk: the trained window, a third of it by sinks, or packed."""
    few = (TRAINED - CHUNK) // 3
    return {
        "full window": SlidingWindow(frames=TRAINED - CHUNK),
        "sink+window": SinkWindow(sinks=CHUNK, frames=few - CHUNK),
        "packcache": PackCache(budget=few, window=TRAINED - CHUNK),
    }


def timed(turns: dict[str, Turn], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other, `repeats` times after a warm-up."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    for repeat in range(repeats + 1):
        for name, turn in turns.items():
            begin = time.perf_counter()
            turn()
            if repeat:
                found[name].append(time.perf_counter() - begin)
    return found


def over(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The geometric mean of paired ratios, and its 95 % interval."""
    logs = bootstrap(np.log(np.array(ours) / np.array(theirs)))
    bounds = zip(("ratio", "low", "high"), (logs.mean, logs.low, logs.high), strict=True)
    return {name: float(np.exp(bound)) for name, bound in bounds}


def fill(cache: FrameCache, frames: int) -> None:
    """Commit random keys and values of further latent frames."""
    store = cache.stores[0]
    size = store.kv_heads, cache.layout.tokens, store.head_dim
    for _ in range(frames):
        cache.open(Span.of_frame(Role.HISTORY, cache.timeline.num_frames, cache.layout))
        for layer in range(store.layers):
            cache.update(layer, *torch.randn(2, *size).to(store.dtype))
        cache.commit()


def wan(asked: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds a chunk by policy, and the overhead of a cache that is off."""
    height, width = asked.size[1] // 8, asked.size[0] // 8
    model = WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=asked.layers
    ).to(dtype)
    latents = torch.randn(1, 16, CHUNK, height, width, dtype=dtype)
    zero, text = torch.zeros(1), torch.randn(1, 512, 4096, dtype=dtype)

    def run(own: Any = model) -> object:
        return own(latents, zero, text, return_dict=False)

    off = timed({"stock": run, "off": _off(model, run)}, asked.repeats)
    rows, turns, caches = [], {}, {}
    for name, policy in policies().items():
        own = copy.deepcopy(model)
        installed = install(own, policy)
        with installed.frame(commit=True):
            run(own)
        caches[name] = installed.caches["cond"]
        fill(caches[name], TRAINED + CHUNK)
        turns[name] = _framed(installed, functools.partial(run, own))
    seconds = timed(turns, asked.repeats)
    for name, taken in seconds.items():
        cache = caches[name]
        rows.append(
            {
                "policy": name,
                "settings": repr(cache.policy),
                "history_tokens": cache.physical_length,
                "kv_gib": cache.kv_bytes * DEPTH / asked.layers / 2**30,
                "forward_s": float(np.median(taken)),
                "chunk_s": float(np.median(taken)) * (DRAFTS + 1) * DEPTH / asked.layers,
                "faster": over(seconds["full window"], taken),
            }
        )
    token_bytes = caches["packcache"].token_bytes * DEPTH / asked.layers
    tokens = caches["packcache"].layout.tokens
    return {
        "model": "WanTransformer3DModel, 1.3B widths, random weights",
        "layers": asked.layers, "size": list(asked.size), "tokens_per_frame": tokens,
        "kv_gib_81_latent_frames": 81 * tokens * token_bytes / 2**30,
        "off_over_stock": over(off["off"], off["stock"]),
        "rows": rows,
    }  # fmt: skip


def _off(model: Any, run: Turn) -> Turn:
    def turn() -> None:
        installed = install(model, FullCache())
        run()
        installed.uninstall()

    return turn


def _framed(installed: Installed, run: Turn) -> Turn:
    def turn() -> None:
        with installed.frame():
            run()

    return turn


def self_forcing(asked: argparse.Namespace) -> dict[str, Any]:
    """A forward of the open chunk over the pipeline's own dicts, and over ours with everything."""
    grid = asked.size[1] // 32, asked.size[0] // 32
    tokens = CHUNK * grid[0] * grid[1]
    model = CausalWan(layers=asked.layers, heads=12, head_dim=128, grid=grid)
    plain = dict_cache(model, 4 * tokens)
    ours = SelfForcingCache(FullCache(), layers=asked.layers, grid=grid)
    x = torch.randn(1, tokens, model.width)
    for start in range(0, 4 * tokens, tokens):
        for cache in (plain, ours):
            model(x, kv_cache=cache, current_start=start)
    last = 3 * tokens
    taken = timed(
        {
            "stock": lambda: model(x, kv_cache=plain, current_start=last),
            "ours": lambda: model(x, kv_cache=ours, current_start=last),
        },
        asked.repeats,
    )
    return {
        "model": "small causal model of the protocol, 1.3B attention widths, random weights",
        "tokens_per_frame": grid[0] * grid[1], "history_frames": 3 * CHUNK,
        "ours_over_stock": over(taken["ours"], taken["stock"]),
    }  # fmt: skip


def staged(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Cache work of one draft in one layer: 16 heads of 64, a frame of 512 tokens, float32."""
    rows, new = [], torch.randn(2, 1, 16, 512, 64)
    for history in (2048, 8192):
        theirs = DynamicCache()
        theirs.update(*torch.randn(2, 1, 16, history, 64), 0)
        layout = FrameLayout(rows=1, cols=512, header=0, footer=0, new_line=False)
        ours = FrameCache(
            FullCache(), layers=1, kv_heads=16, head_dim=64, layout=layout, text=(0,),
            positions="absolute",
        )  # fmt: skip
        fill(ours, history // 512)
        ours.open(Span.of_frame(Role.HISTORY, history // 512, layout))

        def crop(cache: DynamicCache = theirs) -> None:
            cache.update(*new, 0)
            cache.crop(-512)

        taken = timed(
            {"crop": crop, "staged": lambda cache=ours: cache.update(0, *new[:, 0])},
            10 * asked.repeats,
        )
        rows.append(
            {
                "history": history,
                "crop_ms": 1000 * float(np.median(taken["crop"])),
                "staged_ms": 1000 * float(np.median(taken["staged"])),
                "saving": over(taken["crop"], taken["staged"]),
            }
        )
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(832, 480), metavar=("W", "H"))
    parser.add_argument("--layers", type=int, default=1, help="depth, cut")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapters.json"))
    asked = parser.parse_args()
    dtype = getattr(torch, asked.dtype)
    result = {
        "schema": "packcache.adapters/1",
        "environment": environment("cpu", dtype),
        "workload": {
            "depth": DEPTH, "drafts": DRAFTS, "frames_per_chunk": CHUNK, "window": TRAINED,
            "repeats": asked.repeats, "interleaved": True,
        },
        "staged": staged(asked),
        "self_forcing": self_forcing(asked),
        "wan": wan(asked, dtype),
    }  # fmt: skip
    write_json(result, asked.out)
    print("\n".join(lines(result)))


def lines(result: dict[str, Any]) -> list[str]:
    """The result as text."""
    found = result["wan"]
    told = [f"{found['model']}, {found['layers']} layer(s) of {DEPTH}"]
    for row in found["rows"]:
        told.append(
            f"  {row['policy']:12} {row['history_tokens']:6} tokens {row['kv_gib']:6.2f} GiB "
            f"{row['chunk_s']:8.0f} s a chunk  {row['faster']['ratio']:.2f}x faster"
        )
    off, own = found["off_over_stock"], result["self_forcing"]["ours_over_stock"]
    told.append(f"off: {off['ratio']:.3f}x ({off['low']:.3f} to {off['high']:.3f})")
    kept = f"{own['ratio']:.3f}x ({own['low']:.3f} to {own['high']:.3f})"
    told.append(f"self-forcing, all kept: {kept}")
    for row in result["staged"]:
        told.append(
            f"draft at {row['history']}: crop {row['crop_ms']:.2f} ms, staged "
            f"{row['staged_ms']:.2f} ms, {row['saving']['ratio']:.0f}x"
        )
    return told


if __name__ == "__main__":
    main()
