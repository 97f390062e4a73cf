"""`packcache evaluate`: a protocol for every policy; truth, memory, reuse, videos and footage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packcache.console import print_json, progress

if TYPE_CHECKING:
    from packcache.video import Frames

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)

ModelName = Annotated[str, typer.Option("--model", help="a model that comes with the package")]
Seed = Annotated[int, typer.Option("--seed", help="of clips and draws")]
Out = Annotated[Path | None, typer.Option("--out", help="folder for JSON and picture")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


@app.callback()
def _evaluate() -> None:
    """Measure quality: in a world that can tell right from wrong (the embedded model's), or of your
    own clips by what needs no weights (videos, drift-null)."""


@app.command()
def run(
    protocol: Annotated[
        Path, typer.Option("--protocol", help="what is asked, and what counts as no worse")
    ] = Path("benchmarks/protocol.toml"),
    quick: Annotated[
        int | None, typer.Option("--quick", help="so many prompts at most; exploratory")
    ] = None,
    parts: Annotated[str, typer.Option(help="of memory, replay, running")] = (
        "replay,memory,running"
    ),
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N")] = None,
    workers: Annotated[
        int, typer.Option(help="processes; on a CPU as many as cores are fastest")
    ] = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """What every policy costs, by a protocol that was fixed beforehand.

    Asked again with the same --out it goes on: clips that are done are in clips.jsonl there.
    """
    from packcache import files
    from packcache.errors import InvalidSetting
    from packcache.evaluate import evaluation_report
    from packcache.evaluate.evaluation import Evaluation
    from packcache.evaluate.protocol import read_protocol
    from packcache.evaluate.workers import Job, locked, run_in
    from packcache.models import load

    asked = read_protocol(protocol)
    asked = asked if quick is None else asked.cut(quick)
    wanted = [part.strip() for part in parts.split(",")]
    if out is not None:
        files.check_output_folder(out)
    elif workers > 1:
        raise InvalidSetting(f"workers is {workers} without a folder to write to: add --out")
    pipeline = load(asked.clips.model, device=device)
    with progress("evaluating") as advance, locked(out) if out else nullcontext():
        found = Evaluation(
            pipeline,
            asked,
            out,
            parts=wanted,  # type: ignore[arg-type]  # checked where it is used
            on_step=advance and (lambda _, done, total: advance(done, total)),
        )
        if out is None:
            found.run()
        else:
            job = Job(protocol=asked, parts=found.parts, device=device)
            run_in(out, found, job, workers=workers, on_step=advance)
        result = found.result()
        if out is not None:
            evaluation_report.save(result, out)
    if as_json:
        print_json(result)
        return
    print("\n".join(evaluation_report.lines(result)))


@app.command()
def page(
    path: Annotated[Path, typer.Argument(help="the page to write, such as docs/results.md")],
    result: Annotated[Path, typer.Option(help="of packcache evaluate run")] = Path(
        "benchmarks/results/evaluate/evaluate.json"
    ),
    ablations: Annotated[
        Path | None, typer.Option(help="of packcache evaluate run with benchmarks/ablations.toml")
    ] = None,
    bench: Annotated[
        list[Path] | None, typer.Option(help="of packcache bench; several times for several")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="folder to draw drift.png and frontier.png into")
    ] = None,
) -> None:
    """The tables of a stored evaluation, and what they say of the paper's claims, as Markdown."""
    from packcache import files
    from packcache.bench.paper import cost_section, read_benchmark
    from packcache.evaluate import results_page

    for folder in (path.parent, pictures or path.parent):
        files.check_folder(folder)
    found = results_page.read_evaluation(result)
    moved = None if ablations is None else results_page.read_evaluation(ablations)
    drawn = pictures and results_page.draw_pictures(found, moved, pictures, page=path)
    text = results_page.render(
        found,
        result.name,
        ablations=moved,
        cost=cost_section([read_benchmark(one) for one in bench or ()]),
        pictures=drawn,
    )
    files.write_text(path, text)


@app.command()
def truth(
    model: ModelName = "digits",
    clips: Annotated[int, typer.Option(help="clips to make and judge")] = 128,
    frames: Annotated[int, typer.Option(help="pixel frames of each")] = 25,
    memory_clips: Annotated[int, typer.Option(help="clips for recall at gap 2; 0: none")] = 64,
    late_clips: Annotated[int, typer.Option(help="clips run on to frame 97; 0: none")] = 8,
    seed: Seed = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """What the model gets right, beside the codec's ceiling, a frozen floor and the targets."""
    from packcache import files
    from packcache.evaluate.table import truth_table
    from packcache.models import load

    if out is not None:
        files.check_output_folder(out)
    pipeline = load(model)
    with progress("judging") as advance:
        table = truth_table(
            pipeline,
            clips=clips,
            frames=frames,
            memory_clips=memory_clips,
            late_clips=late_clips,
            seed=seed,
            on_step=advance,
        )
    if out is not None:
        out.mkdir(exist_ok=True)
        files.write_json(table.to_json(), out / "truth.json")
    if as_json:
        print_json(table.to_json())
        return
    print("\n".join(table.lines()))


@app.command()
def memory(
    model: ModelName = "digits",
    policies: Annotated[
        str | None, typer.Option(help="policies to ask, as for compare [those of the docs]")
    ] = None,
    gaps: Annotated[str, typer.Option(help="latent frames under the curtain")] = "1,2,3,4,6,12",
    clips: Annotated[int, typer.Option(help="clips a policy and gap")] = 64,
    judged: Annotated[int, typer.Option(help="of these, generated and read as well")] = 0,
    source: Annotated[str, typer.Option(help="where it was seen: history or anchor")] = "history",
    seed: Seed = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Does the model know, when the curtain rises, what was behind it?"""
    from packcache import files
    from packcache.evaluate import memory as asked
    from packcache.evaluate import truth
    from packcache.evaluate.memory_plot import plot
    from packcache.models import load
    from packcache.policies import parse_policies

    chosen = asked.ANCHOR_POLICIES if source == "anchor" else asked.DEFAULT_POLICIES
    if policies is not None:
        chosen = {label: label for label in parse_policies(policies, stored=True)}
    if out is not None:
        files.check_output_folder(out)
    pipeline = load(model)
    with progress("asking") as advance:
        curve = asked.horizon(
            pipeline,
            chosen,
            gaps=_numbers(gaps),
            clips=clips,
            seed=seed,
            source=source,  # type: ignore[arg-type]  # checked where it is used
            judge=(lambda frames, scene: truth.recall(frames, scene)) if judged else None,
            judged=judged,
            on_step=advance,
        )
    result = curve.to_json()
    if out is not None:
        out.mkdir(exist_ok=True)
        files.write_json(result, out / f"memory_{source}.json")
        plot(result, out / f"memory_{source}.svg")
    if as_json:
        print_json(result)
        return
    _print_memory(result)


@app.command()
def guard(
    model: ModelName = "digits",
    presets: Annotated[
        str, typer.Option(help="as history_every=4+rest_every=8; exact is always there")
    ] = "exact,balanced,fast",
    policies: Annotated[str, typer.Option(help="as for compare")] = "full,packcache",
    clips: Annotated[int, typer.Option(help="one-digit clips to make and read; 0: none")] = 160,
    recall_clips: Annotated[int, typer.Option(help="clips for recall at gap 2; 0: none")] = 256,
    forced_clips: Annotated[int, typer.Option(help="of these, asked teacher-forced as well")] = 32,
    frames: Annotated[int, typer.Option(help="pixel frames of one-digit clips")] = 25,
    steps: Annotated[int | None, typer.Option(help="denoising steps a frame [model's own]")] = None,
    seed: Seed = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """May a preset be used? Clips made with it, read beside the same clips with exact steps.

    Asked again with the same --out it goes on: clips that are done are in clips.jsonl there.
    """
    from packcache import files
    from packcache.evaluate import guard as guards
    from packcache.models import load, usual
    from packcache.policies import parse_policies

    chosen = guards.parse_presets(presets, steps or usual(model).sampling.steps)
    asked = parse_policies(policies, stored=True)
    if out is not None:
        files.check_output_folder(out)
    pipeline = load(model)
    with progress("guarding") as advance:
        found = guards.guard(
            pipeline,
            chosen,
            policies=list(asked),
            clips=clips,
            recall_clips=recall_clips,
            forced_clips=forced_clips,
            frames=frames,
            steps=steps,
            seed=seed,
            kept=None if out is None else out / "clips.jsonl",
            on_step=advance,
        )
    if out is not None:
        files.write_json(found.to_json(), out / "guard.json")
    if as_json:
        print_json(found.to_json())
        return
    print("\n".join(found.lines()))


@app.command()
def videos(
    folders: Annotated[
        list[str], typer.Argument(help="label=folder of clips named alike, the reference first")
    ],
    metrics: Annotated[
        str | None, typer.Option("--metrics", help="by comma; what misleads alone brings others")
    ] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", help="only the first so many of each clip")
    ] = None,
    fps: Annotated[
        float | None, typer.Option("--fps", help="where files do not say, as pictures")
    ] = None,
    temporal: Annotated[int, typer.Option("--temporal", help="frames of a latent frame")] = 4,
    out: Annotated[Path | None, typer.Option("--out", help="folder for videos.json")] = None,
    as_json: AsJson = False,
) -> None:
    """Your own clips, of any model, made with several caches: motion, flicker, warp, drift, PSNR.

    No weights needed. Pairs by name: what each differs by from the reference's clip.
    """
    from packcache import files
    from packcache.environment import environment
    from packcache.evaluate.videos import compare, lines

    if out is not None:
        files.check_output_folder(out)
    with progress("measuring") as advance:
        told = compare(
            _labelled(folders), metrics=tuple(metrics.split(",")) if metrics else (),
            frames=frames, fps=fps, temporal=temporal, on_step=advance,
        )  # fmt: skip
    told["environment"] = environment()
    if out is not None:
        out.mkdir(exist_ok=True)
        files.write_json(told, out / "videos.json")
    if as_json:
        print_json(told)
    else:
        print("\n".join(lines(told)))


def _labelled(folders: list[str]) -> dict[str, Path]:
    """label=folder, each label once."""
    from packcache.errors import InvalidSetting

    found: dict[str, Path] = {}
    for text in folders:
        label, equals, path = text.partition("=")
        if not (label and equals and path):
            raise InvalidSetting(f"cannot read {text!r}, expected label=folder, such as full=clips")
        if label in found:
            raise InvalidSetting(f"label {label!r} is there twice, expected each once")
        found[label] = Path(path)
    return found


@app.command()
def drift_null(
    videos: Annotated[list[Path], typer.Argument(help="clean footage")],
    frames: Annotated[
        int | None, typer.Option("--frames", help="pixel frames of a window [as in the docs]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How far does footage drift where nothing is wrong? A drift below that says nothing."""
    from packcache.evaluate import footage
    from packcache.video import read_video

    with progress("measuring") as advance:

        def clips() -> Iterator[tuple[str, Frames]]:
            for number, path in enumerate(videos):
                yield f"video {path}", read_video(path)[0]
                if advance:
                    advance(number + 1, len(videos))

        null = footage.drift_null(clips(), frames=footage.WINDOW if frames is None else frames)
    if as_json:
        from packcache.environment import environment  # and PyTorch, for its version

        work = {"videos": [path.name for path in videos]}
        print_json({**null.to_json(), "workload": work, "environment": environment()})
        return
    print("\n".join(null.lines()))


def _print_memory(result: dict[str, Any]) -> None:
    """Recall in percent, a row a policy, a column a gap."""
    gaps = result["workload"]["gaps"]
    cells = {(row["policy"], row["gap"]): row for row in result["results"]}
    print(
        "object recalled, % of clips, by latent frames under the curtain; tokens held at the last"
    )
    print(f"{'':24}" + "".join(f"{gap:>7}" for gap in gaps) + f"{'held':>8}")
    for policy in dict.fromkeys(row["policy"] for row in result["results"]):
        rows = [cells[policy, gap] for gap in gaps]
        shares = "".join(f"{100 * row['object']['mean']:7.0f}" for row in rows)
        print(f"{policy:24}{shares}{rows[-1]['held']['mean']:8.0f}")
    for verdict in result["power"]:
        told = "differs" if verdict["separated"] else "DOES NOT DIFFER"
        print(
            f"control {verdict['control']} at gap {verdict['gap']}: {told} from full "
            f"({100 * verdict['difference']:+.0f} points, p = {verdict['p']:.2g})"
        )


def _numbers(text: str) -> tuple[int, ...]:
    """ "1,2,4" as numbers."""
    from packcache.errors import InvalidSetting

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidSetting(f"gaps is {text!r}, expected numbers such as 1,2,4") from None
