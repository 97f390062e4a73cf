"""`packcache check`: what it prints, its exit codes, and subjects that are not ours."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from packcache.cli import app
from packcache.testing.subjects import SUBJECTS


def run(command: str):
    return CliRunner().invoke(app, command.split())


@pytest.mark.parametrize("name", SUBJECTS)
def test_an_adapter_by_name(name):
    out = run(f"check {name}")
    assert out.exit_code == 0, out.output
    assert out.output.startswith(f"{name}: ") and ", 0 fail\n" in out.output


def test_all_of_them_as_json():
    out = run("check --all --json")
    told = json.loads(out.output)
    assert out.exit_code == 0
    assert told["workload"]["subjects"] == list(SUBJECTS)
    assert len(told["results"]) == 11 * len(SUBJECTS)
    assert {row["state"] for row in told["results"]} <= {"holds", "not asked"}


def test_without_a_library_its_extra_is_named_and_the_others_are_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.models.attention_dispatch", None)
    monkeypatch.delitem(sys.modules, "packcache.adapters.diffusers", raising=False)
    alone = run("check wan")
    assert "needs diffusers: pip install 'packcache[diffusers]'" in str(alone.exception)
    every = run("check --all")
    assert every.exit_code == 0
    assert "wan: not asked: packcache.adapters.diffusers needs diffusers" in every.stderr
    assert "emu3: 11 checks hold" in every.stdout and "skyreels: 11" not in every.stdout


def test_a_subject_of_somebody_else_and_one_that_fails(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "from packcache.testing.bare import BareSubject, FrameCacheRun\n"
        "class Wrong(FrameCacheRun):\n"
        "    logical_length = 3\n"
        "def subject():\n"
        "    return BareSubject('theirs', Wrong)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    out = run("check theirs:subject")
    assert out.exit_code == 1
    assert "FAIL lengths" in out.output and "NVIDIA/flashdreams#520" in out.output
    sys.modules.pop("theirs")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("check", "give one adapter or --all: known are cache, self-forcing"),
        ("check cache --all", "give one adapter or --all"),
        ("check comfy", "unknown adapter 'comfy': known are cache, self-forcing"),
        ("check nowhere:it", "'nowhere:it' cannot be imported"),
        ("check packcache.testing.bare:it", "has no attribute 'it'"),
    ],
)
def test_wrong_use_is_one_line(command, message):
    assert message in str(run(command).exception)
