"""Clips of your own, made with several caches from the same prompts and seeds, beside each other.

    told = compare({"full": Path("full"), "window": Path("window")})     # folders of clips
    told["rows"][1]["versus"]["warp_error_dis"], "\\n".join(lines(told))

For models whose truth nobody knows: numbers that need no weights, what each clip's differ by from
the reference's of the same name, drift and its excess (evaluation 3, 4, 8). Nothing here says which
clip is the better one: a clip that stands still is perfect in all but motion, which stands first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from packcache.errors import InputError, InvalidSetting
from packcache.evaluate.cells import spanned
from packcache.evaluate.drift import by_latent, drift
from packcache.evaluate.told import difference, summary
from packcache.evaluate.video_metrics import METRICS, Measured, check_names, measure
from packcache.video import Frames, read_video

__all__ = ["SCHEMA", "compare", "lines"]

SCHEMA = "packcache.videos/1"

#: Files that count as clips; folders of pictures do too.
SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")

#: Numbers a frame whose drift is told.
DRIFTS = ("sharpness", "hf_share", "luminance", "contrast", "saturation")


def compare(
    folders: Mapping[str, Path],
    *,
    metrics: Sequence[str] = (),
    frames: int | None = None,
    fps: float | None = None,
    temporal: int = 4,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure clips of the same names in every folder; the first folder is the reference.

    Args:
        metrics: of `video_metrics.METRICS`, all if empty; what has to stand beside one comes along.
        frames: pixel frames of each clip that count; None: all, equally many everywhere.
        fps: frames a second, where files do not say.
        temporal: pixel frames of a latent frame, by which drift is told.
        on_step: called with clips measured and all there are.

    Returns plain values, schema `packcache.videos/1`. Raises InvalidSetting for what cannot be
    asked, InputError for clips that are no pairs.
    """
    check_names(metrics)
    if frames is not None and frames < 3:
        raise InvalidSetting(f"frames is {frames}, expected at least 3: motion needs them")
    if temporal < 1:
        raise InvalidSetting(f"temporal is {temporal}, expected at least 1 frame a latent frame")
    names, paths = _pairs(folders)
    found: dict[str, list[Measured]] = {label: [] for label in folders}
    first = None
    for number, name in enumerate(names):
        against = None
        for label in folders:
            clip, rate = _read(paths[label][name], frames, fps)
            if first is not None:
                _check_like(paths[label][name], clip, rate, first)
            made = _only(measure(clip, fps=rate, against=against), metrics)
            found[label].append(made)
            first = made if first is None else first
            against = clip if against is None else against
        if on_step:
            on_step(number + 1, len(names))
    return _result(found, names, temporal, metrics)


def _pairs(folders: Mapping[str, Path]) -> tuple[list[str], dict[str, dict[str, Path]]]:
    """Names of clips, and where each folder has them. Raises InputError unless all have all."""
    if not folders:
        raise InvalidSetting("no folder of clips: give label=folder, the reference first")
    paths: dict[str, dict[str, Path]] = {}
    for label, folder in folders.items():
        if not folder.is_dir():
            raise InputError(f"{label}: {folder} is no folder, expected one of clips")
        own = (p for p in sorted(folder.iterdir()) if not p.name.startswith("."))
        clips = [p for p in own if p.is_dir() or p.suffix.lower() in SUFFIXES]
        paths[label] = {path.stem: path for path in clips}
        if not clips:
            raise InputError(f"{label}: no clip in {folder}, expected {', '.join(SUFFIXES)}")
        if len(paths[label]) < len(clips):
            raise InputError(f"{label}: two clips of one name in {folder}, expected one of each")
    (reference, expected), *others = paths.items()
    for label, own in others:
        odd = sorted(expected.keys() ^ own.keys())
        if odd:
            has, lacks = (reference, label) if odd[0] in expected else (label, reference)
            raise InputError(
                f"{has} has a clip {odd[0]!r}, {lacks} has none: give the same clips, named alike"
            )
    return sorted(expected), paths


def _read(path: Path, frames: int | None, fps: float | None) -> tuple[Frames, float]:
    clip, own = read_video(path)
    rate = fps or own
    if rate is None:
        raise InvalidSetting(f"{path.name} does not say its frames a second: give --fps")
    if frames is not None and len(clip) < frames:
        raise InputError(f"{path} has {len(clip)} frames, expected at least {frames}")
    return clip[:frames], rate


def _check_like(path: Path, clip: Frames, rate: float, first: Measured) -> None:
    """Clips of one comparison are of one length, size and rate."""
    own = (len(clip), *clip.shape[1:3])
    expected = (first.frames, first.height, first.width)
    if own != expected:
        raise InputError(
            f"{path} is {own[0]} frames of {own[2]}x{own[1]}, the first clip {expected[0]} of "
            f"{expected[2]}x{expected[1]}: give equal clips, or cut them with --frames"
        )
    if abs(rate - first.fps) > 1e-3:
        raise InputError(
            f"{path} has {rate:g} frames a second, the first clip {first.fps:g}: give equal ones"
        )


def _only(found: Measured, metrics: Sequence[str]) -> Measured:
    known = [name for name in metrics if name in found.scalars]
    return found.only(*known) if metrics else found


def _result(
    found: Mapping[str, list[Measured]],
    names: Sequence[str],
    temporal: int,
    metrics: Sequence[str],
) -> dict[str, Any]:
    (reference, full), *_ = found.items()
    first = full[0]
    return {
        "schema": SCHEMA,
        "workload": {
            "reference": reference, "clips": list(names), "frames": first.frames,
            "height": first.height, "width": first.width, "fps": first.fps, "temporal": temporal,
            "metrics": list(metrics),
        },
        "rows": [
            {
                "row": label,
                "clip": {name: summary(_scalars(own, name)) for name in own[0].scalars},
                "versus": {
                    name: difference(_scalars(own, name), _scalars(full, name))
                    for name in own[0].scalars
                    if own is not full and name in full[0].scalars
                },
                "drift": {
                    name: _drift(own, full, name, temporal)
                    for name in DRIFTS
                    if name in own[0].series
                },
            }
            for label, own in found.items()
        ],
    }  # fmt: skip


def _scalars(found: Sequence[Measured], name: str) -> Any:
    """A number of every clip; NaN where it cannot be told."""
    values = (one.scalars[name] for one in found)
    return np.array([np.nan if value is None else float(value) for value in values])


def _drift(
    own: Sequence[Measured], full: Sequence[Measured], name: str, temporal: int
) -> dict[str, Any]:
    curves, others = (
        np.array([by_latent(one.series[name], temporal=temporal)[1] for one in found])
        for found in (own, full)
    )
    against = None if own is full else others
    return drift(curves, seconds=temporal / own[0].fps, against=against).to_json()


# --- text ----------------------------------------------------------------------------------------


def lines(told: Mapping[str, Any]) -> list[str]:
    """A block a metric, motion first; a line a row: mean, and what it differs by from the
    reference's clips."""
    work = told["workload"]
    size = f"{work['frames']} frames of {work['width']}x{work['height']}, {work['fps']:g} a second"
    beside_it = f"against {work['reference']}"
    out = [
        f"{len(work['clips'])} clips, {size}; 95 % intervals over clips, uncorrected; flow by DIS, "
        "no weights",
    ]
    for name, metric in METRICS.items():
        rows = [row for row in told["rows"] if name in row["clip"]]
        if rows:
            beside = f"; stands beside {', '.join(metric.beside)}" if metric.beside else ""
            out += ["", f"{name}, {metric.unit or 'share of clips'}{beside}"]
        for row in rows:
            line = f"  {row['row']:20} {_spanned(row['clip'][name]):34}"
            less = row["versus"].get(name)
            line += "" if less is None else f" {_spanned(less, '+')} {beside_it}"
            out.append(line.rstrip())
    for name in DRIFTS:
        rows = [row for row in told["rows"] if name in row["drift"]]
        if rows:
            out += ["", f"drift of {name}, end less start"]
        for row in rows:
            own = row["drift"][name]
            line = f"  {row['row']:20} {_spanned(own['signed'], '+'):34}"
            more = own["excess"]
            line += "" if more is None else f" {_spanned(more, '+')} in excess"
            out.append(line.rstrip())
    return out


def _spanned(found: Mapping[str, Any] | None, sign: str = "") -> str:
    """As many decimals as its size asks for."""
    if found is None:
        return "-"
    size = max(abs(found[name]) for name in ("mean", "low", "high"))
    digits = 2 if size >= 1 or size < 5e-7 else 4 if size >= 0.01 else 6
    return spanned(found, digits, sign=sign)
