"""`packcache bench`: how long it takes, beside what was predicted and what is possible."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packcache.cli_options import (
    POLICIES_HELP,
    AsJson,
    Device,
    Guidance,
    Seed,
    SizeText,
    Steps,
    parse_size,
)
from packcache.console import print_json, progress
from packcache.errors import InvalidSetting

if TYPE_CHECKING:
    from packcache.bench.parts import Workload
    from packcache.bench.result import Report
    from packcache.bench.rows import RowResult

__all__ = ["bench"]

#: The exit code of a program stopped by Ctrl-C.
_INTERRUPTED = 130

ModelSize = Annotated[str, typer.Option("--model", help="toy, 1b, 3b (random weights), digits")]
Task = Annotated[str, typer.Option("--task", help="t2v, or i2v: the first latent frame is given")]
Frames = Annotated[int, typer.Option("--frames", help="pixel frames of the clip")]
Policies = Annotated[str, typer.Option("--policies", help=POLICIES_HELP)]
Presets = Annotated[str, typer.Option("--presets", help="reuse over steps, for each policy")]
Baselines = Annotated[
    str, typer.Option("--baselines", help="torch-full, stock: loops beside the engine; none")
]
Layers = Annotated[
    int | None, typer.Option("--layers", help="compose all layers from the mean of so many")
]
Check = Annotated[
    str | None, typer.Option("--check", help="such as 4,8: layers run whole beside the composed")
]
Repeats = Annotated[int, typer.Option("--repeats", help="measurements of each number, in turns")]
SampleFrames = Annotated[
    int, typer.Option("--sample-frames", help="latent frames to time, straight lines between")
]
SampleSteps = Annotated[
    int | None, typer.Option("--sample-steps", help="steps to time in exact rows [all]")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="bfloat16, float32 [bfloat16; toy, digits: float32]")
]
Out = Annotated[Path | None, typer.Option("--out", help="JSON, written as rows are finished")]
Append = Annotated[bool, typer.Option("--append", help="keep the rows that are in --out")]
Plot = Annotated[Path | None, typer.Option("--plot", help="picture, .png or .svg")]
Page = Annotated[
    Path | None, typer.Option("--page", help="measure nothing: write this page from --results")
]
Results = Annotated[Path, typer.Option("--results", help="folder of bench_*.json, for --page")]


def bench(
    model: ModelSize = "toy",
    task: Task = "i2v",
    size: SizeText = None,
    frames: Frames = 48,
    steps: Steps = None,
    guidance: Guidance = None,
    policies: Policies = "full,window,packcache",
    presets: Presets = "exact,balanced,fast",
    baselines: Baselines = "torch-full,stock",
    layers: Layers = None,
    check: Check = None,
    repeats: Repeats = 7,
    sample_frames: SampleFrames = 3,
    sample_steps: SampleSteps = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    out: Out = None,
    append: Append = False,
    plot: Plot = None,
    page: Page = None,
    results: Results = Path("benchmarks/results"),
    as_json: AsJson = False,
) -> None:
    """How long does it take? Every policy and preset side by side, and what limits them."""
    if page is not None:
        _write_page(page, results)
        return
    from packcache.bench.workload import make_workload, parse_layers
    from packcache.policies import parse_policies

    parsed = parse_size(size)
    if isinstance(parsed, int):
        raise InvalidSetting(f"--size is {size!r}, expected WIDTHxHEIGHT such as 672x384")
    _check_files(out, plot, append)
    workload = make_workload(
        model, policies=parse_policies(policies), presets=_names(presets),
        baselines=_names(baselines), task=task, size=parsed, frames=frames, steps=steps,
        guidance=guidance, layers=layers, repeats=repeats, sample_frames=sample_frames,
        sample_steps=sample_steps, device=device, dtype=dtype, seed=seed,
    )  # fmt: skip
    report = _run(
        workload,
        out,
        quiet=as_json,
        before=_earlier(workload, out) if append else [],
        check=parse_layers(check, workload) if check else (),
    )
    _show(report, plot, as_json)
    if not report.complete:
        raise typer.Exit(_INTERRUPTED)


def _names(text: str) -> list[str]:
    """ "exact,fast" as names; "none" and nothing are none."""
    return [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]


def _check_files(out: Path | None, plot: Path | None, append: bool) -> None:
    """Whether results can be written, before hours are spent on them."""
    from packcache import files
    from packcache.bench.plot import check_name

    if append and out is None:
        raise InvalidSetting("--append without --out: name the file whose rows are kept")
    for path in (out, plot):
        if path is not None:
            files.check_folder(path.parent)
    if plot is not None:
        check_name(plot)


def _earlier(workload: Workload, out: Path | None) -> list[RowResult]:
    from packcache.bench.result import earlier_rows
    from packcache.lumos.config import read_json

    if out is None or not out.exists():
        return []
    return earlier_rows(read_json(out), workload)


def _run(workload: Workload, out: Path | None, *, quiet: bool, **settings: Any) -> Report:
    """Prints what is predicted, keeps what is measured."""
    from packcache import files
    from packcache.bench.run import bench as run
    from packcache.bench.table import predicted_lines

    def start(report: Report) -> None:
        if not quiet:
            print(*predicted_lines(report.to_json(report.new)), "", sep="\n", flush=True)

    def keep(report: Report) -> None:
        new = report.complete or any(map(report.done, report.new))
        if out is not None and new:  # or what is there would be lost for nothing
            files.write_json(report.to_json(), out)

    with progress("measuring") as advance:
        return run(workload, on_start=start, on_row=keep, on_progress=advance, **settings)


def _show(report: Report, plot: Path | None, as_json: bool) -> None:
    from packcache.bench.plot import plot as draw
    from packcache.bench.table import measured_lines

    result: dict[str, Any] = report.to_json()
    if as_json:
        print_json(result)
    else:
        print(*measured_lines(result), sep="\n")
    if plot is not None and any(row["complete"] for row in result["results"]):
        draw(result, plot)


def _write_page(page: Path, results: Path) -> None:
    from packcache import files
    from packcache.bench.page import render

    files.check_folder(page.parent)
    text = render(results)
    files.write_text(page, text)
    print(f"wrote {page}")
