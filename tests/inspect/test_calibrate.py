"""Settings that a trace calls for: the smallest budget within the tolerance, honestly told."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from packcache.errors import InputError, InvalidSetting, OutputError
from packcache.evaluate.statistics import Interval
from packcache.inspect.calibrate import calibrate, check_tolerance
from packcache.inspect.score import score
from packcache.policies import CALIBRATION, PackCache
from tests.inspect.synthetic import exponential, flat, periodic, trace


def small(kernel=flat, **settings):
    """One clip of 7 latent frames, samples of the commit only."""
    defaults = {"frames": 7, "clips": 1, "steps": (-1,), "layers": 1}
    return trace(kernel, **(defaults | settings))


@pytest.fixture(scope="module")
def found():
    return calibrate(small(exponential(0.4), clips=2, noise=0.05), tolerance=0.1)


def test_the_smallest_budget_within_the_tolerance(found):
    assert found.met and found.chosen is found.trials[-1]
    assert found.chosen.mean <= 0.1
    assert all(trial.mean > 0.1 for trial in found.trials[:-1])
    budgets = [trial.settings["budget"] for trial in found.trials]
    assert budgets == sorted(budgets) and len(budgets) > 1


def test_what_it_says_is_what_the_score_says(found):
    made = small(exponential(0.4), clips=2, noise=0.05)
    (row,) = score(made, {"own": found.policy}).rows
    assert found.chosen.mean == pytest.approx(1 - row.values["kept"].mean(), abs=1e-12)
    assert found.chosen.tokens == pytest.approx(row.values["held"].mean())


def test_a_tighter_tolerance_needs_more_memory():
    made = small(exponential(0.6))
    loose, tight = (calibrate(made, tolerance=t).chosen for t in (0.2, 0.1))
    assert loose.settings["budget"] < tight.settings["budget"]
    assert loose.tokens < tight.tokens


def test_attention_on_the_newest_frame_alone_needs_no_window():
    chosen = calibrate(small(exponential(0.01)), tolerance=0.02).chosen
    assert chosen.settings["budget"] <= 1 and chosen.settings["window"] <= 2


def test_nothing_within_the_tolerance_is_told_with_the_best():
    found = calibrate(small(flat, anchors=0.1), tolerance=0.01, budgets=(2, 0.5, 1))
    assert not found.met
    assert [trial.settings["budget"] for trial in found.trials] == [0.5, 1, 2]
    assert found.chosen.mean == min(trial.mean for trial in found.trials)
    assert found.told.startswith("nothing tried keeps the loss within 1.0%: the best loses")
    assert found.fit.verdict == "no decay"


def test_the_fitted_half_life_is_tried_only_if_the_fit_is_good(monkeypatch):
    tried = []

    def watched(made, policies):
        tried.extend(policy.half_life for policy in policies.values())
        return score(made, policies)

    monkeypatch.setattr("packcache.inspect.calibrate.score", watched)
    calibrate(small(exponential(0.6)), tolerance=0.5, budgets=(1,))
    assert {1.36, 0.68} <= set(tried)  # log(1/2) / log(0.6), and its half
    tried.clear()
    calibrate(small(periodic(3)), tolerance=0.5, budgets=(1,))
    assert set(tried) == {1.0, 2.0, 4.0}


def test_an_order_that_finds_the_attention_is_chosen():
    """All attention lies on tokens whose id changed; the order `visible` does not know."""
    made = small(exponential(0.7), within=np.r_[np.zeros(3), np.tile([1] + [0] * 8, 8), 0])
    for ids in made.ids:
        ids[:] = 5
        ids[1::2, 3::9] = 6
    found = calibrate(made, tolerance=0.01)
    blind = calibrate(dataclasses.replace(made, ids=[]), tolerance=0.01)
    assert found.met and found.chosen.settings["order"] == "novelty"
    assert found.chosen.settings["budget"] < blind.chosen.settings["budget"]


def test_without_ids_novelty_is_not_tried():
    found = calibrate(small(exponential(0.4), ids=False), tolerance=0.1)
    assert all(trial.settings["order"] == "visible" for trial in found.trials)


def test_a_budget_that_gives_up_nothing_is_no_answer():
    """Seven latent frames never fill a budget of five frames of history: that proves nothing."""
    made = small(exponential(0.9))
    found = calibrate(made, tolerance=0.001, budgets=(1, 5, 8))
    assert [trial.settings["budget"] for trial in found.trials] == [1]
    with pytest.raises(InvalidSetting, match=r"budgets are 5, 8 latent frames .* below 5, as many"):
        calibrate(made, budgets=(5, 8))


def test_saved_and_loaded(found, tmp_path):
    path = found.save(tmp_path / "settings.json")
    told = json.loads(path.read_text())
    assert told["schema"] == CALIBRATION and told["met"] is True
    assert told["fit"]["verdict"] == "exponential" and told["workload"]["clips"] == 2
    assert told["lost"]["low"] <= told["lost"]["mean"] <= told["lost"]["high"]
    assert path.stat().st_size < 8000
    assert PackCache.from_file(path) == found.policy == PackCache(**told["settings"])


def test_it_says_when_the_interval_reaches_past_the_tolerance(found):
    wide = Interval(mean=np.array(0.09), low=np.array(0.05), high=np.array(0.12), rows=3)
    chosen = dataclasses.replace(found.chosen, lost=wide)
    assert dataclasses.replace(found, chosen=chosen).told == (
        "loses 9.0% of attention (5.0% to 12.0%, 3 clips), tolerated 10.0%; "
        "the interval reaches past the tolerance"
    )


def test_progress_is_told():
    steps = []
    calibrate(
        small(flat, anchors=0.1), tolerance=0.01, budgets=(1, 2),
        on_step=lambda *step: steps.append(step),
    )  # fmt: skip
    assert steps == [(0, 2), (1, 2)]


@pytest.mark.parametrize("tolerance", [0, 1, -0.1, 5, float("nan")])
def test_tolerance_out_of_range(tolerance):
    for check in (check_tolerance, lambda t: calibrate(small(), tolerance=t)):
        with pytest.raises(InvalidSetting, match=r"tolerance is .*, expected a share of attention"):
            check(tolerance)


def test_budgets_that_are_none():
    with pytest.raises(InvalidSetting, match="no budget to try"):
        calibrate(small(), budgets=())
    with pytest.raises(InvalidSetting, match=r"budgets are 0\.001 latent frames of 76 tokens, exp"):
        calibrate(small(), budgets=(0.001,))


def test_a_trace_without_history():
    with pytest.raises(InputError, match="the trace has no history"):
        calibrate(small(frames=2))


def test_nowhere_to_write(found, tmp_path):
    with pytest.raises(OutputError, match="does not exist: create it or choose another"):
        found.save(tmp_path / "no" / "a.json")
