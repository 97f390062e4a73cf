"""Known attention is read back: by role, by distance, and what kind of decay it is."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcache.errors import InputError, InvalidSetting
from packcache.inspect.decay import (
    PARTS,
    attention_by_distance,
    attention_by_role,
    fit_decay,
    frame_mass,
)
from packcache.inspect.trace import COMMIT, Sample
from packcache.timeline import Role
from tests.inspect.synthetic import LAYOUT, exponential, flat, periodic, power_law, trace

D = np.arange(1, 13, dtype=float)


def without(made, keep):
    """The trace with some of its samples."""
    return dataclasses.replace(made, samples=[s for s in made.samples if keep(s)])


# --- by role -----------------------------------------------------------------------------------


def test_anchors_of_two_fifths_are_read_back():
    roles = attention_by_role(trace(exponential(0.5), anchors=0.4))
    text, image, history, current = roles.whole.mean
    assert text + image == pytest.approx(0.4, rel=0.02)
    assert text == pytest.approx(image, rel=1e-5)
    assert history + current == pytest.approx(0.6, rel=0.02)


def test_shares_sum_to_one_along_every_axis():
    roles = attention_by_role(trace(flat, layers=3, noise=0.2))
    for shares in (roles.whole.mean, roles.by_layer.mean, roles.by_step.mean, roles.by_frame):
        assert shares.sum(axis=-1) == pytest.approx(1, abs=1e-5)
    assert roles.by_layer.mean.shape == (3, len(PARTS))
    assert roles.by_frame.shape == (3, len(roles.frames), len(PARTS))
    assert roles.frames == tuple(range(1, 12)), "the image is given, not made"


def test_the_images_own_commit_is_no_forward_that_made_something():
    """A recorder sees it too: the image looks at text and at itself, and no step went before."""
    made = trace(flat, clips=2, frames=4)
    mass = np.zeros((2, 5 + LAYOUT.tokens), dtype=np.float32)
    mass[:, -1] = 1
    image = [
        Sample(clip=clip, frame=0, step=COMMIT, steps=10, branch=0, mass=mass) for clip in (0, 1)
    ]
    shown = attention_by_role(dataclasses.replace(made, samples=[*image, *made.samples]))
    without_it = attention_by_role(made)
    assert shown.frames == without_it.frames == (1, 2, 3)
    for name in ("whole", "by_layer", "by_step"):
        assert np.array_equal(getattr(shown, name).mean, getattr(without_it, name).mean), name
    with pytest.raises(InputError, match="no history: its samples are of the first 1 latent"):
        attention_by_role(dataclasses.replace(made, samples=image))


def test_the_shift_to_the_current_frame_is_seen_and_the_commit_is_last():
    growing = {0: 0.1, 4: 0.3, 8: 0.5, -1: 0.55}
    roles = attention_by_role(trace(flat, current=growing.get))
    assert roles.steps == (0, 4, 8, -1)
    later = [frame for frame in roles.frames if frame > 1]
    assert len(later) == len(roles.frames) - 1  # frame 1 has no history and looks at itself more
    lone = 0.6 / len(roles.frames)
    expected = [lone + share * len(later) / len(roles.frames) for share in growing.values()]
    assert roles.by_step.mean[:, -1] == pytest.approx(expected, abs=1e-5)


def test_text_to_video_has_no_condition_image():
    roles = attention_by_role(trace(flat, image=False))
    assert roles.whole.mean[PARTS.index(Role.IMAGE.value)] == 0
    assert roles.whole.mean[PARTS.index(Role.TEXT.value)] == pytest.approx(0.4, abs=1e-5)
    assert roles.frames[0] == 0


def test_clips_that_differ_make_the_interval():
    made = trace(flat, clips=6)
    shifts = np.linspace(-0.05, 0.05, 6)
    samples = []
    for sample in made.samples:
        mass = sample.mass.copy()
        mass[:, 0] += shifts[sample.clip]
        mass[:, -1] -= shifts[sample.clip]
        samples.append(dataclasses.replace(sample, mass=mass))
    whole = attention_by_role(dataclasses.replace(made, samples=samples)).whole
    assert whole.rows == 6 and whole.low[0] < 0.2 < whole.high[0]
    assert whole.high[0] - whole.low[0] == pytest.approx(2 * 1.96 * shifts.std() / 6**0.5, rel=0.1)


def test_one_branch_alone():
    made = trace(flat, clips=1)
    other = []
    for sample in made.samples:
        mass = sample.mass.copy()
        mass[:, -1] += mass[:, :3].sum(axis=1)
        mass[:, :3] = 0
        other.append(dataclasses.replace(sample, branch=1, mass=mass))
    both = dataclasses.replace(made, samples=[*made.samples, *other])
    text = PARTS.index(Role.TEXT.value)
    assert attention_by_role(both, branch=0).whole.mean[text] == pytest.approx(0.2, abs=1e-5)
    assert attention_by_role(both, branch=1).whole.mean[text] == pytest.approx(0.08, abs=1e-5)
    assert attention_by_role(both).whole.mean[text] == pytest.approx(0.14, abs=1e-5)


def test_json_of_both_readings_is_plain():
    made = trace(exponential(0.5), clips=2, frames=5)
    told = json.loads(json.dumps(attention_by_role(made).to_json()))
    assert told["parts"] == list(PARTS) and told["steps"] == [0, 4, 8, -1]
    told = json.loads(json.dumps(attention_by_distance(made).to_json()))
    assert told["distances"] == [1, 2, 3] and set(told["fits"]) == {"all", "0", "1"}


# --- by distance -------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("rho", [0.3, 0.5, 0.8])
def test_a_known_decay_is_recovered(rho, image):
    curve = attention_by_distance(trace(exponential(rho), image=image))
    assert len(curve.distances) == (10 if image else 11)
    assert curve.share.mean.sum(axis=-1) == pytest.approx(1)
    for fit in curve.fits().values():
        assert fit.rho == pytest.approx(rho, rel=0.02)
        assert fit.half_life == pytest.approx(math.log(0.5) / math.log(rho), rel=0.02)
        assert fit.verdict == "exponential" and fit.r2 > 0.999


def test_young_frames_do_not_bend_the_curve():
    """The plain mean over frames does: its d = 1 counts frames that have nothing else."""
    curve = attention_by_distance(trace(exponential(0.5), frames=6))
    mass = curve.mass.mean[0]
    assert mass[1] / mass[0] < 0.48
    assert curve.share.mean[0][1:] / curve.share.mean[0][:-1] == pytest.approx(0.5, rel=1e-4)


def test_mass_is_that_of_a_whole_frame():
    made = without(trace(exponential(0.5), anchors=0.4), lambda s: s.frame == 3)
    curve = attention_by_distance(made)
    assert curve.mass.mean[0] == pytest.approx([0.2, 0.1], abs=1e-5)  # 0.3 over two frames


def test_mass_by_step_follows_the_shift():
    growing = {0: 0.1, 4: 0.3, -1: 0.5}
    made = trace(flat, current=growing.get, steps=tuple(growing), frames=4)
    curve = attention_by_distance(without(made, lambda s: s.frame == 3))
    assert curve.steps == (0, 4, -1)
    expected = [[(0.6 - share) / 2] * 2 for share in growing.values()]
    assert curve.by_step == pytest.approx(np.array(expected), abs=1e-5)


def test_the_image_has_no_distance():
    made = trace(flat, frames=4)
    assert list(attention_by_distance(made).distances) == [1, 2]
    sample = made.samples[-1]
    assert frame_mass(made, sample)[0] == pytest.approx([0.2, 0.15, 0.15, 0.3], abs=1e-5)


def test_layers_differ():
    made = trace(exponential(0.5), layers=2)
    other = trace(flat, layers=2)
    samples = [
        dataclasses.replace(a, mass=np.stack((a.mass[0], b.mass[1])))
        for a, b in zip(made.samples, other.samples, strict=True)
    ]
    fits = attention_by_distance(dataclasses.replace(made, samples=samples)).fits()
    assert fits["0"].rho == pytest.approx(0.5, rel=0.02)
    assert fits["1"].verdict == "no decay"


@pytest.mark.parametrize(
    ("kernel", "verdict"),
    [
        (flat, "no decay"),
        (periodic(3), "exponential does not fit"),
        (periodic(4, 0.6), "exponential does not fit"),
        (power_law(1), "exponential does not fit"),
        (exponential(0.7), "exponential"),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_every_kind_of_attention_is_recognised(kernel, verdict, noise):
    made = trace(kernel, noise=noise, clips=8, frames=14)
    assert attention_by_distance(made).fit().verdict == verdict


def test_the_error_of_rho_is_about_right():
    """95 % intervals hold the truth in most of 40 noisy traces."""
    hits = []
    for seed in range(40):
        made = trace(
            exponential(0.6), noise=0.3, clips=6, frames=8, steps=(0,), layers=1, seed=seed
        )
        fit = attention_by_distance(made).fit()
        hits.append(fit.rho_low <= 0.6 <= fit.rho_high)
    assert np.mean(hits) >= 0.8


def test_one_clip_is_judged_by_its_scatter():
    assert attention_by_distance(trace(exponential(0.5), clips=1)).fit().verdict == "exponential"
    assert attention_by_distance(trace(flat, clips=1, noise=0.05)).fit().verdict == "no decay"


def test_without_history_there_is_no_distance():
    made = without(trace(flat), lambda s: s.frame == 1)
    with pytest.raises(InputError, match="no history: its samples are of the first 2 latent fr"):
        attention_by_distance(made)


def test_without_samples_there_is_nothing_to_read():
    with pytest.raises(InputError, match="the trace has no samples: record it again"):
        attention_by_role(without(trace(flat), lambda s: False))
    with pytest.raises(InputError, match="no samples of branch 1"):
        attention_by_distance(trace(flat), branch=1)


# --- the fit alone -----------------------------------------------------------------------------


@given(st.floats(0.05, 0.9), st.floats(1e-3, 10), st.integers(3, 20), st.booleans())
def test_exact_exponentials_of_any_kind(rho, scale, distances, with_errors):
    d = np.arange(1, distances + 1)
    mu = scale * rho**d
    held = mu > 1e-5 * mu.sum()
    if held.sum() < 3:
        return
    mu = mu[held]
    fit = fit_decay(mu, 0.05 * mu if with_errors else None)
    assert fit.rho == pytest.approx(rho, rel=1e-6) and fit.scale == pytest.approx(scale, rel=1e-6)
    assert fit.at(d[held]) == pytest.approx(mu, rel=1e-6)
    assert fit.verdict == "exponential"


@given(st.integers(0, 10_000), st.floats(0.2, 0.75))
def test_noise_within_its_error_leaves_an_exponential(seed, rho):
    mu = rho ** D[:8]
    noisy = mu * (1 + 0.05 * np.random.default_rng(seed).standard_normal(8)).clip(0.8, 1.2)
    fit = fit_decay(noisy, 0.05 * mu)
    assert fit.verdict == "exponential"
    assert fit.rho == pytest.approx(rho, rel=0.05)
    assert fit.rho_low < fit.rho < fit.rho_high
    assert fit.half_life_low < fit.half_life < fit.half_life_high


@given(st.integers(0, 10_000), st.integers(6, 16))
def test_noisy_flat_attention_is_hardly_ever_a_decay(seed, distances):
    noisy = 1 + 0.05 * np.random.default_rng(seed).standard_normal(distances).clip(-2, 2)
    fit = fit_decay(noisy, np.full(distances, 0.05))
    assert fit.verdict == "no decay" or fit.rho > 0.94, "a slope that chance makes is small"


@given(st.floats(0.6, 2.5), st.integers(8, 20), st.integers(0, 1000))
def test_a_power_law_is_no_exponential_when_distances_are_enough(p, distances, seed):
    d = np.arange(1, distances + 1)
    mu = d**-p * (1 + 0.03 * np.random.default_rng(seed).standard_normal(distances).clip(-2, 2))
    fit = fit_decay(mu, 0.03 * mu)
    assert fit.verdict == "exponential does not fit"
    assert fit.power == pytest.approx(p, abs=0.1) and fit.aicc_gain > 6


def test_a_power_law_over_few_distances_cannot_be_told_from_an_exponential():
    assert fit_decay(D[:3] ** -1, 0.1 * D[:3] ** -1).verdict == "exponential"


@given(st.sampled_from([2.5, 3, 4, 5]), st.floats(0.5, 0.9), st.booleans())
def test_waves_do_not_fit(period, depth, with_errors):
    mu = 1 + depth * np.cos(2 * np.pi * D / period)
    fit = fit_decay(mu, 0.05 * mu if with_errors else None)
    assert fit.verdict == "exponential does not fit"


def test_the_reason_names_the_period():
    fit = fit_decay(1 + 0.8 * np.cos(2 * np.pi * D / 3), np.full(12, 0.05))
    assert "off the best exponential, R2 0.0" in fit.reason
    assert ", further than their errors allow;" in fit.reason
    assert fit.reason.endswith("they go up and down every 3.0 latent frames")


def test_noise_that_errors_explain_is_no_lack_of_fit():
    mu = np.array([1.0, 0.6, 1.5, 0.7, 1.3, 0.8])
    assert fit_decay(mu, np.full(6, 0.5)).verdict == "no decay"
    assert fit_decay(mu, np.full(6, 0.02)).verdict == "exponential does not fit"


def test_a_fall_that_an_exponential_hardly_explains():
    """15 % up and down about a gentle slope: known errors tell it from chance."""
    mu = 0.93**D * (1 + 0.15 * np.array([1, -1, -1, 1] * 3))
    assert fit_decay(mu, 0.02 * mu).verdict == "exponential does not fit"
    assert fit_decay(mu, 0.02 * mu).misfit < 0.2
    assert fit_decay(mu, 0.15 * mu).verdict == "exponential"
    assert (
        fit_decay(1 + 0.1 * np.array([1, -1, -1, 1] * 3), np.full(12, 0.02)).verdict == "no decay"
    )


def test_attention_that_grows_with_distance_does_not_decay():
    fit = fit_decay(1.2**D, 0.02 * 1.2**D)
    assert fit.verdict == "no decay" and fit.rho == pytest.approx(1.2)
    assert fit.half_life == math.inf and fit.to_json()["half_life"] is None


def test_a_window_ends_where_an_exponential_goes_on():
    fit = fit_decay([0.4, 0.3, 0.2, 0.1, 0, 0])
    assert fit.verdict == "exponential does not fit" and fit.distances == 4
    assert fit.reason == "there is no attention at d = 5, where it expects some"
    steep = fit_decay([1, 1e-3, 1e-6, 0, 0])
    assert steep.verdict == "exponential", "what it expects there is nothing either"


@pytest.mark.parametrize("mu", [[1.0], [1.0, 0.5], [0.0, 1.0, 0.0, 0.5]])
def test_few_distances_cannot_be_told(mu):
    fit = fit_decay(mu)
    assert fit.verdict == "cannot be told"
    assert f"{np.count_nonzero(mu)} distances hold attention, expected at least 3" in fit.reason
    json.dumps(fit.to_json(), allow_nan=False)


def test_without_errors_the_interval_is_that_of_a_regression():
    stats = pytest.importorskip("scipy.stats", reason="SciPy comes with the extra [eval]")
    for points in (3, 4, 6, 12):
        mu = 0.8 ** D[:points] * (1 + 0.05 * np.cos(3 * D[:points]))
        fit, theirs = fit_decay(mu), stats.linregress(D[:points], np.log(mu))
        half = stats.t.ppf(0.975, points - 2) * theirs.stderr
        assert math.log(fit.rho) == pytest.approx(theirs.slope)
        assert fit.r2 == pytest.approx(theirs.rvalue**2)
        assert math.log(fit.rho_high / fit.rho) == pytest.approx(half, rel=0.02)


def test_errors_weigh():
    """A wild point of large error moves nothing."""
    mu = 0.5 ** D[:6]
    errors = 0.02 * mu
    mu[-1], errors[-1] = 4 * mu[-1], 10 * mu[-1]
    assert fit_decay(mu, errors).rho == pytest.approx(0.5, rel=0.02)
    assert fit_decay(mu).rho > 0.55


def test_draws_give_errors_and_their_correlations():
    """Slopes of the draws spread by 0.1, although each draw is an exact exponential."""
    slopes = np.random.default_rng(0).normal(math.log(0.5), 0.1, 500)
    draws = np.exp(slopes[:, None] * D[:6])
    fit = fit_decay(0.5 ** D[:6], draws=draws)
    half = (math.log(fit.rho_high) - math.log(fit.rho_low)) / 2
    assert half == pytest.approx(1.96 * 0.1, rel=0.1)


@pytest.mark.parametrize("mu", [[], [0.0, 0.0], [1.0, -0.1], [1.0, math.nan], [[1.0, 0.5]]])
def test_what_is_no_attention_is_refused(mu):
    with pytest.raises(InvalidSetting, match="expected a number of at least 0 for each distance"):
        fit_decay(mu)


@pytest.mark.parametrize("se", [[0.1], [0.1, -0.1, 0.1], [0.1, math.nan, 0.1]])
def test_errors_that_are_none_are_refused(se):
    with pytest.raises(InvalidSetting, match=r"errors have shape .* expected \(3,\), finite"):
        fit_decay([1, 0.5, 0.25], se)


def test_layout_of_the_synthetic_traces():
    """Tokens and rows as the format has them: mass sums to one."""
    made = trace(exponential(0.5), frames=4)
    for sample in made.samples:
        assert sample.mass.shape == (2, 5 + (sample.frame + 1) * LAYOUT.tokens)
        assert sample.mass.sum(axis=1) == pytest.approx(1, abs=1e-5)
