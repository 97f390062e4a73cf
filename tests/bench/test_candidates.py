"""The engine as a candidate: it leaves no trace, tells its parts, and all see the same frames."""

from __future__ import annotations

import pytest
import torch

from packcache.bench.candidates import (
    DecoderCandidate,
    make_model,
    make_prefix,
    random_codes,
)
from packcache.bench.parts import Instrumented
from packcache.policies import PackCache
from packcache.reuse import PRESETS
from tests.bench.workloads import workload
from tests.tools import kv_bytes_of


@pytest.fixture(scope="module")
def model():
    return make_model(workload())


def candidate(model, reuse="exact", **settings):
    made = DecoderCandidate(model, workload(**settings), PackCache(), PRESETS[reuse])
    made.prefill()
    return made


@pytest.mark.parametrize("reuse", ["exact", "fast"])
def test_rehearsals_and_shares_leave_no_trace(model, reuse):
    one, two = candidate(model, reuse), candidate(model, reuse)
    for _ in range(4):
        one.advance()
        steps, forward = one.rehearse()
        assert steps > 0 and forward > 0
        shares = one.shares()
        assert set(shares) == {"attention", "linear", "head"} and min(shares.values()) > 0
        two.advance()
        assert kv_bytes_of(one.decoder) == kv_bytes_of(two.decoder)
        assert one.statistics() == two.statistics()
    assert "forward" not in vars(model)
    assert type(one.decoder.attend).__name__ == "CachedAttention"


def test_given_frames_are_clean_and_generated_ones_history(model):
    made = candidate(model)
    made.advance()
    (cache,) = made.decoder.caches
    assert [e.span.role.value for e in cache.timeline.entries] == ["text", "condition image"]
    made.advance()
    newest = cache.timeline.entries[-1].span
    assert newest.role.value == "history" and not newest.visible_mask().all()


def test_bookkeeping_is_the_opening_and_the_packing(model, monkeypatch):
    """A rebase at the opening of a frame is counted, although a rehearsal would hide it."""
    from packcache.bench import candidates

    made = candidate(model, frames=61)
    for _ in range(9):
        made.advance()
    (cache,) = made.decoder.caches
    opened = []
    real = cache.open
    monkeypatch.setattr(cache, "open", lambda *spans: (opened.append(cache.delta), real(*spans)))
    before = cache.delta
    clock = iter([0.0, 1.0] * 4)
    monkeypatch.setattr(candidates, "now", lambda _: next(clock))
    made._opening = 10.0
    assert made.advance() == 11.0  # what the opening took before, and this packing
    assert cache.delta > before  # the next frame was opened and has moved the anchors
    assert made._opening == 1.0
    assert len(opened) == 2


def test_it_is_instrumented(model):
    assert isinstance(candidate(model), Instrumented)


def test_every_row_of_a_run_sees_the_same_frames():
    asked = workload()
    assert random_codes(asked, 2).equal(random_codes(asked, 2))
    assert not random_codes(asked, 2).equal(random_codes(asked, 3))
    assert not random_codes(workload(seed=1), 2).equal(random_codes(asked, 2))
    codes = random_codes(asked, 0)
    assert codes.shape == (1, 8, 8) and codes.min() >= 0 and codes.max() < 128


def test_the_prefix_is_as_long_as_asked():
    assert len(make_prefix(workload(text_tokens=31)).ids) == 31


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_are_of_realistic_scale(dtype):
    made = make_model(workload(dtype=dtype))
    weight = made.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == dtype and not weight.requires_grad
    assert float(weight.float().std()) == pytest.approx(0.02, rel=0.05)
    assert float(made.model.norm.weight.float().mean()) == pytest.approx(1, abs=0.01)
    assert made.inv_freq.dtype == torch.float32
    again = make_model(workload(dtype=dtype)).model.layers[0].mlp.up_proj.weight
    assert again.equal(weight)


def test_the_embedded_models_weights_are_its_own():
    from packcache.bench.workload import make_workload
    from packcache.digits.model import load_model

    made = make_model(make_workload("digits", policies={"p": PackCache()}))
    assert made.lm_head.weight.equal(load_model().lm_head.weight)
