"""Python as a user writes it, on the embedded model."""

import numpy as np
import pytest
import torch
from PIL import Image

import packcache as pc
from packcache.errors import InvalidSetting
from packcache.lumos.vocab import latent_frames, pixel_frames
from packcache.timeline import Role

PROMPT = "a red 3 moving right"


@pytest.fixture(scope="module")
def gen():
    return pc.load("digits")


def test_latent_frames_are_the_ones_of_the_design():
    assert [latent_frames(n) for n in (1, 24, 25, 48, 49, 384, 385)] == [1, 7, 7, 13, 13, 97, 97]
    assert [pixel_frames(t) for t in (1, 7, 13)] == [1, 25, 49]


def test_clip_has_the_frames_asked_for(gen):
    clip = gen.generate(PROMPT, frames=6, steps=2)
    assert clip.frames.shape == (6, 96, 96, 3) and clip.frames.dtype == np.uint8
    assert clip.codes.shape == (3, 12, 12)
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
    assert shapes == {(96, 96, 3)}


def test_image_is_the_first_frame_and_an_anchor(gen):
    picture = Image.fromarray(gen.generate("a blue 5", frames=1).frames[0])
    clip = gen.generate("a blue 5 moving right", image=picture, frames=25, steps=2)
    assert torch.equal(clip.codes[0], gen.encode_image(picture))
    assert clip.stats.given_latents == 1
    assert all(0 not in kept for kept in clip.stats.kept)  # the image is no history frame
    assert sum(clip.stats.kept[-1].values()) == 160


def test_a_clip_goes_on_from_given_frames(gen):
    """The first given frame is the anchor, the others are clean history that the policy packs."""
    made = gen.generate("a blue 5", frames=13, steps=2)
    clip = gen.generate("a blue 5 moving right", video=made.frames, frames=22, steps=2)
    given = gen.encode_video(made.frames)
    assert clip.frames.shape == (22, 96, 96, 3) and clip.codes.shape == (7, 12, 12)
    assert torch.equal(clip.codes[:4], given)
    assert np.array_equal(clip.frames[:13], gen.pixels(given))
    assert clip.stats.given_latents == 4
    assert [set(kept) for kept in clip.stats.kept[:4]] == [set(), {1}, {1, 2}, {1, 2, 3}]
    assert sum(clip.stats.kept[-1].values()) == 160
    streamed = gen.stream("a blue 5 moving right", video=made.frames, frames=22, steps=2)
    assert np.array_equal(np.stack(list(streamed)), clip.frames)


def test_given_frames_are_history_not_masked_again(gen):
    """A visible token is kept before a re-masked one: of a clean frame none is re-masked."""
    video = np.zeros((5, 96, 96, 3), dtype=np.uint8)
    run = gen.run([PROMPT], video=video, frames=9, steps=1)
    list(run)
    made, given = run.decoder.caches[0].timeline.history  # newest first
    assert given.span.role is made.span.role is Role.HISTORY
    assert given.span.visible_mask().all() and not made.span.visible_mask().all()


def test_one_given_frame_is_an_image(gen):
    frame = gen.generate("a blue 5", frames=1).frames
    video = gen.generate("a blue 5", video=frame, frames=9, steps=2)
    image = gen.generate("a blue 5", image=Image.fromarray(frame[0]), frames=9, steps=2)
    assert torch.equal(video.codes, image.codes) and video.stats.kept == image.stats.kept


def test_prompts_together_go_on_from_the_same_frames(gen):
    video = gen.generate("a blue 5", frames=5, steps=2).frames
    prompts = ["a blue 5 moving right", "a blue 5 moving left"]
    together = gen.generate_many(prompts, video=video, frames=13, steps=2, seed=[3, 4])
    for prompt, seed, clip in zip(prompts, (3, 4), together, strict=True):
        alone = gen.generate(prompt, video=video, frames=13, steps=2, seed=seed)
        assert torch.equal(alone.codes, clip.codes)


BLACK = np.zeros((9, 96, 96, 3), dtype=np.uint8)
WRONG_VIDEOS = {
    "with an image": (
        {"video": BLACK, "image": Image.new("RGB", (96, 96))},
        "both image and video are given: the first frame of video is one",
    ),
    "count": (
        {"video": BLACK[:8]},
        "video has 8 frames, expected 1 \\+ a multiple of 4 \\(1, 5, 9, ...\\): drop frames at its",
    ),
    "none": ({"video": BLACK[:0]}, "video has 0 frames, expected 1 \\+ a multiple of 4"),
    "size": (
        {"video": BLACK[:, :64]},
        "shape \\(9, 64, 96, 3\\), expected uint8 \\[T, 96, 96, 3\\]: scale it first",
    ),
    "dtype": ({"video": BLACK / 255}, "video is float64 of shape .*, expected uint8"),
    "no array": ({"video": 7}, "video is int of shape \\(\\), expected uint8"),
    "list": ({"video": BLACK.tolist()}, "video is list of shape .*, expected uint8"),
    "length": (
        {"video": BLACK, "frames": 9},
        "video has 9 frames of a clip of 9: expected fewer, or more frames",
    ),
}


@pytest.mark.parametrize("case", WRONG_VIDEOS, ids=str)
def test_wrong_videos_get_one_clear_line(gen, case):
    settings, text = WRONG_VIDEOS[case]
    with pytest.raises(InvalidSetting, match=text) as caught:
        gen.generate(PROMPT, **{"frames": 24, **settings})
    assert len(str(caught.value).splitlines()) == 1


def test_cache_is_constant_once_the_window_is_full(gen):
    stats = gen.generate(PROMPT, frames=60, steps=1).stats
    assert len(set(stats.kv_bytes[4:])) == 1 and len(set(stats.capacity_bytes[4:])) == 1
    assert stats.kept[-1] == {15: 80, 14: 40, 13: 20, 12: 20}


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
