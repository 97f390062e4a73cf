"""`stock` counts where it takes as long as upstream, in the same numbers."""

from __future__ import annotations

import json

import pytest

from packcache.bench.promised import NAME, SCHEMA, is_held, promise, read_promise
from packcache.errors import InputFileError
from tests.tools import ROOT


def promised(ratio: float, dtype: str = "float32", device: str = "cpu") -> dict:
    """As `benchmarks/stock_upstream.py` writes it, with the fields that are read."""
    row = {"dtype": dtype, "ratio": ratio, "ratio_low": ratio - 0.1, "ratio_high": ratio + 0.1}
    return {
        "schema": SCHEMA,
        "results": [row],
        "environment": {"device": device},
        "workload": {"model": "3b", "layers": 2, "width": 448, "height": 256, "held_latents": 2},
    }


@pytest.mark.parametrize("ratio, held", [(0.91, True), (1.09, True), (0.89, False), (1.11, False)])
def test_within_a_tenth(ratio, held):
    assert is_held(promised(ratio), "float32") is held
    assert promise(promised(ratio), "float32").startswith(
        f"stock {'within' if held else 'not within'} 10% of upstream: {ratio:.3f}x ("
    )


def test_other_numbers_are_not_held():
    assert not is_held(promised(1), "bfloat16")
    assert promise(promised(1), "bfloat16") == "stock was not held against upstream in bfloat16"


def test_nothing_was_measured(tmp_path):
    assert read_promise(tmp_path) is None
    assert not is_held(None, "float32")
    assert promise(None, "float32") == "stock was not held against upstream in float32"


def test_where_it_was_measured_is_told():
    told = promise(promised(1.02, "bfloat16", "NVIDIA H200"), "bfloat16")
    assert told == (
        "stock within 10% of upstream: 1.020x (0.920 to 1.120) a step of 3b 448x256, 2 layers, "
        "2 latent frames held, bfloat16 on NVIDIA H200 (*GPU run*)"
    )


def test_the_file_is_the_one_that_is_written(tmp_path):
    (tmp_path / NAME).write_text(json.dumps(promised(1)))
    assert read_promise(tmp_path) == promised(1)
    script = (ROOT / "benchmarks" / "stock_upstream.py").read_text()
    assert NAME in script and SCHEMA in script
    (tmp_path / NAME).write_text('{"schema": "other/1"}')
    with pytest.raises(InputFileError, match=rf"{NAME} has schema 'other/1', expected '{SCHEMA}'"):
        read_promise(tmp_path)
