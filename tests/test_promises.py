"""DESIGN 7: what must be provable, and that each proof notices the engine breaking.

Each `*_error` function measures the real engine against something slow and independent. The
promises say the measure is rounding; the mutations break the engine on purpose and say it is not.
Models are random and float64 where the twin is, so rounding is near 1e-14.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from packcache import policies, positions
from packcache.cache import FrameCache, TrainedRangeWarning
from packcache.errors import CacheStateError
from packcache.lumos import attend
from packcache.lumos.decode import Decoder
from packcache.lumos.vocab import Prefix, Vocab
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
from packcache.store import KVStore
from packcache.testing import oracle
from packcache.timeline import Ints, Role, Span, Timeline
from tests.tools import PROMPTS, Recorder, bits, commit, kv_bytes_of, picture, recorder, trained_on

#: float64 engine against float64 twin.
ROUNDING = 1e-12

#: What a broken engine must exceed, and a float32 one may not: the golden tolerance on logits.
VISIBLE = 1e-4

LATENTS = 7

POLICIES = [
    FullCache(),
    NoHistory(),
    SlidingWindow(frames=1),
    SlidingWindow(frames=3),
    SinkWindow(sinks=1, frames=2),
    UniformHistory(budget=1, window=4),
    PackCache(),
    PackCache(budget=2, window=None),
    PackCache(budget=1.5, window=3, n_sinks=1),
    PackCache(window=2, fill="window"),
    PackCache(min_share=0.1, half_life=2.0),
    PackCache(order="novelty"),
    PackCache(order="spatial", borders="last"),
    PackCache(image_share=0.5),
    PackCache.paper_literal(),
    PackCache.paper_visible(),
    RandomDrop(seed=1),
    FadeMem(budget=1.5),
    DeepForcing(frames=3),
    PackCache(order="expected"),
    UniformHistory(order="observed", window=3),
]


def made(model, policy, *, image=False, latents=LATENTS, **settings) -> Recorder:
    """A finished run of the engine."""
    prompts = len(settings.get("prompts", PROMPTS[:1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainedRangeWarning)
        decoder = recorder(model, policy, **settings)
    decoder.ranks = ranks_of(decoder)
    return decoder.run(latents, picture(model, prompts) if image else None)


def ranks_of(run: Recorder) -> dict[int, Ints | None]:
    """Fills up as the run goes on: the order that prompt 0's cache gives each latent frame."""
    timeline, ranks = run.caches[0].timeline, {}
    append = timeline.append

    def remember(span: Span, rank: Ints | None = None):
        ranks[span.frame] = rank
        return append(span, rank)

    timeline.append = remember
    return ranks


class AsMade:
    """A policy whose scored orders are those of a run: tests of scores judge them."""

    asks = None

    def __init__(self, policy, ranks) -> None:
        self.policy, self.ranks = policy, ranks
        self.plan, self.is_sink = policy.plan, policy.is_sink

    def rank(self, span: Span, before: Span | None) -> Ints | None:
        return self.ranks[span.frame] if self.policy.asks else self.policy.rank(span, before)


# --- measures -----------------------------------------------------------------------------------


def spans_of(run: Recorder) -> list[Span]:
    """The text and the committed frames of prompt 0, with what the commit knew."""
    spans = [Span.text(len(run.prefixes[0].ids))]
    for r in run.results:
        role = Role.IMAGE if r.given and r.frame == 0 else Role.HISTORY
        ids, visible = r.ids[0].numpy().astype(np.int32), None if r.given else run.visible
        spans.append(Span.of_frame(role, r.frame, run.layout, visible=visible, ids=ids))
    return spans


def forwards_of(run: Recorder, frame: int):
    return [f for f in run.forwards if f.frame == frame]


def sequence(run: Recorder, branch: int, frames: int) -> torch.Tensor:
    """Ids of a branch as committed: its prefix and the ids of each frame's last forward."""
    prefix = run.prefixes[0]
    text = torch.tensor(prefix.ids[0 if branch == 0 else prefix.video_start :])
    return torch.cat([text, *(forwards_of(run, f)[-1].ids[0] for f in range(frames))])


def masked_error(run: Recorder, policy) -> float:
    """Every forward of an absolute run against one masked forward over the whole sequence.

    The drafts of a frame lie behind one another in that sequence; none sees another.
    """
    timeline, held, error = Timeline(), [np.empty(0, int)], 0.0
    policy = AsMade(policy, run.ranks)
    text, *frames = spans_of(run)
    commit(timeline, policy, text, budget=run.caches[0].budget)
    for frame, span in enumerate(frames):
        held.append(oracle.held_tokens(timeline))
        made = forwards_of(run, frame)
        for branch in range(run.branches):
            start = len(sequence(run, branch, 0))
            seen = [own_tokens(run, tokens, start) for tokens in held]
            seen += seen[-1:] * (len(made) - 1)
            mask = oracle.seen_mask([start, *[run.layout.tokens] * (len(seen) - 1)], seen)
            where = oracle.sequence_positions(run.model.config, start, frame + 1, run.layout)
            where = torch.cat((where, *[where[:, -run.layout.tokens :]] * (len(made) - 1)), dim=1)
            ids = torch.cat((sequence(run, branch, frame), *(f.ids[0] for f in made)))
            want = oracle.masked_forward(run.model, ids, where, mask)
            have = torch.cat([f.hidden[0, branch] for f in made])
            error = max(error, float((want[-len(have) :] - have).abs().max()))
        commit(timeline, policy, span, budget=run.caches[0].budget)
    return error


def own_tokens(run: Recorder, tokens: np.ndarray, prefix: int) -> np.ndarray:
    """Logical indices of the conditional branch, as a branch with another prefix counts them."""
    less = len(run.prefixes[0].ids) - prefix
    return np.concatenate((tokens[tokens < prefix], tokens[tokens >= prefix + less] - less))


def unrotated_error(run: Recorder, policy, rebase: str) -> float:
    """Every forward of a rebased run against keys that were never rotated in advance."""
    lengths = run.prefixes[0].lengths[: run.branches]
    twin = oracle.UnrotatedCache(
        run.model,
        AsMade(policy, run.ranks),
        layout=run.layout,
        text=lengths,
        rebase=rebase,
        budget=run.caches[0].budget,
    )
    error = 0.0
    for number, span in enumerate(spans_of(run)):
        twin.open(span)
        if number == 0:
            for branch in range(run.branches):
                twin.forward(sequence(run, branch, 0), branch)
        for forward in forwards_of(run, number - 1):
            for branch in range(run.branches):
                want = twin.forward(forward.ids[0], branch)
                error = max(error, float((want - forward.hidden[0, branch]).abs().max()))
        if number:
            assert twin.delta == run.results[number - 1].rebase_frames
        twin.commit(visible=span.visible, ids=span.ids)
    return error


def recomputed_error(run: Recorder) -> float:
    """Every forward of a full run against a whole forward without any cache (spec 4 mask)."""
    error = 0.0
    for frame in range(len(run.results)):
        for branch in range(run.branches):
            text = len(sequence(run, branch, 0))
            where = oracle.sequence_positions(run.model.config, text, frame + 1, run.layout)
            for forward in forwards_of(run, frame):
                ids = torch.cat((sequence(run, branch, frame), forward.ids[0]))
                with torch.inference_mode():
                    want = oracle.whole_forward(run.model, ids, where)[-len(forward.ids[0]) :]
                error = max(error, float((want - forward.hidden[0, branch]).abs().max()))
    return error


def first_difference(run: Recorder, other: Recorder) -> int | None:
    """The first latent frame whose hidden states, tokens or K/V bytes differ in any bit."""
    for frame, (a, b) in enumerate(zip(run.results, other.results, strict=True)):
        pairs = zip(forwards_of(run, frame), forwards_of(other, frame), strict=True)
        if any(bits(x.hidden) != bits(y.hidden) for x, y in pairs):
            return frame
        if not torch.equal(a.ids, b.ids) or run.kv[frame] != other.kv[frame]:
            return frame
    return None


def test_every_policy_has_a_row():
    """A new policy is one dataclass and one row in this matrix (DESIGN 3)."""
    assert {type(policy) for policy in POLICIES} == set(policies.POLICIES.values())


# --- promises -----------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_full_cache_is_recomputation(tiny64, image):
    run = made(tiny64, FullCache(), image=image, latents=4)
    assert recomputed_error(run) < ROUNDING


def test_full_cache_is_recomputation_in_float32(tiny):
    assert recomputed_error(made(tiny, FullCache(), latents=4)) < VISIBLE


@pytest.mark.parametrize(
    "unlimited",
    [PackCache(budget=None, window=None), UniformHistory(budget=None, window=None)],
    ids=repr,
)
def test_unlimited_is_full_bit_for_bit(tiny, unlimited):
    full, same = made(tiny, FullCache()), made(tiny, unlimited)
    assert first_difference(full, same) is None
    assert same.caches[0].timeline.evicted_tokens == 0


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_every_policy_is_full_until_it_evicts(tiny, policy):
    """Bit for bit: hidden states of every forward, tokens, K/V bytes."""
    full, run = made(tiny, FullCache(), image=True), made(tiny, policy, image=True)
    lost = [r.physical_length < r.logical_length for r in run.results]
    until = lost.index(True) if any(lost) else len(lost)
    different = first_difference(full, run)
    assert different is None if until == len(lost) else different == until


@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_bounded_cache_is_one_masked_forward(tiny64, policy, image):
    run = made(tiny64, policy, image=image, positions="absolute")
    assert masked_error(run, policy) < ROUNDING


REBASED = [
    FullCache(),
    NoHistory(),
    SlidingWindow(frames=1),
    SinkWindow(sinks=2, frames=2),
    PackCache(window=3),
    PackCache(window=2, n_sinks=1),
    PackCache(window=2, drop_remasked=True, budget=2),
    PackCache(window=3, image_share=0.5),
    UniformHistory(window=3),
    RandomDrop(window=3),
    FadeMem(window=3, sinks=1),
    DeepForcing(frames=3),
]


def test_every_policy_is_rebased():
    assert {type(policy) for policy in REBASED} == set(policies.POLICIES.values())


@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
@pytest.mark.parametrize("rebase", ["trained", "slide"])
@pytest.mark.parametrize("policy", REBASED, ids=repr)
def test_rebase_is_recomputation_from_unrotated_keys(tiny64, policy, rebase, image):
    """Anchors advanced from a pristine copy = window and current frame shifted back."""
    model = trained_on(tiny64, 5)
    run = made(model, policy, image=image, rebase=rebase, latents=9)
    assert (run.results[-1].rebase_frames == 0) == isinstance(policy, FullCache)
    assert unrotated_error(run, policy, rebase) < ROUNDING


def test_rebase_in_float32_stays_within_the_golden_tolerance(tiny, tiny64):
    run = made(trained_on(tiny, 5), PackCache(window=3), image=True, latents=9)
    run.model = trained_on(tiny64, 5)
    assert unrotated_error(run, PackCache(window=3), "trained") < VISIBLE


def test_rebase_changes_what_the_model_sees(tiny64):
    """The two position modes differ once a frame has left, and not before."""
    absolute, moved = (
        made(trained_on(tiny64, 5), PackCache(window=3), positions=mode, latents=9)
        for mode in ("absolute", "rebase")
    )
    deltas = [r.rebase_frames for r in moved.results]
    assert first_difference(absolute, moved) == next(f for f, d in enumerate(deltas) if d)


def test_a_model_without_a_trained_length_never_rebases(tiny64):
    absolute, moved = (
        made(trained_on(tiny64, None), PackCache(window=2), positions=mode, latents=6)
        for mode in ("absolute", "rebase")
    )
    assert first_difference(absolute, moved) is None


@pytest.mark.parametrize("policy", [FullCache(), PackCache(), PackCache(window=2, n_sinks=1)])
def test_a_draft_leaves_no_trace(tiny, policy):
    """Extra drafts of garbage change no committed byte, before or after the commit."""
    clean = made(tiny, policy, image=True)
    noisy = recorder(tiny, policy)
    forward = Decoder._forward

    def with_garbage(self, ids, *arguments):
        before = kv_bytes_of(self)
        forward(self, ids.flip(-1), *arguments)
        assert kv_bytes_of(self) == before
        for cache in self.caches:
            cache.rollback()
        return forward(self, ids, *arguments)

    noisy._forward = with_garbage.__get__(noisy)
    noisy.run(LATENTS, picture(tiny))
    assert noisy.kv == clean.kv
    assert torch.equal(noisy.tokens, clean.tokens)


def test_the_order_of_kept_tokens_does_not_matter(tiny64):
    """Attention is a sum over keys: permuting K with V changes rounding, K alone everything."""
    run = made(tiny64, PackCache())
    ids = run.vocab.frame(run.layout)[None]
    store = run.caches[0].stores[0]
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(store.length))

    def forward() -> torch.Tensor:
        return Decoder._forward(run, ids, run.tables.at(run.frame)).clone()

    with torch.inference_mode():
        run._open(Role.HISTORY)
        before = forward()
        for layer in range(store.layers):
            store.keys(layer)[:] = store.keys(layer)[:, shuffled]
        assert (forward() - before).abs().max() > VISIBLE
        for layer in range(store.layers):
            store.values(layer)[:] = store.values(layer)[:, shuffled]
        assert (forward() - before).abs().max() < ROUNDING


@pytest.mark.parametrize("policy", [FullCache(), PackCache(window=3, n_sinks=1)], ids=repr)
@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_prompts_in_one_call_are_prompts_alone(tiny, policy, image):
    """B prompts give the tokens of B single runs (float32), whatever their lengths."""
    seeds = [5, 6, 7]
    model = trained_on(tiny, 5)
    together = made(model, policy, prompts=PROMPTS, seeds=seeds, image=image)
    for row, (text, seed) in enumerate(zip(PROMPTS, seeds, strict=True)):
        alone = made(model, policy, prompts=[text], seeds=[seed], image=image)
        assert torch.equal(together.tokens[row], alone.tokens[0])
    assert len({tuple(t.flatten().tolist()) for t in together.tokens}) == 3


def test_branches_share_kept_set_and_rebase(tiny64):
    """Unconditional K/V of the first layer are the conditional ones at positions less vs.

    In layer 0 a value depends on the token alone, so equal values mean equal kept tokens.
    """
    run = made(trained_on(tiny64, 5), PackCache(window=3), latents=9)
    (cache,) = run.caches
    assert cache.delta > 0 and cache.timeline.evicted_tokens > 0
    conditional, other = cache.stores
    shift = run.prefixes[0].video_start
    assert conditional.length - other.length == shift
    assert torch.allclose(conditional.values(0)[:, shift:], other.values(0), atol=1e-12)


def test_guidance_one_has_one_branch(tiny):
    """Its logits are the conditional ones; nothing is stored for the other branch."""
    one, two = (made(tiny, FullCache(), latents=2, guidance=g) for g in (1.0, 3.0))
    assert (one.branches, two.branches) == (1, 2)
    assert len(one.caches[0].stores) == 1
    assert one.results[0].kv_bytes < two.results[0].kv_bytes
    assert torch.allclose(one.forwards[0].hidden[0, 0], two.forwards[0].hidden[0, 0], atol=VISIBLE)


def test_runs_repeat(tiny):
    first, again = made(tiny, PackCache()), made(tiny, PackCache())
    assert first_difference(first, again) is None


# --- mutations: each proof notices its engine breaking ------------------------------------------


def absolute_error(model, policy=None, engine_policy=None) -> float:
    policy = policy or PackCache(window=3)
    return masked_error(
        made(model, engine_policy or policy, image=True, positions="absolute"), policy
    )


def rebase_error(model) -> float:
    policy = PackCache(window=3)
    run = made(trained_on(model, 5), policy, image=True, latents=9)
    return unrotated_error(run, policy, "trained")


def test_mutation_no_history(tiny64, monkeypatch):
    """Each frame sees itself only."""
    update = FrameCache.update
    monkeypatch.setattr(FrameCache, "update", lambda *a, **_: (update(*a), a[2:4])[1])
    assert absolute_error(tiny64) > VISIBLE


@pytest.mark.parametrize("measure", [absolute_error, rebase_error])
def test_mutation_wrong_offset(tiny64, monkeypatch, measure):
    """Frames say they are one latent frame later than they are."""
    place = Vocab.frame_positions
    monkeypatch.setattr(
        Vocab, "frame_positions", lambda self, n, frame, layout: place(self, n, frame + 1, layout)
    )
    assert measure(tiny64) > VISIBLE


@pytest.mark.parametrize("measure", [absolute_error, rebase_error])
def test_mutation_physical_length(tiny64, monkeypatch, measure):
    """Border tokens count the tokens held instead of those ever committed."""
    place = positions.frame_positions
    held = 11 + 24 + 24  # prefix, image, one frame of budget
    monkeypatch.setattr(
        positions, "frame_positions", lambda start, *a, **k: place(min(start, held), *a, **k)
    )
    assert measure(tiny64) > VISIBLE


def test_mutation_stale_draft(tiny64, monkeypatch):
    """The first draft's K/V stay, later forwards write nothing."""
    update, seen = KVStore.update, {}

    def stale(self, layer, keys, values, rows=None):
        first = seen.setdefault((id(self), layer, self.length), (keys.clone(), values.clone()))
        return update(self, layer, *first)

    monkeypatch.setattr(KVStore, "update", stale)
    assert absolute_error(tiny64) > VISIBLE


class LosesAnAnchor(PackCache):
    """Drops the first token of the condition image."""

    def plan(self, timeline, budget=None):
        image = next((w.start for e, w in timeline.slots() if e.span.role is Role.IMAGE), -1)
        return [slot for slot in super().plan(timeline, budget) if slot != image]


def test_mutation_dropped_anchor(tiny64):
    assert absolute_error(tiny64, PackCache(), LosesAnAnchor()) > VISIBLE


def test_mutation_leaking_branch_keys(tiny64, monkeypatch):
    """The unconditional branch attends to the conditional one's keys and values."""
    update = FrameCache.update

    def leak(self, layer, keys, values, branch=0, rows=None):
        seen = update(self, layer, keys, values, branch)
        store = self.stores[0]
        end = store.length + store.draft
        return seen if branch == 0 else (store._keys[layer][:, :end], store._values[layer][:, :end])

    monkeypatch.setattr(FrameCache, "update", leak)
    assert absolute_error(tiny64) > VISIBLE


def test_mutation_leaking_branch_text(tiny64, monkeypatch):
    """The unconditional branch is given the text."""
    monkeypatch.setattr(Prefix, "branch", lambda self, index: self.ids)
    monkeypatch.setattr(Prefix, "lengths", property(lambda self: (len(self.ids),) * 2))
    assert absolute_error(tiny64) > VISIBLE


@pytest.mark.parametrize("measure", [absolute_error, rebase_error])
def test_mutation_duplicated_chunk(tiny64, monkeypatch, measure):
    """The newest frame is attended to twice."""
    attention = attend.attend

    def twice(q, keys, values):
        keys, values = (torch.cat((x, x[:, len(x[0]) - 24 :]), dim=1) for x in (keys, values))
        return attention(q, keys, values)

    monkeypatch.setattr(attend, "attend", twice)
    assert measure(tiny64) > VISIBLE


@pytest.mark.parametrize("frames", [-1, 1])
def test_mutation_rebase_off_by_one_frame(tiny64, monkeypatch, frames):
    """Anchors are advanced one latent frame too few or too many."""
    advance = positions.AnchorKeys.advance
    monkeypatch.setattr(
        positions.AnchorKeys, "advance", lambda self, keys, n: advance(self, keys, n + frames)
    )
    assert rebase_error(tiny64) > VISIBLE


def test_mutation_spatial_channels_move(tiny64, monkeypatch):
    """The rebase turns all pairs instead of the temporal ones."""
    wrong = positions.Rotation(pairs=torch.arange(16), freq=tiny64.inv_freq, stride=4)
    monkeypatch.setattr(positions.Rotation, "mm_rope", lambda *a: wrong)
    assert rebase_error(tiny64) > VISIBLE


def test_mutation_a_draft_that_stays(tiny, monkeypatch):
    """A store that keeps its draft grows at every step: the bytes show it."""
    monkeypatch.setattr(FrameCache, "rollback", lambda self: [s.commit() for s in self.stores])
    with pytest.raises(CacheStateError, match="opened tokens"):
        made(tiny, FullCache(), latents=2)
