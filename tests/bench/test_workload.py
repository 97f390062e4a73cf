"""What can be asked, one clear line for what cannot, and which latent frames are timed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packcache.bench.predict import held_tokens
from packcache.bench.workload import describe, make_workload, parse_layers, spread
from packcache.digits.model import text_ids
from packcache.errors import InvalidSetting
from packcache.lumos.config import SIZES
from packcache.lumos.vocab import Vocab
from packcache.policies import FullCache, PackCache, SlidingWindow
from tests.bench.workloads import workload

FULL = {"full": FullCache()}


def asked(**settings):
    return make_workload(**{"model": "toy", "policies": FULL, **settings})


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"model": "7b"}, "unknown model '7b': known are toy, 1b, 3b, digits"),
        ({"task": "v2v"}, "unknown task 'v2v': known are t2v, i2v"),
        ({"presets": ("exact", "reckless")}, "unknown preset 'reckless': known are exact, "),
        ({"presets": ("exact", "exact")}, "preset 'exact' is asked for twice"),
        ({"baselines": ("slow",)}, "unknown baseline 'slow': known are torch-full, stock"),
        ({"device": "tpu"}, "device is 'tpu', expected cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device is 'meta', expected cpu, cuda or cuda:N"),
        ({"dtype": "int8"}, "dtype is int8, expected one of float32, bfloat16, float16"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"frames": 0}, "frames is 0, expected at least 1"),
        ({"frames": 1}, "frames is 1, which i2v has none to generate of: give more"),
        ({"size": (100, 64)}, "width is 100 pixels, expected a positive multiple of 32"),
        ({"layers": 4}, "layers is 4, expected 1 to 3, the depth of toy"),
        ({"layers": 0}, "layers is 0, expected 1 to 3, the depth of toy"),
        ({"model": "3b", "layers": 29}, "layers is 29, expected 1 to 28, the depth of 3b"),
        ({"repeats": 0}, "repeats is 0, expected at least 1"),
        ({"sample_steps": 17}, "sample-steps is 17, expected 1 to 16, the steps there are"),
        ({"sample_steps": 0}, "sample-steps is 0, expected 1 to 16"),
        ({"sample_frames": 1}, "sample-frames is 1, expected at least 2: the first generated"),
        ({"baselines": ("stock",), "guidance": 1}, "baseline 'stock' with guidance 1"),
        (
            {"policies": {"narrow": PackCache(budget="2tok")}},
            "budget 2tok is 2 tokens for a window of 4 latent frames",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_one_clear_line(settings, text):
    with pytest.raises(InvalidSetting) as error:
        asked(**settings)
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none():
    with pytest.raises(InvalidSetting, match="device is cuda, but torch sees 0 CUDA devices here"):
        asked(device="cuda")


@pytest.mark.parametrize(
    "text, layers, said",
    [
        ("4", None, "check is '4' without layers"),
        ("four", 2, "check is 'four', expected numbers of layers such as 4,8"),
        ("1,4", 2, "check is 4, expected 1 to 3, the layers there are"),
    ],
)
def test_layers_to_check(text, layers, said):
    with pytest.raises(InvalidSetting) as error:
        parse_layers(text, asked(layers=layers))
    assert str(error.value).startswith(said)
    assert parse_layers("1,3", asked(layers=2)) == [1, 3]


def test_the_largest_models_usual_workload():
    made = asked(model="3b")
    assert (made.size, made.latents, made.given) == ((672, 384), 13, 1)
    assert (made.sampling.steps, made.sampling.guidance) == (50, 15)
    assert made.dtype == torch.bfloat16 and made.layout.tokens == 4084
    assert made.measured_frames == tuple(range(1, 13))


def test_the_embedded_models_text_is_as_long_as_its_prompts_are():
    made = asked(model="digits")
    prefix = Vocab(made.config).prefix(text_ids("a red 3 moving right"), seconds=2, fps=12)
    assert made.text_tokens == len(prefix.ids)
    assert describe(made)["weights"] == "embedded"


def test_few_repeats_are_said():
    assert describe(asked(repeats=6))["few_repeats"] and not describe(asked())["few_repeats"]


def test_composed_rows_sample_nothing():
    made = asked(layers=1, sample_frames=2, sample_steps=2)
    assert made.sampled_steps is None and len(made.measured_frames) == 12


def test_all_steps_are_no_sample():
    assert asked(sample_steps=16).sampled_steps is None


def test_presets_of_the_usual_workload_reuse_something():
    assert [reuse.is_exact for reuse in asked().presets.values()] == [True, False, False]


def test_the_description_is_plain():
    made = describe(asked(sample_frames=3))
    assert json.loads(json.dumps(made)) == made
    assert made["sampled_frames"][0] == 1 and len(made["sampled_frames"]) == 3
    assert made["parameters"] == 328960 and made["num_layers"] == SIZES["toy"].num_hidden_layers


# --- which latent frames are timed --------------------------------------------------------------


@pytest.mark.parametrize("task, second", [("t2v", 1), ("i2v", 2)])
def test_the_second_generated_frame_is_timed_for_stock(task, second):
    """Its first computes text and given frames as well: no straight line begins there."""
    plain = asked(task=task, frames=97, sample_frames=3).measured_frames
    made = asked(task=task, frames=97, sample_frames=3, baselines=("stock",)).measured_frames
    assert second not in plain and made == tuple(sorted((*plain, second)))
    few = asked(task="i2v", frames=5, baselines=("stock",))
    assert few.measured_frames == (1,)


@settings(max_examples=15)
@given(
    most=st.integers(2, 16),
    frames=st.integers(6, 60),
    task=st.sampled_from(["t2v", "i2v"]),
    window=st.integers(1, 5),
)
def test_first_and_last_are_timed_and_each_once(most, frames, task, window):
    policies = {"full": FullCache(), "window": SlidingWindow(frames=window)}
    made = asked(task=task, frames=frames, policies=policies)
    taken = spread(made, most)
    every = range(made.given, made.latents)
    assert taken[0] == every[0] and taken[-1] == every[-1]
    assert list(taken) == sorted(set(taken)) and len(taken) == min(most, len(every))


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_straight_lines_miss_nothing_that_the_usual_policies_hold(task):
    """Three frames tell the tokens held at all of a long clip's."""
    policies = {"full": FullCache(), "window": SlidingWindow(), "packcache": PackCache()}
    made = asked(task=task, frames=97, policies=policies, sample_frames=3)
    every = range(made.given, made.latents)
    for policy in policies.values():
        held = np.array(held_tokens(made, policy))
        line = np.interp(every, made.measured_frames, held[list(made.measured_frames)])
        assert np.allclose(line, held[every.start :])


def test_a_workload_made_by_hand_is_described_too():
    assert describe(workload(measured_frames=(1, 4)))["sampled_frames"] == [1, 4]
