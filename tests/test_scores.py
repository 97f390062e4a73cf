"""NUMBERS for orders that ask: each score against a slow float64 twin, known answers, mutations."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packcache import cache as cache_module
from packcache.cache import FrameCache
from packcache.errors import InvalidSetting
from packcache.lumos.attend import CachedAttention
from packcache.policies import POLICIES, DeepForcing, PackCache
from packcache.reuse import parse_reuse
from packcache.scores import (
    SAMPLES,
    QueryWatch,
    expected_attention,
    received_attention,
    sampled,
)
from packcache.selectors import Score
from packcache.timeline import FrameLayout, Kind, Role, Span
from tests.tools import LAYOUT, picture, recorder

#: float64 against float64.
ROUNDING = 1e-12

#: A broken score must be off by more, in shares of one frame.
VISIBLE = 1e-4

KINDS: list[Score] = ["expected", "observed"]

#: Two rows of three, no borders: six tokens.
SMALL = FrameLayout(rows=2, cols=3, header=0, footer=0, new_line=False)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Told(PackCache):
    """PackCache that remembers what it was told, by latent frame."""

    told: dict = dataclasses.field(default_factory=dict, compare=False)

    def rank(self, span, before, scores=None):
        self.told[span.frame] = scores
        return super().rank(span, before, scores)


# --- the slow twins -----------------------------------------------------------------------------


def softmax(logits: list[float]) -> np.ndarray:
    top = max(logits)
    weights = np.array([math.exp(x - top) for x in logits])
    return weights / weights.sum()


def dense_expected(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Shares of P tokens: every query `[H, N, D]` is looked at, token by token."""
    group, size, shares = len(queries) // len(keys), keys.shape[-1], []
    for head, (k, v) in enumerate(zip(keys, values, strict=True)):
        own = np.concatenate(queries[head * group : (head + 1) * group])
        mean, spread = own.mean(axis=0), own.var(axis=0)
        shares.append(
            softmax(
                [
                    float(mean @ k[j]) / math.sqrt(size)
                    + float(spread @ k[j] ** 2) / (2 * size)
                    + math.log(math.sqrt(float(v[j] @ v[j])))
                    for j in range(len(k))
                ]
            )
        )
    return np.mean(shares, axis=0)


def dense_received(queries: np.ndarray, keys: np.ndarray, tokens: int) -> np.ndarray:
    """Shares of the last tokens of the attention of queries `[H, r, D]`, one query at a time."""
    group, size, total = len(queries) // len(keys), keys.shape[-1], np.zeros(tokens)
    for head, own in enumerate(queries):
        k = keys[head // group]
        for query in own:
            total += softmax([float(query @ row) / math.sqrt(size) for row in k])[-tokens:]
    return total / total.sum()


def normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=shape))


@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9))
def test_expected_attention_is_the_dense_one(seed, kv_heads, group, tokens):
    rng = np.random.default_rng(seed)
    queries = normal(rng, kv_heads * group, 7, 4)
    keys, values = normal(rng, kv_heads, tokens, 4), normal(rng, kv_heads, tokens, 4)
    pooled = queries.reshape(kv_heads, -1, 4)
    got = expected_attention(pooled.mean(1), pooled.var(1, correction=0), keys, values)
    want = dense_expected(queries.numpy(), keys.numpy(), values.numpy())
    assert np.abs(got.numpy() - want).max() < ROUNDING


@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_received_attention_is_the_dense_one(seed, kv_heads, group, held):
    rng = np.random.default_rng(seed)
    queries, keys = normal(rng, kv_heads * group, 3, 4), normal(rng, kv_heads, held + 6, 4)
    got = received_attention(queries, keys, held, 6)
    want = dense_received(queries.numpy(), keys.numpy(), 6)
    assert np.abs(got.numpy() - want).max() < ROUNDING


def test_the_closed_form_is_the_mean_over_normal_queries():
    """`E exp(q.k / sqrt D)` by Gauss-Hermite quadrature: what the formula claims to be."""
    rng = np.random.default_rng(0)
    mean, variance = normal(rng, 1, 2), normal(rng, 1, 2).square()
    keys, values = normal(rng, 1, 5, 2), torch.ones(1, 5, 2).double()
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    gives = np.zeros(5)
    for x, a in zip(nodes, weights, strict=True):
        for y, b in zip(nodes, weights, strict=True):
            query = mean[0].numpy() + variance[0].sqrt().numpy() * np.array([x, y])
            gives += a * b * np.exp(keys[0].numpy() @ query / math.sqrt(2))
    got = expected_attention(mean, variance, keys, values).numpy()
    assert np.abs(got - gives / gives.sum()).max() < 1e-10


# --- the engine against the twins ---------------------------------------------------------------


def listened(monkeypatch, model, score: Score, **settings):
    """A run that evicts nothing, what its policy was told, and every forward's q, k, v."""
    attention, calls = CachedAttention.__call__, []

    def call(self, layer, q, k, v):
        calls.append((run.frame, layer, q.clone(), k.clone(), v.clone()))
        return attention(self, layer, q, k, v)

    monkeypatch.setattr(CachedAttention, "__call__", call)
    policy = Told(budget=None, window=None, order=score)
    run = recorder(model, policy, positions="absolute", **settings)
    run.run(3, picture(model))
    return run, policy.told, calls


def twin_error(run, told, calls, score: Score, branch: int = 0) -> float:
    """Largest difference of any score of a frame that was made, from all that was attended with."""
    keys_of, error = run.caches[0].stores[branch].keys, 0.0
    tokens, layers = run.layout.tokens, run.model.config.num_hidden_layers
    offsets = run.layout.content_offsets()  # no more than are sampled
    for frame in (1, 2):
        shares = []
        for layer in range(layers):
            own = [call for call in calls if call[:2] == (frame, layer)]
            _, _, q, k, v = (x if i < 2 else x[branch].numpy() for i, x in enumerate(own[-1]))
            if score == "expected":
                queries = np.concatenate([call[2][branch].numpy() for call in own], axis=1)
                shares.append(dense_expected(queries, k, v))
            else:
                end = run.prefixes[0].lengths[branch] + (frame + 1) * tokens
                held = keys_of(layer)[:, :end].numpy()
                shares.append(dense_received(q[:, offsets], held, tokens))
        error = max(error, float(np.abs(np.mean(shares, axis=0) - told[frame]).max()))
    return error


@pytest.mark.parametrize("score", KINDS)
def test_scores_of_the_engine_are_those_of_the_slow_twin(tiny64, monkeypatch, score):
    """All denoising steps and the commit, all layers, the conditional branch."""
    run, told, calls = listened(monkeypatch, tiny64, score)
    assert len([c for c in calls if c[0] == 1]) == 4 * tiny64.config.num_hidden_layers
    assert twin_error(run, told, calls, score) < ROUNDING
    assert all(own.sum() == pytest.approx(1) for frame, own in told.items() if frame >= 0)


@pytest.mark.parametrize("score", KINDS)
def test_steps_that_reuse_are_seen_as_they_are_made(tiny64, monkeypatch, score):
    """Forwards of some rows give their queries to the moments; the commit is one of all rows."""
    reuse = parse_reuse("rest_every=4,history_every=2")
    run, told, calls = listened(monkeypatch, tiny64, score, steps=6, reuse=reuse)
    assert {c[2].shape[2] for c in calls} != {run.layout.tokens}
    if score == "observed":
        assert twin_error(run, told, calls, score) < ROUNDING
    for frame in (1, 2):
        assert told[frame].sum() == pytest.approx(1)


@pytest.mark.parametrize("score", KINDS)
def test_mutation_the_wrong_branch_is_noticed(tiny64, monkeypatch, score):
    observe = FrameCache.observe
    monkeypatch.setattr(FrameCache, "observe", lambda self, *a: observe(self, *a[:-1], 1 - a[-1]))
    run, told, calls = listened(monkeypatch, tiny64, score)
    assert twin_error(run, told, calls, score) > VISIBLE
    if score == "expected":
        assert twin_error(run, told, calls, score, branch=1) < ROUNDING


@pytest.mark.parametrize("score", KINDS)
def test_mutation_one_layer_for_all_is_noticed(tiny64, monkeypatch, score):
    observe, first = FrameCache.observe, {}

    def of_the_first(self, layer, q, k, v, branch):
        if layer == 0:
            first[branch] = q, k, v
        observe(self, layer, *first[branch], branch)

    monkeypatch.setattr(FrameCache, "observe", of_the_first)
    assert twin_error(*listened(monkeypatch, tiny64, score), score) > VISIBLE


def test_mutation_only_the_last_forward_counts_is_noticed(tiny64, monkeypatch):
    """`expected` is of all forwards of a frame."""
    see = QueryWatch.see
    monkeypatch.setattr(
        QueryWatch, "see", lambda self, layer, *a: (self.forget() if not layer else None)
        or see(self, layer, *a),
    )  # fmt: skip
    assert twin_error(*listened(monkeypatch, tiny64, "expected"), "expected") > VISIBLE


# --- known answers ------------------------------------------------------------------------------


def small(policy, *, layers: int = 1, layout: FrameLayout = SMALL, text: int = 0) -> FrameCache:
    out = FrameCache(
        policy, layers=layers, kv_heads=1, head_dim=4, layout=layout, text=(text,),
        positions="absolute", dtype=torch.float64,
    )  # fmt: skip
    return out


def attend(target: FrameCache, queries, keys, values=None, layer: int = 0) -> None:
    values = torch.ones_like(keys) if values is None else values
    target.observe(layer, queries, *target.update(layer, keys, values))


def along(axis: int, *where: int, by: float = 8.0, tokens: int = 6) -> torch.Tensor:
    """Vectors `[1, tokens, 4]`, zero but for some that point along an axis."""
    out = torch.zeros(1, tokens, 4).double()
    out[0, list(where), axis] = by
    return out


@pytest.mark.parametrize("order", KINDS)
@pytest.mark.parametrize("token", range(6))
def test_the_token_that_gets_all_attention_is_kept_first(order, token):
    target = small(PackCache(order=order))
    target.open(Span.of_frame(Role.HISTORY, 0, SMALL))
    attend(target, along(0, *range(6)), along(0, token))
    target.commit()
    (entry,) = target.timeline.history
    assert entry.best(1).tolist() == [token]


@pytest.mark.parametrize("order", KINDS)
def test_what_is_attended_to_survives_packing(order):
    """Old frames shrink to the tokens that were asked for; borders stay before them."""
    target = small(PackCache(order=order, budget=1, window=3), layout=LAYOUT)
    wanted = [5, 17, 40, 66]
    for frame in range(3):
        target.open(Span.of_frame(Role.HISTORY, frame, LAYOUT))
        attend(target, along(0, *range(76), tokens=76), along(0, *wanted, tokens=76))
        target.commit()
    borders = np.flatnonzero(LAYOUT.kinds() == Kind.BORDER).tolist()
    for entry in target.timeline.history:
        assert set(borders + wanted) <= set(entry.held.tolist())


def test_queries_that_differ_count_by_their_spread():
    """Mean zero, but all along one axis: a key on that axis is expected to get more."""
    target = small(PackCache(order="expected"))
    target.open(Span.of_frame(Role.HISTORY, 0, SMALL))
    queries = along(2, 0, 1, 2) - along(2, 3, 4, 5)
    attend(target, queries, along(2, 4, by=1.0) + along(1, 1, by=3.0))
    target.commit()
    assert target.timeline.history[0].best(1).tolist() == [4]


def test_a_longer_value_counts_more():
    told = Told(order="expected")
    target = small(told)
    target.open(Span.of_frame(Role.HISTORY, 0, SMALL))
    values = torch.ones(1, 6, 4).double()
    values[0, 3] *= 5
    attend(target, along(0, *range(6)), along(0), values)
    target.commit()
    assert told.told[0] == pytest.approx(np.array([1, 1, 1, 5, 1, 1]) / 10)


def test_layers_count_alike():
    """One layer is sure, the other asks nothing: half and half."""
    told = Told(order="observed")
    target = small(told, layers=2)
    target.open(Span.of_frame(Role.HISTORY, 0, SMALL))
    attend(target, along(0, *range(6), by=40.0), along(0, 2, by=40.0))
    attend(target, along(0), along(0), layer=1)
    target.commit()
    want = np.full(6, 1 / 12)
    want[2] += 1 / 2
    assert told.told[0] == pytest.approx(want)


def test_each_frame_of_a_chunk_has_its_own_scores():
    """Shares of its own tokens, by the queries of all that is open; the text has none."""
    told = Told(order="observed", budget=None, window=None)
    target = small(told, text=2)
    target.open(Span.text(2), *(Span.of_frame(Role.HISTORY, f, SMALL) for f in range(2)))
    attend(target, along(0, *range(14), tokens=14), along(0, 0, 2 + 5, 8 + 1, tokens=14))
    target.commit()
    assert told.told[-1] is None
    for frame, token in ((0, 5), (1, 1)):
        assert int(told.told[frame].argmax()) == token
        assert told.told[frame].sum() == pytest.approx(1)


def test_drafts_count_for_what_is_expected_and_a_closed_frame_does_not():
    told = Told(order="expected", budget=None, window=None)
    target, keys = small(told), along(0, 1, by=2.0) + along(1, 4, by=2.0)
    one, other = along(0, *range(6)), along(1, *range(6), by=4.0)
    for frame, forwards in enumerate(([one, other], [torch.cat((one, other), dim=1)], [other])):
        target.open(Span.of_frame(Role.HISTORY, frame, SMALL))
        if frame == 2:
            attend(target, one, keys)
            target.close()
            target.open(Span.of_frame(Role.HISTORY, frame, SMALL))
        for queries in forwards:
            target.rollback()
            attend(target, queries, keys)
        target.commit()
    assert told.told[0] == pytest.approx(told.told[1])
    assert told.told[0].argmax() == 1 and told.told[2].argmax() == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", KINDS)
def test_narrow_dtypes_are_summed_in_float32(order, dtype):
    rng = torch.Generator().manual_seed(0)
    told = Told(order=order), Told(order=order)
    for own, kind in zip(told, (dtype, torch.float64), strict=True):
        target = FrameCache(
            own, layers=1, kv_heads=2, head_dim=8, layout=LAYOUT, text=(0,),
            positions="absolute", dtype=kind,
        )  # fmt: skip
        target.open(Span.of_frame(Role.HISTORY, 0, LAYOUT))
        q, k, v = (torch.randn(n, 76, 8, generator=rng.manual_seed(n)) for n in (4, 2, 2))
        q, k, v = (x.to(dtype).to(kind) for x in (q, k, v))
        target.observe(0, q, *target.update(0, k, v))
        target.commit()
    assert told[0].told[0] == pytest.approx(told[1].told[0], abs=1e-6)
    assert told[0].told[0].dtype == np.float64


# --- which queries are observed -----------------------------------------------------------------


@pytest.mark.parametrize("rows, cols", [(8, 8), (48, 84), (12, 20)])
def test_observed_queries_lie_evenly_over_the_grid(rows, cols):
    layout = FrameLayout(rows=rows, cols=cols)
    offsets = sampled(layout)
    assert len(offsets) == min(SAMPLES, layout.content) and offsets == sorted(set(offsets))
    assert (layout.kinds()[offsets] == Kind.CONTENT).all()
    y, x = (axis[offsets] for axis in layout.cells())
    quarters = np.bincount(2 * (2 * y >= rows) + (2 * x >= cols), minlength=4)
    assert quarters.min() >= len(offsets) / 4 - 4


# --- what asking costs --------------------------------------------------------------------------


def test_who_does_not_ask_pays_nothing(tiny, monkeypatch):
    """No watch is made and no query looked at: the engine of a policy that asks for nothing."""

    def fails(*_, **__):
        raise AssertionError("a policy that asks for nothing is watched")

    monkeypatch.setattr(cache_module, "QueryWatch", fails)
    monkeypatch.setattr(FrameCache, "observe", fails)
    for make in POLICIES.values():
        if make().asks is None:
            run = recorder(tiny, make(), steps=1, positions="absolute").run(2)
            assert not run.caches[0].asks
    with pytest.raises(AssertionError, match="is watched"):
        recorder(tiny, DeepForcing())


def test_a_cache_asks_while_a_latent_frame_is_open():
    target = small(PackCache(order="expected"), text=3)
    assert not target.asks
    target.open(Span.text(3))
    assert not target.asks
    attend(target, *along(0, tokens=3)[None].expand(2, -1, -1, -1))
    target.commit()
    target.open(Span.of_frame(Role.HISTORY, 0, SMALL))
    assert target.asks
    target.close()
    assert not target.asks
    assert not small(PackCache()).asks


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", KINDS)
def test_a_model_that_shows_no_queries_is_told_in_one_line(order):
    """Nothing is written, and the commit can be repeated with what it lacked."""
    target = small(PackCache(order=order), layers=2)
    target.open(Span.of_frame(Role.HISTORY, 0, SMALL))
    for layer in (0, 1):
        target.update(layer, along(0, 1), along(0, 1))
    for shown in (0, 1):
        with pytest.raises(InvalidSetting) as caught:
            target.commit()
        assert str(caught.value) == (
            f"order '{order}' needs the queries of 2 layers, and this model's attention showed the "
            f"cache those of {shown}: use 'visible' or 'spatial'"
        )
        assert target.physical_length == 0
        attend(target, along(0, 1), along(0, 1), layer=shown)
    target.commit()
    assert target.physical_length == 6


def test_other_heads_must_be_seen_anew():
    target = small(PackCache(order="expected"))
    target.open(Span.of_frame(Role.HISTORY, 0, SMALL))
    attend(target, along(0, 1), along(0, 1))
    target.select_heads(torch.tensor([0, 0]))
    with pytest.raises(InvalidSetting, match="showed the cache those of 0: use 'visible'"):
        target.commit()


@pytest.mark.parametrize("order", KINDS)
def test_a_plan_has_sizes_and_no_numbers(order):
    """On the device "meta" nothing is computed: tokens are counted as for any order."""
    held = []
    for policy in (PackCache(order=order), PackCache()):
        target = FrameCache(
            policy, layers=1, kv_heads=1, head_dim=4, layout=LAYOUT, text=(0,),
            positions="absolute", device="meta",
        )  # fmt: skip
        for frame in range(6):
            target.open(Span.of_frame(Role.HISTORY, frame, LAYOUT))
            target.update(0, *torch.empty(2, 1, 76, 4, device="meta"))
            target.commit()
        held.append(target.timeline.counts())
    assert held[0] == held[1]
