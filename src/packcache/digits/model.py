"""The embedded model: the Lumos-1 architecture at toy size, its numbers and its shipped weights."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path

from packcache.digits import prompts
from packcache.digits.codec import LEVELS
from packcache.digits.world import FPS
from packcache.lumos import weights
from packcache.lumos.config import LumosConfig, TokenIds, read_config
from packcache.lumos.model import Lumos
from packcache.lumos.schedule import Sampling

__all__ = ["FPS", "SAMPLING", "SECONDS", "digits_config", "load_model", "text_ids"]

#: How a frame is decided unless asked otherwise; the history mask ratio is the trained one.
SAMPLING = Sampling(steps=12, guidance=3.0, history_mask_ratio=0.7)

#: The duration in every header, whatever the clip's length: the only one the weights ever saw.
SECONDS = 2

#: Token id of word 0; there is room for 40 words, then for the numbers 0 to 31, then for the codes.
WORD_ZERO = 8


def digits_config() -> LumosConfig:
    """5.4 M parameters; ids: specials 0-7, words 8-47, numbers 48-79, then the video codes."""
    codes = math.prod(LEVELS)
    return LumosConfig(
        vocab_size=80 + codes,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_theta=1000.0,
        rms_norm_eps=1e-5,
        trained_latent_frames=7,
        fsq_levels=LEVELS,
        token_ids=TokenIds(
            bos=0,
            sep=1,
            image_start=2,
            image_end=3,
            new_line=4,
            mask=5,
            video_start=6,
            video_end=7,
            size_zero=48,
            video_lo=80,
            video_hi=80 + codes,
        ),
    )


def text_ids(prompt: str) -> list[int]:
    """Token ids of a prompt, padded: what stands between BOS and the separator."""
    return [WORD_ZERO + word for word in prompts.encode(prompt)]


def load_model(folder: str | Path | None = None) -> Lumos:
    """The shipped network (or the one in `folder`), float32, for evaluation, without gradients."""
    source = str(resources.files("packcache.digits") / "weights") if folder is None else folder
    return weights.load_model(source, read_config(source), dtype="float32")
