"""A protocol for tests: small, and complete."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from packcache.evaluate.protocol import (
    ClipsPlan,
    MemoryPlan,
    Primary,
    Protocol,
    ReplayPlan,
    Row,
)

REPLAY_KL = Primary(name="replay_kl", part="replay", better="less", no_worse=0.02)


def small(rows: Iterable[Row], **changed: Any) -> Protocol:
    """Of these rows; what is not named is as little as can be asked."""
    parts: dict[str, Any] = {
        "clips": ClipsPlan(),
        "replay": ReplayPlan(prompts=1, frames=13),
        "running": (),
        "memory": MemoryPlan(clips=1, gaps=(1,)),
        "primaries": (REPLAY_KL,),
        "exclusions": (),
        "hash": "0",
    }
    return Protocol(rows={row.label: row for row in rows}, **{**parts, **changed})
