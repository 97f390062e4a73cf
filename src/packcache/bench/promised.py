"""Whether `stock` is as slow as upstream, which it has to be for a speed against it to count.

Reads what `benchmarks/stock_upstream.py` wrote; nothing of it is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packcache.files import read_result

__all__ = ["NAME", "SCHEMA", "is_held", "promise", "read_promise"]

#: Name of the file that is read.
NAME = "stock_upstream.json"

SCHEMA = "packcache.stock/1"

#: Seconds a step of `stock` and of upstream may differ by so much.
WITHIN = 0.10

Found = Mapping[str, Any] | None


def read_promise(folder: Path) -> dict[str, Any] | None:
    """What was measured of `stock` beside upstream; None if nothing was."""
    path = folder / NAME
    if not path.exists():
        return None
    return read_result(path, SCHEMA, "move it away")


def is_held(found: Found, dtype: str) -> bool:
    """Did `stock` take as long as upstream's own modules, in numbers of this kind?"""
    row = _row(found, dtype)
    return row is not None and _is_near(row)


def promise(found: Found, dtype: str) -> str:
    """What is known of it: the ratio and where it was measured, or that it was not."""
    row = _row(found, dtype)
    if found is None or row is None:
        return f"stock was not held against upstream in {dtype}"
    work, device = found["workload"], found["environment"]["device"]
    tag = "*random weights*" if device == "cpu" else "*GPU run*"
    held = "within" if _is_near(row) else "not within"
    return (
        f"stock {held} {WITHIN:.0%} of upstream: {row['ratio']:.3f}x ({row['ratio_low']:.3f} to "
        f"{row['ratio_high']:.3f}) a step of {work['model']} {work['width']}x{work['height']}, "
        f"{work['layers']} layers, {work['held_latents']} latent frames held, {dtype} on {device} "
        f"({tag})"
    )


def _is_near(row: Mapping[str, Any]) -> bool:
    return abs(row["ratio"] - 1) <= WITHIN


def _row(found: Found, dtype: str) -> Mapping[str, Any] | None:
    rows = found["results"] if found else ()
    return next((row for row in rows if row["dtype"] == dtype), None)
