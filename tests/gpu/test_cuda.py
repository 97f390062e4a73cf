"""The engine on a CUDA device: the same tokens, the bytes that were planned, and no waiting.

Skipped without a CUDA device. `PACKCACHE_TEST_DEVICE=cpu` runs the bodies on the CPU instead: that
says nothing about a GPU, but shows that the tests themselves hold.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import packcache as pc
from packcache.attention import attend_lse, attend_lse_plain, merge
from packcache.cache import FrameCache
from packcache.lumos.config import SIZES
from packcache.lumos.decode import Decoder
from packcache.lumos.model import Lumos
from packcache.lumos.plan import plan
from packcache.lumos.random_weights import random_model, write_random
from packcache.lumos.schedule import Sampling, philox_draws
from packcache.lumos.vocab import Vocab
from packcache.lumos.weights import load_model
from packcache.policies import FullCache, PackCache, Policy, SinkWindow
from packcache.positions import Rotation, inverse_frequencies
from packcache.reuse import StepReuse
from packcache.testing import golden
from packcache.testing.live import LiveBytes
from packcache.timeline import Role, Span
from tests.tools import GOLDEN, LAYOUT, PROMPTS, bits, picture

DEVICE = torch.device(os.environ.get("PACKCACHE_TEST_DEVICE", "cuda"))
ON_CUDA = DEVICE.type == "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::packcache.cache.TrainedRangeWarning"),
]

PROMPT = "a red 3 moving right"

#: Guided logits of a float32 run: three times what the golden data allow for another CPU. Argmax
#: margins there are 5e-3 at least, so tokens are exact all the same.
LOGITS = 3e-3

#: An MLP so wide that memory peaks there, whatever workspace a kernel for attention takes.
SMALL = dataclasses.replace(
    SIZES["toy"],
    hidden_size=512,
    intermediate_size=3072,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
)


@pytest.fixture(scope="module")
def tiny() -> Lumos:
    """The golden model on the device, float32."""
    return golden.tiny_model(GOLDEN).to(DEVICE)


@contextmanager
def new_bytes() -> Iterator[Callable[[], int]]:
    """Tells the peak of what the block asks the device for, beside what lay there before.

    Bytes as requested: the allocator rounds blocks up, by as much as a small test takes.
    """
    gc.collect()
    if ON_CUDA:
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_stats(DEVICE)["requested_bytes.all.current"]
        yield lambda: torch.cuda.memory_stats(DEVICE)["requested_bytes.all.peak"] - before
    else:
        with LiveBytes() as live:
            yield lambda: live.peak_of("cpu")


def decoder(
    model: Lumos,
    policy: Policy,
    *,
    size: tuple[int, int] = (32, 32),
    steps: int = 3,
    make: type[Decoder] = Decoder,
    **settings: object,
) -> Decoder:
    vocab = Vocab(model.config)
    layout = vocab.layout(*size)
    return make(
        model,
        [vocab.prefix(PROMPTS[0], seconds=2, fps=4)],
        layout=layout,
        sampling=Sampling(steps=steps, guidance=3.0),
        policy=policy,
        draws=philox_draws([0], steps, layout.content),
        **settings,
    )


def check_same(got: Tensor, want: Tensor) -> None:
    """Equal tensors `[latent frames, ...]`, or the first place where they differ."""
    assert got.shape == want.shape
    if not torch.equal(got, want):
        wrong = (got != want).nonzero()
        first = tuple(wrong[0].tolist())
        pytest.fail(
            f"{len(wrong)} of {want.numel()} tokens differ, the first at {first}: "
            f"{int(got[first])}, expected {int(want[first])}"
        )


# --- the same tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["gen_t2v_greedy", "gen_i2v_greedy"])
@torch.inference_mode()
def test_upstreams_greedy_generations_come_out(tiny, stem):
    """Tokens exact, guided logits within `LOGITS` of those recorded on a CPU (golden)."""
    recorded = golden.Golden(GOLDEN / f"{stem}.json")
    made, steps = golden._replay(recorded, tiny)
    frames = recorded.arrays["frames"].long()
    given = recorded.meta["given_latent_frames"]
    made.prefill()
    results = [made.give(made.vocab.codes(made.layout, ids)[None]) for ids in frames[:given]]
    results += [made.generate() for _ in frames[given:]]
    for step, name in ((steps[0], "first_frame_step0"), (steps[-1], "last_frame_last_step")):
        got = step.logits[0][step.positions[0].argsort()].cpu()
        want = recorded.arrays[f"guided_logits_{name}"]
        torch.testing.assert_close(got, want, atol=LOGITS, rtol=LOGITS)
    check_same(torch.cat([result.ids for result in results]), frames)


@pytest.mark.parametrize("policy", [FullCache(), PackCache()])
def test_the_embedded_model_makes_the_clip_it_makes_on_the_cpu(policy):
    """Greedy, float32, long enough to pack; noise in every frame breaks ties of certain tokens."""

    def codes(device: torch.device | str) -> Tensor:
        run = pc.load("digits", device=device).run(
            [PROMPT], frames=13, policy=policy, steps=4, greedy=True, reset_temperature=True
        )
        return torch.cat([result.codes for result in run])

    check_same(codes(DEVICE), codes("cpu"))


def test_a_stopped_clip_goes_on_token_for_token(tmp_path):
    """Stopped after the first eviction; drawn tokens, fresh noise in every frame."""
    gen = pc.load("digits", device=DEVICE)
    settings = {"frames": 25, "steps": 2, "reset_temperature": True, "policy": PackCache()}
    whole = torch.cat([result.codes for result in gen.run([PROMPT], **settings)])
    begun = gen.run([PROMPT], **settings, checkpoint=tmp_path / "clip")
    assert len(list(itertools.islice(begun, 4))) == 4
    resumed = gen.run([PROMPT], **settings, checkpoint=tmp_path / "clip", resume=True)
    results = list(resumed)
    assert resumed.decoder.generated == len(whole) == len(results)
    check_same(torch.cat([result.codes for result in results]), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay_finite(dtype):
    """Non-finite logits raise in the engine; keys and values are looked at here."""
    model = golden.tiny_model(GOLDEN).to(DEVICE, dtype)
    made = decoder(model, PackCache(), latents=8)
    results = list(made.frames(picture(model)))
    assert len(results) == 8
    for result in results:
        assert 0 <= int(result.codes.min()) <= int(result.codes.max()) < 128
    for store in made.caches[0].stores:
        for keys, values in store:
            assert keys.dtype == values.dtype == dtype and keys.device.type == DEVICE.type
            assert keys.isfinite().all() and values.isfinite().all()


# --- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_weights_stream_to_the_device_one_by_one(tmp_path, dtype):
    """At most the weights, 5 % for buffers, and one tensor on its way."""
    folder = write_random(tmp_path / "model", SMALL, dtype="bfloat16", shard_bytes=1 << 20)
    with new_bytes() as peak:
        model = load_model(folder, SMALL, device=DEVICE, dtype=dtype)
        sizes = [weight.nbytes for weight in model.parameters()]
        assert sum(sizes) <= peak() <= 1.05 * sum(sizes) + max(sizes)
    tensors = [*model.parameters(), model.inv_freq, model.axes]
    assert {tensor.device.type for tensor in tensors} == {DEVICE.type}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", [FullCache(), PackCache()])
def test_the_peak_is_the_planned_one(policy, dtype):
    """Cache and transient together within 10 %, K/V to the byte."""
    model, size, steps = random_model(SMALL, device=DEVICE, dtype=dtype), (128, 128), 1
    latents = 5

    def clip() -> int:
        made = decoder(model, policy, size=size, steps=steps, latents=latents)
        return [result.kv_bytes for result in made.frames(picture(model, size=size))][-1]

    if ON_CUDA:
        clip()  # libraries take their workspaces at their first call, and keep them
    with new_bytes() as peak:
        kv_bytes = clip()
        taken = peak()
    made = plan(
        SMALL,
        size=size,
        frames=4 * latents - 3,
        policy=policy,
        dtype=dtype,
        sampling=Sampling(steps=steps, guidance=3.0),
        text_tokens=len(Vocab(SMALL).prefix(PROMPTS[0], seconds=2, fps=4).ids),
    )
    assert kv_bytes == made.kv_bytes
    assert taken == pytest.approx(made.peak.bytes, rel=0.1)


# --- steps that reuse earlier ones ---------------------------------------------------------------

REUSES = [
    StepReuse(),
    StepReuse(history_every=2, history_share=0.25),
    StepReuse(rest_every=3),
    StepReuse(history_every=9, history_share=0.1, rest_every=9),
]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_the_kernels_say_their_log_sum_exp(dtype, near, size):
    """Flash attention for narrow numbers, the memory-efficient kernel for float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 77, size), (2, 301, size), (2, 301, size))
    q, k, v = (torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes)
    out, lse = attend_lse(q, k, v)
    plain, plain_lse = attend_lse_plain(q, k, v)
    assert (out - plain).abs().max() <= near and out.dtype == dtype
    assert (lse - plain_lse).abs().max() <= 1e-3 and lse.dtype == torch.float32
    parts = (attend_lse(q, k[:, at], v[:, at]) for at in (slice(100), slice(100, None)))
    (one, a), (two, b) = parts
    assert (merge(one, a, two, b) - plain).abs().max() <= 2 * near


@pytest.mark.parametrize("reuse", REUSES[1:])
def test_reuse_gives_the_tokens_it_gives_on_the_cpu(tiny, reuse):
    there = decoder(tiny, PackCache(), steps=5, reuse=reuse, latents=4)
    here = decoder(golden.tiny_model(GOLDEN), PackCache(), steps=5, reuse=reuse, latents=4)
    made = [torch.stack([r.ids for r in run.frames()]) for run in (there, here)]
    check_same(*made)


# --- no waiting ---------------------------------------------------------------------------------


class Watched(Decoder):
    """Raises, from a frame's first step to its last, at whatever waits for the device."""

    steps_seen = 0
    _denoising = False

    def _denoise(self, ids: Tensor, *arguments: Any) -> Tensor:
        self._denoising = True
        try:
            return super()._denoise(ids, *arguments)
        finally:
            self._denoising = False
            if ON_CUDA:
                torch.cuda.set_sync_debug_mode("default")

    def _forward(self, ids: Tensor, *arguments: Any) -> Tensor:
        if self._denoising:  # the frame's noise has been copied by now
            self.steps_seen += 1
            if ON_CUDA:
                torch.cuda.set_sync_debug_mode("error")
        return super()._forward(ids, *arguments)


class Asking(Watched):
    """Asks the device how many tokens are undecided."""

    def _num_mask(self, known: Tensor, step: int) -> Tensor:
        return torch.full((1, 1), int((~known).sum().item()), device=self.device)


@pytest.mark.parametrize("reuse", REUSES)
@pytest.mark.parametrize("policy", [FullCache(), PackCache()])
def test_the_step_loop_never_waits_for_the_device(tiny, policy, reuse):
    made = decoder(tiny, policy, make=Watched, latents=6, reuse=reuse, steps=5)
    assert isinstance(made, Watched)
    list(made.frames())
    assert made.steps_seen == 6 * 5


@pytest.mark.skipif(not ON_CUDA, reason="a CPU is never waited for")
def test_a_step_loop_that_waits_is_caught(tiny):
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        list(decoder(tiny, PackCache(), make=Asking, latents=1).frames())
    assert torch.cuda.get_sync_debug_mode() == 0


# --- the cache ----------------------------------------------------------------------------------

LAYERS, HEADS, HEAD_DIM, TEXT = 2, 2, 32, (13, 3)


def held(policy: Policy, dtype: torch.dtype, device: torch.device | str) -> Iterator[list[bytes]]:
    """The bytes of all K/V after each of nine commits, for the same numbers on any device."""
    frequencies = inverse_frequencies(HEAD_DIM, 10000.0).to(device)
    cache = FrameCache(
        policy, layers=LAYERS, kv_heads=HEADS, head_dim=HEAD_DIM, layout=LAYOUT, text=TEXT,
        rotation=Rotation.mm_rope(frequencies), rebase="slide", dtype=dtype, device=device,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def numbers(tokens: int) -> Tensor:
        drawn = torch.randn(HEADS, tokens, HEAD_DIM, generator=generator)
        return drawn.to(device=device, dtype=dtype)

    spans = [Span.text(TEXT[0]), Span.of_frame(Role.IMAGE, 0, LAYOUT)]
    spans += [Span.of_frame(Role.HISTORY, frame, LAYOUT) for frame in range(1, 9)]
    for span in spans:
        cache.open(span)
        for branch, layer in itertools.product(range(len(TEXT)), range(LAYERS)):
            tokens = TEXT[branch] if span.role is Role.TEXT else span.tokens
            cache.update(layer, numbers(tokens), numbers(tokens), branch)
        cache.commit(ids=np.zeros(span.tokens, np.int32) if span.layout else None)
        yield [bits(x.cpu()) for store in cache.stores for pair in store for x in pair]
    assert cache.delta > 0 and cache.physical_length < cache.logical_length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", [PackCache(), PackCache(n_sinks=1, window=2), SinkWindow()])
def test_packing_and_rebase_write_the_bytes_they_write_on_the_cpu(policy, dtype):
    """Angles are float64 and products float32 on both, so that not a bit differs."""
    pairs = zip(held(policy, dtype, DEVICE), held(policy, dtype, "cpu"), strict=True)
    for number, (there, here) in enumerate(pairs):
        assert there == here, f"commit {number}"
