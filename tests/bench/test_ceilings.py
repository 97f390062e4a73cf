"""Ceilings: the fastest run of operations that are counted, at the workload's shapes."""

from __future__ import annotations

import itertools

import pytest
import torch

from packcache.bench import ceilings
from packcache.bench.parts import Ceilings
from tests.bench.workloads import workload


class Clock:
    """Time that only passes when somebody looks: the next of these seconds each time."""

    def __init__(self, *seconds: float) -> None:
        self.passing = itertools.chain(seconds, itertools.repeat(1.0))
        self.time = 0.0

    def __call__(self, device: torch.device) -> float:
        self.time += next(self.passing)
        return self.time


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """As few runs as there may be, and little to copy."""
    monkeypatch.setattr(ceilings, "SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1 << 16)


@pytest.fixture
def seen(monkeypatch):
    """Shapes of every call of the attention."""
    shapes: list[tuple[tuple[int, ...], ...]] = []

    def attend(q, k, v):
        shapes.append((tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return q

    monkeypatch.setattr(ceilings, "attend", attend)
    return shapes


def test_they_are_measured_here_and_now():
    found = ceilings.measure(workload())
    assert isinstance(found, Ceilings)
    assert min(found.matmul, found.attention, found.copy) > 1e6


def test_operations_and_bytes_over_seconds(monkeypatch, seen):
    """A clock of one second a call: rates are then what was counted."""
    monkeypatch.setattr(ceilings, "now", Clock())
    found = ceilings.measure(workload())
    rows, keys = 2 * 76, 3 * 76  # both branches; three latent frames
    assert found.matmul == 2 * rows * 128 * 96
    assert found.attention == 4 * 4 * 76 * keys * 32
    assert found.copy == 2 * ceilings.COPY_BYTES
    assert set(seen) == {((4, 76, 32), (2, keys, 32), (2, keys, 32))}


def test_the_fastest_run_counts(monkeypatch, seen):
    """The clock is looked at twice around the first call, where the runs begin, and twice around
    each of them: the second takes a quarter of a second, the others one."""
    monkeypatch.setattr(ceilings, "now", Clock(1, 1, 1, 1, 1, 1, 0.25))
    assert ceilings.measure(workload()).matmul == 4 * 2 * 152 * 128 * 96


def test_short_calls_are_made_many_times_in_a_run(monkeypatch, seen):
    """Calls of about a thousandth of a second, runs of a hundredth."""
    monkeypatch.setattr(ceilings, "now", Clock(*[2.0**-10] * 1000))
    ceilings.measure(workload())
    assert len(seen) == 2 + 10 * ceilings.RUNS  # the warm-up and the first look


def test_runs_go_on_for_a_while(monkeypatch, seen):
    monkeypatch.setattr(ceilings, "SECONDS", 20.0)
    monkeypatch.setattr(ceilings, "now", Clock())
    ceilings.measure(workload())
    assert len(seen) > 2 + ceilings.RUNS


def test_a_short_clip_has_no_more_keys_than_it_holds(seen):
    ceilings.measure(workload(frames=1))
    assert {k for _, k, _ in seen} == {(2, 76, 32)}


@pytest.mark.parametrize(
    "model, size, device, groups",
    [
        ("toy", (64, 64), "cpu", 2),
        ("3b", (672, 384), "cpu", 1),
        ("3b", (672, 384), "cuda", 8),
        ("3b", (64, 64), "cpu", 8),
    ],
)
def test_all_groups_of_heads_or_one(model, size, device, groups):
    """As many as a CPU does in seconds; a GPU would idle with one."""
    asked = workload(model, size=size, device=torch.device(device))
    assert ceilings.head_groups(asked, 3 * asked.layout.tokens) == groups
