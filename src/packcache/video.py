"""Pictures in, videos out. A file appears under its final name whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from packcache.errors import InputFileError, InvalidSetting, OutputError

Frames = NDArray[np.uint8]

__all__ = ["check_folder", "check_output", "read_image", "replacing", "write_text", "write_video"]

#: Constant quality of H.264; 10 keeps flat colours flat at this size.
_CRF = "10"


def check_output(path: str | Path) -> Path:
    """The path, if a clip can be written there: .mp4, .gif, or no suffix for a folder of PNG.

    Call it before generating: a wrong suffix or a missing or closed folder costs nothing then.
    """
    path = Path(path)
    if path.suffix.lower() not in (".mp4", ".gif", ""):
        raise InvalidSetting(
            f"cannot write {path.name!r}: known are .mp4, .gif, and a name without suffix for a "
            "folder of PNG"
        )
    if path.suffix and path.is_dir():
        raise OutputError(f"{path} is a folder, expected a file name such as {path / 'clip.mp4'}")
    if not path.suffix and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} exists and is not an empty folder: give another name")
    check_folder(path.parent)
    return path


def check_folder(folder: Path) -> Path:
    """The folder, if it exists and can be written to (tried, not guessed)."""
    if not folder.is_dir():
        raise OutputError(f"folder {folder} does not exist: create it or choose another")
    try:
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OutputError(
            f"folder {folder} is not writable ({error.strerror}): choose another"
        ) from error


def check_output_folder(path: Path) -> Path:
    """The path, if it is a folder that can be written to, or one can be made there."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, expected a folder: choose another --out")
    check_folder(path if path.is_dir() else path.parent)
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place at the end, or vanishes on failure."""
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        draft = work / path.name
        yield draft
        if path.is_dir() and draft.is_dir():
            path.rmdir()  # empty, as check_output saw
        draft.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; nothing was left there"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_video(frames: Frames, path: str | Path, fps: float) -> Path:
    """Write frames `[T, H, W, 3]` uint8: H.264 yuv420p at the true fps, a GIF, or PNG files."""
    path = check_output(path)
    writer = {".mp4": _write_mp4, ".gif": _write_gif, "": _write_png}[path.suffix.lower()]
    with replacing(path) as draft:
        writer(np.ascontiguousarray(frames), draft, fps)
    return path


def _write_mp4(frames: Frames, path: Path, fps: float) -> None:
    import av
    from av.error import FFmpegError

    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise InvalidSetting(f"frames are {width}x{height}, expected even sizes for yuv420p")
    try:
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": _CRF}
            for picture in frames:
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


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """An RGB picture from a file; transparency is blended on white."""
    path = Path(path)
    try:
        with Image.open(path) as opened:
            opened.load()
            image = opened.convert("RGBA")
    except FileNotFoundError:
        raise InputFileError(f"image {path} does not exist: check the name") from None
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        size = path.stat().st_size if path.is_file() else 0
        why = "is empty" if path.is_file() and not size else f"cannot be read ({error})"
        raise InputFileError(f"image {path} {why}: expected a PNG, JPEG or WebP picture") from None
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
