"""The one encoder setting of all clips: equal frames make equal files.

That is not so with the encoder's own defaults: on this one machine x264's macroblock tree made
clips that differed from call to call by several grey levels, and with more cores it splits the work
in another way. Both are switched off.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from packcache.errors import InvalidSetting
from packcache.video import Frames

__all__ = ["CRF", "encode"]

#: Constant quality, as VBench suggests (evaluation 1).
CRF = 10

_OPTIONS = {"crf": str(CRF), "threads": "1", "x264-params": "mbtree=0"}


def encode(frames: Frames, path: Path, fps: float) -> None:
    """Write frames `[T, H, W, 3]` uint8 as H.264 yuv420p, all of them, at their rate.

    Raises InvalidSetting for odd sizes, OSError where it cannot be written.
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
            stream.options = _OPTIONS
            for picture in np.ascontiguousarray(frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    except FFmpegError as error:
        raise OSError(error.errno, f"{error.strerror}") from error
