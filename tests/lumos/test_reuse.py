"""Reuse across steps against a slow twin that keeps every token's state by itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from packcache.errors import InvalidSetting
from packcache.lumos import attend
from packcache.lumos.decode import Decoder
from packcache.lumos.tables import FrameTables
from packcache.policies import FullCache, PackCache, SinkWindow
from packcache.reuse import EXACT, StepReuse
from tests.tools import PROMPTS, Recorder, kv_bytes_of, picture, recorder

STEPS = 6
NEAR = 1e-10
VISIBLE = 1e-6

#: Both kinds of reuse, apart and together, in step and out of step with each other.
SETTINGS = [
    StepReuse(history_every=2),
    StepReuse(history_every=9, history_share=0.2),
    StepReuse(history_every=3, history_share=0.5),
    StepReuse(rest_every=2),
    StepReuse(rest_every=9),
    StepReuse(history_every=3, rest_every=2),
    StepReuse(history_every=2, history_share=0.1, rest_every=3),
    StepReuse(history_every=9, history_share=0.2, rest_every=9),
]
every_setting = pytest.mark.parametrize(
    "reuse", SETTINGS, ids=lambda r: f"H{r.history_every}+{r.history_share:g}R{r.rest_every}"
)


def made(model, reuse: StepReuse, policy=None, *, latents=4, **settings) -> Recorder:
    run = recorder(model, policy or PackCache(window=2), steps=STEPS, reuse=reuse, **settings)
    return run.run(latents, picture(model))


class Twin:
    """One latent frame of one prompt: keys, values and attention to the history token by token.

    An attention for `Lumos.forward` that is told which tokens are forwarded and how many of them
    attend to the history anew (None: all); loops over queries in float64.
    """

    def __init__(self, run: Recorder) -> None:
        (cache,) = run.caches
        self.held = [[(k.clone(), v.clone()) for k, v in store] for store in cache.stores]
        self.own: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self.past: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self.asked: dict[tuple[int, int, int], Tensor] = {}
        self.tokens: list[int] = []
        self.fresh: Callable[[int], int | None] = lambda layer: None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for g in range(len(q)):
            for row, token in enumerate(self.tokens):
                self.own[g, layer, token] = k[g, :, row].clone(), v[g, :, row].clone()
            all_tokens = sorted(t for gg, ll, t in self.own if (gg, ll) == (g, layer))
            keys, values = (
                torch.stack([self.own[g, layer, t][i] for t in all_tokens], dim=1) for i in (0, 1)
            )
            anew = self._anew(layer, g, q[g])
            for row, token in enumerate(self.tokens):
                if token in anew:
                    self.past[g, layer, token] = part(q[g, :, row], *self.held[g][layer])
                    self.asked[g, layer, token] = q[g, :, row].clone()
                out[g, :, row] = together(
                    self.past[g, layer, token], part(q[g, :, row], keys, values)
                )
        return out

    def _anew(self, layer: int, g: int, q: Tensor) -> set[int]:
        """The tokens whose queries moved most, by one head of each group."""
        count = self.fresh(layer)
        if count is None:
            return set(self.tokens)
        group = q.shape[0] // len(self.held[g][layer][0])
        moved = {
            token: float(((q[:, row] - self.asked[g, layer, token])[::group] ** 2).sum())
            for row, token in enumerate(self.tokens)
        }
        return set(sorted(moved, key=lambda token: -moved[token])[:count])


def part(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator `[H, D]` and denominator `[H]` of one query's softmax, unnormalised."""
    group = len(q) // len(keys)
    keys, values = (x.repeat_interleave(group, dim=0) for x in (keys, values))
    weights = ((keys * q[:, None]).sum(-1) / q.shape[-1] ** 0.5).exp()
    return (weights[..., None] * values).sum(1), weights.sum(1)


def together(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> Tensor:
    return (one[0] + two[0]) / (one[1] + two[1])[:, None]


def worst_difference(
    model,
    reuse: StepReuse,
    policy,
    latents: int = 4,
    kept_from_layer: int = 0,
    always_all: bool = False,
) -> float:
    """Engine and twin, hidden states of every forwarded token of the last frame's steps.

    The twin computes the attention to the history in every step of layers before `kept_from_layer`,
    and all tokens in every step if asked to.
    """
    run = made(model, reuse, policy, latents=latents - 1)
    run.forwards.clear()
    twin = Twin(run)
    run.latents = latents
    with torch.inference_mode():
        run.generate()
        lengths = run.prefixes[0].lengths
        rotary = FrameTables(model, run.vocab, run.layout, lengths).at(latents - 1)
        steps, worst = run.forwards[:-1], 0.0
        works = reuse.works(run.undecided, run.layout.tokens)
        masked = [set((f.ids[0] == run.vocab.ids.mask).nonzero().flatten().tolist()) for f in steps]
        everything = list(range(run.layout.tokens))
        for step, forward in enumerate(steps):
            before = masked[step - 1] if step else set()
            whole = step < 2 or step % reuse.rest_every == 0
            # those the engine forwards, in its order
            told = everything if whole else sorted(masked[step]) + sorted(before - masked[step])
            twin.tokens = everything if always_all else told
            decided = len(before) - len(masked[step])
            share = math.ceil(reuse.history_share * run.layout.tokens)
            count = min(len(told), max(share, decided))
            all_anew = step < 2 or works[step].fresh is None  # which ones: tests/test_reuse.py
            twin.fresh = lambda layer, count=count, all_anew=all_anew: (
                None if all_anew or layer < kept_from_layer else count
            )
            cos, sin = (t[:, :, twin.tokens] for t in rotary)
            ids = forward.ids[:, twin.tokens].expand(2, -1)
            hidden = model(ids, (cos, sin), twin)[:, [twin.tokens.index(t) for t in told]]
            worst = max(worst, float((hidden - forward.hidden[0]).abs().max()))
    return worst


@every_setting
@pytest.mark.parametrize("policy", [FullCache(), PackCache(window=2)], ids=["full", "packcache"])
def test_the_engine_is_the_twin(tiny64, reuse, policy):
    """Which tokens, which keys, which history: every forward of a frame, both branches."""
    assert worst_difference(tiny64, reuse, policy) < NEAR


@every_setting
def test_reuse_is_an_approximation(tiny64, reuse):
    """The twin judges something: one that computes all in every step is somebody else."""
    assert worst_difference(tiny64, reuse, FullCache(), kept_from_layer=99, always_all=True) > (
        VISIBLE
    )


def test_two_parts_computed_in_every_step_are_exact(tiny64, monkeypatch):
    """The split and the merge alone change nothing but rounding."""
    exact = made(tiny64, EXACT)
    begin = attend.ReusedAttention.begin

    def anew(self, work, tokens):
        begin(self, dataclasses.replace(work, fresh=None), tokens)

    monkeypatch.setattr(attend.ReusedAttention, "begin", anew)
    split = made(tiny64, StepReuse(history_every=9))
    assert torch.equal(split.tokens, exact.tokens)
    for one, two in zip(split.forwards, exact.forwards, strict=True):
        assert (one.hidden - two.hidden).abs().max() < NEAR


@every_setting
def test_the_first_layer_is_exact(tiny64, reuse):
    """Nothing but a decision changes a query there: a twin that always computes it agrees."""
    assert worst_difference(tiny64, reuse, FullCache(), kept_from_layer=1) < NEAR
    if reuse.keeps_history and reuse.history_share < 0.5:
        assert worst_difference(tiny64, reuse, FullCache(), kept_from_layer=2) > VISIBLE


def test_committed_bytes_are_those_of_an_exact_commit(tiny64):
    """Reuse ends with the steps: what stays is the exact forward of the tokens chosen."""
    run = made(tiny64, StepReuse(history_every=9, rest_every=9))
    twin = recorder(tiny64, PackCache(window=2), steps=STEPS)
    twin.prefill()
    codes = [result.codes for result in run.results]
    twin.give(codes[0])
    for frame in codes[1:]:
        twin.give(frame, as_generated=True)
    assert kv_bytes_of(twin) == kv_bytes_of(run)


@every_setting
def test_steps_leave_the_committed_bytes_alone(tiny64, reuse):
    run = made(tiny64, reuse, SinkWindow(sinks=1, frames=1))
    before = kv_bytes_of(run)
    steps, forward = run.rehearse()
    assert steps > 0 and forward > 0
    assert kv_bytes_of(run) == before
    for cache in run.caches:
        assert cache.physical_length == run.results[-1].physical_length


def test_rehearsed_steps_are_those_named(tiny):
    run = recorder(tiny, PackCache(), steps=STEPS).run(1, picture(tiny))
    count = len(run.forwards)
    run.rehearse([0, 5])
    assert len(run.forwards) == count + 3


def test_a_rehearsal_changes_no_later_token(tiny):
    plain = made(tiny, EXACT)
    run = recorder(tiny, PackCache(window=2), steps=STEPS, reuse=EXACT)
    run.latents = 4
    results = []
    for result in run.frames(picture(tiny)):
        results.append(result.ids)
        run.rehearse()
    assert torch.equal(torch.stack(results, dim=1), plain.tokens)


@every_setting
def test_a_batch_draws_what_its_prompts_draw_alone(tiny, reuse):
    together = recorder(tiny, PackCache(window=2), prompts=PROMPTS, steps=STEPS, reuse=reuse).run(3)
    for number, text in enumerate(PROMPTS):
        alone = recorder(
            tiny, PackCache(window=2), prompts=[text], seeds=[number], steps=STEPS, reuse=reuse
        ).run(3)
        assert torch.equal(alone.tokens[0], together.tokens[number])


@every_setting
def test_one_branch_is_guidance_of_one(tiny64, reuse):
    one, two = (made(tiny64, reuse, guidance=g) for g in (1.0, 1.0 + 1e-12))
    assert (one.branches, two.branches) == (1, 2)
    assert torch.equal(one.tokens, two.tokens)


@every_setting
def test_a_clip_taken_up_goes_on_with_the_same_tokens(tiny, reuse):
    """What steps keep is of one frame only, so nothing of it belongs into a checkpoint."""
    whole = made(tiny, reuse, FullCache())
    half = made(tiny, reuse, FullCache(), latents=2)
    fresh = recorder(tiny, FullCache(), steps=STEPS, reuse=reuse)
    for new, old in zip(fresh.caches, half.caches, strict=True):
        tensors = [x.clone() for entry in old.timeline.entries for x in old.export(entry)]
        new.restore(old.timeline, tensors, delta=old.delta, capacities=old.capacities)
    fresh.resume(frame=2, generated=1, prefill_s=0.0)
    fresh.run(4, picture(tiny))
    assert torch.equal(fresh.tokens, whole.tokens[:, 2:])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from(SETTINGS), st.data())
def test_whatever_ties_decide_together_no_undecided_token_is_left_out(tiny, seed, reuse, data):
    """Equal confidences: more decided in one step than scheduled, fewer in the next."""
    rng = np.random.default_rng(seed)
    run = recorder(tiny, FullCache(), steps=STEPS, reuse=reuse)
    step = data.draw(st.integers(1, STEPS - 1))
    work, left, content = run.works[step], run.undecided[step], run.layout.content
    was_open = rng.permutation(content)[: rng.integers(1, run.undecided[step - 1] + 1)]
    still_open = was_open[: rng.integers(0, min(left, len(was_open)) + 1)]
    known, before = torch.ones(2, 1, content, dtype=torch.bool)
    known[0, still_open], before[0, was_open] = False, False
    rows = run._step_rows(step, known, before)
    assert rows.chosen.shape == rows.place.shape == (1, left)
    assert set(still_open.tolist()) <= set(rows.chosen[0].tolist())
    forwarded = torch.arange(run.layout.tokens)[None] if rows.rows is None else rows.rows
    assert torch.equal(forwarded[0, rows.place[0]], run.content[rows.chosen[0]])
    assert forwarded.shape[1] == (work.rows or run.layout.tokens)
    if rows.rows is not None:  # those just decided are computed once more
        assert set(run.content[was_open].tolist()) <= set(rows.rows[0].tolist())


def test_no_frame_ends_with_a_mask(tiny64):
    """Logits of zeros: in the second generated frame all confidences are equal."""
    with torch.no_grad():
        weight = tiny64.lm_head.weight.clone()
        tiny64.lm_head.weight.zero_()
    try:
        run = made(tiny64, StepReuse(history_every=3, rest_every=3))
        assert not (run.tokens == run.vocab.ids.mask).any()
    finally:
        with torch.no_grad():
            tiny64.lm_head.weight.copy_(weight)


def test_all_rows_is_for_exact_steps(tiny):
    with pytest.raises(InvalidSetting, match=r"all_rows with StepReuse.*: expected exact steps"):
        recorder(tiny, FullCache(), reuse=StepReuse(rest_every=2), all_rows=True)


# --- mutations ----------------------------------------------------------------------------------


def test_mutation_the_first_queries_instead_of_those_that_moved(tiny64, monkeypatch):
    reuse = StepReuse(history_every=9, history_share=0.2)
    sort = torch.Tensor.sort

    def first(self, k, **_):
        values, indices = sort(self * 0)
        return torch.return_types.topk((values[:k], indices[:k]))

    monkeypatch.setattr(Tensor, "topk", first)
    assert worst_difference(tiny64, reuse, FullCache()) > VISIBLE


def test_mutation_a_whole_second_step_is_not_forgotten(tiny64, monkeypatch):
    monkeypatch.setattr("packcache.reuse._WHOLE", 1)
    assert worst_difference(tiny64, StepReuse(history_every=9), FullCache()) > VISIBLE


def test_mutation_tokens_rest_a_step_too_early(tiny64, monkeypatch):
    """Only undecided tokens are forwarded: the just decided keep the keys of a mask token."""
    rows_of = Decoder._step_rows

    def early(self, step, known, before):
        rows = rows_of(self, step, known, before)
        if rows.rows is None:
            return rows
        left = self.undecided[step]
        swapped = rows.rows.clone()
        swapped[:, left:] = rows.rows[:, :1]
        return dataclasses.replace(rows, rows=swapped)

    monkeypatch.setattr(Decoder, "_step_rows", early)
    assert worst_difference(tiny64, StepReuse(rest_every=9), FullCache()) > VISIBLE


def test_mutation_parts_of_the_wrong_weight(tiny64, monkeypatch):
    merge = attend.merge
    monkeypatch.setattr(attend, "merge", lambda o, a, p, b: merge(o, a, p, b + 0.1))
    assert worst_difference(tiny64, StepReuse(history_every=2), FullCache()) > VISIBLE
