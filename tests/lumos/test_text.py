"""The wording, the ids of captions, and tokenizers of other models (lumos1-spec 1.5, 3.1)."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcache.errors import InputFileError, InvalidSetting
from packcache.lumos.config import SIZES, TokenIds
from packcache.lumos.text import (
    Header,
    LumosTokenizer,
    load_tokenizer,
    template,
    template_ids,
    template_report,
)
from packcache.lumos.vocab import Vocab
from tests.lumos.tokenizer_file import WORDS, tokenizer_json, write_tokenizer

REAL = SIZES["3b"]
CLIP = Header(width=672, height=384, seconds=2, fps=12)
WAY_OUT = "name a folder with the tokenizer files of Lumina-mGPT-7B-768"

#: 672 x 384, 24 frames at 12, as lumos1-spec 3.1 shows it, without BOS.
WORDING = """
22807 16758 16641 18677 16734 16641 23544 16673 16604 16405 16406 16401 16471 16402 16407 16403
16395 31291 16673 16604 16401 16403 32559 16767 16604 16400 16401 32559 16972 17711 16395 18745
16671 16647 18211 24643 16409 16582
"""
WORDING_IDS = [int(index) for index in WORDING.split()]


def load(path, *, token_ids: TokenIds = REAL.token_ids, vocab_size: int = REAL.vocab_size):
    return load_tokenizer(path, token_ids=token_ids, vocab_size=vocab_size)


@pytest.fixture(scope="module")
def right(tmp_path_factory) -> LumosTokenizer:
    return load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


# --- the wording --------------------------------------------------------------------------------


def test_the_wording_to_the_letter():
    assert template("a cat", CLIP) == (
        "Generate a video with a resolution of 672x384, consisting of 24 frames at 12 frames per "
        "second, according to the following prompt:\n a cat"
    )


def test_an_image_is_a_video_of_one_frame():
    header = Header(width=448, height=256, seconds=1, fps=1)
    assert header.frames == 1 and CLIP.frames == 24
    assert "448x256, consisting of 1 frames at 1 frames per second" in template("a cat", header)


def test_the_known_ids_of_the_wording():
    assert template_ids(CLIP) == WORDING_IDS


def test_the_tokenizer_gives_them(right):
    ids = right("a following prompt", CLIP)
    assert ids == [*WORDING_IDS, WORDS["Ġa"], WORDS["Ġfollowing"], WORDS["Ġprompt"]]


def test_beginning_and_end_are_the_vocabularys(right):
    """The file's own BOS and separator are not used: they would stand there twice."""
    ids = right("a video", CLIP)
    prefix = Vocab(REAL).prefix(ids, seconds=CLIP.seconds, fps=CLIP.fps)
    assert prefix.ids[0] == 0 and prefix.ids[1:-4] == tuple(ids)
    assert prefix.ids[-4:] == (8710, 9004, 8806, 8816)


@given(
    st.builds(
        Header,
        width=st.integers(1, 4096),
        height=st.integers(1, 4096),
        seconds=st.integers(1, 198),
        fps=st.integers(1, 198),
    )
)
def test_the_known_ids_hold_for_every_header(right, header):
    ids = template_ids(header)
    assert right("a cat", header)[: len(ids)] == ids
    assert ids[-1] == 16582


# --- captions -----------------------------------------------------------------------------------

characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


@given(st.text(characters, min_size=1).filter(str.strip))
def test_any_caption_is_text_and_nothing_else(right, prompt):
    """No id of a special token, of a number or of a video code; the bytes come back."""
    ids = right(prompt, CLIP)
    assert not any(right.reserved(index) for index in ids)
    assert right._tokenizer.decode(ids) == template(prompt, CLIP)


@pytest.mark.parametrize(
    "prompt", ["日本の猫", "émigré naïveté", "🐈‍⬛ on a mat", "قطة", "a\nb\tc"]
)
def test_captions_of_any_script(right, prompt):
    assert right._tokenizer.decode(right(prompt, CLIP)) == template(prompt, CLIP)


def test_a_long_caption_is_not_cut(right):
    ids = right("a video " * 20_000, CLIP)
    assert ids.count(WORDS["Ġvideo"]) == 20_001


def test_truncation_and_padding_in_the_file_are_off(tmp_path, right):
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    write_tokenizer(tmp_path, truncation=truncation, padding=padding)
    tokenizer = load(tmp_path)
    assert tokenizer("a cat", CLIP) == right("a cat", CLIP)


@pytest.mark.parametrize(
    "piece, index",
    [
        ("<s>", 0),
        ("<pad>", 1),
        ("<reserved08706>", 8710),
        ("<racm3:break>", 8197),
        ("<reserved08802>", 8806),
        ("<reserved08999>", 9003),
        ("<|image|>", 65536),
    ],
)
def test_a_caption_cannot_spell_a_special_token(right, piece, index):
    with pytest.raises(InvalidSetting) as caught:
        right(f"日本 a cat {piece} on a mat", CLIP)
    assert str(caught.value) == (
        f"prompt holds '{piece}', which is token {index} and not text, expected words: take it out"
    )


@pytest.mark.parametrize("prompt", ["<reserved>", "a < b", "<|", "<reserved12345>"])
def test_brackets_alone_are_text(right, prompt):
    assert right._tokenizer.decode(right(prompt, CLIP)).endswith(prompt)


def test_an_added_word_that_is_not_special_is_text(tmp_path):
    content = tokenizer_json()
    content["model"]["vocab"]["kitty"] = 30000
    word = content["added_tokens"][0] | {"id": 30000, "content": "kitty", "special": False}
    write_tokenizer(tmp_path, model=content["model"], added_tokens=[*content["added_tokens"], word])
    assert load(tmp_path)("a kitty", CLIP)[-1] == 30000


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("", "prompt is '', expected at least one word"),
        (" \n", r"prompt is ' \n', expected at least one word"),
        ("a\0b", "prompt holds a NUL character at 1, expected text: take it out"),
        (None, "prompt is a NoneType, expected text"),
        (b"a cat", "prompt is a bytes, expected text"),
        (
            "a\ud800",
            r"prompt holds '\ud800' at 1, which is half a character, expected Unicode text: "
            "take it out",
        ),
    ],
)
def test_what_is_no_prompt(right, prompt, said):
    with pytest.raises(InvalidSetting) as caught:
        right(prompt, CLIP)
    assert str(caught.value) == said


# --- the file -----------------------------------------------------------------------------------


def refusal(path, **settings) -> str:
    """The one line that a file gets."""
    with pytest.raises(InputFileError) as caught:
        load(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_or_the_file_under_any_name(tmp_path, right):
    write_tokenizer(tmp_path)
    write_tokenizer(tmp_path / "text_tokenizer.json")
    for path in (tmp_path, str(tmp_path), tmp_path / "text_tokenizer.json"):
        assert load(path)("a cat", CLIP) == right("a cat", CLIP)


def test_another_models_tokenizer_fails_loudly(tmp_path):
    path = write_tokenizer(tmp_path, wrong=True)
    first = tokenizer_json(wrong=True)["model"]["vocab"]["Gener"]
    assert refusal(tmp_path) == (
        f"{path}: id 0 of the prompt's wording is {first}, expected 22807: most likely another "
        "model's tokenizer (with one, upstream ends with an empty video vocabulary); " + WAY_OUT
    )


@pytest.mark.parametrize("token", ["Gener", "2", "x", "Ġper", "Ġprompt", "Ċ"])
def test_one_wrong_id_anywhere_is_found(tmp_path, token):
    changed = tokenizer_json()["model"]
    right_id, changed["vocab"][token] = changed["vocab"][token], 50000
    path = write_tokenizer(tmp_path, model=changed)
    place = WORDING_IDS.index(right_id)
    assert refusal(tmp_path).startswith(
        f"{path}: id {place} of the prompt's wording is 50000, expected {right_id}: "
    )


def test_another_way_to_split_is_found(tmp_path):
    """A space before the first word, as other models add it: the ids move by one."""
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    write_tokenizer(tmp_path, pre_tokenizer=pre_tokenizer)
    assert "id 0 of the prompt's wording is 16604, expected 22807" in refusal(tmp_path)


def test_a_tokenizer_that_drops_what_it_does_not_know(tmp_path):
    empty = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    write_tokenizer(tmp_path, model=empty, added_tokens=[], post_processor=None)
    assert "is 0, expected 22807" in refusal(tmp_path)
    empty["vocab"] = {"Z": 0}
    write_tokenizer(tmp_path, model=empty, added_tokens=[], post_processor=None)
    assert "is nothing, expected 22807" in refusal(tmp_path)


def test_the_report_for_the_doctor(right):
    pairs = template_report(right)
    assert [len(expected) for expected, _ in pairs] == [38, 36]
    assert all(expected == found for expected, found in pairs)
    assert pairs[0][0] == WORDING_IDS


def test_a_missing_file(tmp_path):
    assert refusal(tmp_path) == (
        f"tokenizer {tmp_path / 'tokenizer.json'} does not exist: {WAY_OUT}"
    )
    assert refusal(tmp_path / "no") == f"tokenizer {tmp_path / 'no'} does not exist: {WAY_OUT}"


@pytest.mark.parametrize(
    "content",
    [b"", b"[1", b"null", b"{}", b"\xff\xfe\x00", json.dumps({"model": {"type": "?"}}).encode()],
)
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    said = refusal(tmp_path)
    assert said.startswith(f"tokenizer {path} cannot be read (") and said.endswith(WAY_OUT)


def test_a_truncated_file(tmp_path):
    path = write_tokenizer(tmp_path)
    path.write_text(path.read_text()[:5000])
    assert refusal(tmp_path).startswith(f"tokenizer {path} cannot be read (")


def test_a_tokenizer_that_cannot_read_text(tmp_path):
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    write_tokenizer(tmp_path, model=words, added_tokens=[], post_processor=None)
    assert refusal(tmp_path) == (
        "the tokenizer cannot read 'Generate a video with a resolution of 67'... (WordLevel "
        f"error: Missing [UNK] token from the vocabulary): {WAY_OUT}"
    )


# --- models with ids of their own ---------------------------------------------------------------

#: Specials and numbers below the words, codes above: as in the embedded model.
OWN = TokenIds(
    bos=1000,
    image_end=1001,
    image_start=1002,
    sep=1003,
    new_line=1004,
    mask=1005,
    video_start=1006,
    video_end=1007,
    size_zero=1008,
    video_lo=1100,
    video_hi=1200,
)


def test_other_ids_need_no_known_wording(tmp_path):
    write_tokenizer(tmp_path, wrong=True)
    tokenizer = load(tmp_path, token_ids=OWN, vocab_size=1200)
    assert tokenizer("a video", CLIP)[-1] == tokenizer_json(wrong=True)["model"]["vocab"]["Ġvideo"]
    assert tokenizer.reserved(1003) and tokenizer.reserved(1008) and tokenizer.reserved(1100)


def test_numbers_end_where_the_codes_begin(tmp_path):
    write_tokenizer(tmp_path, wrong=True)
    tokenizer = load(tmp_path, token_ids=OWN, vocab_size=1200)
    assert all(tokenizer.reserved(index) for index in range(1000, 1200))
    assert not tokenizer.reserved(999)


def test_ids_behind_the_codes_are_text_again(tmp_path):
    write_tokenizer(tmp_path, wrong=True)
    tokenizer = load(tmp_path, token_ids=OWN, vocab_size=1300)
    assert tokenizer.reserved(1199) and not tokenizer.reserved(1200)


def test_the_numbers_of_lumos_end_at_the_mask(right):
    assert all(right.reserved(index) for index in range(8803, 9006))
    assert not right.reserved(9006) and not right.reserved(16384)


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path):
    path = write_tokenizer(tmp_path)
    assert refusal(tmp_path, token_ids=OWN, vocab_size=1200) == (
        f"{path}: highest token id is 65536, expected 0..1199, the model's vocabulary: name the "
        "folder with this model's tokenizer"
    )


def test_words_must_stay_clear_of_the_models_own_ids(tmp_path):
    path = write_tokenizer(tmp_path, wrong=True)
    vocab = tokenizer_json(wrong=True)["model"]["vocab"]
    taken = TokenIds(**{**OWN.specials(), "sep": vocab["Ġper"]}, video_lo=1100, video_hi=1200)
    assert refusal(tmp_path, token_ids=taken, vocab_size=1200) == (
        f"{path}: the prompt's wording gives id {vocab['Ġper']}, expected text ids only: it is a "
        "special, number or video id of the model; name this model's tokenizer"
    )
