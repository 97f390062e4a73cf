"""The digits model's language: a small grammar, and its words as numbers.

    [a] COLOUR DIGIT [moving DIRECTION]          "a red 3 moving right"

Every prompt becomes `PROMPT_LENGTH` words, filled up with a learned padding word. The word list
already holds words of the next version; the grammar admits only what the weights were trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

from packcache.digits.world import COLOURS, DIRECTIONS
from packcache.errors import InvalidSetting

__all__ = ["GRAMMAR", "PAD", "PROMPT_LENGTH", "WORDS", "decode", "encode"]

PAD = "<pad>"
PROMPT_LENGTH = 8

_DIGITS = tuple(str(n) for n in range(10))
_ARTICLES = ("a", "an", "the")
_SPARE = ("digit", "and", "behind", "curtain", "orange", "white", "standing", "still")

#: Word id = place in this list. Only ever append: the weights know the places.
WORDS: tuple[str, ...] = (PAD, "a", *COLOURS, *_DIGITS, "moving", *DIRECTIONS, *_SPARE)

GRAMMAR = (
    f"[a] COLOUR DIGIT [moving DIRECTION], with COLOUR one of {', '.join(COLOURS)}; DIGIT 0 to 9; "
    f"DIRECTION one of {', '.join(DIRECTIONS)}"
)

_IDS = {word: number for number, word in enumerate(WORDS)}
_SPOKEN = {"a", *_ARTICLES, *COLOURS, *_DIGITS, "moving", *DIRECTIONS}


def encode(text: str) -> list[int]:
    """Word ids `[PROMPT_LENGTH]` of a prompt; case, spacing and the article are forgiven.

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
    if words[0] in _ARTICLES:
        words = words[1:]
    if not _is_sentence(words):
        raise InvalidSetting(f"the digits model cannot read {text!r}, expected {GRAMMAR}")
    ids = [_IDS[word] for word in ("a", *words)]
    return ids + [_IDS[PAD]] * (PROMPT_LENGTH - len(ids))


def decode(ids: Sequence[int]) -> str:
    """The prompt of word ids, without its padding."""
    return " ".join(WORDS[number] for number in ids if WORDS[number] != PAD)


def _is_sentence(words: list[str]) -> bool:
    """Whether `words` (no article) are COLOUR DIGIT [moving DIRECTION]."""
    if len(words) not in (2, 4) or words[0] not in COLOURS or words[1] not in _DIGITS:
        return False
    return len(words) == 2 or (words[2] == "moving" and words[3] in DIRECTIONS)
