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
from packcache import cli_evaluate
from packcache.console import print_json, progress
from packcache.errors import InvalidSetting, PackCacheError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_evaluate.app, name="evaluate")

Prompt = Annotated[str, typer.Argument(help="what to show, e.g. 'a red 3 moving right'")]
ImageFile = Annotated[Path | None, typer.Option("--image", help="first frame of the clip")]
ModelName = Annotated[str, typer.Option("--model", help="a model that comes with the package")]
FrameCount = Annotated[int, typer.Option("--frames", help="pixel frames to make")]
Seed = Annotated[int, typer.Option("--seed", help="seed of the draws")]
Steps = Annotated[int | None, typer.Option("--steps", help="denoising steps a frame [model's own]")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="text guidance [model's own]")]
Positions = Annotated[str, typer.Option("--positions", help="rebase or absolute")]
Rebase = Annotated[
    str, typer.Option("--rebase", help="trained (as far as needed) or slide (paper)")
]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON")]

POLICIES_HELP = (
    "full, window, sink, uniform, random, packcache, none; settings as packcache:budget=1"
)

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


@app.command()
def generate(
    prompt: Prompt,
    image: ImageFile = None,
    model: ModelName = "digits",
    policy: Annotated[str, typer.Option(help=POLICIES_HELP)] = "packcache",
    budget: Annotated[str | None, typer.Option(help="latent frames, or 4084tok, 512MiB")] = None,
    window: Annotated[int | None, typer.Option(help="latent frames that may hold tokens")] = None,
    frames: FrameCount = 48,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    positions: Positions = "rebase",
    rebase: Rebase = "trained",
    out: Annotated[Path, typer.Option(help=".mp4, .gif, or a folder of PNG")] = Path("clip.mp4"),
    as_json: AsJson = False,
) -> None:
    """Make one clip."""
    from packcache import video
    from packcache.lumos.pipeline import load
    from packcache.policies import parse_policy

    chosen = parse_policy(_with_settings(policy, budget=budget, window=window))
    video.check_output(out)
    pipeline = load(model)
    with progress("generating") as advance:
        clip = pipeline.generate(
            prompt,
            frames=frames,
            image=image,
            policy=chosen,
            seed=seed,
            positions=positions,
            rebase=rebase,
            on_frame=advance,
            **_given(steps=steps, guidance=guidance),
        )
    clip.save(out)
    if as_json:
        print_json(clip.to_json(pipeline))
        return
    stats = clip.stats
    print(f"{out}: {len(clip.frames)} frames with {clip.policy!r}")
    print(
        f"{stats.total_s:.2f} s in all, {stats.last_s:.3f} s for the last latent frame, "
        f"cache {stats.kv_bytes[-1] / 1e6:.2f} MB at the end"
    )


@app.command()
def compare(
    prompt: Prompt,
    policies: Annotated[str, typer.Option(help=POLICIES_HELP)] = "full,window,packcache",
    image: ImageFile = None,
    model: ModelName = "digits",
    frames: FrameCount = 96,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    positions: Positions = "rebase",
    rebase: Rebase = "trained",
    out: Annotated[Path, typer.Option(help="folder for video, report and JSON")] = Path("out"),
    as_json: AsJson = False,
) -> None:
    """Make the same clip with several policies and put them side by side."""
    comparison, paths = _compare(
        prompt, policies, out, model=model, image=image, frames=frames, seed=seed,
        positions=positions, rebase=rebase, **_given(steps=steps, guidance=guidance),
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
        model="digits",
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
    model: str,
    frames: int,
    **settings: Any,
) -> tuple[Any, dict[str, Path]]:
    from packcache import video
    from packcache.inspect import report
    from packcache.inspect.compare import compare as run
    from packcache.lumos.pipeline import load
    from packcache.policies import parse_policies

    chosen = parse_policies(policies)
    video.check_output_folder(out)
    pipeline = load(model)
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


def _with_settings(policy: str, **settings: str | int | None) -> str:
    """`--budget` and `--window` are short for settings of the policy."""
    extra = [f"{key}={value}" for key, value in settings.items() if value is not None]
    if not extra:
        return policy
    return policy + ("," if ":" in policy else ":") + ",".join(extra)


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def main() -> None:
    """Entry point: every expected failure is one line on stderr and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="packcache: %(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    warnings.formatwarning = lambda message, *_, **__: str(message)
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except PackCacheError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _INTERRUPTED
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
