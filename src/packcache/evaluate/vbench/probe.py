"""What a clip on the disk really is: every frame decoded, the encoder's own words read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from packcache.errors import InputFileError

__all__ = ["Facts", "probe"]

#: x264 writes its settings into the stream.
_QUALITY = re.compile(rb"x264 - core [^\0]*? (crf=[0-9.]+|qp=[0-9]+|bitrate=[0-9]+)")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A clip: frames decoded, frames a second as a fraction, pixels, how it was encoded."""

    frames: int
    fps: str
    width: int
    height: int
    encoder: str

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


def probe(path: Path) -> Facts:
    """Decodes the whole clip. Raises InputFileError where that fails or frames are missing."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("no video in it")
            stream = container.streams.video[0]
            frames = sum(1 for _ in container.decode(stream))
            if frames != stream.frames:
                raise ValueError(f"{frames} frames of {stream.frames} can be decoded")
            codec = stream.codec_context
            told = _QUALITY.search(path.read_bytes())
            quality = told[1].decode() if told else "quality unknown"
            return Facts(
                frames=frames,
                fps=str(stream.average_rate),
                width=codec.width,
                height=codec.height,
                encoder=f"{codec.name} {codec.pix_fmt} {quality}",
            )
    except (FFmpegError, OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputFileError(f"clip {path} cannot be read ({why}): make it again") from None
