"""Sizes in words and back, and the memory that machine, container and card leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from packcache.errors import InvalidSetting
from packcache.lumos.units import found_memory, parse_bytes, show_bytes

GIB = 1 << 30


@pytest.mark.parametrize(
    "text, size",
    [("16GiB", 16 * GIB), ("24 GB", 24 * 10**9), ("1.5MiB", 3 << 19), (" 512 KiB ", 512 << 10)],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["16", "16gib", "-1GiB", "GiB", "4084tok", ""])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InvalidSetting) as told:
        parse_bytes(text)
    assert str(told.value) == (
        f'memory is {text!r}, expected a number with a unit such as "16GiB" or "24GB"'
    )


def test_no_memory_at_all_is_refused():
    with pytest.raises(InvalidSetting, match="memory is '0GiB', expected more than nothing"):
        parse_bytes("0GiB")


@pytest.mark.parametrize(
    "size, text",
    [(0, "0.0 KiB"), (12 << 10, "12.0 KiB"), (447 << 20, "447.0 MiB"), (10**10, "9.31 GiB")],
)
def test_sizes_are_shown(size, text):
    assert show_bytes(size) == text


def machine(folder: Path, files: dict[str, str]) -> dict[str, Path]:
    """Where Linux tells of memory: 8 GiB are available, and what the files say."""
    told = {
        "proc/meminfo": f"MemTotal:       24000000 kB\nMemAvailable:   {8 << 20} kB\n",
        **files,
    }
    for name, text in told.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return {"proc": folder / "proc", "groups": folder / "groups"}


def group(limit: str, used: int, idle: int = 0) -> dict[str, str]:
    """The files of a control group, version 2."""
    stat = f"anon 1\ninactive_file {idle}\nactive_file 77\n"
    return {"memory.max": limit, "memory.current": f"{used}\n", "memory.stat": stat}


def old_group(limit: int, used: int, idle: int = 0) -> dict[str, str]:
    """The files of a control group, version 1."""
    stat = f"inactive_file {idle // 2}\ntotal_inactive_file {idle}\n"
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{used}\n",
        "memory.stat": stat,
    }


def under(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


NO_LIMIT_V1 = (1 << 63) - 4096
JOB = {"proc/self/cgroup": "0::/jobs/7\n"}
OLD_JOB = {"proc/self/cgroup": "9:name=x:/others\n5:cpu,memory:/jobs/7\n0::/\n"}


@pytest.mark.parametrize(
    "files, size",
    [
        ({}, 8 * GIB),
        (JOB, 8 * GIB),
        (JOB | under("groups", group("max\n", GIB)), 8 * GIB),
        (JOB | under("groups", group(f"{4 * GIB}\n", GIB)), 3 * GIB),
        (JOB | under("groups/jobs/7", group(f"{4 * GIB}\n", GIB)), 3 * GIB),
        (JOB | under("groups/jobs", group(f"{4 * GIB}\n", 3 * GIB, 2 * GIB)), 3 * GIB),
        (JOB | under("groups/jobs/7", group(f"{64 * GIB}\n", GIB)), 8 * GIB),
        (JOB | under("groups/jobs/8", group(f"{GIB}\n", 0)), 8 * GIB),
        (JOB | under("groups/jobs/7", group(f"{GIB}\n", 2 * GIB)), 0),
        (
            JOB
            | under("groups/jobs/7", group(f"{6 * GIB}\n", GIB))
            | under("groups/jobs", group(f"{4 * GIB}\n", 2 * GIB)),
            2 * GIB,
        ),
        (OLD_JOB | under("groups/memory", old_group(NO_LIMIT_V1, GIB)), 8 * GIB),
        (OLD_JOB | under("groups/memory", old_group(4 * GIB, GIB)), 3 * GIB),
        (OLD_JOB | under("groups/memory/jobs/7", old_group(4 * GIB, 3 * GIB, GIB)), 2 * GIB),
        (OLD_JOB | under("groups/cpu/jobs/7", old_group(GIB, 0)), 8 * GIB),
        (OLD_JOB | under("groups/memory/others", old_group(GIB, 0)), 8 * GIB),
    ],
    ids=range(15),
)
def test_memory_is_what_machine_and_container_leave(files, size, tmp_path):
    assert found_memory(**machine(tmp_path, files)) == size


def test_the_memory_of_this_machine_is_found(tmp_path):
    assert 1 << 20 < found_memory() < 1 << 50
    assert found_memory(proc=tmp_path, groups=tmp_path) > 1 << 20  # no Linux


def test_memory_of_a_card_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidSetting) as told:
        found_memory("cuda")
    assert str(told.value) == (
        "device is cuda, but torch sees no CUDA device here: expected one, or a size of memory "
        'such as "16GiB"'
    )


def test_memory_of_a_card_is_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (3 * GIB, 16 * GIB))
    assert found_memory("cuda:0") == 3 * GIB
