"""Rows at true widths on a machine that could not run them: sums of measured pieces, by name.

    pieces = measure(workload)                            # a layer, one group of heads
    compose(workload, pieces, "packcache", reuse).total   # any depth

How often each piece occurs in a latent frame is counted from what the engine does: steps, commit,
layers, branches, groups of heads. Straight lines lie between measured numbers of rows; numbers of
keys are those that occur. The unconditional branch counts with the conditional one's keys, which
are more by the prompt.

Upstream's way (`stock`) is one step timed at three latent frames with one layer, and once without:
a layer is the difference, straight lines lie between the frames. Its masks, positions, text, given
frames and commits are left out, which makes it faster than it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from packcache.bench.parts import FrameTime, Workload
from packcache.bench.pieces import Estimate, Piece, Pieces, Probe, interleave, knots
from packcache.bench.predict import STOCK, held_tokens
from packcache.bench.probes import (
    STOCKS,
    Probes,
    cut,
    decoder,
    groups_at_once,
    shallow_model,
)
from packcache.errors import InputError, PackCacheError
from packcache.lumos.model import Lumos
from packcache.lumos.schedule import undecided
from packcache.reuse import StepReuse

__all__ = [
    "CHECKED_WITHIN", "Checked", "Composed", "Use", "check", "compose", "frame_uses", "measure",
    "needed", "stock_frames",
]  # fmt: skip

#: Share of a frame's time by kind of piece; what is not here is bookkeeping.
SHARES = {
    "attend": "attention",
    "current": "attention",
    "history": "attention",
    "layer": "linear",
    "ends": "linear",
    "step": "head",
    "frame": "head",
}

#: Row counts between which straight lines are drawn: each at least this part of the next. The head
#: takes seconds a step and works in slices of equal size, so fewer will do.
RATIO, HEAD_RATIO = 2.0, 3.0

#: What is composed should be so near to what is really run.
CHECKED_WITHIN = 0.05


@dataclass(frozen=True, kw_only=True)
class Use:
    """A piece, and how often it counts in a part of a latent frame: steps, forward, bookkeeping."""

    piece: Piece
    times: float
    part: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Composed:
    """A row put together; without `frames` it could not be, and `reason` says why.

    `frames` are of all latent frames, given ones first. `total` is the prefill and all of them.
    """

    frames: tuple[FrameTime, ...] = ()
    prefill: float = 0.0
    total: Estimate | None = None
    last: Estimate | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Checked:
    """A network of a few `layers`, really run and composed: seconds of its steps, or the commit's
    forward (`part`), and what was composed as a multiple of what was measured.

    Latent frame `frame`, its `steps` by number (None: all), medians of `repeats`.
    """

    layers: int
    part: str
    frame: int
    steps: tuple[int, ...] | None
    repeats: int
    measured: Estimate
    composed: Estimate
    ratio: Estimate

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "part": self.part,
            "frame": self.frame,
            "steps": None if self.steps is None else list(self.steps),
            "repeats": self.repeats,
            "measured_s": self.measured.value,
            "composed_s": self.composed.value,
            "ratio": self.ratio.value,
            "ratio_interval": [self.ratio.low, self.ratio.high],
        }


def measure(
    workload: Workload,
    *,
    model: Lumos | None = None,
    on_run: Callable[[int, int], None] | None = None,
    on_round: Callable[[Pieces], None] | None = None,
) -> Pieces:
    """All pieces of the workload's rows, `repeats` times in turns, after a warm-up.

    The first layers and the ends are taken from `model` (at least two, and as many as the
    workload's `layers`), or are random. A piece that fails is in `Pieces.failed`; the rows made of
    it have its reason. `on_run` and `on_round` as for `interleave`: rows can be composed after
    every round.
    """
    layers = max(2, workload.layers or 1)
    with torch.inference_mode():
        probes = Probes(workload, model or shallow_model(workload, layers)).of(needed(workload))
        return interleave(
            probes, workload.repeats, seed=workload.seed, on_run=on_run, on_round=on_round
        )


def compose(
    workload: Workload,
    pieces: Pieces,
    label: str,
    reuse: StepReuse,
    *,
    layers: int | None = None,
) -> Composed:
    """The row of a policy by label and what its steps reuse, at the config's depth or another.

    The label `stock` is upstream's way, which has no prefill of its own and no bookkeeping.
    """
    depth = workload.config.num_hidden_layers if layers is None else layers
    try:
        clip = list(_clip_uses(workload, label, reuse, depth))
    except PackCacheError as error:
        return Composed(reason=str(error))
    text = Piece("prefill", workload.text_tokens)
    prefill = [] if label == STOCK else [Use(piece=text, times=depth, part="prefill")]
    whole = _weights(pieces, [*prefill, *(use for frame in clip for use in frame)])
    reason = pieces.reason(whole)
    if reason is not None:
        return Composed(reason=reason)
    return Composed(
        frames=tuple(_frame_time(pieces, frame) for frame in clip),
        prefill=_seconds(pieces, prefill),
        total=pieces.estimate(whole),
        last=pieces.estimate(_weights(pieces, clip[-1])),
    )


# --- what a latent frame is made of -------------------------------------------------------------


def needed(workload: Workload) -> list[Piece]:
    """What must be measured for all rows, policies x presets: of each kind some numbers of rows.

    A policy that cannot fit needs nothing.
    """
    uses: list[Use] = []
    for label in workload.policies:
        for reuse in workload.presets.values():
            try:
                uses += [
                    use for frame in _clip_uses(workload, label, reuse, layers=2) for use in frame
                ]
            except PackCacheError:
                continue
    prefill = [Piece("prefill", workload.text_tokens)] if uses else []
    stock = _stock_pieces(workload) if STOCK in workload.baselines else []
    return [*_thinned(use.piece for use in uses), *prefill, *stock]


def stock_frames(workload: Workload) -> list[int]:
    """The latent frames at which upstream's way is timed: first, middle and last generated."""
    first, last = workload.given, workload.latents - 1
    return sorted({first, (first + last) // 2, last})


def _stock_pieces(workload: Workload) -> list[Piece]:
    whole, ends = STOCKS
    return [Piece(ends, 0), *(Piece(whole, frame) for frame in stock_frames(workload))]


def _stock_uses(workload: Workload, layers: int) -> Iterator[list[Use]]:
    """Each latent frame of a clip upstream's way; nothing of given ones."""
    whole, ends = STOCKS
    for frame in range(workload.latents):
        steps = workload.sampling.steps if frame >= workload.given else 0
        yield [
            Use(piece=Piece(whole, frame), times=steps * layers, part="steps"),
            Use(piece=Piece(ends, 0), times=steps * (1 - layers), part="steps"),
        ] * bool(steps)


def frame_uses(
    workload: Workload,
    held: int,
    reuse: StepReuse,
    layers: int,
    *,
    given: bool = False,
    steps: Sequence[int] | None = None,
) -> Iterator[Use]:
    """The network in one latent frame on top of `held` tokens; `steps` alone, if named."""
    tokens, content = workload.layout.tokens, workload.layout.content
    calls = workload.sampling.branches * workload.config.num_key_value_heads
    calls = calls / groups_at_once(workload)  # of attention, in a layer
    left = [] if given else undecided(content, workload.sampling.steps)
    works = reuse.works(left, tokens)
    made = range(len(left)) if steps is None else () if given else steps
    for number in made:
        work = works[number]
        rows = tokens if work.rows is None else work.rows
        yield Use(piece=Piece("step", left[number]), times=1, part="steps")
        yield Use(piece=Piece("layer", rows), times=layers, part="steps")
        if not reuse.keeps_history:
            yield Use(piece=Piece("attend", rows, held), times=calls * layers, part="steps")
            continue
        yield Use(piece=Piece("current", rows), times=calls * layers, part="steps")
        anew = rows if work.fresh is None else work.fresh
        if anew:
            yield Use(piece=Piece("history", anew, held), times=calls * layers, part="steps")
    if len(made):  # each step was timed with what a frame pays once
        yield Use(piece=Piece("frame", 0), times=1 - len(made), part="steps")
    yield Use(piece=Piece("ends", 0), times=1, part="forward")
    yield Use(piece=Piece("layer", tokens), times=layers, part="forward")
    yield Use(piece=Piece("attend", tokens, held), times=calls * layers, part="forward")


def _clip_uses(
    workload: Workload, label: str, reuse: StepReuse, layers: int
) -> Iterator[list[Use]]:
    """Each latent frame of a clip under a policy. Raises InvalidSetting for one that cannot fit."""
    if label == STOCK:
        yield from _stock_uses(workload, layers)
        return
    for frame, held in enumerate(held_tokens(workload, workload.policies[label])):
        given = frame < workload.given
        yield [
            *frame_uses(workload, held, reuse, layers, given=given),
            Use(piece=Piece("cache", frame, 0, label), times=1, part="bookkeeping"),
            Use(piece=Piece("deeper", frame, 0, label), times=layers - 1, part="bookkeeping"),
        ]


def _thinned(pieces: Iterable[Piece]) -> list[Piece]:
    """Of each kind and number of keys, as many numbers of rows as straight lines need."""
    counts: dict[tuple[str, int, str], set[int]] = {}
    for piece in pieces:
        counts.setdefault((piece.kind, piece.held, piece.label), set()).add(piece.rows)
    chosen: list[Piece] = []
    for (kind, held, label), rows in counts.items():
        ratio = HEAD_RATIO if kind == "step" else RATIO
        few = sorted(rows) if label else knots(rows, ratio)
        chosen += [Piece(kind, count, held, label) for count in few]
    return chosen


# --- sums ---------------------------------------------------------------------------------------


def _weights(pieces: Pieces, uses: Iterable[Use]) -> dict[Piece, float]:
    """How often each measured piece counts."""
    total: defaultdict[Piece, float] = defaultdict(float)
    for use in uses:
        for piece, share in pieces.between(use.piece).items():
            total[piece] += share * use.times
    return total


def _seconds(pieces: Pieces, uses: Iterable[Use]) -> float:
    return pieces.value(_weights(pieces, uses))


def _frame_time(pieces: Pieces, uses: list[Use]) -> FrameTime:
    steps, forward, bookkeeping = (
        _seconds(pieces, [use for use in uses if use.part == part])
        for part in ("steps", "forward", "bookkeeping")
    )
    shares = {
        name: _seconds(pieces, [use for use in uses if SHARES.get(use.piece.kind) == name])
        for name in dict.fromkeys(SHARES.get(use.piece.kind) for use in uses)
        if name is not None
    }
    return FrameTime(steps=steps, forward=forward, bookkeeping=bookkeeping, shares=shares)


# --- the check ----------------------------------------------------------------------------------


def check(
    workload: Workload,
    layers: Sequence[int] = (4, 8),
    *,
    reuse: StepReuse | None = None,
    steps: Sequence[int] | None = (0,),
    repeats: int | None = None,
    model: Lumos | None = None,
) -> list[Checked]:
    """Steps and commit of the first generated latent frame, really run with a few layers, beside
    what composition says of them; full cache, both measured in turns.

    `steps` by number, None for all, which is what reuse needs; `repeats` as the workload's unless
    told otherwise. `model` has as many layers at least.
    """
    reuse = reuse or StepReuse()
    with torch.inference_mode():
        deep = model or shallow_model(workload, max(layers))
        held = workload.text_tokens + workload.given * workload.layout.tokens
        uses = {n: list(frame_uses(workload, held, reuse, n, steps=steps)) for n in layers}
        whole = [_whole(workload, cut(deep, n), reuse, steps) for n in layers]
        parts = _thinned(use.piece for own in uses.values() for use in own)
        probes = [*Probes(workload, deep).of(parts), *whole]
        pieces = interleave(probes, repeats or workload.repeats, seed=workload.seed)
    numbers = None if steps is None else tuple(steps)
    return [
        _checked(pieces, uses[n], n, part, frame=workload.given, steps=numbers)
        for n in layers
        for part in ("steps", "forward")
    ]


def _whole(
    workload: Workload, model: Lumos, reuse: StepReuse, steps: Sequence[int] | None
) -> Probe:
    """Whole steps and the commit's forward of a network, at the first generated latent frame."""

    def make() -> Callable[[], Sequence[float]]:
        engine = decoder(workload, model, reuse=reuse, latents=workload.given + 1)
        engine.prefill()
        shape = (1, workload.layout.rows, workload.layout.cols)
        for _ in range(workload.given):
            engine.give(torch.zeros(shape, dtype=torch.int64))
        return lambda: engine.rehearse(steps)

    depth = model.config.num_hidden_layers
    return Probe(pieces=(Piece("whole steps", depth), Piece("whole forward", depth)), make=make)


def _checked(pieces: Pieces, uses: list[Use], layers: int, part: str, **where: Any) -> Checked:
    """`where` is the frame and its steps. Raises InputError if a piece failed."""
    weights = _weights(pieces, [use for use in uses if use.part == part])
    real = {Piece(f"whole {part}", layers): 1.0}
    reason = pieces.reason({**weights, **real})
    if reason is not None:
        raise InputError(
            f"{layers} layers cannot be checked ({reason}): choose fewer or a smaller size"
        )
    measured, composed = pieces.estimate(real), pieces.estimate(weights)
    return Checked(
        layers=layers,
        part=part,
        **where,
        repeats=pieces.rounds,
        measured=measured,
        composed=composed,
        ratio=composed.over(measured),
    )
