"""Words to ids and back; what the model never saw is refused in one clear line."""

from __future__ import annotations

import pytest

from packcache.digits import prompts, world
from packcache.digits.prompts import PAD, PROMPT_LENGTH, WORDS, decode, encode
from packcache.errors import InvalidSetting


def test_every_prompt_of_the_world_survives_the_round_trip():
    for digit in range(10):
        for colour in world.COLOURS:
            for direction in world.DIRECTIONS:
                scene = world.Scene(
                    digit=digit, scan=0, colour=colour, direction=direction, x=0, y=0
                )
                text = world.prompt(scene)
                ids = encode(text)
                assert len(ids) == PROMPT_LENGTH
                assert decode(ids) == text


def test_direction_may_be_left_out():
    ids = encode("a blue 7")
    assert ids[3:] == [WORDS.index(PAD)] * (PROMPT_LENGTH - 3)
    assert decode(ids) == "a blue 7"


@pytest.mark.parametrize(
    "text", ["red 3 moving right", "A Red 3  moving RIGHT", "the red 3 moving right"]
)
def test_case_spacing_and_article_are_forgiven(text):
    assert encode(text) == encode("a red 3 moving right")


def test_words_are_distinct_and_keep_their_places():
    assert len(set(WORDS)) == len(WORDS)
    places = {"<pad>": 0, "a": 1, "red": 2, "0": 8, "moving": 18, "right": 19, "down-left": 26}
    assert {word: WORDS.index(word) for word in places} == places


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_prompt_is_refused(text):
    with pytest.raises(InvalidSetting, match=r"prompt is empty, expected \[a\] COLOUR DIGIT"):
        encode(text)


def test_unknown_words_are_all_named():
    with pytest.raises(InvalidSetting) as caught:
        encode("a pink 3 jumping right")
    message = str(caught.value)
    assert "'pink', 'jumping'" in message
    assert "'right'" not in message
    assert prompts.GRAMMAR in message
    assert "\n" not in message


@pytest.mark.parametrize("word", ["digit", "behind", "curtain", "<pad>"])
def test_words_of_the_next_version_are_unknown_still(word):
    with pytest.raises(InvalidSetting, match="does not know"):
        encode(f"a red {word}")


@pytest.mark.parametrize(
    "text",
    ["a", "red", "3 red", "a red 3 right", "a red 3 moving", "a red 3 4", "a red 3 moving up left"],
)
def test_known_words_in_the_wrong_order_are_refused(text):
    with pytest.raises(InvalidSetting, match="cannot read"):
        encode(text)
