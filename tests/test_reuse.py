"""WHEN a step computes anew: the schedule of reuse, in integers, and its spelling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcache.errors import InvalidSetting
from packcache.lumos.schedule import cosine_counts, undecided
from packcache.reuse import EXACT, PRESETS, StepReuse, StepWork, parse_reuse

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
    for work, now, before in zip(EXACT.works(left), left, [left[0], *left], strict=False):
        assert (work.rows, work.fresh, work.fresh_first) == (None, None, None)
        assert work.moved == before - now
    assert EXACT.is_exact and not EXACT.keeps_history


@given(LEFT, EVERY, EVERY)
def test_what_a_step_computes(left, history, rest):
    reuse = StepReuse(history_every=history, rest_every=rest)
    works = reuse.works(left)
    assert len(works) == len(left)
    assert works[0] == StepWork(rows=None, moved=0, fresh=None, fresh_first=works[0].fresh_first)
    assert works[0].fresh_first is None
    for step, work in enumerate(works[1:], start=1):
        assert work.rows == (None if step % rest == 0 else left[step - 1])
        assert work.moved == left[step - 1] - left[step]
        assert work.fresh == (None if step % history == 0 else work.moved)
        assert work.fresh_first == (work.moved if history > 1 else None)
        assert work.rows is None or work.rows == work.moved + left[step]


def test_a_worked_example():
    """Ten tokens in four steps; history every third step, rest every second."""
    works = StepReuse(history_every=3, rest_every=2).works([10, 8, 5, 1])
    assert [(w.rows, w.moved, w.fresh, w.fresh_first) for w in works] == [
        (None, 0, None, None),
        (10, 2, 2, 2),
        (None, 3, 3, 3),
        (5, 4, None, 4),
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_by_name(name):
    assert parse_reuse(name) == PRESETS[name]


def test_presets_go_from_none_to_much():
    exact, balanced, fast = (PRESETS[name] for name in ("exact", "balanced", "fast"))
    assert exact == EXACT == StepReuse()
    for one, more in ((exact, balanced), (balanced, fast)):
        assert one != more
        assert one.history_every <= more.history_every and one.rest_every <= more.rest_every


def test_settings_by_name():
    assert parse_reuse("history_every=4,rest_every=8") == StepReuse(history_every=4, rest_every=8)
    assert parse_reuse("rest_every=2") == StepReuse(rest_every=2)


@pytest.mark.parametrize(
    "text",
    ["", "faster", "history_every", "history_every=x", "rest=2", "rest_every=2,rest_every=3"],
)
def test_another_spelling_is_refused(text):
    with pytest.raises(InvalidSetting, match=r"reuse is '.*', expected exact, balanced, fast, or"):
        parse_reuse(text)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
@pytest.mark.parametrize("name", ["history_every", "rest_every"])
def test_a_number_of_steps_is_a_number_of_steps(name, value):
    with pytest.raises(InvalidSetting, match=rf"{name} is .*, expected a number of steps, >= 1"):
        StepReuse(**{name: value})
