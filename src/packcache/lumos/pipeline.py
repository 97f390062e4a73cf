"""From a prompt to a clip: the five lines a user writes.

    gen = load("digits")
    clip = gen.generate("a red 3 moving right", frames=48, policy=PackCache(), seed=0)
    clip.save("clip.mp4")

Layered on the generator of `decode`: `stream` turns its latent frames into pixels as they are
finished, `generate` collects them with what each cost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from packcache import video
from packcache.environment import environment
from packcache.errors import InvalidSetting
from packcache.lumos import schedule
from packcache.lumos.codec import Codec
from packcache.lumos.decode import Decoder, FrameResult
from packcache.lumos.image import crop_to
from packcache.lumos.model import Lumos
from packcache.lumos.schedule import Sampling
from packcache.lumos.vocab import Vocab, latent_frames
from packcache.policies import PackCache, Policy
from packcache.positions import PositionMode, RebaseRule
from packcache.video import Frames

__all__ = ["MODELS", "Clip", "Pipeline", "Stats", "load"]

log = logging.getLogger(__name__)

Picture = str | Path | Image.Image


@dataclass(kw_only=True)
class Stats:
    """What a clip cost, one entry a latent frame. Seconds; bytes of all branches, K and V.

    `prefill_s` is the text prefix, `codec_s` encoding and decoding (in no total); `frame_s` holds
    all steps, the commit and the packing of a latent frame; `kept` maps history frames to the
    tokens they hold after it.
    """

    prefill_s: float = 0.0
    codec_s: float = 0.0
    frame_s: list[float] = field(default_factory=list)
    kept: list[dict[int, int]] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    capacity_bytes: list[int] = field(default_factory=list)
    physical_length: list[int] = field(default_factory=list)
    rebase_frames: list[int] = field(default_factory=list)
    given_latents: int = 0

    @property
    def total_s(self) -> float:
        """TOTAL: prefill to the last commit."""
        return self.prefill_s + sum(self.frame_s)

    @property
    def last_s(self) -> float:
        """LAST: all steps, the commit and the packing of the last latent frame."""
        return self.frame_s[-1]

    def to_json(self) -> dict[str, Any]:
        """A row of a result: totals first, then the lists per latent frame."""
        row = {"total_s": self.total_s, "last_s": self.last_s, **asdict(self)}
        row["kept"] = [{str(frame): count for frame, count in kept.items()} for kept in self.kept]
        return row

    def add(self, result: FrameResult) -> None:
        self.frame_s.append(result.seconds)
        self.given_latents += result.given
        for name in ("kept", "kv_bytes", "capacity_bytes", "physical_length", "rebase_frames"):
            getattr(self, name).append(getattr(result, name))


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """A finished clip: `frames [T, H, W, 3]` uint8, `codes [t, h, w]`, and what it cost."""

    prompt: str
    policy: Policy
    sampling: Sampling
    seed: int
    fps: float
    frames: Frames
    codes: Tensor
    stats: Stats

    def to_json(self, pipeline: Pipeline) -> dict[str, Any]:
        """Schema, environment, workload and the one row of results."""
        work = {
            "model": pipeline.name,
            "prompt": self.prompt,
            "frames": len(self.frames),
            "latent_frames": len(self.codes),
            "width": pipeline.size[0],
            "height": pipeline.size[1],
            "fps": self.fps,
            "seed": self.seed,
            "sampling": asdict(self.sampling),
        }
        weight = pipeline.model.lm_head.weight
        return {
            "schema": "packcache.generate/1",
            "environment": environment(weight.device, weight.dtype),
            "workload": work,
            "results": [{"policy": repr(self.policy), **self.stats.to_json()}],
        }

    def save(self, path: str | Path) -> Path:
        """Write .mp4, .gif or, without a suffix, a folder of PNG files."""
        return video.write_video(self.frames, path, self.fps)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pipeline:
    """A network with its codec and its language.

    `tokenize` maps a prompt to text ids, `size` is (width, height) in pixels. `seconds` is the
    duration that every header states; None states the clip's own.
    """

    name: str
    model: Lumos
    codec: Codec
    tokenize: Callable[[str], list[int]]
    size: tuple[int, int]
    fps: int
    sampling: Sampling
    seconds: int | None = None

    def generate(self, prompt: str, *, frames: int = 24, **settings: Any) -> Clip:
        """One clip of exactly `frames` pixel frames; settings as for `run`."""
        return self.generate_many([prompt], frames=frames, **settings)[0]

    def generate_many(
        self,
        prompts: Sequence[str],
        *,
        frames: int = 24,
        on_frame: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> list[Clip]:
        """Clips of several prompts in one call: the same tokens as one by one (float32).

        The clips share one `Stats`: seconds and bytes are the call's, for all prompts together.
        `on_frame(done, total)` is called after every latent frame.
        """
        run = self.run(prompts, frames=frames, **settings)
        results = []
        for result in run:
            results.append(result)
            if on_frame:
                on_frame(len(results), run.latents or 0)
        codes = torch.stack([result.codes for result in results], dim=1)  # [B, t, h, w]
        start = time.perf_counter()
        pixels = [self.pixels(own)[:frames] for own in codes]
        run.stats.codec_s += time.perf_counter() - start
        return [
            Clip(
                prompt=prompt,
                policy=run.policy,
                sampling=run.decoder.sampling,
                seed=seed,
                fps=self.fps,
                frames=shown,
                codes=own,
                stats=run.stats,
            )
            for prompt, seed, shown, own in zip(prompts, run.seeds, pixels, codes, strict=True)
        ]

    def stream(
        self, prompt: str, *, frames: int | None = None, **settings: Any
    ) -> Iterator[Frames]:
        """Pixel frames `[H, W, 3]` as they are finished; endless without `frames`."""
        left = frames
        before: Tensor | None = None
        for result in self.run([prompt], frames=frames, **settings):
            codes = result.codes[0]
            chunk = codes[None] if before is None else torch.stack((before, codes))
            shown = self.pixels(chunk)
            before = codes
            for frame in shown if len(chunk) == 1 else shown[1:]:
                if left == 0:
                    return
                yield frame
                left = None if left is None else left - 1

    def run(
        self,
        prompts: Sequence[str],
        *,
        frames: int | None,
        image: Picture | None = None,
        video: Frames | None = None,
        policy: Policy | None = None,
        seed: int | Sequence[int] = 0,
        positions: PositionMode = "rebase",
        rebase: RebaseRule = "trained",
        **sampling: Any,
    ) -> Run:
        """An iterator over latent frames that keeps `stats` as it goes.

        Args:
            frames: pixel frames to make; None goes on for ever.
            image: condition image, given as a file or a PIL image: the first frame of the clip.
            video: instead of an image, uint8 frames `[1 + 4n, H, W, 3]` to go on from. The clip
                starts with them; the first is the condition image, the others clean history.
            policy: which tokens stay; default `PackCache()`.
            seed: of the draws; one for all prompts, or one each.
            positions, rebase: as for `FrameCache`.
            sampling: `steps`, `guidance`, ... as in `Sampling`; defaults are the model's.
        """
        if frames is not None and (isinstance(frames, bool) or frames < 1):
            raise InvalidSetting(f"frames is {frames}, expected at least 1")
        chosen = replace(self.sampling, **sampling)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise InvalidSetting(
                f"{len(seeds)} seeds for {len(prompts)} prompts: give one or one each"
            )
        self._check_given(image, video, frames)
        vocab = Vocab(self.model.config)
        layout = vocab.layout(*self.size)
        latents = (
            None if frames is None else latent_frames(frames, self.model.config.compression[0])
        )
        seconds = self._seconds(frames)
        decoder = Decoder(
            self.model,
            [vocab.prefix(self.tokenize(p), seconds=seconds, fps=self.fps) for p in prompts],
            layout=layout,
            sampling=chosen,
            policy=policy or PackCache(),
            draws=schedule.philox_draws(seeds, chosen.steps, layout.content),
            positions=positions,
            rebase=rebase,
        )
        start = time.perf_counter()
        given = None if image is None else self.encode_image(image)[None]
        given = given if video is None else self.encode_video(video)
        stats = Stats(codec_s=time.perf_counter() - start)
        return Run(decoder=decoder, latents=latents, given=given, seeds=seeds, stats=stats)

    def _check_given(self, image: Picture | None, video: Frames | None, frames: int | None) -> None:
        if video is None:
            return
        if image is not None:
            raise InvalidSetting("both image and video are given: the first frame of video is one")
        group, (width, height) = self.model.config.compression[0], self.size
        count, *rest = np.shape(video) or (0,)
        kind = getattr(video, "dtype", type(video).__name__)
        if rest != [height, width, 3] or kind != np.uint8:
            raise InvalidSetting(
                f"video is {kind} of shape {np.shape(video)}, expected uint8 "
                f"[T, {height}, {width}, 3]: scale it first"
            )
        if count % group != 1:
            raise InvalidSetting(
                f"video has {count} frames, expected 1 + a multiple of {group} (1, 5, 9, ...): "
                "drop frames at its start"
            )
        if frames is not None and count >= frames:
            raise InvalidSetting(
                f"video has {count} frames of a clip of {frames}: expected fewer, or more frames"
            )

    def _seconds(self, frames: int | None) -> int:
        if self.seconds is not None:
            return self.seconds
        if frames is None:
            raise InvalidSetting("an endless clip has no duration to state: give frames")
        return max(1, -(-frames // self.fps))

    @property
    def _codec_device(self) -> torch.device:
        weights = self.codec.parameters() if isinstance(self.codec, torch.nn.Module) else iter(())
        return next((weight.device for weight in weights), torch.device("cpu"))

    def encode_image(self, image: Picture) -> Tensor:
        """Codes `[h, w]` of a condition image, resized and cropped to size if need be."""
        picture = (
            image.convert("RGB") if isinstance(image, Image.Image) else video.read_image(image)
        )
        if picture.size != self.size:
            log.warning(
                "the image is %dx%d: resized and cropped to %dx%d", *picture.size, *self.size
            )
            picture = crop_to(picture, self.size)
        return self.encode_video(np.asarray(picture)[None])[0]

    def encode_video(self, video: Frames) -> Tensor:
        """Codes `[..., 1 + n, h, w]` of frames `[..., 1 + 4n, H, W, 3]` uint8, of one or many."""
        pixels = torch.from_numpy(video.copy()).movedim(-1, -4)  # [..., 3, T, H, W]
        many = pixels.reshape(-1, *pixels.shape[-4:]).float() / 255 * 2 - 1
        with torch.inference_mode():
            indices, _ = self.codec.encode(many.to(self._codec_device))
        return indices.reshape(*pixels.shape[:-4], *indices.shape[1:])

    def pixels(self, codes: Tensor) -> Frames:
        """Frames `[1 + 4(t-1), H, W, 3]` uint8 of codes `[t, h, w]` (truncated, lumos1-spec 6)."""
        with torch.inference_mode():
            decoded = self.codec.decode(codes[None].to(self._codec_device))[0]  # [3, T, H, W]
        levels = (decoded.float().clamp(-1, 1) + 1) / 2 * 255
        return levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()


@dataclass(kw_only=True, eq=False)
class Run:
    """Latent frames of one call as they are made; `stats` grows with them.

    `given [t, h, w]` are the codes that every prompt's clip starts with.
    """

    decoder: Decoder
    latents: int | None
    given: Tensor | None
    seeds: list[int]
    stats: Stats

    @property
    def policy(self) -> Policy:
        return self.decoder.caches[0].policy

    def __iter__(self) -> Iterator[FrameResult]:
        given = self.given
        if given is not None:
            given = given.expand(len(self.decoder.caches), *given.shape)
        for result in self.decoder.frames(self.latents, given):
            self.stats.prefill_s = self.decoder.prefill_s
            self.stats.add(result)
            yield result


def _load_digits() -> Pipeline:
    from packcache.digits import codec, model, world

    return Pipeline(
        name="digits",
        model=model.load_model(),
        codec=codec.load_codec(),
        tokenize=model.text_ids,
        size=(world.SIZE, world.SIZE),
        fps=world.FPS,
        sampling=model.SAMPLING,
        seconds=model.SECONDS,
    )


#: Models that come with the package.
MODELS: dict[str, Callable[[], Pipeline]] = {"digits": _load_digits}


def load(name: str) -> Pipeline:
    """A ready pipeline by name; "digits" is embedded and needs no download."""
    if name not in MODELS:
        raise InvalidSetting(f"unknown model {name!r}: known are {', '.join(MODELS)}")
    return MODELS[name]()
