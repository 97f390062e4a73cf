"""Predictions: what the engine then does, key by key, and what follows from the ceilings."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packcache.bench.parts import Ceilings
from packcache.bench.predict import (
    Traffic,
    frame_floor,
    frame_seconds,
    frame_traffic,
    held_tokens,
    predict,
    predict_row,
    stock_work,
)
from packcache.bench.probes import decoder
from packcache.errors import InvalidSetting
from packcache.lumos import attend
from packcache.lumos.cost import Operations, clip_work, frame_work, stock_frame_operations
from packcache.lumos.plan import plan
from packcache.lumos.random_weights import random_model
from packcache.lumos.vocab import HEADER
from packcache.policies import FullCache, PackCache, SlidingWindow, UniformHistory
from packcache.reuse import EXACT
from tests.bench.workloads import POLICIES, PRESETS, workload

CEILINGS = Ceilings(matmul=4e9, attention=1e9, copy=1e12)

NARROW = PackCache(budget="2tok", window=4)


@pytest.fixture(scope="module")
def model():
    return random_model(workload().config)


def codes(asked, value: int = 0):
    return torch.full((1, asked.layout.rows, asked.layout.cols), value)


# --- the engine does what was said --------------------------------------------------------------


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("policy", [*POLICIES.values(), UniformHistory()], ids=repr)
def test_tokens_held_are_those_of_a_run(model, policy, task):
    asked = workload(task=task, frames=33)
    engine = decoder(asked, model, policy)
    engine.prefill()
    seen = []
    for frame in range(asked.latents):
        seen.append(engine.caches[0].physical_length)
        engine.give(codes(asked), as_generated=frame >= asked.given)
    assert held_tokens(asked, policy) == seen


@pytest.mark.parametrize("preset", PRESETS)
def test_attention_computes_and_reads_what_was_said(model, preset, monkeypatch):
    """Every key of every call of one branch's attention is counted, and every pair with a query."""
    asked = workload(text_tokens=HEADER)  # so that both branches hold as many
    reuse, config = PRESETS[preset], asked.config
    engine = decoder(asked, model, reuse=reuse)
    engine.prefill()
    engine.give(codes(asked))
    pairs, keys_read = [], []

    def noting(call):
        def attend_and_note(q, keys, values):
            pairs.append(q.shape[1] * keys.shape[1])
            keys_read.append(keys.shape[1])
            return call(q, keys, values)

        return attend_and_note

    for name in ("attend", "attend_lse"):
        monkeypatch.setattr(attend, name, noting(getattr(attend, name)))
    engine.rehearse()
    held = HEADER + asked.layout.tokens
    work = frame_work(config, asked.layout, asked.sampling, held, reuse=reuse)
    assert work.attention == 4 * config.hidden_size * sum(pairs)
    slot = 2 * config.num_key_value_heads * config.head_dim * 4
    assert frame_traffic(asked, held, reuse=reuse).attention == slot * sum(keys_read)


def test_weights_are_read_once_a_forward():
    asked, config = workload(), workload().config
    body = 3 * (128 * (2 * 128 + 2 * 64) + 3 * 128 * 96) * 4
    assert frame_traffic(asked, 11) == Traffic(
        linear=5 * body,
        attention=2 * 5 * 3 * (11 + 76) * 2 * 64 * 4,
        head=4 * 128 * config.token_ids.num_codes * 4,
    )
    given_frame = frame_traffic(asked, 11, given=True)
    assert (given_frame.linear, given_frame.head) == (body, 0)
    assert given_frame.attention == 2 * 3 * (11 + 76) * 2 * 64 * 4


def test_narrow_numbers_are_half_the_bytes():
    wide, narrow = (
        dataclasses.astuple(frame_traffic(workload(dtype=dtype), 100))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide == tuple(2 * size for size in narrow)


# --- seconds ------------------------------------------------------------------------------------


def test_the_time_model():
    work = Operations(linear=8_000, attention=3_000, head=4_000)
    assert frame_seconds(work, CEILINGS) == pytest.approx(12e3 / 4e9 + 3e3 / 1e9)


def test_the_floor_is_computing_or_reading_whichever_takes_longer():
    work = Operations(linear=8_000, attention=3_000, head=4_000)
    ceilings = dataclasses.replace(CEILINGS, copy=1e9)
    nothing = Traffic(linear=0, attention=0, head=0)
    assert frame_floor(work, nothing, ceilings) == pytest.approx(frame_seconds(work, ceilings))
    much = Traffic(linear=50_000, attention=2_000, head=6_000)
    assert frame_floor(work, much, ceilings) == pytest.approx(50e-6 + 3e-6 + 6e-6)


@given(st.floats(1e6, 1e12), st.floats(1e6, 1e12), st.floats(1e6, 1e12))
@settings(max_examples=20)
def test_no_floor_lies_below_the_time_model(matmul, attention, copy):
    ceilings = Ceilings(matmul=matmul, attention=attention, copy=copy)
    row = predict_row(workload(), PackCache(), PRESETS["both"], ceilings)
    least = [seconds * (1 - 1e-9) for seconds in row.seconds]  # sums round in different orders
    assert all(f >= s for f, s in zip(row.floor_s, least, strict=True))
    assert row.total_s == sum(row.seconds) and row.last_s == row.seconds[-1]


# --- the table ----------------------------------------------------------------------------------


def test_rows_are_policies_by_presets_then_baselines():
    found = predict(workload(baselines=("torch-full", "stock")), CEILINGS)
    rows = [(label, preset) for label in POLICIES for preset in PRESETS]
    assert list(found.rows) == [*rows, ("torch-full", "exact"), ("stock", "exact")]
    assert not found.reasons


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_operations_are_those_of_the_clip(task):
    asked = workload(task=task)
    for (label, preset), row in predict(asked, CEILINGS).rows.items():
        counted = clip_work(
            asked.config,
            asked.layout,
            asked.sampling,
            held_tokens(asked, POLICIES[label]),
            given=asked.given,
            reuse=PRESETS[preset],
        )
        assert row.operations == [frame.total for frame in counted]


def test_attention_at_a_lower_rate_makes_packing_worth_more():
    """Why attention has a ceiling of its own: what packing saves is attention."""

    def faster(rate: float) -> tuple[float, float]:
        """The window's gain at LAST, by seconds and by operations."""
        rows = predict(workload(), dataclasses.replace(CEILINGS, attention=rate)).rows
        full, window = rows["full", "exact"], rows["window", "exact"]
        return full.last_s / window.last_s, full.operations[-1] / window.operations[-1]

    slow, counted = faster(CEILINGS.matmul / 4)
    assert slow > counted
    assert faster(CEILINGS.matmul) == pytest.approx((counted, counted))


def test_the_prediction_of_the_methods_at_full_size():
    """672x384, 48 frames, image-to-video: about 2.45x LAST and 1.67x TOTAL (methods 3.9)."""
    sampling = dataclasses.replace(workload().sampling, steps=50)
    asked = workload(
        "3b",
        size=(672, 384),
        frames=48,
        text_tokens=200,
        sampling=sampling,
        presets={"exact": EXACT},
    )
    rows = predict(asked, CEILINGS).rows
    full, packed = (rows[label, "exact"].operations for label in ("full", "packcache"))
    assert full[-1] / packed[-1] == pytest.approx(2.45, rel=0.05)
    assert sum(full) / sum(packed) == pytest.approx(1.67, rel=0.05)


def test_a_policy_that_cannot_fit_has_a_reason_and_the_others_go_on():
    policies = {"narrow": NARROW, "window": SlidingWindow()}
    found = predict(workload(policies=policies), CEILINGS)
    assert {label for label, _ in found.rows} == {"window"}
    assert {label for label, _ in found.reasons} == {"narrow"}
    assert len(found.reasons) == len(PRESETS) and all(found.reasons.values())
    with pytest.raises(InvalidSetting):
        predict_row(workload(), NARROW, EXACT, CEILINGS)


def test_no_row_at_all():
    found = predict(workload(policies={"narrow": NARROW}), CEILINGS)
    assert not found.rows and len(found.reasons) == len(PRESETS)


def test_stock_cannot_be_without_guidance():
    sampling = dataclasses.replace(workload().sampling, guidance=1.0)
    found = predict(workload(sampling=sampling, baselines=("stock",)), CEILINGS)
    assert "the stock engine was asked for" in found.reasons["stock", "exact"]


@pytest.mark.parametrize("held", [11, 400])
def test_upstreams_operations_by_kind(held):
    asked = workload()
    work = stock_work(asked, held)
    total = stock_frame_operations(asked.config, asked.layout, asked.sampling, held)
    assert work.total == total
    assert work.head == 2 * 5 * 2 * 76 * 128 * asked.config.vocab_size
    own = frame_work(asked.config, asked.layout, asked.sampling, held)
    assert (work.linear, work.attention) == (own.linear, own.attention)
    assert stock_work(asked, held, given=True).total == pytest.approx(total / 5, abs=3)


def test_live_memory_is_the_planners():
    asked = workload(baselines=("stock",))
    found = predict(asked, CEILINGS).rows
    settings = {"size": asked.size, "frames": asked.frames, "sampling": asked.sampling}
    settings |= {"dtype": asked.dtype, "text_tokens": asked.text_tokens, "image": True}
    for label, preset, extra in (
        ("packcache", "exact", {"policy": PackCache()}),
        ("full", "both", {"policy": FullCache(), "reuse": PRESETS["both"]}),
        ("stock", "exact", {"engine": "stock"}),
    ):
        made = plan(asked.config, **settings, **extra)
        assert found[label, preset].live_bytes == made.total_bytes
    assert found["full", "both"].live_bytes > found["full", "exact"].live_bytes
