"""`packcache generate`: one clip, or one for each line of a file of prompts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

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
    Seconds,
    Seed,
    SizeText,
    Steps,
    Subfolder,
    TokenizerFolder,
    VideoFile,
    Window,
    given,
    parse_size,
    with_settings,
)
from packcache.console import err, print_json, progress
from packcache.errors import InvalidSetting, PackCacheError

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
}

#: Text tokens a plan counts at least; a caption has fewer tokens than letters.
_TEXT_TOKENS = 200

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
        steps=steps, guidance=guidance, positions=positions, rebase=rebase,
        policy=with_settings(policy, budget=budget, window=window),
    )  # fmt: skip
    if checkpoint and resume:
        raise InvalidSetting("both --checkpoint and --resume are given: --resume keeps it up too")
    kept = (
        {"checkpoint": checkpoint or resume, "resume": bool(resume)} if checkpoint or resume else {}
    )
    if (prompt is None) == (prompts is None):
        raise InvalidSetting("expected a prompt, or --prompts FILE.jsonl, and not both")
    source.check()
    if prompts is not None:
        _many(source, prompts, out or Path("clips"), settings, kept, anyway, as_json)
    else:
        _one(source, prompt or "", out or Path("clip.mp4"), settings, kept, anyway, as_json)


def _one(
    source: Model,
    prompt: str,
    out: Path,
    settings: dict[str, Any],
    kept: dict[str, Any],
    anyway: bool,
    as_json: bool,
) -> None:
    from packcache import video
    from packcache.policies import parse_policy

    parse_policy(settings["policy"])
    video.check_output(out, settings["frames"])
    if not anyway:
        _refuse_what_cannot_fit(source, prompt, settings)
    pipeline = source.load()
    with progress("generating") as advance:
        clip = pipeline.generate(prompt, on_frame=advance, **kept, **_ready(pipeline, settings))
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


def _ready(pipeline: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as texts and files say them, as `Pipeline.run` takes them."""
    from packcache.policies import parse_policy
    from packcache.video import read_video

    ready = {**settings, "policy": parse_policy(settings["policy"])}
    if "size" in ready:
        ready["size"] = parse_size(ready["size"])
    if "video" in ready:
        ready["video"] = pipeline.fit_video(read_video(ready["video"])[0], ready.get("size"))
    return ready


def _many(
    source: Model,
    file: Path,
    out: Path,
    settings: dict[str, Any],
    kept: dict[str, Any],
    anyway: bool,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from packcache import batch, video

    jobs = batch.read_jobs(file, _PER_LINE, {**settings, **asdict(source)})
    video.check_output_folder(out)
    for job in jobs if not anyway else ():
        _refuse_what_cannot_fit(source, job.prompt, {**settings, **job.settings})
    pipeline = source.load()

    def make(job: batch.Job, target: Path) -> dict[str, Any]:
        own, state = {**settings, **job.settings}, _of_job(kept, job.name)
        with progress(job.name) as advance:
            clip = pipeline.generate(job.prompt, on_frame=advance, **state, **_ready(pipeline, own))
        clip.save(target)
        if state:  # gigabytes at full size, of no use beside the clip
            shutil.rmtree(state["checkpoint"], ignore_errors=True)
        stats = clip.stats
        return {
            "workload": clip.workload(),
            "policy": repr(clip.policy),
            "total_s": stats.total_s,
            "last_s": stats.last_s,
            "kv_bytes": stats.kv_bytes[-1],
        }

    pictures = all({**settings, **job.settings}["frames"] == 1 for job in jobs)
    suffix = ".png" if pictures else ".mp4"
    summary = batch.run_jobs(jobs, out, make, suffix=suffix, report=_report)
    if as_json:
        print_json({"schema": "packcache.prompts/1", **asdict(summary)})
    else:
        print(
            f"{out}: {summary.made} made, {summary.skipped} finished before, "
            f"{summary.elsewhere} made elsewhere, {summary.failed} failed"
        )
    if summary.failed:
        raise PackCacheError(f"{summary.failed} of {len(jobs)} clips failed: run again to retry")


def _of_job(kept: dict[str, Any], name: str) -> dict[str, Any]:
    """Each clip of a file keeps a folder while it is made, and goes on from one that is there."""
    if not kept:
        return {}
    kept["checkpoint"].mkdir(exist_ok=True)
    folder = kept["checkpoint"] / name
    return {"checkpoint": folder, "resume": folder.exists()}


def _report(outcome: Any) -> None:
    message = f": {outcome.message}" if outcome.message else ""
    err.print(f"{outcome.status:9} {outcome.job.name}{message}", markup=False, soft_wrap=True)


def _refuse_what_cannot_fit(source: Model, prompt: str, settings: dict[str, Any]) -> None:
    """Say so in one line before any weight is read."""
    from packcache.lumos.image import pick_size
    from packcache.lumos.load import usual_size
    from packcache.lumos.plan import found_memory, plan
    from packcache.policies import parse_policy
    from packcache.video import read_image

    usual, target = usual_size(source.name)
    image = settings.get("image")
    size = pick_size(
        parse_size(settings.get("size")),
        default=usual,
        target=target,
        picture=read_image(image).size if image else None,
    )
    plan(
        source.config(),
        size=size,
        frames=settings["frames"],
        policy=parse_policy(settings["policy"]),
        dtype=source.dtype or source.usual_dtype,
        text_tokens=max(_TEXT_TOKENS, len(prompt)),
        image=bool(image or settings.get("video")),
        memory=found_memory(source.place),
        **{name: settings[name] for name in ("guidance", "steps") if name in settings},
    ).check()
