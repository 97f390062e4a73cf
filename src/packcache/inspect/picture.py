"""The side-by-side clip and the film strip: what a comparison looks like."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from packcache.inspect.compare import Comparison, Entry
from packcache.lumos.vocab import latent_frames
from packcache.video import Frames

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

__all__ = ["COLOURS", "colour_of", "film_strip", "readable_bytes", "side_by_side"]

INK, SOFT, PAPER, TRACK = "#f2f3f7", "#9aa0b4", "#14161e", "#2a2e3d"

#: One colour a policy, in the order of the comparison; readable on dark and on white.
COLOURS = ("#e5734f", "#8e7cf0", "#35b58f", "#d9a521", "#4b9fe0", "#d667a8", "#7d8597")

_PANEL, _GAP, _MARGIN, _TOP = 288, 24, 28, 112

#: Width of the names left of a film strip, and how many of its frames are given ones.
_LABEL, _GIVEN = 228, 3


def colour_of(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def readable_bytes(count: float) -> str:
    """A size for people: 1.9 MB, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def side_by_side(comparison: Comparison) -> Frames:
    """Frames `[T, H, W, 3]`: every policy's clip with its memory growing below it."""
    count = len(comparison.entries)
    width = 2 * _MARGIN + count * _PANEL + (count - 1) * _GAP
    height = _TOP + _PANEL + 70
    most = max(max(entry.clip.stats.kv_bytes) for entry in comparison.entries)
    base = _canvas(width, height, comparison)
    number = len(comparison.entries[0].clip.frames)
    return np.stack([_moment(base, comparison, at, most) for at in range(number)])


def _canvas(width: int, height: int, comparison: Comparison) -> Image.Image:
    """What does not move: title and names."""
    image = Image.new("RGB", (width + width % 2, height + height % 2), PAPER)
    draw = ImageDraw.Draw(image)
    title = f"“{comparison.workload['prompt']}”"
    title = _fitting(draw, title, _font(22), width - 2 * _MARGIN - 110)
    draw.text((_MARGIN, 16), title, INK, font=_font(22))
    for number, entry in enumerate(comparison.entries):
        left = _MARGIN + number * (_PANEL + _GAP)
        name, _, settings = entry.label.partition(":")
        draw.text((left, 56), name, colour_of(number), font=_font(20))
        settings = _fitting(draw, settings, _font(13), _PANEL)
        draw.text((left, 84), settings, SOFT, font=_font(13))
    return image


def _moment(base: Image.Image, comparison: Comparison, at: int, most: int) -> Frames:
    image = base.copy()
    draw = ImageDraw.Draw(image)
    latent = latent_frames(at + 1) - 1
    clock = f"frame {at + 1}"
    draw.text((image.width - _MARGIN, 20), clock, SOFT, font=_font(16), anchor="ra")
    for number, entry in enumerate(comparison.entries):
        left = _MARGIN + number * (_PANEL + _GAP)
        _paste(draw, image, entry.clip.frames[at], (left, _TOP), _PANEL)
        if at < comparison.workload["given_frames"]:
            _mark(draw, (left + 8, _TOP + 8), "given")
        _memory(draw, entry, latent, most, (left, _TOP + _PANEL + 16), colour_of(number))
    return np.asarray(image)


def _mark(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str) -> None:
    """A small plate on a picture: light on dark, so that it shows on any clip."""
    left, top = corner
    width = round(draw.textlength(text, _font(13))) + 14
    draw.rounded_rectangle((left, top, left + width, top + 21), 5, fill=PAPER, outline=SOFT)
    draw.text((left + width / 2, top + 10), text, INK, font=_font(13), anchor="mm")


def _memory(
    draw: ImageDraw.ImageDraw,
    entry: Entry,
    latent: int,
    most: int,
    corner: tuple[int, int],
    colour: str,
) -> None:
    """A bar of the cache held now against the largest of all, and two numbers."""
    left, top = corner
    held, seconds = entry.clip.stats.kv_bytes[latent], entry.clip.stats.frame_s[latent]
    filled = left + max(2, round(_PANEL * held / most))
    draw.rounded_rectangle((left, top, left + _PANEL, top + 10), 5, fill=TRACK)
    draw.rounded_rectangle((left, top, filled, top + 10), 5, fill=colour)
    draw.text((left, top + 18), f"cache {readable_bytes(held)}", INK, font=_font(16))
    text = f"{seconds:.2f} s a latent frame"
    draw.text((left + _PANEL, top + 18), text, SOFT, font=_font(16), anchor="ra")


def film_strip(comparison: Comparison, columns: int = 9, cell: int = 112) -> Image.Image:
    """One row a policy, frames evenly over the clip: the comparison at a glance."""
    given = comparison.workload["given_frames"]
    shown = _columns(len(comparison.entries[0].clip.frames), given, columns)
    marked = int((shown < given).sum())
    label, gap, top = _LABEL, 6, 96 if marked else 70
    width = label + len(shown) * (cell + gap) + _MARGIN
    height = top + len(comparison.entries) * (cell + gap) + 22
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, 14), f"“{comparison.workload['prompt']}”", INK, font=_font(20))
    for column, at in enumerate(shown):
        left = label + column * (cell + gap)
        draw.text((left + cell / 2, top - 8), f"{at + 1}", SOFT, font=_font(14), anchor="md")
    if marked:
        end = label + marked * (cell + gap) - gap
        draw.text((label, top - 34), "given", INK, font=_font(13), anchor="ls")
        draw.line((label + 44, top - 38, end, top - 38), SOFT, 1)
    for row, entry in enumerate(comparison.entries):
        y = top + row * (cell + gap)
        _row_label(draw, entry, y, colour_of(row))
        for column, at in enumerate(shown):
            x = label + column * (cell + gap)
            _paste(draw, image, entry.clip.frames[at], (x, y), cell)
    return image


def _columns(total: int, given: int, columns: int) -> np.ndarray:
    """Frames to show: evenly spaced, but no more than three of a given start."""
    before, after = np.arange(min(given, 1)), np.arange(min(given, 1), total)
    if given > 1:
        before, after = _spread(np.arange(given), _GIVEN), np.arange(given, total)
    return np.concatenate((before, _spread(after, columns - len(before))))


def _spread(frames: np.ndarray, count: int) -> np.ndarray:
    """So many of the frames, or all of them, evenly, ends included."""
    return frames[np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))]


def _row_label(draw: ImageDraw.ImageDraw, entry: Entry, y: int, colour: str) -> None:
    stats = entry.clip.stats
    name, _, settings = entry.label.partition(":")
    draw.text((_MARGIN, y + 4), name, colour, font=_font(18))
    for line in _two_lines(draw, settings, _font(13), _LABEL - _MARGIN - 8):
        y += 16
        draw.text((_MARGIN, y + 12), line, SOFT, font=_font(13))
    y += 30
    draw.text((_MARGIN, y), f"cache {readable_bytes(stats.kv_bytes[-1])}", INK, font=_font(14))
    draw.text((_MARGIN, y + 17), f"clip {stats.total_s:.1f} s", SOFT, font=_font(14))
    draw.text((_MARGIN, y + 34), f"last {stats.last_s:.2f} s", SOFT, font=_font(14))


def _two_lines(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: float) -> list[str]:
    """The text in up to two lines, broken at a comma, the second cut to fit."""
    if not text or draw.textlength(text, font) <= width:
        return [text] if text else []
    parts = text.split(",")
    count = len(parts) - 1
    while count > 1 and draw.textlength(",".join(parts[:count]), font) > width:
        count -= 1
    lines = (",".join(parts[:count]), ",".join(parts[count:]))
    return [_fitting(draw, line, font, width) for line in lines if line]


def _fitting(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: float) -> str:
    """The text, or as much of it as the width takes, with an ellipsis."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


def _paste(
    draw: ImageDraw.ImageDraw, image: Image.Image, frame: Frames, corner: tuple[int, int], size: int
) -> None:
    """A frame enlarged, with a thin line around it: dark clips end where the paper begins."""
    left, top = corner
    image.paste(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC), corner)
    draw.rectangle((left - 1, top - 1, left + size, top + size), outline=TRACK)


def _font(size: int) -> _Font:
    return ImageFont.load_default(size)
