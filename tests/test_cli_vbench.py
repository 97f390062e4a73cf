"""`packcache vbench`: the four commands after each other, and one clear line for wrong use."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from packcache import models
from packcache.cli_vbench import app
from packcache.errors import InvalidSetting, PackCacheError
from packcache.evaluate.vbench.names import Layout, clip_name
from packcache.evaluate.vbench.suite import read_sample
from tests.evaluate.vbench_files import FakePipeline, write_results, write_suite

PROMPTS = ("a red 3 moving right", "a blue 7", "a yellow 5 moving up")


@pytest.fixture
def call():
    """Exit code and output; an error of ours is raised."""

    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if isinstance(result.exception, PackCacheError):
            raise result.exception
        assert result.exception is None or isinstance(result.exception, SystemExit), result
        return result.exit_code, result.output

    return run


@pytest.fixture
def pipeline(monkeypatch):
    """The embedded model, without its network."""
    fake = FakePipeline()
    monkeypatch.setattr(models, "load", lambda *_, **__: fake)
    return fake


@pytest.fixture
def sample(tmp_path, call):
    info, images = write_suite(tmp_path / "suite", PROMPTS)
    path = tmp_path / "sample.json"
    code, printed = call("sample", info, images, "--count", 2, "--out", path)
    assert (code, printed) == (0, f"{path}: 2 images of 3, 2 clips\n")
    return path


def test_from_the_suite_to_the_scores(tmp_path, call, pipeline, sample):
    out, policies = tmp_path / "out", "full,packcache:budget=2,window=4"
    layout = Layout(out=out)
    code, printed = call("export", sample, "--policies", policies, "--frames", 5, "--out", out)
    assert code == 0 and printed.splitlines() == [
        f"{layout.clips(label)}: 2 clips" for label in ("full", "packcache:budget=2,window=4")
    ]
    told = json.loads(layout.manifest("packcache:budget=2,window=4").read_text())["workload"]
    assert told["policy"] == "PackCache(budget=2, window=4)" and told["budget"] == 2
    assert (told["model"], told["frames"], told["seed"]) == ("fake", 5, 0)
    assert told["steps"] == models.usual("digits").sampling.steps
    assert [call["seed"] for call in pipeline.calls] == [0] * 4

    code, printed = call("check", out)
    labels = "full, packcache:budget=2,window=4"
    assert (code, printed) == (0, f"4 clips of {labels}: all is well\n")

    files = [clip_name(entry.prompt, 0) for entry in read_sample(sample).entries]
    for label, value in (("full", 0.5), ("packcache:budget=2,window=4", 0.75)):
        write_results(layout, label, {"aesthetic_quality": dict.fromkeys(files, value)})
    code, printed = call("collect", out, "--out", tmp_path / "scores.json")
    assert code == 0 and "aesthetic_quality, 2 clips of each" in printed
    assert "0.7500  +0.2500 (+0.2500 to +0.2500); higher on 2, lower on 0 of 2 images" in printed
    assert "official Total (not computed without subject_consistency" in printed
    assert "overall" not in printed.lower()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores == json.loads(call("collect", out, "--json")[1])


def test_an_export_asked_again_makes_nothing_new(tmp_path, call, pipeline, sample):
    arguments = ("export", sample, "--policies", "full", "--frames", 5, "--out", tmp_path / "out")
    call(*arguments)
    before = len(pipeline.calls)
    assert call(*arguments)[0] == 0 and len(pipeline.calls) == before == 2


def test_the_usual_policies(tmp_path, call, pipeline, sample):
    call("export", sample, "--frames", 5, "--out", tmp_path / "out")
    found = sorted(path.name for path in (tmp_path / "out" / "clips").iterdir())
    assert found == ["full", "packcache", "window"]


def test_clips_are_taken_without_a_model(tmp_path, call, pipeline, sample):
    call("export", sample, "--policies", "full", "--frames", 5, "--out", tmp_path / "first")
    source = Layout(out=tmp_path / "first").clips("full")
    out = tmp_path / "out"
    code, printed = call("export", sample, "--take", f"a=b={source}", "--out", out)
    assert (code, printed) == (0, f"{Layout(out=out).clips('a=b')}: 2 clips\n")
    assert len(pipeline.calls) == 2


def test_custom_mode(tmp_path, call, pipeline, sample):
    out = tmp_path / "out"
    call("export", sample, "--policies", "full", "--frames", 5, "--mode", "custom", "--out", out)
    assert {path.suffix for path in (out / "images").iterdir()} == {".png"}


def test_a_problem_is_exit_one_and_its_line(tmp_path, call, pipeline, sample):
    out = tmp_path / "out"
    call("export", sample, "--policies", "full", "--frames", 5, "--out", out)
    (Layout(out=out).clips("full") / "notes.txt").write_text("")
    code, printed = call("check", out)
    assert code == 1 and printed.startswith("stray files: 1, such as full/notes.txt; ")
    assert len(printed.splitlines()) == 1
    code, printed = call("check", out, "--json")
    assert code == 1 and json.loads(printed)["problems"] == {"stray files": ["full/notes.txt"]}


def test_the_sample_is_printed_as_json(tmp_path, call):
    info, images = write_suite(tmp_path / "suite", PROMPTS)
    path = tmp_path / "sample.json"
    code, printed = call("sample", info, images, "--count", 3, "--out", path, "--json")
    assert code == 0 and json.loads(printed) == json.loads(path.read_text())


@pytest.mark.parametrize(
    "options, text",
    [
        (("--policies", "best"), "unknown policy 'best'"),
        (("--take", "full"), "--take is 'full', expected LABEL=FOLDER"),
        (("--mode", "own"), "mode is 'own', expected standard or custom"),
        (("--frames", 0), "frames is 0, expected"),
        (("--size", "wide"), "--size is 'wide', expected WIDTHxHEIGHT"),
        (("--positions", "odd"), "positions is 'odd', expected"),
        (("--model", "none"), "unknown model 'none'"),
    ],
    ids=str,
)
def test_wrong_use_is_found_before_any_clip(tmp_path, call, pipeline, sample, options, text):
    with pytest.raises(InvalidSetting) as error:
        call("export", sample, "--out", tmp_path / "out", *options)
    assert text in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out" / "clips").exists() and pipeline.calls == []


def test_the_embedded_model_makes_clips_of_a_suite_of_its_own(tmp_path, call, sample):
    """Once for real: two policies that share their draws, five frames, two steps."""
    out = tmp_path / "out"
    code, _ = call(
        "export", sample, "--policies", "full,packcache", "--frames", 5, "--steps", 2, "--out", out
    )
    assert code == 0 and call("check", out)[0] == 0
    told = json.loads(Layout(out=out).manifest("full").read_text())
    assert told["workload"]["model"] == "digits" and told["environments"][0]["device"] == "cpu"
    first, second = (
        [clip["sha256"] for clip in json.loads(Layout(out=out).manifest(p).read_text())["clips"]]
        for p in ("full", "packcache")
    )
    assert first == second  # nothing is evicted in two latent frames
