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
from common import PACKAGE_WEIGHTS, Curve, Run, add_options, in_parallel, to_float
from torch import Tensor

from packcache.digits import world
from packcache.digits.codec import GROUP, PATCH, DigitsCodec, load_codec, save_codec

#: By device: groups rendered once, groups a step.
SIZES = {"cpu": (4_000, 64), "cuda": (48_000, 512)}
#: Steps between points of the curve.
EVERY = {"cpu": 100, "cuda": 1000}
CHUNK = 500  # groups rendered by one call
CUT = 48  # pixels
PEAK_RATE, WARMUP = 1.5e-3, 300
#: A fifth of the groups stand still, as the first frame of a clip does.
STILL = 0.2
#: Squared error inside the digit's box counts this much more.
BOX_WEIGHT = 4.0
#: Numbers before quantisation are meant to stay within this; tanh is flat beyond.
REACH = 2.5


def draw_groups(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random groups uint8 `[n, 4, 96, 96, 3]`, where digits are, bool `[n, 4, 96, 96]`, corners.

    A corner `[2]` is the (x, y) of a digit's box in the last frame.
    """
    rng = np.random.default_rng(seed)
    groups = np.empty((CHUNK, GROUP, world.SIZE, world.SIZE, 3), dtype=np.uint8)
    boxes = np.zeros((CHUNK, GROUP, world.SIZE, world.SIZE), dtype=bool)
    corners = np.empty((CHUNK, 2), dtype=np.int64)
    for n in range(CHUNK):
        scene = world.sample_scene(rng)
        latent = int(rng.integers(1, 7 if scene.curtain else 20))
        first = 0 if rng.random() < STILL else GROUP * latent - GROUP + 1
        frames = [0] * GROUP if first == 0 else list(range(GROUP))
        groups[n] = world.render(scene, GROUP, first)[frames]
        for digit in scene.digits:
            places = world.corners(digit, GROUP, first)[frames]
            corners[n] = places[-1]
            for t, (x, y) in enumerate(places):
                boxes[n, t, y : y + world.SPRITE, x : x + world.SPRITE] = True
    return torch.from_numpy(groups), torch.from_numpy(boxes), torch.from_numpy(corners)


class Groups:
    """Groups held on the device, and cuts of them on the token grid, around a digit.

    Most of the rest of a frame is ground.
    """

    def __init__(self, seed: int, device: str, workers: int) -> None:
        count, self.batch = SIZES[device]
        seeds = list(range(1000 * (seed + 1), 1000 * (seed + 1) + count // CHUNK))
        chunks = in_parallel(draw_groups, seeds, workers)
        parts = [[part.to(device) for part in chunk] for chunk in chunks]
        self.groups, self.boxes, self.corners = (torch.cat(p) for p in zip(*parts, strict=True))

    def cut(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1] `[batch, 3, 4, 48, 48]` and their weights `[batch, 1, 4, 48, 48]`."""
        device = self.groups.device
        chosen = torch.from_numpy(rng.integers(len(self.groups), size=self.batch)).to(device)
        back = torch.from_numpy(rng.integers(0, 4, size=(self.batch, 2))).to(device)
        most = (world.SIZE - CUT) // PATCH
        corner = PATCH * (self.corners[chosen] // PATCH - back).clamp(0, most)
        span = torch.arange(CUT, device=device)
        x, y = (corner[:, None] + span[:, None]).unbind(-1)  # [batch, 48]
        where = (chosen[:, None, None], slice(None), y[:, :, None], x[:, None, :])
        pixels = self.groups[where].movedim(3, 1)  # advanced indices come first: [b, y, x, 4, 3]
        boxes = self.boxes[where].movedim(3, 1)
        return to_float(pixels), 1 + BOX_WEIGHT * boxes[:, None].float()


def loss_of(codec: DigitsCodec, groups: Tensor, weight: Tensor) -> Tensor:
    """Squared error for the strokes, plus a little absolute error to keep the ground flat.

    Numbers far outside the quantiser's range no longer learn; a penalty keeps them near. Without
    it, and at twice the rate, a run lost its codes after 2000 steps.
    """
    numbers = codec.encode_group(groups).float()
    codes = codec.fsq.quantise(numbers.movedim(1, -1)).movedim(-1, 1)
    error = codec.decode_group(codes).float() - groups
    far = (numbers.abs() - REACH).relu().square().mean()
    return (weight * (error.square() + 0.1 * error.abs())).mean() + 0.01 * far


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    pool = Groups(args.seed, args.device, args.workers)
    codec = DigitsCodec().to(args.device)
    optimiser = torch.optim.AdamW(
        codec.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=1e-4
    )
    run = Run(args, {"codec": codec, "optimiser": optimiser})
    curve = Curve(args.curve, fresh=run.step == 0)
    while run.share < 1:
        rate = (
            PEAK_RATE * min(1.0, (run.step + 1) / WARMUP) * (1 + math.cos(math.pi * run.share)) / 2
        )
        for group in optimiser.param_groups:
            group["lr"] = rate
        groups, weight = pool.cut(np.random.default_rng((args.seed, run.step)))
        with torch.autocast(args.device, torch.bfloat16):
            loss = loss_of(codec, groups, weight)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimiser.step()
        run.advance()
        if run.step % EVERY[args.device] == 0:
            curve.add(step=run.step, minutes=run.minutes, loss=loss.item(), rate=rate)
    run.save()
    save_codec(codec.cpu(), args.out)
    curve.add(step=run.step, minutes=run.minutes, **measure(load_codec(args.out)))


def measure(codec: DigitsCodec, clips: int = 100, frames: int = 25) -> dict[str, float]:
    """PSNR in dB on held-out scans, of whole frames and in the boxes of digits; codes in use."""
    rng = np.random.default_rng(1)
    whole, box, used, first = [], [], [], []
    start = time.perf_counter()
    for _ in range(clips):
        scene = world.sample_scene(rng, "test")
        video = to_float(torch.from_numpy(world.render(scene, frames)))[None]
        indices, _ = codec.encode(video)
        error = (codec.decode(indices).clamp(-1, 1) - video)[0].square() / 4  # of a range of 1
        digit = scene.digits[0]
        inside = torch.stack(
            [
                error[:, t, y : y + world.SPRITE, x : x + world.SPRITE]
                for t, (x, y) in enumerate(world.corners(digit, frames))
                if digit is not scene.hidden or t == 0
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


def _decibel(errors: list[Tensor]) -> float:
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
