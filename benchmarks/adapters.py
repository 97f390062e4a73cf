"""What the cache gains in other models: memory, seconds, and what it costs when it is off.

    python benchmarks/adapters.py        # real widths, one layer each; half an hour on two cores

Full attention over the window that a model was trained with, sink and window, and PackCache of as
many tokens, in turns, random weights, histories of random keys and values. Depth is cut to one
layer and seconds are put together from that.

- diffusers' own `WanTransformer3DModel`, 1.3B widths at 480x832: a forward of a chunk after as many
  latent frames as fill the cache, embeddings and head with it, so many times as there are layers,
  for each draft and the commit. Overhead when off: the transformer as it is, and installed but off.
- Self-Forcing's protocol: the same with a small causal model of Wan's block widths, without cross
  attention; beside it the list of dicts that a pipeline makes, and ours keeping everything.
- transformers' own `Emu3ForCausalLM`, 8B widths: one token after as many latent frames; a layer is
  what one adds to none. Beside it `DynamicCache` over the same window.
- What a draft costs in transformers: `DynamicCache` with `crop`, and a staged cache.

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
from transformers import DynamicCache, Emu3ForCausalLM, Emu3TextConfig

from packcache.adapters.diffusers import Installed, install
from packcache.adapters.self_forcing import SelfForcingCache
from packcache.adapters.transformers import make_cache
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

#: Wan 1.3B: hidden width of the MLP. Emu3: layers, tokens of a latent frame at 512x512, widths.
HIDDEN = 8960
EMU3_DEPTH, EMU3_FRAME = 32, 64 * 64
EMU3: dict[str, int] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 184622,
}  # fmt: skip

#: A token is soon made: it is timed so many times as often.
OFTEN = 5

Turn = Callable[[], object]


def policies(chunk: int = CHUNK) -> dict[str, Policy]:
    """History beside the open chunk: the trained window, a third of it by sinks, or packed."""
    whole = TRAINED - chunk
    few = round(whole / 3)
    return {
        "full window": SlidingWindow(frames=whole),
        "sink+window": SinkWindow(sinks=chunk, frames=few - chunk),
        "packcache": PackCache(budget=few, window=whole),
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


def held(name: str, cache: FrameCache, depth: float) -> dict[str, Any]:
    """A row's first half; `depth` layers of the model stand for each one that was run."""
    return {
        "policy": name,
        "settings": repr(cache.policy),
        "history_tokens": sum(cache.timeline.counts().values()),
        "kv_gib": cache.kv_bytes * depth / 2**30,
    }


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
        rows.append(
            {
                **held(name, caches[name], DEPTH / asked.layers),
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


def self_forcing(asked: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """A draft of the open chunk over a full cache, by policy and over the pipeline's own dicts."""
    grid = asked.size[1] // 16, asked.size[0] // 16
    chunk = CHUNK * grid[0] * grid[1]
    settings: dict[str, Any] = {
        "layers": asked.layers, "heads": 12, "head_dim": 128, "grid": grid, "hidden": HIDDEN,
        "dtype": dtype,
    }  # fmt: skip
    model, theirs = CausalWan(**settings), CausalWan(**settings, local_attn_size=TRAINED)
    caches: dict[str, Any] = {"own dicts": dict_cache(theirs, TRAINED * grid[0] * grid[1])}
    for name, policy in {"everything": FullCache(), **policies()}.items():
        caches[name] = SelfForcingCache(policy, layers=asked.layers, grid=grid)
    x = torch.randn(1, chunk, model.width, dtype=dtype)
    turns, starts = {}, {}
    for name, cache in caches.items():
        own = theirs if name == "own dicts" else model
        # As much as the window holds for those that keep everything, more for those that do not.
        count = TRAINED // CHUNK + (0 if name == "everything" else 2)
        for number in range(count):
            own(x, kv_cache=cache, current_start=number * chunk)
        starts[name] = (count - 1) * chunk
        turns[name] = functools.partial(own, x, kv_cache=cache, current_start=starts[name])
    seconds = timed(turns, asked.repeats)
    rows = []
    for name in policies():
        cache, taken = caches[name].cache, seconds[name]
        rows.append(
            {
                **held(name, cache, DEPTH / asked.layers),
                "forward_s": float(np.median(taken)),
                "chunk_s": float(np.median(taken)) * (DRAFTS + 1) * DEPTH / asked.layers,
                "faster": over(seconds["own dicts"], taken),
            }
        )
    buffers = sum(own[part].nbytes for own in caches["own dicts"] for part in ("k", "v"))
    forward = float(np.median(seconds["own dicts"]))
    return {
        "model": "small causal model of the protocol, 1.3B block widths, random weights",
        "layers": asked.layers, "size": list(asked.size), "tokens_per_frame": grid[0] * grid[1],
        "own_dicts": {
            "kv_gib": buffers * DEPTH / asked.layers / 2**30, "forward_s": forward,
            "chunk_s": forward * (DRAFTS + 1) * DEPTH / asked.layers,
        },
        "everything_over_own_dicts": over(seconds["everything"], seconds["own dicts"]),
        "rows": rows,
    }  # fmt: skip


def emu3(asked: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of the next token over a full cache, by policy and with transformers' own cache."""
    widths = {name: max(4, size // asked.shrink) for name, size in EMU3.items()}
    config = Emu3TextConfig(**widths, num_hidden_layers=1, pad_token_id=0)
    tokens = EMU3_FRAME // asked.shrink
    torch.set_default_dtype(dtype)  # widths of this kind are drawn where they stay
    model = Emu3ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    last = torch.ones(1, 1, dtype=torch.long)
    turns: dict[str, Turn] = {}
    caches: dict[str, Any] = {}
    for name, policy in policies(chunk=1).items():
        caches[name] = make_cache(model, policy, tokens)
        model(last.expand(1, 32), past_key_values=caches[name])  # the prompt
        caches[name].commit()
        fill(caches[name].held, TRAINED + 1)
        turns[name] = functools.partial(model, last, past_key_values=caches[name])
    own = DynamicCache()
    store = caches["full window"].held.stores[0]
    size = 1, store.kv_heads, (TRAINED - 1) * tokens + 32, store.head_dim
    own.update(*torch.randn(2, *size).to(dtype), 0)
    turns["own cache"] = functools.partial(model, last, past_key_values=own)
    turns["ends"] = functools.partial(_without_layers, model, last)
    seconds = {name: np.array(t) for name, t in timed(turns, OFTEN * asked.repeats).items()}
    ends = float(np.median(seconds.pop("ends")))
    whole = {name: ends + EMU3_DEPTH * (taken - ends) for name, taken in seconds.items()}
    rows = [
        {
            **held(name, caches[name].held, EMU3_DEPTH),
            "token_s": float(np.median(whole[name])),
            "faster": over(whole["full window"], whole[name]),
        }
        for name in policies(chunk=1)
    ]
    return {
        "model": "Emu3ForCausalLM, 8B widths, random weights" if asked.shrink == 1 else "shrunk",
        "layers": 1, "depth": EMU3_DEPTH, "tokens_per_frame": tokens, "ends_s": ends,
        "own_cache": {
            "token_s": float(np.median(whole["own cache"])),
            "kv_gib": int(np.prod(size)) * 2 * dtype.itemsize * EMU3_DEPTH / 2**30,
            "full_window_faster": over(whole["own cache"], whole["full window"]),
        },
        "rows": rows,
    }  # fmt: skip


def _without_layers(model: Any, token: torch.Tensor) -> None:
    """Embedding, last norm and head."""
    body = model.model
    model.lm_head(body.norm(body.embed_tokens(token)))


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
    parser.add_argument("--shrink", type=int, default=1, help="divide Emu3's sizes, for a try")
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
        "emu3": emu3(asked, dtype),
        "self_forcing": self_forcing(asked, dtype),
        "wan": wan(asked, dtype),
    }  # fmt: skip
    write_json(result, asked.out)
    print("\n".join(lines(result)))


def lines(result: dict[str, Any]) -> list[str]:
    """The result as text."""
    told: list[str] = []
    for part, unit in (("wan", "chunk"), ("self_forcing", "chunk"), ("emu3", "token")):
        found = result[part]
        told.append(f"{found['model']}, {found['layers']} layer(s)")
        for row in found["rows"]:
            told.append(
                f"  {row['policy']:12} {row['history_tokens']:6} tokens {row['kv_gib']:6.2f} GiB "
                f"{row[unit + '_s']:8.2f} s a {unit}  {_ratio(row['faster'])} faster"
            )
    own, cache = result["self_forcing"]["own_dicts"], result["emu3"]["own_cache"]
    told += [
        f"self-forcing, own dicts: {own['kv_gib']:.2f} GiB, {own['chunk_s']:.0f} s a chunk",
        f"emu3, own cache: {cache['kv_gib']:.2f} GiB, {cache['token_s']:.2f} s a token, ours with "
        f"as many tokens {_ratio(cache['full_window_faster'])} faster",
        f"wan, off: {_ratio(result['wan']['off_over_stock'])} the time",
        "self-forcing, all kept: "
        f"{_ratio(result['self_forcing']['everything_over_own_dicts'])} the time",
    ]
    for row in result["staged"]:
        told.append(
            f"draft at {row['history']}: crop {row['crop_ms']:.2f} ms, staged "
            f"{row['staged_ms']:.2f} ms, {row['saving']['ratio']:.0f}x"
        )
    return told


def _ratio(found: dict[str, float]) -> str:
    return f"{found['ratio']:.3f}x ({found['low']:.3f} to {found['high']:.3f})"


if __name__ == "__main__":
    main()
