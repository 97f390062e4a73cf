"""The budget frontier: who is compared with whom, and what is drawn."""

from __future__ import annotations

from typing import Any

import pytest

from packcache.evaluate import evaluation_plot
from packcache.evaluate.evaluation_plot import draw
from packcache.evaluate.frontier import LOSSES, best, families, points
from packcache.evaluate.protocol import read_protocol
from tests.tools import ROOT


def row(label: str, policy: str, role: str = "policy", **own: Any) -> dict[str, Any]:
    return {"label": label, "policy": policy, "role": role, "positions": "rebase", **own}


ROWS = [
    row("full", "full", "reference"),
    row("b", "packcache:budget=2,window=4"),
    row("a", "packcache:budget=1,window=4", "baseline"),
    row("wide", "packcache:budget=2,window=8"),
    row("off", "packcache:budget=3,window=4", "control", positions="absolute"),
    row("w", "window:frames=1"),
    row("w, other name", "window:frames=1"),
    row("not asked", "window:frames=3"),
]
HELD = {"full": 900, "a": 160, "b": 320, "wide": 320, "off": 480, "w": 160, "w, other name": 160}
LOST = {"a": 40.0, "b": 20.0, "wide": 10.0, "off": 15.0, "w": 60.0, "w, other name": 60.0}
RESULT: dict[str, Any] = {
    "workload": {"rows": {one["label"]: one for one in ROWS}, "primaries": []},
    "memory": [
        {"row": label, "gap": gap, "held": held / 2 if gap == 1 else held}
        for gap in (1, 6)
        for label, held in HELD.items()
    ],
    "primaries": [
        {"primary": name, "row": label, "lost": lost, "low": lost - 5, "high": lost + 5}
        for name in ("recall", "motion_ratio")
        for label, lost in LOST.items()
    ],
    "replay": [
        {"row": label, "kl": {"mean": lost / 50, "low": 0.0, "high": 2.0}}
        for label, lost in LOST.items()
    ],
}


def test_a_point_is_what_is_held_at_the_longest_gap_and_what_is_lost():
    found = {point.row: point for point in points(RESULT, "recall")}
    assert list(found) == ["b", "a", "wide", "off", "w", "w, other name"]
    assert (found["a"].held, found["a"].mean) == (160, 40.0)
    assert (found["a"].low, found["a"].high) == (35.0, 45.0)
    kl = {point.row: point.mean for point in points(RESULT, "kl")}
    assert kl["b"] == pytest.approx(0.4)


def test_rows_that_differ_in_nothing_but_size_are_a_family():
    told = families(points(RESULT, "recall"))
    # wide has another window, off other positions, w is no smaller than its twin
    assert {name: [p.row for p in own] for name, own in told.items()} == {
        "packcache, window=4": ["a", "b"]
    }


def test_the_best_of_a_size_loses_least():
    assert [point.row for point in best(points(RESULT, "recall"))] == ["wide", "a", "off"]


def test_it_is_drawn_where_sizes_can_be_compared():
    drawn = draw(RESULT, "frontier")
    assert drawn is not None and drawn.count(b'<g id="axes_') == len(LOSSES)
    alone = {**RESULT, "memory": [one for one in RESULT["memory"] if one["row"] != "a"]}
    assert draw(alone, "frontier") is None


def test_a_policy_has_one_colour_in_all_pictures():
    """The protocol's rows of two latent frames, and the families that they belong to."""
    labels = list(read_protocol(ROOT / "benchmarks" / "protocol.toml").rows)
    result = {"workload": {"rows": dict.fromkeys(labels)}}
    told = evaluation_plot._family_colours(["packcache, window=4", "window", "packcache, window=8"])
    assert told["packcache, window=4"] == evaluation_plot._colour(result, "packcache 2")
    assert told["window"] == evaluation_plot._colour(result, "window 2")
    for label, name in (("sink 1+1", "sink"), ("uniform 2", "uniform")):
        own = evaluation_plot._family_colours([name])
        assert own[name] == evaluation_plot._colour(result, label)
    assert len(set(told.values())) == 3
