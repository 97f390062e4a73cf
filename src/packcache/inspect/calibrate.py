"""Settings of PackCache for a quality tolerance, found on a trace of the model they are for.

    found = calibrate(trace, tolerance=0.05)
    found.policy              # PackCache(budget=1, window=4, half_life=1.2)
    found.chosen.lost, found.held_out.lost    # where it was chosen, and where it was not
    found.save("digits.json")

Quality is attention: of what the model's queries look at under the full cache, the share on tokens
that the policy no longer holds (methods 3.3 bounds the error by it). That is no picture: whether
clips look right says `packcache evaluate`.

The best of many settings looks better than it is on the clips that chose it, so every other clip
is held out. And what reaches further back than the model was trained to see leaves its range
whatever is rebased (DESIGN 4.5), however little attention it loses: it is marked, and not chosen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from packcache.errors import InputError, InvalidSetting
from packcache.evaluate.statistics import Interval, bootstrap
from packcache.files import check_folder, write_json
from packcache.inspect.decay import Decay, attention_by_distance
from packcache.inspect.score import score
from packcache.inspect.trace import TRAINED, Sample, Trace
from packcache.policies import CALIBRATION, PackCache
from packcache.selectors import Order
from packcache.timeline import Role

__all__ = [
    "TOLERANCE",
    "Calibration",
    "HeldOut",
    "Trial",
    "calibrate",
    "check_tolerance",
]

#: Attention that may be lost, unless asked otherwise.
TOLERANCE = 0.05

#: What is tried: latent frames of history, smallest first, and of window; half-lives, to which the
#: fitted one and its half are added (methods 3.1: the less attention is concentrated inside a
#: frame, the steeper the best kernel); orders that cost nothing, the default first.
BUDGETS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
WINDOWS = (1, 2, 3, 4, 6, 8, 12)
HALF_LIVES = (1.0, 2.0, 4.0)
ORDERS: tuple[Order, ...] = ("visible", "novelty")

#: Steeper and flatter kernels than these are a window and a uniform share.
_STEEPEST, _FLATTEST = 0.25, 8.0

_Unit = Literal["clips", "latent frames"]

#: Latent frames beside history in the trained range: the image and the current one.
_BESIDE = 2

#: Latent frames with history below which one clip is not cut in two.
_LEAST_FRAMES = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """The best settings found at one budget, and what they lose: mean over clips and 95 %.

    `beyond`: may they hold history further back than the model was trained to see? None: not known.
    """

    settings: dict[str, Any]
    lost: Interval
    tokens: float
    beyond: bool | None = None

    @property
    def mean(self) -> float:
        return float(self.lost.mean)

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "lost": self.lost.at(),
            "history_tokens": self.tokens,
            "beyond_trained": self.beyond,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """What the chosen settings lose where they were not chosen: mean over clips and 95 %.

    `chosen_on` and `judged_on` are numbers of clips; of a single clip those of latent frames, and
    then the two are neighbours and alike.
    """

    of: _Unit
    chosen_on: tuple[int, ...]
    judged_on: tuple[int, ...]
    lost: Interval

    def to_json(self) -> dict[str, Any]:
        return {
            "of": self.of,
            "chosen_on": list(self.chosen_on),
            "judged_on": list(self.judged_on),
            "lost": self.lost.at(),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """What was found.

    Attributes:
        chosen: the smallest budget within the tolerance, or the least loss if none is; none beyond
            the trained range where there is another.
        met: is the tolerance met in the mean over clips, both where it was chosen and held out?
        trials: the best of every budget that was tried, smallest first.
        held_out: None where there was too little to hold anything out.
        trained: latent frames the model was trained on; None: not known.
        fit: decay over all layers, where the settings were chosen; its half-life was tried where
            the fit says "exponential".
    """

    tolerance: float
    chosen: Trial
    trials: Sequence[Trial]
    held_out: HeldOut | None
    trained: int | None
    fit: Decay
    workload: dict[str, Any]
    environment: dict[str, Any]

    @property
    def policy(self) -> PackCache:
        return PackCache(**self.chosen.settings)

    @property
    def met(self) -> bool:
        return all(float(lost.mean) <= self.tolerance for lost in self._losses)

    @property
    def told(self) -> str:
        """The result in a sentence, without a promise that the trace does not make."""
        where = f"{_bounds(self.chosen.lost)} where it was chosen"
        if self.held_out:
            where = f"{_bounds(self.held_out.lost)} on {self.held_out.of} held out, {where}"
        if self.chosen.mean > self.tolerance:
            best = f"nothing tried keeps the loss within {self.tolerance:.1%}: the best"
            return "; ".join((f"{best} loses {where}", *self._remarks()))
        return "; ".join((f"loses {where}; tolerated {self.tolerance:.1%}", *self._remarks()))

    @property
    def _losses(self) -> list[Interval]:
        return [self.chosen.lost, *([self.held_out.lost] if self.held_out else [])]

    def _remarks(self) -> list[str]:
        """What takes from the numbers."""
        remarks = []
        mean, high = (float(getattr(self._losses[-1], name)) for name in ("mean", "high"))
        if self.chosen.mean <= self.tolerance < mean:
            remarks.append("more than tolerated where it was not chosen")
        elif self.chosen.mean <= self.tolerance < high:
            remarks.append("the interval reaches past the tolerance")
        if self.held_out is None:
            remarks.append("too little was recorded to hold any out, which flatters it")
        elif self.held_out.of != "clips":
            remarks.append("one clip, whose latent frames are alike: record more clips")
        if self.trained is None:
            remarks.append("the model's trained range is not known")
        elif self.chosen.beyond:
            remarks.append(f"it reaches beyond the {self.trained} latent frames of training")
        for other in self.trials:
            if other.mean <= self.tolerance < self.chosen.mean:  # only where nothing within will do
                budget, window = (other.settings[name] for name in ("budget", "window"))
                remarks.append(
                    f"budget {budget:g}, window {window} would lose {other.mean:.1%}, beyond the "
                    f"{self.trained} latent frames of training"
                )
        return remarks

    def to_json(self) -> dict[str, Any]:
        """`settings` are those of `PackCache`; the rest says where they come from."""
        return {
            "schema": CALIBRATION,
            "settings": self.chosen.settings,
            "tolerance": self.tolerance,
            "met": self.met,
            "lost": self.chosen.lost.at(),
            "held_out": self.held_out.to_json() if self.held_out else None,
            TRAINED: self.trained,
            "beyond_trained": self.chosen.beyond,
            "told": self.told,
            "trials": [trial.to_json() for trial in self.trials],
            "fit": self.fit.to_json(),
            "workload": self.workload,
            "environment": self.environment,
        }

    def save(self, path: str | Path) -> Path:
        """Write the JSON that `PackCache.from_file` loads. Raises OutputError."""
        check_folder(Path(path).parent)
        write_json(self.to_json(), Path(path))
        return Path(path)


def calibrate(
    trace: Trace,
    *,
    tolerance: float = TOLERANCE,
    budgets: Sequence[float] = BUDGETS,
    trained_latent_frames: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Calibration:
    """The smallest history budget that loses at most `tolerance` of attention, with its settings.

    For each budget, smallest first: all windows, half-lives and orders, then a floor of half an
    equal share with the best of these; the first budget within the tolerance ends the search. Loss
    counts latent frames after the first eviction, and settings are compared over the same ones.
    Every other clip chooses, and what the choice loses is told of the rest; of a single clip every
    other latent frame.

    `trained_latent_frames`: of the model, None: as the trace says, if it does. Where they are
    known, windows and budgets beyond are tried only if nothing within will do, marked, and chosen
    only if nothing lies within. Raises InputError for a trace without history.
    """
    check_tolerance(tolerance)
    if not budgets:
        raise InvalidSetting("no budget to try: give some, in latent frames")
    trained = _trained(trace, trained_latent_frames)
    split = _split(trace)
    chooses = _part(trace, split.of, split.chosen_on) if split else trace
    judges = _part(trace, split.of, split.judged_on) if split else trace
    fit = attention_by_distance(chooses).fit()
    reach = min(_reach(chooses), _reach(judges))
    tried = [kernels for one in sorted(budgets) if (kernels := _kernels(trace, one, reach, fit))]
    if not tried:
        raise InvalidSetting(
            f"budgets are {', '.join(f'{b:g}' for b in budgets)} latent frames of "
            f"{trace.layout.tokens} tokens, expected one of at least a token and below {reach}, "
            f"history frames that {'both halves have' if split else 'the trace has'}: others give "
            "up nothing there"
        )
    trials = _search(chooses, tried, tolerance, trained, on_step)
    chosen = _chosen(trials, tolerance)
    return Calibration(
        tolerance=tolerance,
        chosen=chosen,
        trials=trials,
        held_out=_held_out(judges, split, chosen) if split else None,
        trained=trained,
        fit=fit,
        workload=trace.workload,
        environment=trace.environment,
    )


def check_tolerance(tolerance: float) -> None:
    """Raises InvalidSetting for what is no share of attention."""
    if not (math.isfinite(tolerance) and 0 < tolerance < 1):
        raise InvalidSetting(
            f"tolerance is {tolerance}, expected a share of attention above 0 and below 1, "
            f"such as {TOLERANCE}"
        )


# --- what is held out ----------------------------------------------------------------------------


class _Split(NamedTuple):
    of: _Unit
    chosen_on: tuple[int, ...]
    judged_on: tuple[int, ...]


def _split(trace: Trace) -> _Split | None:
    """Every other clip, or of a single one every other latent frame; None: too little for both."""
    recorded = sorted({(one.clip, one.frame) for one in _with_history(trace)})
    clips = tuple(sorted({clip for clip, _ in recorded}))
    if len(clips) > 1:
        return _Split("clips", clips[::2], clips[1::2])
    frames = tuple(frame for _, frame in recorded)
    if len(frames) < _LEAST_FRAMES:
        return None
    return _Split("latent frames", frames[::2], frames[1::2])


def _part(trace: Trace, of: _Unit, numbers: tuple[int, ...]) -> Trace:
    """The trace with the samples of these clips, numbered anew, or of these latent frames."""
    if of == "latent frames":
        return replace(trace, samples=[one for one in trace.samples if one.frame in numbers])
    place = {clip: number for number, clip in enumerate(numbers)}
    samples = [replace(one, clip=place[one.clip]) for one in trace.samples if one.clip in place]
    ids, own = ([of[clip] for clip in numbers] if of else [] for of in (trace.ids, trace.own))
    return replace(trace, ids=ids, own=own, samples=samples)


def _held_out(judges: Trace, split: _Split, chosen: Trial) -> HeldOut:
    """What was chosen, judged on the other half."""
    lost = _least_loss(judges, [chosen.settings]).lost
    return HeldOut(of=split.of, chosen_on=split.chosen_on, judged_on=split.judged_on, lost=lost)


def _with_history(trace: Trace) -> list[Sample]:
    """Samples of latent frames that have history."""
    images = trace.roles.count(Role.IMAGE)
    return [one for one in trace.samples if one.branch == 0 and one.frame > images]


def _reach(trace: Trace) -> int:
    """History frames that the last recorded latent frame has."""
    images = trace.roles.count(Role.IMAGE)
    return max((one.frame - images for one in _with_history(trace)), default=0)


# --- what is tried -------------------------------------------------------------------------------


def _trained(trace: Trace, asked: int | None) -> int | None:
    """Latent frames that the model was trained on, as asked or as the trace says; None: unknown."""
    known = trace.workload.get(TRAINED) if asked is None else asked
    if known is not None and (type(known) is not int or known < 1):
        raise (InputError if asked is None else InvalidSetting)(
            f"{TRAINED} is {known!r}, expected latent frames the model was trained on, at least 1"
        )
    return known


def _search(
    trace: Trace,
    tried: Sequence[Sequence[Mapping[str, Any]]],
    tolerance: float,
    trained: int | None,
    on_step: Callable[[int, int], None] | None,
) -> list[Trial]:
    """The best of each budget's settings, up to the first that will do.

    Those within the trained range come first; only if none of them will do, those beyond.
    """
    most = math.inf if trained is None else trained - _BESIDE
    asked = [(False, own) for own in tried]
    asked += [(True, own) for own in tried if trained is not None]
    trials: list[Trial] = []
    for done, (beyond, own) in enumerate(asked):
        if on_step:
            on_step(done, len(asked))
        kernels = [one for one in own if (max(one["window"], one["budget"]) > most) == beyond]
        if kernels:
            known = None if trained is None else beyond
            trials.append(replace(_best(trace, kernels), beyond=known))
            if trials[-1].mean <= tolerance:
                break
    return sorted(trials, key=lambda trial: trial.settings["budget"])


def _chosen(trials: Sequence[Trial], tolerance: float) -> Trial:
    """The smallest budget that will do, or the least loss; within the trained range if any is."""
    within = [trial for trial in trials if not trial.beyond] or trials
    least = min(within, key=lambda trial: trial.mean)
    return next((trial for trial in within if trial.mean <= tolerance), least)


def _kernels(trace: Trace, budget: float, reach: int, fit: Decay) -> list[dict[str, Any]]:
    """All settings but floors at a budget; none where it is too small, or nothing leaves."""
    tokens = int(budget * trace.layout.tokens) if budget < reach else 0
    orders = ORDERS if trace.ids else ORDERS[:1]  # novelty compares token ids
    return [
        {"budget": budget, "window": window, "half_life": life, "min_share": 0.0, "order": order}
        for window, life, order in itertools.product(WINDOWS, _half_lives(fit), orders)
        if window <= min(reach, tokens)
        if window > 2 or life == HALF_LIVES[0]  # up to two frames share alike whatever the kernel
    ]


def _half_lives(fit: Decay) -> list[float]:
    """Those of the list, and what was measured if the fit is good."""
    lives = set(HALF_LIVES)
    if fit.verdict == "exponential":
        measured = (fit.half_life, fit.half_life / 2)
        lives |= {round(min(max(life, _STEEPEST), _FLATTEST), 2) for life in measured}
    return sorted(lives)


def _best(trace: Trace, kernels: Sequence[Mapping[str, Any]]) -> Trial:
    """The least loss of these settings, or of the best of them with a floor."""
    first = _least_loss(trace, kernels)
    even = first.settings["budget"] / first.settings["window"]
    floored = {**first.settings, "min_share": round(min(1.0, even) / 2, 3)}
    return _least_loss(trace, [first.settings, floored])


def _bounds(lost: Interval) -> str:
    """A loss with its interval, as text."""
    mean, low, high = (f"{float(getattr(lost, name)):.1%}" for name in ("mean", "low", "high"))
    clips = f"{low} to {high}, {lost.rows} clips" if lost.rows > 1 else "1 clip, no interval"
    return f"{mean} of attention ({clips})"


def _least_loss(trace: Trace, tried: Sequence[Mapping[str, Any]]) -> Trial:
    """The settings that lose least in the mean over clips; of equals the first.

    They are compared over the same latent frames, those after the last one's first eviction: a
    narrow window evicts sooner, and frames are not alike. What the best loses is told of its own.
    """
    policies = {str(number): PackCache(**settings) for number, settings in enumerate(tried)}
    rows = score(trace, policies, together=True).rows
    best = max(rows, key=lambda one: one.values["kept"].mean()).label
    (row,) = score(trace, {best: policies[best]}).rows
    return Trial(
        settings=dict(tried[int(best)]),
        lost=bootstrap(1 - row.values["kept"]),
        tokens=float(row.values["held"].mean()),
    )
