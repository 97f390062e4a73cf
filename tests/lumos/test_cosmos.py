"""The Cosmos codec on TorchScript files made here: a causal FSQ codec whose reach is known.

TorchScript reads annotations, so they are no strings here (no import from `__future__`).
"""

import math
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from packcache.digits.codec import LEVELS, load_codec
from packcache.errors import GenerationError, InputFileError, InvalidSetting
from packcache.lumos.codec import FSQ, chunk_differences, decode_chunks
from packcache.lumos.config import LumosConfig
from packcache.lumos.cosmos import CosmosCodec, load_cosmos

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

FSQ_LEVELS = LumosConfig.fsq_levels
CODES = math.prod(FSQ_LEVELS)
ORDERS = ((0, 1, 2), (2, 1, 0), (1, 2, 0))


class Encoder(nn.Module):
    """Six numbers a token: means of a patch over its group, and in the group's last frame.

    Gives (indices, codes, loss) in the order asked for. The loss has five axes: a mean of the codes
    that keeps its axes.
    """

    def __init__(
        self,
        *,
        order: Sequence[int] = ORDERS[0],
        index: torch.dtype = torch.int32,
        dtype: torch.dtype = torch.bfloat16,
        group: int = 4,
        patch: int = 8,
    ) -> None:
        super().__init__()
        fsq = FSQ(FSQ_LEVELS)
        self.register_buffer("levels", fsq.levels)
        self.register_buffer("middle", fsq.levels // 2)
        self.register_buffer("basis", fsq.basis)
        self.weight = nn.Parameter(torch.eye(3, dtype=dtype)[:, :, None, None, None])
        self.order = list(order)
        self.index = index
        self.group = group
        self.patch = patch

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        video = F.conv3d(video, self.weight).float()  # fails on pixels of another dtype
        first = video[:, :, :1].expand(-1, -1, self.group, -1, -1)
        video = torch.cat((first, video[:, :, 1:]), dim=2)
        size = [self.group, self.patch, self.patch]
        whole = F.avg_pool3d(video, size)
        last = F.avg_pool3d(video[:, :, self.group - 1 :: self.group], [1, self.patch, self.patch])
        z = torch.cat((whole, last), dim=1).movedim(1, -1)
        digits = (
            ((z * self.middle).round().long() + self.middle).minimum(self.levels - 1).clamp(min=0)
        )
        codes = ((digits - self.middle) / self.middle).movedim(-1, 1).to(self.weight.dtype)
        loss = torch.zeros_like(codes.mean([1, 2, 3], keepdim=True))
        found = [(digits * self.basis).sum(-1).to(self.index), codes, loss]
        return found[self.order[0]], found[self.order[1]], found[self.order[2]]


class Decoder(nn.Module):
    """Pixels are the first three numbers of a token, the mean of its latent frame and `reach` back.

    The frames of a group darken; the first latent frame makes its last one only.
    """

    def __init__(
        self, *, reach: int = 0, dtype: torch.dtype = torch.bfloat16, group: int = 4, patch: int = 8
    ) -> None:
        super().__init__()
        fsq = FSQ(FSQ_LEVELS)
        self.register_buffer("levels", fsq.levels)
        self.register_buffer("basis", fsq.basis)
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))
        self.reach = reach
        self.group = group
        self.patch = patch

    def forward(self, indices: Tensor) -> Tensor:
        assert indices.dtype == torch.int32, "indices are not int32"
        assert indices.shape[0] == 1, "one clip at a time"
        half = self.levels // 2
        digits = indices.long().unsqueeze(-1) // self.basis % self.levels
        codes = ((digits - half) / half).movedim(-1, 1)[:, :3]  # [1, 3, t, h, w]
        count = codes.shape[2]
        past = torch.cat(
            (torch.zeros_like(codes[:, :, :1]).repeat(1, 1, self.reach, 1, 1), codes), 2
        )
        mean = torch.zeros_like(codes)
        for back in range(self.reach + 1):
            mean = mean + past[:, :, back : back + count] / (self.reach + 1)
        video = mean.repeat_interleave(self.group, dim=2)
        video = video - (torch.arange(self.group) / 16).repeat(count)[:, None, None]
        video = video.repeat_interleave(self.patch, 3).repeat_interleave(self.patch, 4)
        return video[:, :, self.group - 1 :].to(self.weight.dtype) * self.weight


class OddEncoder(nn.Module):
    """Gives, of any video, what no encoder gives; `kind` says what."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, h, w = 1 + (video.shape[2] - 1) // 4, video.shape[3] // 8, video.shape[4] // 8
        indices = torch.zeros((1, t, h, w), dtype=torch.int32)
        codes = torch.zeros((1, 6, t, h, w))
        if self.kind == "two indices":
            return indices, indices.long(), codes
        if self.kind == "two codes":
            return indices, codes, codes
        if self.kind == "no codes":
            return indices, codes[:, :4], codes[0]
        if self.kind == "no indices":
            return codes, indices.to(torch.int16), indices.float()
        if self.kind == "nothing":
            return indices[:, :, :0], codes[:, :, :, :0], codes.sum()
        if self.kind == "below":
            return indices - 1, codes, codes.sum()
        return indices + 64000, codes, codes.sum()


class Continuous(nn.Module):
    """Not a tuple: numbers, as an encoder without quantiser gives."""

    def forward(self, video: Tensor) -> Tensor:
        return video[:, :, ::4, ::8, ::8]


class OddDecoder(nn.Module):
    """Fails, or gives what no decoder gives; `kind` says what."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, indices: Tensor) -> Tensor:
        if self.kind == "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        assert self.kind != "fails", "this is not a clip"
        t, h, w = 1 + 4 * (indices.shape[1] - 1), 8 * indices.shape[2], 8 * indices.shape[3]
        if self.kind == "grey":
            return torch.zeros((1, 1, t, h, w))
        if self.kind == "bytes":
            return torch.zeros((1, 3, t, h, w), dtype=torch.uint8)
        return torch.zeros((3, t, h, w))


class Pair(nn.Module):
    def forward(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return indices, indices


def save(folder: Path, **modules: nn.Module) -> Path:
    """A folder with `encoder.jit`, `decoder.jit`, or one of them."""
    for name, module in modules.items():
        torch.jit.script(module).save(str(folder / f"{name}.jit"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The codec as released: bfloat16, int32 indices, the usual order."""
    return save(tmp_path_factory.mktemp("cosmos"), encoder=Encoder(), decoder=Decoder(reach=2))


@pytest.fixture(scope="module")
def codec(folder) -> CosmosCodec:
    return load_cosmos(folder)


def clip(frames: int = 9, *, batch: int = 1, size: tuple[int, int] = (16, 24)) -> Tensor:
    """Random colours, a token each, float32 `[batch, 3, frames, *size]` in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, frames, size[0] // 8, size[1] // 8)
    colours = torch.rand(shape, generator=generator) * 2 - 1
    return colours.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)


def tokens(latents: int, *, batch: int = 1, codes: int = CODES) -> Tensor:
    """Random indices int32 `[batch, latents, 2, 3]`."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, latents, 2, 3)
    return torch.randint(codes, shape, generator=generator, dtype=torch.int32)


def refused(kind: type[Exception], *words: str):
    """An error of one line that says all of this, in this order."""
    return pytest.raises(kind, match="^[^\\n]*" + ".*".join(map(re.escape, words)) + "[^\\n]*$")


# --- there and back ------------------------------------------------------------------------------


def test_shapes_types_and_place(codec):
    video = clip(batch=2)
    indices, codes = codec.encode(video)
    assert (indices.shape, indices.dtype) == ((2, 3, 2, 3), torch.int32)
    assert (codes.shape, codes.dtype) == ((2, 6, 3, 2, 3), torch.bfloat16)
    assert torch.equal(FSQ(FSQ_LEVELS).codes_to_indices(codes.movedim(1, -1)), indices)
    assert len(indices.unique()) > 30
    back = codec.decode(indices)
    assert (back.shape, back.dtype) == (video.shape, torch.bfloat16)
    assert codec.device == indices.device == back.device == torch.device("cpu")


def test_it_is_the_module_that_runs(codec):
    video, indices = clip(), tokens(3)
    assert torch.equal(codec.encode(video)[0], Encoder()(video.bfloat16())[0])
    assert torch.equal(codec.decode(indices), Decoder(reach=2)(indices))


def test_one_frame_is_one_latent_frame(codec):
    indices, _ = codec.encode(clip(1))
    assert indices.shape == (1, 1, 2, 3)
    assert codec.decode(indices).shape == (1, 3, 1, 16, 24)


def test_a_batch_is_its_clips_one_by_one(codec):
    video = clip(batch=3)
    indices, codes = codec.encode(video)
    alone = [codec.encode(one) for one in video.split(1)]
    assert torch.equal(indices, torch.cat([i for i, _ in alone]))
    assert torch.equal(codes, torch.cat([c for _, c in alone]))
    decoded = torch.cat([codec.decode(one) for one in indices.split(1)])
    assert torch.equal(codec.decode(indices), decoded)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_outputs_are_known_by_shape_and_type(codec, tmp_path, order, index):
    save(tmp_path, encoder=Encoder(order=order, index=index), decoder=Decoder())
    # a token wide, the loss has the shape of codes but for their number
    for video in (clip(), clip(1, size=(8, 8))):
        indices, codes = load_cosmos(tmp_path).encode(video)
        expected = codec.encode(video)
        assert indices.dtype == torch.int32
        assert torch.equal(indices, expected[0])
        assert torch.equal(codes, expected[1])


def test_any_integer_index_is_decoded(codec):
    indices = tokens(3)
    assert torch.equal(codec.decode(indices.long()), codec.decode(indices))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pixels_are_cast_to_the_type_of_the_files(tmp_path, dtype):
    save(tmp_path, encoder=Encoder(dtype=dtype), decoder=Decoder(dtype=dtype))
    codec = load_cosmos(tmp_path, dtype=dtype)
    indices, codes = codec.encode(clip().double())
    assert codes.dtype == codec.decode(indices).dtype == dtype


def test_another_type_than_that_of_the_files_is_refused(folder):
    codec = load_cosmos(folder, dtype=torch.float32)
    with refused(
        InputFileError, "encoder.jit failed on float32 [1, 3, 9, 16, 24] (", "change dtype"
    ):
        codec.encode(clip())


def test_no_gradients_are_kept(codec):
    indices, codes = codec.encode(clip())
    assert not codes.requires_grad
    assert not codec.decode(indices).requires_grad


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_digits_codec_as_two_files_gives_its_own_numbers(tmp_path):
    digits = load_codec()
    video = clip(9, size=(32, 32))
    indices, codes = digits.encode(video)
    trace(digits.encode, video).save(str(tmp_path / "encoder.jit"))
    trace(digits.decode, indices).save(str(tmp_path / "decoder.jit"))
    codec = load_cosmos(tmp_path, dtype=torch.float32, levels=LEVELS, overlap=digits.overlap)
    again = codec.encode(video)
    assert torch.equal(again[0], indices)
    assert torch.equal(again[1], codes)
    assert torch.equal(codec.decode(indices), digits.decode(indices))


def trace(method: Callable, given: Tensor) -> torch.jit.ScriptModule:
    """A method of a codec as the forward of a module."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codec = method.__self__

        def forward(self, x: Tensor):
            return method(x)

    return torch.jit.trace(Part(), given)


# --- in pieces -----------------------------------------------------------------------------------


@given(latents=st.integers(1, 12), chunk=st.integers(1, 5), overlap=st.sampled_from([None, 2, 3]))
def test_pieces_are_the_whole_where_the_overlap_covers_the_reach(codec, latents, chunk, overlap):
    indices = tokens(latents)
    pieces = list(decode_chunks(codec, indices, chunk=chunk, overlap=overlap))
    assert torch.equal(torch.cat(pieces, dim=2), codec.decode(indices))


def test_too_small_an_overlap_is_measured(codec):
    found = chunk_differences(codec, tokens(20))
    assert found[1] > 1
    assert found[2] == found[4] == 0


def test_the_overlap_is_a_setting(folder):
    assert load_cosmos(folder).overlap == 4
    assert load_cosmos(folder, overlap=2).overlap == 2
    with refused(InvalidSetting, "overlap is 0 latent frames, expected at least 1"):
        load_cosmos(folder, overlap=0)


# --- files ---------------------------------------------------------------------------------------


def test_decoding_needs_no_encoder(tmp_path, codec):
    save(tmp_path, decoder=Decoder(reach=2))
    alone = load_cosmos(tmp_path)
    alone.check(encoder=False)
    assert torch.equal(alone.decode(tokens(2)), codec.decode(tokens(2)))
    with refused(
        InputFileError, "codec file ", "encoder.jit does not exist: encoder.jit of Cosmos"
    ):
        alone.encode(clip())
    save(tmp_path, encoder=Encoder())
    assert torch.equal(alone.encode(clip())[0], codec.encode(clip())[0])
    (tmp_path / "encoder.jit").unlink()
    assert torch.equal(alone.encode(clip(1))[0], codec.encode(clip(1))[0])  # it was loaded once


def test_a_missing_decoder_is_refused_at_once(tmp_path, folder):
    shutil.copy(folder / "encoder.jit", tmp_path)
    with refused(
        InputFileError, "codec file ", "decoder.jit does not exist: decoder.jit of Cosmos"
    ):
        load_cosmos(tmp_path)
    with refused(InputFileError, "codec file ", "decoder.jit does not exist"):
        load_cosmos(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.9, -1])
def test_a_truncated_file_is_refused(tmp_path, folder, keep):
    whole = (folder / "decoder.jit").read_bytes()
    cut = int(keep * len(whole)) if isinstance(keep, float) else keep
    (tmp_path / "decoder.jit").write_bytes(whole[:cut])
    with refused(InputFileError, "codec file ", " cannot be loaded on cpu (", "get the file again"):
        load_cosmos(tmp_path)


def test_a_file_with_a_wrong_letter_is_refused(tmp_path, folder):
    """PyTorch compares no checksum here: it looks for a weight that has another name now."""
    whole = (folder / "decoder.jit").read_bytes()
    (tmp_path / "decoder.jit").write_bytes(whole.replace(b"weight", b"weighs", 1))
    with refused(InputFileError, "codec file ", " cannot be loaded on cpu (", "get the file again"):
        load_cosmos(tmp_path)


@pytest.mark.parametrize("kind", ["text", "zip", "weights"])
def test_another_kind_of_file_is_refused(tmp_path, kind):
    path = tmp_path / "decoder.jit"
    if kind == "text":
        path.write_text("no archive\n" * 100)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("decoder/readme", "nothing")
    else:
        torch.save({"weight": torch.zeros(2)}, path)
    with refused(
        InputFileError, "codec file ", " cannot be loaded on cpu (", "TorchScript archive"
    ):
        load_cosmos(tmp_path)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_nothing_is_unpickled(tmp_path):
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "decoder.jit")
    with refused(InputFileError, "codec file ", " cannot be loaded"):
        load_cosmos(tmp_path)
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "decoder.jit", weights_only=False)  # the trap works
    assert (tmp_path / "sprung").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(folder):
    with refused(InputFileError, " cannot be loaded on cuda (", "choose another device"):
        load_cosmos(folder, device="cuda")


# --- files of another codec ----------------------------------------------------------------------


def test_the_check_passes_what_fits(folder):
    load_cosmos(folder).check()


def test_another_compression_is_named(tmp_path):
    save(tmp_path, encoder=Encoder(group=8, patch=16), decoder=Decoder(group=8, patch=16))
    codec = load_cosmos(tmp_path)
    with refused(
        InputFileError,
        "decoder.jit has compression 8x16x16 (9x128x128 pixels, 2x8x8 tokens), expected 4x8x8: "
        "take the codec that the model was trained with",
    ):
        codec.check()
    with refused(InputFileError, "decoder.jit has compression ?x16x16 (1x32x48 pixels, 1x2x3 tok"):
        codec.decode(tokens(1))
    with refused(InputFileError, "encoder.jit has compression 8x16x16 (9x32x32 pixels, 2x2x2 tok"):
        codec.encode(clip(9, size=(32, 32)))
    with refused(InputFileError, "encoder.jit has compression ?x16x16 (1x16x16 pixels, 1x1x1 tok"):
        codec.encode(clip(1, size=(16, 16)))
    right = load_cosmos(tmp_path, compression=(8, 16, 16))
    right.check()
    assert right.decode(tokens(3)).shape == (1, 3, 17, 32, 48)


def test_the_check_sees_an_encoder_of_another_compression(tmp_path):
    codec = load_cosmos(save(tmp_path, encoder=Encoder(patch=16), decoder=Decoder()))
    codec.check(encoder=False)
    with refused(InputFileError, "encoder.jit has compression 4x16x16 (5x64x64 pixels, 2x4x4 toke"):
        codec.check()


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("two indices", "int32 [1, 3, 2, 3], int64 [1, 3, 2, 3], float32 [1, 6, 3, 2, 3]"),
        ("two codes", "int32 [1, 3, 2, 3], float32 [1, 6, 3, 2, 3], float32 [1, 6, 3, 2, 3]"),
        ("no codes", "int32 [1, 3, 2, 3], float32 [1, 4, 3, 2, 3], float32 [6, 3, 2, 3]"),
        ("no indices", "float32 [1, 6, 3, 2, 3], int16 [1, 3, 2, 3], float32 [1, 3, 2, 3]"),
    ],
)
def test_an_output_that_is_not_clear_is_refused(tmp_path, kind, found):
    codec = load_cosmos(save(tmp_path, encoder=OddEncoder(kind), decoder=Decoder()))
    with refused(
        InputFileError,
        f"encoder.jit gave {found}, expected one integer [1, t, h, w] and one floating "
        "[1, 6, t, h, w]: take the encoder.jit of a discrete video tokenizer",
    ):
        codec.encode(clip())


def test_an_encoder_without_quantiser_is_refused(tmp_path):
    codec = load_cosmos(save(tmp_path, encoder=Continuous(), decoder=Decoder()))
    with refused(InputFileError, "encoder.jit gave bfloat16 [1, 3, 3, 2, 3], expected one integer"):
        codec.encode(clip())


def test_an_encoder_that_gives_no_tokens_is_refused(tmp_path):
    codec = load_cosmos(save(tmp_path, encoder=OddEncoder("nothing"), decoder=Decoder()))
    with refused(
        InputFileError, "encoder.jit has compression 4x?x8 (9x16x24 pixels, 3x0x3 tokens)"
    ):
        codec.encode(clip())


@pytest.mark.parametrize(("kind", "value"), [("below", -1), ("beyond", 64000)])
def test_indices_of_another_quantiser_are_refused(tmp_path, kind, value):
    codec = load_cosmos(save(tmp_path, encoder=OddEncoder(kind), decoder=Decoder()))
    with refused(InputFileError, f"gave indices {value} to {value}, expected 0 to 63999 of levels"):
        codec.encode(clip())


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("grey", "float32 [1, 1, 5, 16, 24]"),
        ("bytes", "uint8 [1, 3, 5, 16, 24]"),
        ("flat", "float32 [3, 5, 16, 24]"),
    ],
)
def test_a_decoder_that_gives_no_video_is_refused(tmp_path, kind, found):
    codec = load_cosmos(save(tmp_path, decoder=OddDecoder(kind)))
    with refused(
        InputFileError, f"decoder.jit gave {found}, expected one floating [1, 3, T, H, W]"
    ):
        codec.decode(tokens(2))


def test_a_decoder_that_gives_two_things_is_refused(tmp_path):
    codec = load_cosmos(save(tmp_path, decoder=Pair()))
    with refused(
        InputFileError, "decoder.jit gave int32 [1, 2, 2, 3], int32 [1, 2, 2, 3], expected"
    ):
        codec.decode(tokens(2))


def test_a_failure_inside_a_file_is_told_in_one_line(tmp_path):
    codec = load_cosmos(save(tmp_path, decoder=OddDecoder("fails")))
    with refused(
        InputFileError,
        "decoder.jit failed on int32 [1, 2, 2, 3] (AssertionError: this is not a clip): expected "
        "decoder.jit of torch.bfloat16 for cpu, compression 4x8x8; take the right file",
    ):
        codec.decode(tokens(2))


def test_running_out_of_memory_is_not_the_files_fault(tmp_path):
    codec = load_cosmos(save(tmp_path, decoder=OddDecoder("memory")))
    with refused(
        GenerationError,
        "decoder.jit failed on int32 [1, 2, 2, 3] (CUDA out of memory. Tried to allocate 2.00 GiB)",
        "fewer or smaller frames at a time",
    ):
        codec.decode(tokens(2))


# --- wrong use -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(3, 9, 16, 16), (1, 1, 9, 16, 16), (1, 3, 9, 12, 16), (1, 3, 9, 16, 20), (0, 3, 1, 8, 8)],
)
def test_a_video_of_another_shape_is_refused(codec, shape):
    with refused(
        InvalidSetting, f"video is float32 {list(shape)}, expected floating [B, 3, T, H, W]"
    ):
        codec.encode(torch.zeros(shape))


def test_bytes_are_no_video(codec):
    with refused(InvalidSetting, "video is uint8 [1, 3, 1, 8, 8], expected floating"):
        codec.encode(torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_a_count_of_frames_between_groups_is_refused(codec, frames):
    with refused(InvalidSetting, f"video has {frames} frames, expected 1 + a multiple of 4: drop"):
        codec.encode(clip(frames))


@pytest.mark.parametrize("shape", [(2, 2, 3), (1, 0, 2, 3)])
def test_indices_of_another_shape_are_refused(codec, shape):
    with refused(InvalidSetting, f"indices are int32 {list(shape)}, expected int32 or int64 [B, t"):
        codec.decode(torch.zeros(shape, dtype=torch.int32))


def test_indices_are_integers(codec):
    with refused(InvalidSetting, "indices are float32 [1, 2, 2, 3], expected int32 or int64"):
        codec.decode(tokens(2).float())


@pytest.mark.parametrize("worst", [-1, CODES, 65536, 2**32])
def test_indices_out_of_range_are_refused(codec, worst):
    indices = tokens(2).long()
    indices[0, 0, 0, 0] = worst
    with refused(InvalidSetting, "indices are ", "expected 0 to 63999: take the codec's indices"):
        codec.decode(indices)
