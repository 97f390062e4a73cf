"""torch-full: the same tokens as the engine, and nothing but what a plain loop needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from packcache.bench.baselines import TorchFull
from packcache.bench.candidates import DecoderCandidate, make_model, random_codes
from packcache.bench.parts import Workload
from packcache.errors import InvalidSetting
from packcache.lumos.config import SIZES, LumosConfig
from packcache.lumos.schedule import Sampling
from packcache.lumos.vocab import Vocab
from packcache.policies import FullCache

SAMPLINGS = {
    "sampled": Sampling(steps=5, guidance=3.0),
    "fresh noise": Sampling(steps=5, guidance=3.0, reset_temperature=True),
    "greedy": Sampling(steps=4, guidance=3.0, greedy=True),
    "one branch": Sampling(steps=4, guidance=1.0),
    "one step": Sampling(steps=1, guidance=2.0),
}


def clip(
    config: LumosConfig, task: str = "t2v", sampling: Sampling = SAMPLINGS["sampled"], **others
) -> Workload:
    """Three latent frames of 32 content tokens."""
    settings = {
        "model": "tiny",
        "config": config,
        "layout": Vocab(config).layout(64, 32),
        "sampling": sampling,
        "task": task,
        "size": (64, 32),
        "frames": 9,
        "latents": 3,
        "policies": {"full": FullCache()},
        "presets": {},
        "text_tokens": 11,
        "seed": 5,
    }
    return Workload(**{**settings, **others})


def engine_tokens(model, work: Workload) -> list[torch.Tensor]:
    """What `Decoder` makes of the clip: clean ids of its generated latent frames."""
    decoder = DecoderCandidate(model, work, FullCache()).decoder
    given = random_codes(work, 0)[:, None] if work.given else None
    return [r.ids[0] for r in decoder.frames(given) if not r.given]


def own_tokens(engine, work: Workload) -> list[torch.Tensor]:
    engine.prefill()
    for _ in range(work.given):
        engine.advance()
    return [engine.generate() for _ in range(work.latents - work.given)]


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_tokens_are_the_engines(tiny, task, name):
    work = clip(tiny.config, task, SAMPLINGS[name])
    expected = engine_tokens(tiny, work)
    got = own_tokens(TorchFull(tiny, work), work)
    assert len(expected) == 3 - work.given
    assert [e.tolist() for e in expected] == [g.tolist() for g in got]
    assert len(torch.cat(got).unique()) > 5 + 1, "one code everywhere would test nothing"


def test_a_head_in_parts_says_the_same(tiny, monkeypatch):
    """Logits are made for a part of the rows at a time, as in the engine."""
    work = clip(tiny.config)
    whole = own_tokens(TorchFull(tiny, work), work)
    engine = TorchFull(tiny, work)
    monkeypatch.setattr(engine, "head_rows", 7)
    assert [a.tolist() for a in own_tokens(engine, work)] == [b.tolist() for b in whole]


class Counting(torch.overrides.TorchFunctionMode):
    """How often a torch function is called, and the shapes of its first two arguments."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.shapes = name, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == self.name:
            self.shapes.append((tuple(args[0].shape), tuple(args[1].shape)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_one_attention_call_a_branch_and_layer(tiny, guidance):
    """Over everything held, of the heads as they are: no key is repeated, nothing is masked."""
    work = clip(tiny.config, "i2v", Sampling(steps=3, guidance=guidance))
    engine = TorchFull(tiny, work)
    engine.prefill()
    engine.advance()
    with Counting("scaled_dot_product_attention") as calls:
        engine.rehearse()
    config, branches = work.config, work.sampling.branches
    assert len(calls.shapes) == (3 + 1) * branches * config.num_hidden_layers
    group = config.num_attention_heads // config.num_key_value_heads
    tokens, lengths = work.layout.tokens, (11, 3)
    for number, (queries, keys) in enumerate(calls.shapes):
        held = lengths[number % branches] + 2 * tokens
        assert queries == (1, config.num_key_value_heads, group * tokens, config.head_dim)
        assert keys == (1, config.num_key_value_heads, held, config.head_dim)


def test_the_head_sees_undecided_positions_and_visual_ids_only(tiny, monkeypatch):
    work = clip(tiny.config, sampling=Sampling(steps=4, guidance=3.0))
    engine, rows = TorchFull(tiny, work), []
    head = type(tiny).head

    def seen(self, hidden, low, high):
        assert (low, high) == (work.config.token_ids.video_lo, work.config.token_ids.video_hi)
        rows.append(len(hidden))
        return head(self, hidden, low, high)

    monkeypatch.setattr(type(tiny), "head", seen)
    engine.prefill()
    engine.rehearse()
    assert rows == engine.rows == [32, 29, 22, 12]


def test_a_rehearsal_leaves_no_trace(tiny):
    """Rehearsing between frames, all steps or some, changes no token and nothing held."""
    work = clip(tiny.config, "i2v")
    plain = own_tokens(TorchFull(tiny, work), work)
    engine = TorchFull(tiny, work)
    engine.prefill()
    engine.advance()
    got = []
    for steps in (None, [0, 3]):
        before = engine.statistics()
        seconds = engine.rehearse(steps)
        assert all(s > 0 for s in seconds) and engine.statistics() == before
        got.append(engine.generate())
    assert [g.tolist() for g in got] == [p.tolist() for p in plain]


def test_advancing_holds_what_the_engine_holds(tiny):
    """Given frames clean, others re-masked: the same bytes as the engine's own cache."""
    work = clip(tiny.config, "i2v")
    ours, theirs = TorchFull(tiny, work), DecoderCandidate(tiny, work, FullCache())
    for engine in (ours, theirs):
        assert engine.prefill() > 0
    for _ in range(work.latents):
        assert ours.advance() == 0.0
        theirs.advance()
    for branch, store in enumerate(theirs.decoder.caches[0].stores):
        for layer, pair in enumerate(store):
            held = ours.cache[branch][:, layer, :, : ours.held[branch]]
            assert all(torch.equal(a, b) for a, b in zip(held, pair, strict=True))
    assert ours.statistics()["held"] == theirs.statistics()["held"] == 11 + 3 * work.layout.tokens


def test_statistics_are_the_bytes_of_what_is_held(tiny):
    work = clip(tiny.config)
    engine = TorchFull(tiny, work)
    engine.prefill()
    config = work.config
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    tokens = work.layout.tokens
    for frames in range(3):
        stats = engine.statistics()
        assert stats["kv_bytes"] == (11 + 3 + 2 * frames * tokens) * slot
        assert stats["capacity_bytes"] == (11 + 3 + 6 * tokens) * slot
        engine.advance()


def test_a_clip_ends(tiny):
    work = clip(tiny.config, latents=1)
    engine = TorchFull(tiny, work)
    engine.prefill()
    engine.advance()
    with pytest.raises(InvalidSetting, match="latent frame 1 of a clip of 1: expected no more"):
        engine.advance()


def test_narrow_weights_make_a_narrow_cache():
    work = replace(clip(SIZES["toy"]), dtype=torch.bfloat16)
    engine = TorchFull(make_model(work), work)
    assert {cache.dtype for cache in engine.cache} == {torch.bfloat16}
    assert len(own_tokens(engine, work)) == 3
