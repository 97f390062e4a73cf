"""WHICH tokens stay: promises that hold for every policy on any timeline, without a tensor."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from packcache import policies
from packcache.errors import InputFileError, InvalidSetting
from packcache.policies import (
    CALIBRATION,
    POLICIES,
    DeepForcing,
    FadeMem,
    FullCache,
    NoHistory,
    PackCache,
    Policy,
    RandomDrop,
    SinkWindow,
    SlidingWindow,
    UniformHistory,
    parse_policies,
    parse_policy,
)
from packcache.timeline import FrameLayout, Role, Span, Timeline
from tests.tools import LAYOUT, commit, counts, grow, ranked

# --- any policy, any timeline -------------------------------------------------------------------

budgets = st.one_of(
    st.none(),
    st.floats(0.2, 4).map(lambda x: round(x, 2)),
    st.integers(1, 200).map(lambda n: f"{n}tok"),
)
windows = st.one_of(st.none(), st.integers(1, 6))
orders = st.sampled_from(["visible", "spatial", "novelty", "random", "expected", "observed"])
borders = st.sampled_from(["first", "last"])


@st.composite
def packs(draw, make=PackCache):
    settings_ = {
        "budget": draw(budgets),
        "window": draw(windows),
        "order": draw(orders),
        "borders": draw(borders),
        "half_life": draw(st.sampled_from([0.3, 0.5, 1.0, 2.0, 5.0])),
        "n_sinks": draw(st.integers(0, 3)),
        "min_share": draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0])),
        "fill": draw(st.sampled_from(["budget", "budget", "window"])),
        "redistribute": draw(st.booleans()),
        "drop_remasked": draw(st.booleans()),
        "image_share": draw(st.sampled_from([1.0, 1.0, 0.5, 0.01])),
    }
    if make is RandomDrop:
        settings_["seed"] = draw(st.integers(0, 99))
    try:
        return make(**settings_)
    except InvalidSetting:  # a combination that is refused by name, tested below
        return make(**{**settings_, "fill": "budget", "redistribute": True})


@st.composite
def deeps(draw):
    frames = draw(st.integers(2, 7))
    recent = draw(st.integers(0, frames - frames // 2))
    more = draw(st.integers(0, 3))
    candidates = draw(st.sampled_from([None, max(1, frames - frames // 2 - recent) + more]))
    return DeepForcing(frames=frames, recent=recent, candidates=candidates)


@st.composite
def fades(draw):
    return FadeMem(
        budget=draw(budgets),
        window=draw(windows),
        order=draw(orders),
        borders=draw(borders),
        beta=draw(st.sampled_from([0.1, 0.3, 0.5, 1.0])),
        sinks=draw(st.integers(0, 2)),
    )


presets = st.sampled_from([PackCache.paper(), PackCache.paper_literal(), PackCache.paper_visible()])

#: How to draw one of each kind.
KINDS = {
    FullCache: st.just(FullCache()),
    NoHistory: st.just(NoHistory()),
    SlidingWindow: st.integers(1, 4).map(lambda n: SlidingWindow(frames=n)),
    SinkWindow: st.builds(SinkWindow, frames=st.integers(1, 4), sinks=st.integers(0, 3)),
    UniformHistory: st.builds(
        UniformHistory, budget=budgets, window=windows, order=orders, borders=borders
    ),
    PackCache: st.one_of(presets, packs()),
    RandomDrop: packs(RandomDrop),
    FadeMem: fades(),
    DeepForcing: deeps(),
}
any_policy = st.one_of(*KINDS.values())


@settings(max_examples=20)
@given(st.data())
def test_policies_of_every_kind_are_drawn(data):
    """A new policy is one dataclass and one row here (CONTRIBUTING)."""
    assert set(KINDS) == set(POLICIES.values())
    for kind, drawn in KINDS.items():
        assert type(data.draw(drawn)) is kind


@dataclasses.dataclass
class Clip:
    """A random clip: text, maybe an image, then chunks of one or more frames per commit."""

    text: int
    layout: FrameLayout
    chunks: list[list[Span]]


@st.composite
def clips(draw, most=14):
    layout = FrameLayout(
        rows=draw(st.integers(1, 4)),
        cols=draw(st.integers(1, 5)),
        header=draw(st.integers(0, 3)),
        footer=draw(st.integers(0, 1)),
        new_line=draw(st.booleans()),
    )
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    share = draw(st.sampled_from([1.0, 0.7, 0.3]))
    visible = rng.random(layout.tokens) < share  # one pattern for all frames, as in Lumos-1
    image = draw(st.booleans())
    chunks, frame = [], 0
    while frame < draw(st.integers(1, most)):
        size = draw(st.sampled_from([1, 1, 1, 2, 3]))
        chunks.append([])
        for number in range(frame, frame + size):
            ids = rng.integers(0, 5, layout.tokens).astype(np.int32)
            given_ = image and number == 0
            chunks[-1].append(
                Span.of_frame(
                    Role.IMAGE if given_ else Role.HISTORY,
                    number,
                    layout,
                    visible=None if given_ else visible,
                    ids=ids,
                )
            )
        frame += size
    return Clip(draw(st.integers(1, 6)), layout, chunks)


def held_of(timeline: Timeline) -> dict[tuple[Role, int], frozenset[int]]:
    """{(role, frame): offsets held}."""
    return {(e.span.role, e.span.frame): frozenset(e.held.tolist()) for e in timeline.entries}


def broken_promises(policy: Policy, timeline: Timeline, before: dict, budget: int | None) -> list:
    """What a commit broke, by name: nested, anchors, sinks, window, budget."""
    now, broken = held_of(timeline), []
    if any(not held <= before[key] for key, held in now.items() if key in before):
        broken.append("nested")
    if any(key[1] in {f for _, f in before} and key not in before for key in now):
        broken.append("nested")
    image_share = getattr(policy, "image_share", 1.0)
    for entry in timeline.anchors:
        whole = entry.span.tokens
        if entry.span.role is Role.IMAGE:
            whole = int(np.ceil(image_share * whole))
        if entry.count != whole:
            broken.append("anchors")
    sinks = [e for e in timeline.history if policy.is_sink(timeline, e)]
    rest = [e for e in timeline.history if not policy.is_sink(timeline, e)]
    if len(sinks) != min(policy.num_sinks, timeline.num_frames - timeline.first_history):
        broken.append("sinks")
    if any(e.count != e.span.tokens for e in sinks):
        broken.append("sinks")
    if policy.reach is not None and any(timeline.distance(e) > policy.reach for e in rest):
        broken.append("window")
    held = sum(e.count for e in rest)
    if budget is not None and getattr(policy, "fill", "budget") == "budget" and held > budget:
        broken.append("budget")
    if timeline.history:
        bound = policy.max_history(timeline.history[0].span.tokens, budget)
        if bound is not None and held + sum(e.count for e in sinks) > bound:
            broken.append("max_history")
    return broken


def played(policy: Policy, clip: Clip):
    """The clip commit by commit: what each broke."""
    visible = clip.chunks[-1][-1].visible_mask().sum()
    try:
        budget = policy.budget_for(clip.layout.tokens, int(visible), 8)
    except InvalidSetting:
        assume(False)
    timeline, broken = Timeline(), []
    commit(timeline, policy, Span.text(clip.text), budget=budget)
    for chunk in clip.chunks:
        before = held_of(timeline)
        for span in chunk:
            frames = [e.span for e in timeline.entries if e.span.layout is not None]
            timeline.append(span, ranked(policy, span, frames[-1] if frames else None))
        slots = policy.plan(timeline, budget)
        if sorted(set(slots)) != slots or not set(slots) <= set(range(timeline.physical_length)):
            broken.append("slots")
        timeline.keep(slots)
        broken += broken_promises(policy, timeline, before, budget)
    return timeline, broken


@settings(max_examples=2000)
@given(any_policy, clips())
def test_every_policy_keeps_its_promises(policy, clip):
    """Nested kept sets, whole anchors and sinks, nothing beyond the window, inside the budget."""
    _, broken = played(policy, clip)
    assert broken == []


@settings(max_examples=200)
@given(clips())
def test_full_and_unlimited_keep_everything(clip):
    full = FullCache()
    same = PackCache(budget=None, window=None, n_sinks=1)
    also = UniformHistory(budget=None, window=None)
    for policy in (full, same, also):
        timeline, broken = played(policy, clip)
        assert broken == []
        assert timeline.physical_length == timeline.logical_length
        assert timeline.evicted_tokens == 0


@settings(max_examples=300)
@given(packs(), clips(most=8))
def test_nothing_leaves_while_the_budget_and_the_window_hold_it(policy, clip):
    """fill="budget": the first eviction is forced, by the budget or by the window."""
    policy = dataclasses.replace(policy, fill="budget", drop_remasked=False, image_share=1.0)
    try:
        budget = policy.budget_for(clip.layout.tokens)
    except InvalidSetting:
        assume(False)
    timeline = Timeline()
    commit(timeline, policy, Span.text(clip.text), budget=budget)
    for chunk in clip.chunks:
        for span in chunk:
            timeline.append(span, ranked(policy, span, None))
        rest = [e for e in timeline.history if not policy.is_sink(timeline, e)]
        fits = budget is None or sum(e.count for e in rest) <= budget
        inside = policy.window is None or all(timeline.distance(e) <= policy.window for e in rest)
        slots = policy.plan(timeline, budget)
        if timeline.evicted_tokens == 0:
            assert (len(slots) == timeline.physical_length) == (fits and inside)
        timeline.keep(slots)


@settings(max_examples=300)
@given(packs(), clips())
def test_dropped_remasked_tokens_are_gone_at_commit(policy, clip):
    policy = dataclasses.replace(policy, drop_remasked=True)
    timeline, broken = played(policy, clip)
    assert broken == []
    for entry in timeline.history:
        if not policy.is_sink(timeline, entry):
            assert entry.span.visible_mask()[entry.held].all()


def test_the_budget_is_used_up_once_the_window_is_full():
    for policy in (PackCache(), PackCache(budget=2.5, window=6), UniformHistory()):
        *_, timeline = grow(policy, 12)
        assert sum(counts(timeline)) == int(policy.budget * LAYOUT.tokens)


# --- each policy --------------------------------------------------------------------------------


def test_what_each_policy_keeps():
    """Newest first, after ten frames of 76 tokens."""
    kept = {
        FullCache(): [76] * 10,
        NoHistory(): [],
        SlidingWindow(): [76],
        SlidingWindow(frames=3): [76] * 3,
        SinkWindow(): [76] * 4,
        SinkWindow(sinks=0, frames=2): [76] * 2,
        UniformHistory(): [19] * 4,
        PackCache(): [38, 19, 10, 9],
        PackCache(n_sinks=2): [38, 19, 10, 9, 76, 76],
        PackCache(min_share=0.2): [28, 16, 16, 16],
        PackCache(window=None): [37, 18, 9, 5, 2, 1, 1, 1, 1, 1],
        RandomDrop(): [38, 19, 10, 9],
        PackCache.paper_literal(): [38, 19, 10, 9],
        FadeMem(): [19, 12, 9, 7, 6, 5, 5, 5, 4, 4],
        FadeMem(window=4): [31, 19, 14, 12],
        FadeMem(beta=1.0, window=4, sinks=1): [19, 19, 19, 19, 76],
        DeepForcing(): [76, 38, 38, 76, 76],
        DeepForcing(frames=3): [76, 38, 38, 76],
        DeepForcing(frames=2): [76, 76],
        DeepForcing(frames=2, recent=0, candidates=4): [19, 19, 19, 19, 76],
    }
    for policy, want in kept.items():
        *_, timeline = grow(policy, 10)
        assert counts(timeline) == want, policy


def test_the_condition_image_is_an_anchor_or_a_share_of_one():
    for share, tokens in ((1.0, 76), (0.5, 38), (0.001, 1)):
        for make in (PackCache, RandomDrop):
            *_, timeline = grow(make(image_share=share), 4, image=True)
            assert timeline.anchors[1].count == tokens
            assert sum(counts(timeline)) == 76


def test_visible_frames_share_the_budget_of_three():
    """paper_visible: re-masked tokens leave at once, three such frames are the budget."""
    visible = np.zeros(LAYOUT.tokens, dtype=bool)
    visible[::3] = True  # 26 tokens
    policy, timeline = PackCache.paper_visible(), Timeline()
    for frame in range(6):
        commit(timeline, policy, Span.of_frame(Role.HISTORY, frame, LAYOUT, visible=visible))
    assert policy.budget_for(76, 26) == 78
    assert counts(timeline) == [26, 26, 13, 13]


@pytest.mark.parametrize("drop, whole", [(False, 76), (True, 26)])
def test_filling_the_window_counts_what_a_frame_stores(drop, whole):
    """fill="window" keeps frames whole, or all their visible tokens, until there are W of them."""
    visible = np.zeros(LAYOUT.tokens, dtype=bool)
    visible[::3] = True
    policy = PackCache(fill="window", drop_remasked=drop, budget=1)
    timeline, seen = Timeline(), []
    for frame in range(5):
        commit(timeline, policy, Span.of_frame(Role.HISTORY, frame, LAYOUT, visible=visible))
        seen.append(counts(timeline))
    assert seen[:3] == [[whole], [whole] * 2, [whole] * 3]
    assert [sum(k) for k in seen[3:]] == [whole, whole]


def test_random_drop_keeps_the_counts_of_packcache_and_other_tokens():
    (*_, ours), (*_, chance) = grow(PackCache(), 8), grow(RandomDrop(), 8)
    assert counts(ours) == counts(chance)
    assert held_of(ours) != held_of(chance)
    (*_, other) = grow(RandomDrop(seed=1), 8)
    assert held_of(chance) != held_of(other)


def test_sinks_count_from_the_first_history_frame():
    """In image-to-video the condition image is no sink."""
    *_, timeline = grow(SinkWindow(sinks=1, frames=1), 5, image=True)
    assert list(timeline.counts()) == [1, 4]
    *_, timeline = grow(SinkWindow(sinks=1, frames=1), 5)
    assert list(timeline.counts()) == [0, 4]


def test_several_frames_in_one_commit_are_packed_by_latent_distance():
    """DESIGN 2: a commit holds 1..n latent frames, d counts latent frames."""
    one, three, policy = Timeline(), Timeline(), PackCache()
    frames = [Span.of_frame(Role.HISTORY, f, LAYOUT) for f in range(6)]
    for frame in frames:
        commit(one, policy, frame)
    commit(three, policy, *frames[:3])
    commit(three, policy, *frames[3:])
    assert counts(one) == counts(three) == [38, 19, 10, 9]


def test_a_dropped_anchor_is_noticed():
    """Mutation: the check of this file sees a policy that loses one token of the image."""

    class LosesAnAnchor(PackCache):
        def plan(self, timeline, budget=None):
            image = [w.start for e, w in timeline.slots() if e.span.role is Role.IMAGE]
            return [s for s in super().plan(timeline, budget) if s not in image]

    timeline = Timeline()
    commit(timeline, LosesAnAnchor(), Span.of_frame(Role.IMAGE, 0, LAYOUT))
    assert broken_promises(PackCache(), timeline, {}, 76) == ["anchors"]


def test_an_order_that_changes_is_noticed():
    """Mutation: an order redrawn at each commit breaks nesting of what was promised before."""
    timeline = Timeline()
    policy = PackCache()
    commit(timeline, policy, Span.of_frame(Role.HISTORY, 0, LAYOUT))
    commit(timeline, policy, Span.of_frame(Role.HISTORY, 1, LAYOUT))
    before = {(Role.HISTORY, 0): frozenset({75}), (Role.HISTORY, 1): frozenset(range(76))}
    assert "nested" in broken_promises(policy, timeline, before, 76)


# --- what a policy is ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [PackCache(), FullCache(), SlidingWindow()], ids=repr)
def test_policies_are_immutable_and_compare_by_value(policy):
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.budget = 2
    assert policy == type(policy)() and hash(policy) == hash(type(policy)())


def test_settings_are_named_not_numbered():
    with pytest.raises(TypeError):
        PackCache(1)  # type: ignore[misc]


@settings(max_examples=200)
@given(any_policy)
def test_repr_reads_back(policy):
    assert eval(repr(policy), vars(policies)) == policy


@pytest.mark.parametrize(
    "policy, text",
    [
        (PackCache(), "PackCache(budget=1, window=4)"),
        (PackCache(budget="512MiB", n_sinks=1), "PackCache(budget='512MiB', window=4, n_sinks=1)"),
        (PackCache.paper_literal(), "PackCache(budget=1, window=4, redistribute=False)"),
        (SinkWindow(), "SinkWindow(frames=3)"),
        (FullCache(), "FullCache()"),
    ],
)
def test_repr_says_what_differs(policy, text):
    assert repr(policy) == text


def test_presets():
    """DESIGN 4.2."""
    assert PackCache.paper() == PackCache() == PackCache(budget=1, window=4, half_life=1.0)
    assert PackCache.paper_literal() == PackCache(redistribute=False)
    assert PackCache.paper_visible() == PackCache(budget=3, drop_remasked=True)


#: Every reading of the paper by its spelling (methods 1.3-1.6); rebase "trained" and "slide" are
#: arguments of a cache, not of a policy.
READINGS = {
    "packcache": PackCache.paper(),
    "packcache:redistribute=false": PackCache.paper_literal(),
    "packcache:budget=3,drop_remasked=true": PackCache.paper_visible(),
    "packcache:fill=budget": PackCache(fill="budget"),
    "packcache:fill=window": PackCache(fill="window"),
}


@pytest.mark.parametrize("text", READINGS)
def test_every_reading_of_the_paper_has_a_spelling(text):
    assert parse_policy(text) == READINGS[text]


# --- asking for scores --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [PackCache, UniformHistory, RandomDrop, FadeMem])
def test_a_policy_asks_for_what_its_order_goes_by(make):
    for order in ("visible", "spatial", "novelty", "random"):
        assert make(order=order).asks is None
    for order in ("expected", "observed"):
        assert make(order=order).asks == order
    assert FullCache().asks is NoHistory().asks is SinkWindow().asks is None
    assert DeepForcing().asks == "observed"


def test_scores_decide_which_tokens_stay_and_not_how_many():
    (*_, plain), (*_, scored) = grow(PackCache(), 8), grow(PackCache(order="expected"), 8)
    assert counts(plain) == counts(scored)
    assert held_of(plain) != held_of(scored)
    for entry in scored.history:
        scores = np.random.default_rng(entry.span.frame).random(76)
        borders = {0, 1, 2, 75}
        best = [i for i in np.argsort(-scores).tolist() if i not in borders]
        assert set(entry.held.tolist()) == borders | set(best[: entry.count - 4])


def test_anchors_need_no_scores():
    for policy in (PackCache(order="expected"), DeepForcing(), FadeMem(order="observed")):
        assert policy.rank(Span.of_frame(Role.IMAGE, 0, LAYOUT), None) is None
        with pytest.raises(InvalidSetting, match="goes by scores, and none were given"):
            policy.rank(Span.of_frame(Role.HISTORY, 0, LAYOUT), None)


# --- calibrated settings ------------------------------------------------------------------------


def calibration(folder, **told):
    path = folder / "calibration.json"
    whole = {"schema": CALIBRATION, "settings": {}, **told}
    path.write_text(json.dumps({k: v for k, v in whole.items() if v is not None}))
    return path


@pytest.mark.parametrize(
    "settings_, policy",
    [
        ({}, PackCache()),
        (
            {"budget": 1, "window": 4, "half_life": 1.5, "min_share": 0.1, "order": "novelty"},
            PackCache(half_life=1.5, min_share=0.1, order="novelty"),
        ),
        ({"budget": "512MiB", "window": None}, PackCache(budget="512MiB", window=None)),
        ({"drop_remasked": True, "budget": 3}, PackCache.paper_visible()),
    ],
)
def test_a_calibration_file_is_a_policy(tmp_path, settings_, policy):
    path = calibration(tmp_path, settings=settings_, made="by packcache calibrate")
    assert PackCache.from_file(path) == PackCache.from_file(str(path)) == policy
    assert type(RandomDrop.from_file(path)) is RandomDrop


@settings(max_examples=100)
@given(packs())
def test_settings_come_back_from_a_file(tmp_path_factory, policy):
    folder = tmp_path_factory.mktemp("calibration")
    assert PackCache.from_file(calibration(folder, settings=policy.settings())) == policy


@pytest.mark.parametrize(
    "told, words",
    [
        ({"schema": "packcache.bench/1"}, "has schema 'packcache.bench/1', expected 'packcache.ca"),
        ({"schema": None}, "has schema None, expected 'packcache.calibration/1': give a file that"),
        ({"settings": None}, "has settings None, expected them by name"),
        ({"settings": [1]}, r"has settings [1], expected them by name"),
        (
            {"settings": {"halflife": 1}},
            "sets 'halflife', expected settings of PackCache: budget, ",
        ),
        ({"settings": {"budget": [1]}}, "sets budget to [1], expected one plain value"),
        ({"settings": {"half_life": "long"}}, "half_life is 'long', expected frames above 0"),
        ({"settings": {"window": 0}}, "window is 0, expected a whole number of at least 1"),
        ({"settings": {"budget": float("nan")}}, "budget is nan, expected latent frames above 0"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused_by_name(tmp_path, told, words):
    path = calibration(tmp_path, **told)
    with pytest.raises(InputFileError) as caught:
        PackCache.from_file(path)
    assert str(caught.value).startswith(str(path)) and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_calibration(tmp_path):
    expected = "expected packcache.calibration/1; give a file that packcache calibrate wrote"
    cases = {
        tmp_path / "none.json": f"does not exist: {expected}",
        tmp_path: "cannot be read (Is a directory): check it",
        tmp_path / "text": f"is not JSON (Expecting value: line 1 column 1 (char 0)): {expected}",
        tmp_path / "bytes": "is not JSON ('utf-8' codec can't decode byte 0xff",
        tmp_path / "list": "has schema None, expected",
    }
    (tmp_path / "text").write_text("budget = 1")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "list").write_text("[]")
    for path, words in cases.items():
        with pytest.raises(InputFileError) as caught:
            PackCache.from_file(path)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_planning_needs_no_torch():
    """The integer rooms are for serving engines too: importing and planning load no torch."""
    code = """
import sys
import packcache.timeline, packcache.budget, packcache.selectors, packcache.policies
from packcache.policies import PackCache
from packcache.timeline import FrameLayout, Role, Span, Timeline
timeline, policy = Timeline(), PackCache()
for frame in range(5):
    span = Span.of_frame(Role.HISTORY, frame, FrameLayout(rows=8, cols=8))
    timeline.append(span, policy.rank(span, None))
    timeline.keep(policy.plan(timeline))
assert timeline.physical_length == 76
assert "torch" not in sys.modules, "torch was imported"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_new_policy_is_a_dataclass_with_counts():
    """The promise of the house: nothing else has to change."""

    @dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
    class EveryOther(Policy):
        def counts(self, frames, distances, budget):
            return [f.count if d % 2 else 0 for f, d in zip(frames, distances, strict=True)]

    *_, timeline = grow(EveryOther(), 3)
    assert timeline.counts() == {2: 76}


# --- parsing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, policy",
    [
        ("full", FullCache()),
        ("none", NoHistory()),
        ("window", SlidingWindow()),
        ("window:frames=2", SlidingWindow(frames=2)),
        ("sink:sinks=2,frames=5", SinkWindow(sinks=2, frames=5)),
        ("uniform:budget=none,window=none", UniformHistory(budget=None, window=None)),
        ("random:seed=7", RandomDrop(seed=7)),
        (" packcache : budget = 1 ".replace(" ", ""), PackCache(budget=1)),
        ("packcache:budget=0.5, window=4", PackCache(budget=0.5)),
        ("packcache:budget=512MiB,fill=window", PackCache(budget="512MiB", fill="window")),
        ("packcache:drop_remasked=true,budget=3", PackCache.paper_visible()),
        ("packcache:redistribute=False", PackCache.paper_literal()),
        ("packcache:order=expected", PackCache(order="expected")),
        ("uniform:order=observed", UniformHistory(order="observed")),
        ("fademem", FadeMem()),
        ("fademem:beta=0.5,budget=2,window=none,sinks=1", FadeMem(beta=0.5, budget=2, sinks=1)),
        ("deepforcing:frames=6,recent=2", DeepForcing(frames=6, recent=2)),
    ],
)
def test_names_and_settings(text, policy):
    assert parse_policy(text) == policy
    assert type(parse_policy(text)) is type(policy)


def test_every_name_has_a_policy():
    for name, make in POLICIES.items():
        assert parse_policy(name) == make()


@pytest.mark.parametrize(
    "text, parsed",
    [
        ("full,packcache", [FullCache(), PackCache()]),
        (
            "packcache:budget=1,window=3,window:frames=2,none",
            [PackCache(window=3), SlidingWindow(frames=2), NoHistory()],
        ),
        ("window,frames=3,full", [SlidingWindow(frames=3), FullCache()]),
        ("full,,none,", [FullCache(), NoHistory()]),
    ],
)
def test_lists_of_policies(text, parsed):
    assert list(parse_policies(text).values()) == parsed


@pytest.mark.parametrize(
    "text, words",
    [
        ("pack", "unknown policy 'pack': known are full, window, sink, uniform, random, packcache"),
        ("", "unknown policy ''"),
        ("full:frames=1", "policy 'full' has no setting 'frames': known are none"),
        ("window:budget=1", "policy 'window' has no setting 'budget': known are frames"),
        ("window:frames", "setting 'frames' of policy 'window' has no value: write frames=..."),
        ("window:frames=0", "frames is 0, expected a whole number of at least 1"),
        ("window:frames=1.5", "frames is 1.5, expected a whole number of at least 1"),
        ("window:frames=true", "frames is True, expected a whole number"),
        ("sink:sinks=-1", "sinks is -1, expected a whole number of at least 0"),
        ("packcache:window=0", "window is 0, expected a whole number of at least 1"),
        ("packcache:budget=0", "budget is 0, expected latent frames above 0"),
        ("packcache:budget=-1", "budget is -1, expected latent frames above 0"),
        ("packcache:budget=nan", "budget is nan, expected latent frames above 0"),
        ("packcache:budget=1MB", "budget is '1MB', expected latent frames"),
        ("packcache:half_life=0", "half_life is 0, expected frames above 0"),
        ("packcache:half_life=soon", "half_life is 'soon', expected frames above 0"),
        ("packcache:half_life=none", "half_life is None, expected frames above 0"),
        ("packcache:half_life=inf", "half_life is inf, expected frames above 0"),
        ("packcache:min_share=2", "min_share is 2, expected 0 to 1 of a frame"),
        ("packcache:image_share=0", "image_share is 0, expected above 0, at most 1"),
        ("packcache:n_sinks=none", "n_sinks is None, expected a whole number of at least 0"),
        ("packcache:fill=slowly", "fill is 'slowly', expected one of budget, window"),
        ("packcache:order=best", "order is 'best', expected one of visible, spatial"),
        ("packcache:borders=no", "borders is 'no', expected one of first, last"),
        ("packcache:redistribute=maybe", "redistribute is 'maybe', expected true or false"),
        ("packcache:drop_remasked=1", "drop_remasked is 1, expected true or false"),
        ("packcache:fill=window,window=none", "need a window, got None"),
        ("packcache:redistribute=false,window=none", "need a window, got None"),
        (
            "packcache:redistribute=false,half_life=2",
            "half_life is 2, expected at most 1 with redistribute=False",
        ),
        ("random:seed=-1", "seed is -1, expected a whole number of at least 0"),
        ("fademem:beta=0", "beta is 0, expected above 0, at most 1"),
        ("fademem:sinks=-1", "sinks is -1, expected a whole number of at least 0"),
        ("fademem:half_life=2", "policy 'fademem' has no setting 'half_life': known are"),
        ("deepforcing:frames=1", "frames is 1, expected a whole number of at least 2"),
        ("deepforcing:recent=3", "recent is 3, expected at most 2 with frames=4, half of which"),
        ("deepforcing:candidates=0", "candidates is 0, expected a whole number of at least 1"),
        (
            "deepforcing:frames=8,candidates=2",
            "candidates is 2, expected a whole number of at least 3",
        ),
    ],
)
def test_errors_name_the_value_and_the_way_out(text, words):
    with pytest.raises(InvalidSetting) as caught:
        parse_policy(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_policies_are_known_by_their_spelling():
    spelled = parse_policies("full, packcache:budget=1,window=3,window:frames=2")
    assert list(spelled) == ["full", "packcache:budget=1,window=3", "window:frames=2"]


def test_a_calibration_file_is_a_spelling(tmp_path):
    """Labels become names of files, so a folder is no part of one."""
    path = calibration(tmp_path, settings={"budget": 2, "window": 3})
    assert parse_policy(f" {path} ") == PackCache(budget=2, window=3)
    assert parse_policy(f"{path}:window=5,fill=window") == PackCache(
        budget=2, window=5, fill="window"
    )
    found = parse_policies(f"full,{path},{path}:window=5,order=spatial")
    assert found == {
        "full": FullCache(),
        "calibration": PackCache(budget=2, window=3),
        "calibration:window=5,order=spatial": PackCache(budget=2, window=5, order="spatial"),
    }


def test_a_file_is_refused_by_name(tmp_path):
    path = calibration(tmp_path, settings={"budget": 2, "borders": "last"})
    other = tmp_path / "other"
    other.mkdir()
    calibration(other)
    with pytest.raises(InputFileError, match=r"does not exist: expected packcache\.calibration"):
        parse_policy("none.json")
    with pytest.raises(InvalidSetting, match="has no setting 'frames': known are budget, window"):
        parse_policy(f"{path}:frames=2")
    with pytest.raises(InvalidSetting, match="two policies are called 'calibration': rename one"):
        parse_policies(f"{path},{other / path.name}")
    for known in (parse_policy, parse_policies):
        with pytest.raises(InvalidSetting, match="is a file, which may change: write its settings"):
            known(str(path), stored=True)


def test_no_policy_at_all():
    with pytest.raises(InvalidSetting, match="no policy in ',': known are full"):
        parse_policies(",")


def test_a_budget_in_bytes_needs_the_cache_to_plan():
    timeline, policy = Timeline(), PackCache(budget="1MiB")
    span = Span.of_frame(Role.HISTORY, 0, LAYOUT)
    timeline.append(span, policy.rank(span, None))
    with pytest.raises(InvalidSetting, match="bytes of a token are unknown"):
        policy.plan(timeline)
    assert len(policy.plan(timeline, 40)) == 40
