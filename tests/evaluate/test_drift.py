"""Drift, marks and survival: by hand, and as properties."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcache.errors import InputError, InvalidSetting
from packcache.evaluate.drift import Marks, by_latent, contrast, drift, marks, survival
from packcache.evaluate.statistics import bootstrap, sign_flip, wilson
from packcache.policies import (
    POLICIES,
    FullCache,
    NoHistory,
    PackCache,
    SinkWindow,
    SlidingWindow,
    UniformHistory,
)
from packcache.timeline import FrameLayout
from tests.tools import LAYOUT, grow

levels = st.floats(-50, 50).map(lambda x: round(x, 3))


def series(seed: int = 0, clips: int = 6, latents: int = 13) -> np.ndarray:
    return np.random.default_rng(seed).normal(10, 1, (clips, latents))


def told(rows, **settings):
    """A drift with few resamples and a second a latent frame."""
    return drift(rows, **{"seconds": 1.0, "resamples": 200, **settings})


# --- curves by latent frame --------------------------------------------------------------------


def test_pixel_frames_go_to_their_latent_frames():
    first, curve = by_latent([7, 1, 2, 3, 4, 5, 6])
    assert (first, curve.tolist()) == (0, [7, 2.5, 5.5])
    pairs = by_latent([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])  # of pairs (0, 1), (1, 2), ...
    assert (pairs[0], pairs[1].tolist()) == (1, [2.5, 5])
    odd = by_latent([1, 3, 5], [1, 3, 5])
    assert (odd[0], odd[1].tolist()) == (1, [2, 5])
    assert by_latent([1, 2, 3], temporal=2)[1].tolist() == [1, 2.5]


@given(st.integers(1, 30), levels)
def test_a_constant_curve_stays_what_it_is(frames, level):
    first, curve = by_latent([level] * frames)
    assert first == 0 and len(curve) == -(-(frames - 1) // 4) + 1
    assert curve == pytest.approx(level)


# --- the scalars by hand -----------------------------------------------------------------------


def test_contrast_takes_fifteen_percent_at_each_end():
    """Of 13 latent frames two at each end, of 7 one, of 20 three."""
    ramp = np.arange(13.0)[None]
    found = told(ramp)
    assert found.ends == 2
    assert found.signed == {"mean": 11, "low": 11, "high": 11}
    assert told(np.arange(7.0)[None]).ends == 1
    assert told(np.arange(20.0)[None]).ends == 3
    assert told([[1.0, 5.0]]).signed["mean"] == 4


def test_absolute_drift_does_not_cancel():
    """One clip up by 11, one down by 11: no drift in the mean, 11 in size (FramePack)."""
    ramp = np.arange(13.0)
    found = told([ramp, -ramp])
    assert found.signed["mean"] == 0
    assert found.absolute["mean"] == 11
    assert found.slope["mean"] == 0


def test_slope_is_a_seconds_and_unmoved_by_a_wild_frame():
    ramp = 2.0 * np.arange(13)
    ramp[6] = 900
    assert told([ramp], seconds=0.25).slope["mean"] == pytest.approx(8)


def test_slope_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats", reason="SciPy comes with the extra [eval]")
    row = series(3, 1)[0]
    assert told([row]).slope["mean"] == pytest.approx(stats.theilslopes(row).slope)


def test_vde_by_hand():
    """Chunk means 2, 3, 1, 2 weigh 3, 2, 1: (3 * 1 + 2 * 1 + 1 * 0) / 2."""
    found = told([[2, 2, 3, 3, 1, 1, 2, 2]], chunks=4)
    assert found.vde == {"mean": 2.5, "low": 2.5, "high": 2.5}
    assert found.chunks == 4 and found.vde_skipped is None
    assert told(-np.array([[2, 2, 3, 3, 1, 1, 2, 2]]), chunks=4).vde["mean"] == 2.5
    assert told([[1.0, 2.0, 3.0]]).chunks == 3  # not more than latent frames


def test_vde_is_left_out_with_a_reason_where_it_would_divide_by_nothing():
    rows = [[0.0, 1, 1, 1, 1], [1.0, 1, 1, 1, 1], [0.005, 1, 1, 1, 1]]
    found = told(rows)
    assert found.vde is None
    assert found.vde_skipped == "the first chunk is near 0 in 2 of 3 clips"
    assert told(np.zeros((2, 5))).vde is None


def test_the_worst_chunk_is_the_one_farthest_from_the_first():
    row = np.array([5, 5, 5, 5, 9, 9, 1, 2, 5, 5.0])
    worst = told([row], first_latent=1).worst
    assert (worst.chunk, worst.first, worst.last) == (2, 5, 6)
    assert (worst.mean, worst.change) == (9, 4)
    row[4:6] = 6
    worst = told([row]).worst
    assert (worst.chunk, worst.first, worst.last, worst.change) == (3, 6, 7, -3.5)


def test_the_band_is_the_bootstrap_over_prompts():
    rows = series(1)
    found = drift(rows, seconds=1, seed=5)
    band = bootstrap(rows, seed=5)
    for name in ("mean", "low", "high"):
        assert getattr(found.curve, name).tolist() == getattr(band, name).tolist()
    assert (found.clips, found.prompts) == (6, 6)


def test_seeds_of_a_prompt_count_as_one():
    """Doubling every clip as a second seed changes nothing: prompts are what is resampled."""
    rows, full = series(1), series(2)
    once = told(rows, against=full)
    labels = ["a", "b", "c", "d", "e", "f"]
    twice = told(np.repeat(rows, 2, 0), against=np.repeat(full, 2, 0), prompts=np.repeat(labels, 2))
    assert (twice.clips, twice.prompts) == (12, 6)
    plain, doubled = once.to_json(), twice.to_json()
    for name in ("signed", "absolute", "slope", "vde", "curve", "excess", "worst"):
        for key, value in plain[name].items():
            assert doubled[name][key] == pytest.approx(value), (name, key)


# --- excess ------------------------------------------------------------------------------------


def test_excess_is_the_difference_pair_by_pair():
    """Both drift alike but for a quarter a latent frame: 13 frames, two at each end, 11 apart."""
    full = series(2, clips=8)
    found = told(full + 0.25 * np.arange(13), against=full, resamples=1000)
    assert found.excess.mean == pytest.approx(2.75)
    assert found.excess.low == pytest.approx(2.75) and found.excess.high == pytest.approx(2.75)
    assert found.excess.p == pytest.approx(2 / 2**8)
    assert told(full).excess is None


def test_excess_has_the_bootstrap_interval_and_the_sign_flip_p():
    rows, full = series(1), series(2)
    found = drift(rows, seconds=1, against=full, seed=3)
    pairs = rows[:, -2:].mean(1) - rows[:, :2].mean(1) - full[:, -2:].mean(1) + full[:, :2].mean(1)
    assert found.excess.mean == pytest.approx(pairs.mean())
    assert found.excess.low == pytest.approx(bootstrap(pairs, seed=3).low)
    assert found.excess.p == sign_flip(pairs, seed=3)


@given(st.integers(0, 99))
def test_a_policy_that_equals_full_has_no_excess(seed):
    rows = series(seed)
    excess = told(rows, against=rows).excess
    assert (excess.mean, excess.low, excess.high, excess.p) == (0, 0, 0, 1)


# --- properties --------------------------------------------------------------------------------


@given(levels, st.integers(1, 5), st.integers(2, 20))
def test_a_constant_series_does_not_drift(level, clips, latents):
    found = told(np.full((clips, latents), level))
    for name in ("signed", "absolute", "slope"):
        assert getattr(found, name) == pytest.approx({"mean": 0, "low": 0, "high": 0}, abs=1e-9)
    assert found.vde is None if level == 0 else found.vde["mean"] == pytest.approx(0, abs=1e-9)
    assert found.worst.change == pytest.approx(0, abs=1e-9)


@given(st.integers(0, 99), levels)
def test_signed_numbers_move_with_sign_and_not_with_level(seed, level):
    rows = series(seed)
    found, moved, turned = told(rows), told(rows + level), told(-rows)
    back = told(rows[:, ::-1])
    for name in ("signed", "slope"):
        mean = getattr(found, name)["mean"]
        assert getattr(moved, name)["mean"] == pytest.approx(mean, abs=1e-9)
        assert getattr(turned, name)["mean"] == pytest.approx(-mean, abs=1e-9)
        assert getattr(back, name)["mean"] == pytest.approx(-mean, abs=1e-9)
    assert back.absolute["mean"] == pytest.approx(found.absolute["mean"])
    assert found.absolute["mean"] >= abs(found.signed["mean"])


def test_json_is_plain():
    found = told(series(1), against=series(2), first_latent=1)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["first_latent"] == 1 and len(plain["curve"]["low"]) == 13
    assert plain["excess"]["p"] == found.excess.p and plain["worst"]["chunk"] == found.worst.chunk
    assert told(np.zeros((1, 5))).to_json()["vde"] is None


# --- marks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy, fills, packs, slides",
    [
        (FullCache(), None, None, None),
        (NoHistory(), None, 0, 0),
        (SlidingWindow(frames=1), 0, 1, 1),
        (SlidingWindow(frames=3), 2, 3, 3),
        (SinkWindow(sinks=1, frames=3), 3, 4, 4),
        (PackCache(), 0, 1, 4),
        (PackCache(budget=2), 1, 2, 4),
        (PackCache(budget=1.5), 1, 1, 4),
        (PackCache(budget="150tok"), 1, 1, 4),  # two tokens leave
        (PackCache(fill="window"), 2, 3, 4),
        (UniformHistory(budget=3, window=None), 2, 3, None),
        (PackCache(budget=None, window=None), None, None, None),
        (PackCache(budget=50), 3, 4, 4),  # never full, yet never more than its window
    ],
)
def test_marks_of_policies(policy, fills, packs, slides):
    found = marks(policy, layout=LAYOUT, latents=13)
    assert found == Marks(fills=fills, packs=packs, slides=slides)
    assert found.to_json() == {"fills": fills, "packs": packs, "slides": slides}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("image", [False, True])
def test_marks_are_those_of_a_cache_that_is_driven(name, image):
    """The same clip with its text, commit by commit."""
    policy = POLICIES[name]()
    packs = slides = fills = None
    most = 0
    for frame, timeline in enumerate(grow(policy, 9, image=image)):
        held = timeline.counts()
        if timeline.evicted_tokens and packs is None:
            packs = frame
        if len(held) < frame + 1 - image and slides is None:
            slides = frame
        if sum(held.values()) > most:
            most, fills = sum(held.values()), frame
    found = marks(policy, layout=LAYOUT, latents=9, image=image)
    fills = fills if packs is not None else None
    assert found == Marks(fills=fills, packs=packs, slides=slides)


def test_an_image_puts_history_off_by_one():
    assert marks(PackCache(), layout=LAYOUT, latents=9, image=True) == Marks(
        fills=1, packs=2, slides=5
    )


def test_short_clips_end_before_they_slide():
    assert marks(PackCache(), layout=LAYOUT, latents=4) == Marks(fills=0, packs=1, slides=None)
    assert marks(PackCache(), layout=LAYOUT, latents=1) == Marks(
        fills=None, packs=None, slides=None
    )


def test_remasked_tokens_and_budgets_in_bytes_count():
    visible = np.arange(LAYOUT.tokens) % 2 == 0
    dropped = marks(PackCache.paper_visible(), layout=LAYOUT, latents=9, visible=visible)
    assert (dropped.packs, dropped.slides) == (0, 4)  # re-masked tokens leave with the first commit
    in_bytes = PackCache(budget="1MiB")
    token_bytes = 2**20 // (2 * LAYOUT.tokens)  # two frames and some bytes
    assert marks(in_bytes, layout=LAYOUT, latents=9, token_bytes=token_bytes) == marks(
        PackCache(budget=2), layout=LAYOUT, latents=9
    )


def test_order_by_novelty_needs_no_ids_and_bare_layouts_work():
    bare = FrameLayout(rows=3, cols=4, header=0, footer=0, new_line=False)
    assert marks(PackCache(order="novelty"), layout=bare, latents=9).slides == 4


# --- survival ----------------------------------------------------------------------------------


def test_kaplan_meier_by_hand():
    """Freireich's 6-MP group, the textbook's: 21 watched, 9 lost, 12 censored."""
    times = [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35]
    lost = [1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    found = survival(times, lost)
    steps = [(s.time, round(s.survival, 3), s.at_risk, s.lost) for s in found.steps]
    assert steps == [
        (0, 1, 21, 0), (6, 0.857, 21, 3), (7, 0.807, 17, 1), (10, 0.753, 15, 1),
        (13, 0.69, 12, 1), (16, 0.627, 11, 1), (22, 0.538, 7, 1), (23, 0.448, 6, 1),
    ]  # fmt: skip
    assert (found.median, found.until, found.clips, found.censored) == (23, 35, 21, 12)
    assert found.at(22.5).survival == pytest.approx(0.538, abs=1e-3)
    assert found.at(0).survival == 1 and found.at(35).survival == found.at(23).survival
    # Greenwood's standard error at 23 is 0.1346: the size that has it is 0.448 * 0.552 / 0.0181
    size = 0.4482 * 0.5518 / 0.1346**2
    low, high = wilson(round(0.4482 * size), round(size))
    assert (found.steps[-1].low, found.steps[-1].high) == pytest.approx((low, high), abs=0.03)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=25))
def test_without_censoring_it_is_the_share_left(times):
    pytest.importorskip("scipy", reason="wilson needs SciPy")
    found = survival(times, [True] * len(times))
    assert [s.time for s in found.steps] == sorted({0, *times})
    for step in found.steps:
        left = sum(time > step.time for time in times)
        assert step.survival == left / len(times)
        assert (step.low, step.high) == pytest.approx(wilson(left, len(times)), abs=1e-9)
    half = [s.time for s in found.steps if 2 * sum(t > s.time for t in times) <= len(times)]
    assert found.median == half[0]


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=25))
def test_survival_only_falls_within_its_band(clips):
    times, lost = zip(*clips, strict=True)
    found = survival(times, lost)
    for step in found.steps:
        assert 0 <= step.low <= step.survival + 1e-12 and step.survival - 1e-12 <= step.high <= 1
        assert step.high > step.low
    for before, after in itertools.pairwise(found.steps):
        assert before.survival > after.survival and before.time < after.time
    assert sum(step.lost for step in found.steps) == sum(lost) == len(clips) - found.censored


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=25))
def test_censoring_a_clip_later_never_lowers_the_curve(clips):
    """A lost clip that is watched to the end instead can only raise what is left."""
    times, lost = zip(*clips, strict=True)
    whole = survival([*times, 9], [*lost, False])
    gone = survival([*times, 9], [*lost, True])
    for time in range(10):
        assert whole.at(time).survival >= gone.at(time).survival - 1e-12


def test_a_clip_that_was_censored_no_longer_counts_in_what_follows():
    """Watched to 1, 2, 3; one lost at 2, when two were watched: as one of two."""
    pytest.importorskip("scipy", reason="wilson needs SciPy")
    step = survival([1, 2, 3], [False, True, False]).steps[1]
    assert (step.survival, step.at_risk) == (0.5, 2)
    assert (step.low, step.high) == pytest.approx(wilson(1, 2))


def test_nobody_lost_is_one_step_with_a_width():
    found = survival([9, 9, 9], [False] * 3)
    assert len(found.steps) == 1 and found.median is None
    assert found.steps[0].survival == 1 and 0 < found.steps[0].low < 0.5


def test_more_clips_make_a_narrower_band():
    few, many = ([1, 2, 3, 3] * n for n in (2, 20))
    widths = [survival(t, [True, True, True, False] * (len(t) // 4)).at(2) for t in (few, many)]
    assert widths[0].high - widths[0].low > 2 * (widths[1].high - widths[1].low)
    wide = survival(few, [True] * len(few), level=0.99).at(2)
    assert wide.low < survival(few, [True] * len(few)).at(2).low


def bands(found) -> list[float]:
    return [bound for step in found.steps for bound in (step.low, step.high)]


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=25))
def test_a_prompt_for_each_clip_is_what_it_is_without_prompts(clips):
    times, lost = zip(*clips, strict=True)
    own = survival(times, lost, prompts=range(len(clips)))
    assert own == survival(times, lost) and own.prompts == own.clips == len(clips)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=25))
def test_the_same_clips_again_as_seeds_tell_nothing_new(clips):
    """Thrice the clips, the same curve, and a band as of one clip fewer for each prompt."""
    times, lost = map(np.array, zip(*clips, strict=True))
    again = np.repeat(range(len(times)), 3)
    once, thrice = survival(times, lost), survival(times[again], lost[again], prompts=again)
    assert (thrice.clips, thrice.prompts) == (3 * once.clips, once.clips)
    apart = survival(times[again], lost[again])
    for one, same, far in zip(once.steps, thrice.steps, apart.steps, strict=True):
        assert one.survival == pytest.approx(same.survival) == pytest.approx(far.survival)
        assert same.low <= one.low + 1e-12 and one.high - 1e-12 <= same.high
        assert same.high - same.low > far.high - far.low


def test_without_censoring_the_band_is_that_of_prompts_means():
    """Left after time 1: of three prompts 2, 1 and 0 of two clips each. The shares 1, 1/2 and 0
    have a variance of 1/4, so their mean has 1/12: as much as 3 clips that do not go together."""
    pytest.importorskip("scipy", reason="wilson needs SciPy")
    step = survival([2, 2, 1, 2, 1, 1], [1] * 6, prompts=["a", "a", "b", "b", "c", "c"]).at(1)
    size, z = 3, 1.959964
    middle, root = (0.5 * size + z**2 / 2) / (size + z**2), (size / 4 + z**2 / 4) ** 0.5
    assert step.survival == 0.5
    assert (step.low, step.high) == pytest.approx(
        (middle - z * root / (size + z**2), middle + z * root / (size + z**2)), abs=1e-6
    )
    assert step.high - step.low > np.diff(wilson(3, 6))[0]


def test_the_band_between_prompts_agrees_with_resampling_them():
    """Censored clips too: the spread of the curve over prompts drawn anew."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 3)
    pace = np.repeat(rng.exponential(6, 40), 3)  # seeds of a prompt go together
    times = np.ceil(pace * rng.uniform(0.8, 1.2, 120)).clip(1, 12)
    lost = (times < 12) & (rng.random(120) < 0.9)
    curves = []
    for _ in range(400):
        drawn = np.concatenate([np.nonzero(prompts == p)[0] for p in rng.integers(40, size=40)])
        again = survival(np.append(times[drawn], 12), np.append(lost[drawn], False))
        curves.append(again.at(5).survival)
    step = survival(times, lost, prompts=prompts).at(5)
    low, high = np.quantile(curves, (0.025, 0.975))
    assert step.high - step.low == pytest.approx(high - low, rel=0.15)
    apart = survival(times, lost).at(5)
    assert step.high - step.low > 1.3 * (apart.high - apart.low)


def test_seeds_that_differ_within_prompts_are_no_better_than_apart():
    """Each prompt loses one of its two clips: between prompts no spread, yet not certain."""
    once = survival([1, 2] * 6, [True, False] * 6, prompts=np.repeat(range(6), 2))
    assert bands(once)[2:] == bands(survival([1, 2] * 6, [True, False] * 6))[2:]


def test_one_prompt_says_nothing_of_others():
    step = survival([1, 2, 2], [True, False, False], prompts=["a"] * 3).at(1)
    assert (step.low, step.high) == (0, 1)


def test_survival_is_plain_data():
    plain = json.loads(json.dumps(survival([1, 2], [True, False]).to_json(), allow_nan=False))
    assert plain["median"] == 1 and plain["steps"][1]["survival"] == 0.5


# --- wrong use ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: told([1.0, 2.0]), r"series have shape \(2,\), expected \[clips, latents\]"),
        (lambda: told([[1.0], [2.0]]), "at least 2 latent frames: one has no end"),
        (lambda: told(np.zeros((0, 5))), r"series have shape \(0, 5\)"),
        (lambda: told([[1.0, np.nan]]), "NaN or infinity: leave such clips out and say how many"),
        (lambda: told(series(), seconds=0), "seconds is 0, expected those of a latent frame"),
        (lambda: told(series(), chunks=1), "chunks is 1, expected at least 2"),
        (lambda: told(series(), prompts=["a"]), "1 prompts for 6 clips, expected one for each"),
        (lambda: by_latent([]), "and at least one value"),
        (lambda: by_latent([1, 2], [0]), r"shape \(2,\) and frames \(1,\), expected one frame"),
        (lambda: by_latent([1, 2], [0, 9]), "latent frame 1 has no value: give the whole curve"),
        (lambda: marks(FullCache(), layout=LAYOUT, latents=0), "latents is 0, expected at least"),
        (lambda: marks(PackCache(budget="2tok"), layout=LAYOUT, latents=3), "budget 2tok is 2"),
        (lambda: survival([], []), "expected one of each a clip"),
        (lambda: survival([1, 2], [True]), r"shape \(2,\) and observed \(1,\)"),
        (lambda: survival([-1], [True]), "negative or not finite: a clip that lost nothing has"),
        (lambda: survival([np.inf], [False]), "negative or not finite"),
        (lambda: survival([1], [0.5]), "observed holds other values than true and false"),
        (lambda: survival([1, 2], [1, 1], prompts=["a"]), "1 prompts for 2 clips, expected one"),
        (lambda: survival([1], [1], level=1), "level is 1, expected above 0 and below 1"),
        (lambda: survival([5], [0]).at(6), "survival at 6 was asked, expected 0 to 5.0: no clip"),
    ],
)
def test_wrong_use_is_told(call, says):
    with pytest.raises(InvalidSetting, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_unequal_clips_are_told():
    says = "has 6 clips of 13 latent frames, the one it is held against 6 of 9: give the same clips"
    with pytest.raises(InputError, match=says):
        told(series(), against=series(latents=9))


def test_a_contrast_is_end_less_start():
    curve = np.array([[1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25], [np.nan] * 6 + [1.0]])
    first, second = contrast(curve)
    assert first == pytest.approx(-0.75) and np.isnan(second)
    long = np.concatenate((np.ones(15), np.full(70, 9.0), np.zeros(15)))
    assert contrast(long[None])[0] == -1


def test_what_was_not_asked_is_left_out_of_a_latent_frame():
    first, curve = by_latent([1, np.nan, 4, 6, np.nan, *[np.nan] * 4])
    assert first == 0 and curve[:2].tolist() == [1, 5] and np.isnan(curve[2])
