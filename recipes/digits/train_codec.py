"""Train the digits codec: groups of four frames, rebuilt through about 1000 codes a token.

python recipes/digits/train_codec.py --minutes 9
python recipes/digits/train_codec.py --export
"""

from __future__ import annotations

import argparse
import math
import shutil
import time

import numpy as np
import torch
from common import PACKAGE_WEIGHTS, Curve, Run, add_options, to_float

from packcache.digits import world
from packcache.digits.codec import GROUP, PATCH, DigitsCodec, load_codec, save_codec

BATCH = 64
CUT = 48  # pixels
PEAK_RATE = 3e-3
#: A fifth of the groups stand still, as the first frame of a clip does.
STILL = 0.2
#: Squared error inside the digit's box counts this much more.
BOX_WEIGHT = 3.0


def draw_groups(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random groups uint8 `[count, 4, 48, 48, 3]` and loss weights `[count, 1, 4, 48, 48]`.

    Cut out on the token grid around the digit: most of the rest of a frame is the same flat ground.
    """
    groups = np.empty((count, GROUP, CUT, CUT, 3), dtype=np.uint8)
    weight = np.ones((count, 1, GROUP, world.SIZE, world.SIZE), dtype=np.float32)
    cuts = np.empty((count, 1, GROUP, CUT, CUT), dtype=np.float32)
    for n in range(count):
        scene = world.sample_scene(rng)
        still = rng.random() < STILL
        frames = [0] * GROUP if still else list(range(GROUP))
        first = 0 if still else 1 + GROUP * int(rng.integers(20))
        places = world.corners(scene, GROUP, first)[frames]
        for t, (x, y) in enumerate(places):
            weight[n, 0, t, y : y + world.SPRITE, x : x + world.SPRITE] = 1 + BOX_WEIGHT
        low = np.maximum(0, -(-(places.max(0) + world.SPRITE - CUT) // PATCH))
        high = np.minimum(places.min(0) // PATCH, (world.SIZE - CUT) // PATCH)
        x, y = PATCH * rng.integers(low, high + 1)
        groups[n] = world.render(scene, GROUP, first)[frames, y : y + CUT, x : x + CUT]
        cuts[n] = weight[n, :, :, y : y + CUT, x : x + CUT]
    return torch.from_numpy(groups), torch.from_numpy(cuts)


def loss_of(codec: DigitsCodec, groups: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Squared error for the strokes, plus a little absolute error to keep the ground flat."""
    codes = codec.fsq.quantise(codec.encode_group(groups).float().movedim(1, -1)).movedim(-1, 1)
    error = codec.decode_group(codes).float() - groups
    return (weight * (error.square() + 0.1 * error.abs())).mean()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    codec = DigitsCodec().to(args.device)
    optimiser = torch.optim.AdamW(codec.parameters(), lr=PEAK_RATE, weight_decay=1e-4)
    run = Run(args, {"codec": codec, "optimiser": optimiser})
    curve = Curve(args.curve, fresh=not args.resume)
    while run.share < 1:
        rate = PEAK_RATE * min(1.0, (run.step + 1) / 100) * (1 + math.cos(math.pi * run.share)) / 2
        for group in optimiser.param_groups:
            group["lr"] = rate
        rng = np.random.default_rng((args.seed, run.step))
        groups, weight = draw_groups(rng, BATCH)
        with torch.autocast(args.device, torch.bfloat16):
            loss = loss_of(codec, to_float(groups).to(args.device), weight.to(args.device))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimiser.step()
        run.advance()
        if run.step % 100 == 0:
            curve.add(step=run.step, minutes=run.minutes, loss=loss.item(), rate=rate)
    run.save()
    save_codec(codec.cpu(), args.out)
    curve.add(step=run.step, minutes=run.minutes, **measure(load_codec(args.out)))


def measure(codec: DigitsCodec, clips: int = 100, frames: int = 25) -> dict[str, float]:
    """PSNR in dB on held-out scans, of whole frames and inside the digit's box; codes in use."""
    rng = np.random.default_rng(1)
    whole, box, used, first = [], [], [], []
    start = time.perf_counter()
    for _ in range(clips):
        scene = world.sample_scene(rng, "test")
        video = to_float(torch.from_numpy(world.render(scene, frames)))[None]
        indices, _ = codec.encode(video)
        error = (codec.decode(indices).clamp(-1, 1) - video)[0].square() / 4  # of a range of 1
        inside = torch.stack(
            [
                error[:, t, y : y + world.SPRITE, x : x + world.SPRITE]
                for t, (x, y) in enumerate(world.corners(scene, frames))
            ]
        )
        whole.append(error.mean())
        box.append(inside.mean())
        first.append(inside[0].mean())
        used.append(indices.flatten())
    counts = torch.bincount(torch.cat(used), minlength=math.prod(codec.settings["levels"])).double()
    share = counts[counts > 0] / counts.sum()
    return {
        "psnr": _decibel(whole),
        "psnr_box": _decibel(box),
        "psnr_box_first_frame": _decibel(first),
        "codes_used": int((counts > 0).sum()),
        "code_entropy_bits": float(-(share * share.log2()).sum()),
        "seconds_per_clip": (time.perf_counter() - start) / clips,
    }


def _decibel(errors: list[torch.Tensor]) -> float:
    return float(-10 * torch.log10(torch.stack(errors).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, "codec", minutes=9)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.export:
        shutil.copyfile(args.out, PACKAGE_WEIGHTS / "codec.safetensors")
    else:
        train(args)


if __name__ == "__main__":
    main()
