"""A comparison as one HTML file that needs no network: video, charts, maps, table."""

from __future__ import annotations

import base64
import html
import io
import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image

from packcache.files import replacing, write_text
from packcache.inspect.compare import Comparison, Entry
from packcache.inspect.picture import colour_of, film_strip, readable_bytes, side_by_side
from packcache.video import write_video

__all__ = ["About", "headline", "render", "save"]

_WIDTH, _HEIGHT = 480, 240
_LEFT, _BOTTOM, _TOP = 72, 28, 10

#: History frames drawn as token grids.
_GRIDS = 6


@dataclass(frozen=True, kw_only=True)
class About:
    """What to know of the clip of a report: paragraphs, then a table, its first row the heads."""

    paragraphs: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def save(comparison: Comparison, folder: Path, about: About | None = None) -> dict[str, Path]:
    """Write compare.mp4, strip.png, report.html and results.json into `folder`."""
    paths = {
        name: folder / name for name in ("compare.mp4", "strip.png", "report.html", "results.json")
    }
    frames = side_by_side(comparison)
    write_video(frames, paths["compare.mp4"], comparison.workload["fps"])
    strip = film_strip(comparison)
    with replacing(paths["strip.png"]) as draft:
        strip.save(draft)
    video = paths["compare.mp4"].read_bytes()
    poster = Image.fromarray(frames[len(frames) // 2])
    write_text(paths["report.html"], render(comparison, video, poster, strip, about))
    write_text(paths["results.json"], json.dumps(comparison.to_json(), indent=1) + "\n")
    return paths


def headline(comparison: Comparison) -> list[tuple[str, str]]:
    """Three numbers a newcomer understands: (number, what it says)."""
    best, full = _hero(comparison), comparison.reference
    own, other = best.clip.stats, full.clip.stats
    faster = comparison.speedups(best)
    return [
        (
            f"{readable_bytes(own.kv_bytes[-1])} instead of {readable_bytes(other.kv_bytes[-1])}",
            f"memory of the {best.label} cache at the end, against the {full.label} cache",
        ),
        (
            f"{faster['speedup_last']:.1f}x faster",
            f"at the last latent frame ({own.last_s:.2f} s instead of {other.last_s:.2f} s)",
        ),
        (
            f"{faster['speedup_total']:.1f}x faster",
            f"for the whole clip ({own.total_s:.1f} s instead of {other.total_s:.1f} s)",
        ),
    ]


def _hero(comparison: Comparison) -> Entry:
    """The policy the headline is about: PackCache where it is compared, else the last."""
    packed = [e for e in comparison.entries if e.label.startswith("packcache")]
    return (packed or comparison.entries[-1:])[0]


def render(
    comparison: Comparison,
    video: bytes,
    poster: Image.Image,
    strip: Image.Image,
    about: About | None = None,
) -> str:
    """The report as HTML text."""
    template = string.Template(
        (resources.files("packcache.inspect") / "report.html").read_text(encoding="utf-8")
    )
    work, escape = comparison.workload, html.escape
    stats = [entry.clip.stats for entry in comparison.entries]
    return template.substitute(
        title=escape(work["prompt"]),
        prompt=escape(work["prompt"]),
        subtitle=escape(
            f"{work['frames']} frames ({work['latent_frames']} latent) at {work['fps']} fps, "
            f"model {work['model']}, seed {work['seed']}; "
            f"{len(comparison.entries)} cache policies with the same noise."
        ),
        about=_about(about or About()),
        numbers="".join(
            f'<div class="number"><b>{escape(number)}</b><span>{escape(what)}</span></div>'
            for number, what in headline(comparison)
        ),
        video=base64.b64encode(video).decode(),
        poster=_png(poster),
        strip=_png(strip),
        key="".join(
            f'<i style="background:{colour_of(n)}"></i>{escape(entry.label)}'
            for n, entry in enumerate(comparison.entries)
        ),
        seconds=_lines([s.frame_s for s in stats], lambda v: f"{v:.2g} s"),
        memory=_lines([s.kv_bytes for s in stats], readable_bytes),
        table=_table(comparison),
        tokens=work["tokens_per_frame"],
        maps="".join(_map(comparison, n) for n in range(len(comparison.entries))),
        grids="".join(_grids(comparison, n) for n in range(len(comparison.entries))),
        workload=escape(json.dumps(work)),
        environment=escape(json.dumps(comparison.environment)),
    )


def _about(about: About) -> str:
    text = "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in about.paragraphs)
    rows = [[html.escape(cell) for cell in row] for row in about.rows]
    return text + (_html_table(rows[0], rows[1:]) if rows else "")


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    heads = "".join(f"<th>{name}</th>" for name in head)
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _lines(series: Sequence[Sequence[float]], label: Callable[[float], str]) -> str:
    """A line chart over latent frames, zero-based, one line a policy."""
    top = max(max(values) for values in series) * 1.05
    last = max(len(values) for values in series) - 1
    wide, high = _WIDTH - _LEFT - 8, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> str:
        return f"{_LEFT + wide * x / max(1, last):.1f},{_TOP + high * (1 - y / top):.1f}"

    parts = []
    for share in (0, 0.5, 1):
        value = top / 1.05 * share
        y = float(place(0, value).split(",")[1])
        parts.append(f'<path d="M{_LEFT} {y}H{_WIDTH - 8}" stroke="#2f3445"/>')
        shown = label(value) if value else "0"
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{shown}</text>')
    for number, values in enumerate(series):
        points = " ".join(place(x, y) for x, y in enumerate(values))
        stroke = colour_of(number)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{stroke}" stroke-width="2.5" '
            'stroke-linejoin="round"/>'
        )
    middle = _LEFT + wide / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">latent frame</text>')
    parts.append(f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 6}" text-anchor="end">{last}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _table(comparison: Comparison) -> str:
    head = (
        "policy",
        "KV at the end",
        "total",
        "faster",
        "expected",
        "last frame",
        "faster",
        "expected",
    )
    rows = []
    for entry in comparison.entries:
        stats, times = entry.clip.stats, comparison.speedups(entry)
        settings = html.escape(repr(entry.clip.policy))
        cells = (
            f"<span title='{settings}'>{html.escape(entry.label)}</span>",
            readable_bytes(stats.kv_bytes[-1]),
            f"{stats.total_s:.2f} s",
            f"{times['speedup_total']:.2f}x",
            f"{times['predicted_total']:.2f}x",
            f"{stats.last_s:.3f} s",
            f"{times['speedup_last']:.2f}x",
            f"{times['predicted_last']:.2f}x",
        )
        rows.append(cells)
    return _html_table(head, rows)


def _map(comparison: Comparison, number: int) -> str:
    """Tokens held of each history frame (rows, newest first on top) after each latent frame."""
    entry = comparison.entries[number]
    kept, whole = entry.clip.stats.kept, comparison.layout.tokens
    size = len(kept)
    cell = 260 / size
    parts = ['<rect width="260" height="260" fill="#12141b"/>']
    for column, held in enumerate(kept):
        for frame, tokens in held.items():
            opacity = 0.15 + 0.85 * tokens / whole
            parts.append(
                f'<rect x="{column * cell:.2f}" y="{260 - (frame + 1) * cell:.2f}" '
                f'width="{cell:.2f}" height="{cell:.2f}" fill="{colour_of(number)}" '
                f'fill-opacity="{opacity:.2f}"><title>after latent frame {column}: frame {frame} '
                f"holds {tokens} of {whole}</title></rect>"
            )
    label = html.escape(entry.label)
    return (
        f"<figure><figcaption>{label}</figcaption>"
        f'<svg viewBox="0 0 260 260" role="img">{"".join(parts)}</svg></figure>'
    )


def _grids(comparison: Comparison, number: int) -> str:
    """The token grids of the newest history frames of one policy."""
    entry, layout = comparison.entries[number], comparison.layout
    newest = sorted(entry.held, reverse=True)[:_GRIDS]
    columns, pitch = 3, 86
    unit = 74 / max(layout.row_length, layout.rows + 1)
    parts = []
    for place, frame in enumerate(newest):
        x, y = place % columns * pitch + 4, place // columns * (pitch + 14) + 14
        held = entry.held[frame]
        title = f"frame {frame}: {len(held)}"
        parts.append(f'<text x="{x}" y="{y - 3}" style="font-size:10px">{title}</text>')
        parts.append(_grid(comparison, set(held), (x, y), unit, colour_of(number)))
    rows = -(-len(newest) // columns) or 1
    inside = "".join(parts) or '<text x="8" y="30">no history is held</text>'
    return (
        f"<figure><figcaption>{html.escape(entry.label)}</figcaption>"
        f'<svg viewBox="0 0 {columns * pitch + 4} {rows * (pitch + 14) + 8}" role="img">'
        f"{inside}</svg></figure>"
    )


def _grid(
    comparison: Comparison, held: set[int], corner: tuple[int, int], unit: float, colour: str
) -> str:
    layout, parts = comparison.layout, []
    ys, xs = layout.cells()
    border = 0
    for offset, (row, column) in enumerate(zip(ys.tolist(), xs.tolist(), strict=True)):
        if row < 0:
            row, column, border = layout.rows, border, border + 1
        fill = colour if offset in held else "#2a2e3d"
        parts.append(
            f'<rect x="{corner[0] + column * unit:.1f}" y="{corner[1] + row * unit:.1f}" '
            f'width="{unit * 0.86:.1f}" height="{unit * 0.86:.1f}" rx="1" fill="{fill}"/>'
        )
    return "".join(parts)
