"""A small tokenizer file that agrees with Lumos-1's wherever lumos1-spec 3.1 shows an id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: First id of the 256 bytes, and of the merges that only lead to words.
BYTES, BETWEEN = 16384, 40000

#: Words of the wording as the byte-level vocabulary spells them (`Ġ` is a space). "ate" is last:
#: its pairs must not come before those of the words that start with a space.
WORDS = {
    "Gener": 22807,
    "Ġa": 16641,
    "Ġvideo": 18677,
    "Ġwith": 16734,
    "Ġresolution": 23544,
    "Ġof": 16673,
    "Ġconsisting": 31291,
    "Ġframes": 32559,
    "Ġat": 16767,
    "Ġper": 16972,
    "Ġsecond": 17711,
    "Ġaccording": 18745,
    "Ġto": 16671,
    "Ġthe": 16647,
    "Ġfollowing": 18211,
    "Ġprompt": 24643,
    "ate": 16758,
}

#: Tokens with a name: text that spells one becomes that one id.
NAMED = {
    "<s>": 0,
    "<pad>": 1,
    "</s>": 2,
    "<unk>": 3,
    "<eoss>": 8196,
    "<racm3:break>": 8197,
    "<reserved08706>": 8710,
    "<reserved08802>": 8806,
    "<reserved08999>": 9003,
    "<|image|>": 65536,
}


def byte_alphabet() -> list[str]:
    """The 256 bytes as GPT-2 writes them, in the order of its ids: printable ones first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


def tokenizer_json(*, wrong: bool = False) -> dict[str, Any]:
    """The content of the file; `wrong` numbers the same tokens from 0, as other models do."""
    vocab = {symbol: BYTES + n for n, symbol in enumerate(byte_alphabet())}
    merges: dict[tuple[str, str], None] = {}
    for word, index in WORDS.items():
        for end in range(2, len(word) + 1):
            merges[word[: end - 1], word[end - 1]] = None
            vocab.setdefault(word[:end], BETWEEN + len(vocab))
        vocab[word] = index
    vocab |= NAMED
    if wrong:
        vocab = {token: n for n, token in enumerate(vocab)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(name, vocab[name]) for name in NAMED],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            ],
        },
        "post_processor": _wrap_in_bos_and_separator(vocab),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [" ".join(pair) for pair in merges]},
    }


def write_tokenizer(path: str | Path, *, wrong: bool = False, **changes: Any) -> Path:
    """Write `tokenizer.json` into a folder, or to that file; `changes` replace top-level fields."""
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    path.write_text(json.dumps(tokenizer_json(wrong=wrong) | changes), encoding="utf-8")
    return path


def _added(name: str, index: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = name not in ("<reserved08802>", "<|image|>")  # reserved by their ids alone
    return {"id": index, "content": name, **flags, "special": special}


def _wrap_in_bos_and_separator(vocab: dict[str, int]) -> dict[str, Any]:
    """What the real file does, and the engine does itself."""

    def special(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    def text(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    ends = ("<s>", "<reserved08706>")
    return {
        "type": "TemplateProcessing",
        "single": [special(ends[0]), text("A"), special(ends[1])],
        "pair": [special(ends[0]), text("A"), text("B"), special(ends[1])],
        "special_tokens": {n: {"id": n, "ids": [vocab[n]], "tokens": [n]} for n in ends},
    }
