"""The quality guard: nothing is lost by nothing, a broken preset is caught, verdicts, errors."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import packcache as pc
from packcache.cli import app
from packcache.errors import InputFileError, InvalidSetting
from packcache.evaluate import guard as guards
from packcache.lumos import attend
from packcache.lumos.decode import Step
from packcache.reuse import EXACT, PRESETS, StepReuse

pytestmark = pytest.mark.usefixtures("quick_reader")

SAME, OFTEN = StepReuse(), StepReuse(history_every=9, rest_every=9)
TINY = {"clips": 2, "recall_clips": 1, "forced_clips": 1, "frames": 5, "steps": 6}


@pytest.fixture(scope="module")
def pipeline():
    return pc.load("digits")


@pytest.fixture(scope="module")
def small(pipeline) -> guards.Guard:
    return guards.guard(pipeline, {"same": SAME, "often": OFTEN}, policies=["full"], **TINY)


# --- verdicts ------------------------------------------------------------------------------------


def pairs(lost: int, gained: int, clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes with so many pairs that differ; half of the others are right."""
    exact = (np.arange(clips) % 2).astype(float)
    other = exact.copy()
    other[np.flatnonzero(exact == 1)[:lost]] = 0
    other[np.flatnonzero(exact == 0)[:gained]] = 1
    return exact, other


@pytest.mark.parametrize(
    ("lost", "gained", "clips", "verdict"),
    [
        (0, 0, 400, "holds"),
        (2, 2, 400, "holds"),
        (0, 8, 400, "holds"),  # better is no harm
        (8, 0, 400, "undecided"),  # 2 points, but up to 3.5
        (13, 0, 400, "undecided"),  # 3.25 points, but perhaps 1.5
        (25, 0, 400, "breaks"),  # 6.25 points, 4 at least
        (0, 0, 99, "undecided"),  # a loss in a hundred clips would not have been seen
        (0, 0, 100, "holds"),
        (1, 0, 10, "undecided"),
    ],
)
def test_a_verdict_by_made_up_numbers(lost, gained, clips, verdict):
    found = guards.drop(*pairs(lost, gained, clips), limit=3)
    assert found.verdict == verdict
    assert found.mean == pytest.approx(100 * (lost - gained) / clips)
    assert found.low <= found.mean <= found.high
    assert (found.clips, found.limit) == (clips, 3)


def test_a_limit_of_two_points_needs_more_clips_than_one_of_three():
    equal = pairs(0, 0, 120)
    assert guards.drop(*equal, limit=3).verdict == "holds"
    few = guards.drop(*equal, limit=2)
    assert (few.verdict, few.needed) == ("undecided", 150)


def test_as_many_clips_as_needed_decide():
    """The number told is neither far too small nor far too large."""
    few = guards.drop(*pairs(8, 4, 200), limit=3)
    assert few.verdict == "undecided" and few.needed is not None
    times = few.needed / 200
    assert guards.drop(*pairs(8, 4, 200), limit=3).needed == few.needed  # no chance in it
    many, fewer = ([int(n * factor * times) for n in (8, 4, 200)] for factor in (1.3, 0.7))
    assert guards.drop(*pairs(*many), limit=3).verdict == "holds"
    assert guards.drop(*pairs(*fewer), limit=3).verdict == "undecided"


def test_what_is_decided_or_at_the_limit_needs_no_number():
    for numbers in ((0, 0, 400), (13, 0, 400), (12, 0, 400)):
        assert guards.drop(*pairs(*numbers), limit=3).needed is None


def made(digit: tuple[np.ndarray, np.ndarray], recall: tuple[np.ndarray, np.ndarray]):
    """A result of one preset, its shares given."""
    values = {metric: np.zeros((1, 2, 0)) for metric in guards.METRICS}
    values |= {"digit": np.stack(digit)[None], "recall": np.stack(recall)[None]}
    return guards.Guard(
        policies=("full",), presets={"exact": EXACT, "fast": OFTEN}, values=values, workload={},
        environment={},
    )  # fmt: skip


NONE = (np.zeros(0), np.zeros(0))


@pytest.mark.parametrize(
    ("digit", "recall", "verdict"),
    [
        (pairs(0, 0, 400), pairs(0, 0, 400), "holds"),
        (pairs(0, 0, 400), pairs(8, 0, 400), "undecided"),
        (pairs(40, 0, 400), pairs(0, 0, 400), "breaks"),
        (pairs(40, 0, 400), pairs(8, 0, 400), "breaks"),
        (pairs(0, 0, 400), NONE, "undecided"),  # what was not asked does not hold
        (NONE, pairs(40, 0, 400), "breaks"),
    ],
)
def test_a_preset_holds_if_nothing_it_lost_is_too_much(digit, recall, verdict):
    found = made(digit, recall)
    assert found.verdict("full", "fast") == verdict
    assert found.holds("fast") == (verdict == "holds")


def test_rows_say_what_was_found_and_what_it_means():
    found = made(pairs(0, 0, 400), pairs(8, 0, 400))
    exact, fast = found.rows()
    assert (exact["verdict"], exact["drops"]) == (None, None)
    assert (fast["verdict"], fast["holds"]) == ("undecided", False)
    assert (fast["history_every"], fast["rest_every"], fast["kl"]) == (9, 9, None)
    assert fast["drops"]["recall"]["mean"] == 2 and fast["recall"]["clips"] == 400
    needed = fast["drops"]["recall"]["needed"]
    assert f"undecided: needs {needed} recall clips" in found.lines()[-1]


# --- measured ------------------------------------------------------------------------------------


def test_exact_against_exact_loses_nothing(small):
    assert small.values["digit"].shape == (1, 3, 2)
    for values in small.values.values():
        assert np.array_equal(values[:, 0], values[:, 1])
        assert not np.isnan(values).any()
    assert (small.values["kl"][0, 1] == 0).all() and (small.values["agreement"][0, 1] == 1).all()
    assert small.drops("full", "same")["recall"].high == 0
    assert 0 < small.values["kl"][0, 2, 0] < 1  # reuse is not exact
    assert 0.5 < small.values["agreement"][0, 2, 0] < 1


def test_a_preset_that_loses_the_history_is_caught(pipeline, monkeypatch):
    """Text and condition image are in the history too: without it nothing is read right."""
    monkeypatch.setattr(attend, "merge", lambda out, lse, *past: out)
    found = guards.guard(pipeline, {"broken": OFTEN}, policies=["full"], **TINY)
    assert found.verdict("full", "broken") == "breaks"
    assert found.drops("full", "broken")["digit"].mean > 50
    assert found.values["kl"][0, 1, 0] > 1
    assert found.values["agreement"][0, 1, 0] < 0.9


def test_clips_that_are_done_are_not_made_again(pipeline, small, tmp_path, monkeypatch):
    """Neither for more clips nor for fewer, and one by one they are what they are together."""
    kept = tmp_path / "clips.jsonl"
    fewer = TINY | {"clips": 1, "forced_clips": 0}
    presets = {"same": SAME, "often": OFTEN}
    guards.guard(pipeline, presets, policies=["full"], **fewer, kept=kept)
    told = kept.read_text().splitlines()
    seen: list[tuple[int, int]] = []
    found = guards.guard(
        pipeline, presets, policies=["full"], **TINY, kept=kept,
        on_step=lambda *progress: seen.append(progress),
    )  # fmt: skip
    assert seen == [(2, 3), (3, 3)]  # of three clips one was done; one had not been teacher-forced
    assert kept.read_text().splitlines()[: len(told)] == told
    for metric, values in small.values.items():
        np.testing.assert_allclose(found.values[metric], values, rtol=1e-3)
    for made in ("_read", "_drafts"):
        monkeypatch.delattr(guards._Asked, made)
    again = guards.guard(pipeline, presets, policies=["full"], **TINY, kept=kept)
    assert again.to_json() == found.to_json()
    with pytest.raises(InputFileError, match=r"begun with presets .*give the same, or another"):
        guards.guard(pipeline, {"often": OFTEN}, policies=["full"], **TINY, kept=kept)


def test_clips_are_half_from_text_and_more_of_them_are_the_same_ones():
    def cases(count):
        return [guards._one_digit(3, number) for number in range(count)]

    assert cases(4) == cases(8)[:4]
    assert [case.with_image for case in cases(4)] == [False, True] * 2
    assert {case.scene.kind for case in cases(8)} == {"one"}
    assert len({case.seed for case in cases(8)}) == 8


def test_a_draft_is_the_frame_that_would_be_made_and_leaves_no_trace(pipeline):
    plain = pipeline.run(["a red 3"], frames=5, policy="full", steps=3).decoder
    drafter = guards.Drafter(
        plain.model, plain.prefixes, layout=plain.layout, sampling=plain.sampling, draws=plain.draws
    )
    for decoder in (plain, drafter):
        decoder.prefill()
    held = drafter.caches[0].kv_bytes, drafter.caches[0].logical_length
    steps: list[Step] = []
    first = drafter.draft(EXACT, on_step=steps.append)
    trail = drafter.trail
    drafter.draft(OFTEN)
    again = drafter.draft(EXACT)
    assert torch.equal(first, again) and torch.equal(first, plain.generate().codes)
    assert (drafter.caches[0].kv_bytes, drafter.caches[0].logical_length) == held
    followed: list[Step] = []
    drafter.draft(OFTEN, follow=trail, on_step=followed.append)
    for own, its in zip(steps, followed, strict=True):
        assert torch.equal(own.tokens, its.tokens) and torch.equal(own.positions, its.positions)


def step(logits: list[list[float]], known: list[bool]) -> Step:
    rows = torch.zeros(1, len(known))
    return Step(
        frame=0, step=0, positions=rows, tokens=rows, known=torch.tensor([known]), sampled=rows,
        selected=rows, num_mask=rows, temperature=0.0, logits=torch.tensor([logits]),
    )  # fmt: skip


def test_divergence_and_agreement_of_known_distributions():
    """Two codes: certain against even is ln 2; decided tokens do not count."""
    sure, even, other = [40.0, 0.0], [0.0, 0.0], [0.0, 1.0]
    exact = [step([sure, sure], [False, True]), step([sure], [False])]
    found = [step([even, other], [False, True]), step([other], [False])]
    kl, agreement = guards.compare(exact, found)
    assert kl == pytest.approx([(np.log(2) + np.log(1 + np.e)) / 2])
    assert agreement == [0.5]  # of equals the first counts
    assert guards.compare(exact, exact) == (0, 1)


# --- use -----------------------------------------------------------------------------------------


def test_presets_are_listed_with_commas_and_their_settings_joined_by_plus():
    text = "exact,fast, history_every=4+rest_every=8,rest_every=2"
    assert guards.parse_presets(text, 25) == {
        "exact": PRESETS["exact"],
        "fast": PRESETS["fast"].for_steps(25),
        "history_every=4+rest_every=8": StepReuse(history_every=4, rest_every=8),
        "rest_every=2": StepReuse(rest_every=2),
    }


def run(command: str, *more: str):
    return CliRunner().invoke(app, [*command.split(), *more])


SHORT = "evaluate guard --policies none --frames 2 --steps 2 --clips 1 --recall-clips 0"


def test_command_writes_json_and_prints_the_table(tmp_path):
    asked = "--forced-clips 0 --presets rest_every=2 --out"
    out = run(f"{SHORT} {asked}", str(tmp_path / "new"))
    assert out.exit_code == 0, out.output
    assert "none" in out.output and "rest_every=2" in out.output
    result = json.loads((tmp_path / "new" / "guard.json").read_text())
    assert result["schema"] == "packcache.guard/1"
    assert [row["preset"] for row in result["results"]] == ["exact", "rest_every=2"]
    assert result["workload"]["presets"]["rest_every=2"] == asdict(StepReuse(rest_every=2))
    assert result["workload"]["sampling"]["steps"] == 2
    assert result["results"][1]["recall"] is None
    again = run(f"{SHORT} {asked}", str(tmp_path / "new"))
    assert again.output == out.output
    assert len((tmp_path / "new" / "clips.jsonl").read_text().splitlines()) == 2


def test_json_is_printed_instead_of_a_table():
    out = run(f"{SHORT} --forced-clips 0 --presets exact --seed 5 --json")
    result = json.loads(out.output)
    assert (result["workload"]["seed"], len(result["results"])) == (5, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"presets": {"exact": OFTEN}}, "preset 'exact' is .*, expected exact steps; choose"),
        ({"policies": []}, r"policies are \[\], expected at least one"),
        ({"policies": ["full", "full"]}, "expected at least one, each once"),
        ({"policies": ["most"]}, "unknown policy 'most'"),
        ({"clips": -1}, "clips is -1, expected at least 0"),
        ({"frames": 1}, "frames is 1, expected at least 2"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"batch": 0}, "batch is 0, expected at least 1"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"clips": 0, "recall_clips": 0}, "clips and recall_clips are 0: nothing is asked"),
        ({"recall_clips": 8}, "forced_clips is 32, expected at most the 8 recall_clips"),
    ],
)
def test_wrong_use_is_one_line(pipeline, settings, message):
    with pytest.raises(InvalidSetting, match=message):
        guards.guard(pipeline, **{"presets": {}, **settings})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--presets quick", "reuse is 'quick', expected exact, balanced, fast, or settings"),
        ("--presets ,", "no preset in ',': known are exact, balanced, fast"),
        ("--policies most", "unknown policy 'most'"),
        ("--policies full,no.json", "policy 'no.json' is a file, which may change: write"),
        ("--presets exact --clips 0 --recall-clips 0 --forced-clips 0", "nothing is asked"),
    ],
)
def test_wrong_options_leave_no_folder(tmp_path, options, message):
    out = run(f"evaluate guard {options} --out", str(tmp_path / "new"))
    assert message in str(out.exception)
    assert not (tmp_path / "new").exists()
