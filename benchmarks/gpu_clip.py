"""What does a clip take on a GPU: seconds a latent frame and peak memory, planned and measured?

    python benchmarks/gpu_clip.py                            # 3B, 672x384, 24 and 48 frames
    python benchmarks/gpu_clip.py --steps 4                  # a fast look: "sampled", not the claim
    python benchmarks/gpu_clip.py --memory 16GiB             # as if the card were that small

Image-to-video with random weights and a given latent frame of random codes; no codec. Weights are
drawn on the device, a short clip warms up, then each policy makes each clip. A run that does not
fit is a row that says so. Every finished run is written at once, so a run cut short loses one row.
Peak memory is that of the allocator; a CUDA context takes some hundred MiB beside it.
Writes benchmarks/results/gpu_clip.json.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packcache import positions
from packcache.environment import environment
from packcache.errors import PackCacheError, is_out_of_memory
from packcache.files import write_text
from packcache.lumos.clip import Stats
from packcache.lumos.config import SIZES, LumosConfig
from packcache.lumos.decode import Decoder
from packcache.lumos.device import DTYPES, as_device, as_dtype
from packcache.lumos.model import Lumos
from packcache.lumos.plan import TEXT_TOKENS, Plan, parse_bytes, plan, show_bytes
from packcache.lumos.schedule import Sampling, philox_draws
from packcache.lumos.vocab import Vocab, latent_frames
from packcache.lumos.weights import parameter_count
from packcache.models import FPS, SIZE
from packcache.policies import PackCache, Policy, parse_policies
from packcache.timeline import FrameLayout

POLICIES = "full,packcache"

#: What was promised of image-to-video at `SIZE` with PackCache, whatever the clip's length.
PROMISES = {"3b": parse_bytes("14GiB"), "1b": parse_bytes("6GiB")}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All of the workload but policy and length."""

    name: str
    model: Lumos
    size: tuple[int, int]
    sampling: Sampling

    @property
    def config(self) -> LumosConfig:
        return self.model.config

    @property
    def layout(self) -> FrameLayout:
        return Vocab(self.config).layout(*self.size)

    @property
    def weight(self) -> Tensor:
        """Where and what all weights are."""
        return self.model.lm_head.weight

    def plan(self, policy: Policy, frames: int) -> Plan:
        return plan(
            self.config,
            size=self.size,
            frames=frames,
            policy=policy,
            sampling=self.sampling,
            dtype=self.weight.dtype,
            text_tokens=TEXT_TOKENS,
        )

    def decoder(self, policy: Policy, frames: int) -> Decoder:
        vocab = Vocab(self.config)
        header = {"seconds": max(1, -(-frames // FPS)), "fps": FPS}
        text = [self.config.token_ids.bos] * (TEXT_TOKENS - len(vocab.prefix([], **header).ids))
        return Decoder(
            self.model,
            [vocab.prefix(text, **header)],
            layout=self.layout,
            sampling=self.sampling,
            policy=policy,
            draws=philox_draws([0], self.sampling.steps, self.layout.content),
            latents=latent_frames(frames, self.config.compression[0]),
        )

    def given(self) -> Tensor:
        """Random codes `[1, 1, rows, cols]` of a condition image."""
        shape = (1, 1, self.layout.rows, self.layout.cols)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.config.token_ids.num_codes, shape, generator=generator)


def random_model(config: LumosConfig, device: torch.device, dtype: torch.dtype) -> Lumos:
    """Random weights drawn where they stay: 3.6 billion numbers take minutes on a CPU."""
    with torch.device("meta"):
        model = Lumos(config)
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, like in model.state_dict().items():
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        weight = torch.empty(like.shape, dtype=dtype, device=device)
        weights[name] = weight.normal_(centre, 0.02, generator=generator)
    model.load_state_dict(weights, assign=True)
    model.inv_freq = positions.inverse_frequencies(config.head_dim, config.rope_theta).to(device)
    model.axes = positions.pair_axes(config.head_dim).to(device)
    return model.eval().requires_grad_(False)


# --- one run --------------------------------------------------------------------------------------


def forget(device: torch.device) -> int | None:
    """Give back what an earlier run left, and count the peak from here; bytes still allocated."""
    gc.collect()
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peaks(device: torch.device) -> dict[str, int | None]:
    """Bytes at the peak, as tensors asked for them, with the allocator's rounding, and as taken
    from the device; None where there is no CUDA allocator to ask.
    """
    kinds = ("requested", "allocated", "reserved")
    stats = torch.cuda.memory_stats(device) if device.type == "cuda" else {}
    return {f"peak_{kind}_bytes": stats.get(f"{kind}_bytes.all.peak") for kind in kinds}


def run(bench: Bench, policy: Policy, frames: int) -> dict[str, Any]:
    """A clip: what it took, or how far it came before memory ran out."""
    stats = Stats()
    try:
        decoder = bench.decoder(policy, frames)
        for result in decoder.frames(bench.given()):
            stats.prefill_s = decoder.prefill_s
            stats.add(result)
    except RuntimeError as error:
        if not is_out_of_memory(str(error)):
            raise
        return {"outcome": "out of memory", "latent_frames_done": len(stats.frame_s)}
    row = stats.to_json()
    del row["codec_s"]
    return {"outcome": "done", "latent_frames_done": len(stats.frame_s), **row}


def measure(bench: Bench, label: str, policy: Policy, frames: int) -> dict[str, Any]:
    """One row of the results: run, memory, and what the plan said."""
    made = bench.plan(policy, frames)
    device = bench.weight.device
    row = {"policy": label, "setting": repr(policy), "frames": frames}
    row |= {"before_bytes": forget(device), **run(bench, policy, frames), **peaks(device)}
    row |= {
        "planned_peak_bytes": made.total_bytes,
        "planned_kv_bytes": made.kv_bytes,
        "planned_relative_total": made.relative_total,
        "planned_relative_last": made.relative_last,
    }
    return row | promise(bench, policy, row)


def promise(bench: Bench, policy: Policy, row: dict[str, Any]) -> dict[str, Any]:
    """Whether the promise holds for what was allocated; None if nothing was promised or measured.

    What the allocator reserves is more where there is room, so it is told beside and not judged.
    """
    as_promised = bench.size == SIZE and policy == PackCache()
    as_promised &= bench.weight.dtype == torch.bfloat16
    promised = PROMISES.get(bench.name) if as_promised else None
    peak, holds = row["peak_allocated_bytes"], None
    if promised is not None and peak is not None:
        holds = row["outcome"] == "done" and peak <= promised
    return {"promised_bytes": promised, "promise_holds": holds}


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with times as a share of the full cache's for a clip of as many frames."""
    full = {r["frames"]: r for r in rows if r["policy"] == "full" and r["outcome"] == "done"}
    for row in rows:
        base = full.get(row["frames"]) if row["outcome"] == "done" else None
        for name in ("total", "last"):
            share = row[f"{name}_s"] / base[f"{name}_s"] if base else None
            row[f"relative_{name}"] = share
    return rows


def line(row: dict[str, Any]) -> str:
    """What a row says, on one line."""
    peak = row["peak_allocated_bytes"]
    took = "not measured" if peak is None else show_bytes(peak)
    text = f"{row['frames']} frames  {row['policy']:10} "
    if row["outcome"] == "done":
        text += f"TOTAL {row['total_s']:8.2f} s  LAST {row['last_s']:7.3f} s  "
        text += f"KV {show_bytes(row['kv_bytes'][-1])} "
        text += f"(planned {show_bytes(row['planned_kv_bytes'])})  "
    else:
        text += f"{row['outcome']} in latent frame {row['latent_frames_done']}  "
    text += f"peak {took} (planned {show_bytes(row['planned_peak_bytes'])})"
    if row["promise_holds"] is not None:
        kept = "holds" if row["promise_holds"] else "broken"
        text += f"  promise of {show_bytes(row['promised_bytes'])} {kept}"
    return text


# --- all of them ----------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="3b", choices=sorted(SIZES))
    parser.add_argument("--size", type=int, nargs=2, default=SIZE, metavar=("W", "H"))
    parser.add_argument("--frames", type=int, nargs="+", default=(24, 48))
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--steps", type=int, default=Sampling.steps, help="fewer: a sample")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--memory", type=parse_bytes, help="cap the allocator, such as 16GiB")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_clip.json"))
    return parser.parse_args()


def workload(bench: Bench, memory: int | None) -> dict[str, Any]:
    return {
        "model": bench.name,
        "parameters": parameter_count(bench.config),
        "weights": "random",
        "width": bench.size[0],
        "height": bench.size[1],
        "tokens_per_frame": bench.layout.tokens,
        "given_latents": 1,
        "text_tokens": TEXT_TOKENS,
        "guidance": bench.sampling.guidance,
        "steps": bench.sampling.steps,
        "sampled": bench.sampling.steps < Sampling.steps,
        "memory_cap_bytes": memory,
    }


def cap(device: torch.device, memory: int) -> None:
    """Let the allocator have so many bytes and no more."""
    if device.type != "cuda":
        raise SystemExit(f"memory can be capped on a CUDA device only, device is {device}")
    there = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory / there), device.index)


def main() -> None:
    arguments = options()
    try:
        device, dtype = as_device(arguments.device), as_dtype(arguments.dtype)
        policies = parse_policies(arguments.policies)
        sampling = Sampling(steps=arguments.steps)
        Vocab(SIZES[arguments.model]).layout(*arguments.size)
    except PackCacheError as error:
        raise SystemExit(str(error)) from None
    if arguments.memory:
        cap(device, arguments.memory)
    bench = Bench(
        name=arguments.model,
        model=random_model(SIZES[arguments.model], device, dtype),
        size=tuple(arguments.size),
        sampling=sampling,
    )
    result = {
        "schema": "packcache.gpu_clip/1",
        "environment": environment(device, dtype),
        "workload": workload(bench, arguments.memory),
        "results": [],
    }
    run(replace(bench, sampling=Sampling(steps=1)), PackCache(), frames=5)  # warm up
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for frames in arguments.frames:
        for label, policy in policies.items():
            rows.append(measure(bench, label, policy, frames))
            print(line(rows[-1]), flush=True)
            result["results"] = compared(rows)
            write_text(arguments.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
