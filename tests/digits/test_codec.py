"""The digits codec: exactly causal, the Cosmos interface; motion moves tokens, looks stay."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from packcache.digits import world
from packcache.digits.codec import LEVELS, DigitsCodec, load_codec, save_codec
from packcache.errors import InvalidSetting

CODES = math.prod(LEVELS)
LOOKS = math.prod(LEVELS[:-1])  # the last number of a token is motion


@pytest.fixture(scope="module")
def codec() -> DigitsCodec:
    return load_codec()


def noise(frames: int, size: int = world.SIZE, seed: int = 0) -> torch.Tensor:
    """A video that no two groups share, float32 `[1, 3, frames, size, size]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, frames, size, size, generator=generator) * 2 - 1


def test_shapes_types_and_range(codec):
    video = torch.cat((noise(9, 32), noise(9, 32, seed=1)))
    indices, codes = codec.encode(video)
    assert indices.shape == (2, 3, 4, 4)
    assert indices.dtype == torch.int32
    assert codes.shape == (2, len(LEVELS), 3, 4, 4)
    assert 0 <= indices.min() <= indices.max() < CODES == 1600
    assert codes.abs().max() <= 1
    assert codec.decode(indices).shape == video.shape


def test_one_frame_is_one_latent_frame(codec):
    indices, _ = codec.encode(noise(1))
    assert indices.shape == (1, 1, 12, 12)
    assert codec.decode(indices).shape == (1, 3, 1, 96, 96)


def test_codes_are_those_of_the_indices(codec):
    indices, codes = codec.encode(noise(5))
    assert torch.equal(codec.fsq.indices_to_codes(indices).movedim(-1, 1), codes)


def test_every_index_names_one_code(codec):
    indices = torch.arange(CODES)
    codes = codec.fsq.indices_to_codes(indices)
    assert len(codes.unique(dim=0)) == CODES
    assert torch.equal(codec.fsq.codes_to_indices(codes), indices)


@pytest.mark.parametrize(("frame", "latent"), [(0, 0), (1, 1), (4, 1), (5, 2), (12, 3)])
def test_encoding_a_frame_touches_its_own_group_only(codec, frame, latent):
    video = noise(13)
    before, _ = codec.encode(video)
    video[:, :, frame] = noise(1, seed=1)[:, :, 0]
    after, _ = codec.encode(video)
    changed = [t for t in range(4) if not torch.equal(before[:, t], after[:, t])]
    assert changed == [latent]


@pytest.mark.parametrize("latent", range(4))
def test_decoding_a_latent_frame_touches_its_own_pixels_only(codec, latent):
    indices, _ = codec.encode(noise(13))
    before = codec.decode(indices)
    indices[:, latent] = (indices[:, latent] + 500) % CODES
    after = codec.decode(indices)
    changed = [t for t in range(13) if not torch.equal(before[:, :, t], after[:, :, t])]
    assert changed == ([0] if latent == 0 else list(range(4 * latent - 3, 4 * latent + 1)))


def test_a_shorter_clip_is_the_start_of_the_longer_one(codec):
    video = noise(13)
    indices, _ = codec.encode(video)
    short, _ = codec.encode(video[:, :, :5])
    assert torch.equal(short, indices[:, :2])
    assert torch.equal(codec.decode(short), codec.decode(indices)[:, :, :5])


def test_moving_by_a_token_moves_the_tokens(codec):
    indices = digit_tokens(codec, "right", x=0)
    assert torch.equal(indices[3, :, 1:], indices[2, :, :-1])
    assert not torch.equal(indices[3], indices[2])


def test_a_picture_keeps_its_looks_when_it_turns_round(codec):
    there, back = (digit_tokens(codec, d, x=16) % LOOKS for d in ("right", "left"))
    assert torch.equal(there[1, :, 2:], back[1, :, :-2])
    assert len(there[1].unique()) > 5


@pytest.mark.parametrize("frames", [2, 4, 24])
def test_other_lengths_are_refused(codec, frames):
    with pytest.raises(InvalidSetting, match=rf"video has {frames} frames, expected 1 \+ a mult"):
        codec.encode(torch.zeros(1, 3, frames, 96, 96))


@pytest.mark.parametrize("shape", [(3, 5, 96, 96), (1, 1, 5, 96, 96), (1, 3, 5, 92, 96)])
def test_other_shapes_are_refused(codec, shape):
    with pytest.raises(InvalidSetting, match="video has shape"):
        codec.encode(torch.zeros(shape))


def test_decoding_nothing_is_refused(codec):
    with pytest.raises(InvalidSetting, match="indices have shape"):
        codec.decode(torch.zeros(1, 0, 8, 8, dtype=torch.int32))


def test_saved_and_loaded_again_it_is_the_same(codec, tmp_path):
    save_codec(codec, tmp_path / "codec.safetensors")
    again = load_codec(tmp_path / "codec.safetensors")
    assert again.settings == codec.settings
    assert all(
        torch.equal(a, b) for a, b in zip(codec.parameters(), again.parameters(), strict=True)
    )


def digit_tokens(codec: DigitsCodec, direction: str, x: int) -> torch.Tensor:
    """Indices `[5, 12, 12]` of 17 frames of a 3 that starts in the middle rows."""
    pytest.importorskip("sklearn", reason="the scans come from scikit-learn")
    digit = world.Digit(value=3, scan=3, colour="red", direction=direction, x=x, y=40)
    return codec.encode(as_video(world.render(world.Scene(digits=(digit,)), 17)))[0][0]


def as_video(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).movedim(-1, 0)[None].float() / 255 * 2 - 1
