"""Policies judged by a trace: what the tokens they keep would have got of the attention.

    scores = score(Trace.load("digits.trace"), parse_policies("full,window,packcache"))
    print("\\n".join(scores.lines()))

A policy's timeline runs as in `FrameCache`, over the recorded clip, without a model and without
torch. When latent frame f is made, the tokens held have p of the attention that f paid along the
full cache. That bounds what attention over them can be wrong by: the output differs by
(1 - p)(o_lost - o_kept), so by at most 2 (1 - p) max ||v|| (methods 3.3). What a frame made with
less attention would look like, and what comes of it later, a trace does not know.

The best possible at equal tokens is an oracle: for each latent frame, as many history tokens as the
policy holds, those of largest mass in that frame. It is an upper bound and no policy: it looks
ahead, and its sets need not nest.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packcache.errors import InputError, InputFileError, InvalidSetting, PackCacheError
from packcache.evaluate.statistics import bootstrap
from packcache.inspect.trace import COMMIT, Trace
from packcache.policies import Policy
from packcache.timeline import Role, Span, Timeline

__all__ = [
    "METRICS",
    "SCHEMA",
    "TOLD",
    "PolicyScore",
    "Scores",
    "check_told",
    "merged",
    "policies_of_file",
    "policies_of_folder",
    "replay",
    "score",
    "timelines",
]

SCHEMA = "packcache.trace_score/1"

#: One value a clip, means over latent frames: shares of the attention on all tokens and on history
#: that is kept; what the oracle keeps of history, and the policy's share of that; the bound of the
#: output's error, mean over layers; history tokens held, and tokens of all roles.
METRICS = ("kept", "history", "best", "share", "bound", "held", "tokens")

#: What a trace can tell a policy that asks for scores (`Policy.asks`).
TOLD = (None, "observed")

Floats = NDArray[np.float64]

#: Mean attention `[layers, S]` of a latent frame, rows summing to 1, by clip and frame.
Seen = Mapping[tuple[int, int], Floats]


# --- a policy along a recorded clip --------------------------------------------------------------


def timelines(trace: Trace, policy: Policy, clip: int = 0) -> Iterator[Timeline]:
    """The timeline as each latent frame finds it, then as the last one leaves it.

    One object, changed in place from frame to frame. Raises InvalidSetting for a policy that asks
    for what a trace does not hold.
    """
    layout = trace.layout
    visible = None if trace.visible is None else int(trace.visible.sum())
    budget = policy.budget_for(layout.tokens, visible, trace.workload.get("token_bytes"))
    observed = _observed(trace, policy, clip)
    ids = trace.ids[clip] if trace.ids else [None] * len(trace.roles)
    timeline = Timeline()
    if trace.text:
        _commit(timeline, policy, budget, Span.text(trace.text), ())
    for frame, role in enumerate(trace.roles):
        yield timeline
        span = Span.of_frame(
            role,
            frame,
            layout,
            visible=trace.visible if role is Role.HISTORY else None,
            ids=ids[frame],
        )
        _commit(timeline, policy, budget, span, observed.get(frame, ()))
    yield timeline


def replay(trace: Trace, policy: Policy, clip: int = 0) -> Timeline:
    """The timeline when all latent frames of a clip are committed."""
    *_, last = timelines(trace, policy, clip)
    return last


def _commit(
    timeline: Timeline,
    policy: Policy,
    budget: int | None,
    span: Span,
    scores: tuple[()] | tuple[Floats],
) -> None:
    """As `FrameCache.commit`: order, append, evict."""
    frames = [entry.span for entry in timeline.entries if entry.span.layout is not None]
    rank = policy.rank(span, frames[-1] if frames else None, *scores)
    timeline.append(span, rank)
    slots = policy.plan(timeline, budget)
    if len(slots) < timeline.physical_length:
        timeline.keep(slots)


def check_told(policy: Policy) -> None:
    """Raises InvalidSetting for a policy that asks for scores which no trace holds."""
    if policy.asks not in TOLD:
        raise InvalidSetting(
            f"{policy!r} goes by {policy.asks!r} scores, and a trace holds none, only observed "
            "attention: leave it out"
        )


def _observed(trace: Trace, policy: Policy, clip: int) -> dict[int, tuple[Floats]]:
    """By latent frame, what a policy that asks for observed attention is told; else nothing.

    The shares that a frame's own queries gave its tokens at the commit, mean over the recorded
    layers: the cache's own score is of all layers and of other queries.
    """
    check_told(policy)
    if policy.asks is None:
        return {}
    if trace.own:
        return {frame: (own.astype(np.float64),) for frame, own in enumerate(trace.own[clip])}
    found: dict[int, tuple[Floats]] = {}
    for sample in trace.samples:
        if (sample.clip, sample.step, sample.branch) == (clip, COMMIT, 0):
            own = sample.mass[:, -trace.layout.tokens :].astype(np.float64)
            found[sample.frame] = ((own / own.sum(axis=1, keepdims=True)).mean(axis=0),)
    if len(found) < len(trace.roles):
        raise InvalidSetting(
            f"{policy!r} goes by observed attention, and the trace has the commits of {len(found)} "
            f"of {len(trace.roles)} latent frames: record all of them, or leave it out"
        )
    return found


# --- what it keeps -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyScore:
    """One policy's row: `values[metric] [clips]` (NaN: says nothing), `layers [clips, layers]`.

    `layers` is the attention kept by layer; `since [clips]` the first latent frame that counts.
    """

    label: str
    policy: str
    values: dict[str, Floats]
    layers: Floats
    since: tuple[int, ...]

    @property
    def held(self) -> int:
        """History tokens held, mean over clips and latent frames, to whole tokens."""
        return round(float(self.values["held"].mean()))

    def to_json(self) -> dict[str, Any]:
        return {
            "policy": self.label,
            "settings": self.policy,
            "since": min(self.since),
            **{name: _summary(values) for name, values in self.values.items()},
            "kept_by_layer": self.layers.mean(axis=0).tolist(),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """All rows, in the order asked for, over the clips of all traces."""

    rows: list[PolicyScore]
    traces: list[Trace]

    def groups(self) -> list[list[PolicyScore]]:
        """Rows that hold equally many tokens over the same latent frames, most tokens first; in a
        group by attention kept.
        """
        alike: dict[tuple[int, tuple[int, ...]], list[PolicyScore]] = {}
        for row in self.rows:
            alike.setdefault((row.held, row.since), []).append(row)
        return [
            sorted(alike[key], key=lambda row: -row.values["kept"].mean())
            for key in sorted(alike, key=lambda key: (-key[0], key[1]))
        ]

    def to_json(self) -> dict[str, Any]:
        """Rows as in the groups; the environment is that of the recording."""
        first = self.traces[0]
        return {
            "schema": SCHEMA,
            "environment": first.environment,
            "workload": {
                "traces": [trace.workload for trace in self.traces],
                "clips": sum(len(trace.clips) for trace in self.traces),
                "layers": list(first.layers),
                "tokens_per_frame": first.layout.tokens,
            },
            "results": [row.to_json() for group in self.groups() for row in group],
        }

    def lines(self) -> list[str]:
        """The table as text."""
        tokens = self.traces[0].layout.tokens
        clips = sum(len(trace.clips) for trace in self.traces)
        lines = [
            f"attention kept, % of the full cache's: mean of {clips} clips, 95 % interval",
            "of best: of what as many history tokens could keep, chosen anew for each latent frame",
            "bound: of the error of attention's output; rows of a group are over the same frames",
            f"{'kept':>40}{'history':>9}{'interval':>15}{'of best':>9}{'bound':>8}",
        ]
        for group in self.groups():
            held, since = group[0].held, min(group[0].since)
            lines.append(
                f"{held} history tokens held ({held / tokens:.2f} latent frames), from latent "
                f"frame {since} on"
            )
            lines += [_line(row.to_json()) for row in group]
        return lines


def score(
    traces: Trace | Sequence[Trace], policies: Mapping[str, Policy], *, together: bool = False
) -> Scores:
    """What each policy keeps of the attention, over all clips of the traces.

    A policy is judged after its first eviction, or by all latent frames with history if it evicts
    nothing, of which it keeps exactly 1. Frames are not alike, so policies that hold equally many
    tokens in the end, or all of them if they go `together`, are judged by the same ones: those
    after the first eviction of the last of them. The conditional branch counts. Raises
    InputError for traces that do not go together or hold no history, and for a policy of somebody
    else that fails.
    """
    several = [traces] if isinstance(traces, Trace) else list(traces)
    _check_traces(several)
    if not policies:
        raise InvalidSetting("no policy to score: give at least one")
    seen = [_seen(trace) for trace in several]
    runs = [_along(label, policy, several, seen) for label, policy in policies.items()]
    keys = [None if together else run.held_at_last for run in runs]
    since = {key: _latest([r for k, r in zip(keys, runs, strict=True) if k == key]) for key in keys}
    rows = [run.row(since[key]) for key, run in zip(keys, runs, strict=True)]
    return Scores(rows=rows, traces=several)


def _check_traces(traces: Sequence[Trace]) -> None:
    if not traces:
        raise InvalidSetting("no trace to score: give at least one")
    first = traces[0]
    for trace in traces:
        if (trace.layout, trace.layers) != (first.layout, first.layers):
            raise InputError(
                f"traces of {trace.layout} with layers {trace.layers} and of {first.layout} with "
                f"layers {first.layers} were given, expected one model's: score them apart"
            )
        images = trace.roles.count(Role.IMAGE)
        told = {s.clip for s in trace.samples if s.frame > images and s.branch == 0}
        if not told:
            raise InputError(
                f"the trace has no history: its samples are of the first {images + 1} latent "
                "frames, expected later ones; record a longer clip"
            )
        if silent := [clip for clip in trace.clips if clip not in told]:
            raise InputError(
                f"clip {silent[0]} of the trace has no sample with history, expected one of latent "
                f"frame {images + 1} or later in each of {len(trace.clips)} clips: record it again"
            )


def _seen(trace: Trace) -> Seen:
    """Mean attention over the samples of each latent frame."""
    found: dict[tuple[int, int], list[Floats]] = {}
    for sample in trace.samples:
        if sample.branch == 0:
            mass = sample.mass.astype(np.float64)
            share = mass / mass.sum(axis=1, keepdims=True)
            found.setdefault((sample.clip, sample.frame), []).append(share)
    return {key: np.mean(shares, axis=0) for key, shares in found.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Clip:
    """One policy along one clip: values `[frames, METRICS]`, layers `[frames, layers]` of the
    sampled latent frames that have history; the first of them after an eviction, if any is.
    """

    frames: NDArray[np.int64]
    values: Floats
    layers: Floats
    since: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """One policy along all clips."""

    label: str
    policy: str
    clips: list[_Clip]

    @property
    def since(self) -> tuple[int, ...]:
        return tuple(clip.since for clip in self.clips)

    @property
    def held_at_last(self) -> int:
        """History tokens held in the last latent frame, mean over clips, to whole tokens."""
        last = [clip.values[-1, METRICS.index("held")] for clip in self.clips]
        return round(float(np.mean(last)))

    def row(self, since: tuple[int, ...]) -> PolicyScore:
        """Means over latent frames from `since` on, one number a clip."""
        counted = [
            (clip, clip.frames >= first) for clip, first in zip(self.clips, since, strict=True)
        ]
        means = np.stack([_means(clip.values[which]) for clip, which in counted])
        return PolicyScore(
            label=self.label,
            policy=self.policy,
            values=dict(zip(METRICS, means.T, strict=True)),
            layers=np.stack([clip.layers[which].mean(axis=0) for clip, which in counted]),
            since=since,
        )


def _latest(runs: Sequence[_Run]) -> tuple[int, ...]:
    """Of each clip the first latent frame that counts for all of them."""
    return tuple(max(clips) for clips in zip(*(run.since for run in runs), strict=True))


def _along(label: str, policy: Policy, traces: Sequence[Trace], seen: Sequence[Seen]) -> _Run:
    clips = [
        _clip(label, policy, trace, masses, clip)
        for trace, masses in zip(traces, seen, strict=True)
        for clip in trace.clips
    ]
    return _Run(label=label, policy=repr(policy), clips=clips)


def _clip(label: str, policy: Policy, trace: Trace, seen: Seen, clip: int) -> _Clip:
    """One policy along one clip."""
    first = trace.roles.count(Role.IMAGE) + 1  # with history
    frames: list[int] = []
    kept: list[tuple[list[float], Floats]] = []
    evicted_from = len(trace.roles)
    frame = 0
    try:
        for frame, timeline in enumerate(timelines(trace, policy, clip)):
            if timeline.evicted_tokens:
                evicted_from = min(evicted_from, frame)
            if frame >= first and (clip, frame) in seen:
                frames.append(frame)
                kept.append(_kept(trace, timeline, frame, seen[clip, frame]))
    except PackCacheError:
        raise
    except Exception as error:  # a policy may be anybody's
        raise InputError(
            f"policy {label!r} fails at latent frame {frame} of clip {clip}: {_said(error)}"
        ) from error
    return _Clip(
        frames=np.array(frames),
        values=np.array([values for values, _ in kept]),
        layers=np.stack([layers for _, layers in kept]),
        since=next((one for one in frames if one >= evicted_from), frames[0]),
    )


def _kept(trace: Trace, timeline: Timeline, frame: int, mass: Floats) -> tuple[list[float], Floats]:
    """`METRICS` of one latent frame with attention `mass [layers, S]`; kept by layer."""
    held, history = _held(trace, timeline, frame), _history(trace, frame)
    lost = mass[:, ~held].sum(axis=1)
    on_history = mass.mean(axis=0)[history]
    total, count = on_history.sum(), int(held[history].sum())
    lost_history = on_history[~held[history]].sum()
    # of no token the oracle keeps nothing, which a sum in another order would miss by a rounding
    lost_best = np.sort(on_history)[: len(on_history) - count].sum() if count else total
    kept_history, best = (
        1 - part / total if total else np.nan for part in (lost_history, lost_best)
    )
    values = {
        "kept": 1 - lost.mean(),
        "history": kept_history,
        "best": best,
        "share": kept_history / best if count else np.nan,
        "bound": (2 * lost * trace.value_norm).mean(),
        "held": count,
        "tokens": timeline.physical_length,
    }
    return [values[name] for name in METRICS], 1 - lost


def _held(trace: Trace, timeline: Timeline, frame: int) -> NDArray[np.bool_]:
    """Which of the S tokens frame `frame` can attend to: those held, and its own."""
    held = np.zeros(trace.length(frame), dtype=bool)
    for entry in timeline.entries:
        held[entry.start + entry.held] = True
    held[-trace.layout.tokens :] = True
    return held


def _history(trace: Trace, frame: int) -> NDArray[np.bool_]:
    """Which of the S tokens are history."""
    frames = [role is Role.HISTORY for role in trace.roles[:frame]]
    return np.concatenate(
        (
            np.zeros(trace.text, dtype=bool),
            np.repeat(np.array(frames, dtype=bool), trace.layout.tokens),
            np.zeros(trace.layout.tokens, dtype=bool),
        )
    )


def _means(values: Floats) -> Floats:
    """Means over rows of what is known `[rows, metrics]`, NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0).sum(axis=0)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def _summary(values: Floats) -> dict[str, float] | None:
    """Mean and bootstrap interval over clips; None where a clip says nothing."""
    return None if np.isnan(values).any() else bootstrap(values).at()


def _line(row: Mapping[str, Any]) -> str:
    history, share = row["history"], row["share"]
    interval = f"{100 * history['low']:.1f} to {100 * history['high']:.1f}" if history else "-"
    shown = [
        f"{100 * part['mean']:{width}.1f}" if part else f"{'-':>{width}}"
        for part, width in ((row["kept"], 6), (history, 9), (share, 9))
    ]
    return (
        f"  {row['policy']:32}{shown[0]}{shown[1]} {interval:>14}{shown[2]}"
        f"{row['bound']['mean']:8.2f}"
    )


# --- policies of somebody else -------------------------------------------------------------------


def merged(policies: Mapping[str, Policy], more: Mapping[str, Policy]) -> dict[str, Policy]:
    """Both; raises InvalidSetting for a label that is known, for one row would hide the other."""
    for label in more:
        if label in policies:
            raise InvalidSetting(
                f"policy {label!r} is there twice, {policies[label]!r} and {more[label]!r}: rename "
                "the file or the policy, or leave one out"
            )
    return {**policies, **more}


def policies_of_file(path: str | Path) -> dict[str, Policy]:
    """The policies of a Python file, which is run: name only files you trust.

    Every instance of a policy by its name, and every policy class of the file with its defaults;
    names that begin with an underscore are left out. Labels are `file:name`. Raises InputFileError
    for a file that does not run, has none, or one that needs a setting.
    """
    path = Path(path)
    module = _run(path)
    found: dict[str, Policy] = {}
    for name, thing in vars(module).items():
        if name.startswith("_"):
            continue
        if inspect.isclass(thing):
            if issubclass(thing, Policy) and thing.__module__ == module.__name__:
                found[f"{path.stem}:{name}"] = _with_defaults(path, thing)
        elif issubclass(thing.__class__, Policy):
            found[f"{path.stem}:{name}"] = thing
    if not found:
        raise InputFileError(
            f"{path} has no policy, expected a class that inherits from packcache.policies.Policy, "
            "or an instance of one"
        )
    return found


def policies_of_folder(folder: str | Path) -> dict[str, Policy]:
    """The policies of all Python files in a folder, by name of the file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputFileError(f"{folder} is no folder, expected one with policy files (*.py)")
    files = sorted(folder.glob("*.py"))
    if not files:
        raise InputFileError(f"{folder} has no policy file, expected at least one *.py")
    return {label: policy for path in files for label, policy in policies_of_file(path).items()}


def _run(path: Path) -> ModuleType:
    """The file as a module of its own name, known while it runs, since dataclasses look it up."""
    if not path.is_file():
        raise InputFileError(f"{path} is no file, expected a Python file with a policy")
    name = f"packcache_policies_of_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputFileError(f"{path} is no Python file: its name should end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever somebody's file raises
        del sys.modules[name]
        raise InputFileError(f"{path} does not run: {_said(error)}") from error
    return module


def _with_defaults(path: Path, kind: type[Policy]) -> Policy:
    try:
        return kind()
    except Exception as error:
        raise InputFileError(
            f"policy {kind.__name__} of {path} cannot be made without settings ({_said(error)}): "
            "give every field a default, or make an instance in the file"
        ) from error


def _said(error: BaseException) -> str:
    """An error of somebody else's, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
