"""Train the digits model on clips of the digits world.

    python recipes/digits/train.py --minutes 50
    python recipes/digits/train.py --export

Most steps train two copies of each clip, history as the engine commits it and frames to be decided;
a few train tube masks, as the paper does. Each step also trains first frames alone: a picture
from text is the hardest thing to learn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from clips import CHUNK, Clips, draw_scenes, inked, make_clips
from common import PACKAGE_WEIGHTS, Curve, Run, add_options
from safetensors.torch import load, save
from sequences import Sequences
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from packcache.digits.codec import DigitsCodec, load_codec
from packcache.digits.model import digits_config
from packcache.lumos.model import Lumos

TRAINED_FRAMES = 7  # latent


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What fits a machine: clips in the pool; clips and first frames a step; averaging."""

    pool: int
    clips: int
    firsts: int
    average: float
    every: int  # steps between points of the curve


SCALES = {
    "cpu": Scale(pool=4_000, clips=4, firsts=48, average=0.99, every=20),
    "cuda": Scale(pool=80_000, clips=64, firsts=384, average=0.998, every=200),
}
#: Until this share of the time clips of so many latent frames.
STAGES = ((0.15, 4), (1.0, TRAINED_FRAMES))
MUON_RATE, ADAM_RATE, WARMUP, DECAY_FROM = 0.02, 2e-3, 50, 0.6
#: Shares of steps: without text; tube masks.
NO_TEXT, TUBE = 0.1, 0.1
#: How much of the history is re-masked, by share of steps: the shipped ratio and a milder one.
RATIOS = {0.7: 0.6, 0.3: 0.4}
#: How many leading frames were given, by share of clips: none, the first, or any number.
NONE_GIVEN, FIRST_GIVEN = 0.5, 0.35
#: Share of current frames that are all mask, as at the first step of a frame.
ALL_MASK = 0.25
#: Up to this share of a clip's committed tokens is wrong, as a generated history may be.
SPOILED = 0.06


def draw_masks(rng: torch.Generator, size: int, frames: int, tokens: int) -> Tensor:
    """Which content tokens of the current copies are masked, bool `[size, frames, tokens]`."""
    share = torch.cos(math.pi / 2 * _uniform(rng, size, frames, 1))
    share[_uniform(rng, size, frames) < ALL_MASK] = 1.0
    return _first_of(rng, share, (size, frames, tokens))


def draw_tubes(rng: torch.Generator, size: int, frames: int, tokens: int) -> Tensor:
    """One ratio and one pattern for all frames of a clip, bool `[size, frames, tokens]`."""
    share = torch.cos(math.pi / 2 * _uniform(rng, size, 1, 1))
    return _first_of(rng, share, (size, 1, tokens)).expand(-1, frames, -1)


def _first_of(rng: torch.Generator, share: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A random `share` of the last axis, at least one."""
    rank = _uniform(rng, *shape).argsort(-1).argsort(-1)
    return rank < (share * shape[-1]).ceil()


def _uniform(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=rng, device=rng.device)


def draw_given(rng: torch.Generator, size: int, frames: int) -> Tensor:
    """How many leading frames of each clip are clean, int64 `[size]`."""
    kind = _uniform(rng, size)
    many = (2 + (frames - 2) * _uniform(rng, size)).long()
    first = torch.where(kind < NONE_GIVEN + FIRST_GIVEN, 1, many)
    return torch.where(kind < NONE_GIVEN, 0, first)


def spoil(rng: torch.Generator, codes: Tensor) -> Tensor:
    """Codes with up to `SPOILED` of a clip's tokens copied from elsewhere in the clip.

    A history that is never wrong would teach the model nothing about its own mistakes.
    """
    size, frames, tokens = codes.shape
    wrong = _uniform(rng, *codes.shape) < SPOILED * _uniform(rng, size, 1, 1)
    elsewhere = (_uniform(rng, size, frames * tokens) * (frames * tokens)).long()
    other = codes.flatten(1).gather(1, elsewhere).view_as(codes)
    return torch.where(wrong, other, codes)


def initialise(model: Lumos) -> None:
    """Small rows; a code's row sums its levels' rows, and the head starts as the embedding.

    So neighbouring codes start alike, and repeating a seen token is easy to learn.
    """
    ids, levels = model.config.token_ids, model.config.fsq_levels
    rows = model.model.embed_tokens.weight
    nn.init.normal_(rows, std=0.05)
    code = torch.arange(ids.num_codes)
    with torch.no_grad():
        for level in levels:
            rows[ids.video_lo :] += torch.randn(level, rows.shape[1])[code % level] * 0.05
            code //= level
        model.lm_head.weight.copy_(rows)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)


def optimisers(model: Lumos) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding, head and norms."""
    named = list(model.named_parameters())
    inner = {name for name, p in named if "_proj" in name}
    matrices = [p for name, p in named if name in inner]
    rest = [p for name, p in named if name not in inner]
    return (
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    )


def rate_factor(step: int, share: float) -> float:
    """Learning rate over its peak: a short warm-up, constant, then down to a twentieth."""
    late = max(0.0, (share - DECAY_FROM) / (1 - DECAY_FROM))
    return min(1.0, (step + 1) / WARMUP) * (1 - 0.95 * late)


class Trainer:
    """Model, averages, optimisers and the shapes of sequences in use."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.device, self.seed = args.device, args.seed
        self.scale = SCALES[torch.device(args.device).type]
        self.model = Lumos(digits_config())
        initialise(self.model)
        if args.init:
            weights = load(args.init.read_bytes())
            self.model.load_state_dict({name: value.float() for name, value in weights.items()})
        self.model.to(args.device)
        self.averaged = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(self.scale.average)
        )
        self.optimisers = optimisers(self.model)
        if args.compile:
            for layer in self.model.model.layers:
                layer.compile(dynamic=True)
        self.shapes: dict[tuple[int, bool, bool], Sequences] = {}

    def state(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        muon, adam = self.optimisers
        return {"model": self.model, "averaged": self.averaged, "muon": muon, "adam": adam}

    def shape(self, frames: int, text: bool, tube: bool = False) -> Sequences:
        key = (frames, text, tube)
        if key not in self.shapes:
            self.shapes[key] = Sequences(self.model, frames, text, tube=tube)
        return self.shapes[key]

    def step(self, pool: Clips, number: int, frames: int, rate: float) -> tuple[Tensor, Tensor]:
        """One step; returns the clips' and the first frames' loss a masked token."""
        for optimiser, peak in zip(self.optimisers, (MUON_RATE, ADAM_RATE), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * rate
        rng = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + number)
        luck = np.random.default_rng((self.seed, number)).random(4)
        tube = bool(luck[0] < TUBE)
        ratio = next(
            ratio
            for ratio, up_to in zip(RATIOS, itertools.accumulate(RATIOS.values()), strict=True)
            if luck[1] < up_to
        )
        length = self.shape(frames, bool(luck[2] >= NO_TEXT), tube)
        losses = [self._backward(rng, pool, length, self.scale.clips, ratio)]
        alone = self.shape(1, bool(luck[3] >= NO_TEXT))
        losses.append(self._backward(rng, pool, alone, self.scale.firsts, ratio))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.averaged.update_parameters(self.model)
        return losses[0], losses[1]

    def _backward(
        self, rng: torch.Generator, pool: Clips, shape: Sequences, count: int, ratio: float
    ) -> Tensor:
        index = (_uniform(rng, count) * len(pool)).long()
        clips = pool.pick(index, shape.frames)
        draw = draw_tubes if shape.tube else draw_masks
        hidden = draw(rng, count, shape.frames, clips.codes.shape[-1])
        given = draw_given(rng, count, shape.frames)
        past = spoil(rng, clips.codes)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            ids = shape.ids(clips, given, hidden, ratio=ratio, past=past)
            logits = shape.logits(self.model, ids, hidden)
        loss = F.cross_entropy(logits, clips.codes[hidden])
        loss.backward()
        return loss.detach()


def train(args: argparse.Namespace) -> None:
    fresh_codec = args.out.with_name("codec.safetensors")
    codec = load_codec(fresh_codec if fresh_codec.exists() else None)
    scale = SCALES[torch.device(args.device).type]
    pool = make_clips(
        codec, args.device, args.seed + 1, scale.pool, "train", TRAINED_FRAMES, args.workers
    )
    held_out = HeldOut(codec, args.device)
    trainer = Trainer(args)
    run = Run(args, trainer.state())
    curve = Curve(args.curve, fresh=run.step == 0)
    losses: list[tuple[Tensor, Tensor]] = []
    while run.share < 1:
        frames = next(length for until, length in STAGES if run.share < until or until == 1)
        frames = TRAINED_FRAMES if args.init else frames
        rate = rate_factor(run.step, run.share)
        losses.append(trainer.step(pool, run.step, frames, rate))
        checkpointed = run.advance()
        if run.step % scale.every == 0:
            clips, firsts = torch.tensor(losses).mean(0).tolist()
            curve.add(step=run.step, minutes=run.minutes, loss=clips, loss_first=firsts, rate=rate)
            losses = []
        if checkpointed:
            curve.add(step=run.step, minutes=run.minutes, **held_out.measure(trainer))
    run.save()
    curve.add(step=run.step, minutes=run.minutes, **held_out.measure(trainer))
    write_weights(trainer.averaged.module, args.out)


class HeldOut:
    """Clips of scans never trained on, and which of their tokens show a digit."""

    COUNT = 2 * CHUNK

    def __init__(self, codec: DigitsCodec, device: str) -> None:
        self.clips = make_clips(codec, device, 0, self.COUNT, "test", TRAINED_FRAMES)
        scenes = [s for n in range(self.COUNT // CHUNK) for s in draw_scenes(n, "test")]
        self.ink = inked(codec, scenes, TRAINED_FRAMES)
        frames = torch.arange(TRAINED_FRAMES)
        rises = torch.tensor([s.curtain.rises if s.curtain else -1 for s in scenes])
        self.returned = (frames == rises[:, None]).to(device)

    @torch.no_grad()
    def measure(self, trainer: Trainer) -> dict[str, float]:
        """Share of digits' tokens that are right in all-masked frames, given re-masked history.

        `returned` counts the frames in which a curtain rises; `loss_first` is text to picture.
        """
        start = time.perf_counter()
        shape = trainer.shape(TRAINED_FRAMES, True)
        clips, model = self.clips.pick(torch.arange(self.COUNT), TRAINED_FRAMES), trainer.averaged
        hidden = torch.ones_like(clips.codes, dtype=torch.bool)
        ids = shape.ids(clips, torch.zeros_like(clips.codes[:, 0, 0]), hidden, ratio=0.7)
        parts = zip(ids.split(20), hidden.split(20), strict=True)
        with torch.autocast(torch.device(trainer.device).type, torch.bfloat16):
            logits = torch.cat([shape.logits(model, *part) for part in parts])
        logits = logits.unflatten(0, tuple(hidden.shape))
        first = F.cross_entropy(logits[:, 0].flatten(0, 1), clips.codes[:, 0].flatten())
        right = logits.argmax(-1) == clips.codes
        share = {
            f"accuracy_{f}": right[:, f][self.ink[:, f]].float().mean().item() for f in (1, 3, 6)
        }
        back = self.ink & self.returned[..., None]
        return {
            **share,
            "accuracy_returned": right[back].float().mean().item(),
            "loss_first": first.item(),
            "seconds_measuring": time.perf_counter() - start,
        }


def write_weights(model: Lumos, path: Path) -> None:
    """Weights in bfloat16 and `config.json` beside them."""
    weights = {name: value.bfloat16().contiguous() for name, value in model.state_dict().items()}
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(save(weights))
    temporary.replace(path)
    path.with_name("config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights of the checkpoint into the package."""
    averaged = AveragedModel(Lumos(digits_config()))
    checkpoint = torch.load(args.out.with_suffix(".checkpoint.pt"), map_location="cpu")
    averaged.load_state_dict(checkpoint["averaged"])
    write_weights(averaged.module, PACKAGE_WEIGHTS / "model.safetensors")
    print(f"step {checkpoint['step']}, {checkpoint['minutes']:.1f} minutes -> {PACKAGE_WEIGHTS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, "model", minutes=50)
    parser.add_argument("--init", type=Path, help="start from these weights, on whole clips")
    parser.add_argument("--compile", action="store_true", help="fuse the layers (torch.compile)")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.export:
        export(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
