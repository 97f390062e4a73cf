"""Is `stock` as slow as upstream? Its seconds a step beside those of upstream's own modules.

    git clone https://github.com/alibaba-damo-academy/Lumos
    pip install transformers==4.44.2 omegaconf
    python benchmarks/stock_upstream.py --upstream Lumos

Nothing of upstream is in this file: its generation loop is imported and run on its own network.
Only its tokenizer and codec, which are not timed, are replaced. Both engines share their random
weights, hold as many latent frames, and take turns step by step in one process: in front of each
of its steps upstream's loop calls its network, which lets `stock` make one first. That both compute
the same is checked in a small model, logit by logit. On a CPU upstream's autocast, written for
CUDA, does nothing, so a CPU one of the same dtype is put around the loop.
Writes benchmarks/results/stock_upstream.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import io
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch

from packcache.bench.candidates import make_model, make_prefix, now, random_codes
from packcache.bench.parts import Workload
from packcache.bench.stock import Stock
from packcache.environment import environment
from packcache.errors import PackCacheError
from packcache.files import write_json
from packcache.lumos.config import SIZES, LumosConfig
from packcache.lumos.course import TEXT_TOKENS
from packcache.lumos.device import DTYPES, as_device, as_dtype
from packcache.lumos.model import Lumos
from packcache.lumos.schedule import Sampling
from packcache.lumos.vocab import Vocab, pixel_frames

#: The file of upstream's loop, and where its checkout keeps it.
LOOP, INSIDE = "inference_solver_vid.py", Path("lumos-1", "lumos-1")

#: The files whose code is timed.
TIMED = (
    LOOP,
    "model/chameleon/modeling_chameleon_mm_rope.py",
    "model/sampling.py",
    "model/utils.py",
)

#: What the loop's file imports and this benchmark never calls.
NEVER_CALLED = ("data.item_processor",)

#: The same, if it is not installed.
MAY_LACK = ("cv2", "torchvision")

#: Steps of upstream's that are not counted: its pass over everything, and one with each engine.
WARM_UP = 3

#: Steps over which the parts of `stock` are summed.
PARTED = 3

RESAMPLES = 10_000

#: `stock` must come this close.
PROMISED = 0.10


# --- upstream -------------------------------------------------------------------------------------


def find_upstream(folder: Path) -> Path:
    """Where a checkout keeps the loop."""
    for place in (folder, folder / INSIDE):
        if (place / LOOP).is_file():
            return place
    raise SystemExit(f"--upstream {folder} holds no {LOOP}: expected a checkout of Lumos-1")


def fingerprint(folder: Path) -> dict[str, str]:
    """Which upstream it was: SHA-256 of the files that are timed."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in TIMED}


def load_upstream(folder: Path) -> ModuleType:
    """The module of upstream's loop."""
    try:
        import transformers.generation.logits_process
        import transformers.modeling_utils  # noqa: F401  # looks for real modules, so it comes first
    except ImportError:
        raise SystemExit("upstream needs transformers: pip install transformers==4.44.2") from None
    for name in NEVER_CALLED + tuple(n for n in MAY_LACK if importlib.util.find_spec(n) is None):
        sys.modules[name] = MagicMock()
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(LOOP.removesuffix(".py"))
    except ImportError as error:
        raise SystemExit(f"upstream cannot be imported: {error}") from None


def upstream_network(upstream: ModuleType, model: Lumos) -> torch.nn.Module:
    """Upstream's network with our weights, shared."""
    from transformers.modeling_utils import no_init_weights

    configuration = importlib.import_module("model.chameleon.configuration_chameleon")
    config = model.config
    shapes = {
        name: getattr(config, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps",
            "model_parallel_size", "swin_norm",
        )
    }  # fmt: skip
    codec = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}  # never run
    with no_init_weights():
        network = upstream.ChameleonMMRoPEForConditionalGeneration(
            configuration.ChameleonConfig(
                **shapes,
                mm_rope=True,
                mask_image_logits=False,
                vocabulary_map={"<image>": 1},
                vq_config=codec,
            )
        )
    missing, unknown = network.load_state_dict(model.state_dict(), strict=False, assign=True)
    left = [name for name in missing if "vqmodel" not in name]
    if left or unknown:
        raise SystemExit(f"upstream's network has other weights: {left + unknown}")
    ids, body = config.token_ids, network.model
    body.image_start_token, body.image_end_token = ids.image_start, ids.image_end
    body.size_token_zero = ids.size_zero
    return network.to(model.lm_head.weight.device).eval().requires_grad_(False)


class Watched:
    """A network that tells before each of the loop's steps: it is called twice in one.

    With `keeps` the logits of the first step are kept in `first`.
    """

    def __init__(
        self, network: torch.nn.Module, before_step: Callable[[], None], *, keeps: bool = False
    ) -> None:
        self.network, self.before_step, self.keeps, self.calls = network, before_step, keeps, 0
        self.cache: Any = None
        self.first: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, **inputs: Any) -> Any:
        if self.calls % 2 == 0:
            self.before_step()
        self.calls += 1
        self.cache = inputs["past_key_values"]
        output = self.network(**inputs)
        if self.keeps and len(self.first) < 2:
            self.first.append(output["logits"][0])
        return output


class Words:
    """What upstream's loop asks of its tokenizer: ids by name, and the prompt."""

    patch_size = 32

    def __init__(self, config: LumosConfig, prompt: Sequence[int]) -> None:
        ids = config.token_ids
        self.numbers, self.prompt = ids.numbers, list(prompt)
        for name in ("image_start", "image_end", "video_start", "video_end", "sep", "new_line"):
            setattr(self, f"{name}_token", getattr(ids, name))
        self.mask_token = ids.mask

    def get_n_grids_token(self, number: int) -> int:
        return self.numbers[number]

    def token2id(self, token: int) -> int:
        return token

    def process_item(self, item: object) -> list[int]:
        return self.prompt


def run_upstream(upstream: ModuleType, network: Watched, work: Workload, held: int) -> None:
    """Upstream's loop makes one latent frame behind `held` given ones."""
    config, ids = work.config, work.config.token_ids
    vocab = Vocab(config)
    frames = [vocab.frame(work.layout, random_codes(work, f)[0]).tolist() for f in range(held)]
    prompt = [*make_prefix(work).ids, *itertools.chain(*frames), ids.video_end, ids.sep]
    solver = object.__new__(upstream.FlexARVidInferenceSolver)
    solver.model, solver.item_processor = network, Words(config, prompt)
    solver.dtype, solver.visual_tokenizer = work.dtype, "Cosmos-Tokenizer-DV4x8x8"
    solver.temporal_compression, solver.spatial_compression = config.compression[:2]
    solver.vae_st_compress = config.compression[:0:-1]
    solver.decode_video_ids = lambda tokens, path: None
    everything = torch.arange(config.vocab_size, device=work.device)
    suppressed = (everything < ids.video_lo) | (everything >= ids.video_hi)
    narrow = work.device.type == "cpu" and work.dtype != torch.float32
    with (
        contextlib.redirect_stdout(io.StringIO()),
        torch.autocast("cpu", work.dtype, enabled=narrow),
    ):
        solver.generate_maskedAR_mmrope_v8_newcache(
            qas=[["", ""]],
            max_gen_len=0,
            temperature=work.sampling.temperature,
            output_video_path="",
            fps_duration=(pixel_frames(held + 1, config.compression[0]), 1),
            generation_task="vp",
            timesteps=work.sampling.steps,
            guidance_scale=work.sampling.guidance,
            mask_history_ratio=work.sampling.history_mask_ratio,
            logits_processor=[None, SimpleNamespace(suppress_cosmos_video_token_mask=suppressed)],
        )


# --- both -----------------------------------------------------------------------------------------


class Turns:
    """Seconds of the steps of both engines, one after the other, as upstream's loop goes on."""

    def __init__(self, stock: Stock, pairs: int, device: torch.device) -> None:
        self.device = device
        self.making = stock.making(range(pairs + 1))  # one to warm up
        self.begun = 0
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.once: dict[str, float] = {}
        self.since = 0.0

    def before_step(self) -> None:
        """A step of upstream's is about to begin, and what was before it has ended."""
        spent = now(self.device) - self.since
        if self.begun == 0:
            self.once["upstream_open_s"] = spent
        elif self.begun > WARM_UP:
            self.theirs.append(spent)
        if self.begun == WARM_UP - 1:
            self.once["stock_open_s"] = next(self.making)[1]
            next(self.making)
        elif self.begun >= WARM_UP:
            what, seconds = next(self.making)
            if what == "step":
                self.ours.append(seconds)
            else:
                self.once["stock_commit_s"] = seconds
        self.begun += 1
        self.since = now(self.device)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.since = now(self.device)
        yield
        self.once["upstream_commit_s"] = now(self.device) - self.since


def measure(upstream: ModuleType, work: Workload, held: int) -> dict[str, Any]:
    """Both engines' seconds a step, their ratio, and what each part of `stock` takes."""
    torch.manual_seed(work.seed)
    model = make_model(work)
    stock = Stock(model, work)
    stock.prefill()
    for _ in range(held):
        stock.advance()
    stock.rehearse([0])  # warm up
    parts = dict(stock.shares([1] * PARTED))
    turns = Turns(stock, work.sampling.steps - WARM_UP, work.device)
    network = Watched(upstream_network(upstream, model), turns.before_step)
    with turns.running():
        run_upstream(upstream, network, work, held)
    once = {name: parts.pop(name) for name in ("mask", "positions", "commit")}
    return {
        "dtype": name_of(work.dtype),
        "largest_logit_difference": difference(upstream, work),
        **compared(turns.ours, turns.theirs),
        **turns.once,
        "stock_cache": [name_of(t.dtype) for t in stock.caches[0].layers[0]],
        "upstream_cache": [name_of(t.dtype) for t in network.cache[0]],
        "stock_parts_of_a_step_s": {name: s / PARTED for name, s in parts.items()},
        "stock_once_a_frame_s": once,
    }


def difference(upstream: ModuleType, work: Workload) -> float:
    """Largest difference of any logit in the first pass of both engines over a small clip."""
    config = SIZES["toy"]
    sizes = {"config": config, "layout": Vocab(config).layout(64, 64), "latents": 2}
    work = dataclasses.replace(work, **sizes, sampling=Sampling(steps=1))
    model = make_model(work)
    stock = Stock(model, work)
    stock.prefill()
    stock.advance()
    making = stock.making()
    next(making)
    next(making)
    network = Watched(upstream_network(upstream, model), lambda: None, keeps=True)
    run_upstream(upstream, network, work, work.given)
    return max(
        float((theirs - stock.outlived[name]).abs().max())
        for name, theirs in zip(("conditional", "unconditional"), network.first, strict=True)
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compared(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Medians, and the median of the pairs' ratios with its 95 % bootstrap interval."""
    ratios = np.array(ours) / np.array(theirs)
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    middle = float(np.median(ratios))
    return {
        "pairs": len(ratios),
        "stock_step_s": float(np.median(ours)),
        "upstream_step_s": float(np.median(theirs)),
        "ratio": middle,
        "ratio_low": float(low),
        "ratio_high": float(high),
        "as_promised": abs(middle - 1) <= PROMISED,
        "all_stock_step_s": list(ours),
        "all_upstream_step_s": list(theirs),
    }


def line(row: dict[str, Any]) -> str:
    """What a row says, on one line."""
    verdict = "within" if row["as_promised"] else "not within"
    return (
        f"{row['dtype']:8}  stock {row['stock_step_s']:.3f} s a step, "
        f"upstream {row['upstream_step_s']:.3f} s: {row['ratio']:.3f}x "
        f"({row['ratio_low']:.3f} to {row['ratio_high']:.3f}, {row['pairs']} pairs), "
        f"{verdict} {PROMISED:.0%}; logits differ by {row['largest_logit_difference']:g}"
    )


# --- all of it ------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--upstream", type=Path, required=True, help="folder of upstream's checkout"
    )
    parser.add_argument("--model", default="3b", choices=sorted(SIZES))
    parser.add_argument("--layers", type=int, default=2, help="depth, cut")
    parser.add_argument("--size", type=int, nargs=2, default=(448, 256), metavar=("W", "H"))
    parser.add_argument("--held", type=int, default=2, help="latent frames in the cache")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=sorted(DTYPES)
    )
    parser.add_argument("--threads", type=int, help="of PyTorch [all]")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stock_upstream.json"))
    return parser.parse_args()


def workload(arguments: argparse.Namespace, dtype: torch.dtype) -> Workload:
    """One latent frame behind those held; the loop's steps are the pairs and the warm-up."""
    config = dataclasses.replace(SIZES[arguments.model], num_hidden_layers=arguments.layers)
    latents = arguments.held + 1
    return Workload(
        model=arguments.model,
        config=config,
        layout=Vocab(config).layout(*arguments.size),
        sampling=Sampling(steps=arguments.pairs + WARM_UP),
        task="i2v",
        size=tuple(arguments.size),
        frames=pixel_frames(latents, config.compression[0]),
        latents=latents,
        policies={},
        presets={},
        device=as_device(arguments.device),
        dtype=dtype,
        text_tokens=TEXT_TOKENS,
    )


def described(work: Workload, held: int) -> dict[str, Any]:
    return {
        "model": work.model,
        "weights": "random",
        "layers": work.config.num_hidden_layers,
        "width": work.size[0],
        "height": work.size[1],
        "tokens_per_frame": work.layout.tokens,
        "held_latents": held,
        "text_tokens": work.text_tokens,
        "guidance": work.sampling.guidance,
        "interleaved": True,
    }


def main() -> None:
    arguments = options()
    if min(arguments.pairs, arguments.held, arguments.layers) < 1:
        raise SystemExit("--pairs, --held and --layers: expected at least 1 of each")
    folder = find_upstream(arguments.upstream)
    upstream = load_upstream(folder)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"schema": "packcache.stock/1", "results": []}
    for name in arguments.dtype:
        try:
            work = workload(arguments, as_dtype(name))
        except PackCacheError as error:
            raise SystemExit(str(error)) from None
        if not result["results"]:
            result["environment"] = environment(work.device, work.dtype) | {
                "transformers": importlib.import_module("transformers").__version__,
                "upstream": fingerprint(folder),
            }
            result["workload"] = described(work, arguments.held)
        row = measure(upstream, work, arguments.held)
        print(line(row), flush=True)
        result["results"].append(row)
        write_json(result, arguments.out)


if __name__ == "__main__":
    main()
