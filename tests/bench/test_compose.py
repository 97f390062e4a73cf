"""Composed rows: every operation of the engine is in a piece, and the sums are sums."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packcache.bench import compose as module
from packcache.bench.compose import (
    check,
    compose,
    frame_uses,
    measure,
    needed,
    stock_frames,
)
from packcache.bench.pieces import Piece, Pieces, Probe
from packcache.bench.predict import held_tokens
from packcache.bench.probes import Probes, groups_at_once, shallow_model
from packcache.errors import InputError, InvalidSetting
from packcache.lumos.cost import frame_work, linear_parameters
from packcache.lumos.schedule import undecided
from packcache.policies import PackCache
from packcache.reuse import EXACT, StepReuse
from tests.bench.workloads import POLICIES, PRESETS, workload

NARROW = PackCache(budget="2tok", window=4)

reuses = st.builds(StepReuse, history_every=st.integers(1, 5), rest_every=st.integers(1, 5))


def seconds_of(piece: Piece) -> float:
    """Made up; straight in the rows, different for every kind, number of keys and label."""
    odd = sum(map(ord, piece.kind + piece.label)) % 7 + 1
    return odd * (1 + 0.01 * piece.rows) * (1 + 0.001 * piece.held)


def made_up(asked, **failed: str) -> Pieces:
    """All pieces of a workload with such seconds, but for kinds that failed."""
    pieces = needed(asked)
    return Pieces(
        seconds={p: np.full(3, seconds_of(p)) for p in pieces if p.kind not in failed},
        failed={p: failed[p.kind] for p in pieces if p.kind in failed},
    )


def rows_of(asked):
    return [(label, reuse) for label in asked.policies for reuse in asked.presets.values()]


# --- what a latent frame is made of -------------------------------------------------------------


def operations(asked, piece: Piece) -> tuple[float, float, float]:
    """Linear, attention and head of one call of a piece, from its shapes."""
    config, tokens, branches = asked.config, asked.layout.tokens, asked.sampling.branches
    heads = groups_at_once(asked) * config.num_attention_heads // config.num_key_value_heads
    keys = {"attend": piece.held + tokens, "current": tokens, "history": piece.held}
    pairs = piece.rows * keys.get(piece.kind, 0)
    layer = linear_parameters(config) // config.num_hidden_layers
    return (
        branches * 2 * layer * piece.rows * (piece.kind == "layer"),
        4 * pairs * heads * config.head_dim,
        2 * piece.rows * config.hidden_size * 128 * (piece.kind == "step"),  # guided before it
    )


@given(reuses, st.integers(1, 9), st.integers(0, 400), st.booleans(), st.booleans())
def test_every_operation_is_in_a_piece(reuse, layers, held, is_given, guided):
    """Counted piece by piece, a latent frame is what `cost` says, kind by kind."""
    asked = workload()
    asked = dataclasses.replace(
        asked,
        config=dataclasses.replace(asked.config, num_hidden_layers=layers),
        sampling=dataclasses.replace(asked.sampling, guidance=3.0 if guided else 1.0),
    )
    uses = list(frame_uses(asked, held, reuse, layers, given=is_given))
    counted = np.array([np.multiply(operations(asked, u.piece), u.times) for u in uses])
    work = frame_work(asked.config, asked.layout, asked.sampling, held, given=is_given, reuse=reuse)
    assert counted.sum(axis=0) == pytest.approx((work.linear, work.attention, work.head))


def test_one_group_of_heads_counts_as_often_as_there_are_groups(monkeypatch):
    def attention() -> list[float]:
        uses = frame_uses(workload(), 100, EXACT, 3)
        return [use.times for use in uses if use.piece.kind == "attend"]

    both = attention()
    monkeypatch.setattr("packcache.bench.ceilings.ATTENTION_OPERATIONS", 0)
    assert both == [2 * 3] * 5 and attention() == [2 * 2 * 3] * 5


def test_a_frame_pays_once_what_each_step_was_timed_with():
    uses = list(frame_uses(workload(), 100, EXACT, 3))
    assert sum(u.times for u in uses if u.piece.kind == "step") == 4
    assert [u.times for u in uses if u.piece.kind == "frame"] == [1 - 4]
    given_frame = [u.piece.kind for u in frame_uses(workload(), 11, EXACT, 3, given=True)]
    assert given_frame == ["ends", "layer", "attend"]


def test_named_steps_alone():
    kinds = [u.piece.kind for u in frame_uses(workload(), 100, EXACT, 3, steps=(0, 2))]
    assert kinds.count("step") == 2 and kinds.count("layer") == 3


# --- what is measured ---------------------------------------------------------------------------


def test_few_numbers_of_rows_and_every_number_of_keys():
    asked = workload(sampling=dataclasses.replace(workload().sampling, steps=40))
    pieces = needed(asked)
    assert len(pieces) == len(set(pieces))
    rows = {kind: {p.rows for p in pieces if p.kind == kind} for kind in ("layer", "step")}
    assert max(rows["layer"]) == 76 and len(rows["layer"]) <= 8
    assert max(rows["step"]) == 64 and len(rows["step"]) <= 6
    held = {n for policy in POLICIES.values() for n in held_tokens(asked, policy)}
    assert {p.held for p in pieces if p.kind == "attend" and p.rows == 76} == held


def test_rows_share_their_pieces():
    """Until the first eviction all policies hold the same; presets share their commits."""
    alone = [set(needed(workload(policies={k: v}))) for k, v in POLICIES.items()]
    together = set(needed(workload()))
    assert together >= set.union(*alone) - {p for p in set.union(*alone) if p.kind != "attend"}
    assert len(together) < sum(map(len, alone))


@given(reuses, st.sampled_from(["t2v", "i2v"]), st.integers(1, 30))
@settings(max_examples=10)
def test_what_is_needed_is_enough(reuse, task, steps):
    sampling = dataclasses.replace(workload().sampling, steps=steps)
    asked = workload(task=task, sampling=sampling, presets={"exact": EXACT, "other": reuse})
    pieces = made_up(asked)
    for label, own in rows_of(asked):
        assert compose(asked, pieces, label, own).reason is None


def test_another_workload_s_pieces_do_not_do():
    pieces = made_up(workload(text_tokens=20))
    with pytest.raises(InvalidSetting, match="was not measured, and it does not lie between rows"):
        compose(workload(), pieces, "full", EXACT)


def test_measured_in_turns(monkeypatch):
    """Every probe once a round, the same order in each; as many numbers as repeats."""
    log: list[Piece] = []
    make = Probes.of

    def noting(self, pieces):
        return [
            Probe(pieces=p.pieces, make=lambda p=p: log_runs(p.pieces[0], p.make()))
            for p in make(self, pieces)
        ]

    def log_runs(piece, run):
        return lambda: log.append(piece) or run()

    monkeypatch.setattr(Probes, "of", noting)
    asked = workload(repeats=3, presets={"both": PRESETS["both"]})
    pieces = measure(asked)
    assert not pieces.failed and set(pieces.seconds) == set(needed(asked))
    assert {len(times) for times in pieces.seconds.values()} == {3}
    for piece, times in pieces.seconds.items():
        assert (times >= 0).all() if piece.kind == "deeper" else (times > 0).all()
    round_ = log[: len(log) // 4]
    assert log == round_ * 4 and len(set(round_)) == len(round_)


def test_measured_rows_are_whole():
    asked = workload(policies={"packcache": PackCache()}, repeats=1)
    pieces = measure(asked)
    for label, reuse in rows_of(asked):
        made = compose(asked, pieces, label, reuse)
        assert made.reason is None and made.total.value > made.last.value > 0
        assert min(frame.steps for frame in made.frames[1:]) > 0 == made.frames[0].steps


# --- sums ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_clip_is_its_frames_and_a_frame_its_parts(task, preset):
    asked = workload(task=task)
    made = compose(asked, made_up(asked), "window", PRESETS[preset])
    assert len(made.frames) == asked.latents
    frames = [frame.total for frame in made.frames]
    assert made.total.value == pytest.approx(made.prefill + sum(frames))
    assert made.last.value == pytest.approx(frames[-1])
    for frame in made.frames:
        assert sum(frame.shares.values()) == pytest.approx(frame.steps + frame.forward)
    assert made.frames[-1].shares.keys() == {"attention", "linear", "head"}


def test_seconds_by_hand():
    asked = workload(policies={"full": POLICIES["full"]})
    made = compose(asked, made_up(asked), "full", EXACT, layers=7)
    last, held = made.frames[-1], 11 + 4 * 76
    once = {
        kind: seconds_of(Piece(kind, rows, n))
        for kind, rows, n in [
            ("layer", 76, 0),
            ("attend", 76, held),
            ("ends", 0, 0),
            ("frame", 0, 0),
        ]
    }
    steps = sum(seconds_of(Piece("step", rows)) for rows in undecided(64, 4))
    forward = 7 * (once["layer"] + 2 * once["attend"])
    assert last.forward == pytest.approx(forward + once["ends"])
    assert last.steps == pytest.approx(4 * forward + steps - 3 * once["frame"])
    cache, deeper = (seconds_of(Piece(kind, 4, 0, "full")) for kind in ("cache", "deeper"))
    assert last.bookkeeping == pytest.approx(cache + 6 * deeper)
    assert made.prefill == pytest.approx(7 * seconds_of(Piece("prefill", 11)))


def test_upstreams_way_by_hand():
    """Three latent frames are timed, the others lie between; a layer is what one adds to none."""
    asked = workload(baselines=("stock",))
    assert stock_frames(asked) == [1, 2, 4]
    assert stock_frames(workload(frames=5)) == [1]
    made = compose(asked, made_up(asked), "stock", EXACT, layers=7)

    ends = seconds_of(Piece("stock ends", 0))
    steps = {n: 4 * (ends + 7 * (seconds_of(Piece("stock", n)) - ends)) for n in (1, 2, 4)}
    for frame, seconds in steps.items():
        assert made.frames[frame].steps == pytest.approx(seconds)
    assert made.frames[3].steps == pytest.approx((steps[2] + steps[4]) / 2)
    assert all(frame.forward == 0 and frame.bookkeeping == 0 for frame in made.frames)
    assert made.frames[0].total == 0 and made.prefill == 0  # flatters it, and is said
    assert made.total.value == pytest.approx(sum(frame.total for frame in made.frames))
    assert not made.frames[4].shares


def test_upstreams_way_that_does_not_fit():
    asked = workload(baselines=("stock",))
    made = compose(asked, made_up(asked, stock="out of memory"), "stock", EXACT)
    assert made.reason == "stock, rows 1: out of memory"


def test_depth_is_a_straight_line():
    asked = workload()
    pieces = made_up(asked)
    for label, reuse in rows_of(asked):
        seconds = [compose(asked, pieces, label, reuse, layers=n).total.value for n in (2, 4, 6)]
        assert seconds[2] - seconds[1] == pytest.approx(seconds[1] - seconds[0])
        assert seconds[1] > seconds[0]


def test_the_default_depth_is_the_configs():
    asked = workload()
    pieces = made_up(asked)
    default, same = (compose(asked, pieces, "full", EXACT, layers=n) for n in (None, 3))
    assert default.total.value == same.total.value


def test_intervals_come_from_the_rounds_and_ratios_are_paired():
    """A round that is twice as slow for all pieces widens the totals and not their ratio."""
    asked = workload()
    slow = np.array([1.0, 2.0, 1.0, 4.0, 1.0, 3.0, 1.5])
    pieces = Pieces(seconds={p: slow * seconds_of(p) for p in needed(asked)}, failed={})
    full, packed = (compose(asked, pieces, label, EXACT).total for label in ("full", "packcache"))
    assert full.low < full.value < full.high and packed.low < packed.value < packed.high
    ratio = full.over(packed)
    assert ratio.low == pytest.approx(ratio.value) == pytest.approx(ratio.high)


# --- what could not be measured -----------------------------------------------------------------


def test_rows_made_of_a_failed_piece_have_its_reason_and_the_others_stand():
    asked = workload()
    pieces = made_up(asked, history="can't allocate memory")
    for label, reuse in rows_of(asked):
        made = compose(asked, pieces, label, reuse)
        if reuse.keeps_history:
            assert made.reason is not None and made.reason.startswith("history, rows ")
            assert made.reason.endswith(": can't allocate memory")
            assert (made.frames, made.total, made.last) == ((), None, None)
        else:
            assert made.reason is None


def test_a_piece_that_does_not_fit_in_memory(monkeypatch):
    def too_much(self, held):
        raise RuntimeError(f"can't allocate memory: {held}\nwith a trace")

    monkeypatch.setattr(Probes, "_held_cache", too_much)
    asked = workload(repeats=1, policies={"full": POLICIES["full"]}, presets={"exact": EXACT})
    pieces = measure(asked)
    assert {p.kind for p in pieces.failed} == {"attend"}
    made = compose(asked, pieces, "full", EXACT)
    assert made.reason == "attend, rows 76, held 11: can't allocate memory: 11"


def test_a_policy_that_cannot_fit():
    asked = workload(policies={"narrow": NARROW, "full": POLICIES["full"]})
    pieces = made_up(asked)
    assert "2 tokens" in str(compose(asked, pieces, "narrow", EXACT).reason)
    assert compose(asked, pieces, "full", EXACT).reason is None
    assert needed(workload(policies={"narrow": NARROW})) == []


# --- the check ----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", POLICIES)
def test_bookkeeping_is_never_negative_and_grows_with_layers(label):
    """Whatever the clock says of one layer and of two."""
    asked = workload(repeats=1, presets={"exact": EXACT}, policies={label: POLICIES[label]})
    pieces = measure(asked)
    few, many = (compose(asked, pieces, label, EXACT, layers=n).frames for n in (1, 30))
    for one, other in zip(few, many, strict=True):
        assert 0 < one.bookkeeping <= other.bookkeeping


def test_so_many_layers_are_measured_as_are_asked(monkeypatch):
    made = []
    monkeypatch.setattr(module, "needed", lambda asked: [])
    monkeypatch.setattr(
        module, "shallow_model", lambda asked, layers: made.append(layers) or shallow_model(asked)
    )
    for layers in (1, 2, 3):
        measure(workload(layers=layers))
    assert made == [2, 2, 3]  # two at least: a cache of one layer does not tell what one more adds


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("preset, steps", [("exact", (0, 2)), ("exact", None), ("both", None)])
def test_checked_against_the_engine(task, preset, steps):
    found = check(workload(task=task), layers=(1, 3), reuse=PRESETS[preset], steps=steps, repeats=3)
    parts = [(one.layers, one.part) for one in found]
    assert parts == [(1, "steps"), (1, "forward"), (3, "steps"), (3, "forward")]
    for one in found:
        assert one.measured.low <= one.measured.value <= one.measured.high
        told = one.to_json()
        assert told["ratio"] == pytest.approx(told["composed_s"] / told["measured_s"])
        assert told["ratio_interval"] == [one.ratio.low, one.ratio.high]
        assert told["frame"] == int(task == "i2v") and told["repeats"] == 3
        assert told["steps"] == (None if steps is None else [0, 2])


def test_a_check_counts_the_first_generated_frame(monkeypatch):
    seen = []

    def noting(asked, held, *of, **known):
        seen.append(held)
        return frame_uses(asked, held, *of, **known)

    monkeypatch.setattr(module, "frame_uses", noting)
    for task in ("t2v", "i2v"):
        check(workload(task=task), layers=(1,), repeats=1)
    assert seen == [11, 11 + 76]


def test_a_check_that_does_not_fit(monkeypatch):
    def too_much(self, held):
        raise MemoryError

    monkeypatch.setattr(Probes, "_held_cache", too_much)
    with pytest.raises(
        InputError,
        match=r"^1 layers cannot be checked \(attend, rows 76, held 87: MemoryError\): "
        r"choose fewer or a smaller size$",
    ):
        check(workload(), layers=(1,), repeats=1)
