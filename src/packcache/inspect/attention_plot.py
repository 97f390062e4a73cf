"""Pictures of a trace: where attention goes and how it decays; which tokens a policy keeps.

`plot_attention` draws what `decay` reads, `plot_kept` the tokens that policies hold at the end.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from packcache.errors import InvalidSetting
from packcache.files import check_folder, replacing
from packcache.inspect.decay import (
    PARTS,
    Decay,
    DistanceAttention,
    RoleAttention,
    attention_by_distance,
    attention_by_role,
    frame_mass,
)
from packcache.inspect.score import replay
from packcache.inspect.trace import Sample, Trace
from packcache.policies import Policy
from packcache.timeline import HeldFrame, Role

__all__ = [
    "check_clip",
    "check_name",
    "figure_class",
    "kept_frames",
    "plot_attention",
    "plot_kept",
]

_INK, _SOFT, _GRID = "#22242c", "#7d8290", "#e6e8ee"

#: Of `PARTS`: text, condition image, history, current.
_PART_COLOURS = ("#868e96", "#e8a200", "#1971c2", "#e8590c")

#: Of the fit by its verdict.
_GOOD, _BAD = "#2f9e44", "#c2255c"

#: A token's cell: kept, kept though re-masked, given up, given up and re-masked.
_KEPT, _KEPT_MASKED, _GONE, _GONE_MASKED = "#1971c2", "#a5cdf2", "#e3e6ec", "#f3f4f7"

#: History frames of which attention is drawn, grids that stand in one row; frames of which kept
#: tokens are drawn, tokens a row up to which cells get a line around them.
_NEWEST, _BESIDE, _FRAMES, _LINED = 4, 3, 14, 24

#: Cells of a heat-map up to which each has its number.
_CELLS = 120

Floats = NDArray[Any]  # float64; numpy does not follow it through arithmetic
Size = tuple[float, float]


def figure_class() -> Any:
    """What pictures are drawn on. Raises InvalidSetting without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidSetting("a picture needs matplotlib: pip install 'packcache[plot]'") from error
    return Figure


def check_name(path: Path) -> None:
    """Raises InvalidSetting for what cannot be drawn."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise InvalidSetting(f"cannot draw {path.name!r}: known are .png and .svg")


def plot_attention(trace: Trace, path: str | Path) -> Path:
    """Four pictures in one, as .png or .svg: anchors, decay, the shift over steps, the newest.

    Raises InputError for a trace without history, InvalidSetting without matplotlib.
    """
    roles, curve = attention_by_role(trace), attention_by_distance(trace)
    figure = _figure(path, (12.4, 8.6))
    _headline(figure, "Where attention goes", _told(trace))
    _anchors(figure, (0.055, 0.56, 0.36, 0.29), roles)
    _decay(figure.add_axes((0.545, 0.56, 0.43, 0.29)), curve)
    _shift(figure.add_axes((0.055, 0.085, 0.36, 0.30)), roles)
    _newest(figure, (0.545, 0.085, 0.43, 0.30), trace)
    return _save(figure, path)


def check_clip(clip: int, clips: range) -> None:
    """Raises InvalidSetting for a clip that is not there."""
    if clip not in clips:
        raise InvalidSetting(
            f"clip is {clip}, expected 0 to {clips.stop - 1}, the clips of the trace"
        )


def kept_frames(
    trace: Trace, policies: Mapping[str, Policy], clip: int = 0
) -> dict[str, dict[int, HeldFrame]]:
    """What each policy holds after the last commit of a clip, by latent frame; text is -1.

    Raises InvalidSetting for a clip that is not there, no policy, or one that a trace cannot serve.
    """
    if not policies:
        raise InvalidSetting("no policy to draw: give at least one")
    check_clip(clip, trace.clips)
    return {
        label: {entry.span.frame: entry for entry in replay(trace, policy, clip).entries}
        for label, policy in policies.items()
    }


def plot_kept(
    trace: Trace, policies: Mapping[str, Policy], path: str | Path, *, clip: int = 0
) -> Path:
    """Tokens held after the last commit of a clip: a row a policy, a grid a latent frame.

    Grids show content tokens; the numbers below count border and new-line tokens too. Of more than
    fourteen latent frames the first two and the newest are shown.
    """
    held = kept_frames(trace, policies, clip)
    frames = _shown(len(trace.roles))
    cell = min(1.0, 10.5 / len(frames))
    height = cell * trace.layout.rows / trace.layout.cols
    row, top, left = height + 0.42, 1.15, 2.3
    size = (left + len(frames) * (cell + 0.1) + 0.3, top + len(policies) * row + 0.45)
    figure = _figure(path, size)
    _headline(figure, f"Tokens kept after latent frame {len(trace.roles) - 1}", _told(trace))
    for number, (label, entries) in enumerate(held.items()):
        below = top + number * row
        count = sum(entry.count for entry in entries.values() if entry.span.role is Role.HISTORY)
        _policy_name(figure, label, count, below, size)
        for column, frame in enumerate(frames):
            corner = (left + column * (cell + 0.1), below)
            axes = _place(figure, corner, (cell, height), size)
            _kept_grid(axes, trace, frame, entries.get(frame))
            if number == 0:
                axes.set_title(_frame_name(trace, frame), fontsize=7, color=_SOFT, pad=3)
    _key(figure, size, masked=trace.visible is not None)
    return _save(figure, path)


# --- the pictures of attention -----------------------------------------------------------------


def _anchors(figure: Any, box: tuple[float, ...], roles: RoleAttention) -> None:
    """Layers by latent frame: attention on what never decays."""
    kept = [number for number, part in enumerate(PARTS) if Role.HISTORY.value != part][:-1]
    share = roles.by_frame[..., kept].sum(axis=-1)
    left, bottom, width, height = box
    axes = figure.add_axes((left, bottom, width * 0.93, height))
    _title(axes, "Anchors", "share of attention on text and condition image, mean over steps")
    most = max(0.05, float(share.max()))
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=most, aspect="auto", origin="lower")
    axes.set_xlabel("latent frame being made", fontsize=8, color=_INK)
    axes.set_ylabel("layer", fontsize=8, color=_INK)
    _ticks(axes.set_xticks, range(len(roles.frames)), roles.frames)
    _ticks(axes.set_yticks, range(len(roles.layers)), roles.layers)
    _quiet(axes, grid=None)
    if share.size <= _CELLS:
        for (row, column), value in np.ndenumerate(share):
            colour = "white" if value > 0.6 * most else _INK
            axes.text(
                column, row, f"{value:.0%}", ha="center", va="center", fontsize=6.5, color=colour
            )
    scale = _scale(figure, (left + width * 0.95, bottom, width * 0.02, height), shown)
    scale.yaxis.set_major_formatter(_percent)


def _decay(axes: Any, curve: DistanceAttention) -> None:
    """Shares of history by distance, a thin line a layer, with the fit and what it is worth."""
    fit = curve.fit()
    _title(axes, "Decay", "share of the attention on history; thin: single layers, late ones dark")
    d = np.array(curve.distances)
    layers = len(curve.rows) - 1
    for number, row in enumerate(curve.share.mean[1:]):
        tint = 0.75 - 0.5 * number / max(1, layers - 1)
        axes.plot(d, _positive(row), color=str(tint), linewidth=0.9, zorder=1)
    mean = curve.share.mean[0]
    bars = np.abs(np.stack((curve.share.low[0], curve.share.high[0])) - mean)
    axes.errorbar(
        d, _positive(mean), bars, fmt="o", color=_INK, markersize=4.5, linewidth=1.2, zorder=3,
        label="all layers",
    )  # fmt: skip
    if fit.verdict != "cannot be told":
        fine = np.linspace(1, d[-1], 100)
        good = fit.verdict == "exponential"
        axes.plot(
            fine, fit.at(fine), color=_GOOD if good else _BAD, linestyle="-" if good else "--",
            linewidth=1.8, label=f"C {fit.rho:.2f}^d", zorder=2,
        )  # fmt: skip
        axes.plot(
            fine, fit.power_at(fine), color=_SOFT, linestyle=":", linewidth=1.4, zorder=2,
            label=f"C d^-{fit.power:.2f}",
        )  # fmt: skip
    _log_shares(axes, curve.share.mean)
    axes.set_xlabel("distance d, latent frames back (1: newest)", fontsize=8, color=_INK)
    _ticks(axes.set_xticks, curve.distances, curve.distances)
    _quiet(axes, grid="y")
    axes.legend(loc="lower left", frameon=False, fontsize=8)
    _verdict(axes, fit)


def _positive(shares: Floats) -> Floats:
    """A logarithmic scale has no place for zero."""
    return np.where(shares > 0, shares, np.nan)


def _log_shares(axes: Any, shares: Floats) -> None:
    """A logarithmic scale in percent, with room for words above."""
    low, high = max(float(np.nanmin(_positive(shares))), 1e-5), float(shares.max())
    room = max(high / low, 4.0)
    low, high = low / room**0.12, high * room**0.4
    ticks = [m * 10.0**k for k in range(-6, 1) for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    if len(ticks) > 9:
        ticks = [10.0**k for k in range(-6, 1) if low <= 10.0**k <= high]
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.minorticks_off()
    axes.set_yticks(ticks, [f"{100 * tick:.3g} %" for tick in ticks])


def _verdict(axes: Any, fit: Decay) -> None:
    good = fit.verdict == "exponential"
    head = f"exponential, half-life {_life(fit)}" if good else fit.verdict
    axes.text(
        0.99, 0.97, head, transform=axes.transAxes, ha="right", va="top", fontsize=9,
        color=_GOOD if good else _BAD, fontweight="bold",
    )  # fmt: skip
    axes.text(
        0.99, 0.905, "\n".join(textwrap.wrap(fit.reason, 64)), transform=axes.transAxes,
        ha="right", va="top", fontsize=7, color=_INK,
    )  # fmt: skip


def _life(fit: Decay) -> str:
    return f"{fit.half_life:.2f} ({fit.half_life_low:.2f} to {fit.half_life_high:.2f}) frames"


def _shift(axes: Any, roles: RoleAttention) -> None:
    """Attention on each part as denoising goes on, the commit apart at the right."""
    _title(axes, "Shift", "share of attention by denoising step, mean over layers and frames")
    steps = [step for step in roles.steps if step >= 0]
    spread = max(1, (steps[-1] - steps[0]) if steps else 1)
    at = [*steps] + [(steps[-1] if steps else 0) + 0.12 * spread] * (len(roles.steps) - len(steps))
    both = roles.by_step
    for number, (part, colour) in enumerate(zip(PARTS, _PART_COLOURS, strict=True)):
        mean, low, high = (bound[:, number] for bound in (both.mean, both.low, both.high))
        if not (mean > 0).any():
            continue  # text-to-video has no condition image
        end = len(steps)
        axes.fill_between(at[:end], low[:end], high[:end], color=colour, alpha=0.18, linewidth=0)
        axes.plot(at[:end], mean[:end], color=colour, linewidth=1.8, marker="o", markersize=3)
        axes.plot(at[end:], mean[end:], color=colour, linestyle="", marker="D", markersize=5)
        axes.plot([], [], color=colour, linewidth=1.8, marker="o", markersize=3, label=part)
    _ticks(axes.set_xticks, steps, steps)
    axes.set_xlabel("denoising step (diamonds: the commit)", fontsize=8, color=_INK)
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(_percent)
    _quiet(axes, grid="y")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.02, 1.07), ncols=4, frameon=False, fontsize=8,
        handlelength=1.6, columnspacing=1.2,
    )  # fmt: skip


def _newest(figure: Any, box: tuple[float, ...], trace: Trace) -> None:
    """One clip's last frame: attention on each content token of what it looks at, as grids."""
    clip = min(sample.clip for sample in trace.samples)
    frame = max(sample.frame for sample in trace.samples if sample.clip == clip)
    samples = [s for s in trace.samples if (s.clip, s.frame) == (clip, frame)]
    shown = _newest_frames(trace, frame)
    grids = _token_grids(trace, samples, shown)
    share = np.mean([frame_mass(trace, s).mean(axis=0) for s in samples], axis=0)
    _title(
        _empty(figure, box),
        f"What latent frame {frame} looks at",
        f"clip {clip}, mean over steps and layers; 1: a token's share if all were seen alike",
    )
    columns = len(shown) if len(shown) <= _BESIDE else -(-len(shown) // 2)
    left, bottom, width, height = box
    wide, high = width * 0.9 / columns, height / -(-len(shown) // columns)
    most = float(np.quantile(grids, 0.998))
    for number, (one, grid) in enumerate(zip(shown, grids, strict=True)):
        row, column = divmod(number, columns)
        below = bottom + height - (row + 1) * high
        axes = figure.add_axes((left + column * wide, below, wide * 0.9, high * 0.78))
        # square roots, or the current frame would leave all others black
        picture = axes.imshow(np.sqrt(grid), cmap="magma", vmin=0, vmax=most**0.5, origin="upper")
        name = "current" if one == frame else _frame_name(trace, one, frame)
        axes.set_title(f"{name}: {share[one]:.1%}", fontsize=8, color=_INK, pad=4)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        if one == frame:
            place = (left + width * 0.93, bottom + height * 0.12, width * 0.018, height * 0.7)
            _roots(_scale(figure, place, picture), most)


def _roots(axes: Any, most: float) -> None:
    """Marks of a colour scale of square roots."""
    marks = [m * 10.0**k for k in range(-1, 4) for m in (1, 2, 5) if m * 10.0**k <= most]
    marks = [0.0, *marks[-5:]]
    axes.set_yticks([mark**0.5 for mark in marks], [f"{mark:g}" for mark in marks])


def _empty(figure: Any, box: tuple[float, ...]) -> Any:
    """Room with nothing but a title."""
    axes = figure.add_axes(box)
    axes.axis("off")
    return axes


def _newest_frames(trace: Trace, frame: int) -> list[int]:
    """Condition image, the newest history frames and the current one."""
    history = [f for f in range(frame) if trace.roles[f] is Role.HISTORY]
    image = [f for f in range(frame) if trace.roles[f] is Role.IMAGE]
    return [*image[:1], *history[-_NEWEST:], frame]


def _token_grids(trace: Trace, samples: Sequence[Sample], shown: Sequence[int]) -> Floats:
    """Attention on content tokens `[frames, rows, cols]`, in units of equal attention to all."""
    layout = trace.layout
    mean = np.stack([s.mass.mean(axis=0) for s in samples]).mean(axis=0, dtype=np.float64)
    frames = (mean * len(mean))[trace.text :].reshape(-1, layout.tokens)
    content = frames[np.asarray(shown)][:, layout.content_offsets()]
    return content.reshape(len(shown), layout.rows, layout.cols)


# --- the picture of kept tokens ----------------------------------------------------------------


def _kept_grid(axes: Any, trace: Trace, frame: int, entry: HeldFrame | None) -> None:
    """One latent frame's content tokens: kept or not, seen or re-masked."""
    layout = trace.layout
    held = np.zeros(layout.tokens, dtype=bool)
    if entry is not None:
        held[entry.held] = True
    seen = np.ones(layout.tokens, dtype=bool)
    if entry is not None:
        seen = entry.span.visible_mask()
    elif trace.visible is not None and trace.roles[frame] is Role.HISTORY:
        seen = trace.visible
    kind = 2 * ~held + ~seen
    palette = (_KEPT, _KEPT_MASKED, _GONE, _GONE_MASKED)
    colours = np.array([list(bytes.fromhex(c[1:])) for c in palette], dtype=np.uint8)
    cells = kind[layout.content_offsets()].reshape(layout.rows, layout.cols)
    axes.imshow(colours[cells], interpolation="nearest", aspect="auto")
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    if layout.cols <= _LINED:
        axes.set_xticks(np.arange(0.5, layout.cols - 1), minor=True)
        axes.set_yticks(np.arange(0.5, layout.rows - 1), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    count = int(held.sum())
    axes.set_xlabel(str(count), fontsize=7, color=_INK if count else _SOFT, labelpad=3)


def _policy_name(figure: Any, label: str, held: int, below: float, size: Size) -> None:
    """Name, settings and tokens held, left of a row of grids."""
    name, _, settings = label.partition(":")
    lines = textwrap.wrap(settings.replace(",", ", "), 30)[:3]
    _write(figure, (0.3, below + 0.02), name, size, fontsize=10, color=_INK, fontweight="bold")
    for number, line in enumerate(lines):
        _write(figure, (0.3, below + 0.22 + 0.13 * number), line, size, fontsize=6.5, color=_SOFT)
    after = below + 0.26 + 0.13 * len(lines)
    _write(figure, (0.3, after), f"{held} history tokens", size, fontsize=7.5, color=_INK)


def _key(figure: Any, size: Size, *, masked: bool) -> None:
    """What the colours of cells mean, below."""
    kinds = [(_KEPT, "kept"), (_KEPT_MASKED, "kept, re-masked"), (_GONE, "given up")]
    kinds.append((_GONE_MASKED, "given up, re-masked"))
    x, y = 2.3, size[1] - 0.28
    for colour, word in kinds if masked else kinds[::2]:
        square = _place(figure, (x, y), (0.14, 0.14), size)
        square.set_facecolor(colour)
        square.set_xticks([])
        square.set_yticks([])
        square.spines[:].set_visible(False)
        _write(figure, (x + 0.2, y + 0.01), word, size, fontsize=7.5, color=_INK)
        x += 0.45 + 0.07 * len(word)


def _shown(frames: int) -> list[int]:
    """All latent frames, or the first two, image and sink perhaps, and the newest."""
    if frames <= _FRAMES:
        return list(range(frames))
    return [0, 1, *range(frames - _FRAMES + 2, frames)]


# --- what both share ---------------------------------------------------------------------------


def _figure(path: str | Path, size: Size) -> Any:
    """An empty sheet, if the file can be written and matplotlib is there."""
    check_name(Path(path))
    check_folder(Path(path).parent)
    return figure_class()(figsize=size, dpi=160, facecolor="white")


def _save(figure: Any, path: str | Path) -> Path:
    with replacing(Path(path)) as draft:
        figure.savefig(draft)
    return Path(path)


def _headline(figure: Any, title: str, told: str) -> None:
    size = tuple(figure.get_size_inches())
    _write(figure, (0.3, 0.2), title, size, fontsize=14, color=_INK, fontweight="bold")
    _write(figure, (0.3, 0.48), told, size, fontsize=8.5, color=_SOFT)


def _told(trace: Trace) -> str:
    """What was traced, in a line."""
    clips = len({sample.clip for sample in trace.samples})
    layers, images = len(trace.layers), trace.roles.count(Role.IMAGE)
    made = sum(sample.frame >= images for sample in trace.samples)  # an image is given
    return (
        f"{trace.workload.get('model', 'a model')}, {clips} clip{'s' * (clips != 1)} of "
        f"{len(trace.roles)} latent frames, {trace.layout.tokens} tokens each; "
        f"{layers} of {trace.num_layers} layers; sampled queries of {made} forwards"
    )


def _frame_name(trace: Trace, frame: int, current: int | None = None) -> str:
    """The condition image, or a frame's number and distance."""
    if trace.roles[frame] is Role.IMAGE:
        return f"image ({frame})"
    now = len(trace.roles) if current is None else current
    return f"{frame}  (d = {now - frame})"


def _place(
    figure: Any, corner: tuple[float, float], extent: tuple[float, float], size: Size
) -> Any:
    """Axes by inches from the upper left corner."""
    width, height = size
    low = height - corner[1] - extent[1]
    box = (corner[0] / width, low / height, extent[0] / width, extent[1] / height)
    return figure.add_axes(box)


def _write(figure: Any, corner: tuple[float, float], text: str, size: Size, **style: Any) -> None:
    """Text by inches from the upper left corner."""
    figure.text(corner[0] / size[0], 1 - corner[1] / size[1], text, va="top", **style)


def _title(axes: Any, title: str, told: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK, pad=20, fontweight="bold")
    axes.annotate(
        told, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points", fontsize=7.5,
        color=_SOFT,
    )  # fmt: skip


def _quiet(axes: Any, *, grid: Literal["y"] | None) -> None:
    """The house's axes: few lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    axes.tick_params(labelsize=7.5, labelcolor=_INK, color=_SOFT, length=2.5)
    if grid:
        axes.grid(axis=grid, color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)


def _ticks(place: Callable[..., Any], at: Sequence[float], names: Sequence[object]) -> None:
    """Up to about a dozen ticks."""
    every = max(1, -(-len(at) // 13))
    place(list(at)[::every], [str(name) for name in names][::every])


def _scale(figure: Any, box: tuple[float, ...], shown: Any) -> Any:
    """A thin colour scale; returns its axes."""
    axes = figure.add_axes(box)
    bar = figure.colorbar(shown, cax=axes)
    bar.outline.set_visible(False)
    axes.tick_params(labelsize=7, labelcolor=_INK, length=0)
    return axes


def _percent(share: float, _: int) -> str:
    return f"{share:.0%}"
