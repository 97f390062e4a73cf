"""Spans, layouts and slots: who owns which slot, in integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcache.errors import CacheStateError, InvalidSetting
from packcache.timeline import FrameLayout, Kind, Role, Span, Timeline
from tests.tools import LAYOUT

BARE = FrameLayout(rows=2, cols=3, header=0, footer=0, new_line=False)


def frame(number: int, layout: FrameLayout = LAYOUT, role: Role = Role.HISTORY, **kw) -> Span:
    return Span.of_frame(role, number, layout, **kw)


@pytest.mark.parametrize(
    "rows, cols, tokens", [(32, 56, 1828), (48, 84, 4084), (60, 96, 5824), (8, 8, 76)]
)
def test_tokens_of_a_latent_frame(rows, cols, tokens):
    """lumos1-spec 3.3."""
    layout = FrameLayout(rows=rows, cols=cols)
    assert layout.tokens == tokens == len(layout.kinds())
    assert layout.content == rows * cols == len(layout.content_offsets())


def test_layout_of_a_frame_token_by_token():
    layout = FrameLayout(rows=2, cols=2)
    kinds = "".join({0: "b", 1: "c", 2: "n"}[int(k)] for k in layout.kinds())
    assert kinds == "bbbccnccnb"
    y, x = layout.cells()
    assert y.tolist() == [-1, -1, -1, 0, 0, 0, 1, 1, 1, -1]
    assert x.tolist() == [-1, -1, -1, 0, 1, 2, 0, 1, 2, -1]
    assert layout.content_offsets().tolist() == [3, 4, 6, 7]


def test_a_layout_without_border_or_new_line_is_all_content():
    assert BARE.tokens == BARE.content == 6
    assert (BARE.kinds() == Kind.CONTENT).all()


def test_roles_that_never_decay():
    assert [role for role in Role if role.is_anchor] == [Role.TEXT, Role.IMAGE]


@pytest.mark.parametrize("name", ["visible", "ids"])
def test_a_span_checks_the_size_of_its_arrays(name):
    with pytest.raises(InvalidSetting, match=rf"{name} has shape \(5,\), expected \(76,\)"):
        frame(0, **{name: np.zeros(5)})


def test_lengths_count_logical_and_physical():
    timeline = Timeline()
    timeline.append(Span.text(5))
    for number in range(3):
        timeline.append(frame(number))
    assert (timeline.logical_length, timeline.physical_length) == (5 + 3 * 76, 5 + 3 * 76)
    timeline.keep(range(5, 100))
    assert (timeline.logical_length, timeline.physical_length) == (5 + 3 * 76, 95)
    assert timeline.evicted_tokens == 5 + 3 * 76 - 95
    assert timeline.num_frames == 3


def test_history_is_newest_first_and_distance_counts_frames():
    timeline = Timeline()
    timeline.append(Span.text(5))
    timeline.append(frame(0, role=Role.IMAGE))
    for number in (1, 2, 3):
        timeline.append(frame(number))
    assert [e.span.frame for e in timeline.history] == [3, 2, 1]
    assert [timeline.distance(e) for e in timeline.history] == [1, 2, 3]
    assert [e.span.role for e in timeline.anchors] == [Role.TEXT, Role.IMAGE]
    assert timeline.first_history == 1
    assert timeline.counts() == {1: 76, 2: 76, 3: 76}


@pytest.mark.parametrize("number", [0, 2])
def test_frames_come_in_order_each_once(number):
    timeline = Timeline()
    timeline.append(frame(0))
    with pytest.raises(CacheStateError, match=f"frame {number} was committed, expected frame 1"):
        timeline.append(frame(number))


def test_an_entry_left_empty_is_forgotten_but_its_number_is_not():
    timeline = Timeline()
    timeline.append(frame(0, BARE))
    timeline.append(frame(1, BARE))
    timeline.keep([7, 9])
    (entry,) = timeline.entries
    assert (entry.span.frame, entry.held.tolist(), entry.start) == (1, [1, 3], 6)
    assert [list(where) for _, where in timeline.slots()] == [[0, 1]]
    timeline.append(frame(2, BARE))


@pytest.mark.parametrize("slots", [[-1], [6], [1, 1], [2, 1]])
def test_slots_to_keep_ascend_inside_what_is_held(slots):
    timeline = Timeline()
    timeline.append(frame(0, BARE))
    with pytest.raises(CacheStateError, match=r"must ascend inside 0\.\.5, each once"):
        timeline.keep(slots)
    assert timeline.physical_length == 6


def test_keeping_nothing_leaves_nothing():
    timeline = Timeline()
    timeline.append(frame(0, BARE))
    timeline.keep([])
    assert (timeline.physical_length, timeline.entries) == (0, [])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_keep_is_fancy_indexing(sizes, data):
    """Whatever is kept however often, the held tokens are those a plain array would hold."""
    timeline, plain, start = Timeline(), [], 0
    for number, size in enumerate(sizes):
        layout = FrameLayout(rows=1, cols=size, header=0, footer=0, new_line=False)
        timeline.append(frame(number, layout))
        plain += range(start, start + size)
        start += size
        mask = data.draw(st.lists(st.booleans(), min_size=len(plain), max_size=len(plain)))
        timeline.keep([slot for slot, keep in enumerate(mask) if keep])
        plain = [token for token, keep in zip(plain, mask, strict=True) if keep]
        held = [e.start + offset for e in timeline.entries for offset in e.held.tolist()]
        assert held == plain


def test_best_follows_the_rank_and_nests():
    timeline = Timeline()
    entry = timeline.append(frame(0, BARE), rank=np.array([5, 0, 4, 1, 3, 2], np.int32))
    best = [entry.best(k).tolist() for k in range(7)]
    assert best == [[], [1], [1, 3], [1, 3, 5], [1, 3, 4, 5], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


def test_an_anchor_has_no_order_to_give_up_tokens_in():
    entry = Timeline().append(frame(0, BARE, Role.IMAGE))
    assert len(entry.best(6)) == 6
    with pytest.raises(CacheStateError, match="condition image has no order"):
        entry.best(5)


def test_coordinates_of_what_is_left():
    timeline = Timeline()
    timeline.append(Span.text(2))
    timeline.append(frame(0, FrameLayout(rows=2, cols=2)))
    timeline.keep([0, 1, 2, 5, 9])
    text, entry = timeline.entries
    assert [c.tolist() for c in timeline.coordinates(entry)] == [[0, 0, 0], [-1, 0, 1], [-1, 0, 1]]
    with pytest.raises(CacheStateError, match="text has a 1-D index"):
        timeline.coordinates(text)


def test_metadata_is_at_most_a_thousandth_of_the_kv():
    """4084 tokens a frame, 3B shapes in bf16, packed as the paper packs; nothing is allocated."""
    from packcache.policies import PackCache
    from tests.tools import commit

    layout, policy, timeline = FrameLayout(rows=48, cols=84), PackCache(), Timeline()
    slot_bytes = 2 * 28 * 2 * 8 * 128 * 2  # branches, layers, K and V, heads, head size, bf16
    rng = np.random.default_rng(0)
    commit(timeline, policy, Span.text(150))
    for number in range(6):
        visible = rng.random(layout.tokens) < 0.3
        ids = rng.integers(0, 64000, layout.tokens).astype(np.int32)
        commit(timeline, policy, frame(number, layout, visible=visible, ids=ids))
        assert timeline.metadata_bytes <= timeline.physical_length * slot_bytes / 1000
    assert timeline.metadata_bytes > 4 * layout.tokens
