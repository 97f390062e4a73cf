"""The command line: parses, calls, prints. Exit 0 on success, 2 on wrong use, 1 on failure."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import packcache
from packcache import (
    cli_bench,
    cli_check,
    cli_evaluate,
    cli_generate,
    cli_inspect,
    cli_lumos,
    cli_trace,
    cli_vbench,
)
from packcache.cli_options import (
    POLICIES_HELP,
    AsJson,
    CodecFolder,
    Device,
    Dtype,
    Fps,
    FrameCount,
    Guidance,
    ImageFile,
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
    parse_size,
)
from packcache.console import print_json, progress
from packcache.errors import InvalidSetting, PackCacheError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_evaluate.app, name="evaluate")
app.add_typer(cli_trace.app, name="trace")
app.add_typer(cli_vbench.app, name="vbench")

Prompt = Annotated[str, typer.Argument(help="what to show, e.g. 'a red 3 moving right'")]

#: The exit code of a program stopped by Ctrl-C.
_INTERRUPTED = 130

#: What `packcache demo` compares.
DEMO_POLICIES = "full,window,packcache,packcache:budget=2,window=4,order=novelty,n_sinks=1"
DEMO_FRAMES = 97


def _version(wanted: bool) -> None:
    if wanted:
        print(f"packcache {packcache.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """PackCache: the KV cache of a video model, small and constant while the video grows."""


app.command()(cli_generate.generate)
app.command()(cli_bench.bench)
app.command()(cli_lumos.plan)
app.command()(cli_lumos.doctor)
app.command()(cli_check.check)
app.command()(cli_inspect.inspect)
app.command()(cli_inspect.calibrate)


@app.command()
def compare(
    prompt: Prompt,
    policies: Annotated[str, typer.Option(help=POLICIES_HELP)] = "full,window,packcache",
    image: ImageFile = None,
    model: ModelName = "digits",
    subfolder: Subfolder = None,
    codec: CodecFolder = None,
    tokenizer: TokenizerFolder = None,
    device: Device = None,
    dtype: Dtype = None,
    frames: FrameCount = 96,
    size: SizeText = None,
    fps: Fps = None,
    seconds: Seconds = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    positions: Positions = "rebase",
    rebase: Rebase = "trained",
    reuse: Reuse = "exact",
    out: Annotated[Path, typer.Option(help="folder for video, report and JSON")] = Path("out"),
    as_json: AsJson = False,
) -> None:
    """Make the same clip with several policies and put them side by side."""
    source = Model(
        name=model, subfolder=subfolder, codec=codec, tokenizer=tokenizer, device=device,
        dtype=dtype,
    )  # fmt: skip
    comparison, paths = _compare(
        prompt, policies, out, source=source, image=image, frames=frames, seed=seed,
        positions=positions, rebase=rebase, reuse=reuse, size=parse_size(size),
        **given(steps=steps, guidance=guidance, fps=fps, seconds=seconds),
    )  # fmt: skip
    if as_json:
        print_json(comparison.to_json())
        return
    _print_comparison(comparison, paths)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for video, report and JSON")] = Path("out/demo"),
    frames: FrameCount = DEMO_FRAMES,
    as_json: AsJson = False,
) -> None:
    """See it work: one clip, four caches, three numbers. No GPU, no download."""
    from packcache.inspect.demo import load_clip

    clip = load_clip()
    out.parent.mkdir(parents=True, exist_ok=True)
    comparison, paths = _compare(
        clip.prompt,
        DEMO_POLICIES,
        out,
        about=lambda made: clip.about(_readings(made, clip.scene)),
        source=Model(),
        video=clip.given,
        frames=frames,
        seed=clip.seed,
    )
    if as_json:
        print_json(comparison.to_json())
        return
    _print_comparison(comparison, paths)


def _compare(
    prompt: str,
    policies: str,
    out: Path,
    *,
    about: Callable[[Any], Any] = lambda _: None,
    source: Model,
    frames: int,
    **settings: Any,
) -> tuple[Any, dict[str, Path]]:
    from packcache import files
    from packcache.inspect import report
    from packcache.inspect.compare import compare as run
    from packcache.policies import parse_policies

    chosen = parse_policies(policies)
    files.check_output_folder(out)
    pipeline = source.load()
    with progress("comparing") as advance:
        comparison = run(pipeline, prompt, chosen, frames=frames, on_frame=advance, **settings)
    out.mkdir(exist_ok=True)
    return comparison, report.save(comparison, out, about(comparison))


def _readings(comparison: Any, scene: Any) -> dict[str, str]:
    """What came out from behind the curtain, by policy; nothing without the reader's extra."""
    from packcache.evaluate import truth

    try:
        reader = truth.reader()
    except InvalidSetting:
        return {}
    words = {}
    for entry in comparison.entries:
        found = truth.recall(entry.clip.frames, scene, reader)
        digit, colour = ("right" if right else "wrong" for right in (found.digit, found.colour))
        both = f"digit and colour {digit}"
        told = both if digit == colour else f"digit {digit}, colour {colour}"
        words[entry.label] = told if found.found else "cannot be read"
    return words


def _print_comparison(comparison: Any, paths: dict[str, Path]) -> None:
    from packcache.inspect import report

    for number, what in report.headline(comparison):
        print(f"{number:>24}  {what}")
    print(f"watch {paths['compare.mp4']}, open {paths['report.html']}")


def main() -> None:
    """Entry point: every expected failure is one line on stderr and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="packcache: %(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    warnings.formatwarning = lambda message, *_, **__: str(message)
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except PackCacheError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except OSError as error:
        _fail(f"{error.strerror or error}: the output could not be written", 1)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        # the parser's own errors; their class has moved between versions of typer
        _fail(f"{error.format_message()} See packcache --help.", 2)  # type: ignore[attr-defined]
    if code == _INTERRUPTED:
        _fail("interrupted; nothing half-written was left", _INTERRUPTED)
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"packcache: {message}", file=sys.stderr)
    raise SystemExit(code)
