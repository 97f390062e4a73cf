"""The ledger of an evaluation: nothing is asked twice, nothing is mixed, a cut line is dropped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from packcache.errors import InputFileError, OutputError
from packcache.evaluate.ledger import Ledger

IDENTITY = {"seed": 0, "limits": {"digit": 2.0}, "sampling": {"steps": 12}}


def test_what_was_told_is_known_again(tmp_path):
    path = tmp_path / "new" / "clips.jsonl"
    ledger = Ledger(path, IDENTITY)
    ledger.add(("full", "digit", 3), {"digit": [1.0, 0.1 + 0.2]})
    ledger.add(("full", "digit", 3), {"kl": [0.0, 1e-9]})
    again = Ledger(path, IDENTITY)
    assert again.found == {("full", "digit", 3): {"digit": [1.0, 0.1 + 0.2], "kl": [0.0, 1e-9]}}
    assert again.has(("full", "digit", 3), {"digit", "kl"})
    assert not again.has(("full", "digit", 3), {"recall"})
    assert not again.has(("full", "digit", 4), {"digit"})


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger = Ledger(None, IDENTITY)
    ledger.add(("full",), {"digit": 1})
    assert ledger.found == {("full",): {"digit": 1}} and not list(tmp_path.iterdir())


def test_on_what_an_answer_was_found_is_told_and_taken_along(tmp_path):
    piece = Ledger(tmp_path / "clips.0.jsonl", IDENTITY, "one")
    piece.add((0,), {"digit": 0})
    known = Ledger(tmp_path / "clips.jsonl", IDENTITY, "another")
    known.take(piece)
    known.add((1,), {"digit": 1})
    Ledger(None, IDENTITY).add((2,), {"digit": 2})
    again = Ledger(tmp_path / "clips.jsonl", IDENTITY)
    assert again.machines == known.machines == {(0,): "one", (1,): "another"}


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_kill_in_a_line_costs_that_line_only(tmp_path, cut):
    path = tmp_path / "clips.jsonl"
    ledger = Ledger(path, IDENTITY)
    for number in range(3):
        ledger.add((number,), {"digit": number})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = Ledger(path, IDENTITY)
    assert list(again.found) == [(0,), (1,)]
    again.add((2,), {"digit": 2})
    told = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.pop("seconds") >= 0 for line in told[1:]] == [True] * 3
    assert told[1:] == [{"key": [number], "values": {"digit": number}} for number in range(3)]


def test_what_an_answer_took_is_told_and_taken_along(tmp_path, monkeypatch):
    clock = iter([10.0, 12.5, 13.0, 20.0, 21.0, 30.0])
    monkeypatch.setattr("packcache.evaluate.ledger.time.process_time", lambda: next(clock))
    piece = Ledger(tmp_path / "clips.0.jsonl", IDENTITY)
    piece.add((0,), {"digit": 0})
    piece.add((0,), {"kl": 1})
    piece.add((1,), {"digit": 1})
    assert piece.seconds == {(0,): 3.0, (1,): 7.0}
    known = Ledger(
        tmp_path / "clips.jsonl", IDENTITY
    )  # from 21 on: what is taken took nothing here
    known.take(piece)
    known.add((2,), {"digit": 2})
    monkeypatch.undo()
    path = tmp_path / "clips.jsonl"
    assert Ledger(path, IDENTITY).seconds == {(0,): 3.0, (1,): 7.0, (2,): 9.0}
    old = '{"key": [3], "values": {"digit": 3}}\n'  # of a version that did not say
    path.write_text(path.read_text() + old)
    again = Ledger(path, IDENTITY)
    assert (3,) in again.found and (3,) not in again.seconds


def test_what_all_answers_took_is_computed_from_those_of_their_kind(tmp_path):
    """Of the same row and part, else of the part; nothing is guessed of a part that is silent."""
    lines = [
        {"key": ["full", "replay", 0], "values": {}, "seconds": 3600.0, "on": "one"},
        {"key": ["full", "replay", 1], "values": {}, "seconds": 7200.0, "on": "two"},
        {"key": ["window", "replay", 0], "values": {}, "seconds": 36.0, "on": "one"},
        {"key": ["full", "replay", 2], "values": {}},  # 1.5 hours, as full's others
        {"key": ["sink", "replay", 0], "values": {}},  # 1.003.. hours, as the part's others
    ]
    path = tmp_path / "clips.jsonl"
    Ledger(path, IDENTITY)
    path.write_text(path.read_text() + "".join(json.dumps(line) + "\n" for line in lines))
    assert Ledger(path, IDENTITY).spent() == {
        "core_hours": 3.01, "core_hours_of_all": 5.513, "answers": 3, "of": 5,
        "machines": {"one": 2, "two": 1},
    }  # fmt: skip
    silent = {"key": ["full", "clip", 0], "values": {}}
    path.write_text(path.read_text() + json.dumps(silent) + "\n")
    assert Ledger(path, IDENTITY).spent()["core_hours_of_all"] is None


def test_a_kill_in_the_first_line_costs_nothing(tmp_path):
    path = tmp_path / "clips.jsonl"
    path.write_text('{"schema": "packca')
    Ledger(path, IDENTITY).add((1,), {"digit": 1})
    assert Ledger(path, IDENTITY).found == {(1,): {"digit": 1}}


def test_answers_to_another_question_are_refused_and_left(tmp_path):
    path = tmp_path / "clips.jsonl"
    Ledger(path, IDENTITY)
    before = path.read_bytes()
    with pytest.raises(InputFileError, match=r"begun with seed 0, now it is 1: give the same, or"):
        Ledger(path, IDENTITY | {"seed": 1})
    with pytest.raises(InputFileError, match=r"begun with torch None, now it is '2'"):
        Ledger(path, IDENTITY | {"torch": "2"})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "told",
    [
        "[]\n",
        '{"schema": "other", "identity": {}}\n',
        "no JSON\n",
        json.dumps({"schema": "packcache.ledger/1", "identity": IDENTITY}) + '\n{"key": 3}\n',
        "\xff\n",
    ],
)
def test_a_file_of_something_else_is_refused_and_left(tmp_path, told):
    path = tmp_path / "clips.jsonl"
    path.write_text(told, encoding="latin-1")
    with pytest.raises(InputFileError, match="is damaged or of something else, expected packcache"):
        Ledger(path, IDENTITY)
    assert path.read_text(encoding="latin-1") == told


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*clips\.jsonl \("):
        Ledger(Path(tmp_path / "file" / "clips.jsonl"), IDENTITY)
