"""Verdicts by hand: differences, margins, gates, controls, one family of p."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from packcache.evaluate.protocol import (
    ClipsPlan,
    MemoryPlan,
    Primary,
    Protocol,
    ReplayPlan,
    Row,
)
from packcache.evaluate.statistics import holm
from packcache.evaluate.verdict import beside_intact, compare, judge_rows, power

RECALL = Primary(name="recall", part="memory", better="more", no_worse=3.0)
KL = Primary(name="replay_kl", part="replay", better="less", no_worse=0.02)
MOTION = Primary(name="motion_ratio", part="running", better="near", bounds=(0.8, 1.25))


def protocol(*primaries: Primary, **roles: str) -> Protocol:
    rows = {"full": Row(label="full", policy="full", role="reference")}
    for label, role in roles.items():
        rows[label] = Row(label=label, policy="packcache", role=role)  # type: ignore[arg-type]
    return Protocol(
        clips=ClipsPlan(), replay=ReplayPlan(prompts=2, frames=9), running=(),
        memory=MemoryPlan(clips=2, gaps=(1,)), rows=rows, primaries=primaries, exclusions=(),
        hash="0",
    )  # fmt: skip


def around(mean: float, spread: float, count: int = 64) -> np.ndarray:
    return mean + spread * np.random.default_rng(0).standard_normal(count)


def verdicts(asked: Protocol, paired, **more):
    return {(c.primary, c.row): c for c in judge_rows(asked, paired, **more)}


@pytest.mark.parametrize(
    ("primary", "own", "verdict"),
    [
        (RECALL, around(49.9, 1), "no worse"),
        (RECALL, around(40, 1), "worse"),
        (RECALL, around(47, 8), "undecided"),
        (RECALL, around(60, 1), "no worse"),
        (KL, around(50.01, 0.005), "no worse"),
        (KL, around(50.2, 0.005), "worse"),
        (MOTION, around(52, 1), "no worse"),
        (MOTION, around(30, 1), "worse"),
        (MOTION, around(42, 20), "undecided"),
    ],
)
def test_a_verdict_is_by_the_bound_of_the_interval(primary, own, verdict):
    asked = protocol(primary, a="policy")
    (one,) = judge_rows(asked, {primary.name: {"full": np.full(64, 50.0), "a": own}})
    assert one.verdict == verdict
    assert one.low <= one.lost <= one.high


def test_what_is_lost_is_positive_when_worse():
    full, own = np.array([5.0, 6.0, 7.0]), np.array([4.0, 4.0, 6.0])
    more, less = (compare(p, "a", own, full) for p in (RECALL, KL))
    assert more and less and more.lost == pytest.approx(4 / 3) and less.lost == -more.lost
    ratio = compare(MOTION, "a", full * 2, full)
    assert ratio and ratio.lost == pytest.approx(-np.log(2))


def test_prompts_that_one_of_the_two_lacks_are_left_out():
    full, own = np.array([1.0, np.nan, 3.0, 4.0]), np.array([1.0, 2.0, np.nan, 3.0])
    one = compare(RECALL, "a", own, full)
    assert one and one.prompts == 2 and one.lost == pytest.approx(0.5)
    assert compare(RECALL, "a", full * np.nan, full) is None


def test_one_family_of_primaries_and_rows_without_the_floors():
    asked = protocol(RECALL, KL, a="policy", b="control", noise="floor")
    paired = {
        name: {
            "full": around(50, 1),
            "a": around(49.8, 2),
            "b": around(48, 9),
            "noise": around(50, 3),
        }
        for name in ("recall", "replay_kl")
    }
    found = verdicts(asked, paired)
    family = {key: one.p for key, one in found.items() if key[1] != "noise"}
    assert len(family) == 4
    for key, p in holm(family).items():
        assert found[key].p_holm == p
    assert all(found[name, "noise"].p_holm is None for name in paired)


def test_no_worse_is_not_asked_where_the_reference_fails_or_a_row_stands_still():
    asked = protocol(RECALL, KL, MOTION, a="policy", still="policy")
    same = {"full": np.full(64, 50.0), "a": around(50, 0.001), "still": around(50, 0.001)}
    moves = {"full": np.full(64, 2.0), "a": around(2.0, 0.01), "still": around(0.5, 0.01)}
    found = verdicts(
        asked, {"recall": same, "replay_kl": same, "motion_ratio": moves},
        gates={"recall": "the full cache itself fails"},
    )  # fmt: skip
    assert found["recall", "a"].verdict == "not asked"
    assert found["recall", "a"].why == "the full cache itself fails"
    assert found["replay_kl", "a"].verdict == "no worse"
    assert found["replay_kl", "still"].verdict == "not asked"
    why = found["replay_kl", "still"].why
    assert why.startswith("moves 0.25 times as much as the full cache (0.2")
    assert found["motion_ratio", "still"].verdict == "worse"


def test_what_is_worse_is_worse_whatever_could_not_be_asked():
    asked = protocol(RECALL, MOTION, a="policy")
    full = np.full(64, 50.0)
    found = verdicts(
        asked,
        {
            "recall": {"full": full, "a": around(40, 1)},
            "motion_ratio": {"full": full, "a": full / 4},
        },
        gates={"recall": "the full cache itself fails"},
    )
    assert found["recall", "a"].verdict == "worse"


def test_motion_has_to_be_known_and_its_whole_interval_within():
    asked = protocol(RECALL, MOTION, a="policy", unasked="policy")
    full = np.full(64, 50.0)
    same = {"full": full, "a": around(50, 0.001), "unasked": around(50, 0.001)}
    wide = np.where(np.arange(64) % 2, 50 * 3, 50 / 3)  # the mean ratio is 1, its interval wide
    found = verdicts(asked, {"recall": same, "motion_ratio": {"full": full, "a": wide}})
    assert found["recall", "a"].verdict == "not asked"
    assert found["recall", "a"].why.startswith("moves 1.00 times as much as the full cache (0.")
    assert found["recall", "unasked"].why == "how it moves when it runs freely was not asked"
    without = judge_rows(protocol(RECALL, a="policy", unasked="policy"), {"recall": same})
    assert {one.verdict for one in without} == {"no worse"}  # a protocol that has no motion


def test_controls_stand_beside_what_they_are_a_broken_copy_of():
    """A control that is the intact row by another name is told from full and not from that."""
    rows = {"full": Row(label="full", policy="full", role="reference")}
    for label, policy, role in (
        ("ours", "packcache:budget=2", "policy"), ("worse", "random:budget=2", "control"),
        ("same", "packcache:budget=2", "control"), ("alone", "random:budget=3", "control"),
    ):  # fmt: skip
        rows[label] = Row(label=label, policy=policy, role=role)  # type: ignore[arg-type]
    asked = replace(protocol(RECALL), rows=rows)
    intact = {label: asked.intact(rows[label]) for label in ("worse", "same", "alone")}
    assert intact == {"worse": rows["ours"], "same": rows["ours"], "alone": None}
    ours, worse = around(40, 1), around(30, 1)
    values = {"full": np.full(64, 50.0), "ours": ours, "worse": worse, "same": ours}
    found = judge_rows(asked, {"recall": values})
    pairs = {("recall", label): (values[label], ours) for label in ("worse", "same")}
    beside = beside_intact(asked, pairs)
    assert {(one.row, one.against): one.verdict for one in beside} == {
        ("worse", "ours"): "told apart", ("same", "ours"): "not told apart",
    }  # fmt: skip
    assert [one.p_holm for one in beside] == [
        *holm({n: o.p for n, o in enumerate(beside)}).values()
    ]
    told = {one.control: one for one in power(asked, found, beside)}
    assert told["same"].on == ("recall",) and told["same"].beside == ()
    assert told["worse"].beside == ("recall",) and told["alone"].against == ""


def test_controls_give_the_suite_its_power():
    """One that is worse tells, one that is better or the same does not."""
    asked = protocol(RECALL, bad="control", same="control", good="control")
    rows = {
        "full": around(50, 1), "bad": around(30, 1), "same": around(50, 1),
        "good": around(70, 1),
    }  # fmt: skip
    found = judge_rows(asked, {"recall": rows})
    told = {one.control: one for one in power(asked, found)}
    assert told["bad"].told and told["bad"].on == ("recall",)
    assert not told["same"].told and not told["good"].told
    assert {c.row: c.verdict for c in found} == {
        "bad": "told apart", "same": "not told apart", "good": "told apart",
    }  # fmt: skip


def test_a_primary_without_numbers_has_no_rows():
    assert judge_rows(protocol(RECALL, a="policy"), {"recall": {}}) == []
