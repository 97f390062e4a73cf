"""Attention in parts: the kernels' log-sum-exp, the exact merge, groups of heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from packcache.attention import attend, attend_causal, attend_lse, attend_lse_plain, merge


def tensors(heads=4, kv=2, queries=7, keys=19, size=32, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, queries, size), (kv, keys, size), (kv, keys, size))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("heads, kv", [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_groups_repeat_no_key_but_say_the_same(heads, kv, causal):
    """lumos1-spec 1.1: query head h reads key head h // group."""
    q, k, v = tensors(heads, kv, keys=7 if causal else 19)
    got = attend_causal(q, k, v) if causal else attend(q, k, v)
    for head in range(heads):
        scores = q[head] @ k[head // (heads // kv)].T / 32**0.5
        if causal:
            scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
        want = scores.softmax(-1) @ v[head // (heads // kv)]
        assert torch.allclose(got[head], want, atol=1e-12)


def test_any_memory_layout_of_an_attention_kernel_will_do(monkeypatch):
    """The memory-efficient kernel gives its output with the axes of queries and heads swapped."""
    q, k, v = tensors(dtype=torch.float32)
    expected = attend(q, k, v)
    kernel = F.scaled_dot_product_attention

    def swapped(*arguments, **options):
        out = kernel(*arguments, **options)
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", swapped)
    assert torch.equal(attend(q, k, v), expected)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("heads, kv", [(4, 4), (6, 2)])
@pytest.mark.parametrize(
    "dtype, near", [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
def test_the_kernel_says_the_log_sum_exp_that_plain_operations_say(dtype, near, heads, kv, size):
    q, k, v = tensors(heads, kv, queries=37, keys=70, size=size, dtype=dtype)
    out, lse = attend_lse(q, k, v)
    plain, plain_lse = attend_lse_plain(q, k, v)
    assert out.shape == q.shape and out.dtype == dtype
    assert lse.shape == q.shape[:2] and lse.dtype == torch.promote_types(dtype, torch.float32)
    assert (out - plain).abs().max() <= near
    assert (lse - plain_lse).abs().max() <= min(near, 1e-4)


def test_a_kernel_that_says_its_log_sum_exp_attends_as_the_other():
    """One kernel on a CPU: to the bit."""
    q, k, v = tensors(dtype=torch.float32)
    assert torch.equal(attend_lse(q, k, v)[0], attend(q, k, v))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 18), st.integers(0, 99), st.floats(0, 60))
def test_two_parts_are_the_whole(cut, seed, scale):
    """However the keys are divided, and however much of the softmax lies on one side."""
    q, k, v = tensors(seed=seed)
    k[:, :cut] *= scale
    parts = [attend_lse(q, k[:, at], v[:, at]) for at in (slice(cut), slice(cut, None))]
    whole = attend(q, k, v)
    assert torch.allclose(merge(*parts[0], *parts[1]), whole, atol=1e-10)
    assert torch.allclose(merge(*parts[1], *parts[0]), whole, atol=1e-10)


def test_the_merge_rounds_once():
    """bf16 parts are merged in float32: the error is that of a bf16 result, not more."""
    exact = tensors(queries=64, keys=300)
    q, k, v = (x.bfloat16() for x in exact)
    parts = [attend_lse(q, k[:, at], v[:, at]) for at in (slice(100), slice(100, None))]
    merged = merge(*parts[0], *parts[1])
    whole = attend(q.double(), k.double(), v.double())
    direct = (attend(q, k, v).double() - whole).abs().max()
    assert merged.dtype == torch.bfloat16
    assert (merged.double() - whole).abs().max() <= 2 * direct


def test_weights_that_ignore_the_log_sum_exp_are_seen():
    """The property above can fail: parts averaged as if they weighed the same."""
    q, k, v = tensors()
    parts = [attend_lse(q, k[:, at], v[:, at])[0] for at in (slice(4), slice(4, None))]
    assert not torch.allclose((parts[0] + parts[1]) / 2, attend(q, k, v), atol=1e-3)
