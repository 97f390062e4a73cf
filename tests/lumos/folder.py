"""A checkpoint folder of exactly the released shape, tiny and random: Lumos-1's ids, all files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from packcache.lumos.config import LumosConfig
from packcache.lumos.random_weights import write_random
from tests.lumos import test_cosmos
from tests.lumos.tokenizer_file import write_tokenizer

__all__ = ["TINY", "write_codec", "write_folder"]

#: Two layers of one head of 32; the vocabulary, and so 99 % of the bytes, is the released one.
TINY = LumosConfig(
    vocab_size=129536,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=1,
    num_key_value_heads=1,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
)


def write_folder(folder: Path, *, shard_bytes: int | None = None) -> Path:
    """Weights, a config with upstream's own fields only, and a tokenizer."""
    write_random(folder, TINY, seed=1, dtype=torch.bfloat16, shard_bytes=shard_bytes)
    ours = {"token_ids", "compression", "fsq_levels", "trained_latent_frames"}
    kept = {k: v for k, v in TINY.to_dict().items() if k not in ours}
    upstream = {
        "architectures": ["ChameleonXLLMXForConditionalGeneration_MMRoPE"],
        "model_type": "chameleon",
        "mm_rope": True,
        "torch_dtype": "bfloat16",
        "vocabulary_map": {f"<reserved{n:05d}>": n + 4 for n in range(8192, 9100)},
    }
    (folder / "config.json").write_text(json.dumps({**kept, **upstream}))
    write_tokenizer(folder / "tokenizer.json")
    return folder


def write_codec(folder: Path, *, encoder: bool = True, group: int = 4, patch: int = 8) -> Path:
    """`encoder.jit` and `decoder.jit` of 4x8x8 with 64,000 codes; the decoder reaches 2 back."""
    folder.mkdir(exist_ok=True)
    parts = {"decoder": test_cosmos.Decoder(reach=2, group=group, patch=patch)}
    if encoder:
        parts["encoder"] = test_cosmos.Encoder(group=group, patch=patch)
    test_cosmos.save(folder, **parts)
    assert math.prod(TINY.fsq_levels) == TINY.token_ids.num_codes
    return folder
