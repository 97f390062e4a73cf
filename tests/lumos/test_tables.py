"""Rotary tables written once and moved on: to the bit those made anew."""

from __future__ import annotations

import copy

import pytest
import torch

from packcache import positions
from packcache.lumos.tables import FrameTables
from packcache.lumos.vocab import Vocab

LENGTHS = (11, 3, 7)


def anew(model, vocab, layout, frame):
    """The slow twin: position ids and angles of every token of every branch."""
    rows = [model.rotary(vocab.frame_positions(n, frame, layout)) for n in LENGTHS]
    return [torch.stack(part)[:, None] for part in zip(*rows, strict=True)]


def tables(model, size=(64, 96)):
    vocab = Vocab(model.config)
    layout = vocab.layout(*size)
    return FrameTables(model, vocab, layout, LENGTHS), vocab, layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_frame_is_as_if_made_anew(tiny, dtype):
    model = copy.deepcopy(tiny).to(dtype)
    made, vocab, layout = tables(model)
    for frame in (0, 1, 2, 3, 50, 2, 1000, 7):
        got = made.at(frame)
        for own, twin in zip(got, anew(model, vocab, layout, frame), strict=True):
            assert own.dtype == dtype and torch.equal(own, twin)


def test_tables_are_written_in_place(tiny):
    made, _, _ = tables(tiny)
    first = made.at(0)
    assert all(one is two for one, two in zip(first, made.at(5), strict=True))


def test_positions_that_need_float64_are_made_anew(tiny, monkeypatch):
    """Where one branch, being longer, gets there a frame before another."""
    made, vocab, layout = tables(tiny)
    monkeypatch.setattr(positions, "FLOAT64_FROM", 10 * layout.tokens + 5)
    for frame in range(14):
        for own, twin in zip(made.at(frame), anew(tiny, vocab, layout, frame), strict=True):
            assert torch.equal(own, twin)


def test_a_table_that_stands_still_is_seen(tiny):
    """The comparison above can fail: only time and borders move, and they do."""
    made, _, layout = tables(tiny)
    cos, _ = (table.clone() for table in made.at(0))
    later, _ = made.at(1)
    moved = (cos != later).any(dim=(0, 1))
    body = torch.from_numpy(layout.cells()[0] >= 0)
    time = positions.temporal_pairs(tiny.config.head_dim)
    assert moved[~body].any(dim=1).all() and moved[body][:, time].any()
    others = [pair for pair in range(moved.shape[1]) if pair not in time.tolist()]
    assert not moved[body][:, others].any()
