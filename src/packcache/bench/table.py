"""A benchmark as lines of text: what is predicted, then what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from packcache.bench.compose import CHECKED_WITHIN
from packcache.bench.predict import STOCK
from packcache.bench.workload import FEW
from packcache.lumos.units import show_bytes
from packcache.reuse import StepReuse

__all__ = ["measured_lines", "notes", "predicted_lines", "seconds_text", "title"]


def title(result: Mapping[str, Any]) -> str:
    """What was run, on one line."""
    work, place = result["workload"], result["environment"]
    width, height = work["size"]
    task = {"t2v": "text-to-video", "i2v": "image-to-video"}[work["task"]]
    composed = "" if work["layers"] is None else ", composed"
    return (
        f"{work['model']} ({work['weights']} weights{composed}), {task} {width}x{height}, "
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
    head = ("operations", "reads", "TOTAL", "faster*", "LAST", "faster*", "LAST floor", "memory")
    lines.append(_line("predicted", head, _PREDICTED))
    for row in rows:
        said = row["predicted"]
        cells = (
            _rate(sum(said["operations"]["total"].values())),
            show_bytes(sum(said["bytes"]["total"].values())),
            seconds_text(said["total_s"]),
            f"{said['speedup_total']:.2f}x",
            seconds_text(said["last_s"]),
            f"{said['speedup_last']:.2f}x",
            seconds_text(said["floor_last_s"]),
            show_bytes(said["live_bytes"]),
        )
        lines.append(_line(_name(row), cells, _PREDICTED))
    lines.append(
        f"* times faster than {result['predicted_reference']}; reads: weights and K/V of the whole "
        "clip, at least"
    )
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
            _line(_name(share), ("", "", "", *_faster(share)), _TIMES)
            for share in result["equal_reuse"]
        ]
    return [*lines, *notes(result), *_reasons(result)]


#: Widths of the columns behind a row's name.
_PREDICTED = (11, 12, 10, 8, 10, 8, 11, 12)
_TIMES = (10, 10, 11, 26, 26, 8)
_PARTS = (10, 8, 6, 7, 13, 15, 12, 12)
_NAME = 24

#: Kinds of kernels that every engine has; upstream's way has others.
_KINDS = ("attention", "linear", "head")
_NAMED = (*_KINDS, "bookkeeping")


def _line(name: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    cells = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False)]
    return f"{name:<{_NAME}}{''.join(cells)}".rstrip()


def _times(rows: Sequence[Mapping[str, Any]], reference: str) -> list[str]:
    head = (
        "TOTAL", "LAST", "a frame*", "TOTAL faster* (predicted)", "LAST faster* (predicted)",
        "floor*",
    )  # fmt: skip
    lines = [_line("measured", head, _TIMES)]
    for row in rows:
        cells = (
            seconds_text(row["total_s"]),
            seconds_text(row["last_s"]),
            seconds_text(sum(row["frame_s"]) / len(row["frame_s"])),
            *_faster(row),
            f"{row['floor_share']:.0%}",
        )
        lines.append(_line(_name(row), cells, _TIMES))
    return [
        *lines,
        f"* times faster than {reference}, 95 % interval, in brackets as predicted; "
        "floor: the least it can take",
        "* a frame: the mean of all generated latent frames",
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
    rows = [row for row in result["results"] if row["complete"]]
    repeats = min((row["repeats"] for row in rows), default=work["repeats"])
    if repeats < FEW:
        told.append(f"{repeats} repeats: fewer than {FEW}, intervals say little")
    told += _straight_lines(rows)
    if work["sampled_steps"]:
        told.append(
            f"exact rows: {work['sampled_steps']} of {work['steps']} steps were measured and stand "
            "for all"
        )
    if work["layers"] is not None:
        told.append(
            f"composed: put together from measured pieces of {_layers(work['layers'])}; the whole, "
            f"{work['num_layers']} layers, was not run; memory is as planned"
        )
        if any(row["policy"] == STOCK for row in rows):
            told.append(
                "stock, composed: a step at three latent frames with one layer and without, "
                "straight lines between them; its masks, positions, text, given frames and commits "
                "are left out, so it is slower than it stands here"
            )
    elif rows:
        told.append(
            "packing and rebase, prefill and given frames were measured once: intervals leave out "
            "how they vary"
        )
    if any(not row["paired"] for row in rows):
        told.append(
            "some rows were measured in another run than the reference, not side by side; floors "
            "are by the ceilings of a row's own run"
        )
    told += _exact_presets(work)
    told += [
        f"{_name(row)}: the earlier row stays, it could not be measured again: {row['reason']}"
        for row in result["not_replaced"]
    ]
    told += [_check(made) for made in result["checked"]]
    return [f"note: {line}" for line in told]


def _check(made: Mapping[str, Any]) -> str:
    """What was composed beside what was really run, and whether it is near enough."""
    part = "commit" if made["part"] == "forward" else "steps"
    if part == "steps" and made["steps"] is not None:
        part = f"steps {', '.join(map(str, made['steps']))}"
    low, high = made["ratio_interval"]
    met = "met" if abs(made["ratio"] - 1) <= CHECKED_WITHIN else "missed"
    return (
        f"composed and really run with {_layers(made['layers'])}, {part} of latent frame "
        f"{made['frame']}, medians of {made['repeats']}: {seconds_text(made['composed_s'])} and "
        f"{seconds_text(made['measured_s'])}, ratio {made['ratio']:.3f} ({low:.3f}-{high:.3f}), "
        f"within {CHECKED_WITHIN:.0%}: {met}"
    )


def _layers(number: int) -> str:
    return "one layer" if number == 1 else f"{number} layers"


def _straight_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which latent frames were measured, and of which rows, where that differs."""
    names: dict[tuple[int, ...], list[str]] = {}
    for row in rows:
        names.setdefault(tuple(row["sampled_frames"] or ()), []).append(_name(row))
    told = []
    for frames, own in names.items():
        if frames:
            of = "" if len(own) == len(rows) else f"{', '.join(own)}: "
            known = ", ".join(map(str, frames))
            told.append(f"{of}latent frames {known} were measured, straight lines between them")
    return told


def _exact_presets(work: Mapping[str, Any]) -> list[str]:
    """Presets other than the exact one that come to the same with few steps."""
    return [
        f"preset {name} reuses nothing with {work['steps']} steps: its rows are exact"
        for name, reuse in work["presets"].items()
        if name != "exact" and StepReuse(**reuse).is_exact
    ]


def _reasons(result: Mapping[str, Any]) -> list[str]:
    rows = [row for row in result["results"] if row["reason"]]
    return [f"{_name(row)}: no numbers: {row['reason']}" for row in rows]


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
