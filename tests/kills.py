"""Kill clips with SIGKILL and resume them: `python -m tests.kills --kills 20 --seed 0`.

Every clip is made by forked children, one after the other. `--kills` ends them at random moments
of the clip's time, most of them aimed at a checkpoint being written, `--boundaries` once after
every single piece and before every sync, rename and removal of one checkpoint. Prints JSON:

    kills      children ended by SIGKILL
    inside     of these between the first byte and the rename of a checkpoint, by what lay on disk
    temporary  of those with a file under its temporary name
    earliest   fewest latent frames that were durable at a kill
    lost       frames that were durable before a kill and not after
    warnings   what resumed runs said of damage
    clips      clips finished, `equal` of them the same as the uninterrupted one
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from packcache.files import PARTIAL
from packcache.lumos import saved, sealed
from packcache.lumos.journal import CODES, KV, RESULTS, SLOTS, Journal
from packcache.lumos.model import Lumos
from packcache.policies import PackCache
from packcache.testing import golden
from tests.tools import GOLDEN, Recorder, recorder

#: Latent frames of a clip that is killed at random, and of one that is killed at a boundary.
LATENTS, SHORT = 10, 7

#: Frames before the checkpoint that ends at a boundary: it evicts one and removes another's file.
READY = 5

#: No kill before so many latent frames are durable.
FIRST = 2

#: Seconds that a disk takes for an fsync, at least: long enough to be hit.
SYNC = 0.003

#: A child that was to end itself at a boundary that does not exist.
NO_SUCH_BOUNDARY = 7

#: What lies in a folder that no manifest knows: name, size, time.
Traces = set[tuple[str, int, int]]


class Child:
    """A forked process that makes, or goes on with, the clip in a folder."""

    def __init__(self, run: Callable[[], None], warnings: Path) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            try:
                logging.getLogger("packcache").addHandler(logging.FileHandler(warnings, delay=True))
                run()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)

    def ended(self, *, wait: bool = False) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
        if not pid:
            return None
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, NO_SUCH_BOUNDARY, -signal.SIGKILL):
            sys.exit(f"a child ended with {code}")
        return code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.ended(wait=True)


def decoder(model: Lumos, latents: int) -> Recorder:
    run = recorder(model, PackCache())
    run.latents = latents
    return run


def frames(model: Lumos, folder: Path, latents: int, *, resume: bool) -> Iterator[Any]:
    """The clip with its checkpoint."""
    run = decoder(model, latents)
    return Journal(folder, run, {}, resume=resume).record(run.frames())


def make(model: Lumos, folder: Path, latents: int, *, resume: bool) -> None:
    """All of the clip, on a disk that takes its time."""
    sync = os.fsync

    def slow(handle: int) -> None:
        time.sleep(SYNC)
        sync(handle)

    os.fsync = slow
    for _ in frames(model, folder, latents, resume=resume):
        pass


# --- what lies on the disk ----------------------------------------------------------------------


def newest(folder: Path) -> dict[str, Any]:
    """The newest state that a manifest tells, read without the journal's own code."""
    states: list[dict[str, Any]] = [{"frame": -1, "files": {}}]
    for slot in SLOTS:
        try:
            states.append(json.loads((folder / slot).read_bytes())["state"])
        except (OSError, ValueError):
            continue
    return max(states, key=lambda state: state["frame"])


def traces(folder: Path) -> Traces:
    """What a checkpoint being written leaves behind when it is not ended."""
    state = newest(folder)
    longer = {CODES: state["codes"]["bytes"], RESULTS: state["results"]["bytes"]}
    found = [p for p in (folder / KV).glob("0*.bin") if int(p.stem) >= state["frame"]]
    found += [folder / n for n, size in longer.items() if (folder / n).stat().st_size > size]
    return drafts(folder) | {(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in found}


def drafts(folder: Path) -> Traces:
    """The files there under their temporary names."""
    found: Traces = set()
    for place in (folder, folder / KV):
        for entry in os.scandir(place):
            if entry.name.endswith(PARTIAL):
                with contextlib.suppress(FileNotFoundError):  # renamed as we looked
                    told = entry.stat()
                    found.add((entry.name, told.st_size, told.st_mtime_ns))
    return found


# --- the tally ----------------------------------------------------------------------------------


class Tally:
    """Makes clips in a folder of its own and counts what became of them."""

    def __init__(self, model: Lumos, folder: Path, latents: int) -> None:
        self.model, self.folder, self.latents = model, folder, latents
        self.warnings = folder / "warnings"
        self.counts = {"kills": 0, "inside": 0, "temporary": 0, "lost": 0, "clips": 0, "equal": 0}
        self.earliest = latents
        codes = torch.cat([result.codes for result in decoder(model, latents).frames()])
        self.expected = saved.raw(codes.to(torch.int32)).tobytes()

    def start(self, folder: Path, *, resume: bool) -> Child:
        """A child that makes the rest of the clip."""
        return Child(lambda: make(self.model, folder, self.latents, resume=resume), self.warnings)

    def killed(self, folder: Path, before: Traces, frame: int) -> None:
        """A child has died here, after `frame` frames were seen to be durable."""
        after, traced = newest(folder)["frame"], traces(folder) - before
        self.earliest = min(self.earliest, after)
        self.counts["kills"] += 1
        self.counts["inside"] += bool(traced)
        self.counts["temporary"] += any(name.endswith(PARTIAL) for name, *_ in traced)
        self.counts["lost"] += max(0, frame - after)

    def finished(self, folder: Path) -> None:
        self.counts["clips"] += 1
        self.counts["equal"] += (folder / CODES).read_bytes() == self.expected

    def report(self) -> dict[str, Any]:
        told = self.warnings.read_text().splitlines() if self.warnings.exists() else []
        return {**self.counts, "earliest": self.earliest, "warnings": told}


def random_kills(tally: Tally, kills: int, rng: random.Random) -> None:
    """Clips, each killed at random moments until it is finished, until there were enough."""
    seconds = _seconds_of_a_frame(tally)
    while tally.counts["kills"] < kills:
        folder = tally.folder / f"clip{tally.counts['clips']}"
        for life in range(rng.randint(1, min(4, kills - tally.counts["kills"]))):
            if _one_life(tally, folder, seconds, rng, resume=life > 0):
                break
        tally.start(folder, resume=True).ended(wait=True)
        tally.finished(folder)


def _seconds_of_a_frame(tally: Tally) -> float:
    folder = tally.folder / "timed"
    child = tally.start(folder, resume=False)
    _wait_for(child, folder, FIRST)
    start = time.perf_counter()
    child.ended(wait=True)
    return (time.perf_counter() - start) / (LATENTS - FIRST)


def _wait_for(child: Child, folder: Path, frame: int) -> None:
    while newest(folder)["frame"] < frame and _alive(child):
        time.sleep(0.0002)


def _one_life(
    tally: Tally, folder: Path, seconds: float, rng: random.Random, *, resume: bool
) -> bool:
    """Start a child and kill it at a random moment; True if it finished its clip first.

    A moment is so many frames and a part of the `seconds` that one takes.
    """
    before: Traces = traces(folder) if resume else set()
    durable = newest(folder)["frame"] if resume else FIRST
    child = tally.start(folder, resume=resume)
    _wait_for(child, folder, rng.randrange(min(durable, LATENTS - 1), LATENTS))
    time.sleep(rng.uniform(0, seconds))
    if rng.random() < 0.7:
        while not drafts(folder) - before and _alive(child):
            pass
        time.sleep(rng.uniform(0, 0.001))
    frame = newest(folder)["frame"]
    if child.ended() is not None:
        return True
    child.kill()
    tally.killed(folder, before, frame)
    return False


def _alive(child: Child) -> bool:
    """Does it run? Asks without taking its exit status."""
    info = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return info is None


def every_boundary(tally: Tally) -> None:
    """One checkpoint, ended before each thing it does to the disk; `READY` frames were durable."""
    for number in range(1, 1000):
        folder = tally.folder / f"boundary{number}"
        child = Child(lambda folder=folder, n=number: _end_at(tally, folder, n), tally.warnings)
        if child.ended(wait=True) == NO_SUCH_BOUNDARY:
            return
        tally.killed(folder, set(), READY)
        tally.start(folder, resume=True).ended(wait=True)
        tally.finished(folder)


def _end_at(tally: Tally, folder: Path, number: int) -> None:
    """`READY` frames, then a checkpoint that ends before its `number`-th boundary."""
    coming = frames(tally.model, folder, tally.latents, resume=False)
    for _ in range(READY):
        next(coming)
    left = [number]

    def bomb(act: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(*args: Any, **settings: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*args, **settings)

        return maybe

    for place, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (zlib, "crc32")):
        setattr(place, name, bomb(getattr(place, name)))
    next(coming)
    os._exit(NO_SUCH_BOUNDARY)


def in_place(path: Path, pieces: Iterator[bytes]) -> sealed.Seal:
    """Mutation: a file that has its name before it is written."""
    path.write_bytes(b"")
    data = b"".join(map(bytes, pieces))
    zlib.crc32(data)  # a boundary
    return sealed.extend(path, sealed.EMPTY, data)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--kills", type=int)
    what.add_argument("--boundaries", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutation", choices=["in-place"])
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a process with threads must not fork
    if chosen.mutation:
        sealed.replace = in_place
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = golden.tiny_model(GOLDEN)
        tally = Tally(model, Path(folder), SHORT if chosen.boundaries else LATENTS)
        if chosen.boundaries:
            every_boundary(tally)
        else:
            random_kills(tally, chosen.kills, random.Random(chosen.seed))
        return {**tally.report(), "seconds": round(time.perf_counter() - start, 1)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(), indent=2) + "\n")
