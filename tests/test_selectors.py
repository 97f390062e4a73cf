"""IN WHICH ORDER: every order is a permutation, nests, and keeps first what it says it keeps."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcache.errors import InvalidSetting
from packcache.selectors import asked, low_discrepancy, rank_tokens
from packcache.timeline import FrameLayout, HeldFrame, Kind, Role, Span
from tests.tools import LAYOUT

ORDERS = ["visible", "spatial", "novelty", "random"]
SCORED = ["expected", "observed"]


def span(layout: FrameLayout = LAYOUT, number: int = 1, **arrays) -> Span:
    return Span.of_frame(Role.HISTORY, number, layout, **arrays)


def kept_first(rank) -> np.ndarray:
    """Offsets in the order they are kept."""
    return np.argsort(rank)


@st.composite
def spans(draw):
    layout = FrameLayout(
        rows=draw(st.integers(1, 6)),
        cols=draw(st.integers(1, 6)),
        header=draw(st.integers(0, 3)),
        footer=draw(st.integers(0, 1)),
        new_line=draw(st.booleans()),
    )
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    visible = rng.random(layout.tokens) < draw(st.floats(0, 1))
    ids = rng.integers(0, 4, layout.tokens).astype(np.int32)
    return span(layout, draw(st.integers(0, 9)), visible=visible, ids=ids)


@given(spans(), st.sampled_from(ORDERS), st.sampled_from(["first", "last"]), st.booleans())
def test_every_order_is_a_permutation_and_nests(one, order, borders, last):
    """Each token has one place, and the best k are among the best k + 1."""
    rank = rank_tokens(one, order=order, borders=borders, remasked_last=last)
    assert rank.dtype == np.int32
    assert sorted(rank.tolist()) == list(range(one.tokens))
    entry = HeldFrame(one, 0, np.arange(one.tokens, dtype=np.int32), rank)
    sets = [set(entry.best(k).tolist()) for k in range(one.tokens + 1)]
    assert all(len(s) == k for k, s in enumerate(sets))
    assert all(a < b for a, b in pairwise(sets))


@given(spans(), st.sampled_from(["visible", "spatial", "novelty"]))
def test_borders_first_or_last(one, order):
    kinds = one.layout.kinds()
    borders = int((kinds == Kind.BORDER).sum())
    first = kept_first(rank_tokens(one, order=order))
    last = kept_first(rank_tokens(one, order=order, borders="last"))
    if one.visible_mask()[kinds == Kind.BORDER].all():  # a re-masked border token is re-masked
        assert (kinds[first[:borders]] == Kind.BORDER).all()
    assert (kinds[last[one.tokens - borders :]] == Kind.BORDER).all()


@given(spans())
def test_tiers_of_the_visible_order(one):
    """Border, visible content, visible new line, re-masked (DESIGN 4.3)."""
    kinds, visible = one.layout.kinds(), one.visible_mask()
    tiers = [
        (kind, shown)
        for shown in (True, False)
        for kind in (Kind.BORDER, Kind.CONTENT, Kind.NEW_LINE)
    ]
    where = [tiers.index((Kind(k), bool(v))) for k, v in zip(kinds, visible, strict=True)]
    in_order = [where[i] for i in kept_first(rank_tokens(one))]
    assert in_order == sorted(in_order)


@given(spans())
def test_the_spatial_order_does_not_look_at_the_mask(one):
    kinds = [int(one.layout.kinds()[i]) for i in kept_first(rank_tokens(one, order="spatial"))]
    assert kinds == sorted(kinds)
    blind = rank_tokens(span(one.layout), order="spatial")
    assert (rank_tokens(one, order="spatial") == blind).all()


@given(spans(), st.sampled_from(ORDERS), st.sampled_from(["first", "last"]))
def test_remasked_last_puts_them_behind_everything(one, order, borders):
    order_of = kept_first(rank_tokens(one, order=order, borders=borders, remasked_last=True))
    shown = one.visible_mask()[order_of].tolist()
    assert shown == sorted(shown, reverse=True)


@given(spans(), st.integers(0, 10**6))
def test_novelty_puts_changed_content_first(one, seed):
    """Among visible and among re-masked content: what changed at its place, then what did not."""
    before = one.ids.copy()
    changed = np.random.default_rng(seed).random(one.tokens) < 0.5
    before[changed] += 1
    rank = rank_tokens(one, span(one.layout, ids=before), order="novelty")
    content = one.layout.kinds() == Kind.CONTENT
    for shown in (True, False):
        tier = content & (one.visible_mask() == shown)
        fresh = [bool(changed[i]) for i in kept_first(rank) if tier[i]]
        assert fresh == sorted(fresh, reverse=True)
    rest = [i for i in kept_first(rank) if not content[i]]
    assert rest == [i for i in kept_first(rank_tokens(one)) if not content[i]]


def test_novelty_without_a_comparable_frame_is_the_visible_order():
    ids = np.arange(LAYOUT.tokens, dtype=np.int32)
    one, want = span(ids=ids), rank_tokens(span())
    other = FrameLayout(rows=4, cols=14)  # another grid
    for before in (None, span(), span(other, ids=np.arange(other.tokens, dtype=np.int32))):
        assert (rank_tokens(one, before, order="novelty") == want).all()


def test_novelty_needs_ids():
    with pytest.raises(
        InvalidSetting, match="'novelty' compares token ids, and this model commits"
    ):
        rank_tokens(span(), order="novelty")


def discrepancy(points: np.ndarray, layout: FrameLayout) -> float:
    """Largest gap between the share of points in a corner rectangle and its share of the grid."""
    y, x = (c[points] for c in layout.cells())
    worst = 0.0
    for i in range(1, layout.rows + 1):
        for j in range(1, layout.cols + 1):
            share = float(((y < i) & (x < j)).mean())
            worst = max(worst, abs(share - i * j / (layout.rows * layout.cols)))
    return worst


@pytest.mark.parametrize("rows, cols", [(8, 8), (12, 20)])
def test_every_prefix_is_spread_evenly(rows, cols):
    """At nearly every cut the low-discrepancy order beats the average random order, and by far."""
    layout = FrameLayout(rows=rows, cols=cols)
    content = layout.content_offsets()
    ordered = content[np.argsort(low_discrepancy(layout)[content], kind="stable")]
    rng = np.random.default_rng(0)
    cuts = range(4, layout.content, max(1, layout.content // 24))
    ours = [discrepancy(ordered[:k], layout) for k in cuts]
    chance = [
        np.mean([discrepancy(rng.permutation(content)[:k], layout) for _ in range(8)]) for k in cuts
    ]
    assert np.mean(ours) < 0.6 * np.mean(chance)
    assert sum(a < b for a, b in zip(ours, chance, strict=True)) >= 0.95 * len(ours)


@pytest.mark.parametrize("order", ["visible", "spatial"])
def test_content_is_kept_in_the_low_discrepancy_order(order):
    rank = rank_tokens(span(), order=order)
    content = LAYOUT.content_offsets()
    value = low_discrepancy(LAYOUT)
    by_rank = content[np.argsort(rank[content])]
    assert (np.diff(value[by_rank]) >= 0).all()


def test_low_discrepancy_is_the_r2_lattice_at_cell_centres():
    g = 1.32471795724474602596
    assert abs(g**3 - g - 1) < 1e-12
    value = low_discrepancy(FrameLayout(rows=2, cols=2))
    assert value[:3].tolist() == [-1, -1, -1]
    assert value[3] == pytest.approx((0.5 / g + 0.5 / g**2) % 1)
    assert value[7] == pytest.approx((1.5 / g + 1.5 / g**2) % 1)


def test_a_random_order_depends_on_seed_and_frame_alone():
    def rank(seed=0, number=1, **arrays):
        return rank_tokens(span(number=number, **arrays), order="random", seed=seed).tolist()

    hidden = np.zeros(LAYOUT.tokens, dtype=bool)
    assert rank() == rank() == rank(visible=hidden)
    assert rank() != rank(seed=1)
    assert rank() != rank(number=2)
    assert len({tuple(rank(seed=s, number=f)) for s in range(5) for f in range(5)}) == 25


# --- scored orders ------------------------------------------------------------------------------


def scores_of(one: Span, seed: int = 0, levels: int = 10**6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, levels, one.tokens) / levels


@given(spans(), st.sampled_from(SCORED), st.booleans(), st.integers(0, 99), st.integers(1, 4))
def test_scored_orders_are_permutations_and_nest(one, order, last, seed, levels):
    """Few levels: many ties."""
    scores = scores_of(one, seed, levels)
    rank = rank_tokens(one, order=order, remasked_last=last, scores=scores)
    assert rank.dtype == np.int32
    assert sorted(rank.tolist()) == list(range(one.tokens))


@given(spans(), st.sampled_from(SCORED), st.integers(0, 99))
def test_the_highest_score_is_kept_longest(one, order, seed):
    """Re-masked or not, content or new line; border tokens are where they always are."""
    scores, border = scores_of(one, seed), one.layout.kinds() == Kind.BORDER
    first = kept_first(rank_tokens(one, order=order, scores=scores))
    last = kept_first(rank_tokens(one, order=order, borders="last", scores=scores))
    borders = int(border.sum())
    assert border[first[:borders]].all() and border[last[one.tokens - borders :]].all()
    assert (np.diff(scores[first[borders:]]) <= 0).all()
    assert (first[borders:] == last[: one.tokens - borders]).all()


@given(spans(), st.sampled_from(SCORED), st.integers(0, 99))
def test_scores_only_order_what_remasked_last_leaves_them(one, order, seed):
    scores = scores_of(one, seed)
    offsets = kept_first(rank_tokens(one, order=order, remasked_last=True, scores=scores))
    shown = one.visible_mask()[offsets].tolist()
    assert shown == sorted(shown, reverse=True)


@pytest.mark.parametrize("order", SCORED)
def test_equal_scores_are_spread_evenly(order):
    equal = rank_tokens(span(), order=order, scores=np.zeros(LAYOUT.tokens))
    inside = [i for i in kept_first(equal) if LAYOUT.kinds()[i] != Kind.BORDER]
    assert (np.diff(low_discrepancy(LAYOUT)[inside]) >= 0).all()


def test_which_orders_go_by_scores():
    assert [asked(order) for order in ORDERS] == [None] * 4
    assert [asked(order) for order in SCORED] == SCORED


@pytest.mark.parametrize(
    "order, scores, words",
    [
        ("expected", None, "order 'expected' goes by scores, and none were given: use 'visible'"),
        ("visible", np.zeros(76), "order 'visible' goes by no scores, and some were given"),
        ("observed", np.zeros(75), r"scores have shape \(75,\), expected \(76,\): one a token"),
    ],
)
def test_scores_are_given_where_they_are_asked_for(order, scores, words):
    with pytest.raises(InvalidSetting, match=words):
        rank_tokens(span(), order=order, scores=scores)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"order": "best"}, "order is 'best', expected one of visible, spatial, novelty, random"),
        ({"borders": "never"}, "borders is 'never', expected first or last"),
    ],
)
def test_unknown_settings(settings, words):
    with pytest.raises(InvalidSetting, match=words):
        rank_tokens(span(), **settings)


def test_text_has_no_order():
    with pytest.raises(InvalidSetting, match="text has no order of tokens: it is an anchor"):
        rank_tokens(Span.text(3))
