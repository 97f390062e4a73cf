"""`packcache bench`: what it prints and writes, one clear line for wrong use, and Ctrl-C."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from packcache.bench import candidates
from packcache.bench import run as running
from packcache.cli import main
from tests.bench.fakes import CEILINGS, Fake, Log

TINY = (
    "bench", "--size", "32x32", "--steps", 2, "--frames", 13, "--repeats", 2, "--presets",
    "exact,fast", "--baselines", "none", "--device", "cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    monkeypatch.setattr(running, "measure", lambda _: CEILINGS)


@pytest.fixture
def fakes(monkeypatch):
    """Engines that take no time; what `fail` is told may raise."""

    def use(fail=lambda *_: None):
        def maker(_):
            return lambda policy, preset: Fake(
                f"{policy} {preset}", Log(), lambda *_: 1.0, fail=fail
            )

        monkeypatch.setattr(running, "maker", maker)

    return use


def test_predictions_come_first_then_the_table_and_the_files(run, tmp_path):
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    code, printed, err = run(*TINY, "--baselines", "torch-full", "--out", out, "--plot", picture)
    assert (code, err) == (0, "")
    assert printed.startswith("toy (random weights), image-to-video 32x32, 13 frames = 4 latent")
    assert 0 < printed.index("ceilings:") < printed.index("predicted") < printed.index("measured")
    assert "2 repeats: fewer than 7, intervals say little" in printed
    result = json.loads(out.read_text())
    assert result["schema"] == "packcache.bench/1" and result["complete"]
    rows = [f"{row['policy']} {row['preset']}" for row in result["results"]]
    assert rows == [
        *(f"{p} {r}" for p in ("full", "window", "packcache") for r in ("exact", "fast")),
        "torch-full exact",
    ]
    assert all(row["total_s"] > row["last_s"] > 0 for row in result["results"])
    assert result["environment"]["dtype"] == "float32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.json", "bench.png"]


def test_json_alone_is_printed(run, fakes):
    fakes()
    code, printed, err = run(*TINY, "--policies", "full,packcache:budget=1,window=2", "--json")
    result = json.loads(printed)
    assert (code, err) == (0, "")
    labels = list(dict.fromkeys(row["policy"] for row in result["results"]))
    assert labels == ["full", "packcache:budget=1,window=2"]


def test_the_usual_rows_are_policies_by_presets_and_baselines(run, fakes):
    fakes()
    code, printed, _ = run("bench", "--json", "--device", "cpu")
    rows = json.loads(printed)["results"]
    policies, presets = ("full", "window", "packcache"), ("exact", "balanced", "fast")
    wanted = [(p, r) for p in policies for r in presets]
    wanted += [("torch-full", "exact"), ("stock", "exact")]
    assert code == 0 and [(row["policy"], row["preset"]) for row in rows] == wanted


@pytest.mark.parametrize(
    "options, text",
    [
        (("--model", "7b"), "unknown model '7b': known are toy, 1b, 3b, digits"),
        (("--task", "v2v"), "unknown task 'v2v': known are t2v, i2v"),
        (("--device", "tpu"), "device is 'tpu', expected cpu, cuda or cuda:N"),
        (("--dtype", "int8"), "dtype is int8, expected one of float32, bfloat16, float16"),
        (("--policies", "best"), "unknown policy 'best'"),
        (("--policies", "packcache:budget=2tok"), "budget 2tok is 2 tokens for a window of 4"),
        (("--steps", 0), "steps is 0, expected at least 1"),
        (("--layers", 4), "layers is 4, expected 1 to 3, the depth of toy"),
        (("--check", "2"), "check is '2' without layers"),
        (("--presets", "exact,reckless"), "unknown preset 'reckless': known are exact"),
        (("--baselines", "slow"), "unknown baseline 'slow': known are torch-full, stock"),
        (("--repeats", 0), "repeats is 0, expected at least 1"),
        (("--sample-steps", 9), "sample-steps is 9, expected 1 to 2, the steps there are"),
        (("--sample-frames", 1), "sample-frames is 1, expected at least 2"),
        (("--baselines", "stock", "--guidance", 1), "baseline 'stock' with guidance 1"),
        (("--frames", 1), "frames is 1, which i2v has none to generate of"),
        (("--size", "100x64"), "width is 100 pixels, expected a positive multiple of 32"),
        (("--size", "64"), "--size is '64', expected WIDTHxHEIGHT such as 672x384"),
        (("--append",), "--append without --out"),
        (("--plot", "a.pdf"), "cannot draw 'a.pdf': known are .png and .svg"),
    ],
    ids=str,
)
def test_wrong_use_is_one_clear_line(run, options, text):
    code, printed, err = run(*TINY, *options)
    assert (code, printed, len(err.splitlines())) == (2, "", 1) and text in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_missing_is_one_clear_line(run):
    code, printed, err = run(*TINY, "--device", "cuda")
    assert (code, printed) == (2, "") and len(err.splitlines()) == 1
    assert "device is cuda, but torch sees 0 CUDA devices here" in err


def test_a_folder_that_is_not_there_is_found_before_the_work(run, tmp_path):
    code, printed, err = run(*TINY, "--out", tmp_path / "no" / "bench.json")
    assert (code, printed, len(err.splitlines())) == (1, "", 1) and "does not exist" in err


def test_a_row_that_runs_out_of_memory_is_told(run, fakes):
    def fail(name, event, frame):
        if (name, event, frame) == ("full exact", "rehearse", 3):
            raise RuntimeError("can't allocate memory: you tried 9 GiB")

    fakes(fail)
    code, printed, err = run(*TINY)
    assert (code, err) == (0, "")
    assert "full exact: no numbers: can't allocate memory: you tried 9 GiB" in printed


def test_ctrl_c_keeps_the_rows_that_are_finished(run, fakes, tmp_path):
    """In the second repeat of the last frame rows go backwards: all but two are finished."""
    calls = []

    def fail(name, event, frame):
        if (name, event, frame) == ("full fast", "rehearse", 3):
            calls.append(name)
            if len(calls) == 3:  # the first was for the memory
                raise KeyboardInterrupt

    fakes(fail)
    out = tmp_path / "bench.json"
    code, printed, err = run(*TINY, "--out", out, "--plot", tmp_path / "bench.svg")
    assert code == 130 and "interrupted; nothing half-written was left" in err
    result = json.loads(out.read_text())
    assert result["complete"] is False
    done = [row["complete"] for row in result["results"]]
    assert done == [False, False, True, True, True, True]
    assert result["reference"] == "window exact"
    assert "not complete: it was interrupted" in printed
    assert sum(line.startswith("packcache fast") for line in printed.splitlines()) >= 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.json", "bench.svg"]


def test_a_failure_keeps_what_was_measured(fakes, tmp_path, monkeypatch):
    def fail(name, event, frame):
        if (name, event, frame) == ("full exact", "advance", 3):
            raise RuntimeError("a bug")

    fakes(fail)
    out = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["packcache", *map(str, TINY), "--out", str(out)])
    with pytest.raises(RuntimeError, match="a bug"):
        main()
    result = json.loads(out.read_text())
    assert result["complete"] is False
    assert [row["complete"] for row in result["results"]] == [False, *[True] * 5]


@pytest.mark.parametrize("append", [(), ("--append",)], ids=["anew", "append"])
def test_an_earlier_result_stands_until_a_row_is_finished(run, fakes, tmp_path, append):
    fakes()
    out = tmp_path / "bench.json"
    assert run(*TINY, "--out", out)[0] == 0
    before = out.read_text()

    def fail(name, event, frame):
        if (name, event, frame) == ("window exact", "rehearse", 3):
            raise KeyboardInterrupt

    fakes(fail)
    code, _, err = run(*TINY, "--out", out, *append)
    assert code == 130 and "interrupted" in err and out.read_text() == before


def test_composed_rows_are_not_added_to(run, fakes, tmp_path):
    out = tmp_path / "bench.json"
    some = (*TINY, "--layers", 1, "--policies", "full", "--presets", "exact", "--out", out)
    assert run(*some)[0] == 0
    before = out.read_text()
    code, printed, err = run(*some, "--append")
    assert (code, printed, len(err.splitlines())) == (1, "", 1)
    assert "the rows there are composed" in err and out.read_text() == before


def test_rows_are_added_to_a_result(run, fakes, tmp_path):
    fakes()
    out = tmp_path / "bench.json"
    assert run(*TINY, "--policies", "full", "--out", out)[0] == 0
    code, printed, err = run(*TINY, "--policies", "packcache", "--out", out, "--append")
    assert (code, err) == (0, "")
    result = json.loads(out.read_text())
    assert [row["policy"] for row in result["results"]] == ["full"] * 2 + ["packcache"] * 2
    assert result["reference"] == "full exact" and "not side by side" in printed
    code, _, err = run(*TINY, "--steps", 3, "--out", out, "--append")
    assert code == 1 and "was measured with steps 2, this run has 3" in err
    out.write_text("{}")
    code, _, err = run(*TINY, "--out", out, "--append")
    assert code == 1 and "has schema None, expected 'packcache.bench/1'" in err


def test_composed_rows_and_their_check(run, monkeypatch):
    monkeypatch.setattr(candidates, "make_model", None)  # never at full depth
    code, printed, err = run(*TINY, "--layers", 1, "--check", "1", "--policies", "full")
    assert (code, err) == (0, "")
    assert "composed: put together from measured pieces of one layer" in printed
    assert (
        "composed and really run with one layer, steps 0 of latent frame 1, medians of" in printed
    )
    assert "toy (random weights, composed), image-to-video 32x32" in printed


def test_the_page_is_made_from_results(run, fakes, tmp_path):
    fakes()
    (tmp_path / "results").mkdir()
    assert run(*TINY, "--out", tmp_path / "results" / "bench_toy.json")[0] == 0
    page = tmp_path / "page.md"
    code, printed, err = run("bench", "--page", page, "--results", tmp_path / "results")
    assert (code, printed, err) == (0, f"wrote {page}\n", "")
    assert "## toy, i2v 32x32, 13 frames: cpu" in page.read_text()
    code, _, err = run("bench", "--page", page, "--results", tmp_path)
    assert code == 1 and "no bench_*.json in" in err and len(err.splitlines()) == 1
