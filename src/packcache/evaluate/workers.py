"""An evaluation by several processes that share its batches.

    with locked(folder):
        evaluation = Evaluation(pipeline, asked, folder)
        run_in(folder, evaluation, Job(protocol=asked, parts=PARTS), workers=2)

Every process makes its share of the batches and writes a ledger of its own, `clips.1.jsonl`; what
they found is taken into `clips.jsonl` at the end, whatever the end is. A run that was killed leaves
such files behind: the next one takes them in before it asks for anything.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from packcache import files
from packcache.errors import GenerationError, InvalidSetting, OutputError, PackCacheError
from packcache.evaluate.clips import Share
from packcache.evaluate.evaluation import LEDGER, Evaluation
from packcache.evaluate.ledger import Ledger
from packcache.evaluate.protocol import Part, Protocol
from packcache.models import load

__all__ = ["LOCK", "Job", "gather", "locked", "run_in"]

#: Held in a folder while an evaluation runs in it.
LOCK = ".lock"

#: Seconds between two looks at how far the processes are.
LOOK = 0.5


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process is told: everything else it loads itself."""

    protocol: Protocol
    parts: Sequence[Part]
    device: str | None = None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for one run alone, from before its ledger is read. Raises OutputError where
    another one is at work."""
    folder.mkdir(exist_ok=True)
    held = files.lock(folder / LOCK)
    if held is None:
        raise OutputError(f"{folder} is in use by another evaluation: wait for it")
    try:
        yield
    finally:
        held.release()


def run_in(
    folder: Path,
    evaluation: Evaluation,
    job: Job,
    *,
    workers: int = 1,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Ask what the folder's evaluation misses, `workers` processes at once; it then knows it.

    `on_step` is called with answers found and all that were missing. Raises GenerationError if a
    process failed; what the others found is kept.
    """
    if workers < 1:
        raise InvalidSetting(f"workers is {workers}, expected at least 1")
    gather(evaluation.known, folder)
    if workers == 1:
        evaluation.run()
    else:
        _run_shared(folder, evaluation, job, workers, on_step)


def _run_shared(
    folder: Path,
    evaluation: Evaluation,
    job: Job,
    workers: int,
    on_step: Callable[[int, int], None] | None,
) -> None:
    total = evaluation.left
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")
    shares = [Share(number=number, of=workers) for number in range(workers)]
    processes = [
        context.Process(target=_work, args=(job, folder, share, threads), daemon=True)
        for share in shares
    ]
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            for process in processes:
                process.join(LOOK / workers)
            if on_step:
                on_step(min(sum(map(_lines, _pieces(folder))), total), total)
    finally:
        for process in processes:
            process.terminate()
            process.join()
        gather(evaluation.known, folder)
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        raise GenerationError(
            f"{len(failed)} of {workers} processes failed (exit code {failed[0]}), see above; what "
            "was found is kept: ask again to go on"
        )


def gather(known: Ledger, folder: Path) -> None:
    """Take what processes found into the ledger of the folder."""
    for path in _pieces(folder):
        known.take(Ledger(path, known.identity))
        path.unlink()


def _pieces(folder: Path) -> list[Path]:
    name = Path(LEDGER)
    return sorted(folder.glob(f"{name.stem}.*{name.suffix}"))


def _lines(path: Path) -> int:
    """Answers, without the clips that they are about."""
    told = path.read_bytes()
    return told.count(b"\n") - told.count(b', "clip", ')


def _work(job: Job, folder: Path, share: Share, threads: int) -> None:
    """One process. Ctrl-C is its parent's to handle; where the parent is killed, it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        pipeline = load(job.protocol.clips.model, device=job.device)
        Evaluation(pipeline, job.protocol, folder, parts=job.parts, share=share).run()
    except PackCacheError as error:
        sys.stderr.write(f"process {share.number + 1} of {share.of}: {error}\n")
        sys.exit(1)


def _end_with_parent() -> None:
    """Else it would go on writing beside the processes of the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
