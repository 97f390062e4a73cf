"""The three aggregates, worked out by hand."""

from __future__ import annotations

import pytest

from packcache.evaluate.vbench.total import DIMENSIONS, NINE, PAPER, aggregates

#: Normalised: .5, .5, .5, .4, .6, .7 (quality) and .9, .9, .3 (I2V).
MEANS = {
    "subject_consistency": 0.1462 + 0.5 * 0.8538,
    "background_consistency": 0.2615 + 0.5 * 0.7385,
    "motion_smoothness": 0.706 + 0.5 * 0.2915,
    "dynamic_degree": 0.4,
    "aesthetic_quality": 0.6,
    "imaging_quality": 0.7,
    "i2v_subject": 0.1462 + 0.9 * 0.8538,
    "i2v_background": 0.2615 + 0.9 * 0.7385,
    "camera_motion": 0.3,
}


def values(means):
    return {aggregate.key: aggregate.value for aggregate in aggregates(means)}


def without(*names):
    return {name: mean for name, mean in MEANS.items() if name not in names}


def test_the_official_total_by_hand():
    quality = (0.5 + 0.5 + 0.5 + 0.5 * 0.4 + 0.6 + 0.7) / 5.5
    i2v = (0.9 + 0.9 + 0.1 * 0.3) / 2.1
    assert quality == pytest.approx(0.545454, abs=1e-6)
    assert i2v == pytest.approx(0.871428, abs=1e-6)
    found = values(MEANS)
    assert found["official_total"] == pytest.approx(0.708442, abs=1e-6)
    assert found["official_weights_present"] == found["official_total"]


def test_a_missing_dimension_is_not_counted_as_zero():
    """VBench's script fills in 0, which would make it 0.701299."""
    zero_filled = (3.0 / 5.5 + 1.8 / 2.1) / 2
    found = values(without("camera_motion"))
    assert found["official_total"] is None
    assert found["official_weights_present"] == pytest.approx((3.0 / 5.5 + 0.9) / 2)
    assert found["official_weights_present"] - zero_filled > 0.02
    assert values({**MEANS, "camera_motion": 0.0})["official_total"] == pytest.approx(zero_filled)


@pytest.mark.parametrize("name", NINE)
def test_the_official_total_needs_all_nine(name):
    official, weighted, _ = aggregates(without(name))
    assert official.value is None and weighted.value is not None
    assert official.name == f"official Total (not computed without {name})"
    assert weighted.name == "official weights over the 8 present dimensions"


def test_the_plain_mean_is_of_the_papers_seven_raw_values():
    found = aggregates(MEANS)[2]
    assert found.dimensions == PAPER and len(PAPER) == 7
    assert not {"imaging_quality", "camera_motion"} & set(PAPER)
    by_hand = (0.5731 + 0.63075 + 0.85175 + 0.4 + 0.6 + 0.91462 + 0.92615) / 7
    assert found.value == pytest.approx(by_hand)
    assert found.name == "plain mean of 7 raw values (paper-like, unconfirmed)"
    assert aggregates(without("i2v_subject"))[2].name.startswith("plain mean of 6 raw values")


@pytest.mark.parametrize(
    "name, weight",
    [
        ("motion_smoothness", 0.31), ("i2v_background", 0.32), ("i2v_subject", 0.28),
        ("background_consistency", 0.12), ("subject_consistency", 0.11),
        ("aesthetic_quality", 0.09), ("imaging_quality", 0.09), ("dynamic_degree", 0.045),
        ("camera_motion", 0.024),
    ],
)  # fmt: skip
def test_what_a_raw_score_is_worth(name, weight):
    """Evaluation 1: Total per unit of raw score."""
    more = values({**MEANS, name: MEANS[name] + 1})["official_total"]
    assert more - values(MEANS)["official_total"] == pytest.approx(weight, abs=0.005)


def test_what_the_papers_jump_in_motion_is_worth():
    """Evaluation 1: dynamic degree +.412 is .059 of a plain mean of seven, .023 of the weights."""
    seven = without("imaging_quality", "camera_motion")
    before, after = values(seven), values({**seven, "dynamic_degree": 0.4 + 0.412})
    assert after["plain_mean"] - before["plain_mean"] == pytest.approx(0.059, abs=5e-4)
    moved = after["official_weights_present"] - before["official_weights_present"]
    assert moved == pytest.approx(0.023, abs=5e-4)


def test_one_half_alone_is_said():
    half = {name: MEANS[name] for name in ("dynamic_degree", "aesthetic_quality")}
    weighted = aggregates(half)[1]
    assert weighted.value == pytest.approx((0.5 * 0.4 + 0.6) / 1.5)
    assert weighted.name.endswith("2 present dimensions (quality half alone)")
    assert aggregates({"i2v_subject": 1.0})[1].name.endswith("(I2V half alone)")


def test_nothing_measured_is_no_number():
    assert [aggregate.value for aggregate in aggregates({})] == [None, None, None]


def test_flicker_is_in_no_aggregate():
    assert aggregates({**MEANS, "temporal_flickering": 0.1}) == aggregates(MEANS)
    assert set(DIMENSIONS) - set(NINE) == {"temporal_flickering"}


def test_no_aggregate_is_called_overall():
    for means in (MEANS, without("camera_motion"), {}):
        assert not any("overall" in aggregate.name.lower() for aggregate in aggregates(means))
