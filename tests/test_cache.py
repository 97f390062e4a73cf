"""FrameCache: timeline and stores agree in every branch; memory stays where it is; errors by text.

Keys here say which token they are, so what a store holds can be read off.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from packcache import policies
from packcache.cache import FrameCache, TrainedRangeWarning
from packcache.errors import CacheStateError, InvalidSetting
from packcache.policies import (
    DeepForcing,
    FadeMem,
    FullCache,
    NoHistory,
    PackCache,
    RandomDrop,
    SinkWindow,
    SlidingWindow,
    UniformHistory,
)
from packcache.positions import Rotation, advance_keys, inverse_frequencies
from packcache.selectors import rank_tokens
from packcache.timeline import FrameLayout, HeldFrame, Role, Span, Timeline
from tests.tools import LAYOUT, bits

LAYERS, HEADS, SIZE = 2, 1, 32
TEXT = (13, 3)
FREQ = inverse_frequencies(SIZE, 10000.0).double()

POLICIES = [
    FullCache(),
    NoHistory(),
    SlidingWindow(frames=2),
    SinkWindow(),
    UniformHistory(),
    PackCache(),
    PackCache(n_sinks=1, window=2),
    PackCache(fill="window"),
    PackCache.paper_literal(),
    PackCache.paper_visible(),
    RandomDrop(image_share=0.5),
    PackCache(order="expected", image_share=0.5),
    UniformHistory(order="observed"),
    FadeMem(sinks=1),
    DeepForcing(),
]


def test_every_policy_has_a_row():
    assert {type(policy) for policy in POLICIES} == set(policies.POLICIES.values())


def cache(policy=None, text=TEXT, **settings) -> FrameCache:
    settings = {"positions": "absolute", "layout": LAYOUT, **settings}
    return FrameCache(
        policy or PackCache(),
        layers=LAYERS,
        kv_heads=HEADS,
        head_dim=SIZE,
        text=text,
        **settings,
    )


def shown(target: FrameCache, layer: int, keys, values, branch: int) -> None:
    """Write a layer's K and V, and show its queries to a cache that asks, as an attention does."""
    seen = target.update(layer, keys, values, branch)
    if target.asks:
        target.observe(layer, keys.sin(), *seen, branch)


def forward(target: FrameCache, mark: float = 0.0) -> None:
    """Write K/V of the open spans: each branch's own logical index, plus `mark`, plus the layer."""
    for branch, length in enumerate(target.text):
        first = target.logical_length
        first -= (target.text[0] - length) if first else 0
        draft = target.stores[branch].draft
        index = torch.arange(first, first + draft, dtype=torch.float64) + mark
        for layer in range(LAYERS):
            keys = (index + layer * 10**6)[None, :, None].expand(HEADS, draft, SIZE)
            keys = keys.to(target.stores[branch].dtype)
            shown(target, layer, keys, -keys, branch)


def step(target: FrameCache, *spans: Span, visible=None) -> None:
    target.open(*spans)
    forward(target, mark=0.5)  # a draft
    target.rollback()
    forward(target)
    target.commit(visible=visible)


def frame(number: int, role: Role = Role.HISTORY, **arrays) -> Span:
    return Span.of_frame(role, number, LAYOUT, **arrays)


def started(policy=None, frames: int = 0, image: bool = False, **settings) -> FrameCache:
    out = cache(policy, **settings)
    step(out, Span.text(out.text[0]))
    for number in range(frames):
        step(out, frame(number, Role.IMAGE if image and number == 0 else Role.HISTORY))
    return out


def held(target: FrameCache, branch: int) -> list[int]:
    """Logical indices (of that branch) that its store holds."""
    store = target.stores[branch]
    rows = [keys[0, :, 0] - layer * 10**6 for layer, (keys, _) in enumerate(store)]
    assert all(torch.equal(row, rows[0]) for row in rows)
    assert all(torch.equal(k, -v) for k, v in store)
    return rows[0].tolist()


def expected(target: FrameCache, branch: int) -> list[int]:
    """The same, from the timeline: after the text a branch counts its own prefix."""
    tokens = [e.start + int(i) for e in target.timeline.entries for i in e.held]
    less = target.text[0] - target.text[branch]
    return [*range(target.text[branch]), *(t - less for t in tokens if t >= target.text[0])]


# --- timeline and stores agree ------------------------------------------------------------------


@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
@pytest.mark.parametrize("text", [(13,), (13, 3), (13, 3, 7)], ids=["1", "2", "3"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_every_branch_holds_the_kept_set(policy, text, image):
    """One, two, three branches: the same tokens of everything after the text (DESIGN 4.6)."""
    visible = np.zeros(LAYOUT.tokens, dtype=bool)
    visible[::3] = True
    target = cache(policy, text, dtype=torch.float64)
    step(target, Span.text(text[0]))
    for number in range(7):
        given = image and number == 0
        role = Role.IMAGE if given else Role.HISTORY
        step(target, frame(number, role), visible=None if given else visible)
        for branch in range(len(text)):
            assert held(target, branch) == expected(target, branch)
    assert target.physical_length == target.stores[0].length
    assert target.logical_length == text[0] + 7 * 76


def test_chunks_of_frames_are_committed_together():
    """A commit holds 1..n latent frames; what stays is what single commits would leave."""
    single, chunks = started(frames=7), started()
    step(chunks, frame(0), frame(1), frame(2))
    step(chunks, frame(3), frame(4))
    step(chunks, frame(5), frame(6))
    assert chunks.timeline.counts() == single.timeline.counts() == {3: 9, 4: 10, 5: 19, 6: 38}
    for branch in (0, 1):
        assert held(chunks, branch) == expected(chunks, branch)


def test_a_chunk_gives_each_frame_its_own_ids_and_mask():
    """Several open spans carry visible and ids themselves; novelty compares neighbours inside."""
    rng = np.random.default_rng(0)
    spans = [
        frame(i, ids=rng.integers(0, 2, 76).astype(np.int32), visible=rng.random(76) < 0.5)
        for i in range(4)
    ]
    target = started(PackCache(order="novelty"))
    step(target, *spans[:1])
    step(target, *spans[1:])
    for entry in target.timeline.history:
        number = entry.span.frame
        before = spans[number - 1] if number else None
        assert (entry.rank == rank_tokens(spans[number], before, order="novelty")).all()


def test_text_and_image_may_open_together():
    target = cache()
    step(target, Span.text(13), frame(0, Role.IMAGE))
    assert target.physical_length == 13 + 76
    assert [held(target, b) == expected(target, b) for b in (0, 1)] == [True, True]


def test_a_model_without_text_has_an_empty_prefix():
    target = cache(text=(0,), dtype=torch.float64)
    for number in range(6):
        step(target, frame(number))
    assert held(target, 0) == expected(target, 0)


# --- drafts and commits -------------------------------------------------------------------------


def committed_bytes(target: FrameCache) -> bytes:
    return b"".join(bits(x) for store in target.stores for pair in store for x in pair)


def test_a_draft_leaves_no_trace():
    """Bytes of committed slots, lengths, counts and rebase are what they were (DESIGN 7)."""
    target = started(PackCache(), frames=6)
    before = committed_bytes(target), target.summary()
    target.open(frame(6))
    for mark in (7.0, 8.0):
        forward(target, mark)
        assert committed_bytes(target) == before[0]
        target.rollback()
    after = target.summary()
    assert {k: v for k, v in after.items() if k != "capacity_bytes"} == {
        k: v for k, v in before[1].items() if k != "capacity_bytes"
    }
    forward(target)
    target.commit()
    assert held(target, 1) == expected(target, 1)


@pytest.mark.parametrize("branch", [0, 1])
def test_a_commit_needs_every_layer_and_branch_since_the_last_rollback(branch):
    target = started(frames=2)
    before = committed_bytes(target)
    target.open(frame(2))
    forward(target)
    target.rollback()
    keys = torch.zeros(HEADS, 76, SIZE)
    for layer in range(LAYERS):
        target.update(layer, keys, keys, branch)
    with pytest.raises(
        CacheStateError, match="commit of latent frame 2 without a forward of every"
    ):
        target.commit()
    assert committed_bytes(target) == before and target.timeline.num_frames == 2
    forward(target)
    target.commit()


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda c: c.commit(), r"commit without an open frame: call open\(span\) first"),
        (
            lambda c: c.update(0, torch.zeros(1, 76, 32), torch.zeros(1, 76, 32)),
            r"update without an open frame: call open\(span\) first",
        ),
        (lambda c: c.open(), r"open\(\) needs at least one span"),
        (lambda c: c.open(frame(1)), "latent frame 1 was opened, expected frame 0"),
        (lambda c: c.open(frame(0), frame(0)), "latent frame 0 was opened, expected frame 1"),
        (
            lambda c: c.open(Span.text(13)),
            "text was opened after 13 tokens, expected a text prefix",
        ),
    ],
)
def test_wrong_order_is_refused_and_changes_nothing(act, words):
    target = started()
    before = target.summary()
    with pytest.raises(CacheStateError, match=words):
        act(target)
    assert target.summary() == before
    step(target, frame(0))


def test_a_frame_before_the_text_is_refused():
    """Without its prefix the branches could not tell which slots are whose."""
    with pytest.raises(CacheStateError, match="latent frame 0 was opened after 0 tokens, expected"):
        cache().open(frame(0))


def test_two_frames_cannot_be_open():
    target = started()
    target.open(frame(0))
    with pytest.raises(CacheStateError, match="latent frame 0 is still open: commit it first"):
        target.open(frame(1))
    text = cache()
    text.open(Span.text(13))
    with pytest.raises(CacheStateError, match="text is still open: commit it first"):
        text.open(Span.text(13))


def test_text_of_another_length_is_refused_before_anything_is_written():
    target = cache()
    with pytest.raises(InvalidSetting, match="text has 12 tokens, expected 13"):
        target.open(Span.text(12))
    step(target, Span.text(13))


@pytest.mark.parametrize("name", ["visible", "ids"])
def test_a_commit_that_fails_can_be_repeated(name):
    """What the commit is told is checked before the draft becomes history."""
    target = started()
    target.open(frame(0))
    forward(target)
    with pytest.raises(InvalidSetting, match=rf"{name} has shape \(5,\), expected \(76,\)"):
        target.commit(**{name: np.zeros(5, dtype=bool)})
    target.commit(**{name: np.zeros(76, dtype=bool)})
    assert target.physical_length == target.stores[0].length == 13 + 76


def test_an_order_without_its_ids_fails_before_anything_is_written():
    target = started(PackCache(order="novelty"))
    target.open(frame(0))
    forward(target)
    with pytest.raises(InvalidSetting, match="'novelty' compares token ids"):
        target.commit()
    target.commit(ids=np.zeros(76, dtype=np.int32))
    assert held(target, 0) == expected(target, 0)


def test_wrong_shapes_and_dtypes_are_named():
    target = started()
    target.open(frame(0))
    for keys in (torch.zeros(HEADS, 75, SIZE), torch.zeros(HEADS, 76, SIZE).bfloat16()):
        with pytest.raises(CacheStateError, match="expected"):
            target.update(0, keys, keys)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"positions": "relative"}, "positions is 'relative', expected absolute or rebase"),
        ({"rebase": "often"}, "rebase is 'often', expected trained or slide"),
        ({"positions": "rebase"}, "positions='rebase' must know the rotary pairs that carry time"),
        ({"policy": PackCache(budget="3tok")}, "budget 3tok is 3 tokens for a window of 4"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(InvalidSetting, match=words):
        cache(**settings)


# --- memory -------------------------------------------------------------------------------------


def pointers(target: FrameCache) -> list[int]:
    return [x.data_ptr() for store in target.stores for pair in store for x in pair]


@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
@pytest.mark.parametrize("policy", [p for p in POLICIES if not isinstance(p, FullCache)], ids=repr)
def test_a_bounded_cache_never_moves_after_its_first_history_frame(policy, image):
    """No reallocation, constant capacity, constant length once the window is full."""
    target = started(policy, frames=1 + image, image=image)
    where, capacity, lengths = pointers(target), target.capacity_bytes, []
    for number in range(1 + image, 20):
        step(target, frame(number))
        assert (pointers(target), target.capacity_bytes) == (where, capacity)
        lengths.append(target.physical_length)
    assert len(set(lengths[8:])) == 1


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_capacity_is_what_is_held_and_the_open_frame(policy):
    """A bounded cache allocates no slot it cannot use (fill="window" uses them while filling)."""
    target = started(policy, frames=1)
    bound = policy.max_history(76, target.budget)
    if bound is not None:
        slots = [store.capacity for store in target.stores]
        assert slots == [length + bound + 76 for length in TEXT]


def test_an_unbounded_cache_grows_seldom():
    target, moves = started(FullCache()), 0
    for number in range(60):
        before = pointers(target)
        step(target, frame(number))
        moves += pointers(target) != before
    assert moves <= 5
    assert held(target, 1) == expected(target, 1)


@pytest.mark.parametrize("policy", [FullCache(), PackCache(budget=9, window=12)], ids=repr)
def test_a_clip_of_known_length_is_reserved_once_and_exactly(policy):
    target = started(policy, frames=1, latent_frames=6)
    where = pointers(target)
    for number in range(1, 6):
        assert [store.capacity for store in target.stores] == [n + 6 * 76 for n in TEXT]
        step(target, frame(number))
    assert pointers(target) == where and target.capacity_bytes == target.kv_bytes
    step(target, frame(6))  # longer than was said: it grows
    assert held(target, 1) == expected(target, 1)


def test_kv_bytes_are_the_storages_of_all_tokens_and_branches():
    target = started(PackCache(), frames=8)
    token = 2 * LAYERS * HEADS * SIZE * 4
    assert target.token_bytes == 2 * token
    assert target.kv_bytes == token * (13 + 76) + token * (3 + 76)
    assert target.capacity_bytes == token * (13 + 76 + 76) + token * (3 + 76 + 76)
    live = sum(x.nbytes for store in target.stores for pair in store for x in pair)
    assert target.kv_bytes == live


def test_kv_bytes_count_pristine_anchor_copies():
    """A quarter of the anchors' keys, in each branch; none where nothing can ever move."""
    settings = {"rotation": Rotation.mm_rope(FREQ.float()), "positions": "rebase"}
    policy = PackCache(n_sinks=1, window=3)
    plain, fixed, moved = (
        started(policy, frames=8, image=True, **extra)
        for extra in ({}, settings, {**settings, "trained_latent_frames": 7})
    )
    assert fixed.kv_bytes == plain.kv_bytes
    anchors = (13 + 76 + 76) + (3 + 76 + 76)
    assert moved.kv_bytes - plain.kv_bytes == anchors * LAYERS * HEADS * SIZE * 4 // 4
    assert moved.capacity_bytes - plain.capacity_bytes == moved.kv_bytes - plain.kv_bytes


def test_a_budget_in_bytes_covers_branches_layers_keys_and_values():
    budget = 40 * (2 * LAYERS * HEADS * SIZE * 4) * 2
    target = cache(PackCache(budget=f"{budget / 1024}KiB"))
    assert target.budget == 40
    assert cache(PackCache(budget=f"{budget / 1024}KiB"), text=(13,)).budget == 80


def test_logical_length_counts_on_while_physical_stands():
    target, seen = started(), []
    for number in range(30):
        step(target, frame(number))
        seen.append((target.logical_length, target.physical_length))
    assert [logical for logical, _ in seen] == [13 + 76 * (n + 1) for n in range(30)]
    assert {physical for _, physical in seen} == {13 + 76}


def test_summary_is_plain_numbers():
    target = started(frames=6)
    assert target.summary() == {
        "policy": "PackCache(budget=1, window=4)",
        "logical_length": 13 + 6 * 76,
        "physical_length": 13 + 76,
        "latent_frames": 6,
        "kept": {2: 9, 3: 10, 4: 19, 5: 38},
        "budget_tokens": 76,
        "kv_bytes": target.kv_bytes,
        "capacity_bytes": target.capacity_bytes,
        "metadata_bytes": target.timeline.metadata_bytes,
        "rebase_frames": 0,
    }


# --- rebase -------------------------------------------------------------------------------------


def noise(target: FrameCache, rng: torch.Generator) -> None:
    for branch, store in enumerate(target.stores):
        for layer in range(LAYERS):
            keys, values = (
                torch.randn(HEADS, store.draft, SIZE, generator=rng, dtype=torch.float64).to(
                    store.dtype
                )
                for _ in range(2)
            )
            shown(target, layer, keys, values, branch)


def played(policy, frames: int, *, image: bool = True, dtype=torch.float64, **settings):
    """A cache of random keys, and what each anchor and sink was committed as, per branch."""
    rng = torch.Generator().manual_seed(0)
    rotation = Rotation.mm_rope(FREQ.to(torch.float32 if dtype == torch.bfloat16 else dtype))
    settings = {"positions": "rebase", "rotation": rotation, "dtype": dtype, **settings}
    target, pristine = cache(policy, **settings), {}
    for number in range(-1, frames):
        role = Role.IMAGE if image and number == 0 else Role.HISTORY
        span = Span.text(13) if number < 0 else frame(number, role)
        target.open(span)
        noise(target, rng)
        anchors = image + 1 + policy.num_sinks
        for branch, store in enumerate(target.stores):
            if number + 1 < anchors:
                keys = store._keys[0][:, : store.length + store.draft].clone()
                pristine[branch] = keys
        target.commit()
    return target, pristine


@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
@pytest.mark.parametrize("rebase", ["trained", "slide"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_anchors_and_sinks_are_advanced_together_in_every_branch(rebase, sinks, image):
    """Every anchor key is its pristine key, delta latent frames later; nothing else is touched."""
    policy = PackCache(window=3, n_sinks=sinks)
    target, pristine = played(policy, 14, image=image, rebase=rebase, trained_latent_frames=7)
    assert target.delta > 0
    wide = Rotation.mm_rope(FREQ)
    for branch, keys in pristine.items():
        stored = target.stores[branch].keys(0)[:, : keys.shape[1]]
        assert torch.allclose(stored, advance_keys(keys, target.delta, wide), atol=1e-12)


def test_the_error_of_an_anchor_stays_flat_in_bf16():
    """64 slides, each from the pristine copy: never more than one rounding."""
    policy = SlidingWindow(frames=1)
    wide, errors = Rotation.mm_rope(FREQ), []
    for frames in (4, 20, 68):
        target, pristine = played(policy, frames, dtype=torch.bfloat16, rebase="slide")
        assert target.delta == frames - 1 - 2
        want = advance_keys(pristine[0].double(), target.delta, wide)
        got = target.stores[0].keys(0)[:, : want.shape[1]].double()
        errors.append(float((got - want).norm() / want.norm()))
    assert max(errors) < 0.002 and max(errors) < 1.2 * min(errors)


def test_the_window_is_never_turned():
    """Window keys keep the bytes they were committed with."""
    target, _ = played(PackCache(window=3), 14, rebase="slide")
    absolute, _ = played(PackCache(window=3), 14, positions="absolute")
    anchors = 13 + 76
    for moved, still in zip(target.stores[0], absolute.stores[0], strict=True):
        assert bits(moved[0][:, anchors:]) == bits(still[0][:, anchors:])
        assert bits(moved[1]) == bits(still[1])
        assert bits(moved[0][:, :anchors]) != bits(still[0][:, :anchors])


@pytest.mark.parametrize(
    "policy, held_",
    [
        (PackCache(window=6), 6),
        (PackCache(window=5, n_sinks=1), 6),
        (SlidingWindow(frames=6), 6),
        (PackCache(window=None), "any number of"),
    ],
)
def test_a_window_beyond_the_trained_range_is_warned_of_with_the_numbers(policy, held_):
    """DESIGN 4.5: W + sinks above F - 2 leaves the trained range whatever is rebased."""
    settings = {"rotation": Rotation.mm_rope(FREQ.float()), "trained_latent_frames": 7}
    with pytest.warns(TrainedRangeWarning, match=rf"holds {held_} latent frames .* room for 5 "):
        cache(policy, positions="rebase", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache(policy, positions="absolute", **settings)
        cache(policy, positions="rebase", **{**settings, "trained_latent_frames": None})
        for fits in (PackCache(window=5), PackCache(window=4, n_sinks=1), FullCache(), NoHistory()):
            cache(fits, positions="rebase", **settings)


# --- out of memory and back ---------------------------------------------------------------------


def twin(target: FrameCache, exported: dict[int, tuple], **settings) -> FrameCache:
    """A new cache that was given what `target` holds now, from what it exported."""
    tensors = []
    for entry in target.timeline.entries:
        saved, views = exported[entry.span.frame]
        index = torch.from_numpy(np.searchsorted(saved, entry.held))
        tensors += [v if len(saved) == entry.count else v[:, index] for v in views]
    entries = [HeldFrame(e.span, e.start, e.held, e.rank) for e in target.timeline.entries]
    out = cache(target.policy, target.text, **settings)
    timeline = Timeline(entries, **target.timeline.counters())
    out.restore(timeline, iter(tensors), delta=target.delta, capacities=target.capacities)
    return out


def everything(target: FrameCache) -> tuple:
    """All bytes, pristine anchors too, and all numbers."""
    anchors = [bits(layer) for own in target._anchors for layer in own._layers]
    return committed_bytes(target), anchors, target.summary(), target.capacities


def go_on(target: FrameCache, seed: int, span: Span) -> None:
    target.open(span)
    noise(target, torch.Generator().manual_seed(seed))
    target.commit()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"positions": "rebase", "trained_latent_frames": 4, "dtype": torch.bfloat16},
        {"positions": "rebase", "rebase": "slide", "dtype": torch.float64},
    ],
    ids=["absolute", "trained", "slide"],
)
@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
@pytest.mark.parametrize("text", [(13, 3), (13,)], ids=["guided", "unguided"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.filterwarnings("ignore::packcache.cache.TrainedRangeWarning")
def test_what_was_exported_comes_back_to_the_bit_and_goes_on(policy, text, image, settings):
    """Each entry is exported once, right after its commit; that is enough at any later time."""
    settings = {"rotation": Rotation.mm_rope(FREQ.float()), **settings}
    target, exported, again = cache(policy, text, **settings), {}, None
    for number in range(-1, 9):
        role = Role.IMAGE if image and number == 0 else Role.HISTORY
        span = Span.text(13) if number < 0 else frame(number, role)
        go_on(target, number + 1, span)
        if again is not None:
            go_on(again, number + 1, span)
            assert everything(again) == everything(target)
        newest = target.timeline.entries[-1]
        if newest.span is span:
            views = [view.clone() for view in target.export(newest)]
            exported[number] = (newest.held, views)
        again = twin(target, exported, **settings)
        assert everything(again) == everything(target)


def test_export_gives_each_branch_its_own_slots():
    target = started(frames=2, image=True)
    text, image, last = target.timeline.entries
    for entry, lengths in ((text, (13, 3)), (image, (76, 76)), (last, (76, 76))):
        views = target.export(entry)
        assert [v.shape[1] for v in views] == [n for n in lengths for _ in range(2 * LAYERS)]
    first = [int(views[0, 0, 0]) for views in target.export(last)]
    assert first == [89, -89, 89 + 10**6, -89 - 10**6, 79, -79, 79 + 10**6, -79 - 10**6]


@pytest.mark.parametrize("which, name", [(0, "text"), (1, "latent frame 0"), (2, "latent frame 1")])
def test_what_a_rebase_has_turned_is_not_exported(which, name):
    target, _ = played(PackCache(window=3, n_sinks=1), 12, rebase="slide")
    entry = target.timeline.entries[which]
    with pytest.raises(CacheStateError, match=rf"{name} was advanced by \d+ latent frames, expect"):
        target.export(entry)
    assert target.export(target.timeline.entries[-1])


def test_only_a_new_cache_is_restored():
    target = started(frames=2)
    with pytest.raises(CacheStateError, match="restore after 165 tokens: make a new cache"):
        target.restore(Timeline(), [], delta=0, capacities=target.capacities)


# --- mutations ----------------------------------------------------------------------------------


def test_a_shifted_branch_is_noticed(monkeypatch):
    """Mutation: packing by slots that are off by one leaves other tokens in a branch."""
    from packcache.store import KVStore

    keep = KVStore.keep
    monkeypatch.setattr(
        KVStore, "keep", lambda self, slots: keep(self, np.minimum(slots + 1, self.length - 1))
    )
    target = started(frames=6)
    assert held(target, 1) != expected(target, 1)


def test_layouts_without_borders_work_too():
    """A model whose frames are content only, one branch, no text."""
    layout = FrameLayout(rows=2, cols=3, header=0, footer=0, new_line=False)
    target = cache(PackCache(budget=1, window=3), (0,), layout=layout, dtype=torch.float64)
    for number in range(5):
        step(target, Span.of_frame(Role.HISTORY, number, layout))
    assert held(target, 0) == expected(target, 0)
    assert sum(target.timeline.counts().values()) == 6


# --- back to an earlier frame --------------------------------------------------------------------


def rewound(policy, to: int, frames: int = 6):
    """A cache of `frames`, rewound, and those frames committed again; beside one straight on."""
    layout = FrameLayout(rows=2, cols=2, header=0, footer=0, new_line=False)

    def commit(cache: FrameCache, frame: int) -> None:
        cache.open(Span.of_frame(Role.HISTORY, frame, layout))
        torch.manual_seed(frame)
        cache.update(0, *torch.randn(2, 1, layout.tokens, 32))
        cache.commit()

    caches = []
    for _ in range(2):
        rotation = Rotation.mm_rope(inverse_frequencies(32, 100.0))
        cache = FrameCache(
            policy, layers=1, kv_heads=1, head_dim=32, layout=layout, text=(3,), rotation=rotation,
            trained_latent_frames=4,
        )  # fmt: skip
        cache.open(Span.text(3))
        cache.update(0, torch.ones(1, 3, 32), torch.ones(1, 3, 32))
        cache.commit()
        for frame in range(to):
            commit(cache, frame)
        caches.append(cache)
    for frame in range(to, frames):
        commit(caches[0], frame)
    caches[0].rewind(to)
    return caches, commit


@pytest.mark.parametrize("to", range(7))
@pytest.mark.filterwarnings("ignore::packcache.cache.TrainedRangeWarning")
def test_a_rewind_of_a_full_cache_forgets_those_frames_only(to):
    (cache, straight), commit = rewound(FullCache(), to)
    for frame in range(to, 8):
        assert cache.timeline.counters() == straight.timeline.counters()
        assert torch.equal(cache.stores[0].values(0), straight.stores[0].values(0))
        for one in (cache, straight):
            commit(one, frame)
    assert torch.equal(cache.stores[0].keys(0), straight.stores[0].keys(0))


def test_what_was_evicted_does_not_come_back():
    (cache, _), commit = rewound(SlidingWindow(frames=2), 5)
    assert cache.timeline.counts() == {4: 4}  # 3 left when 5 was committed
    commit(cache, 5)
    assert cache.timeline.counts() == {4: 4, 5: 4}
    assert cache.timeline.evicted_tokens == cache.logical_length - cache.physical_length


@pytest.mark.filterwarnings("ignore::packcache.cache.TrainedRangeWarning")
def test_sinks_that_are_forgotten_are_turned_no_more():
    (cache, straight), commit = rewound(SinkWindow(sinks=2, frames=1), 1)
    for frame in range(1, 9):
        for one in (cache, straight):
            commit(one, frame)
    assert cache.delta == straight.delta > 0
    assert torch.equal(cache.stores[0].keys(0), straight.stores[0].keys(0))
    assert cache.kv_bytes == straight.kv_bytes


def test_a_rewind_out_of_order_is_refused():
    (cache, _), _ = rewound(FullCache(), 3)
    with pytest.raises(InvalidSetting, match="rewind to latent frame 4, expected 0 to 3, those"):
        cache.rewind(4)
    cache.open(Span.of_frame(Role.HISTORY, 3, cache.layout))
    with pytest.raises(CacheStateError, match="is still open: commit or close it first"):
        cache.rewind(1)
