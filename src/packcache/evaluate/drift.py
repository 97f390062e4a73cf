"""Drift over a clip's time: how a number changes from its first to its last frames (evaluation 8c).

    latent, values = by_latent(measured.series["sharpness"], measured.frame_numbers("sharpness"))
    found = drift(policy, against=full, seconds=1 / 3)        # [clips, latents] each, paired
    found.excess.mean, found.to_json()
    marks(PackCache(), layout=layout, latents=13)             # where the cache fills, packs, slides
    survival(times, observed)                                 # Kaplan-Meier, with its band

Clean footage drifts too (`footage.py` measures by how much), so a policy's drift says little alone:
what counts is its excess over the full cache's, clip by clip. All is plain data; nothing plots.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packcache.errors import InputError, InvalidSetting
from packcache.evaluate.statistics import (
    RESAMPLES,
    Interval,
    bootstrap,
    known_mean,
    sign_flip,
)
from packcache.policies import Policy
from packcache.timeline import FrameLayout, Role, Span, Timeline

__all__ = [
    "CHUNKS",
    "ENDS",
    "Drift",
    "Excess",
    "Marks",
    "Step",
    "Survival",
    "Worst",
    "by_latent",
    "contrast",
    "drift",
    "marks",
    "relative_contrast",
    "survival",
]

#: Share of the latent frames at each end that the contrast compares (FramePack, 2504.12626 eq. 7).
ENDS = 0.15

#: Chunks of VDE and of the worst chunk, fewer where there are fewer latent frames.
CHUNKS = 5

#: VDE divides by the first chunk: below this share of the mean level that says nothing.
_NEAR_ZERO = 0.01

Values = NDArray[np.float64]


def by_latent(
    values: ArrayLike, frames: ArrayLike | None = None, *, temporal: int = 4
) -> tuple[int, Values]:
    """A curve over pixel frames as means over latent frames, `[latents]`, and the first of these.

    `frames` are the pixel frames that the values belong to (None: 0, 1, 2, ...). Latent frame 0
    holds pixel frame 0, every other one `temporal` pixel frames; values of pairs have none in
    latent frame 0 and begin at 1. A latent frame without a value in between is an error; NaN counts
    as nothing asked, and a latent frame of nothing else is NaN.
    """
    curve = np.asarray(values, dtype=np.float64)
    numbers = np.arange(curve.size) if frames is None else np.asarray(frames, dtype=np.int64)
    if curve.ndim != 1 or not len(curve) or numbers.shape != curve.shape:
        raise InvalidSetting(
            f"values have shape {curve.shape} and frames {numbers.shape}, expected one frame for "
            "each value, and at least one value"
        )
    latents = -(-numbers // temporal)
    first = int(latents.min())
    counts = np.bincount(latents - first)
    if not counts.all():
        raise InvalidSetting(
            f"latent frame {first + int(np.argmin(counts))} has no value: give the whole curve"
        )
    asked = ~np.isnan(curve)
    known = np.bincount(latents - first, weights=asked)
    total = np.bincount(latents - first, weights=np.where(asked, curve, 0.0))
    return first, np.where(known > 0, total / np.maximum(known, 1), np.nan)


# --- drift ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The chunk whose mean lies farthest from the first one's: latent frames `first` to `last`."""

    chunk: int
    first: int
    last: int
    mean: float
    change: float  # signed, from the first chunk


@dataclass(frozen=True, kw_only=True)
class Excess:
    """The policy's signed drift minus the other's, pair by pair, and its sign-flip p."""

    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Drift:
    """How a number drifts over `clips` clips of `prompts` prompts; intervals are over prompts.

    `curve [latents]` is the mean and its 95 % band, from latent frame `first_latent` on. `signed`
    is the mean of the last `ends` latent frames minus that of the first `ends`, `absolute` the
    mean of its size, clip by clip; `slope` is a second's change; `vde` is None where it would
    divide by nearly nothing, and `vde_skipped` then says so.
    """

    curve: Interval
    first_latent: int
    clips: int
    prompts: int
    ends: int
    chunks: int
    signed: dict[str, float]
    absolute: dict[str, float]
    slope: dict[str, float]
    vde: dict[str, float] | None
    vde_skipped: str | None
    worst: Worst
    excess: Excess | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        names = ("first_latent", "clips", "prompts", "ends", "chunks", "signed", "absolute")
        names += ("slope", "vde", "vde_skipped")
        bounds = {name: getattr(self.curve, name).tolist() for name in ("mean", "low", "high")}
        return {
            **{name: getattr(self, name) for name in names},
            "curve": bounds,
            "worst": asdict(self.worst),
            "excess": asdict(self.excess) if self.excess else None,
        }


def drift(
    series: ArrayLike,
    *,
    seconds: float,
    against: ArrayLike | None = None,
    prompts: Sequence[Hashable] | None = None,
    chunks: int = CHUNKS,
    first_latent: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Drift:
    """The drift of a number given by latent frame, `series [clips, latents]`.

    Args:
        seconds: of one latent frame.
        against: the same of the same clips under the full cache; without it there is no excess.
        prompts: which prompt made each clip; clips of one are averaged before anything is
            resampled. None: each clip has its own.
        chunks: N, of VDE and the worst chunk.
        first_latent: to which latent frame the first column belongs.

    VDE: m_i the mean of chunk i, sum over i = 2..N of (N - i + 1) |m_i - m_1| / |m_1|. Theil-Sen
    slope: the median over all pairs of latent frames. Sources in evaluation 3.
    Raises InvalidSetting for values that cannot be used, InputError where the two differ in shape.
    """
    rows = _series(series)
    clips, latents = rows.shape
    _check(seconds, chunks)
    labels = _labels(prompts, clips)
    chunks = min(chunks, latents)
    resampled = partial(bootstrap, resamples=resamples, seed=seed)

    def told(per_clip: Values) -> dict[str, float]:
        return _plain(resampled(_by_prompt(per_clip, labels)))

    ends = _ends(latents)
    signed = contrast(rows)
    vde, skipped = _vde(rows, chunks)
    curves = _by_prompt(rows, labels)
    excess = None
    if against is not None:
        more = signed - contrast(_paired(against, rows))
        excess = _excess(_by_prompt(more, labels), resamples, seed)
    return Drift(
        curve=resampled(curves),
        first_latent=first_latent,
        clips=clips,
        prompts=len(curves),
        ends=ends,
        chunks=chunks,
        signed=told(signed),
        absolute=told(np.abs(signed)),
        slope=told(_theil_sen(rows) / seconds),
        vde=None if vde is None else told(vde),
        vde_skipped=skipped,
        worst=_worst(curves.mean(axis=0), chunks, first_latent),
        excess=excess,
    )


def _check(seconds: float, chunks: int) -> None:
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidSetting(f"seconds is {seconds}, expected those of a latent frame, above 0")
    if chunks < 2:
        raise InvalidSetting(f"chunks is {chunks}, expected at least 2: the first and another")


def _labels(prompts: Sequence[Hashable] | None, clips: int) -> list[Hashable]:
    labels: list[Hashable] = [*(range(clips) if prompts is None else prompts)]
    if len(labels) != clips:
        raise InvalidSetting(f"{len(labels)} prompts for {clips} clips, expected one for each")
    return labels


def _series(series: ArrayLike) -> Values:
    rows = np.asarray(series, dtype=np.float64)
    if rows.ndim != 2 or not len(rows) or rows.shape[1] < 2:
        raise InvalidSetting(
            f"series have shape {rows.shape}, expected [clips, latents] with at least 2 latent "
            "frames: one has no end to compare"
        )
    if not np.isfinite(rows).all():
        raise InvalidSetting("series hold NaN or infinity: leave such clips out and say how many")
    return rows


def _paired(against: ArrayLike, rows: Values) -> Values:
    other = _series(against)
    if other.shape != rows.shape:
        raise InputError(
            f"the policy has {rows.shape[0]} clips of {rows.shape[1]} latent frames, the one it is "
            f"held against {other.shape[0]} of {other.shape[1]}: give the same clips, cut to the "
            "shorter length, and say so"
        )
    return other


def _by_prompt(values: Values, labels: Sequence[Hashable]) -> Values:
    """Means `[prompts, ...]` over the clips of each prompt, in order of appearance."""
    rows: dict[Hashable, list[Values]] = {}
    for label, value in zip(labels, values, strict=True):
        rows.setdefault(label, []).append(value)
    return np.array([np.mean(same, axis=0) for same in rows.values()])


def _plain(interval: Interval) -> dict[str, float]:
    return {name: float(getattr(interval, name)) for name in ("mean", "low", "high")}


def contrast(curves: Values) -> Values:
    """Signed end less start of curves `[..., latents]`: means of the last and the first 15 %, of
    what is no NaN."""
    ends = _ends(curves.shape[-1])
    return known_mean(curves[..., -ends:]) - known_mean(curves[..., :ends])


def relative_contrast(curves: Values) -> Values:
    """`contrast` over the size of the start; NaN where the start is 0 or not known."""
    start = np.abs(known_mean(curves[..., : _ends(curves.shape[-1])]))
    return contrast(curves) / np.where(start > 0, start, np.nan)


def _ends(latents: int) -> int:
    """Latent frames at each end."""
    return max(1, round(ENDS * latents))


def _excess(rows: Values, resamples: int, seed: int) -> Excess:
    interval = _plain(bootstrap(rows, resamples=resamples, seed=seed))
    return Excess(**interval, p=sign_flip(rows, resamples=resamples, seed=seed))


def _theil_sen(rows: Values) -> Values:
    """Median slope a latent frame, `[clips]`."""
    first, second = np.triu_indices(rows.shape[1], 1)
    return np.median((rows[:, second] - rows[:, first]) / (second - first), axis=1)


def _vde(rows: Values, chunks: int) -> tuple[Values | None, str | None]:
    """VDE by clip, or None and why."""
    means = np.stack([part.mean(axis=1) for part in np.array_split(rows, chunks, axis=1)], axis=1)
    first = np.abs(means[:, :1])
    low = int((first <= _NEAR_ZERO * np.abs(rows).mean()).sum())
    if low:
        return None, f"the first chunk is near 0 in {low} of {len(rows)} clips"
    weights = np.arange(chunks - 1, 0, -1)
    return (np.abs(means[:, 1:] - means[:, :1]) / first) @ weights, None


def _worst(curve: Values, chunks: int, first_latent: int) -> Worst:
    parts = np.array_split(np.arange(len(curve)), chunks)
    means = np.array([curve[part].mean() for part in parts])
    chunk = int(np.abs(means - means[0]).argmax())
    return Worst(
        chunk=chunk,
        first=first_latent + int(parts[chunk][0]),
        last=first_latent + int(parts[chunk][-1]),
        mean=float(means[chunk]),
        change=float(means[chunk] - means[0]),
    )


# --- what the cache does meanwhile ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Latent frames at whose commit something first happens to the cache; None: it does not.

    `fills`: the history holds as much as it ever will; `packs`: a token is evicted; `slides`: a
    history frame leaves. What a commit does is seen from the next latent frame on: up to and with
    latent frame `packs` the clip is that of the full cache.
    """

    fills: int | None
    packs: int | None
    slides: int | None

    def to_json(self) -> dict[str, int | None]:
        return asdict(self)


def marks(
    policy: Policy,
    *,
    layout: FrameLayout,
    latents: int,
    image: bool = False,
    visible: NDArray[np.bool_] | None = None,
    token_bytes: int | None = None,
) -> Marks:
    """Where a cache of this policy fills, packs and slides in a clip of so many latent frames.

    The timeline is driven as a clip would drive it, without a tensor; text is left out, since it
    never counts. `image`: latent frame 0 is the condition image. `visible [P]` marks the tokens of
    a history frame that are not re-masked (None: all), `token_bytes` serves budgets in bytes.
    """
    if latents < 1:
        raise InvalidSetting(f"latents is {latents}, expected at least 1 latent frame")
    shown = None if visible is None else int(visible.sum())
    budget = policy.budget_for(layout.tokens, shown, token_bytes)
    ids = np.zeros(layout.tokens, dtype=np.int32)
    scores = () if policy.asks is None else (np.zeros(layout.tokens),)
    timeline, before = Timeline(), None
    fills = packs = slides = None
    most = history = 0
    for frame in range(latents):
        given = image and frame == 0
        role = Role.IMAGE if given else Role.HISTORY
        span = Span.of_frame(role, frame, layout, visible=None if given else visible, ids=ids)
        timeline.append(span, policy.rank(span, before, *scores))
        timeline.keep(policy.plan(timeline, budget))
        before, history = span, history + (not given)
        held = sum(timeline.counts().values())
        if held > most:
            fills, most = frame, held
        if packs is None and timeline.evicted_tokens:
            packs = frame
        if slides is None and len(timeline.counts()) < history:
            slides = frame
    return Marks(fills=fills if packs is not None else None, packs=packs, slides=slides)


# --- survival ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Step:
    """From `time` on a share `survival` is left, 95 % band `low` to `high`.

    Just before, `at_risk` clips were watched and whole; of them `lost` were lost now.
    """

    time: float
    survival: float
    low: float
    high: float
    at_risk: int
    lost: int


@dataclass(frozen=True, kw_only=True)
class Survival:
    """A Kaplan-Meier curve: steps from time 0 on, known up to `until`."""

    steps: tuple[Step, ...]
    until: float
    clips: int
    prompts: int
    censored: int

    def at(self, time: float) -> Step:
        """The step that holds at a time."""
        if not 0 <= time <= self.until:
            raise InvalidSetting(
                f"survival at {time} was asked, expected 0 to {self.until}: no clip was watched "
                "longer"
            )
        return next(step for step in reversed(self.steps) if step.time <= time)

    @property
    def median(self) -> float | None:
        """The first time at which at most half are left; None: more than half are to the end."""
        return next((step.time for step in self.steps if step.survival <= 0.5), None)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "median": self.median}


def survival(
    times: ArrayLike,
    observed: ArrayLike,
    *,
    prompts: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> Survival:
    """Kaplan-Meier survival of clips: how long an identity stays.

    `times [n]`: when each clip lost it, or how long it was watched; `observed [n]`: was it lost
    (false: the clip ended whole, it is censored). A clip that ends at a time counts as watched
    through that time. `prompts`: which prompt made each clip; None: each has its own.

    The band is Wilson's of the size that the curve's variance amounts to (Rothman 1978): without
    censoring exactly Wilson's of the share left, and sensible at 1 and 0, where the variance is 0.
    It is Greenwood's variance, or where clips of one prompt go together the larger one of
    resampling prompts, linearised: the squares of what all clips of a prompt pull the curve by,
    times n / (n - 1) for n prompts. Of each clip alone these squares add up to Greenwood's.
    """
    ends, lost = _watched(times, observed)
    labels = _labels(prompts, len(ends))
    if not 0 < level < 1:
        raise InvalidSetting(f"level is {level}, expected above 0 and below 1")
    z = NormalDist().inv_cdf((1 + level) / 2)
    names = list(dict.fromkeys(labels))
    of_prompt = np.array([names.index(label) for label in labels])
    left, spread, size, steps = Fraction(1), 0.0, float(len(names)), []
    pulled = np.zeros(len(ends))
    for time in np.unique([0.0, *ends[lost]]):
        watched, going = ends >= time, (ends == time) & lost
        at_risk, gone = int(watched.sum()), int(going.sum())
        left *= Fraction(at_risk - gone, at_risk)
        if 0 < gone < at_risk:  # the last loss leaves no variance: the size before it stays
            spread += gone / (at_risk * (at_risk - gone))
            pulled += (going - watched * (gone / at_risk)) / (at_risk - gone)
            size = float((1 - left) / left) / max(spread, _clustered(pulled, of_prompt))
        steps.append(_step(float(time), float(left), size, z, at_risk, gone))
    return Survival(
        steps=tuple(steps),
        until=float(ends.max()),
        clips=len(ends),
        prompts=len(names),
        censored=int((~lost).sum()),
    )


def _clustered(pulled: Values, of_prompt: NDArray[np.int64]) -> float:
    """Variance of the curve's logarithm, between prompts; 0 where each clip has its own."""
    prompts = int(of_prompt.max()) + 1
    if prompts == len(of_prompt):
        return 0.0
    if prompts == 1:
        return math.inf  # nothing is known of other prompts
    return float((np.bincount(of_prompt, pulled) ** 2).sum()) * prompts / (prompts - 1)


def _watched(times: ArrayLike, observed: ArrayLike) -> tuple[Values, NDArray[np.bool_]]:
    ends, lost = np.asarray(times, dtype=np.float64), np.asarray(observed)
    if ends.ndim != 1 or not len(ends) or ends.shape != lost.shape:
        raise InvalidSetting(
            f"times have shape {ends.shape} and observed {lost.shape}, expected one of each a clip"
        )
    if not (np.isfinite(ends).all() and (ends >= 0).all()):
        raise InvalidSetting(
            "times hold a value that is negative or not finite: a clip that lost nothing has its "
            "length as time, and observed false"
        )
    if not np.isin(lost, (0, 1)).all():
        raise InvalidSetting("observed holds other values than true and false")
    return ends, lost.astype(bool)


def _step(time: float, left: float, size: float, z: float, at_risk: int, lost: int) -> Step:
    """A step with Wilson's bounds for a share of `size` clips, which may be broken, or 0."""
    middle = (left * size + z**2 / 2) / (size + z**2)
    half = z * math.sqrt(left * (1 - left) * size + z**2 / 4) / (size + z**2)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Step(time=time, survival=left, low=low, high=high, at_risk=at_risk, lost=lost)
