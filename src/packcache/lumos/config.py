"""Sizes and numbers of a Lumos-1 model: what its `config.json` says, and what we add to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from packcache.errors import InvalidSetting

__all__ = ["SIZES", "LumosConfig", "TokenIds"]


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

    @property
    def num_codes(self) -> int:
        return self.video_hi - self.video_lo


@dataclass(frozen=True, kw_only=True)
class LumosConfig:
    """A Lumos-1 network. Sizes have no defaults; behaviour has (lumos1-spec 1.1-1.5).

    `trained_latent_frames` is the longest clip the weights saw, in latent frames (None: never
    rebase). `compression` is the codec's (t, h, w) factor, `time_stride` and `space_stride` the
    position units per latent frame and per token.
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
    trained_latent_frames: int | None = 7
    compression: tuple[int, int, int] = (4, 8, 8)
    fsq_levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    token_ids: TokenIds = field(default_factory=TokenIds)

    def __post_init__(self) -> None:
        heads, kv, parts = (
            self.num_attention_heads,
            self.num_key_value_heads,
            self.model_parallel_size,
        )
        _require(
            self.hidden_size % heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of num_attention_heads {heads}",
        )
        _require(
            heads % kv == 0, "num_attention_heads", heads, f"a multiple of num_key_value_heads {kv}"
        )
        _require(
            self.head_dim % 32 == 0,
            "head size",
            self.head_dim,
            "a multiple of 32 (16 rotary pairs a group)",
        )
        _require(
            heads % parts == 0 and kv % parts == 0,
            "model_parallel_size",
            parts,
            f"a divisor of {heads} and {kv} heads",
        )
        _require(
            self.token_ids.video_hi <= self.vocab_size,
            "vocab_size",
            self.vocab_size,
            f"at least video_hi {self.token_ids.video_hi}",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LumosConfig:
        """From a `config.json`: the sizes are required, unknown fields are ignored."""
        known = {f.name for f in fields(cls)}
        required = {f.name for f in fields(cls) if f.default is MISSING is f.default_factory}
        missing = sorted(required - set(data))
        if missing:
            raise InvalidSetting(
                f"config lacks {', '.join(missing)}: every size of lumos1-spec 1.1-1.4 must be "
                "there; take the config.json that travels with the checkpoint"
            )
        values = {k: v for k, v in data.items() if k in known}
        values["token_ids"] = _token_ids(data.get("token_ids", {}))
        for name in ("compression", "fsq_levels"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _token_ids(data: Mapping[str, int]) -> TokenIds:
    return TokenIds(**{f.name: int(data[f.name]) for f in fields(TokenIds) if f.name in data})


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InvalidSetting(f"{name} is {value}, expected {expected}: check the config.json")


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
