"""The doctor: what is right passes, each single thing that is wrong is caught, and by which row."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import packcache as pc
from packcache.digits.model import load_model, text_ids
from packcache.errors import InvalidSetting
from packcache.evaluate import doctor
from packcache.evaluate.doctor import Diagnosis, examine
from packcache.inspect.demo import load_clip
from packcache.lumos.config import TokenIds
from packcache.lumos.model import HeadNorm, Lumos
from packcache.lumos.pipeline import Pipeline
from packcache.lumos.random_weights import random_model
from packcache.lumos.text import LumosTokenizer
from packcache.lumos.weights import save_model
from packcache.policies import FullCache
from tests.lumos.tokenizer_file import write_tokenizer
from tests.tools import recorder

THETA = [f"rope_theta {x}, not 1000" for x in (100, 10000, 500000, 333.333, 3000)]
EPS, NEAR_EPS = "rms_norm_eps 10, not 1e-05", "rms_norm_eps 0.01, not 1e-05"
FLAT = "positions without 3-D"
OFFSETS = ["codec offset +1", "codec offset -1"]
LIKELIHOOD, TEMPLATE = "likelihood of the clip's codes", "template ids"


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return pc.load("digits")


@pytest.fixture(scope="module")
def passes() -> list[tuple[int, int]]:
    """What `right` reports of its progress."""
    return []


@pytest.fixture(scope="module")
def right(pipeline, passes) -> Diagnosis:
    return examine(pipeline, on_step=lambda *step: passes.append(step))


def failed(diagnosis: Diagnosis) -> list[str]:
    return [check.name for check in diagnosis.checks if check.verdict == "FAIL"]


def verdicts(diagnosis: Diagnosis) -> dict[str, str]:
    return {check.name: check.verdict for check in diagnosis.checks}


def check_of(diagnosis: Diagnosis, name: str) -> doctor.Check:
    (check,) = [check for check in diagnosis.checks if check.name == name]
    return check


# --- what is right passes -------------------------------------------------------------------------


def test_the_embedded_model_passes_every_check(right):
    assert right.passed
    assert verdicts(right) == {
        TEMPLATE: "not run",
        "codec round trip": "PASS",
        "channel order": "PASS",
        "codes": "PASS",
        "codes used by the clip": "info",
        "decoding in pieces, off by at most": "info",
        LIKELIHOOD: "PASS",
        "model_parallel_size": "PASS",
        **dict.fromkeys([*THETA, EPS, NEAR_EPS, FLAT, *OFFSETS], "PASS"),
    }


@pytest.mark.parametrize("seed", [1, 2])
def test_it_passes_whatever_is_masked(pipeline, right, seed):
    again = examine(pipeline, seed=seed, latents=2)
    assert again.passed
    assert check_of(again, EPS).values != check_of(right, EPS).values


def test_it_passes_on_another_clip(pipeline):
    pytest.importorskip("sklearn", reason="the scans come from scikit-learn")
    from packcache.digits import world
    from packcache.digits.prompts import prompt
    from packcache.evaluate.table import cases

    scene = cases(1)[0].scene
    diagnosis = examine(pipeline, clip=world.render(scene, 25), prompt=prompt(scene))
    assert diagnosis.passed
    assert diagnosis.notes == () and diagnosis.workload["clip"] == "given"
    assert diagnosis.workload["frames"] == 25


def test_the_codec_is_measured(right):
    assert check_of(right, "codec round trip").values["psnr_db"] > 30
    assert check_of(right, "codes used by the clip").values["codes"] == 1600
    pieces = check_of(right, "decoding in pieces, off by at most")
    assert pieces.values["levels"] == {"1": 0, "2": 0, "4": 0}  # exact for our own codec
    assert 0 < check_of(right, LIKELIHOOD).values["mean"] < 2


# --- one wrong setting in the folder --------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "rows"),
    [
        ({"rope_theta": 1e4}, ["rope_theta 1000, not 10000"]),
        ({"rope_theta": 1e2}, ["rope_theta 1000, not 100"]),
        ({"rope_theta": 3e3}, ["rope_theta 1000, not 3000"]),
        ({"rope_theta": 5e5}, ["rope_theta 10000, not 500000"]),
        ({"rms_norm_eps": 1e-2}, ["rms_norm_eps 1e-06, not 0.01", "rms_norm_eps 1e-05, not 0.01"]),
    ],
)
def test_one_wrong_number_in_config_json_is_caught(pipeline, tmp_path, wrong, rows):
    changed = copy.copy(pipeline.model)
    changed.config = replace(changed.config, **wrong)
    folder = save_model(changed, tmp_path / "model")
    diagnosis = examine(replace(pipeline, model=load_model(folder)), latents=2)
    assert not diagnosis.passed and set(rows) <= set(failed(diagnosis))
    for row in rows:
        assert f"check config.json, {next(iter(wrong))}" in check_of(diagnosis, row).reason


class FlatLumos(Lumos):
    """A network that knows one axis only."""

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        flat = position_ids.clone()
        flat[4] = 0
        return super().rotary(flat)


def test_an_engine_without_3d_positions_is_caught(pipeline):
    model = copy.copy(pipeline.model)
    model.__class__ = FlatLumos
    diagnosis = examine(replace(pipeline, model=model), latents=2)
    assert FLAT in failed(diagnosis)
    assert check_of(diagnosis, FLAT).values == {"mean": 0, "low": 0, "high": 0}
    assert "as likely that way: the positions of this engine" in check_of(diagnosis, FLAT).reason


def with_rows(model: Lumos, signs: Tensor) -> Lumos:
    """The same function with two rows in the norms of q and k.

    A norm of -x times -1 is that of x: where a row of the norm changes its sign, the weights of its
    heads do too.
    """
    twin = copy.deepcopy(model)
    twin.config = replace(model.config, model_parallel_size=len(signs))
    heads = signs.repeat_interleave(4 // len(signs))
    for layer in twin.model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.mul_(heads.repeat_interleave(64)[:, None])
        for norm, own in ((attention.q_norm, signs), (attention.k_norm, signs.abs())):
            norm.weight = nn.Parameter(norm.weight * own[:, None], requires_grad=False)
            norm.bias = nn.Parameter(norm.bias.repeat(len(signs), 1), requires_grad=False)
    return twin


def test_rows_of_the_norms_in_another_order_are_caught(pipeline):
    row = "model_parallel_size 2, rows rolled by 1"
    model = with_rows(pipeline.model, torch.tensor([1.0, -1.0]))
    right = examine(replace(pipeline, model=model), latents=2)
    assert right.passed and verdicts(right)[row] == "PASS"
    assert "model_parallel_size" not in verdicts(right)
    for norm in (module for module in model.modules() if isinstance(module, HeadNorm)):
        norm.weight.copy_(norm.weight.flip(0))
    wrong = examine(replace(pipeline, model=model), latents=2)
    assert row in failed(wrong) and "likelier that way" in check_of(wrong, row).reason


def test_weights_that_were_not_trained_are_caught(pipeline):
    model = random_model(pipeline.model.config)
    diagnosis = examine(replace(pipeline, model=model), latents=2)
    assert {LIKELIHOOD, EPS, FLAT, *OFFSETS} <= set(failed(diagnosis))
    assert "the model does not know such codes" in check_of(diagnosis, LIKELIHOOD).reason


# --- a wrong codec --------------------------------------------------------------------------------


def same(x: Tensor) -> Tensor:
    return x


class Wrong:
    """The digits codec with something done to pixels, and to indices, on the way."""

    overlap = 1

    def __init__(
        self,
        codec,
        into: Callable[[Tensor], Tensor] = same,
        out: Callable[[Tensor], Tensor] = same,
        offset: int = 0,
    ) -> None:
        self.codec, self.into, self.out, self.offset = codec, into, out, offset

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        indices, codes = self.codec.encode(self.into(video))
        return (indices + self.offset) % 1600, codes

    def decode(self, indices: Tensor) -> Tensor:
        return self.out(self.codec.decode((indices - self.offset) % 1600))


def swapped(video: Tensor) -> Tensor:
    return video.flip(1)


def as_unit(video: Tensor) -> Tensor:
    return (video + 1) / 2


@pytest.mark.parametrize(
    ("wrong", "row"),
    [
        ({"into": swapped}, "channel order"),
        ({"out": swapped}, "channel order"),
        ({"into": as_unit}, "codec round trip"),
        ({"out": as_unit}, "codec round trip"),
        ({"out": lambda video: video * 2 - 1}, "codec round trip"),
        ({"into": lambda video: (video + 1) * 127.5}, "codec round trip"),
        ({"into": torch.neg}, "codec round trip"),
    ],
)
def test_wrong_channels_and_wrong_ranges_are_caught(pipeline, wrong, row):
    diagnosis = examine(replace(pipeline, codec=Wrong(pipeline.codec, **wrong)))
    assert row in failed(diagnosis)
    last = diagnosis.checks[-1]
    assert (last.name, last.verdict) == ("likelihood", "not run")
    assert last.reason == f"{failed(diagnosis)[0]} must be right first"


def test_a_wrong_range_is_caught_in_a_dark_clip():
    """There black has more than 20 dB: what counts is to be better than the mean colour."""
    dark = np.full((5, 32, 32, 3), 18, dtype=np.uint8)
    dark[:, 8:16, 8:16] = 30
    black = doctor._round_trip(np.zeros_like(dark), dark)
    assert black.verdict == "FAIL" and black.values["psnr_db"] > doctor.PSNR
    assert "the pixel range is not -1 to 1" in black.reason
    assert doctor._round_trip(dark + 2, dark).verdict == "PASS"


def test_a_clip_of_one_colour_asks_for_no_more_than_a_codec_can():
    plain = np.full((5, 32, 32, 3), 100, dtype=np.uint8)
    check = doctor._round_trip(plain + 7, plain)
    assert check.verdict == "PASS" and check.values["needed_db"] == doctor.PSNR_MOST


@pytest.mark.parametrize("offset", [1, -1])
def test_a_codec_that_counts_from_another_number_is_caught(pipeline, offset):
    codec = Wrong(pipeline.codec, offset=offset)
    diagnosis = examine(replace(pipeline, codec=codec), latents=2)
    row = f"codec offset {-offset:+d}"
    assert row in failed(diagnosis)
    assert "likelier that way: the codec counts" in check_of(diagnosis, row).reason


def test_codes_without_a_token_are_caught(pipeline):
    class Larger(Wrong):
        def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
            indices, codes = super().encode(video)
            return indices + 100, codes

        def decode(self, indices: Tensor) -> Tensor:
            return super().decode(indices - 100)

    diagnosis = examine(replace(pipeline, codec=Larger(pipeline.codec)))
    assert failed(diagnosis) == ["codes"]
    check = check_of(diagnosis, "codes")
    assert (check.found, check.expected) == ("209 to 1692", "0 to 1599")
    assert check.reason.endswith("it was trained on another codec")


def test_a_codec_that_refuses_is_one_row(pipeline):
    class Refusing(Wrong):
        def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
            raise pc.errors.InputFileError("encoder.jit has another quantiser")

    diagnosis = examine(replace(pipeline, codec=Refusing(pipeline.codec)))
    assert failed(diagnosis) == ["codec"]
    assert check_of(diagnosis, "codec").reason == "encoder.jit has another quantiser"


def test_a_codec_of_another_compression_is_one_row(pipeline):
    codec = Wrong(pipeline.codec, out=lambda video: video[..., ::2, ::2])
    diagnosis = examine(replace(pipeline, codec=codec))
    assert failed(diagnosis) == ["codec"]
    assert check_of(diagnosis, "codec").reason == (
        "the codec makes (17, 48, 48, 3) of frames (17, 96, 96, 3), expected the same: it has "
        "another compression"
    )


def test_a_grey_clip_says_nothing_of_channels(pipeline):
    grey = load_clip().given.mean(axis=-1, keepdims=True).astype(np.uint8).repeat(3, axis=-1)
    check = doctor._colours(grey[..., ::-1], grey)
    assert check.verdict == "not run" and "too little red and blue" in check.reason


# --- a wrong tokenizer ----------------------------------------------------------------------------


def tokenizer(tmp_path, *, wrong: bool = False, token_ids: TokenIds | None = None):
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(write_tokenizer(tmp_path, wrong=wrong)))
    return LumosTokenizer(raw, token_ids or TokenIds())


def test_a_wrong_tokenizer_is_caught_and_both_ids_are_told(pipeline, tmp_path):
    wrong = replace(pipeline, tokenize=tokenizer(tmp_path, wrong=True))
    diagnosis = examine(wrong)
    check = check_of(diagnosis, TEMPLATE)
    assert failed(diagnosis) == [TEMPLATE]
    assert check.expected.startswith("22807 16758 16641 18677 ") and check.found != check.expected
    assert "another model's tokenizer" in check.reason
    assert any(line == f"  found    {check.found}" for line in diagnosis.lines())
    assert any(line == f"  expected {check.expected}" for line in diagnosis.lines())


def test_the_right_tokenizer_passes(pipeline, tmp_path):
    """Of the row; the embedded model has no such tokens, which is caught as well."""
    diagnosis = examine(replace(pipeline, tokenize=tokenizer(tmp_path)))
    check = check_of(diagnosis, TEMPLATE)
    assert check.verdict == "PASS" and check.found == check.expected
    assert failed(diagnosis) == ["likelihood"]
    reason = check_of(diagnosis, "likelihood").reason
    assert "outside the vocabulary" in reason and "belongs to another model" in reason


def test_token_ids_of_its_own_leave_nothing_to_compare(pipeline, tmp_path):
    own = tokenizer(tmp_path, token_ids=TokenIds(bos=1))
    check = doctor._check_tokenizer(replace(pipeline, tokenize=own))
    assert check.verdict == "not run" and "none are known to compare with" in check.reason


def test_lumos_ids_need_a_tokenizer_that_can_be_checked(pipeline, tmp_path):
    model = copy.copy(pipeline.model)
    model.config = replace(model.config, token_ids=TokenIds(), vocab_size=129536)
    check = doctor._check_tokenizer(replace(pipeline, model=model))
    assert check.verdict == "FAIL" and "is a function: load one with load_tokenizer" in check.reason


def test_words_of_another_model_are_caught(pipeline):
    def other(prompt, header):
        return [index + 2000 for index in text_ids(prompt)]

    diagnosis = examine(replace(pipeline, tokenize=other), latents=2)
    assert failed(diagnosis) == ["likelihood"]


# --- what it says ---------------------------------------------------------------------------------


def test_json_is_plain_and_lines_fit(right):
    result = json.loads(json.dumps(right.to_json()))
    assert result["schema"] == "packcache.doctor/1" and result["passed"] is True
    assert result["workload"]["clip"] == "bundled" and result["workload"]["latents"] == 3
    row = result["results"][-1]
    assert set(row) == {"name", "verdict", "found", "expected", "reason", "values"}
    assert row["values"]["low"] < row["values"]["mean"] < row["values"]["high"]
    assert "the drawing that comes with the package" in result["notes"][0]
    lines = right.lines()
    assert lines[-1] == "PASS" and lines[-2].startswith("note: the clip is the drawing")
    assert sum(line.startswith(("PASS ", "not run", "info")) for line in lines) == len(right.checks)


def test_one_failure_is_the_verdict(right):
    bad = replace(right.checks[-1], verdict="FAIL", reason="the clip is likelier that way")
    diagnosis = replace(right, checks=(*right.checks[:-1], bad))
    assert not diagnosis.passed and not diagnosis.to_json()["passed"]
    assert diagnosis.lines()[-1] == f"FAIL: 1 of {len(right.checks)} rows"
    assert "  the clip is likelier that way" in diagnosis.lines()


def test_progress_counts_every_pass(right, passes):
    total = 1 + len([*THETA, EPS, NEAR_EPS, FLAT, *OFFSETS])
    assert passes == [(n, total) for n in range(1, total + 1)]
    assert len(right.checks) == total + 7  # tokenizer, five of the codec, model_parallel_size


CLIP = load_clip().given
PROMPT = load_clip().prompt


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": CLIP}, "prompt is missing: give clip and prompt, or neither"),
        ({"prompt": PROMPT}, "clip is missing: give clip and prompt, or neither"),
        ({"latents": 1}, "latents is 1, expected 2 to 7, the trained length"),
        ({"latents": 8}, "latents is 8, expected 2 to 7, the trained length"),
        (
            {"clip": CLIP[:8], "prompt": PROMPT},
            "clip has 8 frames, expected at least 9 for 3 latent frames: give a longer clip or",
        ),
        (
            {"clip": CLIP.astype(float), "prompt": PROMPT},
            r"clip is float64 of shape \(17, 96, 96, 3\), expected uint8 \[T, H, W, 3\]",
        ),
        ({"clip": CLIP[0], "prompt": PROMPT}, r"clip is uint8 of shape \(96, 96, 3\), expected"),
        ({"clip": CLIP, "prompt": "a dog"}, "the digits model does not know 'dog'"),
    ],
)
def test_wrong_use_is_one_line(pipeline, settings, message):
    with pytest.raises(InvalidSetting, match=message):
        examine(pipeline, **settings)


def test_a_clip_is_cut_to_the_trained_length_and_to_size(pipeline):
    large = CLIP.repeat(2, axis=1).repeat(2, axis=2).repeat(2, axis=0)  # 34 frames of 192x192
    shown, *_ = doctor._material(pipeline, large, PROMPT, 3)
    assert shown.shape == (25, 96, 96, 3)
    assert np.array_equal(shown[::2], CLIP[:13])


# --- its parts ------------------------------------------------------------------------------------


@given(st.floats(min_value=1.0, max_value=1e8))
def test_other_thetas_keep_their_distance(theta):
    far, near = doctor.other_thetas(theta)
    assert far == sorted(set(far)) and {theta / 10, theta * 10} <= set(far)
    assert all(x >= 2 * theta or theta >= 2 * x for x in (*far, *near))


@given(st.floats(min_value=1e-8, max_value=1.0))
def test_other_eps_are_far_away(eps):
    (*smaller, larger), near = doctor.other_eps(eps)
    assert larger >= 1000 * eps and larger >= 10
    assert smaller == [x for x in (1e-6, 1e-5) if eps > 50 * x]
    assert near == [x for x in (1000 * eps,) if x < larger]


@pytest.mark.parametrize(
    ("difference", "far", "near"),
    [
        (0.5, "PASS", "PASS"),
        (0.9 * doctor.MARGIN, "FAIL", "PASS"),
        (0.0, "FAIL", "PASS"),
        (-0.9 * doctor.MARGIN, "FAIL", "PASS"),
        (-0.5, "FAIL", "FAIL"),
    ],
)
def test_wrong_settings_must_lose_and_near_ones_must_not_win(monkeypatch, difference, far, near):
    """By more than the margin, and with the whole interval."""
    base = np.linspace(1, 2, 24)
    monkeypatch.setattr(doctor, "_surprise", lambda asked: base + difference)
    for verdict, is_near in ((far, False), (near, True)):
        contrast = doctor._Contrast(name="x", asked=None, hint="look", near=is_near)
        check = doctor._judge(contrast, base, 0)
        assert check.verdict == verdict and bool(check.reason) == (verdict == "FAIL")
        assert check.values["mean"] == pytest.approx(difference)
    noisy = base + difference + 2 * (np.arange(24) % 2) - 1
    monkeypatch.setattr(doctor, "_surprise", lambda asked: noisy)
    assert doctor._judge(contrast, base, 0).verdict == ("FAIL" if difference < -0.4 else "PASS")


def test_wrong_settings_cost_no_second_copy_of_the_weights(pipeline):
    model = pipeline.model
    own = {p.data_ptr() for p in model.parameters()}
    before = copy.deepcopy(model.config)
    for twin in (
        doctor._twin(model, rope_theta=1e4),
        doctor._twin(model, rms_norm_eps=0.5),
        doctor._flat(model),
    ):
        assert {p.data_ptr() for p in twin.parameters()} == own
    assert model.config == before and model.model.norm.eps == before.rms_norm_eps
    assert model.inv_freq[1] != doctor._twin(model, rope_theta=1e4).inv_freq[1]
    rolled = doctor._rolled(model, 1)
    changed = {p.data_ptr() for p in rolled.parameters()} - own
    assert len(changed) == 4 * model.config.num_hidden_layers


@settings(max_examples=20)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 9))
def test_every_row_has_as_many_masked_tokens(rows, columns, seed):
    masked = doctor._masked(rows, columns, (seed, 1))
    assert masked.shape == (rows, columns)
    assert set(masked.sum(1).tolist()) == {columns // 2} or columns == 1
    assert torch.equal(masked, doctor._masked(rows, columns, (seed, 1)))


def test_surprise_in_parts_is_surprise():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(600, 50, generator=generator)
    true = torch.randint(-1, 50, (600,), generator=generator)
    expected = -logits.log_softmax(-1).gather(1, true.clamp_min(0)[:, None])[:, 0]
    expected[true < 0] = 0
    assert torch.allclose(doctor._nll(logits, true), expected, atol=1e-5)


# --- what the engine is asked ---------------------------------------------------------------------


def test_what_is_told_changes_the_prediction_and_leaves_no_trace(tiny):
    run = recorder(tiny, FullCache(), guidance=1.0)
    run.prefill()
    before = [p.clone() for store in run.caches[0].stores for pair in store for p in pair]
    nothing = torch.full((1, 16), -1)
    part = nothing.clone()
    part[0, 3], part[0, 7] = 0, 5
    assert torch.equal(run.predict(nothing), run.predict())
    assert not torch.allclose(run.predict(part), run.predict())
    told, low = run.forwards[-2].ids[0][run.content], tiny.config.token_ids.video_lo
    assert told[3] == low and told[7] == low + 5
    assert (told == tiny.config.token_ids.mask).sum() == 14
    after = [p for store in run.caches[0].stores for pair in store for p in pair]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("known", [torch.zeros(1, 15), torch.full((1, 16), 1 << 20)])
def test_told_codes_must_fit_the_frame_and_the_codec(tiny, known):
    run = recorder(tiny, FullCache(), guidance=1.0)
    run.prefill()
    with pytest.raises(InvalidSetting, match=r"expected \(1, 16\) \(prompts, content tokens\) and"):
        run.predict(known.long())
    run.predict()  # nothing was left open
