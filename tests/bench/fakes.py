"""Engines that take as long as they are told, and note what they were asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from packcache.bench import run as running
from packcache.bench.parts import Ceilings, Workload
from packcache.bench.result import Report

CEILINGS = Ceilings(matmul=4e9, attention=1e9, copy=1e12)

#: Seconds of a rehearsal by row, latent frame and how often it was rehearsed there before.
Seconds = Callable[[str, int, int], float]


@dataclass
class Log:
    """What all engines of a run were asked, in order."""

    events: list[tuple[str, str, int]] = field(default_factory=list)
    steps: list[tuple[str, Sequence[int] | None]] = field(default_factory=list)


class Fake:
    """A candidate; `fail(name, event, frame)` may raise; no steps take `once` seconds."""

    once = 0.0

    def __init__(
        self,
        name: str,
        log: Log,
        seconds: Seconds,
        fail: Callable[[str, str, int], None] = lambda *_: None,
    ) -> None:
        self.name, self.log, self.seconds, self.fail = name, log, seconds, fail
        self.frame = self.times = 0

    def _note(self, event: str) -> None:
        self.log.events.append((event, self.name, self.frame))
        self.fail(self.name, event, self.frame)

    def prefill(self) -> float:
        self._note("prefill")
        return 0.25

    def advance(self) -> float:
        self._note("advance")
        self.frame, self.times = self.frame + 1, 0
        return 0.001 * self.frame

    def rehearse(self, steps: Sequence[int] | None = None) -> tuple[float, float]:
        self._note("rehearse")
        self.log.steps.append((self.name, steps))
        if steps is not None and not steps:
            return self.once, 0.5
        self.times += 1
        return self.seconds(self.name, self.frame, self.times - 1), 0.5

    def statistics(self) -> dict[str, Any]:
        return {"kv_bytes": 1000 * self.frame, "capacity_bytes": 9000, "held": 10 * self.frame}


def maker(log: Log, seconds: Seconds = lambda *_: 1.0, **settings: Any) -> Callable[..., Fake]:
    """As `candidates.maker`."""
    return lambda policy, preset: Fake(f"{policy} {preset}", log, seconds, **settings)


def report(asked: Workload, seconds: Seconds = lambda *_: 1.0, **settings: Any) -> Report:
    """A report of a run of fakes; time is what they say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "measure", lambda _: CEILINGS)
        before = settings.pop("before", ())
        return running.bench(asked, make=maker(Log(), seconds, **settings), before=before)
