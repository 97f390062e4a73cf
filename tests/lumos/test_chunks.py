"""Long clips in pieces: the frames of decoding all at once, exact where the codec allows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packcache.digits.codec import LEVELS, DigitsCodec, load_codec
from packcache.errors import InvalidSetting
from packcache.lumos.codec import CHUNK, check_overlap, chunk_differences, decode_chunks

CODES = 64


class Reaching:
    """A causal decoder of known reach: a latent frame is the mean of itself and `reach` before it.

    It makes `group` frames, each a little darker than the one before, and the first latent frame
    makes the last of them only. A token is 2x2 pixels. `asked` keeps how many each call decoded.
    """

    def __init__(self, reach: int = 0, group: int = 4) -> None:
        self.overlap, self.reach, self.group = max(1, reach), reach, group
        self.asked: list[int] = []

    def encode(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        count = indices.shape[1]
        self.asked.append(count)
        code = indices.double() / CODES
        past = torch.cat((torch.zeros_like(code[:, :1]).repeat(1, self.reach, 1, 1), code), dim=1)
        mean = torch.stack([past[:, i : i + count] for i in range(self.reach + 1)]).mean(0)
        frames = mean.repeat_interleave(self.group, dim=1)
        frames -= torch.arange(self.group).repeat(count)[:, None, None] / 10
        pixels = frames.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return pixels[:, None, self.group - 1 :].expand(-1, 3, -1, -1, -1)


def tokens(latents: int, *, batch: int = 1, codes: int = CODES) -> torch.Tensor:
    """Random indices int32 `[batch, latents, 2, 3]`."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, latents, 2, 3)
    return torch.randint(codes, shape, generator=generator, dtype=torch.int32)


@pytest.fixture(scope="module")
def digits() -> DigitsCodec:
    return load_codec()


@given(
    latents=st.integers(1, 20),
    chunk=st.integers(1, 9),
    reach=st.integers(0, 4),
    more=st.integers(0, 2),
    group=st.sampled_from([2, 4, 8]),
)
def test_the_pieces_are_the_whole(latents, chunk, reach, more, group):
    codec = Reaching(reach, group)
    indices = tokens(latents, batch=2)
    pieces = list(decode_chunks(codec, indices, chunk=chunk, overlap=codec.overlap + more))
    assert len(pieces) == math.ceil(latents / chunk)
    assert all(
        p.shape[2] == group * min(chunk, latents - i * chunk) - (group - 1) * (i == 0)
        for i, p in enumerate(pieces)
    )
    assert torch.equal(torch.cat(pieces, dim=2), codec.decode(indices))


@settings(max_examples=30)
@given(latents=st.integers(1, 20), chunk=st.integers(1, 9), overlap=st.sampled_from([None, 1, 3]))
def test_the_digits_codec_is_exact_with_one_latent_frame(digits, latents, chunk, overlap):
    indices = tokens(latents, codes=math.prod(LEVELS))
    pieces = list(decode_chunks(digits, indices, chunk=chunk, overlap=overlap))
    assert torch.equal(torch.cat(pieces, dim=2), digits.decode(indices))


def test_every_piece_but_the_first_decodes_the_overlap_again():
    codec = Reaching(reach=3)
    list(decode_chunks(codec, tokens(12), chunk=2))
    assert codec.asked == [2, 4, 5, 5, 5, 5]  # there are only two before the second piece


def test_chunks_have_a_default_size_and_are_made_when_asked_for():
    codec = Reaching()
    pieces = decode_chunks(codec, tokens(2 * CHUNK + 1))
    assert codec.asked == []
    assert next(pieces).shape[2] == 1 + 4 * (CHUNK - 1)
    assert codec.asked == [CHUNK]
    list(pieces)
    assert codec.asked == [CHUNK, CHUNK + 1, 2]


def test_the_difference_is_zero_from_the_reach_on_and_seen_below():
    found = chunk_differences(Reaching(reach=3), tokens(20), (1, 2, 3, 4))
    assert list(found) == [1, 2, 3, 4]
    assert found[1] > found[2] > 1
    assert found[3] == found[4] == 0


def test_the_difference_is_in_levels_of_eight_bits():
    """Of a step from 0 to 1, one latent frame of three is lost to padding: a third of 127.5."""
    indices = torch.full((1, 4, 1, 1), CODES)
    found = chunk_differences(Reaching(reach=2), indices, (1, 2), chunk=3)
    assert found[1] == pytest.approx(127.5 / 3, rel=1e-6)
    assert found[2] == 0


def test_the_difference_looks_at_the_pixels_that_are_shown():
    """What both ways clamp to white is no difference."""
    assert chunk_differences(Reaching(reach=2), tokens(9) + 4 * CODES, (1,)) == {1: 0}


def test_the_difference_of_the_digits_codec_is_zero(digits):
    indices = tokens(9, codes=math.prod(LEVELS))
    assert chunk_differences(digits, indices, chunk=3) == {1: 0, 2: 0, 4: 0}


def test_a_difference_that_is_no_number_is_not_lost():
    class Broken(Reaching):
        def decode(self, indices: torch.Tensor) -> torch.Tensor:
            return super().decode(indices) * math.nan

    assert math.isnan(chunk_differences(Broken(), tokens(9), (1,))[1])


@pytest.mark.parametrize("overlap", [0, -1])
def test_no_overlap_is_refused(overlap):
    message = f"overlap is {overlap} latent frames, expected at least 1"
    with pytest.raises(InvalidSetting, match=message):
        decode_chunks(Reaching(), tokens(3), overlap=overlap)
    with pytest.raises(InvalidSetting, match=message):
        check_overlap(overlap)
    assert check_overlap(1) == 1


def test_an_empty_chunk_is_refused():
    with pytest.raises(InvalidSetting, match="chunk is 0 latent frames, expected at least 1"):
        decode_chunks(Reaching(), tokens(3), chunk=0)


def test_a_clip_of_nothing_is_refused_by_the_codec(digits):
    with pytest.raises(InvalidSetting, match="indices have shape"):
        list(decode_chunks(digits, tokens(0)))


def test_a_clip_without_a_seam_has_no_difference_to_tell():
    with pytest.raises(InvalidSetting, match="8 latent frames has no seam at chunk 8: give a lon"):
        chunk_differences(Reaching(), tokens(8))
