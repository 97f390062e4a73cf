"""WHICH tokens stay. A policy turns a timeline and a budget into slots to keep; it owns no tensor.

    >>> PackCache(budget=1, window=4)
    PackCache(budget=1, window=4)

A new policy is one frozen dataclass with `counts()`: how many tokens each history frame keeps,
newest first. Which tokens those are is the order inside a frame (selectors); anchors stay anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from packcache.budget import (
    Budget,
    allocate,
    budget_tokens,
    decay_weights,
    fixed_shares,
)
from packcache.checks import at_least, flag, number, one_of
from packcache.errors import InputFileError, InvalidSetting
from packcache.files import read_result
from packcache.rivals.deep_forcing import DeepSink
from packcache.rivals.fademem import PowerLaw
from packcache.selectors import Borders, Order, Score, Scores, asked, rank_tokens
from packcache.timeline import HeldFrame, Ints, Role, Span, Timeline

__all__ = [
    "CALIBRATION",
    "POLICIES",
    "DeepForcing",
    "FadeMem",
    "FullCache",
    "NoHistory",
    "PackCache",
    "Policy",
    "RandomDrop",
    "SinkWindow",
    "SlidingWindow",
    "UniformHistory",
    "check_stored",
    "parse_policies",
    "parse_policy",
]

Fill = Literal["budget", "window"]

#: The schema of a file that `PackCache.from_file` reads.
CALIBRATION = "packcache.calibration/1"


@dataclass(frozen=True, kw_only=True, repr=False)
class Policy:
    """Keeps everything; subclasses say otherwise. Printable: settings that differ from the default.

    Units: distances and windows in latent frames, counts in tokens of one branch.
    """

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"
        )

    def settings(self) -> dict[str, Any]:
        """Settings that differ from their defaults, and all that have none (budget, window)."""
        shown = ("budget", "window", "frames")
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in shown or f.default is MISSING or getattr(self, f.name) != f.default
        }

    # --- what a policy may override ---------------------------------------------------------

    @property
    def num_sinks(self) -> int:
        """History frames kept whole from the start of the clip, on top of any budget."""
        return 0

    @property
    def reach(self) -> int | None:
        """Oldest distance d at which a frame that is no sink may hold a token; None: any."""
        return None

    def counts(
        self, frames: Sequence[HeldFrame], distances: Sequence[int], budget: int | None
    ) -> list[int]:
        """Tokens each non-sink history frame keeps, newest first as `frames` and `distances`."""
        return [frame.count for frame in frames]

    @property
    def asks(self) -> Score | None:
        """Which scores the cache must make for `rank`; None: the order reads no tensor."""
        return None

    def rank(self, span: Span, before: Span | None, scores: Scores | None = None) -> Ints | None:
        """In which order the span gives up tokens, fixed at commit; None: it gives none.

        `scores [tokens]` are given to a policy that asks, for every latent frame.
        """
        return None if span.role.is_anchor else rank_tokens(span, before)

    def budget_for(
        self, frame_tokens: int, visible_tokens: int | None = None, token_bytes: int | None = None
    ) -> int | None:
        """The budget in tokens for frames of this size, None without limit; raises if unfit."""
        return None

    def max_history(self, frame_tokens: int, budget: int | None) -> int | None:
        """Most history tokens held after a commit, sinks included; None: grows without bound."""
        reach = self.reach
        return None if reach is None else (reach + self.num_sinks) * frame_tokens

    # --- what every policy shares -----------------------------------------------------------

    def plan(self, timeline: Timeline, budget: int | None = None) -> list[int]:
        """Slots to keep, ascending, counted in the conditional branch. Needs no torch.

        `budget` is in tokens; None takes the policy's own for the newest history frame's size.
        """
        history = timeline.history
        if budget is None and history:
            newest = history[0].span
            budget = self.budget_for(newest.tokens, int(newest.visible_mask().sum()))
        keep = {id(entry): self._anchor_count(entry) for entry in timeline.anchors}
        rest = [e for e in history if not self.is_sink(timeline, e)]
        counts = self.counts(rest, [timeline.distance(e) for e in rest], budget)
        keep |= {id(entry): count for entry, count in zip(rest, counts, strict=True)}
        slots: list[int] = []
        for entry, where in timeline.slots():
            slots.extend(_kept_slots(entry, where, keep.get(id(entry), entry.count)))
        return slots

    def is_sink(self, timeline: Timeline, entry: HeldFrame) -> bool:
        """Is this history frame one of the first `num_sinks`?"""
        return entry.span.frame - timeline.first_history < self.num_sinks

    def _anchor_count(self, entry: HeldFrame) -> int:
        return entry.count


def _kept_slots(entry: HeldFrame, where: range, count: int) -> list[int]:
    if count >= entry.count:
        return list(where)
    if count <= 0:
        return []
    kept = set(entry.best(count).tolist())
    return [slot for slot, offset in zip(where, entry.held.tolist(), strict=True) if offset in kept]


@dataclass(frozen=True, kw_only=True, repr=False)
class FullCache(Policy):
    """Every token stays: the reference, and what grows without bound."""


@dataclass(frozen=True, kw_only=True, repr=False)
class NoHistory(Policy):
    """Anchors only: no history frame is kept. The floor under every comparison."""

    @property
    def reach(self) -> int:
        return 0

    def counts(
        self, frames: Sequence[HeldFrame], distances: Sequence[int], budget: int | None
    ) -> list[int]:
        return [0 for _ in frames]


@dataclass(frozen=True, kw_only=True, repr=False)
class SlidingWindow(Policy):
    """Anchors and the newest `frames` latent frames, whole; the paper's baseline is one frame."""

    frames: int = 1

    def __post_init__(self) -> None:
        at_least("frames", self.frames, 1)

    @property
    def reach(self) -> int:
        return self.frames

    def counts(
        self, frames: Sequence[HeldFrame], distances: Sequence[int], budget: int | None
    ) -> list[int]:
        return [f.count if d <= self.frames else 0 for f, d in zip(frames, distances, strict=True)]


@dataclass(frozen=True, kw_only=True, repr=False)
class SinkWindow(SlidingWindow):
    """A sliding window that also keeps the first `sinks` history frames."""

    sinks: int = 1
    frames: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("sinks", self.sinks, 0)

    @property
    def num_sinks(self) -> int:
        return self.sinks


@dataclass(frozen=True, kw_only=True, repr=False)
class UniformHistory(Policy):
    """One budget shared equally over the window: the control for the decay.

    `budget` counts history tokens: latent frames, or "4084tok", "512MiB"; None is unlimited.
    `window` W is how many latent frames may hold tokens; None is unlimited.
    """

    budget: Budget | None = 1
    window: int | None = 4
    order: Order = "visible"
    borders: Borders = "first"

    def __post_init__(self) -> None:
        if self.window is not None:
            at_least("window", self.window, 1)
        if self.budget is not None:
            _check_budget(self.budget)
        one_of("order", self.order, get_args(Order))
        one_of("borders", self.borders, get_args(Borders))

    @property
    def reach(self) -> int | None:
        return self.window

    def weights(self, distances: Sequence[int]) -> list[float]:
        return [1.0 for _ in distances]

    def floors(self, frames: Sequence[HeldFrame]) -> list[int]:
        return [1 for _ in frames]

    def caps(self, frames: Sequence[HeldFrame]) -> list[int]:
        """n_d: what a frame may keep at most."""
        return [frame.count for frame in frames]

    def counts(
        self, frames: Sequence[HeldFrame], distances: Sequence[int], budget: int | None
    ) -> list[int]:
        inside = sum(1 for d in distances if self.window is None or d <= self.window)
        kept = frames[:inside]
        shared = self.share(kept, distances[:inside], budget)
        return shared + [0] * (len(frames) - inside)

    def share(
        self, frames: Sequence[HeldFrame], distances: Sequence[int], budget: int | None
    ) -> list[int]:
        """Counts of the frames inside the window."""
        caps = self.caps(frames)
        if budget is None:
            return caps
        return allocate(caps, budget, weights=self.weights(distances), floors=self.floors(frames))

    @property
    def asks(self) -> Score | None:
        return asked(self.order)

    def rank(self, span: Span, before: Span | None, scores: Scores | None = None) -> Ints | None:
        if span.role.is_anchor:
            return None
        return rank_tokens(span, before, order=self.order, borders=self.borders, scores=scores)

    def budget_for(
        self, frame_tokens: int, visible_tokens: int | None = None, token_bytes: int | None = None
    ) -> int | None:
        tokens = budget_tokens(self.budget, frame_tokens=frame_tokens, token_bytes=token_bytes)
        if tokens is not None and self.window is not None and tokens < self.window:
            raise InvalidSetting(
                f"budget {self.budget} is {tokens} tokens for a window of {self.window} latent "
                "frames, expected at least one token a frame: raise the budget or lower the window"
            )
        return tokens

    def max_history(self, frame_tokens: int, budget: int | None) -> int | None:
        bound = super().max_history(frame_tokens, budget)
        if budget is None:
            return bound
        return budget if bound is None else min(bound, budget)


@dataclass(frozen=True, kw_only=True, repr=False)
class PackCache(UniformHistory):
    """The paper's method: a fixed budget, exponentially fewer tokens for older frames (2601.04359).

    Args:
        budget: history budget B; a number counts latent frames as this policy stores them.
        window: W, latent frames that may hold tokens.
        half_life: frames after which a frame's weight halves; w_d = 2^(-min(d, W-1)/half_life).
        n_sinks: first history frames kept whole, on top of the budget.
        min_share: b_min, the share of a frame that every frame of the window keeps at least.
        fill: keep everything until the budget is exceeded, or whole frames until W of them.
        order, borders, seed: in which order a frame gives up tokens (selectors; seed: "random";
            "expected" and "observed" need a model whose attention shows the cache its queries).
        redistribute: False gives each frame exactly its share of one frame (Eq. 7 to the letter).
        drop_remasked: drop re-masked tokens at commit; a frame then counts its visible tokens.
        image_share: share of the condition image that stays; 1 keeps the anchor whole.

    Presets: `paper()`, `paper_literal()`, `paper_visible()` (methods 1.3-1.6).
    """

    half_life: float = 1.0
    n_sinks: int = 0
    min_share: float = 0.0
    fill: Fill = "budget"
    redistribute: bool = True
    drop_remasked: bool = False
    image_share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("n_sinks", self.n_sinks, 0)
        at_least("seed", self.seed, 0)
        one_of("fill", self.fill, get_args(Fill))
        number("half_life", self.half_life, lambda x: x > 0, "frames above 0")
        number("min_share", self.min_share, lambda x: 0 <= x <= 1, "0 to 1 of a frame")
        number("image_share", self.image_share, lambda x: 0 < x <= 1, "above 0, at most 1")
        flag("redistribute", self.redistribute)
        flag("drop_remasked", self.drop_remasked)
        if self.window is None and (self.fill == "window" or not self.redistribute):
            raise InvalidSetting("fill='window' and redistribute=False need a window, got None")
        if not self.redistribute and self.half_life > 1:
            raise InvalidSetting(
                f"half_life is {self.half_life}, expected at most 1 with redistribute=False: the "
                "shares would add up to more than the budget; or leave redistribute=True"
            )

    @classmethod
    def paper(cls) -> PackCache:
        """One latent frame of history over four, Eq. 7 by water-filling. The default."""
        return cls()

    @classmethod
    def paper_literal(cls) -> PackCache:
        """Keep ratios 2^-min(d, W-1) of each frame, nothing redistributed (reading Q4)."""
        return cls(redistribute=False)

    @classmethod
    def paper_visible(cls) -> PackCache:
        """Re-masked tokens deleted at commit, three frames of visible tokens (readings P1, Q3)."""
        return cls(budget=3, drop_remasked=True)

    @classmethod
    def from_file(cls, path: str | Path) -> PackCache:
        """The policy of a calibration file: JSON with our `schema` and `settings` by field name.

        Raises InputFileError for a file that is none, names an unknown setting or a wrong value.
        """
        path = Path(path)
        told = read_result(path, CALIBRATION, "give a file that packcache calibrate wrote")
        settings = told.get("settings")
        if not isinstance(settings, dict):
            raise InputFileError(f"{path} has settings {settings!r}, expected them by name")
        known = [f.name for f in fields(cls)]
        for name, value in settings.items():
            if name not in known:
                raise InputFileError(
                    f"{path} sets {name!r}, expected settings of {cls.__name__}: {', '.join(known)}"
                )
            if isinstance(value, (list, dict)):
                raise InputFileError(f"{path} sets {name} to {value}, expected one plain value")
        try:
            return cls(**settings)
        except InvalidSetting as error:
            raise InputFileError(f"{path}: {error}") from None

    @property
    def num_sinks(self) -> int:
        return self.n_sinks

    def weights(self, distances: Sequence[int]) -> list[float]:
        last = None if self.window is None else self.window - 1
        return decay_weights(distances, self.half_life, last=last)

    def floors(self, frames: Sequence[HeldFrame]) -> list[int]:
        return [max(1, _share(self.min_share, frame.span.tokens)) for frame in frames]

    def caps(self, frames: Sequence[HeldFrame]) -> list[int]:
        return [min(f.count, self._whole(f)) for f in frames]

    def _whole(self, frame: HeldFrame) -> int:
        """Tokens a frame holds before anything is packed."""
        return int(frame.span.visible_mask().sum()) if self.drop_remasked else frame.span.tokens

    def share(
        self, frames: Sequence[HeldFrame], distances: Sequence[int], budget: int | None
    ) -> list[int]:
        caps = self.caps(frames)
        if budget is None:
            return caps
        filling = caps == [self._whole(frame) for frame in frames]  # nothing was packed yet
        if filling and self.fill == "window" and len(frames) < (self.window or 0):
            return caps
        if self.redistribute:
            return super().share(frames, distances, budget)
        if filling and self.fill == "budget" and sum(caps) <= budget:
            return caps
        return fixed_shares(caps, budget, weights=self.weights(distances))

    def rank(self, span: Span, before: Span | None, scores: Scores | None = None) -> Ints | None:
        if self._stays_whole(span):
            return None
        return rank_tokens(
            span,
            before,
            order=self.order,
            borders=self.borders,
            remasked_last=self.drop_remasked,
            seed=self.seed,
            scores=scores,
        )

    def budget_for(
        self, frame_tokens: int, visible_tokens: int | None = None, token_bytes: int | None = None
    ) -> int | None:
        stored = visible_tokens if self.drop_remasked and visible_tokens else frame_tokens
        return super().budget_for(stored, visible_tokens, token_bytes)

    def max_history(self, frame_tokens: int, budget: int | None) -> int | None:
        sinks = self.n_sinks * frame_tokens
        if self.fill == "window":
            return Policy.max_history(self, frame_tokens, budget)
        bound = super().max_history(frame_tokens, budget)
        return None if bound is None else bound + sinks

    def _stays_whole(self, span: Span) -> bool:
        return span.role is Role.TEXT or (span.role is Role.IMAGE and self.image_share == 1)

    def _anchor_count(self, entry: HeldFrame) -> int:
        if entry.span.role is Role.TEXT:
            return entry.count
        return min(entry.count, _share(self.image_share, entry.span.tokens))


@dataclass(frozen=True, kw_only=True, repr=False)
class RandomDrop(PackCache):
    """PackCache's counts in a random nested order: the control for the order inside a frame."""

    order: Order = "random"


@dataclass(frozen=True, kw_only=True, repr=False)
class FadeMem(PowerLaw, UniformHistory):
    """FadeMem's schedule by selection (2606.10671): theirs merges and re-positions (`rivals`).

    The budget is shared by `d^(beta - 1)` over all of the past; `window` bounds it if given.
    """

    window: int | None = None

    def __post_init__(self) -> None:
        PowerLaw.__post_init__(self)
        UniformHistory.__post_init__(self)

    def max_history(self, frame_tokens: int, budget: int | None) -> int | None:
        if budget is None:
            return Policy.max_history(self, frame_tokens, budget)
        whole = self.sinks * frame_tokens
        bound = None if self.window is None else self.window * frame_tokens
        return whole + (budget if bound is None else min(bound, budget))


@dataclass(frozen=True, kw_only=True, repr=False)
class DeepForcing(DeepSink, Policy):
    """Deep Forcing's sinks and pruning in this cache (2512.05081); what differs: `rivals`."""


#: Policies by the names the command line knows.
POLICIES: dict[str, type[Policy]] = {
    "full": FullCache,
    "window": SlidingWindow,
    "sink": SinkWindow,
    "uniform": UniformHistory,
    "random": RandomDrop,
    "packcache": PackCache,
    "none": NoHistory,
    "fademem": FadeMem,
    "deepforcing": DeepForcing,
}

#: How the name of a calibration file ends, and what a policy may be called.
_FILE = ".json"
_KNOWN = f"{', '.join(POLICIES)}, or a {_FILE} file of packcache calibrate"


def parse_policy(text: str, *, stored: bool = False) -> Policy:
    """A policy from its name and settings, `packcache:budget=1,window=4`, or from a calibration
    file, `mine.json:budget=2`; not where the text is `stored` for later, since files change.

    Raises InvalidSetting, and InputFileError for a file that is no calibration.
    """
    name, _, rest = text.strip().partition(":")
    if stored:
        check_stored(text)
    kind, make = _named(name)
    settings = [part.strip() for part in rest.split(",") if part.strip()]
    known = [f.name for f in fields(kind)]
    values: dict[str, Any] = {}
    for part in settings:
        key, equals, value = part.partition("=")
        if key not in known:
            raise InvalidSetting(
                f"policy {name!r} has no setting {key!r}: known are {', '.join(known) or 'none'}"
            )
        if not equals:
            raise InvalidSetting(
                f"setting {key!r} of policy {name!r} has no value: write {key}=..."
            )
        values[key] = _value(value)
    return make(**values)


def parse_policies(text: str, *, stored: bool = False) -> dict[str, Policy]:
    """Policies by their spelling, from a list with commas: `full,packcache:budget=1,window=4`.

    A part with `=` but no name continues the one before. A file goes by its name alone; where
    spellings are `stored`, as with `parse_policy`, there is none.
    """
    spellings: list[str] = []
    for part in (piece.strip() for piece in text.split(",")):
        if spellings and "=" in part and ":" not in part:
            spellings[-1] += f",{part}" if ":" in spellings[-1] else f":{part}"
        elif part:
            spellings.append(part)
    if not spellings:
        raise InvalidSetting(f"no policy in {text!r}: known are {_KNOWN}")
    found: dict[str, Policy] = {}
    for spelling in spellings:
        label, policy = _label(spelling), parse_policy(spelling, stored=stored)
        if found.setdefault(label, policy) != policy:
            raise InvalidSetting(f"two policies are called {label!r}: rename one of the files")
    return found


def check_stored(text: str) -> None:
    """Refuses a spelling that cannot stand for a result: what a file holds may change."""
    name = text.strip().partition(":")[0]
    if name.endswith(_FILE):
        raise InvalidSetting(
            f"policy {name!r} is a file, which may change: write its settings, packcache:budget=..."
        )


def _named(name: str) -> tuple[type[Policy], Callable[..., Policy]]:
    """The class of a policy that is spelled so, and what makes it of further settings."""
    if name.endswith(_FILE):
        policy = PackCache.from_file(name)
        return PackCache, partial(replace, policy)
    if name not in POLICIES:
        raise InvalidSetting(f"unknown policy {name!r}: known are {_KNOWN}")
    return POLICIES[name], POLICIES[name]


def _label(spelling: str) -> str:
    """`mine:budget=2` of `out/mine.json:budget=2`: labels become names of files and folders."""
    name, colon, rest = spelling.partition(":")
    return (Path(name).stem if name.endswith(_FILE) else name) + colon + rest


def _share(share: float, tokens: int) -> int:
    """Tokens of a share, rounded up, as written: 0.55 of 100 is 55 although its float is above."""
    return math.ceil(Fraction(str(share)) * tokens)


def _value(text: str) -> Any:
    """A setting as typed on a command line: none, true, false, integer, float, or text."""
    words: dict[str, Any] = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _check_budget(budget: Budget) -> None:
    """What can be said of a budget before the size of a frame is known."""
    budget_tokens(budget, frame_tokens=1 << 30, token_bytes=1)
