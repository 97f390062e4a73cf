"""What a recorder sees is what the engine attends to: held against a forward without any cache."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import packcache as pc
from packcache.errors import InvalidSetting
from packcache.inspect import record as recording
from packcache.inspect.record import (
    CLIP_MEMORY,
    Recorder,
    record,
    sampled_frames,
    scenes,
    spread,
    watch_diffusers,
)
from packcache.inspect.score import score
from packcache.inspect.trace import COMMIT, Sample, Trace
from packcache.reuse import StepReuse
from packcache.testing.oracle import attend_mask, sequence_positions
from packcache.timeline import FrameLayout, Role
from tests.tools import PROMPTS, picture, recorder

LATENTS, STEPS = 3, 3


@pytest.fixture(scope="module")
def watched(tiny):
    """A full-cache run of the tiny model from an image, watched; the decoder keeps its forwards."""
    decoder = recorder(tiny, pc.FullCache(), steps=STEPS)
    watcher = watching(decoder)
    with watcher.watch(decoder):
        decoder.run(LATENTS, picture(tiny))
    return decoder, watcher


def watching(decoder, **settings) -> Recorder:
    return Recorder(
        layout=decoder.layout,
        num_layers=decoder.model.config.num_hidden_layers,
        text=decoder.caches[0].text[0],
        **{"queries": 5, **settings},
    )


def forwards_of(decoder) -> dict[tuple[int, int], Tensor]:
    """Ids `[P]` that entered each forward, by latent frame and step, -1 the commit."""
    found: dict[int, list[Tensor]] = {}
    for forward in decoder.forwards:
        found.setdefault(forward.frame, []).append(forward.ids[0])
    return {
        (frame, COMMIT if number == len(own) - 1 else number): ids
        for frame, own in found.items()
        for number, ids in enumerate(own)
    }


@torch.no_grad()
def dense(decoder, frame: int, step: int, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean attention `[layers, S]` of rows of a frame in one forward of the whole sequence, and the
    longest value of each layer. No cache: upstream's mask over everything at once.
    """
    model, layout = decoder.model, decoder.layout
    seen = forwards_of(decoder)
    before = [seen[one, COMMIT] for one in range(frame)]
    prefix = decoder.prefixes[0].ids
    ids = torch.cat([torch.tensor(prefix), *before, seen[frame, step]])
    where = sequence_positions(model.config, len(prefix), frame + 1, layout)
    tokens = model.config.token_ids
    mask = attend_mask(ids, tokens.image_start, tokens.image_end)
    last = len(ids) - layout.tokens + torch.from_numpy(rows)
    means, longest = [], []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        keys, values = (x[0].repeat_interleave(group, dim=0) for x in (k, v))
        scores = q[0] @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
        share = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
        means.append(share[:, last].mean(dim=(0, 1)))
        longest.append(v[0].norm(dim=-1).max())
        return (share @ values)[None]

    model(ids[None], model.rotary(where), attend)
    return torch.stack(means), torch.stack(longest)


def off(sample: Sample, expected: Tensor) -> float:
    return float(np.abs(sample.mass - expected.numpy()).max())


def test_attention_is_that_of_a_forward_without_a_cache(watched):
    decoder, watcher = watched
    samples = watcher.samples()
    assert [(s.frame, s.step) for s in samples] == [
        (0, COMMIT), *((f, s) for f in (1, 2) for s in (0, 1, 2, COMMIT))
    ]  # fmt: skip
    for sample in samples:
        expected, _ = dense(decoder, sample.frame, sample.step, watcher.sampled(sample.frame))
        expected = expected[list(watcher.layers)]
        assert sample.mass.shape == expected.shape and sample.steps == STEPS
        assert off(sample, expected) < 1e-5
        assert np.allclose(sample.mass.sum(axis=1), 1, atol=1e-5)


def test_the_comparison_would_see_another_layer_row_step_or_order(watched):
    """Mutations: each would change the attention by far more than the tolerance above."""
    decoder, watcher = watched
    sample = next(s for s in watcher.samples() if (s.frame, s.step) == (2, 1))
    rows = watcher.sampled(2)
    expected, _ = dense(decoder, 2, 1, rows)
    assert off(sample, expected) < 1e-5
    assert off(sample, expected.flip(0)) > 1e-4  # layers exchanged
    assert off(sample, expected.roll(1, dims=1)) > 1e-4  # one token further
    assert off(sample, dense(decoder, 2, 0, rows)[0]) > 1e-4  # the step before
    assert off(sample, dense(decoder, 2, 1, (rows + 1) % decoder.layout.tokens)[0]) > 1e-4


def test_value_norms_are_the_largest_of_what_was_seen(watched):
    decoder, watcher = watched
    seen = [dense(decoder, s.frame, s.step, watcher.sampled(s.frame))[1] for s in watcher.samples()]
    expected = torch.stack(seen).max(dim=0).values[list(watcher.layers)]
    trace = watcher.trace(roles=[Role.IMAGE, Role.HISTORY, Role.HISTORY])
    assert np.allclose(trace.value_norm, expected.numpy(), rtol=1e-5)
    assert trace.workload == {"queries": 5}


def test_a_watched_run_makes_the_same_tokens_and_is_left_as_it_was(tiny, watched):
    decoder, _ = watched
    alone = recorder(tiny, pc.FullCache(), steps=STEPS).run(LATENTS, picture(tiny))
    assert torch.equal(alone.tokens, decoder.tokens)
    assert alone.kv[-1] == decoder.kv[-1]
    assert type(decoder.attend) is type(alone.attend)
    assert type(decoder.attend_step) is type(alone.attend_step)


def test_steps_and_layers_can_be_chosen(tiny):
    decoder = recorder(tiny, pc.FullCache(), steps=STEPS)
    watcher = watching(decoder, at_steps=[1], layers=[1])
    with watcher.watch(decoder, clip=4):
        decoder.run(2)
    assert [(s.clip, s.frame, s.step) for s in watcher.samples()] == [(4, 0, 1), (4, 1, 1)]
    assert watcher.samples()[1].mass.shape[0] == 1


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [
        (6, 8, (0, 1, 2, 3, 4, 5)), (1, 8, (0,)), (9, 2, (0, 8)),
        (28, 8, (0, 4, 8, 12, 15, 19, 23, 27)),
    ],
)  # fmt: skip
def test_layers_are_spread(count, most, expected):
    assert spread(count, most) == expected


def test_queries_are_content_drawn_anew_for_every_frame():
    layout = FrameLayout(rows=8, cols=8)
    made = Recorder(layout=layout, num_layers=2, text=0, queries=20)
    again = Recorder(layout=layout, num_layers=2, text=0, queries=20)
    drawn = made.sampled(3)
    assert len(set(drawn.tolist())) == 20 and set(drawn) <= set(layout.content_offsets().tolist())
    assert np.array_equal(drawn, again.sampled(3))
    assert not np.array_equal(drawn, made.sampled(4))
    other = Recorder(layout=layout, num_layers=2, text=0, queries=20, seed=1)
    assert not np.array_equal(drawn, other.sampled(3))
    every = Recorder(layout=layout, num_layers=2, text=0, queries=500)
    assert np.array_equal(every.sampled(0), layout.content_offsets())


def test_only_a_head_group_of_scores_is_in_memory():
    """The largest tensor is rows x S of one group of heads, or the keys of one."""

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.most = max(self.most, out.numel() if isinstance(out, Tensor) else 0)
            return out

    heads, kv, rows, length, size = 8, 2, 6, 500, 16
    queries, keys = torch.randn(heads, rows, size), torch.randn(kv, length, size)
    with Largest() as seen:
        found = recording._attention(queries, keys)
    assert seen.most <= max(heads // kv * rows * length, kv * length * size)
    whole = queries.reshape(kv, -1, size) @ keys.transpose(1, 2) / math.sqrt(size)
    assert torch.allclose(found, whole.softmax(-1).mean(dim=(0, 1)), atol=1e-6)
    assert found.sum() == pytest.approx(1)


# --- how much is kept ----------------------------------------------------------------------------

#: 3B at 672x384: 4084 tokens a latent frame.
WIDE = FrameLayout(rows=48, cols=84)


def taken(frames, layers: int = 8, text: int = 30) -> int:
    """Bytes of four forwards of these latent frames, counted one by one."""
    return sum(4 * layers * 4 * len(range(text + (f + 1) * WIDE.tokens)) for f in frames)


def test_of_a_long_large_clip_as_many_latent_frames_are_sampled_as_fit():
    """At 97 latent frames of 3B all would take 2.5 GB."""
    assert WIDE.tokens == 4084 and 2.4e9 < taken(range(97)) < 2.6e9
    settings = {"layout": WIDE, "text": 30, "layers": 8}
    assert sampled_frames(13, **settings) == tuple(range(13))
    assert sampled_frames(97, **settings) == (0, 24, 48, 72, 96)
    for memory in (64 << 20, CLIP_MEMORY, 1 << 30):
        chosen = sampled_frames(97, memory=memory, **settings)
        assert taken(chosen) <= memory < taken(spread(97, len(chosen) + 1))
        assert chosen == spread(97, len(chosen)) and {0, 96} <= set(chosen)
    assert sampled_frames(97, memory=3 << 30, **settings) == tuple(range(97))
    with pytest.raises(InvalidSetting, match=r"memory is 40\.0 MiB, expected at least 48\.\d MiB"):
        sampled_frames(97, memory=40 << 20, **settings)
    with pytest.raises(InvalidSetting, match="two of 97 latent frames of 4084 tokens"):
        Recorder(layout=WIDE, num_layers=28, text=30, latent_frames=97, clip_memory=40 << 20)
    few = Recorder(layout=WIDE, num_layers=28, text=30, latent_frames=97, at_steps=[-1])
    assert len(few.frames) > 5


def test_a_thinned_trace_tells_policies_that_ask_the_same(tiny, tmp_path):
    """What a commit's queries say of their own frame is kept of every latent frame."""
    traces = []
    for memory in (CLIP_MEMORY, 16_000):
        decoder = recorder(tiny, pc.FullCache(), steps=STEPS)
        watcher = watching(decoder, latent_frames=7, clip_memory=memory)
        with watcher.watch(decoder):
            decoder.run(7, picture(tiny))
        traces.append(watcher.trace(roles=[Role.IMAGE, *[Role.HISTORY] * 6]))
    whole, thin = traces
    assert whole.own == [] and "sampled_latent_frames" not in whole.workload
    chosen = thin.workload["sampled_latent_frames"]
    assert sorted({s.frame for s in thin.samples}) == chosen == [0, 3, 6]
    assert {s.frame for s in whole.samples} == set(range(7))
    assert sum(s.mass.nbytes for s in thin.samples) <= 16_000
    for sample in thin.samples:
        (same,) = [s for s in whole.samples if (s.frame, s.step) == (sample.frame, sample.step)]
        assert np.array_equal(same.mass, sample.mass)
    thin.save(tmp_path / "a.trace")
    loaded = Trace.load(tmp_path / "a.trace")
    assert np.allclose(loaded.own, thin.own, rtol=1e-3)
    policy = {"it": pc.PackCache(budget=1, window=3, order="observed")}
    left_out = replace(whole, samples=[s for s in whole.samples if s.frame in chosen])
    with pytest.raises(InvalidSetting, match="has the commits of 3 of 7 latent frames"):
        score(left_out, policy)
    expected = score(replace(left_out, own=own_of(whole)), policy).rows[0].values["kept"]
    for made in (thin, loaded):
        assert score(made, policy).rows[0].values["kept"] == pytest.approx(expected, rel=1e-3)
    blind = replace(thin, own=[np.ones_like(own) / own.shape[1] for own in thin.own])
    assert score(blind, policy).rows[0].values["kept"] != pytest.approx(expected, rel=1e-3)


def own_of(whole: Trace) -> list[np.ndarray]:
    """Shares that each frame's own tokens got at its commit, from the samples of all of them."""
    commits = [s.mass[:, -whole.layout.tokens :] for s in whole.samples if s.step == COMMIT]
    return [np.stack([(m / m.sum(axis=1, keepdims=True)).mean(axis=0) for m in commits])]


def test_without_commits_a_thinned_trace_tells_nothing_of_them(tiny):
    decoder = recorder(tiny, pc.FullCache(), steps=STEPS)
    watcher = watching(decoder, latent_frames=5, clip_memory=3_000, at_steps=[0])
    with watcher.watch(decoder):
        decoder.run(5)
    trace = watcher.trace(roles=[Role.HISTORY] * 5)
    assert trace.own == [] and trace.workload["sampled_latent_frames"] == [0, 4]


# --- wrong use -----------------------------------------------------------------------------------


def test_only_the_full_cache_is_watched(tiny):
    decoder = recorder(tiny, pc.PackCache())
    with (
        pytest.raises(InvalidSetting, match=r"policy is PackCache\(.*expected FullCache\(\)"),
        watching(decoder).watch(decoder),
    ):
        pass


def test_one_prompt_with_exact_steps_is_watched(tiny):
    two = recorder(tiny, pc.FullCache(), prompts=PROMPTS[:2])
    with pytest.raises(InvalidSetting, match="2 prompts"), watching(two).watch(two):
        pass
    reuse = recorder(tiny, pc.FullCache(), reuse=StepReuse(history_every=2))
    with (
        pytest.raises(InvalidSetting, match="expected one prompt with exact steps"),
        watching(reuse).watch(reuse),
    ):
        pass


def shown(watcher: Recorder, queries: int, keys: int, layer: int = 0, frame: int = 1) -> None:
    q, kv = torch.randn(4, queries, 8), torch.randn(2, keys, 8)
    watcher.observe(layer, q, kv, kv, frame=frame)


def test_tokens_that_are_missing_are_named():
    layout = FrameLayout(rows=4, cols=4)  # 24 tokens
    watcher = Recorder(layout=layout, num_layers=2, text=5)
    with pytest.raises(InvalidSetting, match=r"attends to 40 tokens, expected 53: 5 of text and 2"):
        shown(watcher, 24, 40)
    with pytest.raises(InvalidSetting, match="attends with 12 tokens, expected 24, a whole frame"):
        shown(watcher, 12, 53)
    assert watcher.samples() == []
    shown(watcher, 24, 53)
    with pytest.raises(InvalidSetting, match=r"layers \[1\] of latent frame 1, step -1, were not"):
        watcher.samples()
    shown(watcher, 24, 53, layer=1)
    (sample,) = watcher.samples()
    assert sample.mass.shape == (2, 53)


def test_settings_are_checked():
    layout = FrameLayout(rows=4, cols=4)
    with pytest.raises(InvalidSetting, match="queries is 0, expected at least 1"):
        Recorder(layout=layout, num_layers=2, text=5, queries=0)
    for layers in ([2], [-1], []):
        with pytest.raises(InvalidSetting, match="expected numbers of 0 to 1"):
            Recorder(layout=layout, num_layers=2, text=5, layers=layers)


# --- whole clips ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> tuple[pc.Pipeline, Trace]:
    gen = pc.load("digits")
    prompts, images = scenes(2, with_image=True)
    trace = record(gen, prompts, images=images, frames=9, steps=2, queries=8)
    return gen, trace


def test_clips_of_the_embedded_model_are_recorded(made, tmp_path):
    _, trace = made
    assert trace.roles == (Role.IMAGE, Role.HISTORY, Role.HISTORY)
    assert trace.layers == tuple(range(6)) and trace.num_layers == 6
    assert trace.clips == range(2) and len(trace.samples) == 2 * (1 + 3 + 3)
    assert trace.visible is not None and 0 < trace.visible.sum() < trace.layout.tokens
    assert trace.workload["prompts"] == scenes(2)[0] and trace.workload["image"]
    assert trace.workload["sampling"]["steps"] == 2
    assert trace.workload["trained_latent_frames"] == 7
    trace.save(tmp_path / "a.trace")
    assert (tmp_path / "a.trace").stat().st_size < 500_000


def test_the_clips_are_those_that_the_pipeline_makes(made):
    gen, trace = made
    prompts, images = scenes(2, with_image=True)
    clip = gen.generate(
        prompts[1], image=images[1], frames=9, steps=2, seed=1, policy=pc.FullCache()
    )
    content = trace.ids[1][:, trace.layout.content_offsets()]
    codes = content.reshape(3, 12, 12) - gen.model.config.token_ids.video_lo
    assert np.array_equal(codes, clip.codes.numpy())


def test_prompts_must_be_as_long_as_each_other():
    gen = pc.load("digits")
    speaks = replace(gen, tokenize=lambda prompt, header: [8] * len(prompt))
    with pytest.raises(
        InvalidSetting, match="'abcd' has 9 tokens of text, expected 8 as the first"
    ):
        record(speaks, ["abc", "abcd"], frames=5, steps=1)
    with pytest.raises(InvalidSetting, match="0 prompts and 0 images, expected at least one"):
        record(gen, [], frames=5)
    with pytest.raises(InvalidSetting, match="1 prompts and 2 images"):
        record(gen, ["a red 3"], images=["a.png", "b.png"], frames=5)


# --- diffusers -----------------------------------------------------------------------------------


@pytest.fixture
def wan(monkeypatch):
    """A tiny Wan with a full cache, and what its attention multiplied, in the order it ran."""
    adapter = pytest.importorskip("packcache.adapters.diffusers")
    from packcache.adapters.diffusers_subject import DiffusersSubject, tiny_wan

    multiplied = []
    own = adapter.dispatch_attention_fn

    def seen(q: Tensor, k: Tensor, v: Tensor, **settings):
        multiplied.append((q, k.clone()))  # the next forward writes over it
        return own(q, k, v, **settings)

    monkeypatch.setattr(adapter, "dispatch_attention_fn", seen)
    subject = DiffusersSubject("wan", tiny_wan())
    subject.chunk = 1
    return subject, adapter.install(subject.model, pc.FullCache()), multiplied


def play(subject, installed, frames: int) -> list[Tensor]:
    """Two drafts and the forward that stays, of each latent frame; another branch beside it."""
    outputs = []
    for frame in range(frames):
        for branch in ("cond", "uncond"):
            for commit in (False, False, True):
                with installed.frame(commit=commit, branch=branch):
                    outputs.append(subject.run(*subject.inputs(frame, len(outputs) % 3)))
    return outputs


def test_diffusers_is_watched_without_a_change(wan):
    subject, installed, multiplied = wan
    watcher = Recorder(layout=subject.layout, num_layers=2, text=0, queries=4, at_steps=[1, -1])
    with watch_diffusers(watcher, installed):
        outputs = play(subject, installed, 3)
    samples = watcher.samples()
    assert [(s.frame, s.step) for s in samples] == [(f, s) for f in range(3) for s in (1, -1)]
    # of a latent frame: 3 forwards of the branch, then 3 of the other, 2 layers each
    for sample in samples:
        forward = 6 * sample.frame + (2 if sample.step == COMMIT else 1)
        for layer in range(2):
            q, k = (x[0].transpose(0, 1) for x in multiplied[2 * forward + layer])
            rows = q[:, watcher.sampled(sample.frame)]
            share = (rows @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
            assert np.allclose(sample.mass[layer], share.mean(dim=(0, 1)), atol=1e-5)
    installed.reset()
    alone = play(subject, installed, 3)
    assert all(torch.equal(a, b) for a, b in zip(outputs, alone, strict=True))
    assert len(watcher.samples()) == len(samples)
    trace = watcher.trace(roles=[Role.HISTORY] * 3)
    assert trace.length(2) == samples[-1].mass.shape[1]


def test_diffusers_with_another_policy_or_longer_chunks_is_refused(wan):
    subject, installed, _ = wan
    watcher = Recorder(layout=subject.layout, num_layers=2, text=0)
    subject.chunk = 3
    with (
        watch_diffusers(watcher, installed),
        pytest.raises(InvalidSetting, match="one latent frame at a time"),
    ):
        play(subject, installed, 1)
    installed.uninstall()
    bounded = type(installed)(subject.model, pc.SlidingWindow(), "absolute", None, 0)
    with (
        pytest.raises(InvalidSetting, match=r"policy is SlidingWindow.*expected FullCache"),
        watch_diffusers(watcher, bounded),
    ):
        pass
