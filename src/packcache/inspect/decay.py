"""Where attention goes, by role and by temporal distance, and whether it decays: read from a trace.

    trace = Trace.load("digits.trace")
    attention_by_role(trace).whole        # text, condition image, history, current
    curve = attention_by_distance(trace)  # d = 1 is the newest history frame
    curve.fit().half_life                 # in latent frames; .verdict says whether to believe it

Clips are the unit that is resampled. Both branches count alike unless one is named.
Sources: methods 1.2 (the paper's three observations), 1.3 (Eq. 4) and 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packcache.errors import InputError, InvalidSetting
from packcache.evaluate.statistics import Interval, bootstrap
from packcache.inspect.trace import COMMIT, CURRENT, Sample, Trace
from packcache.timeline import Role

Floats = NDArray[Any]  # float64; numpy does not follow it through arithmetic
Verdict = Literal["exponential", "no decay", "exponential does not fit", "cannot be told"]

__all__ = [
    "PARTS",
    "Decay",
    "DistanceAttention",
    "RoleAttention",
    "Verdict",
    "attention_by_distance",
    "attention_by_role",
    "fit_decay",
    "frame_mass",
]

#: Where a query can look: the roles of the cache, and the frame that is being made.
PARTS = (*(role.value for role in Role), "current")

#: Bootstrap draws of a decay curve.
_DRAWS = 2000

#: A share below this is no attention: sums in float32 are not better. Absent: clearly less.
_NOTHING, _ABSENT = 1e-7, 1e-6

#: Least error of log mu, 2 %: no model of attention is truer, and few clips make errors too small.
_LEAST_ERROR = 0.02

#: Misfit of log mu above which an exponential does not describe a curve, and above which it is
#: worth asking whether a power law does; the share of a fall that it must explain.
_MISFIT, _NOTICEABLE, _EXPLAINED = 0.2, 0.05, 0.9

#: AICc by which a power law must be better, and distances needed to say so.
_CLEARLY, _ENOUGH = 6.0, 5

#: 97.5 % quantile of the normal distribution; where exp() ends.
_NORMAL, _HUGE = 1.959964, 700.0


@dataclass(frozen=True, kw_only=True, eq=False)
class RoleAttention:
    """Shares of attention by role: last axis `PARTS`, summing to 1. Intervals are over clips.

    Attributes:
        layers, frames, steps: what the axes are; of steps the commit is the last.
        whole: `[4]`, by_layer: `[layers, 4]`, by_step: `[steps, 4]`, means over the rest.
        by_frame: `[layers, frames, 4]`, means over clips and steps.
    """

    layers: tuple[int, ...]
    frames: tuple[int, ...]
    steps: tuple[int, ...]
    whole: Interval
    by_layer: Interval
    by_step: Interval
    by_frame: Floats

    def to_json(self) -> dict[str, Any]:
        return {
            "parts": list(PARTS),
            "layers": list(self.layers),
            "frames": list(self.frames),
            "steps": list(self.steps),
            "whole": _plain(self.whole),
            "by_layer": _plain(self.by_layer),
            "by_step": _plain(self.by_step),
            "by_frame": self.by_frame.tolist(),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class DistanceAttention:
    """Attention to history at distance d = 1..D; the first row is all layers, then one a layer.

    Attributes:
        rows: their names, "all" and the layers' numbers.
        mass: `[rows, D]`, attention on the whole frame at distance d, over what has such a frame.
        share: `[rows, D]`, the same as shares of history that sum to 1. Young frames have few
            distances, so this is chained from ratios of neighbours, each over the frames that
            have both: how many frames a clip has does not bend the curve.
        draws: `[draws, rows, D]`, shares of resampled clips.
        steps, by_step: `[steps, D]`, mass by denoising step, the commit last, mean over layers.
    """

    rows: tuple[str, ...]
    mass: Interval
    share: Interval
    draws: Floats
    steps: tuple[int, ...]
    by_step: Floats

    @property
    def distances(self) -> range:
        return range(1, self.share.mean.shape[-1] + 1)

    def fit(self, row: str = "all") -> Decay:
        """`mu_d = C rho^d` fitted to one row, with its judgement."""
        number = self.rows.index(row)
        draws = self.draws[:, number] if self.share.rows > 1 else None
        return fit_decay(self.share.mean[number], draws=draws)

    def fits(self) -> dict[str, Decay]:
        return {row: self.fit(row) for row in self.rows}

    def to_json(self) -> dict[str, Any]:
        return {
            "distances": list(self.distances),
            "rows": list(self.rows),
            "mass": _plain(self.mass),
            "share": _plain(self.share),
            "steps": list(self.steps),
            "by_step": _known(self.by_step),
            "fits": {row: decay.to_json() for row, decay in self.fits().items()},
        }


def attention_by_role(trace: Trace, *, branch: int | None = None) -> RoleAttention:
    """How attention is shared over text, condition image, history and the current frame.

    The paper's observations 1 (anchors keep their attention over layers and frames) and 3 (within
    a frame it moves from the context to the current frame). The condition image is given: its one
    forward, the commit, makes nothing and is left out. Raises InputError for no samples.
    """
    samples = _from(trace, branch, trace.roles.count(Role.IMAGE))
    shares = np.stack([_by_part(trace, sample) for sample in samples])
    clip, frame, step = _keys(samples)
    order, steps = _in_order(step)
    over_layers = shares.mean(axis=1)
    return RoleAttention(
        layers=tuple(trace.layers),
        frames=tuple(np.unique(frame).tolist()),
        steps=steps,
        whole=bootstrap(_means(over_layers, clip)),
        by_layer=bootstrap(_means(shares, clip)),
        by_step=bootstrap(_means(over_layers, clip, order), skip_incomplete=True),
        by_frame=_means(shares, frame).swapaxes(0, 1),
    )


def attention_by_distance(
    trace: Trace, *, branch: int | None = None, seed: int = 0
) -> DistanceAttention:
    """How attention to history falls with temporal distance (the paper's observation 2).

    Distances count history frames only: the condition image is an anchor; in text-to-video the
    first latent frame is history. Raises InputError for a trace without history.
    """
    first = trace.roles.count(Role.IMAGE)
    samples = _from(trace, branch, first + 1)
    most = max(sample.frame for sample in samples) - first
    mass = np.full((len(samples), len(trace.layers), most), np.nan)
    for row, sample in zip(mass, samples, strict=True):
        history = frame_mass(trace, sample)[:, first : sample.frame]
        row[:, : history.shape[1]] = history[:, ::-1]  # newest first
    mass = np.concatenate((mass.mean(axis=1, keepdims=True), mass), axis=1)
    clip, _, step = _keys(samples)
    order, steps = _in_order(step)
    share, draws = _chained(mass, clip, seed)
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    return DistanceAttention(
        rows=("all", *map(str, trace.layers)),
        mass=bootstrap(_means(mass, clip), seed=seed, skip_incomplete=True),
        share=Interval(mean=share, low=low, high=high, rows=len(np.unique(clip))),
        draws=draws,
        steps=steps,
        by_step=_means(mass[:, 0], order),
    )


def frame_mass(trace: Trace, sample: Sample) -> Floats:
    """Attention on each latent frame, the current one last: `[layers, frame + 1]`."""
    frames = sample.mass[:, trace.text :].reshape(len(sample.mass), -1, trace.layout.tokens)
    return frames.sum(axis=-1, dtype=np.float64)


def _by_part(trace: Trace, sample: Sample) -> Floats:
    """Attention on each of `PARTS`, `[layers, 4]`."""
    frames = frame_mass(trace, sample)
    before = [PARTS.index(role.value) for role in trace.roles[: sample.frame]]
    parts = np.zeros((len(PARTS), len(frames)))
    np.add.at(parts, [*before, CURRENT], frames.T)
    parts[PARTS.index(Role.TEXT.value)] = sample.mass[:, : trace.text].sum(axis=1, dtype=np.float64)
    return parts.T


def _samples(trace: Trace, branch: int | None) -> list[Sample]:
    found = [sample for sample in trace.samples if branch in (None, sample.branch)]
    if not found:
        what = "no samples" if branch is None else f"no samples of branch {branch}"
        raise InputError(f"the trace has {what}: record it again")
    return found


def _from(trace: Trace, branch: int | None, frame: int) -> list[Sample]:
    """Samples of latent frames from `frame` on."""
    samples = [sample for sample in _samples(trace, branch) if sample.frame >= frame]
    if not samples:
        raise InputError(
            f"the trace has no history: its samples are of the first {frame} latent frames, "
            "expected later ones; record a longer clip"
        )
    return samples


def _keys(samples: Sequence[Sample]) -> tuple[NDArray[np.int64], ...]:
    """Clip, latent frame and step of each sample."""
    keys = [(sample.clip, sample.frame, sample.step) for sample in samples]
    return tuple(np.array(keys, dtype=np.int64).T)


def _in_order(step: NDArray[np.int64]) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """Steps as numbers of which the commit's is the largest, and all that there are, ascending."""
    order = np.where(step == COMMIT, np.iinfo(np.int64).max, step)
    known = sorted(set(step.tolist()), key=lambda one: (one == COMMIT, one))
    return order, tuple(known)


def _means(values: Floats, *keys: NDArray[np.int64]) -> Floats:
    """Means over rows that share their keys: axes `[*keys, ...]`, each key's values ascending.

    NaN is left out; where nothing is left the mean is NaN.
    """
    group, shape = np.zeros(len(values), dtype=np.int64), []
    for key in keys:
        known, number = np.unique(key, return_inverse=True)
        group = group * len(known) + number
        shape.append(len(known))
    flat = values.reshape(len(values), -1)
    total = np.zeros((int(np.prod(shape)), flat.shape[1]))
    count = np.zeros_like(total)
    np.add.at(total, group, np.nan_to_num(flat))
    np.add.at(count, group, np.isfinite(flat))
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return mean.reshape(*shape, *values.shape[1:])


def _chained(mass: Floats, clip: NDArray[np.int64], seed: int) -> tuple[Floats, Floats]:
    """Shares of history `[rows, D]` of `mass [samples, rows, D]`, and those of resampled clips.

    mu_{d+1} / mu_d is the ratio of sums over all samples that have a frame at d + 1.
    """
    both = np.isfinite(mass[..., 1:])
    pairs = np.stack((np.where(both, mass[..., :-1], 0), np.where(both, mass[..., 1:], 0)))
    clips = np.unique(clip)
    sums = np.stack([pairs[:, clip == one].sum(axis=1) for one in clips])  # [clips, 2, rows, D-1]
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(clips), np.full(len(clips), 1 / len(clips)), size=_DRAWS)
    return _shares(sums.sum(axis=0)), _shares(np.tensordot(drawn, sums, axes=1).swapaxes(0, 1))


def _shares(sums: Floats) -> Floats:
    """`[2, ..., D-1]`, sums at d and at d + 1, as shares `[..., D]` that sum to 1."""
    near, far = sums
    ratio = np.divide(far, near, out=np.zeros_like(far), where=near > 0)
    first = np.ones((*near.shape[:-1], 1))
    curve = np.concatenate((first, np.cumprod(ratio, axis=-1)), axis=-1)
    return curve / curve.sum(axis=-1, keepdims=True)


def _plain(interval: Interval) -> dict[str, Any]:
    """An interval as lists."""
    bounds = {name: _known(getattr(interval, name)) for name in ("mean", "low", "high")}
    return {"clips": interval.rows, **bounds}


def _known(values: Floats) -> list[Any]:
    """Plain lists; None for what was never sampled."""
    known = values.astype(object)
    known[~np.isfinite(values)] = None
    return known.tolist()


@dataclass(frozen=True, kw_only=True)
class Decay:
    """`mu_d = scale * rho^d` fitted to attention by distance, a power law beside it, a judgement.

    Attributes:
        rho, half_life: with their 95 % bounds; half-life `log(1/2) / log(rho)` in latent frames,
            infinite where rho reaches 1.
        scale: C.
        r2: share of the variation of log mu that the fit explains.
        misfit: typical deviation of log mu from the fit; 0.1 is 10 %.
        power, power_scale, power_r2: of `mu_d = power_scale * d^-power`.
        aicc_gain: AICc of the exponential less that of the power law: positive where the latter
            fits better. Both have two parameters, so only residuals speak.
        distances: how many were fitted.
        verdict, reason: what to believe; a fit that was refused keeps its numbers.
    """

    rho: float
    rho_low: float
    rho_high: float
    half_life: float
    half_life_low: float
    half_life_high: float
    scale: float
    r2: float
    misfit: float
    power: float
    power_scale: float
    power_r2: float
    aicc_gain: float
    distances: int
    verdict: Verdict
    reason: str

    def at(self, distances: ArrayLike) -> Floats:
        """The fitted exponential."""
        return self.scale * self.rho ** np.asarray(distances, dtype=np.float64)

    def power_at(self, distances: ArrayLike) -> Floats:
        """The fitted power law."""
        return self.power_scale * np.asarray(distances, dtype=np.float64) ** -self.power

    def to_json(self) -> dict[str, Any]:
        """Plain values; None for what is infinite or unknown."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def fit_decay(
    mu: ArrayLike, se: ArrayLike | None = None, *, draws: ArrayLike | None = None
) -> Decay:
    """Fit `mu_d = C rho^d` (methods Eq. 4) to attention `mu [D]` at d = 1..D, and judge the fit.

    Least squares of log mu, weighted by the errors `se [D]` if known; `draws [n, D]` are mu of
    resampled clips and give errors, and that of rho with their correlations. Without either the
    scatter about the line is the error. Distances that hold no attention are left out. Verdicts:

    - "exponential does not fit": values are 20 % off the curve and further than errors allow, or a
      falling curve explains less than 90 % of what known errors leave to explain, or a power law
      is clearly better (AICc by 6), or attention ends where the curve goes on;
    - "no decay": else, if the slope is not below zero beyond its error;
    - "exponential": else. "cannot be told": fewer than three distances.

    Raises InvalidSetting for values that are no attention.
    """
    values = _attention(mu)
    used = values > _NOTHING * values.sum()
    d, y = np.flatnonzero(used) + 1.0, np.log(values[used])
    error, logs = _errors(values, se, draws, used)
    weights = np.ones_like(y) if error is None else 1 / (error**2 + _LEAST_ERROR**2)
    line, power = _line(d, y, weights), _line(np.log(d), y, weights)
    beyond = _slope_error(line, logs, known=error is not None)
    rho, low, high = (_exp(line.slope + by) for by in (0, -beyond, beyond))
    verdict, reason = _judge(line, power, beyond, known=error is not None)
    missing = _exp(line.start) * rho ** _unused(used) > _ABSENT * values.sum()
    if verdict == "exponential" and missing.any():
        verdict = "exponential does not fit"
        reason = f"there is no attention at d = {_unused(used).min():.0f}, where it expects some"
    return Decay(
        rho=rho,
        rho_low=low,
        rho_high=high,
        half_life=_half_life(rho),
        half_life_low=_half_life(low),
        half_life_high=_half_life(high),
        scale=_exp(line.start),
        r2=line.r2,
        misfit=line.misfit,
        power=-power.slope,
        power_scale=_exp(power.start),
        power_r2=power.r2,
        aicc_gain=_aicc_gain(line, power),
        distances=len(d),
        verdict=verdict,
        reason=reason,
    )


class _Line(NamedTuple):
    """`y = start + slope x` by weighted least squares; `pull @ y` is the slope."""

    start: float
    slope: float
    error: float
    pull: Floats
    rest: Floats
    squares: float
    r2: float
    misfit: float

    @property
    def freedom(self) -> int:
        return len(self.rest) - 2


def _line(x: Floats, y: Floats, weights: Floats) -> _Line:
    """Weights are one over squared errors; `error` is then that of the slope."""
    total = weights.sum()
    centred, level = x - weights @ x / total, weights @ y / total
    spread = weights @ centred**2 or math.nan  # a single point has no slope
    pull = weights * centred / spread
    slope = float(pull @ y)
    rest = y - level - slope * centred
    squares, variation = float(weights @ rest**2), float(weights @ (y - level) ** 2)
    return _Line(
        start=float(level - slope * (weights @ x) / total),
        slope=slope,
        error=float(spread**-0.5),
        pull=pull,
        rest=rest,
        squares=squares,
        r2=1 - squares / variation if variation > total * _NOTHING**2 else 0.0,
        misfit=math.sqrt(squares / total * len(x) / max(1, len(x) - 2)),
    )


def _attention(mu: ArrayLike) -> Floats:
    """Checked, as shares that sum to 1 up to a factor."""
    values = np.asarray(mu, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise InvalidSetting(
            f"attention by distance is {np.array2string(values, precision=3, threshold=6)}, "
            "expected a number of at least 0 for each distance, one of them above 0"
        )
    return values


def _errors(
    values: Floats, se: ArrayLike | None, draws: ArrayLike | None, used: NDArray[np.bool_]
) -> tuple[Floats | None, Floats | None]:
    """Errors of log mu where used, None if unknown; log mu of the draws, None without."""
    logs = None
    if draws is not None:
        least = _NOTHING * values.sum()
        logs = np.log(np.maximum(np.asarray(draws, dtype=np.float64)[:, used], least))
    if se is None:
        return (None, None) if logs is None else (logs.std(axis=0), logs)
    errors = np.asarray(se, dtype=np.float64)
    if errors.shape != values.shape or not (errors >= 0).all() or not np.isfinite(errors).all():
        raise InvalidSetting(
            f"errors have shape {errors.shape}, lowest {errors.min(initial=0)}, expected "
            f"{values.shape}, finite, at least 0"
        )
    return errors[used] / values[used], logs


def _slope_error(line: _Line, logs: Floats | None, *, known: bool) -> float:
    """Half the 95 % interval of the slope, wider where the line misses by more than errors say."""
    if line.freedom < 1:
        return math.inf
    off = math.sqrt(line.squares / line.freedom)
    if not known:
        return _student(line.freedom) * max(off * line.error, _NOTHING)
    drawn = 0.0 if logs is None else float((logs @ line.pull).std())
    return _NORMAL * max(1.0, off) * max(line.error, drawn)


def _judge(line: _Line, power: _Line, beyond: float, *, known: bool) -> tuple[Verdict, str]:
    if line.freedom < 1:
        return "cannot be told", (
            f"{len(line.rest)} distances hold attention, expected at least 3: record longer clips"
        )
    falls = line.slope + beyond < 0
    told = f"{line.slope:+.2g} ± {beyond:.2g} a latent frame"
    beyond_errors = known and line.squares > _chi_square(line.freedom)
    poor = beyond_errors and falls and line.r2 < _EXPLAINED
    if poor or (line.misfit > _MISFIT and (beyond_errors or not known)):
        return "exponential does not fit", (
            f"values are {_exp(line.misfit) - 1:.0%} off the best exponential, R2 {line.r2:.2f}"
            + (", further than their errors allow" if known else "")
            + _wave(line.rest)
        )
    if falls and _power_is_better(line, power):
        return "exponential does not fit", (
            f"a power law d^-{-power.slope:.2g} is better (R2 {power.r2:.2f} against {line.r2:.2f},"
            f" AICc by {_aicc_gain(line, power):.0f})"
        )
    if not falls:
        return "no decay", f"the slope of log mu, {told}, is not below zero beyond its error"
    return "exponential", f"the slope of log mu is {told}, R2 {line.r2:.2f}"


def _power_is_better(line: _Line, power: _Line) -> bool:
    """Clearly, over enough distances to tell, and by an amount that anybody would notice."""
    enough = len(line.rest) >= _ENOUGH and line.misfit > _NOTICEABLE
    return enough and _aicc_gain(line, power) > _CLEARLY


def _aicc_gain(line: _Line, power: _Line) -> float:
    """AICc = n log(squares / n) and the same penalty for both."""
    exact = 1e-12 * max(1.0, line.error**-2)  # two fits without residuals are equally good
    return len(line.rest) * math.log((line.squares + exact) / (power.squares + exact))


def _wave(rest: Floats) -> str:
    """Names the period of residuals that are mostly one wave of at least two turns."""
    power = np.abs(np.fft.rfft(rest - rest.mean())) ** 2
    turns = int(power.argmax())
    if len(rest) < 6 or turns < 2 or power[turns] < 0.6 * power.sum():
        return ""
    return f"; they go up and down every {len(rest) / turns:.1f} latent frames"


def _unused(used: NDArray[np.bool_]) -> Floats:
    return np.flatnonzero(~used) + 1.0


def _exp(value: float) -> float:
    return math.inf if value > _HUGE else math.exp(value)


def _half_life(rho: float) -> float:
    """Latent frames after which attention has halved; 0 for none left, infinite without decay."""
    if math.isnan(rho) or rho <= 0:
        return rho
    return math.inf if rho >= 1 else math.log(0.5) / math.log(rho)


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t: exact for few degrees, then its series about the normal."""
    few = (12.706, 4.303, 3.182, 2.776)
    if freedom <= len(few):
        return few[freedom - 1]
    z = _NORMAL
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + (z**3 + z) / (4 * freedom) + second / freedom**2


def _chi_square(freedom: int) -> float:
    """99 % quantile (Wilson and Hilferty's cube)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 2.326 * math.sqrt(part)) ** 3
