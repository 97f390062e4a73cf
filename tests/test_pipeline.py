"""Python as a user writes it, on the embedded model."""

import numpy as np
import pytest
import torch
from PIL import Image

import packcache as pc
from packcache.errors import InvalidSetting
from packcache.lumos.vocab import latent_frames, pixel_frames

PROMPT = "a red 3 moving right"


@pytest.fixture(scope="module")
def gen():
    return pc.load("digits")


def test_latent_frames_are_the_ones_of_the_design():
    assert [latent_frames(n) for n in (1, 24, 25, 48, 49, 384, 385)] == [1, 7, 7, 13, 13, 97, 97]
    assert [pixel_frames(t) for t in (1, 7, 13)] == [1, 25, 49]


def test_clip_has_the_frames_asked_for(gen):
    clip = gen.generate(PROMPT, frames=6, steps=2)
    assert clip.frames.shape == (6, 64, 64, 3) and clip.frames.dtype == np.uint8
    assert clip.codes.shape == (3, 8, 8)
    assert len(clip.stats.frame_s) == len(clip.stats.kept) == len(clip.stats.kv_bytes) == 3
    assert clip.stats.total_s == pytest.approx(clip.stats.prefill_s + sum(clip.stats.frame_s))


def test_runs_repeat_and_seeds_differ(gen):
    one, same, other = (gen.generate(PROMPT, frames=9, steps=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.codes, same.codes)
    assert not torch.equal(one.codes, other.codes)


def test_policies_share_their_noise_until_the_first_eviction(gen):
    full = gen.generate(PROMPT, frames=13, steps=3, policy=pc.FullCache())
    packed = gen.generate(PROMPT, frames=13, steps=3, policy=pc.PackCache())
    assert torch.equal(full.codes[:2], packed.codes[:2])


def test_prompts_together_are_the_prompts_alone(gen):
    prompts = [PROMPT, "a blue 7 moving up"]
    together = gen.generate_many(prompts, frames=9, steps=3, seed=[3, 4])
    for prompt, seed, clip in zip(prompts, (3, 4), together, strict=True):
        alone = gen.generate(prompt, frames=9, steps=3, seed=seed)
        assert torch.equal(alone.codes, clip.codes)
        assert clip.prompt == prompt and clip.seed == seed


def test_stream_is_generate_frame_by_frame(gen):
    clip = gen.generate(PROMPT, frames=10, steps=2)
    streamed = np.stack(list(gen.stream(PROMPT, frames=10, steps=2)))
    assert np.array_equal(streamed, clip.frames)


def test_stream_without_an_end(gen):
    endless = gen.stream(PROMPT, steps=1)
    shapes = {next(endless).shape for _ in range(11)}
    assert shapes == {(64, 64, 3)}


def test_image_is_the_first_frame_and_an_anchor(gen):
    picture = Image.fromarray(gen.generate("a blue 5", frames=1).frames[0])
    clip = gen.generate("a blue 5 moving right", image=picture, frames=25, steps=2)
    assert torch.equal(clip.codes[0], gen.encode_image(picture))
    assert clip.stats.given_latents == 1
    assert all(0 not in kept for kept in clip.stats.kept)  # the image is no history frame
    assert sum(clip.stats.kept[-1].values()) == 76


def test_cache_is_constant_once_the_window_is_full(gen):
    stats = gen.generate(PROMPT, frames=60, steps=1).stats
    assert len(set(stats.kv_bytes[4:])) == 1 and len(set(stats.capacity_bytes[4:])) == 1
    assert stats.kept[-1] == {15: 38, 14: 19, 13: 10, 12: 9}


def test_guidance_one_has_no_second_branch(gen):
    both = gen.generate(PROMPT, frames=5, steps=1)
    single = gen.generate(PROMPT, frames=5, steps=1, guidance=1.0)
    assert single.stats.kv_bytes[0] < 0.6 * both.stats.kv_bytes[0]


def test_wrong_calls_say_what_is_right(gen):
    with pytest.raises(InvalidSetting, match="frames is 0, expected at least 1"):
        gen.generate(PROMPT, frames=0)
    with pytest.raises(InvalidSetting, match="2 seeds for 1 prompts"):
        gen.generate(PROMPT, seed=[1, 2])
    with pytest.raises(InvalidSetting, match="no prompt: expected at least one"):
        gen.generate_many([])
    with pytest.raises(InvalidSetting, match="unknown model 'x': known are digits"):
        pc.load("x")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pc.nothing  # noqa: B018
