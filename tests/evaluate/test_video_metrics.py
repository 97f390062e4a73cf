"""Video metrics: their formulas by hand, what faults do to them, and what they cannot see."""

from __future__ import annotations

import functools
import itertools
import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcache.errors import InputError, InvalidSetting
from packcache.evaluate import video_metrics as vm
from packcache.evaluate.video_metrics import METRICS, Measured, measure
from packcache.testing import faults
from packcache.testing.faults import FAULTS, inject
from packcache.video import Frames
from tests.evaluate.clips import DRAWN, FOOTAGE, FRAMES, clip, passing, shapes

cv2 = pytest.importorskip("cv2", reason="OpenCV comes with the extra [eval]")

FPS = 12.0
SMOOTHNESS, FLICKER, WARP = "flow_interp_smoothness_dis", "flicker_mae", "warp_error_dis"
MOTION = "flow_motion_top5_dis"
LAB = "lab_hist_distance"
TOGETHER = {MOTION, "frozen_share", SMOOTHNESS, WARP}


def flat(*levels: int, height: int = 16, width: int = 20) -> Frames:
    """One frame of each level, all pixels alike."""
    return np.stack([np.full((height, width, 3), level, np.uint8) for level in levels])


def random_clip(frames: int, seed: int = 0, height: int = 18, width: int = 21) -> Frames:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@functools.cache
def found(name: str, fault: str | None = None) -> Measured:
    frames = clip(name)
    return measure(inject(fault, frames) if fault else frames, fps=FPS)


def ends(measured: Measured, name: str) -> float:
    """The last four frames of a curve over the first four."""
    curve = measured.series[name]
    return float(curve[-4:].mean() / curve[:4].mean())


# --- the direction table (evaluation 4) --------------------------------------------------------


@pytest.fixture(scope="module", params=[*DRAWN, *FOOTAGE])
def name(request) -> str:
    clip(request.param)  # skips where the footage is not installed
    return request.param


def test_blur_is_taken_for_smoothness(name):
    """A blind spot: a clip that melts into blur gets better in all three."""
    clean, worse = found(name), found(name, "blur")
    assert worse.scalars[SMOOTHNESS] > clean.scalars[SMOOTHNESS]
    assert worse.scalars[FLICKER] > clean.scalars[FLICKER]
    assert worse.scalars[WARP] < 0.9 * clean.scalars[WARP]
    assert ends(worse, "sharpness") < 0.2 * ends(clean, "sharpness")
    assert ends(worse, "hf_share") < 0.5 * ends(clean, "hf_share")


def test_noise_is_seen_by_all_and_taken_for_sharpness(name):
    clean, worse = found(name), found(name, "noise")
    assert worse.scalars[SMOOTHNESS] < clean.scalars[SMOOTHNESS] - 0.01
    assert worse.scalars[FLICKER] < clean.scalars[FLICKER] - 0.01
    assert worse.scalars[WARP] > 3 * clean.scalars[WARP]
    assert ends(worse, "sharpness") > 2 * ends(clean, "sharpness")


def test_melting_structures_are_hardly_seen(name):
    """A blind spot: it takes learned features to see that the picture shows nothing any more."""
    clean, worse = found(name), found(name, "melt")
    assert worse.scalars[SMOOTHNESS] == pytest.approx(clean.scalars[SMOOTHNESS], abs=0.01)
    assert worse.scalars[FLICKER] == pytest.approx(clean.scalars[FLICKER], abs=0.02)
    for curve in ("luminance", "contrast", "saturation"):
        assert ends(worse, curve) == pytest.approx(ends(clean, curve), rel=0.15)


@pytest.mark.parametrize(
    "fault, curve, least", [("saturation", "saturation", 1.25), ("exposure", "luminance", 1.2)]
)
def test_colour_drift_is_seen_by_its_own_curve_only(name, fault, curve, least):
    clean, worse = found(name), found(name, fault)
    assert ends(worse, curve) > least * ends(clean, curve)
    assert worse.scalars[SMOOTHNESS] == pytest.approx(clean.scalars[SMOOTHNESS], abs=0.01)
    assert worse.scalars[FLICKER] == pytest.approx(clean.scalars[FLICKER], abs=0.02)


@pytest.mark.parametrize("fault", ["saturation", "exposure"])
def test_colours_leave_those_of_the_first_frame(name, fault):
    clean, worse = found(name).series[LAB], found(name, fault).series[LAB]
    assert worse[0] == clean[0] == 0
    assert worse[-4:].mean() > clean[-4:].mean() + 0.3
    early, late = worse[1:5].mean(), worse[-4:].mean()
    assert late > 2 * early  # it grows with the fault


def test_colours_that_stay_are_at_no_distance(name):
    """Frozen: none at all. Moved by jitter: blind to where a colour is."""
    assert (found(name, "freeze").series[LAB] == 0).all()
    clean, moved = found(name).series[LAB], found(name, "jitter").series[LAB]
    assert moved.mean() == pytest.approx(clean.mean(), abs=0.02)


def test_flicker_is_seen_between_frames_and_not_in_their_mean(name):
    clean, worse = found(name), found(name, "flicker")
    assert worse.scalars[SMOOTHNESS] < clean.scalars[SMOOTHNESS] - 0.01
    assert worse.scalars[FLICKER] < clean.scalars[FLICKER] - 0.01
    assert worse.scalars[WARP] > 3 * clean.scalars[WARP]
    assert worse.scalars["luminance"] == pytest.approx(clean.scalars["luminance"], rel=0.02)


def test_jitter_is_seen_by_all_and_taken_for_motion(name):
    """A blind spot: motion alone says that a trembling picture is alive.

    Flow undoes whole pixels, so the warp error hardly sees them; smoothness does.
    """
    clean, worse = found(name), found(name, "jitter")
    assert worse.scalars[SMOOTHNESS] < clean.scalars[SMOOTHNESS] - 0.005
    assert worse.scalars[FLICKER] < clean.scalars[FLICKER] - 0.005
    assert 0.7 < worse.scalars[WARP] / clean.scalars[WARP] < 2
    assert worse.scalars["flow_motion_top5_dis"] > clean.scalars["flow_motion_top5_dis"]
    assert worse.scalars["dynamic_dis"] is True


def test_jitter_flips_the_verdict_on_a_clip_that_hardly_moves():
    assert found("shapes").scalars["dynamic_dis"] is False
    assert found("shapes", "jitter").scalars["dynamic_dis"] is True


def test_a_frozen_clip_is_perfect_on_all_three_and_flagged(name):
    """A blind spot, and the reason for telling motion and frozen pairs beside them."""
    still = found(name, "freeze").scalars
    assert (still[SMOOTHNESS], still[FLICKER], still[WARP]) == (1, 1, 0)
    assert (still["dynamic_dis"], still["flow_motion_top5_dis"]) == (False, 0)
    assert still["frozen_share"] == 1 and found(name).scalars["frozen_share"] == 0


def test_shuffled_frames_are_less_smooth_and_look_the_same(name):
    clean, worse = found(name), found(name, "shuffle")
    assert worse.scalars[SMOOTHNESS] < clean.scalars[SMOOTHNESS]
    assert worse.scalars[FLICKER] < clean.scalars[FLICKER]
    for curve in ("sharpness", "luminance", "contrast", "saturation", "hf_share"):
        assert sorted(worse.series[curve]) == pytest.approx(sorted(clean.series[curve]))


# --- formulas ----------------------------------------------------------------------------------


def test_flicker_by_hand():
    """Levels 0, 51, 255 differ by 51 and 204: 1 - 0.2 and 1 - 0.8."""
    assert vm.flicker_mae(flat(0, 51, 255)) == pytest.approx([0.8, 0.2])


def temporal_flickering(frames: Frames) -> float:
    """VBench's, value by value: (255 - mean over pairs of the mean absolute difference) / 255."""
    errors = []
    for before, after in itertools.pairwise(frames.tolist()):
        total = count = 0
        for row, next_row in zip(before, after, strict=True):
            for pixel, next_pixel in zip(row, next_row, strict=True):
                for level, next_level in zip(pixel, next_pixel, strict=True):
                    total += abs(level - next_level)
                    count += 1
        errors.append(total / count)
    return (255 - sum(errors) / len(errors)) / 255


@given(st.integers(2, 6), st.integers(0, 99))
def test_flicker_is_vbenchs_formula(frames, seed):
    pictures = random_clip(frames, seed, 5, 7)
    assert vm.flicker_mae(pictures).mean() == pytest.approx(temporal_flickering(pictures))


@pytest.mark.parametrize("fault", [None, "flicker"])
def test_flicker_is_vbenchs_formula_on_real_footage_too(name, fault):
    pictures = clip(name)[:5]
    pictures = inject(fault, pictures) if fault else pictures
    expected = temporal_flickering(pictures)
    assert vm.flicker_mae(pictures).mean() == pytest.approx(expected, abs=1e-12)


def test_frozen_pairs_are_counted_up_to_the_threshold():
    clip = flat(7, 7, 7, 8, 9)
    assert vm.frozen_share(clip) == 0.5
    clip[1, 0, 0, 0] += 50  # 50 levels of 960 values: 0.05 on average
    assert vm.frozen_share(clip) == 0.5
    clip[1, 1, 0, :2] += 50
    assert vm.frozen_share(clip) == 0


@pytest.mark.parametrize("pixels", [0.5, 1, 3])
def test_motion_is_the_shift_that_was_drawn(pixels):
    motion = vm.flow_motion_top5_dis(passing(4, pixels=pixels))
    assert motion.shape == (3,)
    assert motion == pytest.approx(pixels, abs=0.35)  # the fastest pixels err upwards at the edge


def test_motion_of_the_fastest_twentieth(monkeypatch):
    field = np.zeros((10, 20, 2), np.float32)
    field[0, :5] = (3, 4)
    told = type("Dis", (), {"calc": lambda self, a, b, start: field})
    monkeypatch.setattr(cv2, "DISOpticalFlow_create", lambda preset: told())
    flow = vm.Flow(flat(1, 1))
    assert flow.speed(0, 1) == pytest.approx(2.5)  # ten of 200 pixels, half of them at 5


@pytest.mark.parametrize(
    "fps, frames, kept, needed",
    [
        (12, 24, 12, 3),
        (12, 48, 24, 6),
        (8, 16, 16, 4),
        (24, 24, 8, 2),
        (30, 31, 8, 2),
        (4, 3, 3, 1),
    ],
)
def test_the_rule_for_dynamic_counts_kept_frames_and_moving_pairs(fps, frames, kept, needed):
    asked: list[tuple[int, int]] = []

    class Told:
        def __init__(self, moving: int) -> None:
            self.moving = moving
            asked.clear()

        def speed(self, first: int, second: int) -> float:
            asked.append((first, second))
            return 6.001 * 16 / 256 if len(asked) <= self.moving else 6 * 16 / 256

    clip = flat(*[0] * frames)
    assert vm.dynamic_dis(clip, Told(needed), fps=fps) is True
    assert vm.dynamic_dis(clip, Told(needed - 1), fps=fps) is False
    assert len(asked) == kept - 1 and {b - a for a, b in asked} == {max(1, round(fps / 8))}


def test_too_few_kept_frames_have_no_verdict():
    assert vm.dynamic_dis(flat(0, 9, 18), fps=12) is None
    assert measure(random_clip(3), fps=24).to_json()["scalars"]["dynamic_dis"] is None


def test_smoothness_of_straight_motion_is_near_one_and_of_a_jump_is_not():
    smooth = passing(9, pixels=2)
    values = vm.flow_interp_smoothness_dis(smooth)
    assert values.shape == (4,) and values.min() > 0.985
    jump = smooth.copy()
    jump[3] = passing(1, pixels=0)[0][:, ::-1]
    worse = vm.flow_interp_smoothness_dis(jump)
    assert worse[1] < 0.9 and worse[[0, 2, 3]] == pytest.approx(values[[0, 2, 3]])


def test_smoothness_without_flow_is_the_distance_to_the_mean():
    """Flat frames have no flow: between 10 and 30 lies 20, and 27 is 7 levels off."""
    assert vm.flow_interp_smoothness_dis(flat(10, 27, 30, 99)) == pytest.approx([1 - 7 / 255])


def test_warp_error_is_the_squared_step_where_nothing_moves():
    assert vm.warp_error_dis(flat(0, 51, 51)) == pytest.approx([0.04, 0])


def test_warp_error_forgives_motion_and_masks_what_leaves():
    moved = passing(6, pixels=3)
    squared = ((moved[1:].astype(float) - moved[:-1]) / 255) ** 2
    assert vm.warp_error_dis(moved).mean() < 0.05 * squared.mean()
    flow = vm.Flow(moved)
    forth = np.full((*moved.shape[1:3], 2), (-3, 0), np.float32)
    assert flow.is_seen(forth, -forth).mean(0) == pytest.approx([0] * 3 + [1] * (131 - 3))
    assert not flow.is_seen(forth, forth).any()  # there and back do not meet


def test_nothing_seen_is_no_number(monkeypatch):
    monkeypatch.setattr(vm.Flow, "is_seen", lambda self, forth, back: np.zeros((18, 21), bool))
    told = measure(random_clip(3), fps=FPS).to_json()
    assert told["scalars"][WARP] is None and told["series"][WARP]["values"] == [None, None]
    json.dumps(told, allow_nan=False)


def test_looks_by_hand():
    black_white = np.zeros((1, 16, 16, 3), np.uint8)
    black_white[:, :, ::2] = 255  # columns in turn: the highest frequency there is
    assert vm.luminance(black_white) == pytest.approx(127.5)
    assert vm.contrast(black_white) == pytest.approx(127.5)
    assert vm.saturation(black_white) == pytest.approx(0)
    assert vm.hf_share(black_white)[0] > 0.99
    assert vm.sharpness(black_white) == pytest.approx(510**2)  # the Laplacian is -510 or 510
    red = np.zeros((1, 16, 16, 3), np.uint8)
    red[..., 0], red[..., 1:] = 200, 50
    assert vm.saturation(red) == pytest.approx(0.75)
    assert vm.luminance(red) == pytest.approx(0.299 * 200 + 0.701 * 50)
    assert vm.hf_share(flat(90)) == vm.sharpness(flat(90)) == 0
    slow = shapes(1)
    assert vm.hf_share(slow)[0] < 0.1


def test_distance_of_colours_by_hand():
    """Of 320 pixels 80 turn white; black and white share no cube, and greys 128 and 130 do."""
    clip = flat(0, 0, 255, 0)
    clip[1, :4] = 255
    assert vm.lab_hist_distance(clip).tolist() == [0, 0.25, 1, 0]
    assert vm.lab_hist_distance(flat(128, 130, 131, 128)).tolist() == [0, 0, 0, 0]
    assert vm.lab_hist_distance(flat(7)).tolist() == [0]


def test_distance_of_colours_is_that_of_opencvs_lab():
    """Cubes of 8 units, greys in the middle of one; a few pixels lie on a face."""
    frames = random_clip(3, 5, 40, 50)
    frames[2] = frames[2] // 2 + 60

    def cubes(frame: np.ndarray) -> np.ndarray:
        lab = cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2Lab).reshape(-1, 3)
        sides = [np.arange(0, 105, 8), *[np.arange(-132, 140, 8)] * 2]
        return np.histogramdd(lab, sides)[0]

    first, *rest = map(cubes, frames)
    expected = [np.abs(own - first).sum() / 2 / 2000 for own in rest]
    assert vm.lab_hist_distance(frames)[1:] == pytest.approx(expected, abs=0.01)


@given(st.integers(0, 99))
def test_distance_of_colours_knows_no_place_and_no_direction(seed):
    a, b = random_clip(2, seed)
    there = vm.lab_hist_distance(np.stack((a, b)))
    assert there[0] == 0 and 0 < there[1] <= 1
    assert vm.lab_hist_distance(np.stack((b, a))) == pytest.approx(there)
    turned = np.ascontiguousarray(a[::-1, ::-1])
    assert vm.lab_hist_distance(np.stack((a, turned)))[1] == 0


def test_psnr_by_hand():
    assert vm.psnr(flat(10, 10), flat(20, 10)) == pytest.approx([10 * np.log10(255**2 / 100), 100])


def test_ssim_is_the_textbooks_formula():
    """One window by hand: 11 x 11 Gaussian weights over the luma of two clips."""
    a, b = random_clip(1, 3, 16, 16), random_clip(1, 4, 16, 16)
    taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(taps, taps) / taps.sum() ** 2
    weight_of_rgb = np.array([0.299, 0.587, 0.114])
    values = []
    for y in range(6):
        for x in range(6):
            p, q = (c[0, y : y + 11, x : x + 11].astype(float) @ weight_of_rgb for c in (a, b))
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append(
                (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
            )
    assert vm.ssim(a, b) == pytest.approx([np.mean(values)], abs=1e-6)
    assert vm.ssim(a, a) == pytest.approx([1])


@given(st.integers(0, 99))
def test_psnr_and_ssim_are_symmetric_and_best_for_equal_clips(seed):
    a, b = random_clip(1, seed), random_clip(1, seed + 100)
    for metric in (vm.psnr, vm.ssim):
        assert metric(a, b) == pytest.approx(metric(b, a))
        assert metric(a, b) < metric(a, a)


# --- measured ----------------------------------------------------------------------------------


def test_every_flow_is_computed_once(monkeypatch):
    asked: list[tuple[int, int]] = []
    field = vm.Flow.field

    def counted(self, first, second):
        asked.append((first, second))
        return field(self, first, second)

    monkeypatch.setattr(vm.Flow, "field", counted)
    measure(shapes(9, 24, 24), fps=12)
    assert len(asked) == len(set(asked)) == 2 * 8 + 2 * 4


def test_measure_says_what_the_functions_say():
    frames, other = shapes(6, 40, 44), inject("noise", shapes(6, 40, 44))
    measured = measure(frames, fps=8, against=other)
    assert list(measured.scalars) == list(METRICS)
    assert set(METRICS) - set(measured.series) == {"dynamic_dis", "frozen_share"}
    assert list(vm.looks(frames)) == [
        "sharpness", "hf_share", "luminance", "contrast", "saturation",
    ]  # fmt: skip
    for name in (FLICKER, SMOOTHNESS, WARP, "flow_motion_top5_dis", LAB, *vm.looks(frames)):
        curve = getattr(vm, name)(frames)
        assert measured.series[name].tolist() == curve.tolist()
        assert measured.scalars[name] == pytest.approx(curve.mean())
    assert measured.series["psnr"].tolist() == vm.psnr(frames, other).tolist()


def test_curves_know_their_frames():
    measured = found("shapes")
    assert measured.frame_numbers("sharpness").tolist() == list(range(FRAMES))
    assert measured.frame_numbers(WARP).tolist() == list(range(1, FRAMES))
    assert measured.frame_numbers(SMOOTHNESS).tolist() == list(range(1, FRAMES, 2))


def test_threads_and_what_was_asked_before_change_no_flow():
    frames, small, before = shapes(3), shapes(3, 40, 44), cv2.getNumThreads()
    try:
        cv2.setNumThreads(3)
        several = vm.Flow(frames).field(0, 2)
        cv2.setNumThreads(1)
        assert (vm.Flow(frames).field(0, 2) == several).all()
    finally:
        cv2.setNumThreads(before)
    used = vm.Flow(small)
    used.field(0, 2)
    assert (used.field(0, 1) == vm.Flow(small).field(0, 1)).all()


@pytest.mark.parametrize("name", [FLICKER, SMOOTHNESS, WARP])
def test_no_number_that_stillness_flatters_goes_without_motion(name):
    whole = found("shapes")
    alone = whole.only(name)
    assert set(alone.scalars) == {*TOGETHER, name}
    assert set(alone.to_json()["scalars"]) == set(alone.scalars)
    (line,) = [line for line in alone.lines() if line.startswith(name)]
    motion = whole.scalars[MOTION]
    assert line.endswith(f"with flow_motion_top5_dis {motion:.4f}, frozen_share 0")
    for missing in (MOTION, "frozen_share"):
        others = {other: 0.5 for other in TOGETHER if other != missing}
        says = f"misleads without {missing}: give both"
        assert_refused({name: 0.9, **others}, {}, says)
    assert_refused({}, {name: np.ones(3)}, f"{name} misleads without {MOTION}")


@pytest.mark.parametrize("name", [MOTION, "dynamic_dis"])
def test_motion_does_not_go_without_what_jitter_spoils(name):
    alone = found("shapes").only(name)
    assert set(alone.scalars) == {*TOGETHER, name}
    (line,) = [line for line in alone.lines() if line.startswith(name)]
    assert f"with {SMOOTHNESS} 0." in line and f", {WARP} " in line
    assert_refused({name: 1.0, WARP: 0.1}, {}, f"{name} misleads without {SMOOTHNESS}: give both")


def assert_refused(scalars, series, says="misleads without"):
    with pytest.raises(InvalidSetting, match=says):
        Measured(scalars=scalars, series=series, frames=4, height=16, width=16, fps=1.0)


def test_other_numbers_may_go_alone():
    assert set(found("shapes").only("sharpness").scalars) == {"sharpness"}
    Measured(scalars={"ssim": 1.0}, series={}, frames=4, height=16, width=16, fps=1.0)


def test_the_lines_say_what_was_not_measured():
    head, *lines = found("shapes").lines()
    assert head.startswith(f"{FRAMES} frames of 128x96, 12 a second; flow by DIS, no weights:")
    assert "aesthetic and imaging quality not measured" in head
    assert [line.split()[0] for line in lines] == [n for n in METRICS if n not in ("psnr", "ssim")]
    assert lines[1].split()[:2] == ["dynamic_dis", "no"]


def test_json_is_plain():
    told = json.loads(json.dumps(found("shapes").to_json(), allow_nan=False))
    assert told["schema"] == "packcache.video/1" and told["weights"] == "none"
    assert told["series"][SMOOTHNESS]["frames"] == list(range(1, FRAMES, 2))
    assert told["units"].keys() == told["scalars"].keys()


# --- wrong use ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: measure(flat(0), fps=12), "the clip has 1 frame, expected at least 3: give a"),
        (lambda: measure(flat(0, 1), fps=12), "the clip has 2 frames, expected at least 3"),
        (lambda: vm.flow_interp_smoothness_dis(flat(0, 1)), "has 2 frames, expected at least 3"),
        (lambda: vm.flicker_mae(flat(0)), "the clip has 1 frame, expected at least 2"),
        (lambda: vm.warp_error_dis(flat(0)), "the clip has 1 frame, expected at least 2"),
        (lambda: measure(flat(0, 1, 2)[..., 0], fps=12), r"shape \(3, 16, 20\), expected uint8"),
        (lambda: measure(flat(0, 1, 2) / 255, fps=12), "frames are float64 of shape"),
        (lambda: measure(flat(0, 1, 2)[:0], fps=12), r"shape \(0, 16, 20, 3\), expected uint8"),
        (lambda: measure(flat(0, 1, 2, width=15), fps=12), "frames are 15x16, expected at least"),
        (lambda: measure(flat(0, 1, 2), fps=0), "fps is 0, expected frames a second above 0"),
        (lambda: measure(flat(0, 1, 2), fps=float("nan")), "fps is nan"),
        (lambda: found("shapes").only("smoothness"), "unknown metric 'smoothness': known are flow"),
        (lambda: found("shapes").only("psnr"), "psnr was not measured: known here are flow_mot"),
        (lambda: vm.check_names(("lpips",)), "unknown metric 'lpips'"),
        (lambda: inject("rain", flat(0)), "unknown fault 'rain': known are blur, noise, melt"),
        (lambda: inject("blur", flat(0)[0]), r"shape \(16, 20, 3\), expected uint8 \[T, H, W, 3\]"),
    ],
)
def test_wrong_use_is_told(call, says):
    with pytest.raises(InvalidSetting, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("metric", [vm.psnr, vm.ssim, lambda a, b: measure(a, fps=12, against=b)])
@pytest.mark.parametrize("other", [flat(0, 1), flat(0, 1, 2, width=22)])
def test_unequal_clips_are_told(metric, other):
    says = f"the clip has 3 frames of 20x16, the one to hold it against {len(other)} frames of "
    with pytest.raises(InputError, match=says):
        metric(flat(0, 1, 2), other)


def test_without_opencv_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    for call in (lambda: measure(flat(0, 1, 2), fps=12), lambda: vm.ssim(flat(0), flat(0))):
        with pytest.raises(InvalidSetting, match=r"need OpenCV: pip install 'packcache\[eval\]'"):
            call()
    assert vm.flicker_mae(flat(0, 0)) == 1  # needs none


# --- faults ------------------------------------------------------------------------------------

GROWING = ("blur", "noise", "melt", "saturation", "exposure")
STRENGTHS = {
    "blur": {"sigma": 0}, "noise": {"sigma": 0}, "melt": {"amount": 0}, "saturation": {"factor": 1},
    "exposure": {"factor": 1}, "flicker": {"share": 0}, "jitter": {"pixels": 0},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_functions_of_seed_and_frames(fault):
    frames = shapes(6, 24, 31)
    before = frames.copy()
    worse = inject(fault, frames, seed=4)
    assert (frames == before).all() and worse.dtype == np.uint8 and worse.shape == frames.shape
    assert (inject(fault, frames, seed=4) == worse).all()
    assert (worse != frames).any()
    drawn = (inject(fault, frames, seed=5) != worse).any()
    assert drawn == (fault in ("noise", "melt", "jitter", "shuffle"))
    assert (inject(fault, frames[:1]).shape) == (1, 24, 31, 3)


@pytest.mark.parametrize("fault", STRENGTHS)
def test_faults_without_strength_change_nothing(fault):
    frames = shapes(4, 24, 31)
    assert (inject(fault, frames, **STRENGTHS[fault]) == frames).all()


@pytest.mark.parametrize("fault", GROWING)
def test_growing_faults_begin_at_nothing_and_grow(fault):
    frames = np.repeat(shapes(1, 40, 44), 9, axis=0)
    away = np.abs(inject(fault, frames).astype(int) - frames).mean((1, 2, 3))
    assert away[0] == 0 and (np.diff(away) > 0).all()


def test_strengths_are_as_stated():
    grey = np.full((2, 64, 64, 3), 100, np.uint8)
    assert inject("noise", grey)[1].std() == pytest.approx(25, rel=0.05)
    assert (inject("exposure", grey)[1] == 160).all()
    assert (inject("flicker", grey)[:, 0, 0, 0] == (106, 94)).all()
    point = np.zeros((2, 41, 41, 3), np.uint8)
    point[:, 20, 20] = 255
    lit = faults.blur(point, sigma=1.5)[1, :, :, 0].astype(float)
    assert lit[20, 20] == pytest.approx(255 / (2 * np.pi * 1.5**2), abs=1)
    assert lit.sum() == pytest.approx(255, rel=0.1)
    colour = np.full((2, 4, 4, 3), (120, 100, 90), np.uint8)
    assert inject("saturation", colour)[1, 0, 0].tolist() == pytest.approx([135, 95, 75], abs=1)


def test_jitter_moves_each_frame_by_two_pixels():
    frames = np.repeat(shapes(1, 24, 31), 12, axis=0)
    worse, inner = inject("jitter", frames), frames[0, 2:-2, 2:-2]
    seen = set()
    for frame in worse:
        (move,) = [
            (y, x)
            for y in (0, 4)
            for x in (0, 4)
            if (np.roll(frame, (y - 2, x - 2), (0, 1))[2:-2, 2:-2] == inner).all()
        ]
        seen.add(move)
    assert len(seen) == 4


def test_shuffle_keeps_every_frame():
    frames = random_clip(8)
    shuffled = inject("shuffle", frames)
    assert {f.tobytes() for f in shuffled} == {f.tobytes() for f in frames}
