"""Files are there whole, on the disk before they have their name, and locked by one at a time."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import filelock
import pytest

from packcache import files
from packcache.errors import InputFileError, OutputError
from packcache.files import (
    check_folder,
    check_output_folder,
    lock,
    read_result,
    replacing,
    write_json,
)


@pytest.fixture
def steps(monkeypatch):
    """What is synced and renamed, in order."""
    done = []
    sync, rename = os.fsync, Path.replace

    def synced(handle: int) -> None:
        done.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        sync(handle)

    def renamed(draft: Path, path: Path) -> Path:
        done.append(f"-> {path.name}")
        return rename(draft, path)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    return done


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="names of open files are read from the proc system"
)


@needs_proc
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, steps):
    write_json({"a": 1}, tmp_path / "a.json")
    assert steps == ["a.json", "-> a.json", tmp_path.name]
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


@needs_proc
def test_so_is_a_folder_with_all_that_lies_in_it(tmp_path, steps):
    (tmp_path / "clip").mkdir()
    with replacing(tmp_path / "clip") as draft:
        draft.mkdir()
        for name in "ab":
            (draft / name).touch()
    assert sorted(steps[:2]) == ["a", "b"]
    assert steps[2:] == ["clip", "-> clip", tmp_path.name]
    assert sorted(path.name for path in (tmp_path / "clip").iterdir()) == ["a", "b"]


def test_a_folder_with_something_in_it_is_not_replaced(tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "letter.txt").write_text("dear")
    with (
        pytest.raises(OutputError, match=r"cannot write .*clip: .*; nothing was left there"),
        replacing(tmp_path / "clip") as draft,
    ):
        draft.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["clip", "letter.txt"]


def test_a_disk_that_is_full_only_when_synced_leaves_the_older_file(tmp_path, monkeypatch):
    write_json([1], tmp_path / "a.json")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match=r"a\.json: No space left on device; nothing was left"):
        write_json([2], tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == [1]


def test_folders_are_tried(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file is a file, expected a folder: choose another --ou"):
        check_output_folder(tmp_path / "file")
    with pytest.raises(OutputError, match=r"no does not exist: create it or choose another"):
        check_output_folder(tmp_path / "no" / "where")
    assert check_output_folder(tmp_path / "new") == tmp_path / "new"
    assert not (tmp_path / "new").exists()

    def closed(*args, **settings):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", closed)
    with pytest.raises(OutputError, match=r"is not writable \(Permission denied\): choose another"):
        check_folder(tmp_path)


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    first = lock(tmp_path / "lock")
    assert first is not None
    assert lock(tmp_path / "lock") is None
    assert lock(tmp_path / "lock", timeout=0.1) is None
    first.release()
    second = lock(tmp_path / "lock")
    assert second is not None
    second.release()


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), NotImplementedError("no")])
def test_a_disk_without_locks_is_one_line(tmp_path, monkeypatch, error):
    def refuse(*args, **settings):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(OutputError, match=rf"cannot lock in {tmp_path} \(no\): use another folder"):
        lock(tmp_path / "lock")


def test_a_result_is_told_by_its_schema(tmp_path):
    path = tmp_path / "result.json"
    path.write_text('{"schema": "ours/1", "a": 1}')
    assert read_result(path, "ours/1", "make one")["a"] == 1
    for text, why in (
        ('{"schema": "ours/0"}', "has schema 'ours/0', expected 'ours/1': make one"),
        ("[]", "has schema None, expected 'ours/1': make one"),
        ("{", r"is not JSON \(.*\): expected ours/1; make one"),
    ):
        path.write_text(text)
        with pytest.raises(InputFileError, match=rf"result\.json {why}$"):
            read_result(path, "ours/1", "make one")
    with pytest.raises(InputFileError, match=r"none does not exist: expected ours/1; make one$"):
        read_result(tmp_path / "none", "ours/1", "make one")
