"""WHEN a step computes anew: the schedule of reuse, in integers, and its spelling."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcache.errors import InvalidSetting
from packcache.lumos.config import SIZES
from packcache.lumos.cost import frame_work
from packcache.lumos.schedule import UPSTREAM, cosine_counts, undecided
from packcache.reuse import EXACT, PRESETS, StepReuse, StepWork, parse_reuse
from packcache.timeline import FrameLayout

LAYOUT = FrameLayout(rows=48, cols=84)
EVERY = st.integers(1, 20)
LEFT = st.builds(undecided, st.integers(20, 300), st.integers(1, 20))


@given(st.integers(1, 5000), st.integers(1, 60))
def test_each_step_decides_a_token_at_least(tokens, steps):
    left = undecided(tokens, steps)
    assert len(left) == steps and left[0] == tokens and left[-1] >= 1
    for now, then, count in zip(left, left[1:], cosine_counts(tokens, steps), strict=False):
        assert then == max(1, min(now - 1, count))


@given(LEFT)
def test_exact_computes_everything_in_every_step(left):
    assert EXACT.works(left, left[0] + 7) == [StepWork()] * len(left)
    assert EXACT.is_exact and not EXACT.keeps_history


@given(LEFT, EVERY, EVERY, st.floats(0, 1))
def test_what_a_step_computes(left, history, rest, share):
    tokens = left[0] + 7  # border tokens
    reuse = StepReuse(history_every=history, history_share=share, rest_every=rest)
    works = reuse.works(left, tokens)
    assert len(works) == len(left)
    assert works[:2] == [StepWork()] * len(works[:2])
    last = 1
    for step, work in enumerate(works[2:], start=2):
        assert work.rows == (None if step % rest == 0 else left[step - 1])
        if step == last + history or left[step] <= 0.8 * left[last]:
            assert work.fresh is None
            last = step
            continue
        through = tokens if work.rows is None else work.rows
        decided = left[step - 1] - left[step]
        assert work.fresh == min(through, max(math.ceil(share * tokens), decided))


def test_a_worked_example():
    """Twelve tokens, two of them border, in five steps."""
    reuse = StepReuse(history_every=3, history_share=0.25, rest_every=2)
    works = reuse.works([10, 10, 9, 9, 9, 8, 1], 12)
    assert [(w.rows, w.fresh) for w in works] == [
        (None, None),
        (None, None),  # equal confidences decide many in the first step
        (None, 3),
        (9, 3),
        (None, None),  # three steps after the last refresh
        (9, 3),
        (None, None),  # a fifth and more of nine was decided
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_by_name(name):
    assert parse_reuse(name) == PRESETS[name]


def test_presets_go_from_none_to_much():
    exact, balanced, fast = (PRESETS[name] for name in ("exact", "balanced", "fast"))
    assert exact == EXACT == StepReuse()
    for one, more in ((exact, balanced), (balanced, fast)):
        costs = (
            frame_work(SIZES["3b"], LAYOUT, UPSTREAM, 9000, reuse=r).total for r in (one, more)
        )
        assert one != more and next(costs) > next(costs)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_the_same_share_of_any_schedule(name):
    """Of 50 steps as told; of 12 the nearest whole numbers; of few nothing is skipped."""
    told, short = parse_reuse(name), parse_reuse(name, 12)
    for count in ("history_every", "rest_every"):
        assert getattr(short, count) == max(1, round(getattr(told, count) * 12 / 50))
    assert short.history_share == told.history_share
    assert parse_reuse(name, 1).is_exact
    settings = "history_every=8,rest_every=4"
    assert parse_reuse(settings, 12) == parse_reuse(settings)


def test_settings_by_name():
    spelled = "history_every=4,history_share=0.25,rest_every=8"
    made = StepReuse(history_every=4, history_share=0.25, rest_every=8)
    assert parse_reuse(spelled) == made
    assert parse_reuse("rest_every=2") == StepReuse(rest_every=2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "faster",
        "history_every",
        "history_every=x",
        "history_every=1.5",
        "rest=2",
        "rest_every=2,rest_every=3",
        "history_share=much",
    ],
)
def test_another_spelling_is_refused(text):
    with pytest.raises(InvalidSetting, match=r"reuse is '.*', expected exact, balanced, fast, or"):
        parse_reuse(text)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
@pytest.mark.parametrize("name", ["history_every", "rest_every"])
def test_a_number_of_steps_is_a_number_of_steps(name, value):
    with pytest.raises(InvalidSetting, match=rf"{name} is .*, expected a number of steps, >= 1"):
        StepReuse(**{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan")])
def test_a_share_is_a_share(value):
    with pytest.raises(InvalidSetting, match=r"history_share is .*, expected 0 to 1"):
        StepReuse(history_share=value)
