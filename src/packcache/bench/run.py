"""Running a benchmark: every row in one process, side by side at the same latent frame.

    report = bench(make_workload("toy", policies=parse_policies("full,packcache")))
    print(*report.lines(), sep="\n")

All rows go through the clip together. At a measured latent frame they take turns, repeat by repeat,
so that a machine that slows down slows all of them; the order is turned round every other time.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from packcache.bench import compose
from packcache.bench.candidates import maker
from packcache.bench.ceilings import measure, now
from packcache.bench.parts import Candidate, Instrumented, Workload
from packcache.bench.pieces import Pieces
from packcache.bench.predict import STOCK, course_workload
from packcache.bench.result import Report
from packcache.bench.rows import RowResult
from packcache.errors import GenerationError, InputError, InvalidSetting, is_out_of_memory
from packcache.lumos.memory import kept_terms
from packcache.lumos.units import found_memory, show_bytes
from packcache.lumos.weights import parameter_count
from packcache.policies import FullCache
from packcache.reuse import EXACT
from packcache.testing.live import LiveBytes

__all__ = ["bench"]

#: Makes the engine of a row: of a policy's label and a preset's name, or of a baseline's.
Make = Callable[[str, str], Candidate]

#: Called with the report whenever something was added to it.
OnRow = Callable[[Report], None]
OnProgress = Callable[[int, int], None]


def bench(
    workload: Workload,
    *,
    make: Make | None = None,
    before: Sequence[RowResult] = (),
    check: Sequence[int] = (),
    on_start: OnRow | None = None,
    on_row: OnRow | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Measure the ceilings, predict, then measure every row.

    Args:
        make: the engine of a row; default the library's and the baselines.
        before: rows of earlier runs of the same workload, to stand in the same table; one that is
            asked for again stays until it was measured again.
        check: numbers of layers of which a network is really run, beside what composed rows say.
        on_start: called with the report once everything is predicted and nothing measured.
        on_row: called with the report after every row, measured latent frame or round of pieces,
            to keep it.
        on_progress: called with measurements done and those there will be.

    A row that cannot be, or runs out of memory, says so in its `reason`; the others go on. After
    Ctrl-C the report holds what was measured and is not `complete`.
    """
    report = Report.begin(workload, measure(workload), before)
    keep = on_row or (lambda _: None)
    if on_start:
        on_start(report)
    try:
        if workload.layers is None:
            _Race(workload, report, make or maker(workload), keep, on_progress).run()
        else:
            _compose(workload, report, keep, on_progress)
            report.checked += compose.check(workload, check) if check else []
        report.complete = True
    except KeyboardInterrupt:
        pass
    finally:
        keep(report)
    return report


def _compose(
    workload: Workload, report: Report, keep: OnRow, on_progress: OnProgress | None
) -> None:
    """Rows at full depth from measured pieces, after every round of them."""
    for row in report.new:
        if row.is_baseline and row.policy != STOCK:
            row.reason = f"{row.policy} is not composed: run it without --layers"

    def fill(pieces: Pieces) -> None:
        for row in report.new:
            if row.reason is None:
                _fill(workload, row, pieces)
        keep(report)

    compose.measure(workload, on_run=on_progress, on_round=fill)


def _fill(workload: Workload, row: RowResult, pieces: Pieces) -> None:
    """A row from the rounds of pieces there are; memory is as planned."""
    policy = workload.policies.get(row.policy, FullCache())
    reuse = workload.presets.get(row.preset, EXACT)
    made = compose.compose(workload, pieces, row.policy, reuse)
    row.reason = made.reason
    if made.reason is not None:
        row.composed = None
        return
    course = course_workload(workload).course(policy, workload.latents)
    row.kv_bytes, row.capacity_bytes = course.kv_bytes, course.end_bytes
    row.peak_bytes, row.peak_how = row.predicted["live_bytes"], "planned"
    row.prefill_s = made.prefill
    row.given_s = sum(frame.total for frame in made.frames[: workload.given])
    row.spent = dict(made.frames[-1].shares)
    row.bookkeeping = {frame: made.frames[frame].bookkeeping for frame in row.generated}
    row.composed, row.rounds = made, pieces.rounds


@dataclass(kw_only=True, eq=False)
class _Runner:
    """A row that is still in the race. `steps` are those timed, each standing for `scale` of them;
    `first` those of the warm-up; `made` the bytes that a frame's work takes."""

    row: RowResult
    candidate: Candidate
    steps: list[int] | None
    first: list[int] | None
    scale: float
    made: int = 0


class _Race:
    """All rows of a run, latent frame by latent frame."""

    def __init__(
        self,
        workload: Workload,
        report: Report,
        make: Make,
        keep: OnRow,
        on_progress: OnProgress | None,
    ) -> None:
        self.workload, self.report, self.make = workload, report, make
        self.keep, self.on_progress = keep, on_progress
        self.runners: list[_Runner] = []
        self.done = 0
        self.weights = parameter_count(workload.config) * workload.dtype.itemsize

    def run(self) -> None:
        frames = self.workload.measured_frames
        self._line_up()
        for frame in range(self.workload.latents):
            if frame in (frames[0], frames[-1]):
                self._each(self._warm_up)
            if frame == frames[-1]:
                self._each(self._shares)
            if frame in frames:
                self._measure(frame)
            if frame != frames[-1]:
                self._each(lambda runner, frame=frame: self._commit(runner, frame))

    # --- who runs -------------------------------------------------------------------------------

    def _line_up(self) -> None:
        """Make the engines; the baselines stand beside the reference, against which they count."""
        rows = sorted(
            self.report.new, key=lambda row: (row is not self.report.new[0], not self._is_base(row))
        )
        left = found_memory(self.workload.device) - self.weights
        passing = 0  # what a row's work takes on top, which one row at a time does
        cold = True
        for row in rows:
            if row.reason is not None:
                continue
            lasting = self._lasting_bytes(row)
            most = max(passing, row.predicted["live_bytes"] - self.weights - lasting)
            if lasting + most > left:
                row.reason = (
                    f"needs {show_bytes(lasting + most)} beside the weights and the other rows, "
                    f"{show_bytes(max(0, left))} are left: ask for fewer rows at once"
                )
                continue
            if cold:  # the first prefill of a process loads kernels
                cold = False
                with self._reason(row):
                    self.make(row.policy, row.preset).prefill()
            with self._reason(row):
                self.runners.append(self._runner(row))
                left, passing = left - lasting, most

    def _lasting_bytes(self, row: RowResult) -> int:
        """What a row holds while others run: its cache as allocated, attention kept over steps."""
        work = self.workload
        policy = work.policies.get(row.policy, FullCache())
        reuse = work.presets.get(row.preset, EXACT)
        kept = kept_terms(work.config, work.layout, work.sampling, work.dtype, reuse=reuse)
        course = course_workload(work).course(policy, work.latents)
        return course.step_bytes + sum(term.bytes for term in kept)

    def _is_base(self, row: RowResult) -> bool:
        return row.policy in self.workload.baselines

    def _runner(self, row: RowResult) -> _Runner:
        candidate = self.make(row.policy, row.preset)
        row.prefill_s = candidate.prefill()
        every, count = self.workload.sampling.steps, self.workload.sampled_steps
        exact = self.workload.presets.get(row.preset, EXACT).is_exact
        steps = None
        if exact and count is not None:
            row.sampled_steps = count
            steps = [int((number + 0.5) * every / count) for number in range(count)]
        return _Runner(
            row=row,
            candidate=candidate,
            steps=steps,
            first=list(range(min(2, every))) if exact else None,
            scale=1.0 if steps is None else every / len(steps),
        )

    def _each(self, work: Callable[[_Runner], None], turned: bool = False) -> None:
        for runner in self.runners[:: -1 if turned else 1]:
            with self._reason(runner.row):
                work(runner)
            if runner.row.reason is not None:  # at once, or the others will not fit either
                self.runners.remove(runner)
                del runner.candidate
                _forget()

    @contextlib.contextmanager
    def _reason(self, row: RowResult) -> Iterator[None]:
        """What goes wrong in one row ends that row only, unless it is an error of ours."""
        try:
            yield
        except (InvalidSetting, InputError, GenerationError, RuntimeError) as error:
            known = isinstance(error, (InvalidSetting, InputError, GenerationError))
            if not known and not is_out_of_memory(str(error)):
                raise
            row.reason = str(error).splitlines()[0]
            self.keep(self.report)

    # --- what they do ---------------------------------------------------------------------------

    def _warm_up(self, runner: _Runner) -> None:
        """The first rehearsal is not timed, and the last frame's first: the memory they take is
        counted instead, most at the end where work grows with what is held."""
        made = _Made(self.workload.device)
        with made:
            runner.candidate.rehearse(runner.first)
        runner.made = max(runner.made, made.peak)
        runner.row.peak_how = f"sum: weights, cache, {made.how} of a frame's work"

    def _measure(self, frame: int) -> None:
        """All repeats of a frame, in turns. Whoever is through with the last frame is finished at
        once, whatever becomes of the others."""
        work = self.workload
        for repeat in range(work.repeats):

            def turn(runner: _Runner, ends: bool = repeat + 1 == work.repeats) -> None:
                self._time(runner, frame)
                if ends and frame == work.measured_frames[-1]:
                    self._commit(runner, frame)
                    self._finish(runner)

            self._each(turn, turned=repeat % 2 == 1)
        self.keep(self.report)

    def _time(self, runner: _Runner, frame: int) -> None:
        steps, forward = runner.candidate.rehearse(runner.steps)
        if runner.steps is not None:  # what is made once a frame, as draws, counts once
            once, _ = runner.candidate.rehearse([])
            steps = (steps - once) * runner.scale + once
        runner.row.seconds.setdefault(frame, []).append(steps + forward)
        self.done += 1
        if self.on_progress:
            ahead = [f for f in self.workload.measured_frames if f > frame]
            repeats = self.workload.repeats
            left = repeats * len(ahead) * len(self.runners)
            left += sum(repeats - len(r.row.seconds.get(frame, ())) for r in self.runners)
            self.on_progress(self.done, self.done + left)

    def _shares(self, runner: _Runner) -> None:
        """Where the time goes; the commit's forward, in which no token is drawn, counts once."""
        if not isinstance(runner.candidate, Instrumented):
            return
        spent = dict(runner.candidate.shares(runner.steps))
        if runner.steps is not None:
            once = runner.candidate.shares([])
            for kind, seconds in spent.items():
                forward = once.get(kind, 0.0)
                spent[kind] = (seconds - forward) * runner.scale + forward
        runner.row.spent = spent

    def _commit(self, runner: _Runner, frame: int) -> None:
        start = now(self.workload.device)
        bookkeeping = runner.candidate.advance()
        if frame < self.workload.given:
            runner.row.given_s += now(self.workload.device) - start
        else:
            runner.row.bookkeeping[frame] = bookkeeping

    def _finish(self, runner: _Runner) -> None:
        """What is held at the end, and the peak: weights, cache, and a frame's work on top."""
        row, found = runner.row, runner.candidate.statistics()
        row.kv_bytes, row.capacity_bytes = found["kv_bytes"], found["capacity_bytes"]
        row.peak_bytes = self.weights + found["capacity_bytes"] + runner.made


class _Made:
    """The most bytes that were made and alive at once inside the block."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak, self.before = device, 0, 0
        self.live = LiveBytes() if device.type != "cuda" else None

    @property
    def how(self) -> str:
        return "allocator's peak" if self.live is None else "tensors counted"

    def __enter__(self) -> None:
        if self.live is not None:
            self.live.__enter__()
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_allocated(self.device)

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.__exit__(*error)
            self.peak = self.live.peak
        else:
            self.peak = torch.cuda.max_memory_allocated(self.device) - self.before


def _forget() -> None:
    """Give back what rows that left the race held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
