"""From a prompt to a clip: the five lines a user writes.

    gen = load("digits")
    clip = gen.generate("a red 3 moving right", frames=48, policy=PackCache(), seed=0)
    clip.save("clip.mp4")

Layered on the generator of `decode`: `run` makes latent frames with what each cost, `stream` turns
them into pixels as they are finished, `generate` collects them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from packcache.errors import InputError, InvalidSetting
from packcache.lumos import image as images
from packcache.lumos import schedule
from packcache.lumos.clip import Clip, Stats
from packcache.lumos.codec import Codec, decode_chunks
from packcache.lumos.decode import Decoder, FrameResult
from packcache.lumos.image import Size
from packcache.lumos.journal import Journal, identity
from packcache.lumos.model import Lumos
from packcache.lumos.schedule import Sampling
from packcache.lumos.text import Header
from packcache.lumos.vocab import Prefix, Vocab, latent_frames, pixel_frames
from packcache.policies import PackCache, Policy, parse_policy
from packcache.positions import PositionMode, RebaseRule
from packcache.reuse import StepReuse, parse_reuse
from packcache.timeline import FrameLayout
from packcache.video import Frames, read_image, to_rgb

__all__ = ["Picture", "Pipeline", "Run", "check_count"]

log = logging.getLogger(__name__)

Picture = str | Path | Image.Image


@dataclass(frozen=True, kw_only=True, eq=False)
class Pipeline:
    """A network with its codec and its language.

    `tokenize` maps a prompt and what is stated about the clip to text ids. `size` is (width,
    height) in pixels unless asked otherwise; with `target` a condition image picks its own size
    instead, of about target^2 pixels. `seconds` is the duration every header states; None states
    the clip's own. `picture_header` states 1 fps and 1 second for a clip of one frame, as Lumos-1
    was trained on pictures.
    """

    name: str
    model: Lumos
    codec: Codec
    tokenize: Callable[[str, Header], list[int]]
    size: Size
    fps: int
    sampling: Sampling
    seconds: int | None = None
    target: int | None = None
    picture_header: bool = False

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.lm_head.weight.dtype

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
        if frames is None:
            raise InvalidSetting("frames is None: a clip needs a length; stream() goes on for ever")
        run = self.run(prompts, frames=frames, **settings)
        made = []
        for result in run:
            made.append(result.codes)
            if on_frame:
                on_frame(len(made), run.decoder.latents or 0)
        return self.clips(run, torch.stack(made, dim=1), frames)

    def clips(self, run: Run, codes: Tensor, frames: int) -> list[Clip]:
        """Finished clips of codes `[B, t, h, w]`, trimmed to `frames` pixel frames."""
        start = time.perf_counter()
        pixels = [self.pixels(own)[:frames] for own in codes]
        run.stats.codec_s += time.perf_counter() - start
        return [
            Clip(
                model=self.name,
                prompt=prompt,
                policy=run.policy,
                sampling=run.decoder.sampling,
                positions=run.decoder.caches[0].positions,
                rebase=run.decoder.caches[0].rebase,
                reuse=run.decoder.reuse,
                seed=seed,
                fps=run.fps,
                frames=shown,
                codes=own,
                stats=run.stats,
                device=self.device,
                dtype=self.dtype,
            )
            for prompt, seed, shown, own in zip(run.prompts, run.seeds, pixels, codes, strict=True)
        ]

    def stream(
        self, prompt: str, *, frames: int | None = None, **settings: Any
    ) -> Iterator[Frames]:
        """Pixel frames `[H, W, 3]` as they are finished; endless without `frames`.

        Memory does not grow with the clip (under a bounded policy): what each frame cost is
        forgotten, and each latent frame is decoded behind the codec's `overlap` before it.
        """
        run = self.run([prompt], frames=frames, **settings)
        left, window = frames, torch.empty(0)
        for result in run.results():
            window = torch.cat((window, result.codes)) if len(window) else result.codes
            shown = self.pixels(window[-1 - self.codec.overlap :])
            new = 1 if result.frame == 0 else self.model.config.compression[0]
            window = window[-self.codec.overlap :]
            for frame in shown[-new:]:
                if left == 0:
                    return
                yield frame
                left = None if left is None else left - 1

    def run(
        self,
        prompts: Sequence[str],
        *,
        frames: int | None,
        image: Picture | Sequence[Picture] | None = None,
        video: Frames | None = None,
        policy: Policy | str | None = None,
        seed: int | Sequence[int] = 0,
        size: Size | int | None = None,
        fps: int | None = None,
        seconds: int | None = None,
        positions: PositionMode = "rebase",
        rebase: RebaseRule = "trained",
        reuse: StepReuse | str | None = None,
        checkpoint: str | Path | None = None,
        resume: bool = False,
        **sampling: Any,
    ) -> Run:
        """An iterator over latent frames that keeps `stats` as it goes.

        Args:
            frames: pixel frames to make; None goes on for ever.
            image: condition image, given as a file or a PIL image: the first frame of the clip;
                one for all prompts, or one each.
            video: instead of an image, uint8 frames `[1 + 4n, H, W, 3]` to go on from. The clip
                starts with them; the first is the condition image, the others clean history.
            policy: which tokens stay, or its name as for `parse_policy`; default `PackCache()`.
            seed: of the draws; one for all prompts, or one each.
            size: (width, height) in pixels, multiples of 32; or one number, about whose square
                in pixels the clip has, in the image's shape; default the model's.
            fps, seconds: what prompt and header state; default the model's and the clip's own.
            positions, rebase: as for `FrameCache`.
            reuse: what steps take from earlier ones, or text for `parse_reuse`; default nothing.
            checkpoint: folder in which every latent frame is durable before it is handed on.
            resume: go on from what `checkpoint` holds; its frames come first, as they were.
            sampling: `steps`, `guidance`, ... as in `Sampling`; defaults are the model's.
        """
        _check_call(prompts, frames=frames, fps=fps, seconds=seconds)
        seeds = _one_each(0 if seed is None else seed, len(prompts), "seeds")
        pictures = [_open(picture) for picture in _one_each(image, len(prompts), "images")]
        size = self._size(size, pictures, video)
        if video is not None:
            self._check_video(video, size, frames, also_image=bool(pictures))
        header = self._header(size, frames, fps, seconds)
        decoder = self._decoder(
            prompts, header, frames, _changed(self.sampling, sampling), seeds,
            policy=policy or PackCache(), positions=positions, rebase=rebase, reuse=reuse,
        )  # fmt: skip
        start = time.perf_counter()
        given = self._given(pictures, video, size, len(prompts))
        return Run(
            prompts=list(prompts),
            decoder=decoder,
            given=given,
            seeds=seeds,
            header=header,
            stats=Stats(codec_s=time.perf_counter() - start),
        ).with_checkpoint(checkpoint, resume=resume)

    # --- what is stated about the clip --------------------------------------------------------

    @property
    def _group(self) -> int:
        """Pixel frames of a latent frame, the first one apart."""
        return self.model.config.compression[0]

    def _decoder(
        self,
        prompts: Sequence[str],
        header: Header,
        frames: int | None,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        policy: Policy | str,
        reuse: StepReuse | str | None,
        **settings: Any,
    ) -> Decoder:
        layout = Vocab(self.model.config).layout(header.width, header.height)
        return Decoder(
            self.model,
            [self._prefix(prompt, header, layout) for prompt in prompts],
            layout=layout,
            sampling=sampling,
            policy=parse_policy(policy) if isinstance(policy, str) else policy,
            reuse=parse_reuse(reuse, sampling.steps) if isinstance(reuse, str) else reuse,
            draws=schedule.philox_draws(seeds, sampling.steps, layout.content),
            latents=None if frames is None else latent_frames(frames, self._group),
            **settings,
        )

    def _header(
        self, size: Size, frames: int | None, fps: int | None, seconds: int | None
    ) -> Header:
        picture = frames == 1 and self.picture_header
        fps = (1 if picture else self.fps) if fps is None else fps
        if seconds is None:
            seconds = self.seconds or self._duration(frames, fps)
        return Header(width=size[0], height=size[1], seconds=seconds, fps=fps)

    def _duration(self, frames: int | None, fps: int) -> int:
        """Whole seconds from first to last frame; an endless clip states the trained length."""
        trained = self.model.config.trained_latent_frames
        if frames is None and trained is None:
            raise InvalidSetting("an endless clip has no duration to state: give seconds or frames")
        if frames is None:
            frames = pixel_frames(trained or 1, self._group)
        seconds = max(1, -(-(frames - 1) // fps))  # 24 and 25 frames at 12 fps are 2 seconds
        most = len(self.model.config.token_ids.numbers) - 1
        if seconds > most:
            log.warning("the clip lasts %d s; %d is the most that can be stated", seconds, most)
        return min(seconds, most)

    def _prefix(self, prompt: str, header: Header, layout: FrameLayout) -> Prefix:
        config = self.model.config
        prefix = Vocab(config).prefix(
            self.tokenize(prompt, header), seconds=header.seconds, fps=header.fps
        )
        room = config.max_position_embeddings - (config.trained_latent_frames or 1) * layout.tokens
        if len(prefix.ids) > max(room, 0):
            raise InputError(
                f"the prompt has {len(prefix.ids)} tokens, expected at most {max(room, 0)}: "
                f"{config.max_position_embeddings} positions less the frames the model was trained "
                "on; shorten the prompt"
            )
        return prefix

    # --- what is given ------------------------------------------------------------------------

    def _size(
        self, asked: Size | int | None, pictures: Sequence[Image.Image], video: Frames | None
    ) -> Size:
        """What was asked for, or the given frames' own size, or the picture's choice."""
        if video is not None and asked is None and self.target and np.ndim(video) == 4:
            return np.shape(video)[2], np.shape(video)[1]
        picture = pictures[0].size if pictures else None
        return images.pick_size(asked, default=self.size, target=self.target, picture=picture)

    def _check_video(
        self, video: Frames, size: Size, frames: int | None, *, also_image: bool
    ) -> None:
        if also_image:
            raise InvalidSetting("both image and video are given: the first frame of video is one")
        width, height = size
        count, *rest = np.shape(video) or (0,)
        kind = getattr(video, "dtype", type(video).__name__)
        if rest != [height, width, 3] or kind != np.uint8:
            raise InvalidSetting(
                f"video is {kind} of shape {np.shape(video)}, expected uint8 "
                f"[T, {height}, {width}, 3]: scale it first"
            )
        if count % self._group != 1:
            raise InvalidSetting(
                f"video has {count} frames, expected 1 + a multiple of {self._group} "
                "(1, 5, 9, ...): drop frames at its start"
            )
        if frames is not None and count >= frames:
            raise InvalidSetting(
                f"video has {count} frames of a clip of {frames}: expected fewer, or more frames"
            )

    def _given(
        self, pictures: Sequence[Image.Image], video: Frames | None, size: Size, prompts: int
    ) -> Tensor | None:
        """Codes `[B, t, h, w]` that the clips start with."""
        if video is not None:
            return self.encode_video(video).expand(prompts, -1, -1, -1)
        if not pictures:
            return None
        return torch.stack([self.encode_image(p, size) for p in pictures])[:, None]

    @property
    def codec_device(self) -> torch.device:
        weights = self.codec.parameters() if isinstance(self.codec, torch.nn.Module) else iter(())
        return next((weight.device for weight in weights), torch.device("cpu"))

    def encode_image(self, image: Picture, size: Size | None = None) -> Tensor:
        """Codes `[h, w]` of a condition image, resized and cropped to size if need be."""
        picture = _open(image)
        size = size or self.size
        fitted = picture if picture.size == size else images.crop_to(picture, size)
        codes = self.encode_video(np.asarray(fitted)[None])[0]
        if picture.size != size:
            log.warning("the image is %dx%d: resized and cropped to %dx%d", *picture.size, *size)
        return codes

    def encode_video(self, video: Frames) -> Tensor:
        """Codes `[..., 1 + n, h, w]` of frames `[..., 1 + 4n, H, W, 3]` uint8, of one or many."""
        pixels = torch.from_numpy(video.copy()).movedim(-1, -4)  # [..., 3, T, H, W]
        many = pixels.reshape(-1, *pixels.shape[-4:]).float() / 255 * 2 - 1
        with torch.inference_mode():
            indices, _ = self.codec.encode(many.to(self.codec_device))
        return indices.reshape(*pixels.shape[:-4], *indices.shape[1:]).cpu()

    def fit_video(self, video: Frames, size: Size | int | None = None) -> Frames:
        """Any frames `[T, H, W, 3]` uint8 as `run` takes them: scaled and cropped to the clip's
        size, and the first few dropped until 1 + 4n are left.
        """
        picture = video.shape[2], video.shape[1]
        if not len(video):
            raise InvalidSetting("video has 0 frames, expected at least 1")
        size = images.pick_size(size, default=self.size, target=self.target, picture=picture)
        Vocab(self.model.config).layout(*size)
        dropped = (len(video) - 1) % self._group
        if dropped or picture != size:
            log.warning(
                "the video is %d frames of %dx%d: resized and cropped to %dx%d, first %d dropped",
                len(video), *picture, *size, dropped,
            )  # fmt: skip
        cut = (images.crop_to(Image.fromarray(frame), size) for frame in video[dropped:])
        return np.stack([np.asarray(frame) for frame in cut])

    def pixels(self, codes: Tensor) -> Frames:
        """Frames `[1 + 4(t-1), H, W, 3]` uint8 of codes `[t, h, w]` (truncated, lumos1-spec 6)."""
        with torch.inference_mode():
            pieces = decode_chunks(self.codec, codes[None].to(self.codec_device))
            return np.concatenate([_levels(piece[0]) for piece in pieces])


def _levels(video: Tensor) -> Frames:
    """uint8 `[T, H, W, 3]` of a decoded video `[3, T, H, W]`, truncated as upstream does."""
    levels = (video.float().clamp(-1, 1) + 1) / 2 * 255
    return levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()


def _open(image: Picture) -> Image.Image:
    if isinstance(image, (str, Path)):
        return read_image(image)
    if not isinstance(image, Image.Image) or 0 in image.size:
        raise InvalidSetting(
            f"image is {type(image).__name__}, expected a file's name, or a PIL image with pixels"
        )
    try:
        return to_rgb(image)
    except ValueError as error:
        raise InvalidSetting(f"image has {error}, expected one such as RGB: convert it") from None


def _one_each(given: Any, prompts: int, name: str) -> list[Any]:
    """What belongs to the prompts: nothing, one for all of them, or one each."""
    if given is None:
        return []
    many = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if len(many) not in (1, prompts):
        raise InvalidSetting(f"{len(many)} {name} for {prompts} prompts: give one or one each")
    return many * prompts if len(many) == 1 else many


def _changed(sampling: Sampling, changes: dict[str, Any]) -> Sampling:
    known = {f.name for f in fields(sampling)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise InvalidSetting(f"{', '.join(unknown)} unknown, expected {', '.join(sorted(known))}")
    return replace(sampling, **changes)


def _check_call(prompts: Sequence[str], **counts: int | None) -> None:
    if isinstance(prompts, str):
        raise InvalidSetting("prompts is one text, expected a list of them: [prompt]")
    for name, value in counts.items():
        check_count(name, value)


def check_count(name: str, value: int | None) -> None:
    """Raises InvalidSetting for what is given and no number of things."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidSetting(f"{name} is {value}, expected a whole number")
    if value < 1:
        raise InvalidSetting(f"{name} is {value}, expected at least 1")


@dataclass(kw_only=True, eq=False)
class Run:
    """Latent frames of one call as they are made; iterating keeps `stats` as it goes.

    `given [B, t, h, w]` are the codes that the clips start with, `made` those that are known to
    come next (`Decoder.frames`), `journal` their checkpoint.
    """

    prompts: list[str]
    decoder: Decoder
    given: Tensor | None
    seeds: list[int]
    header: Header
    stats: Stats
    made: Tensor | None = None
    journal: Journal | None = None

    @property
    def policy(self) -> Policy:
        return self.decoder.caches[0].policy

    @property
    def fps(self) -> int:
        return self.header.fps

    @property
    def size(self) -> Size:
        return self.header.width, self.header.height

    def with_checkpoint(self, checkpoint: str | Path | None, *, resume: bool) -> Run:
        """This run with a checkpoint folder, new or to resume; None: without."""
        if checkpoint is not None:
            told = identity(
                self.decoder,
                prompts=self.prompts,
                seeds=self.seeds,
                given=self.given,
                **asdict(self.header),
            )
            self.journal = Journal(checkpoint, self.decoder, told, resume=resume)
        elif resume:
            raise InvalidSetting("resume without a checkpoint: name the folder that holds it")
        return self

    def results(self) -> Iterator[FrameResult]:
        """The latent frames, nothing kept of them; those of a resumed checkpoint come first."""
        frames = self.decoder.frames(self.given, self.made)
        return frames if self.journal is None else self.journal.record(frames)

    def __iter__(self) -> Iterator[FrameResult]:
        for result in self.results():
            self.stats.prefill_s = self.decoder.prefill_s
            self.stats.add(result)
            yield result
