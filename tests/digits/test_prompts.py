"""Words to ids and back; what the model never saw is refused in one clear line."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from packcache.digits import prompts, world
from packcache.digits.prompts import PAD, PROMPT_LENGTH, WORDS, decode, encode, prompt
from packcache.digits.world import Curtain, Digit, Scene
from packcache.errors import InvalidSetting

ONE = Digit(value=3, scan=0, colour="red", direction="right", x=0, y=0)
TWO = Digit(value=7, scan=0, colour="blue", direction="down-left", x=0, y=60)
CURTAIN = Curtain(box=(0, 48, 96, 48), falls=1, rises=2)


def drawn(count: int) -> list[Scene]:
    pytest.importorskip("sklearn", reason="the scans come from scikit-learn")
    scenes = [world.sample_scene(np.random.default_rng(n)) for n in range(count)]
    assert {scene.kind for scene in scenes} == set(world.KINDS)
    return scenes


@pytest.mark.parametrize(
    ("scene", "long", "short"),
    [
        (Scene(digits=(ONE,)), "a red 3 moving right", "a red 3"),
        (
            Scene(kind="two", digits=(ONE, TWO)),
            "a red 3 moving right and a blue 7 moving down-left",
            "a red 3 and a blue 7",
        ),
        (
            Scene(kind="hidden", digits=(TWO,), curtain=CURTAIN),
            "a digit moving down-left behind a curtain",
            "a digit behind a curtain",
        ),
        (
            Scene(kind="enters", digits=(ONE, TWO), curtain=CURTAIN),
            "a red 3 moving right and a digit moving down-left behind a curtain",
            "a red 3 and a digit behind a curtain",
        ),
    ],
)
def test_a_scene_is_said_like_this(scene, long, short):
    assert prompt(scene) == long
    assert prompt(scene, directions=False) == short


def test_every_single_digit_survives_the_round_trip():
    for value in range(10):
        for colour in world.COLOURS:
            for direction in world.DIRECTIONS:
                one = dataclasses.replace(ONE, value=value, colour=colour, direction=direction)
                text = prompt(Scene(digits=(one,)))
                assert decode(encode(text)) == text == f"a {colour} {value} moving {direction}"


@pytest.mark.parametrize("directions", [True, False])
def test_every_prompt_of_the_world_survives_the_round_trip(directions):
    lengths = set()
    for scene in drawn(400):
        text = prompt(scene, directions=directions)
        ids = encode(text)
        assert len(ids) == PROMPT_LENGTH
        assert decode(ids) == text
        assert ("moving" in text) == directions
        lengths.add(len(text.split()))
    assert lengths == ({5, 7, 11, 13} if directions else {3, 5, 7, 9})


def test_what_the_curtain_hides_is_never_told():
    """Another digit, in another colour, of another hand: the same prompt."""
    for scene in drawn(400):
        if scene.hidden is None:
            continue
        value, colour = (scene.hidden.value + 1) % 10, "red"
        if scene.hidden.colour == "red":
            colour = "blue"
        other = dataclasses.replace(scene.hidden, value=value, colour=colour, scan=0)
        twin = dataclasses.replace(scene, digits=(*scene.digits[:-1], other))
        assert prompt(twin) == prompt(scene)
        *told, untold = prompt(scene).split(" and ")
        assert untold == f"a digit moving {scene.hidden.direction} behind a curtain"
        assert told == [prompt(Scene(digits=(digit,))) for digit in scene.digits[:-1]]


def test_direction_may_be_left_out():
    ids = encode("a blue 7")
    assert ids[3:] == [WORDS.index(PAD)] * (PROMPT_LENGTH - 3)
    assert decode(ids) == "a blue 7"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("red 3 moving right", "a red 3 moving right"),
        ("A Red 3  moving RIGHT", "a red 3 moving right"),
        ("the red 3 moving right", "a red 3 moving right"),
        ("red 3 and blue 7", "a red 3 and a blue 7"),
        ("an digit behind the curtain", "a digit behind a curtain"),
        ("digit moving up behind curtain", "a digit moving up behind a curtain"),
    ],
)
def test_case_spacing_and_articles_are_forgiven(text, said):
    assert decode(encode(text)) == said
    assert encode(text) == encode(said)


def test_words_are_distinct_and_keep_their_places():
    assert len(set(WORDS)) == len(WORDS)
    places = {"<pad>": 0, "a": 1, "red": 2, "0": 8, "moving": 18, "right": 19, "down-left": 26}
    places |= {"digit": 27, "and": 28, "behind": 29, "curtain": 30}
    assert {word: WORDS.index(word) for word in places} == places


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_prompt_is_refused(text):
    with pytest.raises(InvalidSetting, match=r"prompt is empty, expected \[a\] COLOUR DIGIT"):
        encode(text)


def test_unknown_words_are_all_named():
    with pytest.raises(InvalidSetting) as caught:
        encode("a pink 3 jumping right and a pink digit beneath <pad>")
    message = str(caught.value)
    assert "does not know 'pink', 'jumping', 'beneath', '<pad>', expected" in message
    assert prompts.GRAMMAR in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        # no thing
        *("a", "red", "3 red", "a red 3 right", "a red 3 moving", "a red 3 4", "a a red 3"),
        *("a red 3 moving up left", "moving right", "a red 3 and", "and a red 3", "a red digit"),
        # two untold
        "a digit and a digit behind a curtain",
        # a curtain without an untold thing, or without anything
        *("a red 3 behind a curtain", "a red 3 and a blue 7 behind a curtain", "behind a curtain"),
        # an untold thing without a curtain, or not the last
        *("a digit", "a red 3 and a digit", "a digit and a red 3 behind a curtain"),
        # three things
        *("a red 3 and a blue 7 and a cyan 5", "a red 3 and a blue 7 and a digit behind a curtain"),
        # half the things moving
        *("a red 3 moving up and a blue 7", "a red 3 and a digit moving up behind a curtain"),
        # half a curtain
        *("a digit behind", "a digit curtain", "a digit behind a a curtain"),
        *("a digit behind a curtain moving up", "a digit behind a curtain and a red 3"),
    ],
)
def test_known_words_that_are_no_sentence_of_the_world_are_refused(text):
    with pytest.raises(InvalidSetting) as caught:
        encode(text)
    assert str(caught.value) == (
        f"the digits model cannot read {text!r}, expected {prompts.GRAMMAR}"
    )
