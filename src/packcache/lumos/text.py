"""Captions to text ids: the fixed wording around a caption, and the tokenizer that reads it.

A tokenizer of another model gives ids that are legal and wrong: the clip then ignores its prompt.
So the ids of the wording, which are known, are compared when a tokenizer is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packcache.errors import InputFileError, InvalidSetting
from packcache.lumos.config import TokenIds

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

__all__ = [
    "TOKENIZER_FILE",
    "Header",
    "LumosTokenizer",
    "load_tokenizer",
    "template",
    "template_ids",
    "template_report",
]

#: The file of a checkpoint folder that is read; the library `tokenizers` writes it.
TOKENIZER_FILE = "tokenizer.json"

#: Where the right files are (lumos1-spec 1.5).
_WAY_OUT = "name a folder with the tokenizer files of Lumina-mGPT-7B-768"

#: Id of the digit 0; the others follow, and every digit is a token (lumos1-spec 1.5, 3.1).
_DIGIT_ZERO = 16399

#: Ids of the wording, split where numbers stand: ahead of width, height, frames, fps, caption
#: (lumos1-spec 3.1, read off shipped training samples). The last id is the newline: the space
#: after it belongs to the caption's first word.
_WORDING = (
    (22807, 16758, 16641, 18677, 16734, 16641, 23544, 16673, 16604),
    (16471,),
    (16395, 31291, 16673, 16604),
    (32559, 16767, 16604),
    (32559, 16972, 17711, 16395, 18745, 16671, 16647, 18211, 24643, 16409, 16582),
)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the wording and the video header state of a clip: size in pixels, duration and fps."""

    width: int
    height: int
    seconds: int
    fps: int

    @property
    def frames(self) -> int:
        return self.fps * self.seconds


#: Headers of the self-test: a video of the larger released size, and an image of the smaller.
_TESTED = (
    Header(width=672, height=384, seconds=2, fps=12),
    Header(width=448, height=256, seconds=1, fps=1),
)


def template(prompt: str, header: Header) -> str:
    """The text that the model was trained on for a caption (lumos1-spec 3.1)."""
    return (
        f"Generate a video with a resolution of {header.width}x{header.height}, "
        f"consisting of {header.frames} frames at {header.fps} frames per second, "
        f"according to the following prompt:\n {prompt}"
    )


def template_ids(header: Header) -> list[int]:
    """Lumos-1's ids of `template` up to and with the newline before the caption."""
    numbers = (header.width, header.height, header.frames, header.fps)
    ids: list[int] = []
    for wording, number in zip(_WORDING, (*numbers, ""), strict=True):
        ids += [*wording, *(_DIGIT_ZERO + int(digit) for digit in str(number))]
    return ids


class LumosTokenizer:
    """Text ids of a caption inside its wording; BOS and separator are `Vocab.prefix`'s to add."""

    def __init__(self, tokenizer: Tokenizer, token_ids: TokenIds) -> None:
        self.token_ids = token_ids
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._special = {
            *token_ids.specials().values(),
            *token_ids.numbers,
            *(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special),
        }

    def __call__(self, prompt: str, header: Header) -> list[int]:
        """Text ids of a prompt.

        Raises:
            InvalidSetting: the prompt is empty, is not plain text, or holds the written form of a
                special token, such as `<reserved08706>`: it would end the text early.
        """
        _check_prompt(prompt)
        text = template(prompt, header)
        encoding = self.encode(text)
        for index, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if self.reserved(index):
                raise InvalidSetting(
                    f"prompt holds {text[start:stop]!r}, which is token {index} and not text, "
                    "expected words: take it out"
                )
        return encoding.ids

    def encode(self, text: str) -> Encoding:
        """Ids and places of any text, without the tokenizer's own special tokens."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            raise InputFileError(
                f"the tokenizer cannot read {text[:40]!r}... ({error}): {_WAY_OUT}"
            ) from None

    def reserved(self, index: int) -> bool:
        """Whether an id means something other than text: specials, numbers, video codes."""
        return index in self._special or index in self.token_ids.video


def _check_prompt(prompt: str) -> None:
    if not isinstance(prompt, str):
        raise InvalidSetting(f"prompt is a {type(prompt).__name__}, expected text")
    if not prompt.strip():
        raise InvalidSetting(f"prompt is {prompt!r}, expected at least one word")
    if "\0" in prompt:
        raise InvalidSetting(
            f"prompt holds a NUL character at {prompt.index(chr(0))}, expected text: take it out"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidSetting(
            f"prompt holds {prompt[error.start]!r} at {error.start}, which is half a character, "
            "expected Unicode text: take it out"
        ) from None


def load_tokenizer(
    folder_or_file: str | Path, *, token_ids: TokenIds, vocab_size: int
) -> LumosTokenizer:
    """The tokenizer of a folder's `tokenizer.json`, or of that file under any name.

    Under Lumos-1's own ids the wording must give the known ids; a model with ids of its own has
    none to compare, so there the wording must only stay clear of the reserved ones.

    Raises:
        InputFileError: the file is missing, cannot be read, or is another model's.
    """
    path = Path(folder_or_file)
    path = path / TOKENIZER_FILE if path.is_dir() else path
    raw = _read(path)
    highest = max(raw.get_vocab().values(), default=-1)
    if not 0 <= highest < vocab_size:
        raise InputFileError(
            f"{path}: highest token id is {highest}, expected 0..{vocab_size - 1}, the model's "
            "vocabulary: name the folder with this model's tokenizer"
        )
    tokenizer = LumosTokenizer(raw, token_ids)
    check = _check_template if token_ids == TokenIds() else _check_text_ids
    check(tokenizer, path)
    return tokenizer


def _read(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputFileError(f"tokenizer {path} does not exist: {_WAY_OUT}") from None
    except Exception as error:  # the library raises nothing narrower
        reason = (str(error).splitlines() or ["it is empty"])[0]
        raise InputFileError(f"tokenizer {path} cannot be read ({reason}): {_WAY_OUT}") from None


def template_report(tokenizer: LumosTokenizer) -> list[tuple[list[int], list[int]]]:
    """Expected and found ids of the wording, for each header of the self-test."""
    return [
        (expected, tokenizer.encode(template("a cat", header)).ids[: len(expected)])
        for header in _TESTED
        for expected in (template_ids(header),)
    ]


def _check_template(tokenizer: LumosTokenizer, path: Path) -> None:
    for expected, found in template_report(tokenizer):
        for place, right in enumerate(expected):
            wrong = found[place] if place < len(found) else "nothing"
            if wrong != right:
                raise InputFileError(
                    f"{path}: id {place} of the prompt's wording is {wrong}, expected {right}: "
                    "most likely another model's tokenizer (with one, upstream ends with an empty "
                    f"video vocabulary); {_WAY_OUT}"
                )


def _check_text_ids(tokenizer: LumosTokenizer, path: Path) -> None:
    for header in _TESTED:
        for index in tokenizer.encode(template("a cat", header)).ids:
            if tokenizer.reserved(index):
                raise InputFileError(
                    f"{path}: the prompt's wording gives id {index}, expected text ids only: it is "
                    "a special, number or video id of the model; name this model's tokenizer"
                )
