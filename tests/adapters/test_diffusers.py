"""diffusers' Wan and SkyReels-V2: the kit, every object put back, back ends, rebase, wrong use."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from diffusers import SanaTransformer2DModel, SkyReelsV2Transformer3DModel
from torch import Tensor

from packcache.adapters.diffusers import MODELS, install
from packcache.adapters.diffusers_subject import _TINY as TINY
from packcache.adapters.diffusers_subject import DiffusersSubject, tiny_skyreels, tiny_wan
from packcache.errors import CacheStateError, InvalidSetting
from packcache.policies import FullCache, PackCache, SinkWindow, SlidingWindow
from packcache.positions import advance_keys
from packcache.testing.conformance import check
from packcache.testing.subjects import SUBJECTS

SIZE, CHUNK = 6, 3


@pytest.fixture
def wan() -> DiffusersSubject:
    return DiffusersSubject("wan", tiny_wan())


def play(subject: DiffusersSubject, installed, chunks: int, branch: str = "cond") -> list[Tensor]:
    """Chunk after chunk: two noisy forwards, then the clean one that stays."""
    outputs = []
    for piece in range(chunks):
        for seed in (1, 2):
            with installed.frame(branch=branch):
                subject.run(*subject.inputs(piece, seed))
        with installed.frame(commit=True, branch=branch):
            outputs.append(subject.run(*subject.inputs(piece, 0)))
    return outputs


@pytest.mark.parametrize("name", ["wan", "skyreels"])
def test_they_pass_the_kit(name):
    report = check(SUBJECTS[name]())
    assert report.ok, "\n".join(report.lines())
    assert {found.state for found in report.findings} == {"holds"}


def test_the_kit_finds_a_forgotten_offset(wan, monkeypatch):
    from packcache.adapters import diffusers as adapter

    monkeypatch.setattr(
        adapter._Rope, "_from", lambda self, first, tokens, hidden: self.inner(hidden)
    )
    assert set(check(wan).failed) >= {"unlimited", "bounded", "positions"}


def test_all_of_the_named_models_exist():
    import diffusers

    assert all(hasattr(diffusers, name) for name in MODELS)


def test_skyreels_own_block_causal_mask_is_a_cache_that_keeps_all():
    """Its published way of blocks of three latent frames, in one forward."""
    subject = DiffusersSubject("skyreels", tiny_skyreels())
    whole = SkyReelsV2Transformer3DModel(**TINY, num_frame_per_block=CHUNK).eval()
    whole.load_state_dict(subject.model.state_dict())
    latents = torch.cat([subject.inputs(piece, 0)[0] for piece in range(4)], dim=2)
    own = DiffusersSubject("whole", whole)
    with torch.inference_mode():
        expected = own.run(latents)
        found = torch.cat(play(subject, install(subject.model, FullCache()), 4))
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.std())


# --- in and out ----------------------------------------------------------------------------------


def test_every_object_is_put_back(wan):
    before = [block.attn1.processor for block in wan.model.blocks], wan.model.rope
    names = set(wan.model.state_dict())
    installed = install(wan.model, PackCache(budget=3, window=9))
    play(wan, installed, 2)
    assert set(wan.model.state_dict()) == names
    installed.uninstall()
    assert wan.model.rope is before[1]
    assert all(
        block.attn1.processor is own for block, own in zip(wan.model.blocks, before[0], strict=True)
    )
    install(wan.model, PackCache())  # and there is room for another


@pytest.fixture
def native():
    """diffusers chooses a back end for all models at once; as it was, afterwards."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry.get_active_backend()[0]
    yield
    registry.set_active_backend(before)


@pytest.mark.usefixtures("native")
def test_a_back_end_is_kept(wan):
    """Chosen before, and chosen while the cache is there."""
    wan.model.set_attention_backend("native")
    installed = install(wan.model, FullCache())
    first = play(wan, installed, 2)
    processors = [block.attn1.processor for block in wan.model.blocks]
    assert {str(p._attention_backend) for p in processors} == {
        str(p.inner._attention_backend) for p in processors
    }
    wan.model.set_attention_backend("_native_math")
    installed.reset()
    second = play(wan, installed, 2)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(first, second, strict=True))
    installed.uninstall()
    for block in wan.model.blocks:
        assert block.attn1.processor._attention_backend == "_native_math"


def test_fused_projections_are_the_same(wan):
    plain = play(wan, install(wan.model, PackCache(budget=3, window=9)), 3)
    fused = DiffusersSubject("fused", tiny_wan())
    for block in fused.model.blocks:
        block.attn1.fuse_projections()
    made = play(fused, install(fused.model, PackCache(budget=3, window=9)), 3)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, made, strict=True))


def test_chunks_may_be_of_any_number_of_frames(wan):
    """One frame first, then three at a time, as some pipelines do."""
    installed = install(wan.model, FullCache())
    latents = torch.cat([wan.inputs(piece, 0)[0] for piece in range(2)], dim=2)[:, :, :4]
    with torch.inference_mode():
        for part in latents.split([1, 3], dim=2):
            with installed.frame(commit=True) as cache:
                wan.run(part)
    assert cache is None or cache.timeline.num_frames == 4
    assert installed.caches["cond"].timeline.counts() == dict.fromkeys(range(4), SIZE)


def test_branches_have_names_and_caches_of_their_own(wan):
    installed = install(wan.model, PackCache(budget=3, window=9))
    play(wan, installed, 3)
    held = copy.deepcopy(installed.caches["cond"].stores[0].keys(0))
    play(wan, installed, 5, branch="uncond")
    assert set(installed.caches) == {"cond", "uncond"}
    assert torch.equal(held, installed.caches["cond"].stores[0].keys(0))


def test_held_bytes_are_the_policys_prediction(wan):
    policy = PackCache(budget=2, window=4)
    installed = install(wan.model, policy)
    play(wan, installed, 4)
    history = policy.max_history(SIZE, policy.budget_for(SIZE))
    assert installed.caches["cond"].kv_bytes == history * 2 * 2 * 48 * 4  # K and V, layers, width


def test_condition_images_never_leave(wan):
    installed = install(wan.model, SlidingWindow(frames=1), image_frames=2)
    play(wan, installed, 4)
    timeline = installed.caches["cond"].timeline
    assert [entry.span.frame for entry in timeline.anchors] == [0, 1]
    assert list(timeline.counts()) == [4 * CHUNK - 1]


def test_a_batch_is_its_rows(wan):
    """Both halves of guidance in one call, as many pipelines do it."""
    both, alone = (copy.deepcopy(wan.model) for _ in range(2))
    policy = PackCache(budget=3, window=9)
    pair, single = install(both, policy), install(alone, policy)
    for piece in range(4):
        latents = torch.cat([wan.inputs(piece, seed)[0] for seed in (0, 5)])
        zero, text = torch.zeros(2), wan.prompt.expand(2, -1, -1)
        with torch.inference_mode(), pair.frame(commit=True):
            two = both(latents, zero, text).sample
        with torch.inference_mode(), single.frame(commit=True):
            one = alone(latents[1:], zero[1:], text[1:]).sample
        assert torch.allclose(two[1:], one, atol=1e-5)


# --- positions -----------------------------------------------------------------------------------


def test_time_carries_the_first_pairs(wan):
    from packcache.adapters.diffusers import _rotated

    installed = install(wan.model, FullCache())
    keys = torch.randn(1, SIZE, 2, 24, dtype=torch.float64)
    rope = wan.model.rope
    tables = [rope._from(first, SIZE, torch.empty(1, 4, 1, 4, 6)) for first in (2, 7)]
    here, later = (_rotated(keys, *table) for table in tables)
    turned = advance_keys(here.transpose(1, 2), 5, rope.rotation()).transpose(1, 2)
    assert torch.allclose(turned, later, atol=1e-6)
    installed.uninstall()


def test_rebase_moves_sinks_only(wan):
    """Beside absolute positions: other outputs once the clip is longer than trained, not before."""
    trained = 2 * CHUNK + 1
    policy = SinkWindow(sinks=1, frames=CHUNK)
    made = {
        mode: play(
            DiffusersSubject(mode, model), install(model, policy, positions=mode, **settings), 5
        )
        for mode, model, settings in (
            ("absolute", copy.deepcopy(wan.model), {}),
            ("rebase", copy.deepcopy(wan.model), {"trained_latent_frames": trained}),
        )
    }
    equal = [torch.equal(a, b) for a, b in zip(*made.values(), strict=True)]
    assert equal == [True, True, True, False, False]


def test_a_clip_longer_than_the_table_is_one_line():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        from diffusers import WanTransformer3DModel

        model = WanTransformer3DModel(**TINY, rope_max_seq_len=8).eval()
    subject = DiffusersSubject("short", model)
    installed = install(model, SlidingWindow(frames=1))
    with pytest.raises(InvalidSetting, match="latent frame 8 lies behind the 8 that the rotary"):
        play(subject, installed, 3)
    assert installed.caches["cond"].timeline.num_frames == 6 and not installed.is_on


# --- wrong use -----------------------------------------------------------------------------------


def test_a_model_that_is_not_supported_is_named_with_those_that_are():
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=1, cross_attention_head_dim=8, cross_attention_dim=8,
        caption_channels=8, sample_size=4,
    )  # fmt: skip
    with pytest.raises(InvalidSetting, match=r"SanaTransformer2DModel is not supported: "):
        install(model, PackCache())


def test_a_second_install_is_refused_and_the_first_goes_on(wan):
    installed = install(wan.model, PackCache(budget=3, window=9))
    with pytest.raises(InvalidSetting, match=r"already: uninstall\(\) it first"):
        install(wan.model, FullCache())
    play(wan, installed, 2)


def test_a_frame_in_a_frame_and_other_things_out_of_order(wan):
    installed = install(wan.model, PackCache(budget=3, window=9))
    with installed.frame():
        for wrong in (
            lambda: installed.frame().__enter__(), installed.uninstall, installed.reset,
        ):  # fmt: skip
            with pytest.raises(CacheStateError, match="a frame is open"):
                wrong()
        wan.run(*wan.inputs(0, 0))
    installed.uninstall()
    for wrong in (installed.uninstall, lambda: installed.frame().__enter__()):
        with pytest.raises(CacheStateError, match="not in the transformer any more"):
            wrong()


def test_a_frame_left_without_a_forward(wan):
    installed = install(wan.model, PackCache(budget=3, window=9))
    with pytest.raises(CacheStateError, match="left without a forward"), installed.frame():
        pass
    play(wan, installed, 1)


def test_an_error_inside_a_frame_leaves_the_cache_as_it_was(wan):
    installed = install(wan.model, PackCache(budget=3, window=9))
    play(wan, installed, 2)
    cache = installed.caches["cond"]
    before = cache.stores[0].keys(0).clone(), cache.logical_length
    with pytest.raises(ZeroDivisionError), installed.frame(commit=True):
        wan.run(*wan.inputs(2, 0))
        raise ZeroDivisionError
    assert torch.equal(before[0], cache.stores[0].keys(0)) and cache.logical_length == before[1]
    assert not cache.is_open and not installed.is_on


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 4, 3, 4, 6), torch.float32, r"are \(2, 2, 24\) in torch.float32, and were \(1, 2"),
        ((1, 4, 3, 4, 8), torch.float32, "a latent frame has 2 x 4 tokens, and had 2 x 3"),
        ((1, 4, 3, 4, 6), torch.bfloat16, "in torch.bfloat16, and were"),
    ],
)
def test_another_shape_or_dtype_midway(wan, shape, dtype, message):
    installed = install(wan.model, PackCache(budget=3, window=9))
    play(wan, installed, 2)
    held = installed.caches["cond"].logical_length
    wan.model.to(dtype)
    with pytest.raises((CacheStateError, InvalidSetting), match=message), installed.frame():
        wan.model(
            torch.zeros(shape, dtype=dtype), torch.zeros(shape[0]),
            wan.prompt.expand(shape[0], -1, -1).to(dtype),
        )  # fmt: skip
    assert installed.caches["cond"].logical_length == held
    wan.model.to(torch.float32)
    play(wan, installed, 1)


def test_settings_are_checked(wan):
    with pytest.raises(InvalidSetting, match="image_frames is -1, expected at least 0"):
        install(wan.model, PackCache(), image_frames=-1)


def test_without_diffusers_the_extra_is_named():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import packcache\n"
        "try: import packcache.adapters.diffusers\n"
        "except packcache.InvalidSetting as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'packcache[diffusers]'" in result.stdout, result.stderr
