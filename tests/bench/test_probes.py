"""Probes time the engine's own functions, at the shapes their pieces say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from packcache.bench import probes as module
from packcache.bench.pieces import Piece
from packcache.bench.probes import Probes, cut, decoder, groups_at_once, shallow_model
from packcache.cache import FrameCache
from packcache.errors import InvalidSetting
from packcache.lumos import attend
from packcache.lumos.decode import Decoder
from packcache.lumos.model import Layer, Lumos
from packcache.lumos.random_weights import random_model
from packcache.policies import PackCache
from tests.bench.workloads import workload

TOKENS = 76


@pytest.fixture(scope="module")
def model():
    return random_model(workload().config)


@pytest.fixture
def calls(monkeypatch):
    """Queries and keys of every call of the attention, by the name of the function."""
    seen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def noting(name, call):
        def attend_and_note(q, keys, values):
            seen.append((name, tuple(q.shape), tuple(keys.shape)))
            return call(q, keys, values)

        return attend_and_note

    for home, name in ((attend, "attend"), (attend, "attend_lse"), (module, "attend_lse")):
        monkeypatch.setattr(home, name, noting(name, getattr(home, name)))
    return seen


def run(model, *pieces: Piece, **settings):
    """What the only probe of these pieces says, made and run once."""
    with torch.inference_mode():
        (probe,) = Probes(workload(**settings), model).of(pieces)
        assert probe.pieces == pieces
        ready = probe.make()
        return ready()


# --- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [TOKENS, 20])
def test_attention_over_what_is_held_and_the_frame(model, calls, rows):
    (seconds,) = run(model, Piece("attend", rows, 30))
    assert seconds > 0
    assert calls[-1] == ("attend", (4, rows, 32), (2, 30 + TOKENS, 32))


@pytest.mark.parametrize("rows", [TOKENS, 20])
def test_the_current_part_alone(model, calls, rows):
    """A warm-up that computes both parts, then the frame's own keys, and one query that moved."""
    run(model, Piece("current", rows))
    made_once = [("attend_lse", (4, TOKENS, 32), (2, keys, 32)) for keys in (11, TOKENS)]
    one_moved = ("attend_lse", (4, 1, 32), (2, 11, 32))
    assert calls == [*made_once, one_moved, ("attend_lse", (4, rows, 32), (2, TOKENS, 32))]


@pytest.mark.parametrize("rows", [TOKENS, 3])
def test_the_history_alone(model, calls, rows):
    run(model, Piece("history", rows, 30))
    assert calls == [("attend_lse", (4, rows, 32), (2, 30, 32))]


def test_one_group_of_heads_where_all_take_too_long(model, calls, monkeypatch):
    monkeypatch.setattr("packcache.bench.ceilings.ATTENTION_OPERATIONS", 0)
    assert groups_at_once(workload()) == 1
    run(model, Piece("attend", TOKENS, 30))
    run(model, Piece("history", 5, 30))
    assert {(queries, keys) for _, queries, keys in calls} == {
        ((2, TOKENS, 32), (1, 30 + TOKENS, 32)),
        ((2, 5, 32), (1, 30, 32)),
    }


# --- the network --------------------------------------------------------------------------------


def test_a_layer_without_its_attention(model, calls, monkeypatch):
    seen = []
    forward = Layer.forward

    def noting(self, x, rotary, layer, attend):
        seen.append((tuple(x.shape), tuple(rotary[0].shape)))
        return forward(self, x, rotary, layer, attend)

    monkeypatch.setattr(Layer, "forward", noting)
    run(model, Piece("layer", 20))
    assert seen == [((2, 20, 128), (2, 1, 20, 16))] and not calls


def test_as_many_layers_as_were_asked_take_turns_and_share_the_time(model, monkeypatch):
    """Seconds are one layer's: each of the three takes 6 here."""
    seen, time = [], [0.0]
    monkeypatch.setattr(module, "now", lambda device: time[0])

    def forward(self, x, rotary, layer, attend):
        seen.append(self)
        time[0] += 6.0
        return x

    monkeypatch.setattr(Layer, "forward", forward)
    assert run(model, Piece("layer", 20), layers=3) == [6.0]
    assert len(set(map(id, seen))) == len(seen) == 3
    seen.clear()
    assert run(cut(model, 2), Piece("layer", 20), layers=3) == [6.0] and len(seen) == 2


@pytest.mark.parametrize("number", range(4))
def test_a_step_without_layers(model, calls, monkeypatch, number):
    """The head is asked for the rows that are undecided then."""
    asked = workload()
    left = Probes(asked, model).left
    seen, head = [], Lumos.head
    monkeypatch.setattr(Lumos, "head", lambda *of: seen.append(of[1].shape) or head(*of))
    (seconds,) = run(model, Piece("step", left[number]))
    assert seconds > 0 and not calls
    assert [tuple(shape[-2:]) for shape in seen] == [(left[number], 128)]


def test_the_ends_and_what_a_frame_pays_once(model, calls):
    frame, ends = run(model, Piece("frame", 0), Piece("ends", 0))
    assert frame > 0 and ends > 0 and not calls


def test_the_text_through_one_layer(model, monkeypatch):
    engines = []
    prefill = Decoder.prefill
    monkeypatch.setattr(Decoder, "prefill", lambda self: engines.append(self) or prefill(self))
    (seconds,) = run(model, Piece("prefill", 11))
    (engine,) = engines
    assert seconds == engine.prefill_s > 0
    assert engine.model.config.num_hidden_layers == 1 and engine.caches[0].text == (11, 3)


# --- the cache ----------------------------------------------------------------------------------


def test_a_clip_through_caches_of_one_layer_and_of_two(model, monkeypatch):
    pieces = [
        Piece(kind, frame, 0, "packcache") for frame in range(5) for kind in ("cache", "deeper")
    ]
    caches, commit = [], FrameCache.commit

    def noting(self, **known):
        commit(self, **known)
        caches.append((self.stores[0].device.type, self.stores[0].layers, self.physical_length))

    monkeypatch.setattr(FrameCache, "commit", noting)
    seconds = run(model, *pieces)
    assert len(seconds) == 10 and min(seconds) >= 0 < min(seconds[::2])
    held = [11, 11 + TOKENS, *[11 + 2 * TOKENS] * 4]
    assert caches == [("cpu", layers, n) for layers in (1, 2) for n in held]


@pytest.mark.parametrize("a_layer, deeper", [(10.0, 10.0), (-3.0, 0.0)])
def test_opening_and_committing_count_and_the_forward_between_does_not(
    model, monkeypatch, a_layer, deeper
):
    """A clock that opening, committing by layers, and the forward move: what a layer adds is told,
    and is never less than nothing."""
    time = [0.0]
    monkeypatch.setattr(module, "now", lambda device: time[0])

    def taking(name, seconds, layer=0.0):
        call = getattr(FrameCache, name)

        def timed(self, *of, **known):
            time[0] += seconds + layer * self.stores[0].layers
            return call(self, *of, **known)

        monkeypatch.setattr(FrameCache, name, timed)

    taking("open", 1.0)
    taking("commit", 5.0, a_layer)
    taking("update", 100.0)
    seconds = run(model, Piece("cache", 1, 0, "full"), Piece("deeper", 4, 0, "full"))
    assert seconds == [6.0 + a_layer, deeper]


# --- what they share ----------------------------------------------------------------------------


def test_one_probe_a_piece_but_for_caches_and_ends(model):
    pieces = [
        Piece("layer", 20),
        Piece("cache", 0, 0, "full"),
        Piece("frame", 0),
        Piece("layer", TOKENS),
        Piece("deeper", 0, 0, "full"),
        Piece("cache", 0, 0, "window"),
        Piece("ends", 0),
    ]
    found = [probe.pieces for probe in Probes(workload(), model).of(pieces)]
    by_number = [[pieces.index(piece) for piece in together] for together in found]
    assert by_number == [[0], [3], [1, 4], [2, 6], [5]]


def test_a_cut_network_has_the_same_weights(model):
    small = cut(model, 1)
    assert small.config == dataclasses.replace(model.config, num_hidden_layers=1)
    assert len(small.model.layers) == 1 and len(model.model.layers) == 3
    assert small.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("layers", [0, 4])
def test_no_more_layers_than_there_are(model, layers):
    with pytest.raises(
        InvalidSetting, match=rf"^layers is {layers}, expected 1 to 3, what there are$"
    ):
        cut(model, layers)


def test_measuring_leaves_the_network_as_it_was(model):
    run(model, Piece("step", 64))
    assert len(model.model.layers) == 3


def test_random_weights_of_true_widths():
    asked = workload(dtype=torch.bfloat16)
    made = shallow_model(asked, 2)
    assert made.config == dataclasses.replace(asked.config, num_hidden_layers=2)
    assert made.lm_head.weight.dtype == torch.bfloat16


def test_the_engine_is_the_workloads(model):
    engine = decoder(workload(), model, PackCache())
    assert engine.prefixes[0].lengths == (11, 3)
    assert engine.caches[0].policy == PackCache() and engine.latents == 5
    assert (engine.layout, engine.sampling) == (workload().layout, workload().sampling)
