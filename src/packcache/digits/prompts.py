"""The digits model's language: a small grammar, and its words as numbers.

    SCENE = THING | THING and THING | UNTOLD behind a curtain | THING and UNTOLD behind a curtain
    THING = [a] COLOUR DIGIT [moving DIRECTION]      UNTOLD = [a] digit [moving DIRECTION]

    "a red 3 moving right"      "a red 3 moving up and a digit moving down behind a curtain"

Every prompt becomes `PROMPT_LENGTH` words, filled up with a learned padding word. The grammar
admits only what the weights were trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

from packcache.digits.world import COLOURS, DIRECTIONS, Scene
from packcache.errors import InvalidSetting

__all__ = ["GRAMMAR", "PAD", "PROMPT_LENGTH", "WORDS", "decode", "encode", "prompt"]

PAD = "<pad>"
PROMPT_LENGTH = 14

_DIGITS = tuple(str(n) for n in range(10))
_ARTICLES = ("a", "an", "the")
_CURTAIN = ["behind", "a", "curtain"]

#: Word id = place in this list.
WORDS: tuple[str, ...] = (
    *(PAD, "a", *COLOURS, *_DIGITS, "moving", *DIRECTIONS),
    *("digit", "and", "behind", "curtain"),
)

GRAMMAR = (
    "[a] COLOUR DIGIT [moving DIRECTION], or two of them joined by 'and', or the last of them as "
    f"'a digit [moving DIRECTION] behind a curtain'; COLOUR is one of {', '.join(COLOURS)}; "
    f"DIGIT 0 to 9; DIRECTION one of {', '.join(DIRECTIONS)}"
)

_IDS = {word: number for number, word in enumerate(WORDS)}
_SPOKEN = {*WORDS, *_ARTICLES} - {PAD}


def prompt(scene: Scene, *, directions: bool = True) -> str:
    """The sentence that describes a scene, without what the curtain hides."""
    things = []
    for digit in scene.digits:
        name = "digit" if digit is scene.hidden else f"{digit.colour} {digit.value}"
        things.append(f"a {name} moving {digit.direction}" if directions else f"a {name}")
    return " and ".join(things) + (" behind a curtain" if scene.curtain else "")


def encode(text: str) -> list[int]:
    """Word ids `[PROMPT_LENGTH]` of a prompt; case, spacing and articles are forgiven.

    Raises `InvalidSetting` for an empty prompt, for words that the model never saw (all of them
    are named) and for known words in an order that it never saw.
    """
    words = text.lower().split()
    if not words:
        raise InvalidSetting(f"the prompt is empty, expected {GRAMMAR}")
    unknown = [word for word in dict.fromkeys(words) if word not in _SPOKEN]
    if unknown:
        named = ", ".join(repr(word) for word in unknown)
        raise InvalidSetting(f"the digits model does not know {named}, expected {GRAMMAR}")
    said = _sentence(words)
    if said is None:
        raise InvalidSetting(f"the digits model cannot read {text!r}, expected {GRAMMAR}")
    ids = [_IDS[word] for word in said]
    return ids + [_IDS[PAD]] * (PROMPT_LENGTH - len(ids))


def decode(ids: Sequence[int]) -> str:
    """The prompt of word ids, without its padding."""
    return " ".join(WORDS[number] for number in ids if WORDS[number] != PAD)


def _sentence(words: list[str]) -> list[str] | None:
    """The words as trained on, articles in place; None if they are no sentence."""
    behind = words.index("behind") if "behind" in words else len(words)
    curtain = words[behind:]
    if curtain and curtain[-1:] + curtain[:1] != ["curtain", "behind"]:
        return None
    if any(word not in _ARTICLES for word in curtain[1:-1]) or len(curtain) > len(_CURTAIN):
        return None
    things = _split(words[:behind])
    said = [_thing(thing) for thing in things]
    if len(said) > 2 or any(thing is None for thing in said):
        return None
    if len({"moving" in thing for thing in things}) > 1:
        return None
    untold = ["digit" in thing for thing in things]
    if untold != [False] * (len(things) - 1) + [bool(curtain)]:
        return None
    out = [word for thing in said for word in ("and", *(thing or []))][1:]
    return out + (_CURTAIN if curtain else [])


def _split(words: list[str]) -> list[list[str]]:
    things: list[list[str]] = [[]]
    for word in words:
        if word == "and":
            things.append([])
        else:
            things[-1].append(word)
    return things


def _thing(words: list[str]) -> list[str] | None:
    """One digit: "a COLOUR DIGIT [moving DIRECTION]" or "a digit [moving DIRECTION]"."""
    words = words[1:] if words[:1] and words[0] in _ARTICLES else words
    name, motion = (words, []) if "moving" not in words else _cut(words, words.index("moving"))
    told = len(name) == 2 and name[0] in COLOURS and name[1] in _DIGITS
    if not (told or name == ["digit"]):
        return None
    if motion and not (len(motion) == 2 and motion[1] in DIRECTIONS):
        return None
    return ["a", *words]


def _cut(words: list[str], at: int) -> tuple[list[str], list[str]]:
    return words[:at], words[at:]
