"""The Cosmos tokenizer, run from its released `encoder.jit` and `decoder.jit` (lumos1-spec 6).

These are TorchScript files, and TorchScript is a program: to load one is to run what its author
wrote. So they are only ever loaded from a path that the user named, never found by search and never
downloaded by this package. Nothing is unpickled: a file that is no TorchScript archive is refused.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from packcache.errors import GenerationError, InputFileError, InvalidSetting, is_out_of_memory
from packcache.lumos.codec import check_overlap
from packcache.lumos.config import LumosConfig

__all__ = ["CosmosCodec", "load_cosmos"]


class CosmosCodec:
    """Video `[B, 3, 1 + 4n, H, W]` in [-1, 1] to indices `[B, 1 + n, H/8, W/8]` and back.

    `encoder` and `decoder` are the paths of TorchScript files. The decoder is loaded at once, the
    encoder at the first `encode`: text-to-video needs none. Pixels are cast to `dtype`, which must
    be the one that the files were exported in (bfloat16 as released); results stay on `device`.
    `compression` is the (t, h, w) factor and `levels` are those of the quantiser: what the files
    give back is held against them.
    """

    def __init__(
        self,
        encoder: str | Path,
        decoder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        overlap: int = 4,
        compression: tuple[int, int, int] = LumosConfig.compression,
        levels: Sequence[int] = LumosConfig.fsq_levels,
    ) -> None:
        self.overlap = check_overlap(overlap)
        self.device = torch.device(device)
        self.dtype = dtype
        self.compression = compression
        self.levels = tuple(levels)
        self.paths = {"encoder": Path(encoder), "decoder": Path(decoder)}
        self._decoder = self._load("decoder")

    @functools.cached_property
    def _encoder(self) -> torch.jit.ScriptModule:
        return self._load("encoder")

    @property
    def num_codes(self) -> int:
        return math.prod(self.levels)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Indices int32 `[B, t, h, w]` and codes `[B, dims, t, h, w]` of a video, one by one.

        Raises:
            InvalidSetting: the video has a shape that the codec does not take.
            InputFileError: `encoder.jit` is missing, broken or of another codec.
        """
        self._check_video(video)
        given = video.to(self.device, self.dtype)
        found = [self._encode_one(one) for one in given.split(1)]
        indices, codes = zip(*found, strict=True)
        return torch.cat(indices), torch.cat(codes)

    def decode(self, indices: Tensor) -> Tensor:
        """Video `[B, 3, 1 + 4(t-1), 8h, 8w]`, nominal range [-1, 1], of indices `[B, t, h, w]`.

        Clips are decoded one by one, in the precision of the file; nothing is clamped.

        Raises:
            InvalidSetting: these are no indices of this codec.
            InputFileError: `decoder.jit` fails on them or is of another codec.
        """
        self._check_indices(indices)
        given = indices.to(self.device, torch.int32)
        return torch.cat([self._decode_one(one) for one in given.split(1)])

    def check(self, *, encoder: bool = True) -> None:
        """Decode, and encode if asked, a tiny clip: 1 + t frames of 8x8 tokens.

        So that files of another compression are refused before the work and not after it. Raises
        InputFileError that names the compression found.
        """
        t, h, w = self.compression
        self.decode(torch.full((1, 2, 8, 8), self.num_codes - 1))
        if encoder:
            self.encode(torch.zeros(1, 3, 1 + t, 8 * h, 8 * w))

    def _load(self, part: str) -> torch.jit.ScriptModule:
        path = self.paths[part]
        if not path.is_file():
            raise InputFileError(
                f"codec file {path} does not exist: {part}.jit of Cosmos-Tokenizer-DV4x8x8 is "
                "expected there"
            )
        try:
            return torch.jit.load(path, map_location=self.device).eval()
        except (RuntimeError, ValueError, LookupError, OSError) as error:
            raise InputFileError(
                f"codec file {path} cannot be loaded on {self.device} ({_reason(error)}): expected "
                "a whole TorchScript archive; get the file again or choose another device"
            ) from error

    def _run(self, part: str, module: torch.jit.ScriptModule, given: Tensor) -> Any:
        try:
            with torch.no_grad():
                return module(given)
        except (RuntimeError, torch.jit.Error) as error:
            reason = _reason(error)
            did = f"{self.paths[part]} failed on {_describe(given)} ({reason})"
            if is_out_of_memory(reason):
                raise GenerationError(
                    f"{did}: give it fewer or smaller frames at a time, or free memory"
                ) from error
            raise InputFileError(
                f"{did}: expected {part}.jit of {self.dtype} for {self.device}, compression "
                f"{_times(self.compression)}; take the right file or change dtype or device"
            ) from error

    def _encode_one(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Indices `[1, t, h, w]` and codes `[1, dims, t, h, w]` of one clip."""
        indices, codes = self._pick(self._run("encoder", self._encoder, clip))
        self._check_compression("encoder", clip.shape[2:], indices.shape[1:])
        if beyond := self._beyond(indices):
            raise InputFileError(
                f"{self.paths['encoder']} gave indices {beyond} of levels {self.levels}: take the "
                "codec that the model was trained with"
            )
        return indices.to(torch.int32), codes

    def _decode_one(self, indices: Tensor) -> Tensor:
        """Video `[1, 3, T, H, W]` of the indices `[1, t, h, w]` of one clip."""
        video = self._run("decoder", self._decoder, indices)
        if not _is(video, 5, floating=True) or video.shape[:2] != (1, 3):
            raise InputFileError(
                f"{self.paths['decoder']} gave {_describe(*_outputs(video))}, expected one "
                "floating [1, 3, T, H, W]: take the decoder.jit of a discrete video tokenizer"
            )
        self._check_compression("decoder", video.shape[2:], indices.shape[1:])
        return video

    def _pick(self, output: object) -> tuple[Tensor, Tensor]:
        """Indices and codes out of what the encoder gave, in whatever order they come.

        The released tuple is taken to be (indices, codes, loss) (lumos1-spec 8.3). The quantiser's
        loss may have five axes too, so codes must have the shape that indices and levels say.
        """
        given = _outputs(output)
        indices = [x for x in given if _is(x, 4, floating=False)]
        shapes = [(1, len(self.levels), *x.shape[1:]) for x in indices]
        codes = [x for x in given if _is(x, 5, floating=True) and tuple(x.shape) in shapes]
        if len(indices) != 1 or len(codes) != 1:
            raise InputFileError(
                f"{self.paths['encoder']} gave {_describe(*given)}, expected one integer "
                f"[1, t, h, w] and one floating [1, {len(self.levels)}, t, h, w]: take the "
                "encoder.jit of a discrete video tokenizer"
            )
        return indices[0], codes[0]

    def _check_compression(self, part: str, pixels: Sequence[int], tokens: Sequence[int]) -> None:
        """Hold the (T, H, W) pixels and (t, h, w) tokens of a clip against the factor."""
        t, h, w = self.compression
        if tuple(pixels) == (1 + t * (tokens[0] - 1), h * tokens[1], w * tokens[2]):
            return
        # the first frame is a latent frame of its own; no tokens tell nothing
        pairs = ((pixels[0] - 1, tokens[0] - 1), *zip(pixels[1:], tokens[1:], strict=True))
        found = [f"{many / few:g}" if few > 0 else "?" for many, few in pairs]
        raise InputFileError(
            f"{self.paths[part]} has compression {_times(found)} ({_times(pixels)} pixels, "
            f"{_times(tokens)} tokens), expected {_times(self.compression)}: take the codec that "
            "the model was trained with"
        )

    def _check_video(self, video: Tensor) -> None:
        t, h, w = self.compression
        shape = tuple(video.shape)
        fits = video.ndim == 5 and all(shape) and shape[1] == 3
        if not fits or shape[3] % h or shape[4] % w or not video.is_floating_point():
            raise InvalidSetting(
                f"video is {_describe(video)}, expected floating [B, 3, T, H, W] in [-1, 1] with H "
                f"a multiple of {h} and W of {w}"
            )
        if (shape[2] - 1) % t:
            raise InvalidSetting(
                f"video has {shape[2]} frames, expected 1 + a multiple of {t}: drop or repeat "
                "frames at its end"
            )

    def _check_indices(self, indices: Tensor) -> None:
        if not _is(indices, 4, floating=False) or not indices.numel():
            raise InvalidSetting(
                f"indices are {_describe(indices)}, expected int32 or int64 [B, t, h, w], t >= 1"
            )
        if beyond := self._beyond(indices):
            raise InvalidSetting(f"indices are {beyond}: take the codec's indices, not token ids")

    def _beyond(self, indices: Tensor) -> str:
        """Which values there are and which there may be, or nothing if all name a code."""
        low, high, last = int(indices.min()), int(indices.max()), self.num_codes - 1
        return f"{low} to {high}, expected 0 to {last}" if low < 0 or high > last else ""


def load_cosmos(folder: str | Path, **settings: Any) -> CosmosCodec:
    """The codec of a folder with `encoder.jit` and `decoder.jit`; settings as for CosmosCodec.

    Raises InputFileError if the decoder is missing or cannot be loaded.
    """
    folder = Path(folder)
    return CosmosCodec(folder / "encoder.jit", folder / "decoder.jit", **settings)


def _outputs(output: object) -> Sequence[object]:
    return output if isinstance(output, (tuple, list)) else (output,)


def _is(value: object, ndim: int, *, floating: bool) -> TypeGuard[Tensor]:
    """A tensor of so many axes, floating point or an integer of 32 or 64 bits."""
    if not isinstance(value, Tensor) or value.ndim != ndim:
        return False
    return value.is_floating_point() if floating else value.dtype in (torch.int32, torch.int64)


def _describe(*values: object) -> str:
    """Types and shapes: `int32 [1, 2, 8, 8], float32 [1], str`."""
    return ", ".join(
        f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        if isinstance(x, Tensor)
        else type(x).__name__
        for x in values
    )


def _times(sizes: Iterable[object]) -> str:
    return "x".join(map(str, sizes))


def _reason(error: Exception) -> str:
    """The line of an error that says why; TorchScript ends a traceback of many lines with it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    named = [line for line in lines if "Error: " in line]
    return re.sub(r"^(builtins\.)?RuntimeError: ", "", named[-1] if named else lines[0])
