"""Policies scored by a trace: answers known by hand, bounds that hold for all, files of others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import packcache as pc
from packcache.errors import InputError, InputFileError, InvalidSetting
from packcache.inspect.score import (
    METRICS,
    PolicyScore,
    Scores,
    policies_of_file,
    policies_of_folder,
    replay,
    score,
    timelines,
)
from packcache.inspect.trace import COMMIT, Sample, Trace
from packcache.policies import POLICIES as KNOWN
from packcache.policies import Policy, parse_policies, parse_policy
from packcache.timeline import FrameLayout, Role
from tests.tools import picture, recorder

#: Four tokens a frame, nothing else.
BARE = FrameLayout(rows=2, cols=2, header=0, footer=0, new_line=False)

POLICIES = (
    "full",
    "window:frames=1",
    "window:frames=2",
    "sink:sinks=1,frames=1",
    "uniform:budget=1,window=3",
    "random:budget=1,window=4",
    "packcache:budget=1,window=4",
    "packcache:budget=0.5,window=2,order=novelty",
    "packcache:budget=2,window=4,drop_remasked=true",
    "packcache:budget=1,window=4,image_share=0.5",
    "packcache:budget=1,window=4,redistribute=false",
    "packcache:budget=1,window=3,fill=window",
    "fademem:budget=1,window=4",
    "deepforcing:frames=2,recent=0",
    "none",
)


def trace_of(
    masses: list[list[list[float]]], *, image: bool = False, text: int = 1, norm: float = 1.0
) -> Trace:
    """One clip of the bare layout: for each latent frame the attention of each layer, in tenths
    or whatever adds up; as the commit's.
    """
    samples = [
        Sample(clip=0, frame=n, step=COMMIT, steps=1, branch=0, mass=np.float32(rows))
        for n, rows in enumerate(masses)
    ]
    layers = len(masses[0])
    return Trace(
        layout=BARE,
        text=text,
        roles=(Role.IMAGE if image else Role.HISTORY, *[Role.HISTORY] * (len(masses) - 1)),
        layers=tuple(range(layers)),
        num_layers=layers,
        visible=None,
        ids=[np.zeros((len(masses), 4), dtype=np.int32)],
        samples=samples,
        value_norm=np.full(layers, norm, dtype=np.float32),
    )


def random_trace(
    seed: int = 0, *, frames: int = 7, clips: int = 2, image: bool = True, layers: int = 2
) -> Trace:
    """Heavy-tailed attention, some tokens re-masked, ids that repeat."""
    rng = np.random.default_rng(seed)
    layout = FrameLayout(rows=3, cols=4)
    samples = []
    for clip in range(clips):
        for frame in range(frames):
            for step in (0, COMMIT):
                mass = rng.pareto(1.2, (layers, 3 + (frame + 1) * layout.tokens)) + 1e-9
                mass /= mass.sum(axis=1, keepdims=True)
                samples.append(
                    Sample(
                        clip=clip, frame=frame, step=step, steps=3, branch=0,
                        mass=mass.astype(np.float32),
                    )
                )  # fmt: skip
    return Trace(
        layout=layout,
        text=3,
        roles=(Role.IMAGE if image else Role.HISTORY, *[Role.HISTORY] * (frames - 1)),
        layers=tuple(range(layers)),
        num_layers=layers,
        visible=rng.random(layout.tokens) < 0.4,
        ids=list(rng.integers(0, 3, (clips, frames, layout.tokens)).astype(np.int32)),
        samples=samples,
        value_norm=np.float32([1, 2])[:layers],
        workload={"token_bytes": 64},
    )


def only(trace: Trace, policy: str | Policy) -> dict[str, np.ndarray]:
    made = parse_policy(policy) if isinstance(policy, str) else policy
    (row,) = score(trace, {"it": made}).rows
    return row.values


# --- answers known by hand -----------------------------------------------------------------------

#: text | frame 0 | frame 1 | frame 2, of two layers.
LAST = [
    [0.10, 0.05, 0.05, 0.05, 0.05, 0.20, 0.10, 0.00, 0.00, 0.10, 0.10, 0.10, 0.10],
    [0.10, 0.30, 0.00, 0.00, 0.00, 0.05, 0.05, 0.05, 0.05, 0.10, 0.10, 0.10, 0.10],
]


def flat(tokens: int) -> list[list[float]]:
    return [[1 / tokens] * tokens] * 2


def by_hand(norm: float = 1.0) -> Trace:
    return trace_of([flat(5), flat(9), LAST], norm=norm)


def test_a_window_of_one_frame_by_hand():
    """Frame 2 sees the text, frame 1 and itself: 0.2 of layer 0 and 0.3 of layer 1 are lost."""
    (row,) = score(by_hand(norm=3), {"window": pc.SlidingWindow(frames=1)}).rows
    found = {name: float(values[0]) for name, values in row.values.items()}
    assert row.since == (2,)
    assert found["kept"] == pytest.approx(0.75)
    assert row.layers[0] == pytest.approx([0.8, 0.7])
    # history, mean of layers: 0.25 lies on frame 0 and 0.25 on frame 1
    assert found["history"] == pytest.approx(0.5)
    # the four best of history: 0.175, 0.125 and two of 0.075, 0.025...
    ranked = np.sort(np.mean(LAST, axis=0)[1:9])[::-1]
    assert found["best"] == pytest.approx(ranked[:4].sum() / 0.5)
    assert found["share"] == pytest.approx(0.25 / ranked[:4].sum())
    assert found["bound"] == pytest.approx(2 * 3 * 0.25)
    assert found["held"] == 4 and found["tokens"] == 5


def test_a_shifted_order_or_another_frames_window_would_be_seen():
    """Mutations of the input that an off-by-one in the order would be equal to."""
    right = only(by_hand(), "window:frames=1")
    rolled = trace_of([flat(5), flat(9), np.roll(LAST, 1, axis=1).tolist()])
    assert abs(only(rolled, "window:frames=1")["kept"] - right["kept"]) > 0.01
    exchanged = np.array(LAST)
    exchanged[:, 1:5], exchanged[:, 5:9] = np.array(LAST)[:, 5:9], np.array(LAST)[:, 1:5]
    other = only(trace_of([flat(5), flat(9), exchanged.tolist()]), "sink:sinks=1,frames=1")
    assert other["kept"] == 1.0  # nothing leaves yet
    assert abs(only(by_hand(), "none")["history"][0]) < 1e-9


def test_an_image_is_no_history_and_stays():
    found = only(trace_of([flat(5), flat(9), LAST], image=True), "none")
    # frame 1 is lost: 0.3 and 0.2, and all of history with it
    assert found["kept"] == pytest.approx(0.75) and found["history"] == pytest.approx(0)
    assert np.isnan(found["share"]) and found["held"] == 0


def test_only_frames_after_the_first_eviction_count():
    masses = [flat(5), flat(9), flat(13), LAST]
    masses[3] = [row + [0.0] * 4 for row in LAST]
    (row,) = score(trace_of(masses), {"window": pc.SlidingWindow(frames=2)}).rows
    assert row.since == (3,) and row.values["kept"] == pytest.approx(1 - 0.25)
    (full,) = score(trace_of(masses), {"full": pc.FullCache()}).rows
    assert full.since == (1,) and full.held == 8  # 4, 8 and 12 tokens of history


def test_rows_that_hold_as_many_tokens_are_judged_by_the_same_frames():
    """Once the window is full both fills hold the same tokens; one of them packs earlier."""
    fills = parse_policies("packcache:window=3,packcache:window=3,fill=window,full")
    early, late = [random_trace(seed, frames=9, image=seed == 1) for seed in (1, 2)]
    apart = {label: score([early, late], {label: p}).rows[0] for label, p in fills.items()}
    scores = score([early, late], fills)
    packs, whole, full = scores.rows
    assert apart[packs.label].since == (3, 3, 2, 2) and apart[whole.label].since == (4, 4, 3, 3)
    assert packs.since == whole.since == (4, 4, 3, 3) and full.since == (2, 2, 1, 1)
    for name in METRICS:
        assert np.array_equal(packs.values[name], whole.values[name]), name
    assert not np.array_equal(packs.values["kept"], apart[packs.label].values["kept"])
    assert [[row.label for row in group] for group in scores.groups()] == [
        ["full"], [packs.label, whole.label]
    ]  # fmt: skip
    both = score([early, late], {k: fills[k] for k in (packs.label, "full")}, together=True).rows
    assert both[0].since == both[1].since == (3, 3, 2, 2)


def test_who_holds_less_while_it_fills_is_judged_where_it_holds_as_much():
    """Fixed shares of young frames do not add up to the budget, those of a full window do."""
    trace = random_trace(frames=9, clips=1)
    chosen = parse_policies("packcache:window=3,packcache:window=3,redistribute=false,"
                            "packcache:window=4,fill=window")  # fmt: skip
    packs, literal, whole = score(trace, chosen).rows
    (alone,) = score(trace, {literal.label: chosen[literal.label]}).rows
    assert alone.since == (3,) and alone.held < trace.layout.tokens
    assert packs.since == literal.since == whole.since == (5,)
    assert packs.held == literal.held == whole.held == trace.layout.tokens


def test_a_mean_over_other_frames_is_another_group():
    """What holds as much as others do only by chance of its frames does not stand among them."""
    steady, late = (
        PolicyScore(
            label=label,
            policy="",
            values={name: np.ones(2) for name in METRICS},
            layers=np.ones((2, 1)),
            since=since,
        )
        for label, since in (("steady", (3, 3)), ("late", (5, 5)))
    )
    groups = Scores(rows=[late, steady], traces=[random_trace()]).groups()
    assert [[row.label for row in group] for group in groups] == [["steady"], ["late"]]


# --- what holds for all --------------------------------------------------------------------------


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("policy", ["full", "packcache:budget=none,window=none"])
def test_who_keeps_everything_keeps_exactly_one(policy, image):
    found = only(random_trace(image=image), policy)
    for name in ("kept", "history", "best", "share"):
        assert (found[name] == 1.0).all(), name
    assert (found["bound"] == 0.0).all()


def test_what_is_read_from_a_file_sums_to_one_too(tmp_path):
    random_trace().save(tmp_path / "a.trace")
    found = only(Trace.load(tmp_path / "a.trace"), "full")
    assert (found["kept"] == 1.0).all() and (found["share"] == 1.0).all()


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), image=st.booleans(), policy=st.sampled_from(POLICIES))
def test_no_policy_is_better_than_the_oracle(seed, image, policy):
    found = only(random_trace(seed, image=image, clips=1), policy)
    assert (found["best"] >= found["history"] - 1e-12).all()
    assert (np.nan_to_num(found["share"], nan=1.0) <= 1 + 1e-12).all()
    for name in ("kept", "history", "best"):
        assert ((found[name] >= -1e-12) & (found[name] <= 1)).all()
    # value norms are 1 and 2, so the bound lies between what either alone would make of the loss
    assert (found["bound"] >= 2 * (1 - found["kept"]) - 1e-9).all()
    assert (found["bound"] <= 4 * (1 - found["kept"]) + 1e-9).all()


def test_the_oracle_is_reached_by_whoever_keeps_the_best():
    """Attention that lies where an order looks first."""
    trace = random_trace(clips=1)
    order = np.argsort(pc.PackCache().rank(_span(trace), None))
    value = np.empty(trace.layout.tokens)
    value[order] = 2.0 ** -np.arange(len(order))
    samples = []
    for frame in range(len(trace.roles)):
        newest = [np.zeros(trace.layout.tokens)] * (frame - 1) + [value] * min(frame, 1)
        row = np.concatenate((np.full(3, 0.1), *newest, np.full(trace.layout.tokens, 0.1)))
        mass = np.float32([row / row.sum()] * 2)
        samples.append(Sample(clip=0, frame=frame, step=COMMIT, steps=1, branch=0, mass=mass))
    ideal = Trace(**{**vars(trace), "samples": samples})
    found = only(ideal, "packcache:budget=0.5,window=1")
    assert found["share"] == pytest.approx(1) and found["history"] == pytest.approx(1, abs=0.01)
    assert only(ideal, "random:budget=0.5,window=1")["share"] < 0.9


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), against=st.booleans())
def test_no_output_of_attention_is_further_off_than_the_bound(seed, against):
    """Attention in numpy, whole and over the tokens that a window of one frame keeps.

    A mean over heads and queries is what a trace holds, so it is a mean error that is bounded. With
    values `against` each other, kept and lost ones of one length, nearly all of the bound is used.
    """
    rng = np.random.default_rng(seed)
    heads, tokens, size = 3, 13, 8  # text | 4 | 4 | 4 of the frame that is made
    queries = rng.normal(0, 2, (heads, 5, size))
    keys, values = rng.normal(0, 1, (2, heads, tokens, size))
    kept = np.r_[True, [False] * 4, [True] * 8]  # the window has given up frame 0
    if against:
        values[:] = np.where(kept, 1.0, -1.0)[:, None] * np.eye(size)[0]
    logits = queries @ keys.swapaxes(1, 2) / np.sqrt(size)
    share = np.exp(logits - logits.max(axis=-1, keepdims=True))
    share /= share.sum(axis=-1, keepdims=True)
    whole = share @ values
    packed = (share * kept) / (share * kept).sum(axis=-1, keepdims=True) @ values
    error = np.linalg.norm(whole - packed, axis=-1).mean()
    longest = float(np.linalg.norm(values, axis=-1).max())
    row = share.mean(axis=(0, 1)).tolist()
    trace = trace_of([flat(5)[:1], flat(9)[:1], [row]], norm=longest)
    (bound,) = only(trace, "window:frames=1")["bound"]
    assert error <= bound * (1 + 1e-6)
    if against:
        assert error == pytest.approx(bound, rel=1e-5)


def _span(trace: Trace):
    return next(e.span for e in replay(trace, pc.FullCache()).history)


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_replay_holds_what_the_cache_held(tiny, policy, image, monkeypatch):
    """The engine's own timeline, tokens, visibility, novelty and observed scores included."""
    kind = type(parse_policy(policy))
    own_rank, told = kind.rank, {}

    def rank(self, span, before, scores=None):
        told[span.frame] = scores
        return own_rank(self, span, before, scores)

    monkeypatch.setattr(kind, "rank", rank)
    decoder = recorder(tiny, parse_policy(policy), steps=2)
    decoder.run(6, picture(tiny) if image else None)
    (cache,) = decoder.caches
    trace = Trace(
        layout=decoder.layout,
        text=cache.text[0],
        roles=(Role.IMAGE if image else Role.HISTORY, *[Role.HISTORY] * 5),
        layers=(0,),
        num_layers=2,
        visible=decoder.visible,
        ids=[decoder.tokens[0].numpy().astype(np.int32)],
        samples=[],
        value_norm=np.ones(1, dtype=np.float32),
        workload={"token_bytes": cache.token_bytes},
        own=[np.stack([told[n] for n in range(6)])] if parse_policy(policy).asks else [],
    )
    held = [(e.start, e.held.tolist()) for e in replay(trace, parse_policy(policy)).entries]
    assert held == [(e.start, e.held.tolist()) for e in cache.timeline.entries]
    grown = [t.physical_length for t in timelines(trace, parse_policy(policy))]
    assert grown == [cache.text[0], *(r.physical_length for r in decoder.results)]


def test_budgets_in_bytes_need_what_a_token_takes():
    trace = random_trace()
    assert only(trace, "packcache:budget=1.25KiB,window=4")["held"] == pytest.approx(20)
    bare = Trace(**{**vars(trace), "workload": {}})
    with pytest.raises(InvalidSetting, match="bytes of a token are unknown"):
        only(bare, "packcache:budget=1.25KiB,window=4")


def test_policies_that_ask_are_told_what_was_observed():
    trace = random_trace(clips=1)
    told = only(trace, "packcache:budget=1,window=3,order=observed")
    assert told["held"] == trace.layout.tokens
    with pytest.raises(InvalidSetting, match="goes by 'expected' scores, and a trace holds none"):
        only(trace, "packcache:budget=1,window=3,order=expected")
    steps = Trace(**{**vars(trace), "samples": [s for s in trace.samples if s.step != COMMIT]})
    with pytest.raises(InvalidSetting, match="has the commits of 0 of 7 latent frames"):
        only(steps, "packcache:budget=1,window=3,order=observed")


def test_a_trace_without_ids_serves_who_needs_none():
    bare = Trace(**{**vars(random_trace()), "ids": []})
    assert only(bare, "packcache")["held"] == pytest.approx(bare.layout.tokens)
    with pytest.raises(InvalidSetting, match="novelty"):
        only(bare, "packcache:order=novelty")


def test_every_policy_that_a_trace_can_serve_is_scored():
    assert {type(parse_policy(text)) for text in POLICIES} == set(KNOWN.values())


# --- the table -----------------------------------------------------------------------------------


def test_rows_are_grouped_by_tokens_and_sorted_by_what_they_keep():
    chosen = parse_policies("none,random:budget=1,packcache:budget=1,window:frames=1,full")
    scores = score([random_trace(1), random_trace(2)], chosen)
    groups = scores.groups()
    assert [row.label for row in groups[0]] == ["full"]
    assert [row.label for row in groups[-1]] == ["none"]
    (middle,) = groups[1:-1]
    kept = [row.values["kept"].mean() for row in middle]
    assert len(middle) == 3 and kept == sorted(kept, reverse=True)
    told = scores.to_json()
    assert told["schema"] == "packcache.trace_score/1" and told["workload"]["clips"] == 4
    assert [row["policy"] for row in told["results"]] == [r.label for g in groups for r in g]
    for row in told["results"]:
        assert set(METRICS) <= set(row) and len(row["kept_by_layer"]) == 2
        assert row["kept"]["low"] <= row["kept"]["mean"] <= row["kept"]["high"]
    none = told["results"][-1]
    assert none["share"] is None and none["history"]["mean"] == pytest.approx(0, abs=1e-9)
    assert set(none["best"].values()) == {0.0, 4} and "-0.0" not in json.dumps(none)
    text = "\n".join(scores.lines())
    assert "19 history tokens held (1.00 latent frames), from latent frame 3 on" in text
    assert "\n0 history tokens held (0.00 latent frames), from latent frame 2 on" in text


def test_clips_of_all_traces_count_alike():
    one, two = random_trace(1), random_trace(2, image=False)
    chosen = {"window": pc.SlidingWindow(frames=1)}
    (both,) = score([one, two], chosen).rows
    apart = [score(t, chosen).rows[0].values["kept"] for t in (one, two)]
    assert np.array_equal(both.values["kept"], np.concatenate(apart))


def test_wrong_use_is_named():
    trace = random_trace()
    with pytest.raises(InvalidSetting, match="no policy to score"):
        score(trace, {})
    with pytest.raises(InvalidSetting, match="no trace to score"):
        score([], {"full": pc.FullCache()})
    with pytest.raises(InputError, match="expected one model's: score them apart"):
        score([trace, by_hand()], {"full": pc.FullCache()})
    short = Trace(**{**vars(trace), "samples": [s for s in trace.samples if s.frame < 2]})
    with pytest.raises(InputError, match="no history: its samples are of the first 2 latent"):
        score(short, {"full": pc.FullCache()})
    half = Trace(**{**vars(trace), "samples": [s for s in trace.samples if s.clip or s.frame < 2]})
    says = "clip 0 of the trace has no sample with history, expected one of latent frame 2 or later"
    with pytest.raises(InputError, match=says):
        score(half, {"full": pc.FullCache()})


def test_no_torch_is_needed():
    code = "import packcache.inspect.score, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- policies of somebody else -------------------------------------------------------------------

MINE = '''
from dataclasses import dataclass
from packcache.policies import PackCache, Policy, SlidingWindow

@dataclass(frozen=True, kw_only=True, repr=False)
class EveryOther(Policy):
    """Frames at even distances."""

    @property
    def reach(self):
        return 5

    def counts(self, frames, distances, budget):
        return [f.count if d % 2 == 0 and d <= 5 else 0 for f, d in zip(frames, distances)]

class _Hidden(Policy):
    pass

wide = SlidingWindow(frames=3)
_narrow = SlidingWindow(frames=1)
number = 3
'''


def written(folder: Path, text: str, name: str = "mine.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_policies_of_a_file_are_rows(tmp_path):
    found = policies_of_file(written(tmp_path, MINE))
    assert list(found) == ["mine:EveryOther", "mine:wide"]
    assert found["mine:wide"] == pc.SlidingWindow(frames=3)
    scores = score(random_trace(), found)
    assert [row.label for row in scores.rows] == list(found)
    assert scores.rows[0].policy == "EveryOther()"


def test_policies_of_a_folder_are_those_of_its_files(tmp_path):
    written(tmp_path, MINE)
    written(tmp_path, "from packcache import SlidingWindow\nlong = SlidingWindow(frames=9)", "b.py")
    assert list(policies_of_folder(tmp_path)) == ["b:long", "mine:EveryOther", "mine:wide"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module", "does not run: ModuleNotFoundError: No module named"),
        ("def :", "does not run: SyntaxError"),
        ("raise SystemExit(3)", "does not run: SystemExit: 3"),
        ("x = 1", "has no policy, expected a class that inherits from packcache.policies.Policy"),
        (
            "from dataclasses import dataclass\nfrom packcache.policies import Policy\n"
            "@dataclass(frozen=True, kw_only=True)\nclass Needs(Policy):\n    size: int\n",
            "policy Needs of .* cannot be made without settings .*size.*: give every field",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, said):
    with pytest.raises(InputFileError, match=said) as raised:
        policies_of_file(written(tmp_path, text))
    assert "mine.py" in str(raised.value) and "\n" not in str(raised.value)


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(InputFileError, match="is no file, expected a Python file with a policy"):
        policies_of_file(tmp_path / "no.py")
    with pytest.raises(InputFileError, match="its name should end in"):
        policies_of_file(written(tmp_path, "", "policy.txt"))
    with pytest.raises(InputFileError, match="is no folder"):
        policies_of_folder(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputFileError, match=r"has no policy file, expected at least one \*\.py"):
        policies_of_folder(tmp_path / "empty")


def test_a_policy_that_fails_is_named(tmp_path):
    broken = "class Broken(EveryOther):\n    def counts(self, frames, d, b):\n        1 / 0\n"
    found = policies_of_file(written(tmp_path, MINE + broken))
    with pytest.raises(InputError, match="policy 'mine:Broken' fails at latent frame 0 of clip 0"):
        score(random_trace(), found)


def test_scores_are_plain_numbers():
    assert not torch.is_tensor(only(random_trace(), "full")["kept"])
