"""`packcache vbench`: what people with weights need to score clips with VBench-I2V."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packcache.cli_asked import Asked
from packcache.cli_options import (
    POLICIES_HELP,
    AsJson,
    CodecFolder,
    Device,
    Dtype,
    Fps,
    FrameCount,
    Guidance,
    Model,
    ModelName,
    Positions,
    Rebase,
    Reuse,
    Seconds,
    Seed,
    SizeText,
    Steps,
    Subfolder,
    TokenizerFolder,
    given,
)
from packcache.console import print_json, progress
from packcache.errors import InvalidSetting

if TYPE_CHECKING:
    from packcache.evaluate.vbench.export import Maker
    from packcache.evaluate.vbench.suite import Sample
    from packcache.lumos.pipeline import Pipeline

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)

#: What is exported unless policies or clips are named.
_POLICIES = "full,window,packcache"

Exports = Annotated[Path, typer.Argument(help="the folder of vbench export")]


@app.callback()
def _vbench() -> None:
    """Clips for VBench-I2V, and what it found, joined. VBench itself is run by you."""


@app.command()
def sample(
    info: Annotated[Path, typer.Argument(help="i2v-bench-info.json or vbench2_i2v_full_info.json")],
    images: Annotated[Path, typer.Argument(help="folder of the crop, such as crop/7-4")],
    count: Annotated[int, typer.Option(help="images to draw; the paper has 160")] = 160,
    seed: Annotated[int, typer.Option(help="of the draw")] = 0,
    clips: Annotated[int, typer.Option(help="of each prompt; VBench's own protocol has 5")] = 1,
    camera: Annotated[
        bool, typer.Option("--camera", help="add camera prompts: 7 an image without a subject")
    ] = False,
    captions: Annotated[
        Path | None, typer.Option(help="JSON: longer texts for the model, by prompt")
    ] = None,
    out: Annotated[Path, typer.Option(help="the sample, JSON")] = Path("sample.json"),
    as_json: AsJson = False,
) -> None:
    """Draw the images that every policy is asked."""
    from packcache import files
    from packcache.evaluate.vbench import suite

    files.check_folder(out.parent)
    chosen = suite.sample(
        info, images, count=count, seed=seed, clips=clips, camera=camera, captions=captions
    )
    told = chosen.to_json(out.parent)
    files.write_json(told, out)
    if as_json:
        print_json(told)
        return
    print(f"{out}: {count} images of {chosen.suite['images']}, {len(list(chosen.asked()))} clips")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="a file of vbench sample")],
    policies: Annotated[
        str | None, typer.Option(help=f"to generate with [{_POLICIES}]: {POLICIES_HELP}")
    ] = None,
    take: Annotated[
        list[str] | None,
        typer.Option(help="LABEL=FOLDER: take PROMPT-INDEX.mp4, or folders of PNG, from there"),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="standard, or custom: images of one's own beside the clips")
    ] = "standard",
    model: ModelName = "digits",
    subfolder: Subfolder = None,
    codec: CodecFolder = None,
    tokenizer: TokenizerFolder = None,
    device: Device = None,
    dtype: Dtype = None,
    frames: FrameCount = 24,
    size: SizeText = None,
    fps: Fps = None,
    seconds: Seconds = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    positions: Positions = "rebase",
    rebase: Rebase = "trained",
    reuse: Reuse = "exact",
    out: Annotated[Path, typer.Option(help="folder of exports; asked again, it goes on")] = Path(
        "vbench"
    ),
    anyway: Annotated[
        bool, typer.Option("--anyway", help="start even if the plan says it will not fit")
    ] = False,
) -> None:
    """Make the clips of every policy, named and encoded as VBench wants them."""
    from packcache.evaluate.vbench import export as exports
    from packcache.evaluate.vbench.suite import read_sample

    source = Model(
        name=model, subfolder=subfolder, codec=codec, tokenizer=tokenizer, device=device,
        dtype=dtype,
    )  # fmt: skip
    settings = given(
        frames=frames, size=size, fps=fps, seconds=seconds, seed=seed, steps=steps,
        guidance=guidance, positions=positions, rebase=rebase, reuse=reuse,
    )  # fmt: skip
    chosen = read_sample(file)
    folders = _folders(take or [])
    layout = exports.begin(chosen, out, mode)  # type: ignore[arg-type]  # checked there
    if policies is None and not folders:
        policies = _POLICIES
    works = [_taken(chosen, label, folder, fps) for label, folder in folders.items()]
    works += _generated(chosen, source, policies, settings, anyway=anyway)
    for work in works:
        work.run(chosen, out, seed=seed, mode=mode)
        print(f"{layout.clips(work.label)}: {len(list(chosen.asked()))} clips", flush=True)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """The clips of one policy: how they are made, and what decides them."""

    label: str
    make: Maker
    workload: dict[str, Any]

    def run(self, chosen: Sample, out: Path, **settings: Any) -> None:
        from packcache.evaluate.vbench.export import export

        with progress(self.label) as advance:
            export(
                chosen, out, self.label, self.make, workload=self.workload, on_clip=advance,
                **settings,
            )  # fmt: skip


def _folders(take: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in take:
        label, equals, folder = text.rpartition("=")
        if not (equals and label and folder):
            raise InvalidSetting(f"--take is {text!r}, expected LABEL=FOLDER")
        found[label] = Path(folder)
    return found


def _taken(chosen: Sample, label: str, folder: Path, fps: int | None) -> _Work:
    from packcache.evaluate.vbench.export import taken

    return _Work(
        label=label,
        make=taken(folder, chosen, fps=fps),
        workload={"made": "taken", **given(fps=fps)},
    )


def _generated(
    chosen: Sample, source: Model, policies: str | None, settings: dict[str, Any], *, anyway: bool
) -> list[_Work]:
    """Everything is checked before the weights are read."""
    from packcache.lumos.plan import found_memory
    from packcache.policies import parse_policies

    if policies is None:
        return []
    source.check()
    first = chosen.entries[0]
    common = {**settings, "image": chosen.image(first)}
    asked = {
        label: Asked.read(source, first.caption, {**common, "policy": policy})
        for label, policy in parse_policies(policies).items()
    }
    free = None if anyway else found_memory(source.place)
    for one in asked.values():
        if free is not None:
            one.check_fits(free)
    pipeline = source.load()
    return [_work(chosen, pipeline, label, one) for label, one in asked.items()]


def _work(chosen: Sample, pipeline: Pipeline, label: str, asked: Asked) -> _Work:
    from packcache.evaluate.vbench.export import generated

    decided = {k: v for k, v in asked.settings.items() if k not in ("image", "seed")}
    policy = decided["policy"]
    return _Work(
        label=label,
        make=generated(pipeline, chosen, **decided),
        workload={
            "made": "generated",
            **{key: _plain(value) for key, value in decided.items()},
            "budget": _plain(policy.settings().get("budget")),
            "model": pipeline.name,
            "steps": asked.sampling.steps,
            "guidance": asked.sampling.guidance,
        },
    )


def _plain(value: Any) -> Any:
    """For a file: numbers and texts as they are, the rest as it prints."""
    return value if value is None or isinstance(value, (str, int, float)) else repr(value)


@app.command()
def check(out: Exports, as_json: AsJson = False) -> None:
    """Look at all clips before hours are spent on scoring them; exit 1 if something is wrong."""
    from packcache.evaluate.vbench import checker

    with progress("checking") as advance:
        report = checker.check(out, on_clip=advance)
    if as_json:
        print_json(report.to_json())
    else:
        print("\n".join(report.lines()))
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def collect(
    out: Exports,
    reference: Annotated[str, typer.Option(help="the policy to compare with")] = "full",
    results: Annotated[
        Path | None, typer.Option(help="a folder a policy of VBench's results [EXPORTS/results]")
    ] = None,
    to: Annotated[Path | None, typer.Option("--out", help="JSON")] = None,
    as_json: AsJson = False,
) -> None:
    """Join what VBench found: paired differences, and three aggregates by their names."""
    from packcache import files
    from packcache.evaluate.vbench import collect as collecting

    if to is not None:
        files.check_folder(to.parent)
    found = collecting.collect(out, reference=reference, results=results)
    if to is not None:
        files.write_json(found.to_json(), to)
    if as_json:
        print_json(found.to_json())
        return
    print("\n".join(found.lines()))
