"""Settings of PackCache for a quality tolerance, found on a trace of the model they are for.

    found = calibrate(trace, tolerance=0.05)
    found.policy              # PackCache(budget=1, window=4, half_life=1.2)
    found.save("digits.json")

Quality is attention: of what the model's queries look at under the full cache, the share on tokens
that the policy no longer holds (methods 3.3 bounds the error by it). That is no picture: whether
clips look right says `packcache evaluate`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packcache.errors import InvalidSetting
from packcache.evaluate.statistics import Interval, bootstrap
from packcache.files import check_folder, write_json
from packcache.inspect.decay import Decay, attention_by_distance
from packcache.inspect.score import score
from packcache.inspect.trace import Trace
from packcache.policies import CALIBRATION, PackCache
from packcache.selectors import Order

__all__ = ["TOLERANCE", "Calibration", "Trial", "calibrate", "check_tolerance"]

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """The best settings found at one budget, and what they lose: mean over clips and 95 %."""

    settings: dict[str, Any]
    lost: Interval
    tokens: float

    @property
    def mean(self) -> float:
        return float(self.lost.mean)

    def to_json(self) -> dict[str, Any]:
        return {"settings": self.settings, "lost": self.lost.at(), "history_tokens": self.tokens}


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """What was found.

    Attributes:
        chosen: the smallest budget within the tolerance, or the least loss if none is.
        met: is the tolerance met, in the mean over clips?
        trials: the best of every budget that was tried, smallest first.
        fit: decay over all layers; its half-life was tried where the fit says "exponential".
    """

    tolerance: float
    met: bool
    chosen: Trial
    trials: Sequence[Trial]
    fit: Decay
    workload: dict[str, Any]
    environment: dict[str, Any]

    @property
    def policy(self) -> PackCache:
        return PackCache(**self.chosen.settings)

    @property
    def told(self) -> str:
        """The result in a sentence, without a promise that the trace does not make."""
        lost, low, high = (float(getattr(self.chosen.lost, k)) for k in ("mean", "low", "high"))
        bounds = f"{lost:.1%} of attention ({low:.1%} to {high:.1%}, {self.chosen.lost.rows} clips)"
        if not self.met:
            return (
                f"nothing tried keeps the loss within {self.tolerance:.1%}: the best loses {bounds}"
            )
        sure = "" if high <= self.tolerance else "; the interval reaches past the tolerance"
        return f"loses {bounds}, tolerated {self.tolerance:.1%}{sure}"

    def to_json(self) -> dict[str, Any]:
        """`settings` are those of `PackCache`; the rest says where they come from."""
        return {
            "schema": CALIBRATION,
            "settings": self.chosen.settings,
            "tolerance": self.tolerance,
            "met": self.met,
            "lost": self.chosen.lost.at(),
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
    on_step: Callable[[int, int], None] | None = None,
) -> Calibration:
    """The smallest history budget that loses at most `tolerance` of attention, with its settings.

    For each budget, smallest first: all windows, half-lives and orders, then a floor of half an
    equal share with the best of these; the first budget within the tolerance ends the search. Loss
    counts latent frames after the first eviction. It comes from the clips that chose, so a few
    clips flatter it. Raises InputError for a trace without history.
    """
    check_tolerance(tolerance)
    if not budgets:
        raise InvalidSetting("no budget to try: give some, in latent frames")
    curve = attention_by_distance(trace)
    fit, reach = curve.fit(), len(curve.distances)
    trials: list[Trial] = []
    for done, budget in enumerate(sorted(budgets)):
        if on_step:
            on_step(done, len(budgets))
        kernels = _kernels(trace, budget, reach, fit)
        if kernels:
            trials.append(_best(trace, kernels))
            if trials[-1].mean <= tolerance:
                break
    if not trials:
        raise InvalidSetting(
            f"budgets are {', '.join(f'{b:g}' for b in budgets)} latent frames of "
            f"{trace.layout.tokens} tokens, expected one of at least a token and below {reach}, as "
            "many as the trace has history frames: others give up nothing there"
        )
    chosen = min(trials, key=lambda trial: (trial.mean > tolerance, trial.mean))
    return Calibration(
        tolerance=tolerance,
        met=chosen.mean <= tolerance,
        chosen=chosen,
        trials=trials,
        fit=fit,
        workload=trace.workload,
        environment=trace.environment,
    )


def check_tolerance(tolerance: float) -> None:
    """Raises InvalidSetting for what is no share of attention."""
    if not (math.isfinite(tolerance) and 0 < tolerance < 1):
        raise InvalidSetting(
            f"tolerance is {tolerance}, expected a share of attention above 0 and below 1, "
            "such as 0.05"
        )


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
    return min(first, _least_loss(trace, [floored]), key=lambda trial: trial.mean)


def _least_loss(trace: Trace, tried: Sequence[Mapping[str, Any]]) -> Trial:
    """The settings that lose least in the mean over clips; of equals the first."""
    policies = {str(number): PackCache(**settings) for number, settings in enumerate(tried)}
    rows = score(trace, policies).rows
    row = min(rows, key=lambda one: -one.values["kept"].mean())
    return Trial(
        settings=dict(tried[int(row.label)]),
        lost=bootstrap(1 - row.values["kept"]),
        tokens=float(row.values["held"].mean()),
    )
