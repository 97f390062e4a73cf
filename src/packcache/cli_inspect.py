"""`packcache inspect` and `packcache calibrate`: where attention goes, and settings that follow."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from packcache.cli_options import POLICIES_HELP, AsJson, Seed
from packcache.console import print_json, progress
from packcache.errors import InputFileError, InvalidSetting

if TYPE_CHECKING:
    from packcache.inspect.calibrate import Calibration
    from packcache.inspect.decay import Decay, DistanceAttention, RoleAttention
    from packcache.inspect.trace import Trace
    from packcache.policies import Policy

__all__ = ["calibrate", "inspect"]

#: What `--json` prints.
SCHEMA = "packcache.inspect/1"

#: Whose kept tokens are drawn, unless asked otherwise.
POLICIES = "full,window,packcache"

#: What is recorded of the embedded model: clips, and pixel frames of each.
CLIPS, FRAMES = 4, 49

Source = Annotated[
    str, typer.Argument(help="a trace, or digits: traced on the spot", show_default=False)
]
Policies = Annotated[
    str | None,
    typer.Option(
        "--policies", help=f"whose kept tokens to draw: {POLICIES_HELP} [full,window,packcache]"
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option("--tolerance", help="attention that may be lost, of what full looks at"),
]
Trained = Annotated[
    int | None,
    typer.Option("--trained", help="latent frames the model was trained on [as the trace says]"),
]


def inspect(
    source: Source,
    policies: Policies = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder for JSON and pictures")] = None,
    clip: Annotated[
        int | None, typer.Option("--clip", help="whose kept tokens to draw [0]")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Where does attention go? By role and by distance, and whether it decays."""
    from packcache import files
    from packcache.inspect.attention_plot import figure_class, plot_attention, plot_kept
    from packcache.inspect.decay import attention_by_distance, attention_by_role

    drawn = _drawn(policies, clip, out)
    if out is not None:
        files.check_output_folder(out)
        figure_class()  # or all would be recorded in vain
    trace = _trace(source, seed, drawn)
    roles, curve = attention_by_role(trace), attention_by_distance(trace)
    result = {
        "schema": SCHEMA,
        "environment": trace.environment,
        "workload": trace.workload,
        "roles": roles.to_json(),
        "distance": curve.to_json(),
    }
    if out is not None and drawn is not None:
        out.mkdir(exist_ok=True)
        plot_attention(trace, out / "attention.png")
        plot_kept(trace, drawn.policies, out / "kept.png", clip=drawn.clip)
        files.write_json(result, out / "inspect.json")
    if as_json:
        print_json(result)
        return
    print(*_role_lines(roles), "", *_decay_lines(curve), sep="\n")
    if out is not None:
        print(f"look at {out / 'attention.png'} and {out / 'kept.png'}")


def calibrate(
    source: Source,
    tolerance: Tolerance = None,
    trained: Trained = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON of the settings")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Which half-life, window, budget and floor lose no more attention than is tolerated?"""
    from packcache import files
    from packcache.inspect.calibrate import TOLERANCE, check_tolerance
    from packcache.inspect.calibrate import calibrate as run

    tolerance = TOLERANCE if tolerance is None else tolerance
    check_tolerance(tolerance)
    if out is not None:
        files.check_folder(out.parent)
    trace = _trace(source, seed)
    with progress("calibrating") as advance:
        found = run(trace, tolerance=tolerance, trained_latent_frames=trained, on_step=advance)
    if out is not None:
        found.save(out)
    if as_json:
        print_json(found.to_json())
        return
    print(*_calibration_lines(found), sep="\n")
    if out is not None:
        print(f"wrote {out}: --policy {out} and PackCache.from_file load it")


class _Drawn(NamedTuple):
    """Whose kept tokens are to be drawn, of which clip."""

    policies: dict[str, Policy]
    clip: int


def _drawn(policies: str | None, clip: int | None, out: Path | None) -> _Drawn | None:
    """What is to be drawn, None without a folder; raises for options that would say nothing."""
    from packcache.policies import parse_policies

    chosen = parse_policies(POLICIES if policies is None else policies)
    if out is not None:
        return _Drawn(chosen, clip or 0)
    for name, given in (("--clip", clip), ("--policies", policies)):
        if given is not None:
            raise InvalidSetting(
                f"{name} {given} without --out: it says what is drawn there, name a folder"
            )
    return None


def _trace(source: str, seed: int, drawn: _Drawn | None = None) -> Trace:
    """A trace from its file, or of the embedded model, recorded now; what is drawn fits it."""
    from packcache.inspect.attention_plot import kept_frames
    from packcache.inspect.trace import Trace

    if source == "digits":
        return _recorded(seed, drawn)
    if not Path(source).exists():
        raise InputFileError(
            f"{source} does not exist: expected a trace, as packcache trace record writes it, or "
            "digits, which is traced on the spot"
        )
    trace = Trace.load(Path(source))
    if drawn is not None:
        kept_frames(trace, *drawn)
    return trace


def _recorded(seed: int, drawn: _Drawn | None) -> Trace:
    """Clips of the embedded model from their condition images, as the paper makes them."""
    from packcache.inspect import record
    from packcache.inspect.attention_plot import check_clip
    from packcache.inspect.score import check_told
    from packcache.models import load

    prompts, images = record.scenes(CLIPS, with_image=True, seed=seed)
    pipeline = load("digits")
    if drawn is not None:  # before minutes of recording
        check_clip(drawn.clip, range(CLIPS))
        for policy in drawn.policies.values():
            check_told(policy)
            pipeline.run(prompts[:1], image=(images or [])[:1], frames=FRAMES, policy=policy)
    with progress("recording") as advance:
        return record.record(
            pipeline, prompts, images=images, frames=FRAMES, seed=seed, on_frame=advance
        )


def _role_lines(roles: RoleAttention) -> list[str]:
    """Shares in percent: all, by layer, by step."""
    from packcache.inspect.decay import PARTS

    def row(name: str, shares: Iterable[float]) -> str:
        return f"{name:12}" + "".join(f"{100 * share:17.1f}" for share in shares)

    lines = ["attention, %".ljust(12) + "".join(f"{part:>17}" for part in PARTS)]
    lines.append(row("all", roles.whole.mean))
    layers = zip(roles.layers, roles.by_layer.mean, strict=True)
    lines += [row(f"layer {layer}", shares) for layer, shares in layers]
    for step, shares in _ends(roles):
        lines.append(row("commit" if step < 0 else f"step {step}", shares))
    return lines


def _ends(roles: RoleAttention) -> list[tuple[int, Any]]:
    """First and last denoising step, and the commit, as far as they were recorded."""
    steps = list(zip(roles.steps, roles.by_step.mean, strict=True))
    made = [pair for pair in steps if pair[0] >= 0]
    return [*made[:1], *made[1:][-1:], *(pair for pair in steps if pair[0] < 0)]


def _decay_lines(curve: DistanceAttention) -> list[str]:
    """A line a layer: what the fit says, and whether to believe it."""
    lines = [f"{'decay':12}{'rho':>8}{'half-life':>12}{'(95 %)':>18}{'R2':>7}  verdict"]
    fits = curve.fits()
    lines += [_decay_line("all" if row == "all" else f"layer {row}", f) for row, f in fits.items()]
    lines.append(f"all: {fits['all'].reason}")
    return lines


def _decay_line(name: str, fit: Decay) -> str:
    bounds = f"({fit.half_life_low:.2f} to {fit.half_life_high:.2f})"
    return f"{name:12}{fit.rho:8.3f}{fit.half_life:12.2f}{bounds:>18}{fit.r2:7.2f}  {fit.verdict}"


def _calibration_lines(found: Calibration) -> list[str]:
    """The frontier that was tried, the choice, what the fit says."""
    lines = [f"{'budget':>8}{'window':>8}{'half-life':>11}{'floor':>8}{'order':>10}{'lost':>9}"]
    for trial in found.trials:
        own = trial.settings
        lines.append(
            f"{own['budget']:8g}{own['window']:8}{own['half_life']:11g}"
            f"{own['min_share']:8g}{own['order']:>10}{trial.mean:9.2%}"
            + ("  beyond the trained range" if trial.beyond else "")
            + ("  <-" if trial is found.chosen else "")
        )
    lines.append(f"{found.policy!r}: {found.told}")
    lines.append(f"decay: {found.fit.verdict}, {found.fit.reason}")
    return lines
