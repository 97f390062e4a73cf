"""The sample for VBench: drawn by seed and name alone, written and read back; names of clips."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcache.errors import InputError, InputFileError, InvalidSetting
from packcache.evaluate.vbench import suite
from packcache.evaluate.vbench.names import clip_name, name_fault, slug, twins
from tests.evaluate.vbench_files import PROMPTS, draw, write_suite

MANY = [f"thing number {number}" for number in range(40)]


def as_vbench_reads(name: str) -> str:
    """The prompt of a clip: its name without ending and number (VBench, vbench/utils.py)."""
    return re.sub(r"-\d+$", "", Path(name).stem)


def drawn(chosen: suite.Sample) -> list[str]:
    return [entry.prompt for entry in chosen.entries]


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [*PROMPTS, "a-0", "take 1-2-3", ".hidden", "a.mp4", "-", "日本"])
def test_odd_captions_come_back_from_their_clips(prompt):
    assert name_fault(prompt) is None
    assert as_vbench_reads(clip_name(prompt, 4)) == prompt
    assert Path(f"{prompt}.png").stem == prompt  # the image of custom mode


@given(prompt=st.text(max_size=90), index=st.integers(0, 999))
def test_every_allowed_prompt_comes_back_as_vbench_reads_it(prompt, index):
    if name_fault(prompt) is not None:
        return
    name = clip_name(prompt, index)
    assert as_vbench_reads(name) == prompt == Path(f"{prompt}.png").stem
    assert Path(name).name == name


@pytest.mark.parametrize(
    "prompt, fault",
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("a cat ", "begins or ends with a space"),
        ("cats/dogs", "has a slash"),
        ("cats\\dogs", "has a slash"),
        ("two\nlines", "has a character that cannot be printed"),
        ("nul\0", "has a character that cannot be printed"),
        ("é" * 125, "makes a file name of 256 bytes"),
    ],
)
def test_prompts_that_cannot_be_files_say_why(prompt, fault):
    assert name_fault(prompt) == fault


def test_the_longest_name_is_allowed():
    assert name_fault("a" * 249) is None and name_fault("a" * 250) is not None


def test_capitals_do_not_tell_files_apart():
    assert twins(["A cat", "a dog", "a CAT"]) == ["a CAT"]


def test_policies_have_folders_without_odd_characters():
    assert slug("packcache:budget=2,window=4") == "packcache_budget_2_window_4"
    assert slug("full") == "full"


# --- the draw ---------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_whatever_the_order_and_the_file(tmp_path):
    info, images = write_suite(tmp_path, MANY)
    first = suite.sample(info, images, count=16, seed=3)
    rows = json.loads(info.read_text())
    random.Random(0).shuffle(rows)
    info.write_text(json.dumps(rows))
    assert suite.sample(info, images, count=16, seed=3).entries == first.entries
    full = [
        {"prompt_en": r["caption"], "image_name": r["file_name"], "image_type": r["type"]}
        for r in rows
    ]
    moves = [{**row, "dimension": ["camera_motion"]} for row in full]
    info.write_text(json.dumps([*full, *moves]))
    assert suite.sample(info, images, count=16, seed=3).entries == first.entries


def test_a_smaller_sample_is_a_part_and_another_seed_another_sample(tmp_path):
    info, images = write_suite(tmp_path, MANY)
    large = drawn(suite.sample(info, images, count=20))
    small = drawn(suite.sample(info, images, count=7))
    other = drawn(suite.sample(info, images, count=20, seed=1))
    assert set(small) < set(large) and len(small) == 7
    assert len(large) == 20 and set(other) != set(large)
    assert drawn(suite.sample(info, images, count=40)) == sorted(MANY)


def test_the_draw_is_the_same_for_ever(tmp_path):
    """By `sha256sum` of "0 picture N.jpg", so that others can repeat it."""
    info, images = write_suite(tmp_path, MANY[:6])
    assert drawn(suite.sample(info, images, count=2)) == [MANY[1], MANY[2]]


def test_the_papers_count_is_the_usual_one(tmp_path):
    info, images = write_suite(tmp_path)
    with pytest.raises(InvalidSetting, match="count is 160, expected 1 to 5, the images there are"):
        suite.sample(info, images)


def test_a_sample_comes_back_from_its_file(tmp_path):
    chosen = draw(tmp_path / "suite", clips=2)
    (tmp_path / "here").mkdir()
    told = chosen.to_json(tmp_path / "here")
    path = tmp_path / "here" / "sample.json"
    path.write_text(json.dumps(told))
    again = suite.read_sample(path)
    assert told["schema"] == "packcache.vbench/1" and told["images"] == "../suite/crop"
    assert (again.entries, again.clips, again.draw) == (chosen.entries, 2, chosen.draw)
    assert again.suite == {
        "file": "i2v-bench-info.json", "sha256": chosen.suite["sha256"], "images": 5,
    }  # fmt: skip
    again.check()
    assert [(e.prompt, i) for e, i in again.asked()] == [
        (p, i) for p in drawn(chosen) for i in range(2)
    ]


def test_camera_prompts_are_of_images_without_a_subject(tmp_path):
    chosen = draw(tmp_path, count=5, camera=True)
    kinds = {entry.prompt: entry.kind for entry in chosen.entries}
    assert len(kinds) == 3 + 2 * 8
    moves = [prompt for prompt in kinds if "camera" in prompt]
    assert len(moves) == 14 and {kinds[p] for p in moves} == {"architecture", "indoor"}
    assert "a hall, camera tilts down" in moves


def test_longer_captions_are_told_to_the_model_and_names_stay(tmp_path):
    info, images = write_suite(tmp_path, ["a hall", "a pier"])
    rows = json.loads(info.read_text())
    rows[0]["type"] = "indoor"
    info.write_text(json.dumps(rows))
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"a hall": "A very long hall", "a pier": "A pier at dusk"}))
    chosen = suite.sample(info, images, count=2, camera=True, captions=captions)
    told = {entry.prompt: entry.caption for entry in chosen.entries}
    assert told["a pier"] == "A pier at dusk"
    assert told["a hall, camera static"] == "A very long hall, camera static"
    captions.write_text(json.dumps({"a hall": "A very long hall"}))
    with pytest.raises(InputError, match="captions have none for prompt 'a pier': add it, or"):
        suite.sample(info, images, count=2, captions=captions)
    captions.write_text("[1]")
    with pytest.raises(InputFileError, match="holds something else: expected an object of texts"):
        suite.sample(info, images, count=2, captions=captions)


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"count": 0}, "count is 0, expected 1 to 5"),
        ({"count": 6}, "count is 6, expected 1 to 5, the images there are"),
        ({"clips": 0}, "clips is 0, expected 1 to 5"),
        ({"clips": 6}, "clips is 6, expected 1 to 5, which VBench looks at"),
    ],
)
def test_wrong_settings_are_named(tmp_path, settings, text):
    with pytest.raises(InvalidSetting, match=text):
        draw(tmp_path, **settings)


@pytest.mark.parametrize(
    "told, text",
    [
        ("{}", "holds no list of images: expected i2v-bench-info.json or"),
        ("[]", "holds no list of images"),
        ("[3]", "entry 0: expected texts named caption, file_name, type or prompt_en, image_name"),
        ('[{"caption": "", "file_name": "a.jpg", "type": "food"}]', "entry 0: expected texts"),
        ('[{"caption": "a", "file_name": "../a.jpg", "type": "food"}]', "is no file name"),
        ("no", r"is not JSON \(.*\): expected i2v-bench-info.json"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path, told, text):
    info, images = write_suite(tmp_path)
    info.write_text(told)
    with pytest.raises(InputFileError, match=text):
        suite.sample(info, images, count=1)


def test_files_that_are_not_there_are_named(tmp_path):
    info, images = write_suite(tmp_path)
    with pytest.raises(InputFileError, match=r"none\.json does not exist: expected i2v-bench-info"):
        suite.sample(tmp_path / "none.json", images, count=1)
    with pytest.raises(InputFileError, match=r"picture \d\.jpg cannot be read \(No such file"):
        suite.sample(info, tmp_path / "elsewhere", count=1)


def test_an_image_named_twice_is_refused(tmp_path):
    info, images = write_suite(tmp_path)
    rows = json.loads(info.read_text())
    info.write_text(json.dumps([*rows, rows[0]]))
    with pytest.raises(InputFileError, match=r"names image 'picture 0\.jpg' twice"):
        suite.sample(info, images, count=2)


@pytest.mark.parametrize(
    "prompts, text",
    [
        (["cats/dogs"], "prompt 'cats/dogs' has a slash: clips cannot be called by it"),
        (["a" * 300], "makes a file name of 306 bytes"),
        (["a cat", "A CAT"], "prompt 'a cat' is there twice: clips cannot be told apart"),
    ],
)
def test_prompts_without_a_usable_name_are_refused(tmp_path, prompts, text):
    info, images = write_suite(tmp_path, prompts)
    with pytest.raises(InputError, match=text):
        suite.sample(info, images, count=len(prompts))


def test_an_image_that_changed_since_is_found(tmp_path):
    chosen = draw(tmp_path)
    chosen.image(chosen.entries[0]).write_bytes(b"another")
    with pytest.raises(InputFileError, match="is not the image that was drawn: draw the sample"):
        chosen.check()


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "other"}, {"entries": []}, {"entries": [{"prompt": "a"}]}, {"clips": 6},
        {"clips": "2"}, {"images": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_sample_is_refused(tmp_path, change):
    path = tmp_path / "sample.json"
    path.write_text(json.dumps({**draw(tmp_path).to_json(tmp_path), **change}))
    with pytest.raises(InputFileError, match="is of something else: expected a file of packcache"):
        suite.read_sample(path)
