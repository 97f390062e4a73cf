"""`packcache generate`: one clip, or one for each line of a file of prompts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packcache.cli_asked import Asked
from packcache.cli_options import (
    AsJson,
    BudgetText,
    CodecFolder,
    Device,
    Dtype,
    Fps,
    FrameCount,
    Guidance,
    ImageFile,
    Model,
    ModelName,
    PolicyText,
    Positions,
    Rebase,
    Reuse,
    Seconds,
    Seed,
    SizeText,
    Steps,
    Subfolder,
    TokenizerFolder,
    VideoFile,
    Window,
    given,
    with_settings,
)
from packcache.console import err, print_json, progress
from packcache.errors import InvalidSetting, PackCacheError

if TYPE_CHECKING:
    from packcache.batch import Job, Outcome
    from packcache.lumos.pipeline import Pipeline

#: What a line of a prompts file may set for its own clip.
_PER_LINE = {
    "image": str,
    "video": str,
    "frames": int,
    "seed": int,
    "size": (str, int),
    "fps": int,
    "seconds": int,
    "steps": int,
    "guidance": float,
    "policy": str,
    "positions": str,
    "rebase": str,
    "reuse": str,
}

PromptText = Annotated[str | None, typer.Argument(help="what to show, e.g. 'a red 3 moving right'")]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="JSON Lines, one clip a line; --out is a folder")
]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", help="folder that keeps every finished latent frame")
]
Resume = Annotated[
    Path | None, typer.Option("--resume", help="go on from such a folder, and keep it up")
]
Out = Annotated[
    Path | None, typer.Option("--out", help=".mp4, .gif, .png of one frame, folder of PNG")
]
Anyway = Annotated[
    bool, typer.Option("--anyway", help="start even if the plan says it will not fit")
]


def generate(
    prompt: PromptText = None,
    prompts: Prompts = None,
    image: ImageFile = None,
    video: VideoFile = None,
    model: ModelName = "digits",
    subfolder: Subfolder = None,
    codec: CodecFolder = None,
    tokenizer: TokenizerFolder = None,
    device: Device = None,
    dtype: Dtype = None,
    policy: PolicyText = "packcache",
    budget: BudgetText = None,
    window: Window = None,
    frames: FrameCount = 48,
    size: SizeText = None,
    fps: Fps = None,
    seconds: Seconds = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    positions: Positions = "rebase",
    rebase: Rebase = "trained",
    reuse: Reuse = "exact",
    checkpoint: Checkpoint = None,
    resume: Resume = None,
    out: Out = None,
    anyway: Anyway = False,
    as_json: AsJson = False,
) -> None:
    """Make one clip, or with --prompts many."""
    source = Model(
        name=model, subfolder=subfolder, codec=codec, tokenizer=tokenizer, device=device,
        dtype=dtype,
    )  # fmt: skip
    settings = given(
        image=image, video=video, frames=frames, size=size, fps=fps, seconds=seconds, seed=seed,
        steps=steps, guidance=guidance, positions=positions, rebase=rebase, reuse=reuse,
        policy=with_settings(policy, budget=budget, window=window),
    )  # fmt: skip
    if checkpoint and resume:
        raise InvalidSetting("both --checkpoint and --resume are given: --resume keeps it up too")
    if (prompt is None) == (prompts is None):
        raise InvalidSetting("expected a prompt, or --prompts FILE.jsonl, and not both")
    source.check()
    work = _Work(
        source=source,
        settings=settings,
        checkpoint=checkpoint or resume,
        resume=resume is not None,
        anyway=anyway,
    )
    if prompts is not None:
        _many(work, prompts, out or Path("clips"), as_json)
    else:
        _one(work, prompt or "", out or Path("clip.mp4"), as_json)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What all clips of a call share; `settings` as they were typed."""

    source: Model
    settings: dict[str, Any]
    checkpoint: Path | None
    resume: bool
    anyway: bool

    def free(self) -> int | None:
        """Bytes there are before the weights are read; None: not asked."""
        from packcache.lumos.plan import found_memory

        return None if self.anyway else found_memory(self.source.place)

    def asked(self, prompt: str, own: dict[str, Any], free: int | None) -> Asked:
        """A clip with its own settings, checked, and refused if it cannot fit."""
        asked = Asked.read(self.source, prompt, {**self.settings, **own})
        if free is not None:
            asked.check_fits(free)
        return asked

    def state(self, name: str) -> Path | None:
        """Each clip of a file keeps a checkpoint of its own."""
        return None if self.checkpoint is None else self.checkpoint / name


def _one(work: _Work, prompt: str, out: Path, as_json: bool) -> None:
    from packcache import video

    video.check_output(out, work.settings["frames"])
    asked = work.asked(prompt, {}, work.free())
    pipeline = work.source.load()
    with progress("generating") as advance:
        clip = pipeline.generate(
            prompt,
            on_frame=advance,
            checkpoint=work.checkpoint,
            resume=work.resume,
            **asked.run_settings(pipeline),
        )
    clip.save(out)
    if as_json:
        print_json(clip.to_json())
        return
    stats = clip.stats
    print(f"{out}: {len(clip.frames)} frames with {clip.policy!r}")
    print(
        f"{stats.total_s:.2f} s in all, {stats.last_s:.3f} s for the last latent frame, "
        f"cache {stats.kv_bytes[-1] / 1e6:.2f} MB at the end"
    )


def _many(work: _Work, file: Path, out: Path, as_json: bool) -> None:
    from packcache import batch
    from packcache.files import check_output_folder

    jobs = batch.read_jobs(file, _PER_LINE, {**work.settings, **asdict(work.source)})
    check_output_folder(out)
    if work.checkpoint is not None:
        check_output_folder(work.checkpoint)
        work.checkpoint.mkdir(exist_ok=True)
    free = work.free()
    pipeline = work.source.load()

    def make(job: batch.Job, target: Path) -> dict[str, Any]:
        return _make(work, pipeline, job, target, free)

    def suffix(job: batch.Job) -> str:
        return ".png" if {**work.settings, **job.settings}["frames"] == 1 else ".mp4"

    def report(outcome: batch.Outcome) -> None:
        _report(work, outcome)

    summary = batch.run_jobs(jobs, out, make, suffix=suffix, report=report)
    if as_json:
        print_json({"schema": "packcache.prompts/1", **asdict(summary)})
    else:
        print(
            f"{out}: {summary.made} made, {summary.skipped} finished before, "
            f"{summary.elsewhere} made elsewhere, {summary.failed} failed"
        )
    if summary.failed:
        raise PackCacheError(f"{summary.failed} of {len(jobs)} clips failed: run again to retry")


def _make(
    work: _Work, pipeline: Pipeline, job: Job, target: Path, free: int | None
) -> dict[str, Any]:
    """One clip of a file, from its own checkpoint if there is one; a row of results."""
    from packcache.lumos import journal

    asked, state = work.asked(job.prompt, job.settings, free), work.state(job.name)
    with progress(job.name) as advance:
        clip = pipeline.generate(
            job.prompt,
            on_frame=advance,
            checkpoint=state,
            resume=state is not None and journal.has_state(state),
            **asked.run_settings(pipeline),
        )
    clip.save(target)
    stats = clip.stats
    return {
        "workload": clip.workload(),
        "policy": repr(clip.policy),
        "total_s": stats.total_s,
        "last_s": stats.last_s,
        "kv_bytes": stats.kv_bytes[-1],
    }


def _report(work: _Work, outcome: Outcome) -> None:
    """A line on stderr; the checkpoint of a finished clip, gigabytes at full size, goes."""
    from packcache.lumos import journal

    state = work.state(outcome.job.name)
    if state is not None and outcome.status in ("made", "skipped"):
        journal.remove(state)
    message = f": {outcome.message}" if outcome.message else ""
    err.print(f"{outcome.status:9} {outcome.job.name}{message}", markup=False, soft_wrap=True)
