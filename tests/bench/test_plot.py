"""The picture: every finished row is a bar; what cannot be drawn is one line."""

from __future__ import annotations

import builtins

import pytest
from PIL import Image

from packcache.bench.plot import check_name, plot
from packcache.errors import InvalidSetting
from tests.bench.fakes import report
from tests.bench.workloads import workload


@pytest.fixture(scope="module")
def result():
    return report(workload(measured_frames=(1, 4), baselines=("stock",))).to_json()


def test_bars_are_drawn(result, tmp_path):
    pytest.importorskip("matplotlib")
    path = plot(result, tmp_path / "bench.png")
    picture = Image.open(path).convert("RGB")
    assert picture.width > 1000 and len(picture.getcolors(1 << 20)) > 50
    text = plot(result, tmp_path / "bench.svg").read_text()
    assert "<svg" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.png", "bench.svg"]


def test_the_longest_title_fits(result, tmp_path):
    pytest.importorskip("matplotlib")
    work = {"model": "3b", "size": [672, 384], "frames": 48, "latent_frames": 13, "steps": 50}
    work |= {"tokens_per_frame": 4084, "layers": 1}
    place = {"device": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "threads": 16}
    made = {
        **result,
        "workload": {**result["workload"], **work},
        "environment": {**result["environment"], **place},
    }
    picture = Image.open(plot(made, tmp_path / "a.png")).convert("L")
    right = picture.crop((picture.width - 8, 0, picture.width, picture.height))
    assert right.getextrema() == (255, 255)


def test_rows_without_numbers_are_left_out(result, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{**row, "complete": row["policy"] == "full"} for row in result["results"]]
    whole = Image.open(plot(result, tmp_path / "a.png")).height
    assert Image.open(plot({**result, "results": rows}, tmp_path / "b.png")).height < whole


def test_other_names_are_refused(tmp_path):
    with pytest.raises(InvalidSetting, match=r"cannot draw 'a.pdf': known are .png and .svg"):
        check_name(tmp_path / "a.pdf")


def test_nothing_to_draw(result, tmp_path):
    empty = {**result, "results": []}
    with pytest.raises(InvalidSetting, match="with 0 finished rows, expected some of"):
        plot(empty, tmp_path / "a.png")
    with pytest.raises(InvalidSetting, match=r"cannot plot schema 'packcache.plan/1'"):
        plot({**result, "schema": "packcache.plan/1"}, tmp_path / "a.png")


def test_without_matplotlib(result, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InvalidSetting, match=r"pip install 'packcache\[plot\]'"):
        plot(result, tmp_path / "a.png")
