"""The decoding loop: what is decided when, for whom, and what a broken model leaves behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from packcache.errors import GenerationError, InputError, InvalidSetting
from packcache.lumos import attend, decode
from packcache.lumos.decode import Step
from packcache.lumos.schedule import Sampling, philox_draws
from packcache.policies import FullCache, PackCache, SinkWindow, SlidingWindow
from packcache.reuse import StepReuse
from packcache.timeline import Role
from tests.tools import PROMPTS, picture, recorder


def steps_of(model, policy=None, *, latents=3, image=False, **settings):
    """A run and all its steps."""
    steps: list[Step] = []
    run = recorder(model, policy or FullCache(), on_step=steps.append, **settings)
    return run.run(latents, picture(model) if image else None), steps


@pytest.mark.parametrize("reset", [False, True])
def test_scheduled_rows_and_all_rows_decide_the_same(tiny, reset):
    """The head runs on undecided positions only; the tokens are those of running it on all."""
    sampling = Sampling(steps=6, guidance=3.0, reset_temperature=reset)
    few, some = steps_of(tiny, sampling=sampling)
    many, every = steps_of(tiny, sampling=sampling, all_rows=True)
    assert torch.equal(few.tokens, many.tokens)
    assert {s.positions.shape[1] for s in every} == {16}
    rows = [s.positions.shape[1] for s in some[:6]]
    assert rows[0] == 16 and rows == sorted(rows, reverse=True) and rows[-1] < 8


def test_undecided_positions_come_first_and_all_of_them(tiny):
    _, steps = steps_of(tiny, steps=6)
    for step in steps:
        known = step.known[0].tolist()
        assert known == sorted(known)
        assert step.positions[0].unique().numel() == step.positions.shape[1]
    undecided = [int((~s.known).sum()) for s in steps[:6]]
    assert undecided == sorted(undecided, reverse=True) and undecided[-1] >= 1


def test_known_tokens_are_never_revised_and_everything_is_decided(tiny):
    """lumos1-spec 5.5.5."""
    run, steps = steps_of(tiny, steps=6)
    ids, mask = tiny.config.token_ids, tiny.config.token_ids.mask
    final = {r.frame: r.ids[0][run.content] for r in run.results}
    for step in steps:
        settled = step.known[0]
        where = step.positions[0][settled]
        assert torch.equal(step.tokens[0][settled], final[step.frame][where])
    for content in final.values():
        assert ((content >= ids.video_lo) & (content < ids.video_hi)).all()
        assert (content != mask).all()


def test_seeds_decide_and_repeat(tiny):
    tokens = {seed: steps_of(tiny, seeds=[seed])[0].tokens for seed in (1, 2, 3)}
    assert torch.equal(tokens[1], steps_of(tiny, seeds=[1])[0].tokens)
    assert not torch.equal(tokens[1], tokens[2]) and not torch.equal(tokens[2], tokens[3])


def test_policies_share_their_noise(tiny):
    """Counter-based draws: the first frame is the same under any policy."""
    full, packed = steps_of(tiny, latents=6)[0], steps_of(tiny, PackCache(), latents=6)[0]
    assert torch.equal(full.tokens[:, 0], packed.tokens[:, 0])


def test_greedy_takes_the_most_likely(tiny):
    sampling = Sampling(steps=4, guidance=3.0, greedy=True, temperature=0.0)
    _, steps = steps_of(tiny, sampling=sampling)
    first, low = steps[0], tiny.config.token_ids.video_lo
    assert torch.equal(first.sampled - low, first.logits.argmax(-1))


def test_logits_are_guided(tiny):
    """g (cond - uncond) + uncond, visual ids only (lumos1-spec 5.3.2)."""
    run, steps = steps_of(tiny, latents=1, guidance=4.0)
    hidden = run.forwards[0].hidden[0][:, run.content]
    ids = tiny.config.token_ids
    with torch.inference_mode():
        cond, other = tiny.head(hidden, ids.video_lo, ids.video_hi)
    order = steps[0].positions[0].argsort()
    assert torch.allclose(steps[0].logits[0][order], 4 * (cond - other) + other, atol=1e-3)


def test_temperature_is_never_reset_unless_asked(tiny):
    """lumos1-spec 5.5.1: confidence noise in the first generated frame only, given ones or not."""
    for image in (False, True):
        for reset in (False, True):
            sampling = Sampling(steps=4, guidance=3.0, reset_temperature=reset)
            _, steps = steps_of(tiny, image=image, sampling=sampling)
            by_frame = {}
            for step in steps:
                by_frame.setdefault(step.frame, []).append(step.temperature)
            first, *later = by_frame.values()
            assert first == pytest.approx([0.75, 0.375, 0.09375, 0.0])
            assert all(t == (first if reset else [0.0] * 4) for t in later)


def test_resetting_the_temperature_changes_later_frames_only(tiny):
    runs = [
        steps_of(tiny, sampling=Sampling(steps=4, guidance=3.0, reset_temperature=reset))[0].tokens
        for reset in (False, True)
    ]
    assert torch.equal(runs[0][:, 0], runs[1][:, 0])
    assert not torch.equal(runs[0][:, 1], runs[1][:, 1])


def test_what_is_committed(tiny):
    """Given frames clean, generated ones re-masked at the history positions (lumos1-spec 5.3.4)."""
    run, _ = steps_of(tiny, image=True)
    mask = tiny.config.token_ids.mask
    for result in run.results:
        last = [f for f in run.forwards if f.frame == result.frame][-1].ids[0]
        masked = (last == mask).nonzero().squeeze(1)
        want = torch.from_numpy(run.history).long() + run.layout.header
        assert torch.equal(masked, want[:0] if result.given else want)
        clean = torch.ones(len(last), dtype=torch.bool)
        clean[masked] = False
        assert torch.equal(last[clean], result.ids[0][clean])
        assert int((result.ids == mask).sum()) == 0
    text, image, *history = run.caches[0].timeline.entries
    assert (text.span.role, image.span.role) == (Role.TEXT, Role.IMAGE)
    assert image.span.visible is None
    assert all((~e.span.visible).nonzero()[0].tolist() == want.tolist() for e in history)
    assert all(
        (e.span.ids == r.ids[0].numpy()).all()
        for e, r in zip(history, run.results[1:], strict=True)
    )


def test_history_mask_ratio_zero_commits_clean_frames(tiny):
    run, _ = steps_of(tiny, sampling=Sampling(steps=3, guidance=3.0, history_mask_ratio=0.0))
    assert run.visible.all() and len(run.history) == 0
    last = run.forwards[-1].ids[0]
    assert torch.equal(last, run.results[-1].ids[0])


def test_each_frame_costs_its_steps_and_a_commit(tiny):
    """No forward more: S drafts and one commit, one forward for a given frame."""
    run, steps = steps_of(tiny, image=True, latents=3, steps=5)
    assert [f.frame for f in run.forwards] == [0] + [1] * 6 + [2] * 6
    assert len(steps) == 10


def test_results_say_what_they_cost(tiny):
    run, _ = steps_of(tiny, PackCache(), latents=6, image=True, prompts=PROMPTS[:1])
    prefix, tokens = len(run.prefixes[0].ids), run.layout.tokens
    assert [r.frame for r in run.results] == list(range(6))
    assert [r.given for r in run.results] == [True] + [False] * 5
    assert [r.logical_length for r in run.results] == [prefix + tokens * (f + 1) for f in range(6)]
    assert {r.physical_length for r in run.results[2:]} == {prefix + 2 * tokens}
    assert [sum(r.kept.values()) for r in run.results] == [0] + [tokens] * 5
    assert all(r.seconds > 0 and r.kv_bytes <= r.capacity_bytes for r in run.results)
    layout = run.layout
    assert torch.equal(run.results[3].codes, run.vocab.codes(layout, run.results[3].ids))


def test_bytes_add_up_over_prompts(tiny):
    one, _ = steps_of(tiny, latents=2)
    two = recorder(tiny, FullCache(), prompts=[PROMPTS[0]] * 2).run(2)
    assert [r.kv_bytes for r in two.results] == [2 * r.kv_bytes for r in one.results]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_broken_model_fails_and_commits_nothing(tiny, where, value):
    """NaN or infinite logits: one clear error, the cache as it was before the frame."""
    broken = copy.deepcopy(tiny)
    state = broken.state_dict()
    state[where][5 if "mlp" in where else 200] = value
    run = recorder(broken, PackCache())
    run.prefill()
    before = run.caches[0].summary()
    with pytest.raises(
        GenerationError, match="NaN or infinite logits in latent frame 0: the weights"
    ):
        run.generate()
    after = run.caches[0].summary()
    for name in ("logical_length", "physical_length", "latent_frames", "kept"):
        assert after[name] == before[name]
    assert run.frame == 0


def test_no_prompt_is_wrong_use(tiny):
    with pytest.raises(InvalidSetting, match="no prompt: expected at least one"):
        recorder(tiny, FullCache(), prompts=[], draws=philox_draws([0], 3, 16))


def test_frames_are_made_as_they_are_asked_for(tiny):
    """A generator: endless without a number, and nothing is computed ahead."""
    run = recorder(tiny, PackCache())
    stream = run.frames()
    assert [next(stream).frame for _ in range(4)] == [0, 1, 2, 3]
    assert run.frame == 4


def test_rows_of_a_batch_are_decided_independently(tiny):
    """Each prompt has its own draws, its own cut and its own schedule."""
    run = recorder(tiny, FullCache(), prompts=PROMPTS, seeds=[1, 2, 3])
    alone = [
        recorder(tiny, FullCache(), prompts=[p], seeds=[s])
        for p, s in zip(PROMPTS, (1, 2, 3), strict=True)
    ]
    together = run.run(2).tokens
    assert torch.equal(together, torch.cat([a.run(2).tokens for a in alone]))


def test_given_codes_must_fit_the_grid_and_the_codec(tiny):
    """A codec of another size or with more codes is refused before anything is written."""
    run, _ = steps_of(tiny, latents=0)
    codes = picture(tiny)[:, 0]
    rows, cols, most = *codes.shape[1:], tiny.config.token_ids.num_codes - 1
    with pytest.raises(InvalidSetting, match=rf"shape .*, expected \(1, {rows}, {cols}\)"):
        run.give(codes[:, :-1])
    with pytest.raises(InputError, match=rf"expected 0\.\.{most}: they come from another codec"):
        run.give(torch.full_like(codes, most + 1))
    assert run.give(codes).given


@pytest.mark.parametrize("where", ["prefill", "give", "generate"])
def test_running_out_of_memory_is_one_clear_line(tiny, monkeypatch, where):
    run = recorder(tiny, FullCache())
    if where != "prefill":
        run.prefill()

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(decode.Decoder, "_open", full)
    monkeypatch.setattr(type(run.caches[0]), "open", full)
    work = {"give": lambda: run.give(picture(tiny)[:, 0])}.get(where, getattr(run, where))
    with pytest.raises(GenerationError, match=r"out of memory in .*: see packcache plan") as told:
        work()
    assert len(str(told.value).splitlines()) == 1


# --- the step loop: what it makes and what stays as it is ----------------------------------------


class Shapes(TorchDispatchMode):
    """What every op is given and makes, while `on`: one list a latent frame."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[list[tuple[str, tuple[tuple[int, ...], ...]]]] = []
        self.made: list[tuple[int, ...]] = []
        self.on = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.on:
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            new = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            self.frames[-1].append((str(func), tuple(tuple(t.shape) for t in (*given, *new))))
            places = {t.untyped_storage().data_ptr() for t in given}
            self.made += [
                tuple(t.shape) for t in new if t.untyped_storage().data_ptr() not in places
            ]
        return out


def watched(tiny, policy, reuse, latents=8):
    run, watch = recorder(tiny, policy, steps=6, reuse=reuse), Shapes()
    denoise = run._denoise

    def noted(*arguments):
        watch.frames.append([])
        watch.on = True
        finite = denoise(*arguments)
        watch.on = False
        return finite

    run._denoise = noted
    with watch:
        run.run(latents)
    return run, watch


REUSES = [StepReuse(), StepReuse(history_every=3, history_share=0.2, rest_every=3)]


@pytest.mark.parametrize("reuse", REUSES)
@pytest.mark.parametrize("policy", [PackCache(window=2), SlidingWindow(), SinkWindow()])
def test_shapes_are_constant_once_the_window_is_full(tiny, policy, reuse):
    """What a CUDA graph or a compiler would see: the same ops on the same shapes every frame."""
    _, watch = watched(tiny, policy, reuse)
    full = [n for n, frame in enumerate(watch.frames) if frame == watch.frames[-1]]
    assert full == list(range(min(full), 8)) and min(full) <= 4
    _, growing = watched(tiny, FullCache(), reuse)
    assert growing.frames[-1] != growing.frames[-2]


def as_long_as_the_cache(tiny, reuse) -> list[tuple[int, ...]]:
    """Shapes of tensors made in steps that have as many tokens as are held, the frame's or not."""
    run, watch = watched(tiny, FullCache(), reuse, latents=4)
    held = {text + frames * run.layout.tokens for text in run.caches[0].text for frames in range(5)}
    return [shape for shape in watch.made if held & set(shape)]


@pytest.mark.parametrize("reuse", REUSES)
def test_no_step_makes_a_tensor_as_long_as_the_cache(tiny, reuse, monkeypatch):
    """Keys and values are views of the store: nothing is copied, repeated or indexed anew."""
    assert as_long_as_the_cache(tiny, reuse) == []
    for name in ("attend", "attend_lse"):
        kernel = getattr(attend, name)
        monkeypatch.setattr(attend, name, lambda q, k, v, kernel=kernel: kernel(q, k.clone(), v))
    assert as_long_as_the_cache(tiny, reuse)


def test_rotary_tables_are_made_once_a_clip(tiny, monkeypatch):
    asked = []
    rotary = type(tiny).rotary
    monkeypatch.setattr(
        type(tiny), "rotary", lambda self, ids: asked.append(ids.shape[1]) or rotary(self, ids)
    )
    run = recorder(tiny, PackCache()).run(5)
    frames = asked[2:]  # the text of both branches came first
    assert frames[:2] == [run.layout.tokens] * 2 and len(frames) == 2 * 5
    assert max(frames[2:]) <= 5
