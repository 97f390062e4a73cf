"""The network: precision, norms, grouped heads, the head's columns (golden data judge the rest)."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from packcache.lumos.config import SIZES
from packcache.lumos.model import HeadNorm, Lumos, RMSNorm
from packcache.policies import PackCache
from packcache.positions import text_positions
from tests.tools import recorder


def own_attention(layer: int, q, k, v):
    """Attention of a sequence to itself, causal, heads repeated."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def hidden(model: Lumos, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, model.rotary(text_positions(0, ids.shape[1])), own_attention)


def test_float64_stays_float64(tiny, tiny64):
    """No norm or table rounds on the way: the float64 twin is a judge of the float32 engine."""
    ids = torch.arange(20, 60)[None]
    wide = hidden(tiny64, ids)
    assert wide.dtype == torch.float64
    assert (hidden(tiny, ids) - wide).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_keep_the_dtype_and_work_wide(dtype):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    norm = RMSNorm(64, 1e-5).to(dtype)
    want = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert norm(x).dtype == dtype
    assert (norm(x).double() - want).abs().max() < 4 * torch.finfo(dtype).eps


def test_head_norm_rows_serve_their_share_of_heads():
    """lumos1-spec 1.2: row r of the affine for the r-th share of the heads."""
    norm = HeadNorm(2, 32)
    with torch.no_grad():
        norm.weight[1] = 3.0
        norm.bias[1] = 1.0
    x = torch.randn(1, 5, 4, 32)
    plain = F.layer_norm(x, (32,), eps=1e-5)
    out = norm(x)
    assert torch.allclose(out[:, :, :2], plain[:, :, :2])
    assert torch.allclose(out[:, :, 2:], 3 * plain[:, :, 2:] + 1)
    assert norm(x.bfloat16()).dtype == torch.float32


def test_the_head_gives_the_columns_it_is_asked_for(tiny):
    x = torch.randn(2, 3, 128)
    with torch.inference_mode():
        every, some = tiny.head(x), tiny.head(x, 144, 272)
    assert every.shape == (2, 3, 272) and every.dtype == torch.float32
    assert torch.allclose(every[..., 144:], some, atol=1e-5)


def test_swin_norm_is_another_network():
    """lumos1-spec 1.3: norms after attention and MLP instead of before."""
    config = SIZES["toy"]
    torch.manual_seed(0)
    plain = Lumos(config).eval()
    swin = Lumos(dataclasses.replace(config, swin_norm=True)).eval()
    swin.load_state_dict(plain.state_dict())
    ids = torch.arange(9)[None]
    x = swin.model.embed_tokens(ids)
    layer = swin.model.layers[0]
    with torch.inference_mode():
        rotary = swin.rotary(text_positions(0, 9))
        got = layer(x, rotary, 0, own_attention)
        want = x + layer.input_layernorm(layer.self_attn(x, rotary, 0, own_attention))
        want = want + layer.post_attention_layernorm(layer.mlp(want))
    assert torch.equal(got, want)
    assert not torch.allclose(hidden(plain, ids), hidden(swin, ids), atol=1e-2)


def test_parameter_names_are_the_checkpoint_keys():
    """lumos1-spec 1.6; rotary buffers are not saved."""
    names = set(Lumos(SIZES["toy"]).state_dict())
    layer = {n.removeprefix("model.layers.0.") for n in names if n.startswith("model.layers.0.")}
    assert layer == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"self_attn.{p}_norm.{a}" for p in "qk" for a in ("weight", "bias")),
        *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    }
    rest = {n for n in names if not n.startswith("model.layers.")}
    assert rest == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_frequencies_stay_float32_in_a_bf16_model():
    """lumos1-spec 2.4: bf16 weights, float32 frequencies; tables are rounded once, at the end."""
    model = Lumos(SIZES["toy"])
    before = model.inv_freq.clone()
    for narrow in (model.to(torch.bfloat16), model.half(), model.bfloat16()):
        assert torch.equal(narrow.inv_freq, before)
    cos, _ = model.rotary(text_positions(0, 500))
    exact = (torch.arange(500).double()[:, None] * before.double()).cos()
    assert cos.dtype == torch.bfloat16
    assert (cos.double() - exact).abs().max() < 2**-8
    assert torch.equal(model.double().inv_freq, before.double())
    assert torch.equal(model.float().inv_freq, before)


def test_a_bf16_engine_stays_close_to_float32(tiny):
    """K/V in bf16, logits of the first draft near the float32 ones."""
    exact, rounded = (
        recorder(tiny, PackCache()),
        recorder(copy.deepcopy(tiny).bfloat16(), PackCache()),
    )
    exact.run(5), rounded.run(5)
    assert rounded.caches[0].stores[0].keys(0).dtype == torch.bfloat16
    assert rounded.results[-1].kv_bytes * 2 == exact.results[-1].kv_bytes
    want, got = exact.forwards[0].hidden, rounded.forwards[0].hidden
    assert (got.float() - want).norm() / want.norm() < 0.03
