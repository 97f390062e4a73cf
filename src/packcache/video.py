"""Pictures and videos, in and out. A file appears under its final name whole, or not at all."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from packcache.errors import InputFileError, InvalidSetting, OutputError
from packcache.files import check_folder, replacing

Frames = NDArray[np.uint8]

__all__ = [
    "at_rate",
    "check_output",
    "read_image",
    "read_video",
    "to_rgb",
    "write_mp4",
    "write_video",
]

#: Constant quality of H.264; 10 keeps flat colours flat at this size.
_CRF = "10"

#: Equal frames make equal files. With the encoder's defaults they do not: its macroblock tree made
#: clips that differed from call to call by several levels, and threads follow the machine's cores.
_STEADY = {"threads": "1", "x264-params": "mbtree=0"}

#: What Pillow is told, by suffix of a file that holds one picture: as true to the pixels as it can.
_PICTURES: dict[str, dict[str, Any]] = {
    ".png": {},
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"lossless": True},
}


def check_output(path: str | Path, frames: int | None = None) -> Path:
    """The path, if a clip of so many frames (None: not known yet) can be written there.

    .mp4, .gif, no suffix for a folder of PNG, or for exactly one frame .png, .jpg, .jpeg, .webp.
    Call it before generating: a wrong suffix or a missing or closed folder costs nothing then.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".mp4", ".gif", "", *_PICTURES):
        raise InvalidSetting(
            f"cannot write {path.name!r}: known are .mp4, .gif, and a name without suffix for a "
            f"folder of PNG; for one frame also {', '.join(_PICTURES)}"
        )
    if suffix in _PICTURES and frames not in (None, 1):
        raise InvalidSetting(
            f"cannot write {frames} frames to {path.name!r}, expected 1 for {suffix}: use .mp4, "
            "or a name without suffix for a folder of PNG"
        )
    if path.suffix and path.is_dir():
        raise OutputError(f"{path} is a folder, expected a file name such as {path / 'clip.mp4'}")
    if not path.suffix and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} exists and is not an empty folder: give another name")
    check_folder(path.parent)
    return path


def write_video(frames: Frames, path: str | Path, fps: float) -> Path:
    """Write frames `[T, H, W, 3]` uint8: H.264 yuv420p at the true fps, a GIF, or pictures."""
    path = check_output(path, len(frames))
    writers = {".mp4": write_mp4, ".gif": _write_gif, "": _write_png}
    writer = writers.get(path.suffix.lower(), _write_picture)
    with replacing(path) as draft:
        writer(np.ascontiguousarray(frames), draft, fps)
    return path


def write_mp4(frames: Frames, path: Path, fps: float) -> None:
    """Write frames `[T, H, W, 3]` uint8 to where they are to be read, or to a draft of it.

    H.264 yuv420p, all frames, at their rate. Raises InvalidSetting for odd sizes, OSError where it
    cannot be written.
    """
    import av
    from av.error import FFmpegError

    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise InvalidSetting(f"frames are {width}x{height}, expected even sizes for yuv420p")
    try:
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": _CRF, **_STEADY}
            for picture in np.ascontiguousarray(frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    except FFmpegError as error:
        raise OSError(error.errno, f"{error.strerror}") from error


def _write_gif(frames: Frames, path: Path, fps: float) -> None:
    first, *rest = (Image.fromarray(frame) for frame in frames)
    duration = round(1000 / fps)
    first.save(path, save_all=True, append_images=rest, duration=duration, loop=0)


def _write_png(frames: Frames, path: Path, fps: float) -> None:
    path.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{number:05d}.png")


def _write_picture(frames: Frames, path: Path, fps: float) -> None:
    Image.fromarray(frames[0]).save(path, **_PICTURES[path.suffix.lower()])


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """An RGB picture from a file, turned as its EXIF data says; see `to_rgb`."""
    path = Path(path)
    try:
        with Image.open(path) as opened:
            opened.load()
            return to_rgb(ImageOps.exif_transpose(opened))
    except (
        OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError,
    ) as error:  # fmt: skip
        raise _unreadable("image", path, error, "a PNG, JPEG or WebP picture") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB: transparency blended on white, 16 bits scaled to 8.

    Raises ValueError for pixels whose range is not known (32-bit floats, LAB).
    """
    if image.mode in ("F", "LAB"):
        raise ValueError(f"pixel mode {image.mode}")
    if image.mode.startswith("I"):  # Pillow would clip at 255; "I" is how it once read 16 bits
        wide = np.asarray(image, dtype=np.int64).clip(0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def read_video(path: str | os.PathLike[str]) -> tuple[Frames, float | None]:
    """All frames `[T, H, W, 3]` uint8 of a file, or of a folder of PNG in the order of their names.

    With them the frames per second; None where nothing says it, as in a folder. Rotation marks of
    the container are not applied.
    """
    path = Path(path)
    try:
        pictures, fps = _read_folder(path) if path.is_dir() else _read_file(path)
        if not pictures:
            raise ValueError("no frame in it")
        if len(sizes := {picture.shape[1::-1] for picture in pictures}) > 1:
            named = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
            raise ValueError(f"frames of different sizes: {named}")
    except (OSError, ValueError) as error:
        expected = "a video such as .mp4, .gif or .webm, or a folder of PNG of one size"
        raise _unreadable("video", path, error, expected) from None
    return np.stack(pictures), fps


def at_rate(frames: Frames, rate: float, wanted: float) -> Frames:
    """The frames shown `wanted` times a second, out of `rate`: the one nearest to each moment."""
    count = max(1, round(len(frames) * wanted / rate))
    moments = np.rint(np.arange(count) * rate / wanted).astype(int)
    return frames[moments.clip(0, len(frames) - 1)]


def _read_file(path: Path) -> tuple[list[Frames], float | None]:
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("no video in it")
            stream = container.streams.video[0]
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            rate = stream.average_rate or stream.guessed_rate
    except FFmpegError as error:
        raise OSError(error.errno, error.strerror) from error  # FileNotFoundError where it is one
    return pictures, float(rate) if rate else None


def _read_folder(path: Path) -> tuple[list[Frames], None]:
    names = sorted(file for file in path.iterdir() if file.suffix.lower() == ".png")
    return [np.asarray(read_image(name)) for name in names], None


def _unreadable(kind: str, path: Path, error: Exception, expected: str) -> InputFileError:
    """The one line for a picture or a video that is missing, empty or not what it should be."""
    if isinstance(error, FileNotFoundError):
        return InputFileError(f"{kind} {path} does not exist: check the name")
    empty = path.is_file() and not path.stat().st_size
    cause = getattr(error, "strerror", None) or error  # without the number and the path again
    why = "is empty" if empty else f"cannot be read ({cause})"
    return InputFileError(f"{kind} {path} {why}: expected {expected}")
