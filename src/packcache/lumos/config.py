"""Sizes and numbers of a Lumos-1 model: what its `config.json` says, and what we add to it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from packcache.errors import InputFileError, InvalidSetting

__all__ = ["OWN_FIELDS", "SIZES", "UPSTREAM", "LumosConfig", "TokenIds", "read_config", "read_json"]

#: Fields of ours that upstream's `config.json` does not have; Lumos-1's values are the defaults.
OWN_FIELDS = ("trained_latent_frames", "token_ids", "compression", "fsq_levels")

#: What upstream's `config.json` may say in one way only (lumos1-spec 1.1-1.3, 1.6).
UPSTREAM = {
    "model_type": "chameleon",
    "mm_rope": True,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}

#: What upstream's `config.json` must say, and what each of it is.
_MEANING = {
    "vocab_size": "the number of token ids",
    "hidden_size": "the width of the network",
    "intermediate_size": "the width inside the MLP",
    "num_hidden_layers": "the number of layers",
    "num_attention_heads": "the number of query heads",
    "num_key_value_heads": "the number of key/value heads",
    "rope_theta": "the base of the rotary frequencies",
    "rms_norm_eps": "the epsilon of the norms",
}

#: Numbers of these are real and positive; all others, and two that have defaults, count something.
_REALS = ("rope_theta", "rms_norm_eps")
_COUNTS = (
    *(name for name in _MEANING if name not in _REALS),
    "model_parallel_size",
    "max_position_embeddings",
)


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Token ids by name; the defaults are Lumos-1's (lumos1-spec 1.5). `video_hi` is exclusive."""

    bos: int = 0
    image_end: int = 8196
    image_start: int = 8197
    sep: int = 8710
    new_line: int = 8803
    size_zero: int = 8804
    mask: int = 9003
    video_start: int = 9004
    video_end: int = 9005
    video_lo: int = 65536
    video_hi: int = 129536

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            _require(_is_count(value, 0), f"token_ids.{name}", value, "an integer from 0 on")
        low, high = self.video_lo, self.video_hi
        _require(low < high, "token_ids.video_hi", high, f"more than video_lo {low}")
        names: dict[int, str] = {}
        for name, value in self.specials().items():
            other = names.setdefault(value, name)
            _require(other == name, f"token_ids.{name}", value, f"another id than {other}")
            _require(
                not low <= value < high,
                f"token_ids.{name}",
                value,
                f"an id outside the video codes {low}..{high - 1}",
            )
        _require(
            len(self.numbers) > 0,
            "token_ids.size_zero",
            self.size_zero,
            "an id below another one: numbers run from it to the next id that has a name",
        )

    @property
    def video(self) -> range:
        """The ids of the video codes."""
        return range(self.video_lo, self.video_hi)

    @property
    def num_codes(self) -> int:
        return len(self.video)

    @property
    def numbers(self) -> range:
        """The ids of 0, 1, 2, ...: from `size_zero` to the next id that has a name."""
        zero = self.size_zero
        named = (*self.specials().values(), self.video_lo)
        return range(zero, min((i for i in named if i > zero), default=zero))

    def specials(self) -> dict[str, int]:
        """Every id but the range of the video codes."""
        return {k: v for k, v in asdict(self).items() if k not in ("video_lo", "video_hi")}


@dataclass(frozen=True, kw_only=True)
class LumosConfig:
    """A Lumos-1 network. Sizes have no defaults; behaviour has (lumos1-spec 1.1-1.5).

    `max_position_embeddings` enters no computation and bounds prompts only. Our own fields are the
    last four: `trained_latent_frames` is the longest clip the weights saw, in latent frames (None:
    never rebase); `compression` is the codec's (t, h, w) factor and the position units per latent
    frame and per token; the product of `fsq_levels` is the number of the codec's codes.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float
    rms_norm_eps: float
    model_parallel_size: int = 1
    swin_norm: bool = False
    max_position_embeddings: int = 65536
    trained_latent_frames: int | None = 7
    compression: tuple[int, int, int] = (4, 8, 8)
    fsq_levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    token_ids: TokenIds = field(default_factory=TokenIds)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            _require(_is_count(value), name, value, "a positive integer")
        for name in _REALS:
            value = getattr(self, name)
            _require(_is_positive(value), name, value, "a positive number")
        _require(isinstance(self.swin_norm, bool), "swin_norm", self.swin_norm, "true or false")
        self._check_heads()
        self._check_own()

    def _check_heads(self) -> None:
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        parts, size = self.model_parallel_size, self.hidden_size
        for holds, name, value, expected in (
            (size % heads == 0, "hidden_size", size, f"a multiple of num_attention_heads {heads}"),
            (
                heads % kv == 0,
                "num_attention_heads",
                heads,
                f"a multiple of num_key_value_heads {kv}",
            ),
            (
                self.head_dim % 32 == 0,
                "head size",
                self.head_dim,
                "a multiple of 32 (16 rotary pairs a group)",
            ),
            (
                heads % parts == 0 and kv % parts == 0,
                "model_parallel_size",
                parts,
                f"a divisor of {heads} and {kv} heads",
            ),
        ):
            _require(holds, name, value, expected)

    def _check_own(self) -> None:
        latents, ids = self.trained_latent_frames, self.token_ids
        _require(
            latents is None or _is_count(latents),
            "trained_latent_frames",
            latents,
            "a positive integer, or null to never rebase",
        )
        for name, holds, expected in (
            ("compression", _are_counts(self.compression, 1, length=3), "three positive integers"),
            ("fsq_levels", _are_counts(self.fsq_levels, 2), "a list of integers from 2 on"),
        ):
            _require(holds, name, getattr(self, name), expected)
        _require(isinstance(ids, TokenIds), "token_ids", ids, "token ids by name")
        _require(
            ids.video_hi <= self.vocab_size,
            "vocab_size",
            self.vocab_size,
            f"at least video_hi {ids.video_hi}",
        )
        for name, value in ids.specials().items():
            _require(
                value < self.vocab_size,
                f"token_ids.{name}",
                value,
                f"an id below vocab_size {self.vocab_size}",
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], **overrides: Any) -> LumosConfig:
        """From a `config.json`: the sizes are required, unknown fields are ignored.

        `overrides` replace our own fields (`OWN_FIELDS`) and win over the file; of `token_ids`
        only the names given. Raises InvalidSetting for whatever is missing, contradictory or not
        supported.
        """
        ours = _values(check_overrides(overrides))
        values = _values(data)
        missing = [name for name in _MEANING if name not in data]
        if missing:
            raise InvalidSetting(_what_is_missing(missing))
        for name, expected in UPSTREAM.items():
            found = data.get(name, expected)
            same = type(found) is type(expected) and found == expected
            _require(same, name, found, f"{expected!r}, the only kind this engine runs")
        ids = {**values.pop("token_ids", {}), **ours.pop("token_ids", {})}
        config = cls(**{**values, **ours, "token_ids": TokenIds(**ids)})
        head = data.get("head_dim")
        _require(
            head is None or head == config.head_dim,
            "head_dim",
            head,
            f"hidden_size / num_attention_heads = {config.head_dim}",
        )
        return config

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_config(folder: str | Path, **overrides: Any) -> LumosConfig:
    """The `config.json` of a checkpoint folder; `overrides` as in `LumosConfig.from_dict`.

    Raises InputFileError, with the name of the file, for what the file says, and InvalidSetting
    for an override that is wrong or spoils a good file.
    """
    path = Path(folder) / "config.json"
    _values(check_overrides(overrides))  # wrong overrides are wrong whatever the file says
    data = read_json(path)
    try:
        return _with_its_codec(LumosConfig.from_dict(data, **overrides))
    except InvalidSetting as error:
        if overrides and _stands_alone(data):
            raise
        raise InputFileError(f"{path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputFileError with its name."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputFileError(
            f"{path} does not exist: expected the folder of a checkpoint, with all its files"
        ) from None
    except OSError as error:
        raise InputFileError(f"{path} cannot be read ({error.strerror}): check it") from None
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path} is not JSON ({error}): download it again") from None
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise InputFileError(f"{path} holds a {kind}, expected an object: download it again")
    return data


def _with_its_codec(config: LumosConfig) -> LumosConfig:
    """The config, if its ids name every code. Asked of folders: ids alone have no codec."""
    levels, codes = config.fsq_levels, config.token_ids.num_codes
    _require(
        math.prod(levels) == codes,
        "fsq_levels",
        levels,
        f"a product of video_hi - video_lo = {codes} codes, not {math.prod(levels)}",
    )
    return config


def _stands_alone(data: Mapping[str, Any]) -> bool:
    try:
        _with_its_codec(LumosConfig.from_dict(data))
    except InvalidSetting:
        return False
    return True


def check_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides, if all names are ours."""
    asked = overrides.get("token_ids", {})
    ids = asdict(asked) if isinstance(asked, TokenIds) else asked
    names = [f.name for f in fields(TokenIds)]
    for given, known in ((overrides, OWN_FIELDS), (ids, names)):
        unknown = sorted(set(given) - set(known)) if isinstance(given, Mapping) else []
        if unknown:
            raise InvalidSetting(
                f"{', '.join(unknown)} cannot be set, expected {', '.join(known)}: "
                "everything else comes from the checkpoint's config.json"
            )
    return {**overrides, "token_ids": ids} if "token_ids" in overrides else overrides


def _values(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config among `data`, in the types we hold; `token_ids` as a dict."""
    known = {f.name for f in fields(LumosConfig)}
    values = {name: value for name, value in data.items() if name in known}
    for name in ("compression", "fsq_levels"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    for name in _REALS:
        if _is_positive(values.get(name)):
            values[name] = float(values[name])
    if "token_ids" in values:
        ids = values["token_ids"]
        _require(isinstance(ids, Mapping), "token_ids", ids, "token ids by name")
        names = [f.name for f in fields(TokenIds)]
        values["token_ids"] = {name: ids[name] for name in names if name in ids}
    return values


def _what_is_missing(names: list[str]) -> str:
    """One line: what each missing field is, and what it should be as far as anybody knows."""
    wanted = []
    for name in names:
        small, large = (getattr(SIZES[size], name) for size in ("1b", "3b"))
        hint = f"inferred: {small} for 1B, {large} for 3B"
        if name in _REALS:
            hint = f"not known for the released weights; upstream's class default is {small:g}"
        wanted.append(f"{name} = {_MEANING[name]} ({hint})")
    return (
        f"config lacks {', '.join(names)}: expected {', '.join(wanted)}, found none; "
        "take the config.json that travels with the checkpoint"
    )


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_positive(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return 0 < value < 1e300  # neither NaN nor infinite, which readers of JSON let through


def _are_counts(values: object, least: int, length: int | None = None) -> bool:
    """A tuple of integers, of that length where one is given."""
    if not isinstance(values, tuple) or not values or len(values) != (length or len(values)):
        return False
    return all(_is_count(value, least) for value in values)


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InvalidSetting(f"{name} is {value!r}, expected {expected}: check the config.json")


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> LumosConfig:
    return LumosConfig(
        vocab_size=129536,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
    )


#: Sizes by name for random-weight runs; the released sizes are inferred (lumos1-spec 1.4).
SIZES = {
    "toy": LumosConfig(
        vocab_size=272,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        fsq_levels=(8, 4, 4),
        token_ids=TokenIds(
            image_end=100,
            image_start=101,
            mask=103,
            sep=104,
            video_start=105,
            video_end=106,
            new_line=109,
            size_zero=110,
            video_lo=144,
            video_hi=272,
        ),
    ),
    "1b": _llama(2048, 8192, 16, 32, 8),
    "3b": _llama(3072, 8192, 28, 24, 8),
}
