"""The digits codec: causal, 4x8x8, finite scalar quantisation; interface of the Cosmos tokenizer.

The simplest thing that is exactly causal: the first frame, and each later group of 4 frames, is
coded on its own by one small network. The first frame enters as a group of 4 equal frames and
leaves as the mean of 4.

The numbers of a token but the last say how the last frame of its group looks there, the last one
says how it got there. So a picture keeps its looks, moved by a token, when it turns round or when
a still first frame starts to move. The network is convolutional over tokens, with one token around
each for encoding and three for decoding: neighbours share the work of saying colour and motion.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from packcache.errors import InvalidSetting
from packcache.lumos.codec import FSQ

__all__ = ["LEVELS", "DigitsCodec", "load_codec", "save_codec"]

LEVELS = (8, 8, 5, 5)
GROUP, PATCH = 4, 8  # frames and pixels of a token
_VALUES = 3 * GROUP * PATCH * PATCH


class _Mix(nn.Module):
    """Residual 3x3 over tokens; the edge repeats, so the flat background has no border."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate")
        self.here = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.here(F.silu(self.near(F.silu(x))))


def _branch(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Half of the encoder: patches to numbers before quantisation."""
    return nn.Sequential(
        nn.Conv2d(inputs, width, 1), _Mix(width), nn.SiLU(), nn.Conv2d(width, outputs, 1)
    )


class DigitsCodec(nn.Module):
    """Video `[B, 3, 1 + 4n, H, W]` in [-1, 1] to indices `[B, 1 + n, H/8, W/8]` and back."""

    overlap = 1  # groups are decoded one by one: only a clip's first comes out as one frame

    def __init__(
        self,
        levels: Sequence[int] = LEVELS,
        encoder_width: int = 160,
        motion_width: int = 96,
        decoder_width: int = 192,
    ) -> None:
        super().__init__()
        self.settings = {
            "levels": list(levels),
            "encoder_width": encoder_width,
            "motion_width": motion_width,
            "decoder_width": decoder_width,
        }
        self.fsq = FSQ(levels)
        self.look = _branch(_VALUES // GROUP, encoder_width, len(levels) - 1)
        self.motion = _branch(_VALUES, motion_width, 1)
        self.decoder = nn.Sequential(
            nn.Conv2d(len(levels), decoder_width, 3, padding=1, padding_mode="replicate"),
            _Mix(decoder_width),
            _Mix(decoder_width),
            nn.SiLU(),
            nn.Conv2d(decoder_width, _VALUES, 1),
        )

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Indices int32 `[B, t, h, w]` and codes `[B, dims, t, h, w]` of a video.

        Groups are coded one by one: the numbers of a group do not depend on how many there are.
        """
        codes = torch.stack([self.encode_group(group) for group in _split(video)], dim=2)
        codes = self.fsq.quantise(codes.movedim(1, -1))
        return self.fsq.codes_to_indices(codes).to(torch.int32), codes.movedim(-1, 1)

    def decode(self, indices: Tensor) -> Tensor:
        """Video `[B, 3, 1 + 4(t-1), 8h, 8w]`, nominal range [-1, 1], of indices `[B, t, h, w]`."""
        if indices.ndim != 4 or not indices.shape[1]:
            raise InvalidSetting(
                f"indices have shape {tuple(indices.shape)}, expected [B, t, h, w] with t >= 1"
            )
        codes = self.fsq.indices_to_codes(indices).movedim(-1, 1)
        groups = [self.decode_group(group) for group in codes.unbind(2)]
        return torch.cat([groups[0].mean(2, keepdim=True), *groups[1:]], dim=2)

    def encode_group(self, group: Tensor) -> Tensor:
        """Numbers before quantisation `[N, dims, h, w]` of groups `[N, 3, 4, H, W]`."""
        look = self.look(F.pixel_unshuffle(group[:, :, -1], PATCH))
        motion = self.motion(F.pixel_unshuffle(group.flatten(1, 2), PATCH))
        return torch.cat((look, motion), dim=1)

    def decode_group(self, codes: Tensor) -> Tensor:
        """Groups `[N, 3, 4, H, W]` of codes `[N, dims, h, w]`."""
        pixels = F.pixel_shuffle(self.decoder(codes), PATCH)
        return pixels.unflatten(1, (3, GROUP))


def _split(video: Tensor) -> list[Tensor]:
    """The groups `[B, 3, 4, H, W]` of a video, the first frame repeated four times."""
    shape = tuple(video.shape)
    if video.ndim != 5 or shape[1] != 3 or shape[3] % PATCH or shape[4] % PATCH:
        raise InvalidSetting(
            f"video has shape {shape}, expected [B, 3, T, H, W] with H and W multiples of {PATCH}"
        )
    if shape[2] % GROUP != 1:
        raise InvalidSetting(
            f"video has {shape[2]} frames, expected 1 + a multiple of {GROUP} (1, 5, 9, ...): "
            "drop or repeat frames at its end"
        )
    first = video[:, :, :1].expand(-1, -1, GROUP, -1, -1)
    return [first, *video[:, :, 1:].split(GROUP, dim=2)] if shape[2] > 1 else [first]


def save_codec(codec: DigitsCodec, path: str | Path) -> None:
    """Write weights (float16, exact for a codec from `load_codec`) and settings as safetensors."""
    from safetensors.torch import save

    weights = {name: value.half().contiguous() for name, value in codec.state_dict().items()}
    Path(path).write_bytes(save(weights, metadata={"codec": json.dumps(codec.settings)}))


def load_codec(path: str | Path | None = None) -> DigitsCodec:
    """The shipped codec (or the one at `path`), float32, in evaluation mode, without gradients."""
    from safetensors import safe_open

    shipped = resources.files("packcache.digits") / "weights" / "codec.safetensors"
    with safe_open(str(path or shipped), framework="pt") as file:
        settings = json.loads(file.metadata()["codec"])
        names = list(file.keys())
        weights = {name: file.get_tensor(name).float() for name in names}
    codec = DigitsCodec(**settings)
    codec.load_state_dict(weights)
    return codec.eval().requires_grad_(False)
