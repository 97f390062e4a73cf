"""What a config.json must say, and what it may leave out."""

from __future__ import annotations

import pytest
import torch

from packcache.errors import InvalidSetting
from packcache.lumos.config import SIZES, LumosConfig
from packcache.lumos.model import Lumos

SMALL = {
    "vocab_size": 129536,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}


def test_sizes_are_required_and_behaviour_is_not():
    config = LumosConfig.from_dict({**SMALL, "architectures": ["x"], "vocabulary_map": {}})
    assert (config.head_dim, config.swin_norm, config.model_parallel_size) == (32, False, 1)
    assert (config.trained_latent_frames, config.compression) == (7, (4, 8, 8))
    assert (config.token_ids.mask, config.token_ids.num_codes) == (9003, 64000)


@pytest.mark.parametrize("name", SMALL)
def test_a_missing_size_is_named(name):
    rest = {k: v for k, v in SMALL.items() if k != name}
    with pytest.raises(InvalidSetting, match=f"config lacks {name}: every size"):
        LumosConfig.from_dict(rest)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"num_attention_heads": 3},
            "hidden_size is 64, expected a multiple of num_attention_heads",
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads is 2, expected a multiple of num_key"),
        ({"hidden_size": 32}, "head size is 16, expected a multiple of 32"),
        ({"model_parallel_size": 2}, "model_parallel_size is 2, expected a divisor of 2 and 1"),
        ({"vocab_size": 1000}, "vocab_size is 1000, expected at least video_hi 129536"),
    ],
)
def test_sizes_that_do_not_fit_together(change, words):
    with pytest.raises(InvalidSetting, match=words):
        LumosConfig.from_dict({**SMALL, **change})


@pytest.mark.parametrize("name", SIZES)
def test_a_config_writes_and_reads_back(name):
    assert LumosConfig.from_dict(SIZES[name].to_dict()) == SIZES[name]


def test_parameters_of_the_inferred_sizes():
    """lumos1-spec 1.4: 1.504 B and 3.615 B with untied embeddings."""
    for name, billions in (("1b", 1.504), ("3b", 3.615)):
        with torch.device("meta"):
            model = Lumos(SIZES[name])
        count = sum(p.numel() for p in model.parameters())
        assert count / 1e9 == pytest.approx(billions, abs=0.001)
