"""`packcache trace`: record where attention goes, then judge policies without the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packcache.cli_options import (
    POLICIES_HELP,
    AsJson,
    CodecFolder,
    Device,
    Dtype,
    FrameCount,
    Model,
    ModelName,
    Seed,
    Steps,
    Subfolder,
    TokenizerFolder,
    given,
)
from packcache.console import print_json, progress
from packcache.errors import InvalidSetting

if TYPE_CHECKING:
    from packcache.inspect.trace import Trace
    from packcache.policies import Policy

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.callback()
def _trace() -> None:
    """Judge a policy without a model: from the attention of clips made with the full cache."""


@app.command()
def record(
    out: Annotated[Path, typer.Option(help="file to write")],
    model: ModelName = "digits",
    subfolder: Subfolder = None,
    codec: CodecFolder = None,
    tokenizer: TokenizerFolder = None,
    device: Device = None,
    dtype: Dtype = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="a clip's prompt, once for each [scenes of the embedded model]"),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="its first frame, once for each prompt")
    ] = None,
    clips: Annotated[int, typer.Option(help="scenes to make, without --prompt")] = 4,
    with_image: Annotated[bool, typer.Option(help="give the scenes' first frames")] = False,
    frames: FrameCount = 49,
    seed: Seed = 0,
    steps: Steps = None,
    queries: Annotated[int, typer.Option(help="tokens of a frame whose queries are sampled")] = 32,
    clip_memory: Annotated[
        str, typer.Option(help="what a clip's attention may take; a longer one is sampled")
    ] = "128MiB",
    as_json: AsJson = False,
) -> None:
    """Make clips with the full cache and write where their attention went.

    A file takes at most half of --clip-memory a clip: with more latent frames than that holds, as
    many as it holds are sampled, evenly.
    """
    from packcache import files
    from packcache.inspect import record as recording
    from packcache.lumos.units import parse_bytes

    files.check_folder(out.parent)
    memory = parse_bytes(clip_memory)
    source = Model(
        name=model, subfolder=subfolder, codec=codec, tokenizer=tokenizer, device=device,
        dtype=dtype,
    )  # fmt: skip
    source.check()
    prompts, images = _asked(model, prompt, image, clips=clips, with_image=with_image, seed=seed)
    pipeline = source.load()
    with progress("recording") as advance:
        trace = recording.record(
            pipeline, prompts, images=images, frames=frames, seed=seed, queries=queries,
            clip_memory=memory, on_frame=advance, **given(steps=steps),
        )  # fmt: skip
    trace.save(out)
    _report(trace, out, as_json=as_json)


def _report(trace: Trace, out: Path, *, as_json: bool) -> None:
    """What was written where."""
    from packcache.inspect.trace import SCHEMA

    size = out.stat().st_size
    told = {
        "schema": SCHEMA, "environment": trace.environment, "workload": trace.workload,
        "path": str(out), "bytes": size, "clips": len(trace.clips), "samples": len(trace.samples),
        "layers": list(trace.layers),
    }  # fmt: skip
    if as_json:
        print_json(told)
        return
    print(f"{out}: {_told(trace)}, {size / 1e6:.2f} MB")


def _told(trace: Trace) -> str:
    """What was recorded."""
    from packcache.inspect.trace import SAMPLED

    frames = f"{len(trace.roles)} latent frames"
    if SAMPLED in trace.workload:
        frames += f", {len(trace.workload[SAMPLED])} of them sampled"
    samples = f"{len(trace.samples)} samples of {len(trace.layers)} layers"
    return f"clips {len(trace.clips)}, of {frames}, {samples}"


@app.command()
def score(
    traces: Annotated[list[Path], typer.Argument(metavar="FILE...", help="traces of one model")],
    policies: Annotated[
        str | None, typer.Option(help=f"{POLICIES_HELP} [those of the docs]")
    ] = None,
    policy_file: Annotated[
        list[Path] | None,
        typer.Option(help="Python file with policies (run as a program), beside the others"),
    ] = None,
    policies_from: Annotated[
        Path | None, typer.Option(help="folder of such files, beside the others")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score policies by the attention that the tokens they keep would have got."""
    from packcache.inspect.score import merged, policies_of_file, policies_of_folder
    from packcache.inspect.score import score as judge
    from packcache.inspect.trace import Trace

    chosen = _policies(policies)
    for path in policy_file or ():
        chosen = merged(chosen, policies_of_file(path))
    if policies_from is not None:
        chosen = merged(chosen, policies_of_folder(policies_from))
    scores = judge([Trace.load(path) for path in traces], chosen)
    if as_json:
        print_json(scores.to_json())
        return
    print("\n".join(scores.lines()))


def _policies(text: str | None) -> dict[str, Policy]:
    """Policies by their spelling; without one those of the memory horizon, as far as they go."""
    from packcache.policies import parse_policies, parse_policy

    if text is not None:
        return parse_policies(text)
    from packcache.evaluate.memory import DEFAULT_POLICIES
    from packcache.inspect.score import TOLD

    usual = {label: parse_policy(spelling) for label, spelling in DEFAULT_POLICIES.items()}
    return {label: policy for label, policy in usual.items() if policy.asks in TOLD}


def _asked(
    model: str,
    prompts: list[str] | None,
    images: list[Path] | None,
    *,
    clips: int,
    with_image: bool,
    seed: int,
) -> tuple[list[str], Sequence[Any] | None]:
    """Prompts and images that were given, or those of scenes of the embedded model's world."""
    if prompts:
        if with_image:
            raise InvalidSetting("--with-image is for scenes: name pictures with --image")
        return prompts, images or None
    if images:
        raise InvalidSetting("--image without --prompt: give one --prompt for each")
    from packcache import models

    if model not in models.MODELS:
        raise InvalidSetting(
            f"no prompt for {model}: give --prompt once for each clip; scenes of its own has only "
            f"{', '.join(models.MODELS)}"
        )
    from packcache.inspect.record import scenes

    return scenes(clips, with_image=with_image, seed=seed)
