"""From a checkpoint folder to a clip: every task, and one clear line for every wrong file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import packcache as pc
from packcache.errors import InputError, InputFileError, InvalidSetting
from packcache.lumos.image import crop_sizes
from packcache.lumos.text import LumosTokenizer
from packcache.models import load_config
from tests.lumos.folder import TINY, write_codec, write_folder
from tests.lumos.tokenizer_file import write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

#: Small enough for a test: 4 x 8 tokens, P = 40.
SMALL = {"size": (64, 32), "steps": 1}
PROMPT = "a cat walks through the snow"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), shard_bytes=9 << 20)


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> Path:
    return write_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def gen(folder, codec) -> pc.Pipeline:
    return pc.load(folder, codec=codec, dtype="float32")


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    """The folder, to be spoiled."""
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def test_a_folder_becomes_a_pipeline(gen, folder):
    assert len(list(folder.glob("*.safetensors"))) >= 2
    assert gen.dtype == torch.float32 and gen.device.type == "cpu"
    assert gen.size == (672, 384) and gen.fps == 12 and isinstance(gen.tokenize, LumosTokenizer)
    assert gen.model.config == load_config(folder) == TINY
    assert gen.sampling == pc.Sampling()


def test_the_stored_dtype_is_the_default(folder, codec):
    gen = pc.load(str(folder.parent), subfolder=folder.name, codec=codec)
    assert gen.dtype == torch.bfloat16 and gen.model.inv_freq.dtype == torch.float32
    clip = gen.generate(PROMPT, frames=6, **SMALL)
    assert clip.frames.shape == (6, 32, 64, 3) and clip.codes.shape == (3, 4, 8)


def test_our_own_fields_can_be_overridden(folder, codec):
    gen = pc.load(folder, codec=codec, trained_latent_frames=None)
    assert gen.model.config.trained_latent_frames is None
    assert load_config(folder, trained_latent_frames=25).trained_latent_frames == 25


# --- tasks ----------------------------------------------------------------------------------------


def test_text_to_image_states_one_frame_of_one_second(gen):
    run = gen.run([PROMPT], frames=1, **SMALL)
    ids = run.decoder.prefixes[0].ids
    assert ids[-3:] == (9004, 8804 + 1, 8804 + 1)
    assert gen.generate(PROMPT, frames=1, **SMALL).frames.shape == (1, 32, 64, 3)


@pytest.mark.parametrize(
    "frames, seconds", [(24, 2), (25, 2), (26, 3), (48, 4), (49, 4), (7, 1), (2000, 167)]
)
def test_text_and_header_state_the_duration(gen, frames, seconds):
    prefix = gen.run([PROMPT], frames=frames, **SMALL).decoder.prefixes[0]
    assert prefix.ids[-3:] == (9004, 8804 + seconds, 8804 + 12)
    digits = [16399 + int(digit) for digit in str(12 * seconds)]
    assert str(digits)[1:-1] in str(list(prefix.ids))


def test_duration_and_rate_can_be_stated(gen):
    run = gen.run([PROMPT], frames=49, fps=8, seconds=2, **SMALL)
    assert run.decoder.prefixes[0].ids[-2:] == (8806, 8812) and run.fps == 8


def test_an_endless_clip_states_what_the_model_was_trained_on(gen):
    run = gen.run([PROMPT], frames=None, **SMALL)
    assert run.decoder.prefixes[0].ids[-2:] == (8804 + 2, 8804 + 12)


def test_a_clip_too_long_to_be_stated_states_the_most_there_is(gen, caplog):
    run = gen.run([PROMPT], frames=2400, **SMALL)
    assert run.decoder.latents == 601 and run.header.seconds == 198
    assert "the clip lasts 200 s; 198 is the most that can be stated" in caplog.text
    assert gen.run([PROMPT], frames=2400, seconds=2, **SMALL).header.seconds == 2
    with pytest.raises(InvalidSetting, match=r"duration in seconds is 200, expected 0\.\.198"):
        gen.run([PROMPT], frames=2400, seconds=200, **SMALL)


def test_image_to_video_and_its_continuation(gen):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (32, 64, 3), dtype=np.uint8))
    clip = gen.generate(PROMPT, image=picture, frames=11, **SMALL)
    assert clip.frames.shape == (11, 32, 64, 3)
    assert torch.equal(clip.codes[0], gen.encode_image(picture, (64, 32)))
    more = gen.generate(PROMPT, video=clip.frames[:9], frames=20, **SMALL)
    assert more.frames.shape == (20, 32, 64, 3) and more.stats.given_latents == 3
    assert torch.equal(more.codes[:3], gen.encode_video(clip.frames[:9]))


def test_a_picture_picks_its_size_from_the_crop_table(gen):
    wide = Image.new("RGB", (1400, 800))
    assert gen.run([PROMPT], frames=5, image=wide, steps=1).size == (672, 384)
    assert gen.run([PROMPT], frames=5, image=wide, steps=1, size=352).size == (448, 256)
    tall = Image.new("RGB", (300, 900))
    assert gen.run([PROMPT], frames=5, image=tall, steps=1, size=352).size == (192, 576)


@pytest.mark.parametrize("target", [352, 528, 656])
def test_every_size_of_the_crop_table_is_a_grid(gen, target):
    for width, height in crop_sizes(target):
        layout = gen.run([PROMPT], frames=5, size=(width, height)).decoder.layout
        assert (layout.rows, layout.cols) == (height // 8, width // 8)


def test_any_clip_is_made_to_fit(gen, caplog):
    video = np.zeros((12, 50, 90, 3), dtype=np.uint8)
    fitted = gen.fit_video(video, (64, 32))
    assert fitted.shape == (9, 32, 64, 3)
    assert "the video is 12 frames of 90x50: resized and cropped to 64x32, first 3" in caplog.text


def test_several_pictures_for_several_prompts(gen):
    pictures = [Image.new("RGB", (64, 32), colour) for colour in ("red", "blue")]
    clips = gen.generate_many([PROMPT, "a dog"], image=pictures, frames=5, **SMALL)
    for clip, picture in zip(clips, pictures, strict=True):
        assert torch.equal(clip.codes[0], gen.encode_image(picture, (64, 32)))
    alone = gen.generate("a dog", image=pictures[1], frames=5, **SMALL)
    assert torch.equal(clips[1].codes, alone.codes)
    with pytest.raises(InvalidSetting, match="2 images for 1 prompts: give one or one each"):
        gen.generate_many([PROMPT], image=pictures, frames=5, **SMALL)


def test_guidance_one_allocates_nothing_for_a_second_branch(gen):
    both = gen.run([PROMPT], frames=9, **SMALL).decoder
    one = gen.run([PROMPT], frames=9, guidance=1.0, **SMALL).decoder
    for decoder in (both, one):
        list(decoder.frames())
    assert len(one.caches[0].stores) == 1 and len(both.caches[0].stores) == 2
    assert one.caches[0].capacity_bytes < 0.7 * both.caches[0].capacity_bytes


def test_long_prompts_are_read_whole_and_too_long_ones_refused(gen):
    prefix = gen.run(["a cat " * 900], frames=5, **SMALL).decoder.prefixes[0]
    assert len(prefix.ids) > 2700
    with pytest.raises(InputError, match=r"the prompt has \d+ tokens, expected at most 36948"):
        gen.run(["snow " * 20000], frames=5, size=(672, 384))


def test_streamed_frames_are_those_of_the_whole_clip(gen):
    """The codec reaches two latent frames back, the overlap is four: no seam."""
    clip = gen.generate(PROMPT, frames=41, **SMALL)
    streamed = np.stack(list(gen.stream(PROMPT, frames=41, **SMALL)))
    assert np.array_equal(streamed, clip.frames)


# --- wrong files --------------------------------------------------------------------------------


def config_with(folder: Path, **changes: object) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize("name", ["frames", "fps", "seconds"])
@pytest.mark.parametrize(
    "value, expected",
    [(0, "at least 1"), (-3, "at least 1"), (2.5, "a whole number"), (True, "a whole number")],
)
def test_counts_are_counts(gen, name, value, expected):
    settings = {"frames": 5, name: value}
    with pytest.raises(InvalidSetting, match=f"{name} is {value}, expected {expected}"):
        gen.generate(PROMPT, **settings, **SMALL)


def test_a_clip_has_a_length_and_a_size(gen):
    with pytest.raises(InvalidSetting, match="frames is None: a clip needs a length"):
        gen.generate(PROMPT, frames=None, **SMALL)
    with pytest.raises(InvalidSetting, match="size is -128, expected 32 to 4096"):
        gen.generate(PROMPT, frames=5, size=-128)


WRONG = {
    "one text": ({"prompts": "abc"}, r"prompts is one text, expected a list of them: \[prompt\]"),
    "setting": ({"foo": 1}, "foo unknown, expected greedy, guidance, history_mask_ratio"),
    "size": ({"size": "64x32"}, "size is '64x32', expected 32 to 4096, or"),
    "array": ({"image": np.zeros((3, 3))}, "image is ndarray, expected a file's name, or a PIL"),
    "empty image": (
        {"image": Image.new("RGB", (0, 9))},
        "image is Image, expected .* a PIL image with pixels",
    ),
    "policy": ({"policy": "best"}, "best"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_get_one_clear_line(gen, case):
    settings, text = WRONG[case]
    settings = {"prompts": [PROMPT], "frames": 5, **SMALL, **settings}
    with pytest.raises(InvalidSetting, match=text) as told:
        gen.generate_many(**settings)
    assert len(str(told.value).splitlines()) == 1


def test_policies_have_names(gen):
    made = gen.generate(PROMPT, frames=5, policy="packcache:window=2", **SMALL)
    assert made.policy == pc.PackCache(window=2)


def test_results_name_the_model_and_all_that_decides(gen, folder, codec):
    made = pc.load(folder.parent, subfolder=folder.name, codec=codec, dtype="float32")
    assert gen.name == folder.name and made.name == f"{folder.parent.name}/{folder.name}"
    work = gen.generate(PROMPT, frames=5, positions="absolute", **SMALL).to_json()["workload"]
    assert (work["model"], work["positions"], work["rebase"]) == (gen.name, "absolute", "trained")
    assert work["given_latent_frames"] == 0


def test_no_codec_is_wrong_use(folder):
    with pytest.raises(InvalidSetting, match="no codec: give codec="):
        pc.load(folder)


def test_a_codec_of_another_compression_is_found_before_the_weights(copied, tmp_path):
    for file in copied.glob("*.safetensors"):
        file.unlink()
    wrong = write_codec(tmp_path / "wrong", patch=16)
    with pytest.raises(InputFileError, match="4x16x16"):
        pc.load(copied, codec=wrong)


def test_a_missing_encoder_is_missed_by_pictures_only(folder, tmp_path):
    gen = pc.load(folder, codec=write_codec(tmp_path / "half", encoder=False))
    assert len(gen.generate(PROMPT, frames=5, **SMALL).frames) == 5
    with pytest.raises(InputFileError, match=r"encoder\.jit does not exist"):
        gen.generate(PROMPT, frames=5, image=Image.new("RGB", (64, 32)), **SMALL)


def test_another_models_tokenizer_is_refused(copied, codec):
    write_tokenizer(copied / "tokenizer.json", wrong=True)
    with pytest.raises(InputFileError, match="most likely another model's tokenizer"):
        pc.load(copied, codec=codec)


def test_the_tokenizer_may_lie_elsewhere(copied, codec, tmp_path):
    (tmp_path / "words").mkdir()
    (copied / "tokenizer.json").rename(tmp_path / "words" / "tokenizer.json")
    with pytest.raises(InputFileError, match=r"tokenizer\.json does not exist"):
        pc.load(copied, codec=codec)
    assert pc.load(copied, codec=codec, tokenizer=tmp_path / "words").tokenize


def test_a_config_of_another_size_is_refused(copied, codec):
    config_with(copied, hidden_size=64)
    with pytest.raises(InputFileError, match="hidden_size"):
        pc.load(copied, codec=codec)


def test_a_missing_shard_is_named(copied, codec):
    last = sorted(copied.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(InputFileError, match=last.name):
        pc.load(copied, codec=codec)


def test_ids_outside_the_vocabulary_are_refused(gen):
    wrong = pc.Pipeline(**{**vars(gen), "tokenize": lambda prompt, header: [5, 129536]})
    with pytest.raises(InputError, match="text id 129536 lies outside the vocabulary"):
        wrong.generate(PROMPT, frames=5, **SMALL)


def test_pictures_with_transparency_or_one_channel_become_rgb(gen):
    clear = Image.new("RGBA", (64, 32), (255, 0, 0, 0))
    white = Image.new("RGB", (64, 32), "white")
    grey, same = Image.new("L", (64, 32), 90), Image.new("RGB", (64, 32), (90, 90, 90))
    for one, other in ((clear, white), (grey, same)):
        assert torch.equal(gen.encode_image(one, (64, 32)), gen.encode_image(other, (64, 32)))


def test_odd_pictures_are_cropped_and_odd_sizes_refused(gen, caplog):
    clip = gen.generate(PROMPT, image=Image.new("RGB", (333, 217)), frames=5, **SMALL)
    assert clip.frames.shape == (5, 32, 64, 3)
    assert "the image is 333x217: resized and cropped to 64x32" in caplog.text
    with pytest.raises(InvalidSetting, match="width is 500 pixels, expected a positive multiple"):
        gen.generate(PROMPT, frames=5, size=(500, 300))


def test_the_embedded_model_takes_a_device_and_a_dtype_only(codec):
    assert pc.load("digits", device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(InvalidSetting, match="comes with its codec and language"):
        pc.load("digits", codec=codec)


def test_a_folder_can_hold_the_embedded_model(tmp_path):
    from packcache.lumos.weights import save_model

    digits = pc.load("digits")
    save_model(digits.model, tmp_path / "mine")
    mine = pc.load(tmp_path / "mine", codec="digits", tokenizer="digits", device="cpu")
    one, other = (
        gen.generate("a red 3", frames=5, steps=2, size=(96, 96), guidance=3.0, seconds=2)
        for gen in (digits, mine)
    )
    assert torch.equal(one.codes, other.codes)


def test_a_codec_that_is_not_the_models(folder):
    with pytest.raises(InputError, match=r"the embedded codec has levels \(8, 8, 5, 5\)"):
        pc.load(folder, codec="digits")
