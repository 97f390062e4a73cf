"""Train the digits model on two copies of each clip: history as the engine commits it, and masks.

    python recipes/digits/train.py --minutes 50 --out build/digits/model.safetensors
    python recipes/digits/train.py --out build/digits/model.safetensors --export

A training sequence is: prefix, committed copies of the frames (30 % re-masked, as the cache will
hold them), current copies of the same frames at the same positions, each with masks of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import PACKAGE_WEIGHTS, Curve, Run, add_options, to_float
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from packcache.digits import world
from packcache.digits.codec import DigitsCodec, load_codec
from packcache.digits.model import FPS, SAMPLING, SECONDS, digits_config, text_ids
from packcache.lumos.model import Lumos
from packcache.lumos.schedule import history_mask
from packcache.lumos.vocab import Vocab, pixel_frames

TRAINED_FRAMES = 7  # latent
POOL = 8000  # clips
#: Stages: until this share of the time, clips of so many latent frames, so many clips a step.
STAGES = ((0.36, 4, 16), (1.0, TRAINED_FRAMES, 5))
#: Besides, so many first frames alone: a picture from text is the hardest thing to learn.
FIRST_FRAMES = 112
MUON_RATE, ADAM_RATE, WARMUP, DECAY_FROM = 0.02, 2e-3, 30, 0.6
#: Shares of clips: without text, without the direction, first frame clean as if it were given.
NO_TEXT, NO_DIRECTION, GIVEN = 0.1, 0.1, 0.5
#: Share of current frames that are all mask, as at the first step of a frame.
ALL_MASK = 0.25
#: Up to this share of a clip's committed tokens is wrong, as a generated history may be.
SPOILED = 0.06
EMA = 0.99


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Tokenised clips: codes int64 `[N, frames, 64]` and prompt token ids int64 `[N, words]`."""

    codes: Tensor
    text: Tensor

    def pick(self, index: Tensor, frames: int) -> Clips:
        return Clips(codes=self.codes[index, :frames], text=self.text[index])


def make_clips(
    codec: DigitsCodec, seed: int, count: int, split: world.Split, no_direction: float = 0.0
) -> Clips:
    """Render and encode `count` clips of the trained length."""
    rng = np.random.default_rng(seed)
    codes, text = [], []
    for _ in range(0, count, 100):
        scenes = [world.sample_scene(rng, split) for _ in range(min(100, count - len(text)))]
        frames = np.stack([world.render(s, pixel_frames(TRAINED_FRAMES)) for s in scenes])
        indices, _ = codec.encode(to_float(torch.from_numpy(frames)))
        codes.append(indices.flatten(2).short())
        for scene in scenes:
            words = world.prompt(scene)
            if rng.random() < no_direction:
                words = words.split(" moving ")[0]
            text.append(text_ids(words))
    return Clips(codes=torch.cat(codes).long(), text=torch.tensor(text))


class TwoCopies:
    """Sequences of one shape: `frames` latent frames, with or without text."""

    def __init__(self, model: Lumos, frames: int, with_text: bool) -> None:
        self.vocab, self.frames, self.with_text = Vocab(model.config), frames, with_text
        self.layout = self.vocab.layout(world.SIZE, world.SIZE)
        self.content = self.vocab.content(self.layout)
        self.history = history_mask(
            self.layout.rows, self.layout.row_length, SAMPLING.history_mask_ratio
        )
        words = len(text_ids("a red 3"))
        whole = self.vocab.prefix([0] * words, seconds=SECONDS, fps=FPS)
        self.prefix = torch.tensor(whole.branch(0 if with_text else 1))
        self.text_slots = slice(1, 1 + words)
        device = model.lm_head.weight.device
        self.rotary = tuple(t.to(device) for t in model.rotary(self._positions().to(device)))

    def _order(self) -> list[int]:
        """Frame numbers of the copies in sequence order: committed ones, then current ones."""
        return [*range(self.frames - 1), *range(self.frames)]

    def _positions(self) -> Tensor:
        n = len(self.prefix)
        index = torch.arange(n)
        parts = [torch.stack((index, index, index, index, torch.zeros_like(index)))]
        parts += [self.vocab.frame_positions(n, f, self.layout) for f in self._order()]
        return torch.cat(parts, dim=1)

    def attend(self, _: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The prefix is causal; a copy sees the prefix, earlier committed copies and itself."""
        sizes = [len(self.prefix)] + [self.layout.tokens] * len(self._order())
        queries, keys, values = (x.split(sizes, dim=2) for x in (q, k, v))
        out = [F.scaled_dot_product_attention(queries[0], keys[0], values[0], is_causal=True)]
        for copy, frame in enumerate(self._order(), start=1):
            seen_k = torch.cat((*keys[: frame + 1], keys[copy]), dim=2)
            seen_v = torch.cat((*values[: frame + 1], values[copy]), dim=2)
            out.append(F.scaled_dot_product_attention(queries[copy], seen_k, seen_v))
        return torch.cat(out, dim=2)

    def ids(
        self, clips: Clips, given: Tensor, hidden: Tensor, past: Tensor | None = None
    ) -> Tensor:
        """Token ids `[G, L]`; `given [G]` keeps frame 0 clean, `hidden [G, F, 64]` is masked.

        `past` are the committed copies' codes where they differ from the clips'.
        """
        size = len(clips.codes)
        current = self.vocab.frame(self.layout).repeat(size, self.frames, 1)
        current[..., self.content] = clips.codes + self.vocab.ids.video_lo
        committed = current[:, :-1].clone()
        if past is not None:
            committed[..., self.content] = past[:, :-1] + self.vocab.ids.video_lo
        committed = self.vocab.remask(self.layout, committed, self.history)
        first = slice(0, min(1, self.frames - 1))
        committed[given, first] = current[given, first]
        current[..., self.content] = current[..., self.content].masked_fill(
            hidden, self.vocab.ids.mask
        )
        prefix = self.prefix.repeat(size, 1)
        if self.with_text:
            prefix[:, self.text_slots] = clips.text
        return torch.cat((prefix, committed.flatten(1), current.flatten(1)), dim=1)

    def logits(self, model: nn.Module, ids: Tensor, hidden: Tensor) -> Tensor:
        """float32 logits `[n, codes]` of the masked tokens of all current copies."""
        states = model(ids.to(self.rotary[0].device), self.rotary, self.attend)
        current = states[:, -self.frames * self.layout.tokens :].unflatten(1, (self.frames, -1))
        masked = current[:, :, self.content][hidden]
        return F.linear(masked, _core(model).lm_head.weight[self.vocab.ids.video_lo :]).float()


def _core(model: nn.Module) -> Lumos:
    return model.module if isinstance(model, AveragedModel) else model


def draw_masks(rng: np.random.Generator, size: int, frames: int, tokens: int) -> Tensor:
    """Which content tokens of the current copies are masked, bool `[size, frames, tokens]`."""
    share = np.cos(math.pi / 2 * rng.random((size, frames, 1)))
    share[rng.random((size, frames)) < ALL_MASK] = 1.0
    order = rng.random((size, frames, tokens)).argsort(-1).argsort(-1)
    return torch.from_numpy(order < np.ceil(share * tokens))


def spoil(rng: np.random.Generator, codes: Tensor) -> Tensor:
    """Codes with up to `SPOILED` of a clip's tokens copied from elsewhere in the clip.

    A history that is never wrong would teach the model nothing about its own mistakes.
    """
    size, frames, tokens = codes.shape
    wrong = rng.random(codes.shape) < SPOILED * rng.random((size, 1, 1))
    elsewhere = torch.from_numpy(rng.integers(frames * tokens, size=(size, frames * tokens)))
    other = codes.flatten(1).gather(1, elsewhere).view_as(codes)
    return torch.where(torch.from_numpy(wrong), other, codes)


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


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = Lumos(digits_config()).to(args.device)
    initialise(model)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    muon, adam = optimisers(model)
    fresh_codec = args.out.with_name("codec.safetensors")
    codec = load_codec(fresh_codec if fresh_codec.exists() else None)
    pool = make_clips(codec, args.seed, POOL, "train", NO_DIRECTION)
    held_out = make_clips(codec, args.seed + 1, 64, "test")
    run = Run(args, {"model": model, "averaged": averaged, "muon": muon, "adam": adam})
    curve = Curve(args.curve, fresh=not args.resume)

    def report() -> None:
        quality = measure(averaged, shapes, held_out, frames)
        curve.add(step=run.step, minutes=run.minutes, **quality)

    shapes: dict[tuple[int, bool], TwoCopies] = {}
    losses: list[float] = []
    while run.share < 1:
        _, frames, size = next(stage for stage in STAGES if run.share < stage[0])
        if (frames, True) not in shapes:
            shapes = {
                (n, text): TwoCopies(model, n, text) for n in (frames, 1) for text in (True, False)
            }
        factor = rate_factor(run.step, run.share)
        for optimiser, peak in ((muon, MUON_RATE), (adam, ADAM_RATE)):
            for group in optimiser.param_groups:
                group["lr"] = peak * factor
        rng = np.random.default_rng((args.seed, run.step))
        losses.append(train_step(model, (muon, adam), shapes, pool, rng, frames, size))
        averaged.update_parameters(model)
        checkpointed = run.advance()
        if run.step % 20 == 0:
            curve.add(step=run.step, minutes=run.minutes, loss=float(np.mean(losses)), rate=factor)
            losses = []
        if checkpointed:
            report()
    run.save()
    report()
    write_weights(averaged.module, args.out)


def train_step(
    model: Lumos,
    both: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    shapes: dict[tuple[int, bool], TwoCopies],
    pool: Clips,
    rng: np.random.Generator,
    frames: int,
    size: int,
) -> float:
    """One step on `size` clips and some first frames; returns the clips' loss a masked token."""
    parts = []
    for length, all_clips in ((frames, size), (1, FIRST_FRAMES)):
        without = rng.binomial(all_clips, NO_TEXT)
        share = length / frames / size
        parts += [(length, True, all_clips - without, share), (length, False, without, share)]
    total = 0.0
    for length, text, count, share in parts:
        if not count:
            continue
        clips = pool.pick(torch.from_numpy(rng.integers(len(pool.codes), size=count)), length)
        hidden = draw_masks(rng, count, length, clips.codes.shape[-1])
        given = torch.from_numpy(rng.random(count) < GIVEN)
        past = spoil(rng, clips.codes)
        shape = shapes[length, text]
        with torch.autocast(model.lm_head.weight.device.type, torch.bfloat16):
            logits = shape.logits(model, shape.ids(clips, given, hidden, past), hidden)
        target = clips.codes[hidden].to(logits.device)
        loss = F.cross_entropy(logits, target) * (count * share)
        loss.backward()
        total += loss.item() if length == frames else 0.0
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in both:
        optimiser.step()
        optimiser.zero_grad()
    return total


@torch.no_grad()
def measure(
    model: nn.Module, shapes: dict[tuple[int, bool], TwoCopies], clips: Clips, frames: int
) -> dict[str, float]:
    """Share of right tokens in all-masked frames of held-out scans, given their committed history.

    Only foreground counts: tokens that differ from the commonest one. `accuracy_next` is latent
    frame 3, `accuracy_last` the last of the stage, `loss_first` text to picture.
    """
    start = time.perf_counter()
    clips = clips.pick(torch.arange(len(clips.codes)), frames)
    hidden = torch.ones_like(clips.codes, dtype=torch.bool)
    shape = shapes[frames, True]
    ids = shape.ids(clips, torch.zeros(len(hidden), dtype=torch.bool), hidden)
    parts = zip(ids.split(16), hidden.split(16), strict=True)
    logits = torch.cat([shape.logits(model, *part) for part in parts])
    logits = logits.unflatten(0, hidden.shape).cpu()
    first = F.cross_entropy(logits[:, 0].flatten(0, 1), clips.codes[:, 0].flatten())
    foreground = clips.codes != clips.codes.flatten().mode().values
    right = logits.argmax(-1) == clips.codes
    return {
        "accuracy_next": right[:, 3][foreground[:, 3]].float().mean().item(),
        "accuracy_last": right[:, -1][foreground[:, -1]].float().mean().item(),
        "accuracy_1": right[:, 1][foreground[:, 1]].float().mean().item(),
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
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.export:
        export(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
