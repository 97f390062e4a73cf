"""Pictures and videos, in and out: true to the pixels, whole or not there, one line if broken."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from packcache import video
from packcache.errors import InputFileError, InvalidSetting, OutputError
from packcache.video import at_rate, check_output, read_image, read_video, to_rgb, write_video

PICTURES = [".png", ".jpg", ".jpeg", ".webp"]

#: Seven frames of flat colours and one dark corner, so that order, colour and direction show.
CLIP = np.zeros((7, 32, 48, 3), dtype=np.uint8)
CLIP[:] = np.array([[t * 30, 200 - t * 20, 90] for t in range(7)], dtype=np.uint8)[:, None, None]
CLIP[:, :8, :8] = 0


def off(one: np.ndarray, other: np.ndarray) -> float:
    """Mean distance in levels of 255."""
    assert one.shape == other.shape and one.dtype == other.dtype == np.uint8
    return float(np.abs(one.astype(int) - other).mean())


# --- one picture out --------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", PICTURES)
def test_one_frame_is_written_as_a_picture(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    assert write_video(CLIP[:1], path, 8.0) == path
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with Image.open(path) as image:
        assert image.format == {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG")
    limit = 1.0 if suffix.startswith(".j") else 0.0  # PNG and WebP lose nothing
    assert off(np.asarray(read_image(path)), CLIP[0]) <= limit


@pytest.mark.parametrize("suffix", [*PICTURES, ".PNG"])
@pytest.mark.parametrize("frames", [0, 2, 48])
def test_several_frames_do_not_fit_a_picture(tmp_path, suffix, frames):
    text = re.escape(
        f"cannot write {frames} frames to 'a{suffix}', expected 1 for {suffix.lower()}: use .mp4, "
        "or a name without suffix for a folder of PNG"
    )
    with pytest.raises(InvalidSetting, match=text):
        check_output(tmp_path / f"a{suffix}", frames)
    with pytest.raises(InvalidSetting, match=text):
        write_video(np.repeat(CLIP[:1], frames, axis=0), tmp_path / f"a{suffix}", 8.0)
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_checked_as_far_as_known(tmp_path):
    for name in ("a.png", "a.webp", "a.mp4", "a.gif", "a"):
        assert check_output(tmp_path / name) == check_output(tmp_path / name, 1) == tmp_path / name
    for name in ("a.mp4", "a.gif", "a"):
        assert check_output(tmp_path / name, 48) == tmp_path / name
    with pytest.raises(InvalidSetting) as caught:
        check_output(tmp_path / "a.avi", 1)
    assert str(caught.value) == (
        "cannot write 'a.avi': known are .mp4, .gif, and a name without suffix for a folder of "
        "PNG; for one frame also .png, .jpg, .jpeg, .webp"
    )


def test_equal_frames_make_equal_files(tmp_path):
    """Not so with the encoder's defaults, whatever the memory looks like and the cores are."""
    frames, made = np.tile(CLIP[[0, 1, 2, 3, 4, 5, 6, 0, 1]], (1, 3, 2, 1)), set()
    for number in range(8):
        churn = [np.full(50_000 * (number + 1), number) for _ in range(4)]
        video.write_mp4(frames.copy(), tmp_path / "clip.mp4", 12)
        made.add((tmp_path / "clip.mp4").read_bytes())
        del churn
    (only,) = made
    assert b" mbtree=0" in only and b" crf=10.0" in only
    video.write_mp4(
        np.tile(CLIP[:1], (1, 12, 14, 1)), tmp_path / "large.mp4", 12
    )  # by default of several threads
    assert b" threads=1 " in (tmp_path / "large.mp4").read_bytes()


@pytest.mark.parametrize(
    "name, writer",
    [
        ("a.mp4", "write_mp4"),
        ("a.gif", "_write_gif"),
        ("a", "_write_png"),
        ("a.webp", "_write_picture"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, name, writer):
    real = getattr(video, writer)

    def full(frames, path, fps):
        real(frames, path, fps)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(video, writer, full)
    with pytest.raises(OutputError) as caught:
        write_video(CLIP[:1], tmp_path / name, 8.0)
    assert str(caught.value) == (
        f"cannot write {tmp_path / name}: No space left on device; nothing was left there"
    )
    assert list(tmp_path.iterdir()) == []


# --- videos in --------------------------------------------------------------------------------


@pytest.mark.parametrize("name, limit, fps", [("a.mp4", 3, 8), ("a.gif", 0, 100 / 12)])
def test_a_written_clip_is_read_again(tmp_path, name, limit, fps):
    write_video(CLIP, tmp_path / name, 8.0)
    frames, rate = read_video(tmp_path / name)
    assert off(frames, CLIP) <= limit  # a GIF counts in hundredths of a second
    assert rate == pytest.approx(fps) and isinstance(rate, float)


def test_webm_is_read(tmp_path):
    with av.open(str(tmp_path / "a.webm"), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=12)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for picture in CLIP:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    frames, fps = read_video(str(tmp_path / "a.webm"))
    assert off(frames, CLIP) <= 6 and fps == 12


@settings(max_examples=10, deadline=None)
@given(count=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_folder_of_png_gives_back_its_pixels(tmp_path_factory, count, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (count, 6, 10, 3), dtype=np.uint8)
    folder = write_video(noise, tmp_path_factory.mktemp("clip") / "frames", 8.0)
    (folder / "notes.txt").touch()
    frames, fps = read_video(folder)
    assert np.array_equal(frames, noise) and fps is None


def test_what_shows_through_in_a_gif_is_white(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.putpixel((1, 1), (0, 255, 0, 255))
    blue = Image.new("RGBA", (8, 8), "blue")
    clear.save(tmp_path / "a.gif", save_all=True, append_images=[blue], duration=100)
    frames, fps = read_video(tmp_path / "a.gif")
    assert frames[:, 0, 0].tolist() == [[255] * 3, [0, 0, 255]]
    assert frames[:, 1, 1].tolist() == [[0, 255, 0], [0, 0, 255]] and fps == 10


def test_the_order_of_names_is_the_order_of_frames(tmp_path):
    for name, shade in (("b.png", 20), ("c.PNG", 30), ("a.png", 10)):
        Image.new("RGB", (2, 2), (shade,) * 3).save(tmp_path / name, "PNG")
    assert read_video(tmp_path)[0][:, 0, 0, 0].tolist() == [10, 20, 30]


def _sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _cut(path: Path) -> None:
    write_video(CLIP, path.with_name("whole.mp4"), 8.0)
    data = path.with_name("whole.mp4").read_bytes()
    path.write_bytes(data[: len(data) - 40])


def _uneven(path: Path) -> None:
    path.mkdir()
    Image.new("RGB", (2, 2)).save(path / "0.png")
    Image.new("RGB", (4, 2)).save(path / "1.png")


BROKEN_VIDEOS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist: check the name"),
    "empty": (lambda path: path.touch(), "is empty: expected a video such as .mp4, .gif or .webm"),
    "text": (lambda path: path.write_text("no video"), "cannot be read (Invalid data found"),
    "cut": (_cut, "cannot be read (Invalid data found"),
    "sound": (_sound, "cannot be read (no video in it): expected a video"),
    "no pictures": (lambda path: path.mkdir(), "cannot be read (no frame in it)"),
    "sizes": (_uneven, "cannot be read (frames of different sizes: 2x2, 4x2)"),
}


@pytest.mark.parametrize("case", BROKEN_VIDEOS)
def test_a_broken_video_is_one_line(tmp_path, case):
    path = tmp_path / ("a.wav" if case == "sound" else "a.mp4")
    spoil, text = BROKEN_VIDEOS[case]
    spoil(path)
    with pytest.raises(InputFileError) as caught:
        read_video(path)
    assert str(caught.value).startswith(f"video {path} {text}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_broken_picture_in_a_folder_is_named(tmp_path):
    (tmp_path / "0.png").write_text("no picture")
    with pytest.raises(InputFileError, match=r"^image .*0\.png cannot be read"):
        read_video(tmp_path)


# --- pictures in ------------------------------------------------------------------------------


def saved(folder: Path, image: Image.Image, name: str = "a.png", **options: object) -> list[int]:
    """The pixel at the top left of the picture, after a file."""
    image.save(folder / name, **options)
    read = read_image(folder / name)
    assert read.mode == "RGB" and read.size == image.size
    return list(read.getpixel((0, 0)))


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_transparency_is_blended_on_white(tmp_path, name):
    options = {} if name == "a.png" else {"lossless": True, "exact": True}
    clear, half = ((2, 2), (255, 0, 0, 0)), ((2, 2), (255, 0, 0, 128))
    assert saved(tmp_path, Image.new("RGBA", *clear), name, **options) == [255, 255, 255]
    assert saved(tmp_path, Image.new("RGBA", *half), name, **options) == [255, 127, 127]


def test_one_channel_and_two_values(tmp_path):
    assert saved(tmp_path, Image.new("L", (2, 2), 77)) == [77] * 3
    assert saved(tmp_path, Image.new("1", (2, 2), 1)) == [255] * 3
    assert saved(tmp_path, Image.new("LA", (2, 2), (0, 0))) == [255] * 3
    assert saved(tmp_path, Image.new("LA", (2, 2), (0, 128))) == [127] * 3


def test_palettes_with_and_without_a_transparent_colour(tmp_path):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    assert saved(tmp_path, image) == [200, 100, 50]
    assert saved(tmp_path, image, transparency=1) == [255] * 3
    assert saved(tmp_path, image, "a.gif") == [200, 100, 50]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name):
    for value, expected in ((0, 0), (128, 0), (129, 1), (32896, 128), (65535, 255)):
        image = Image.fromarray(np.full((2, 2), value, dtype=np.uint16))
        assert image.mode == "I;16"
        assert saved(tmp_path, image, name) == [expected] * 3


@given(value=st.integers(-10, 70000))
def test_wide_whole_numbers_count_as_sixteen_bits(value):
    expected = round(min(max(value, 0), 65535) / 257)
    assert to_rgb(Image.new("I", (1, 1), value)).getpixel((0, 0)) == (expected,) * 3


def test_big_endian_sixteen_bits(tmp_path):
    image = Image.frombytes("I;16B", (1, 1), b"\x80\x80")
    assert to_rgb(image).getpixel((0, 0)) == (128,) * 3


def test_printers_colours(tmp_path):
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for name in ("a.tif", "a.jpg"):
        assert np.allclose(saved(tmp_path, red, name), [255, 0, 0], atol=3)
    grey = Image.new("CMYK", (16, 16), (0, 0, 0, 128))
    assert np.allclose(saved(tmp_path, grey, "a.jpg"), [127] * 3, atol=3)


@pytest.mark.parametrize("turn, corner", [(1, (0, 0)), (3, (3, 1)), (6, (1, 0)), (8, (0, 3))])
def test_pictures_are_turned_as_the_camera_says(tmp_path, turn, corner):
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = turn  # orientation
    image.save(tmp_path / "a.png", exif=exif)
    read = read_image(tmp_path / "a.png")
    assert read.size == ((4, 2) if turn in (1, 3) else (2, 4))
    assert read.getpixel(corner) == (255, 0, 0)


def test_pixels_of_unknown_range_are_refused(tmp_path):
    Image.new("F", (2, 2), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(InputFileError, match=r"cannot be read \(pixel mode F\): expected a PNG"):
        read_image(tmp_path / "a.tif")


def test_a_picture_too_large_to_be_meant_is_refused(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputFileError, match=r"cannot be read \(Image size \(10000 pixels\)"):
        read_image(tmp_path / "a.png")


BROKEN_IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist: check the name"),
    "empty": (lambda path: path.touch(), "is empty: expected a PNG, JPEG or WebP picture"),
    "text": (lambda path: path.write_text("no picture"), "cannot be read ("),
    "folder": (lambda path: path.mkdir(), "cannot be read (Is a directory): expected a PNG"),
}


@pytest.mark.parametrize("case", BROKEN_IMAGES)
def test_a_broken_picture_is_one_line(tmp_path, case):
    spoil, text = BROKEN_IMAGES[case]
    spoil(tmp_path / "a.png")
    with pytest.raises(InputFileError) as caught:
        read_image(tmp_path / "a.png")
    assert str(caught.value).startswith(f"image {tmp_path / 'a.png'} {text}")
    assert len(str(caught.value).splitlines()) == 1


@given(cut=st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_a_picture_cut_anywhere_is_one_line_or_a_picture(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    Image.fromarray(CLIP[0]).save(folder / "a.png")
    data = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(data[:cut])
    try:
        read = read_image(folder / "a.png")
    except InputFileError as error:
        assert len(str(error).splitlines()) == 1
    else:  # no pixel was missing
        assert np.array_equal(np.asarray(read), CLIP[0])


def test_a_clip_at_another_rate():
    frames = np.arange(30, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    assert np.array_equal(at_rate(frames, 12, 12), frames)
    assert at_rate(frames, 30, 12)[:, 0, 0, 0].tolist() == [
        0, 2, 5, 8, 10, 12, 15, 18, 20, 22, 25, 28
    ]  # fmt: skip
    assert at_rate(frames[:3], 12, 24)[:, 0, 0, 0].tolist() == [0, 0, 1, 2, 2, 2]
