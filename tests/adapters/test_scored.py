"""Scored orders in other people's models: kept tokens against slow twins, branches, refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from packcache.adapters import diffusers as adapter
from packcache.adapters.diffusers import install
from packcache.adapters.diffusers_subject import DiffusersSubject, tiny_skyreels, tiny_wan
from packcache.adapters.self_forcing import SelfForcingCache
from packcache.adapters.transformers import make_cache
from packcache.adapters.transformers_subject import tiny_emu3
from packcache.cache import FrameCache
from packcache.errors import CacheStateError, InvalidSetting
from packcache.policies import DeepForcing, FullCache, PackCache, Policy
from packcache.testing.conformance import Trial
from packcache.testing.subjects import SUBJECTS
from packcache.timeline import Timeline
from tests.test_scores import KINDS, dense_expected, dense_received

SIZE, CHUNK, CHUNKS = 6, 3, 5

#: By how much the seeds of a second branch's inputs differ.
OTHER = 7


def packed(order) -> PackCache:
    return PackCache(budget=CHUNK, window=3 * CHUNK, half_life=CHUNK, order=order)


#: Their frames are held in part, by each kind of score.
ASKING: list[Policy] = [*(packed(kind) for kind in KINDS), DeepForcing(frames=8, recent=2)]

asking = pytest.mark.parametrize("policy", ASKING, ids=repr)


@pytest.fixture
def wan() -> DiffusersSubject:
    return DiffusersSubject("wan", tiny_wan())


@torch.inference_mode()
def play(
    subject, installed, chunks=CHUNKS, *, drafts=(), branches=("cond",), batch=1, seed=0
) -> list[Tensor]:
    """Chunk after chunk; drafts of other inputs first. Each branch and row has its own inputs."""
    outputs = []
    text = subject.prompt.expand(batch, -1, -1)
    for piece in range(chunks):
        for noise in (*drafts, 0):
            for number, branch in enumerate(branches):
                own = [seed + noise + OTHER * number + 20 * row for row in range(batch)]
                latents = torch.cat([subject.inputs(piece, each)[0] for each in own])
                with installed.frame(commit=not noise, branch=branch):
                    out = subject.model(latents, torch.full((batch,), 100 * noise), text)
                outputs.append(out.sample)
    return outputs


def attended(monkeypatch) -> list[tuple[np.ndarray, ...]]:
    """Queries `[B * H, n, D]` and keys and values `[B * H, S, D]` that the host's attention got."""
    dispatch, calls = adapter.dispatch_attention_fn, []

    def listen(q, k, v, **settings):
        calls.append(tuple(x.double().permute(0, 2, 1, 3).flatten(0, 1).numpy() for x in (q, k, v)))
        return dispatch(q, k, v, **settings)

    monkeypatch.setattr(adapter, "dispatch_attention_fn", listen)
    return calls


def twin_scores(kind: str, layers: list[tuple[np.ndarray, ...]]) -> Iterator[np.ndarray]:
    """Of each latent frame of a chunk, from what every layer of its commit attended with."""
    for frame in range(CHUNK):
        shares = []
        for q, k, v in layers:
            first = k.shape[1] - (CHUNK - frame) * SIZE
            own = slice(first, first + SIZE)
            if kind == "expected":
                shares.append(dense_expected(q, k[:, own], v[:, own]))
            else:
                received = dense_received(q, k, CHUNK * SIZE).reshape(CHUNK, SIZE)[frame]
                shares.append(received / received.sum())
        yield np.mean(shares, axis=0)


def kept(timeline: Timeline) -> dict[int, list[int]]:
    return {entry.span.frame: entry.held.tolist() for entry in timeline.history}


def kept_by_twin(policy: Policy, calls: list, timeline: Timeline, forwards: int = 1) -> dict:
    """Of as many tokens as are held, those that the twin scores highest."""
    size = len(calls) // CHUNKS
    chunks = [calls[i : i + size] for i in range(0, len(calls), size)]
    commits = [own[-size // forwards :] for own in chunks]  # all layers of the last forward
    scores = [own for commit in commits for own in twin_scores(str(policy.asks), commit)]
    return {
        entry.span.frame: sorted(np.argsort(-scores[entry.span.frame])[: entry.count].tolist())
        for entry in timeline.history
    }


# --- against the twin ----------------------------------------------------------------------------


@asking
@pytest.mark.parametrize("make, batch", [(tiny_wan, 1), (tiny_skyreels, 1), (tiny_wan, 2)])
def test_kept_are_the_tokens_that_a_slow_twin_scores_highest(monkeypatch, make, batch, policy):
    """From q and k of the host's attention, in float64; a batch's rows count alike."""
    subject = DiffusersSubject("tiny", make())
    calls = attended(monkeypatch)
    installed = install(subject.model, policy)
    play(subject, installed, drafts=(1,), batch=batch)
    timeline = installed.caches["cond"].timeline
    partly = [held for held in kept(timeline).values() if 0 < len(held) < SIZE]
    assert len(partly) > 1
    assert kept(timeline) == kept_by_twin(policy, calls, timeline, forwards=2)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_others_than_without_scores(wan, kind):
    held = []
    for order in (kind, "visible"):
        installed = install(copy.deepcopy(wan.model), packed(order))
        play(DiffusersSubject("wan", installed.transformer), installed)
        held.append(kept(installed.caches["cond"].timeline))
    scored, unscored = held
    assert {f: len(t) for f, t in scored.items()} == {f: len(t) for f, t in unscored.items()}
    assert scored != unscored


@asking
def test_mutation_the_queries_of_another_layer_are_noticed(wan, monkeypatch, policy):
    observe, first = FrameCache.observe, []

    def of_the_first(self, layer, queries, keys, values, branch=0):
        if layer == 0:
            first[:] = [queries]
        observe(self, layer, first[0], keys, values, branch)

    monkeypatch.setattr(FrameCache, "observe", of_the_first)
    calls = attended(monkeypatch)
    installed = install(wan.model, policy)
    play(wan, installed)
    timeline = installed.caches["cond"].timeline
    assert kept(timeline) != kept_by_twin(policy, calls, timeline)


@asking
@pytest.mark.parametrize("name", ["wan", "skyreels"])
def test_packed_by_scores_it_is_one_forward_under_the_matching_mask(name, policy):
    """The kit's own comparison, both branches under way."""
    with torch.inference_mode():
        Trial(SUBJECTS[name]()).compare(policy, CHUNKS)


# --- what asking takes ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [FullCache(), packed("visible")], ids=repr)
def test_who_does_not_ask_is_shown_nothing_and_is_what_it_was(wan, monkeypatch, policy):
    outputs = []
    for shows in (True, False):
        model = copy.deepcopy(wan.model)
        with monkeypatch.context() as patch:
            patch.setattr(FrameCache, "observe", lambda *_: pytest.fail("queries were shown"))
            if not shows:
                patch.setattr(adapter.Installed, "show", lambda *_: None)
            installed = install(model, policy)
            outputs.append(play(DiffusersSubject("wan", model), installed, drafts=(1,)))
            assert installed.caches["cond"].policy is policy
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_being_watched_changes_no_bit(wan, kind):
    """Nothing leaves, so nothing may differ from the full cache."""
    outputs = []
    for policy in (PackCache(budget=None, window=None, order=kind), FullCache()):
        model = copy.deepcopy(wan.model)
        outputs.append(play(DiffusersSubject("wan", model), install(model, policy), drafts=(1,)))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@asking
def test_drafts_are_not_shown_and_leave_no_trace(wan, monkeypatch, policy):
    observe, seen = FrameCache.observe, []
    monkeypatch.setattr(
        FrameCache, "observe", lambda self, *a: (seen.append(a[0]), observe(self, *a))
    )
    held = []
    for drafts in ((), (1, 2)):
        model = copy.deepcopy(wan.model)
        installed = install(model, policy)
        play(DiffusersSubject("wan", model), installed, drafts=drafts)
        held.append(kept(installed.caches["cond"].timeline))
    assert held[0] == held[1]
    assert seen == [0, 1] * 2 * CHUNKS


@asking
def test_a_layer_that_was_not_shown_is_noticed(wan, monkeypatch, policy):
    """By one line, and the cache is as it was."""
    observe = FrameCache.observe
    installed = install(wan.model, policy)
    play(wan, installed, 2)
    cache = installed.caches["cond"]
    before = kept(cache.timeline), cache.logical_length
    with monkeypatch.context() as patch:
        patch.setattr(
            FrameCache, "observe", lambda self, layer, *a: layer or observe(self, layer, *a)
        )
        with pytest.raises(InvalidSetting) as told:
            play(wan, installed, 1)
    assert str(told.value) == (
        f"order {policy.asks!r} needs the queries of 2 layers, and this model's attention showed "
        "the cache those of 1: use 'visible' or 'spatial'"
    )
    assert (kept(cache.timeline), cache.logical_length) == before and not cache.is_open
    play(wan, installed, 1)


# --- branches ------------------------------------------------------------------------------------


@asking
def test_branches_keep_the_tokens_of_the_one_that_leads(wan, policy):
    """Though they see other inputs, by which they alone would keep others."""
    installed, alone = install(wan.model, policy), {}
    play(wan, installed, drafts=(1,), branches=("cond", "uncond"))
    both = {name: kept(cache.timeline) for name, cache in installed.caches.items()}
    for name, seed in (("cond", 0), ("uncond", OTHER)):
        single = DiffusersSubject("wan", tiny_wan())
        own = install(single.model, policy)
        play(single, own, branches=(name,), seed=seed)
        alone[name] = kept(own.caches[name].timeline)
    assert both["cond"] == both["uncond"] == alone["cond"] != alone["uncond"]
    cond, uncond = (installed.caches[name] for name in ("cond", "uncond"))
    assert not torch.equal(cond.stores[0].keys(0), uncond.stores[0].keys(0))
    assert cond.summary()["policy"] == uncond.summary()["policy"] == repr(policy)
    assert cond.policy.settings() == policy.settings()


def test_orders_of_earlier_chunks_are_forgotten(wan):
    installed = install(wan.model, packed("observed"))
    play(wan, installed, branches=("cond", "uncond"))
    last = CHUNKS * CHUNK
    assert sorted(installed._order.ranks) == list(range(last - CHUNK, last))


def test_a_branch_that_commits_out_of_turn_is_told(wan):
    """Before the one that leads, or a chunk behind it; in turn it goes on."""
    installed = install(wan.model, packed("observed"))
    with torch.inference_mode():
        for branch in ("cond", "uncond"):  # a draft each: the first one leads
            with installed.frame(branch=branch):
                wan.run(*wan.inputs(0, 1))
    for commits, frame in ((0, 0), (2, 0)):
        play(wan, installed, commits)
        with pytest.raises(CacheStateError) as told:
            play(wan, installed, 1, branches=("uncond",))
        assert str(told.value) == (
            f"branch 'uncond' commits latent frame {frame}, whose order queries of branch 'cond' "
            "fix: commit each chunk there, then here, then go on"
        )
        assert installed.caches["uncond"].logical_length == 0
    installed.reset()
    play(wan, installed, 2, branches=("uncond", "cond"))
    assert kept(installed.caches["cond"].timeline) == kept(installed.caches["uncond"].timeline)


# --- hosts that show no queries ------------------------------------------------------------------


@asking
def test_hosts_that_show_no_queries_refuse_when_the_cache_is_made(policy):
    hosts = {
        "a Self-Forcing-type model": lambda: SelfForcingCache(policy, layers=2, grid=(2, 3)),
        "transformers": lambda: make_cache(tiny_emu3(), policy, SIZE),
    }
    for name, make in hosts.items():
        with pytest.raises(InvalidSetting) as told:
            make()
        assert str(told.value) == (
            f"{policy!r} goes by the queries of the attention (order {policy.asks!r}), and {name} "
            "shows a cache keys and values only: use a policy whose order reads no tensor, such as "
            "PackCache(order='visible')"
        )
