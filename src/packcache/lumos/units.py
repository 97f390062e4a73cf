"""Sizes in words and back, and how much memory there is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from packcache.errors import InvalidSetting

__all__ = ["found_memory", "parse_bytes", "show_bytes"]

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS |= {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")

#: Where the limits of Linux control groups are mounted.
_GROUPS = Path("/sys/fs/cgroup")


def parse_bytes(text: str) -> int:
    """Bytes of "16GiB", "24 GB" or "512MiB". Raises InvalidSetting."""
    match = _SIZE.fullmatch(text)
    if not match or match[2] not in _UNITS:
        raise InvalidSetting(
            f'memory is {text!r}, expected a number with a unit such as "16GiB" or "24GB"'
        )
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise InvalidSetting(f"memory is {text!r}, expected more than nothing: give all you have")
    return size


def show_bytes(size: int) -> str:
    """Bytes for people: "9.31 GiB", "446.7 MiB", "12.0 KiB"."""
    if size >= 1 << 30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 1 << 20 else f"{size / 2**10:.1f} KiB"


def found_memory(
    device: str | torch.device = "cpu", *, proc: Path = Path("/proc"), groups: Path = _GROUPS
) -> int:
    """Bytes that are free on a CUDA device, or that this machine can give to this process.

    `proc` and `groups` are where Linux tells of the machine and of the limits of a container or
    job. Raises InvalidSetting for a CUDA device where there is none.
    """
    place = torch.device(device)
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise InvalidSetting(
                f"device is {place}, but torch sees no CUDA device here: expected one, or a size "
                'of memory such as "16GiB"'
            )
        return torch.cuda.mem_get_info(place)[0]
    return min([_available(proc / "meminfo"), *_limits(proc / "self" / "cgroup", groups)])


def _available(meminfo: Path) -> int:
    """The kernel's own estimate where there is one, else the free pages."""
    if meminfo.exists():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.M)
        if found:
            return int(found[1]) * 1024
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _limits(own: Path, groups: Path) -> Iterator[int]:
    """What is left of each limit on the groups named in `own` and on those around them."""
    for line in own.read_text().splitlines() if own.exists() else []:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = groups / "memory" if kinds else groups  # version 1, or 2
        name = PurePosixPath(path.lstrip("/"))
        for folder in (root / group for group in (name, *name.parents)):
            limit, used = ("limit_in_bytes", "usage_in_bytes") if kinds else ("max", "current")
            yield from _left(folder, f"memory.{limit}", f"memory.{used}")


def _left(folder: Path, limit: str, used: str) -> Iterator[int]:
    """A limit less what is used; file pages that lie idle are given back when they are needed."""
    try:
        most, taken, told = ((folder / name).read_text() for name in (limit, used, "memory.stat"))
    except OSError:  # no such group as seen from in here, or none that can have a limit
        return
    idle = re.findall(r"^(?:total_)?inactive_file (\d+)", told, re.M)
    if most.strip() != "max":
        yield max(0, int(most) - int(taken) + max(map(int, idle), default=0))
