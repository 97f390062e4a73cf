"""A benchmark as lines of text: what is predicted, then what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from packcache.bench.workload import FEW
from packcache.lumos.units import show_bytes

__all__ = ["measured_lines", "notes", "predicted_lines", "seconds_text", "title"]


def title(result: Mapping[str, Any]) -> str:
    """What was run, on one line."""
    work, place = result["workload"], result["environment"]
    width, height = work["size"]
    task = {"t2v": "text-to-video", "i2v": "image-to-video"}[work["task"]]
    return (
        f"{work['model']} ({work['weights']} weights), {task} {width}x{height}, "
        f"{work['frames']} frames = {work['latent_frames']} latent frames of "
        f"{work['tokens_per_frame']} tokens, {work['steps']} steps, {place['dtype']}, "
        f"{place['device']}, {place['threads']} thread{'s' if place['threads'] != 1 else ''}"
    )


def predicted_lines(result: Mapping[str, Any]) -> list[str]:
    """Ceilings and predictions, from a result of which nothing is measured yet."""
    ceilings = result["ceilings"]
    rows = [row for row in result["results"] if row["predicted"]]
    lines = [
        title(result),
        f"ceilings: matrix product {_rate(ceilings['matmul'])} operations/s, attention "
        f"{_rate(ceilings['attention'])} operations/s, copy {_rate(ceilings['copy'])} bytes/s",
    ]
    if not rows:
        return lines + _reasons(result)
    first = _first(result, rows)["predicted"]
    head = ("operations", "TOTAL", "faster", "LAST", "faster", "LAST floor", "memory")
    lines.append(_line("predicted", head, _PREDICTED))
    for row in rows:
        said = row["predicted"]
        cells = (
            _rate(said["operations"]),
            seconds_text(said["total_s"]),
            f"{first['total_s'] / said['total_s']:.2f}x",
            seconds_text(said["last_s"]),
            f"{first['last_s'] / said['last_s']:.2f}x",
            seconds_text(said["floor_last_s"]),
            show_bytes(said["live_bytes"]),
        )
        lines.append(_line(_name(row), cells, _PREDICTED))
    return lines + _reasons(result)


def measured_lines(result: Mapping[str, Any]) -> list[str]:
    """Times with ratios, their intervals and what was predicted; where the time goes; notes."""
    rows = [row for row in result["results"] if row["complete"]]
    lines: list[str] = []
    if rows:
        lines += _times(rows, result["reference"])
        lines += ["", *_parts(rows)]
    if result["equal_reuse"]:
        lines += ["", "packing's share: against the full cache at equal reuse"]
        lines += [
            _line(_name(share), ("", "", *_faster(share)), _TIMES)
            for share in result["equal_reuse"]
        ]
    return [*lines, *notes(result), *_reasons(result)]


#: Widths of the columns behind a row's name.
_PREDICTED = (11, 10, 8, 10, 8, 11, 12)
_TIMES = (10, 10, 26, 26, 8)
_PARTS = (10, 8, 6, 7, 13, 15, 12, 12)
_NAME = 24

#: Kinds of kernels that every engine has; upstream's way has others.
_KINDS = ("attention", "linear", "head")
_NAMED = (*_KINDS, "bookkeeping")


def _line(name: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    cells = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False)]
    return f"{name:<{_NAME}}{''.join(cells)}".rstrip()


def _times(rows: Sequence[Mapping[str, Any]], reference: str) -> list[str]:
    head = ("TOTAL", "LAST", "TOTAL faster* (predicted)", "LAST faster* (predicted)", "floor*")
    lines = [_line("measured", head, _TIMES)]
    for row in rows:
        cells = (
            seconds_text(row["total_s"]),
            seconds_text(row["last_s"]),
            *_faster(row),
            f"{row['floor_share']:.0%}",
        )
        lines.append(_line(_name(row), cells, _TIMES))
    return [
        *lines,
        f"* times faster than {reference}, 95 % interval, in brackets as predicted; "
        "floor: the least it can take",
    ]


def _faster(row: Mapping[str, Any]) -> tuple[str, str]:
    """Both ratios, each with its interval and the prediction."""
    total, last = (
        f"{row[f'speedup_{name}']:.2f}x "
        + "{:.2f}-{:.2f}".format(*row[f"speedup_{name}_interval"])
        + f" ({row[f'predicted_{name}']:.2f})"
        for name in ("total", "last")
    )
    return total, last


def _parts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ("attention", "linear", "head", "other", "bookkeeping", "at ceiling**", "K/V", "peak")
    lines = [_line("shares of LAST, memory", head, _PARTS)]
    for row in rows:
        shares, kernels = row["shares"] or {}, row["kernel_shares"] or {}
        own = row["bookkeeping_share"]
        cells = (
            *(_share(shares.get(kind)) for kind in _KINDS),
            _share(sum(part for kind, part in shares.items() if kind not in _NAMED)),
            "-" if own is None else f"{own:.1%}",
            ", ".join(_share(kernels.get(kind)) for kind in ("attention", "linear")),
            *(
                "-" if row[name] is None else show_bytes(row[name])
                for name in ("kv_bytes", "peak_bytes")
            ),
        )
        lines.append(_line(_name(row), cells, _PARTS))
    return [*lines, "** attention and linear layers: time at the ceiling as a share of time taken"]


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know of how the numbers came about."""
    work = result["workload"]
    told = []
    if not result["complete"]:
        told.append("not complete: it was interrupted, or a row of it failed")
    if work["few_repeats"]:
        told.append(f"{work['repeats']} repeats: fewer than {FEW}, intervals say little")
    if work["sampled_frames"]:
        frames = ", ".join(map(str, work["sampled_frames"]))
        told.append(f"latent frames {frames} were measured, straight lines between them")
    if work["sampled_steps"]:
        told.append(
            f"exact rows: {work['sampled_steps']} of {work['steps']} steps were measured and stand "
            "for all"
        )
    if work["layers"] is not None:
        told.append(
            "composed: put together from measured pieces of one layer; the whole, "
            f"{work['num_layers']} layers, was not run; memory is as planned"
        )
    if any(row["complete"] and not row["paired"] for row in result["results"]):
        told.append("some rows were measured in another run than the reference, not side by side")
    told += [
        f"composed and really run with {made['layers']} layers, {made['part']}: "
        f"{seconds_text(made['composed_s'])} and {seconds_text(made['measured_s'])}, ratio "
        f"{made['ratio']:.3f} ({made['ratio_interval'][0]:.3f}-{made['ratio_interval'][1]:.3f})"
        for made in result["checked"]
    ]
    return [f"note: {line}" for line in told]


def _reasons(result: Mapping[str, Any]) -> list[str]:
    rows = [row for row in result["results"] if row["reason"]]
    return [f"{_name(row)}: no numbers: {row['reason']}" for row in rows]


def _first(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row that speed-ups refer to."""
    return next((row for row in rows if _name(row) == result["reference"]), rows[0])


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['policy']} {row['preset']}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def seconds_text(seconds: float) -> str:
    """Three digits and more: "1234 s", "12.3 s", "0.123 s"."""
    for digits, least in ((0, 100), (1, 10), (2, 1)):
        if seconds >= least:
            return f"{seconds:.{digits}f} s"
    return f"{seconds:.3f} s" if seconds >= 0.01 else f"{1000 * seconds:.2f} ms"


def _rate(number: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
