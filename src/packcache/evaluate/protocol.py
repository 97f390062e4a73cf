"""The protocol of an evaluation: what is asked of every policy, fixed before the first result.

    asked = read_protocol(Path("benchmarks/protocol.toml"))
    asked.rows["packcache 2"].make(), asked.hash

A protocol is a TOML file; the one of the embedded model is benchmarks/protocol.toml. Results carry
its hash, and those of another hash are exploratory (DESIGN 9, evaluation 8d).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from packcache.errors import InputFileError, InvalidSetting
from packcache.policies import PackCache, Policy, parse_policy
from packcache.positions import PositionMode, RebaseRule
from packcache.timeline import HeldFrame, Role

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same module under its older name
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

__all__ = [
    "AnchorsDropped", "ClipsPlan", "MemoryPlan", "Primary", "Protocol", "ReplayPlan", "Row",
    "RunningPlan", "read_protocol",
]  # fmt: skip

SCHEMA = "packcache.protocol/1"

#: What a row is for: all are compared with the one reference, and with baselines beside it;
#: controls have to differ from the reference, floors say what it differs from itself by.
Job = Literal["reference", "baseline", "policy", "control", "floor"]
Kernel = Literal["usual", "math"]
Part = Literal["memory", "replay", "running"]
Better = Literal["more", "less", "near"]

#: More primaries than these cannot be told from a choice made afterwards.
MOST_PRIMARIES = 4

#: Hashes of protocols that were committed before the first result they govern; any other file is
#: exploratory, and so are the ablations, which say so themselves.
REGISTERED = {"ce4da604800a5e32": "benchmarks/protocol.toml"}

#: Why results of any other one are exploratory.
UNREGISTERED = "not by a registered protocol"

#: What a primary can be, and the part that asks it.
PRIMARIES: dict[str, Part] = {
    "recall": "memory", "replay_kl": "replay", "identity_drift": "running",
    "motion_ratio": "running",
}  # fmt: skip

#: Models whose clips can be judged: what is true in them is known.
WORLDS = ("digits",)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, repr=False)
class AnchorsDropped(PackCache):
    """A control: the method, but the condition image goes at its commit."""

    def _anchor_count(self, entry: HeldFrame) -> int:
        return 0 if entry.span.role is Role.IMAGE else entry.count


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of every table: a policy as spelled on the command line, and how it is run.

    `kernel` "math" computes attention in another order, `other_draws` takes other seeds: what the
    reference differs from itself by.
    """

    label: str
    policy: str
    role: Job = "policy"
    positions: PositionMode = "rebase"
    rebase: RebaseRule = "trained"
    kernel: Kernel = "usual"
    drops_image: bool = False
    other_draws: bool = False

    def make(self) -> Policy:
        """The policy. Raises InvalidSetting for one that is not known."""
        policy = parse_policy(self.policy, stored=True)
        if not self.drops_image:
            return policy
        if type(policy) is not PackCache:
            raise InvalidSetting(
                f"row {self.label!r} drops the image of {self.policy!r}, expected packcache"
            )
        return AnchorsDropped(**{f.name: getattr(policy, f.name) for f in fields(policy)})


@dataclass(frozen=True, kw_only=True)
class ClipsPlan:
    """Whose clips: a model of the package, the scenes' seed and the draws' seeds."""

    model: str = "digits"
    split: str = "test"
    seed: int = 0
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class ReplayPlan:
    """Teacher-forced: `prompts` clips, asked when shares `known` of a latent frame are told."""

    prompts: int
    frames: int
    known: tuple[float, ...] = (0.0,)
    true_prompts: int = 0


@dataclass(frozen=True, kw_only=True)
class RunningPlan:
    """Free running: clips of `frames` pixel frames for `rows` (empty: all), `seeds` a prompt.

    `prompts_of` are fewer prompts for rows by name.
    """

    frames: int
    prompts: int
    seeds: int = 1
    rows: tuple[str, ...] = ()
    prompts_of: Mapping[str, int] = field(default_factory=dict)

    def count(self, label: str) -> int:
        """Prompts of a row; 0 if it does not run."""
        if self.rows and label not in self.rows:
            return 0
        return min(self.prompts, self.prompts_of.get(label, self.prompts))


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The memory horizon: `clips` clips at each gap, in latent frames."""

    clips: int
    gaps: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Primary:
    """What the verdict is about: better is more, less, or near the reference.

    A row is no worse if the upper 95 % bound of what it loses is within `no_worse`; one that is to
    be near lies within `bounds`.
    """

    name: str
    part: Part
    better: Better
    no_worse: float = 0.0
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """All of it. `hash` is of the file; `quick` is what it was cut to, if it was."""

    clips: ClipsPlan
    replay: ReplayPlan
    running: tuple[RunningPlan, ...]
    memory: MemoryPlan
    rows: Mapping[str, Row]
    primaries: tuple[Primary, ...]
    exclusions: tuple[str, ...]
    hash: str
    quick: int | None = None

    @property
    def reference(self) -> Row:
        """The row that all others are held against."""
        return next(row for row in self.rows.values() if row.role == "reference")

    @property
    def exploratory(self) -> str | None:
        """Why its results decide nothing; None: they are those of a registered protocol."""
        if self.quick is not None:
            return f"cut to {self.quick} prompts"
        return None if self.hash in REGISTERED else UNREGISTERED

    def rows_of(self, *roles: Job) -> list[Row]:
        return [row for row in self.rows.values() if row.role in roles]

    def intact(self, control: Row) -> Row | None:
        """The row that a control is a broken copy of: PackCache of the same settings, run as the
        reference is. None: there is none."""
        settings = control.policy.partition(":")[2]
        usual = self.reference
        for row in self.rows_of("baseline", "policy"):
            name, _, own = row.policy.partition(":")
            as_usual = all(
                getattr(row, f.name) == getattr(usual, f.name)
                for f in fields(row)
                if f.name in _HOW
            )
            if name == "packcache" and own == settings and as_usual:
                return row
        return None

    def cut(self, prompts: int) -> Protocol:
        """The same with so many prompts at most, one seed, no clip above 97 frames: minutes."""
        if prompts < 2:
            raise InvalidSetting(f"prompts is {prompts}, expected at least 2: nothing is paired")
        running = [replace(p, prompts=min(p.prompts, prompts), seeds=1) for p in self.running]
        replay = replace(
            self.replay,
            prompts=min(self.replay.prompts, prompts),
            true_prompts=min(self.replay.true_prompts, prompts),
        )
        return replace(
            self,
            replay=replay,
            running=tuple(plan for plan in running if plan.frames <= QUICK_FRAMES),
            memory=replace(self.memory, clips=min(self.memory.clips, prompts)),
            quick=prompts,
        )


#: What a row says of how its policy is run.
_HOW = ("positions", "rebase", "kernel", "drops_image", "other_draws")

#: Longer clips are left out of a quick evaluation.
QUICK_FRAMES = 97


def read_protocol(path: Path) -> Protocol:
    """Raises InputFileError, one line, for a file that is none."""
    try:
        told = path.read_bytes()
        data = tomllib.loads(told.decode())
    except OSError as error:
        raise InputFileError(
            f"{path} cannot be read ({error.strerror}): name a protocol such as "
            "benchmarks/protocol.toml"
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputFileError(f"{path} is no TOML ({error}): correct it") from None
    if data.get("schema") != SCHEMA:
        raise InputFileError(
            f"{path} has schema {data.get('schema')!r}, expected {SCHEMA!r}: name another file"
        )
    try:
        return _protocol(data, hashlib.sha256(told).hexdigest()[:16])
    except InvalidSetting as error:
        raise InputFileError(f"{path}: {error}") from None


def _protocol(data: Mapping[str, Any], digest: str) -> Protocol:
    known = {"schema", "clips", "replay", "running", "memory", "row", "primary", "exclusions"}
    if data.keys() != known:
        odd = sorted(data.keys() ^ known)
        raise InvalidSetting(f"unknown or missing part {odd[0]!r}: parts are {sorted(known)}")
    rows = [_made(Row, row, f"row {n}") for n, row in enumerate(data["row"])]
    asked = Protocol(
        clips=_made(ClipsPlan, data["clips"], "clips"),
        replay=_made(ReplayPlan, data["replay"], "replay"),
        running=tuple(_made(RunningPlan, plan, "running") for plan in data["running"]),
        memory=_made(MemoryPlan, data["memory"], "memory"),
        rows={row.label: row for row in rows},
        primaries=tuple(_made(Primary, one, "primary") for one in data["primary"]),
        exclusions=_rules(data["exclusions"]),
        hash=digest,
    )
    _check(asked, [row.label for row in rows])
    return asked


def _rules(data: Mapping[str, Any]) -> tuple[str, ...]:
    rules = data.get("rules")
    if not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
        raise InvalidSetting(f"exclusions has rules {rules!r}, expected a list of sentences")
    return tuple(rules)


def _made(kind: type[T], data: Mapping[str, Any], where: str) -> T:
    """A dataclass from a table; lists become tuples, words must be known."""
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    values = {"part" if name == "from" else name: value for name, value in data.items()}
    odd = [name for name in values if name not in known]
    if odd:
        raise InvalidSetting(f"{where} has no setting {odd[0]!r}: known are {', '.join(known)}")
    for name, value in values.items():
        _check_type(value, str(known[name].type), f"{where} has {name}")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        made = kind(**values)
    except TypeError as error:
        raise InvalidSetting(f"{where} is incomplete: {error}") from None
    for name, allowed in _WORDS.items():
        value = getattr(made, name, None)
        if name in known and value is not None and value not in allowed:
            raise InvalidSetting(
                f"{where} has {name} {value!r}, expected one of {', '.join(allowed)}"
            )
    return made


def _check_type(value: Any, kind: str, what: str) -> None:
    """Against a field's annotation; words of a choice are checked apart."""
    wanted, inner = kind.partition("[")[::2]
    if wanted == "Mapping":
        for one in value.values() if isinstance(value, dict) else [value]:
            _check_type(one, inner.rpartition(", ")[2].rstrip("]"), what)
    elif wanted == "tuple":
        if not isinstance(value, list):
            raise InvalidSetting(f"{what} {value!r}, expected a list")
        for one in value:
            _check_type(one, inner.split(",")[0], what)
    else:
        known = _TYPES.get(wanted, (str,))  # a choice of words is an alias
        if isinstance(value, known) and (bool in known or not isinstance(value, bool)):
            return
        raise InvalidSetting(f"{what} {value!r}, expected {known[-1].__name__}")


_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}

_WORDS: dict[str, Sequence[str]] = {
    "role": get_args(Job), "kernel": get_args(Kernel), "part": get_args(Part),
    "better": get_args(Better), "positions": get_args(PositionMode),
    "rebase": get_args(RebaseRule),
}  # fmt: skip


def _check(asked: Protocol, labels: Sequence[str]) -> None:
    """What only the whole tells."""
    if len(set(labels)) < len(labels):
        raise InvalidSetting(f"two rows have one label among {', '.join(labels)}")
    references = [row.label for row in asked.rows_of("reference")]
    if len(references) != 1:
        raise InvalidSetting(f"{len(references)} rows are the reference, expected one")
    if not 1 <= len(asked.primaries) <= MOST_PRIMARIES:
        raise InvalidSetting(
            f"{len(asked.primaries)} primaries, expected 1 to {MOST_PRIMARIES}: all else is "
            "exploratory"
        )
    _check_primaries(asked.primaries)
    if asked.clips.model not in WORLDS:
        raise InvalidSetting(
            f"clips are of model {asked.clips.model!r}, whose truth nobody knows: expected "
            f"{', '.join(WORLDS)}; clips of your own are measured by packcache evaluate videos"
        )
    for row in asked.rows.values():
        row.make()
    for plan in asked.running:
        odd = [label for label in (*plan.rows, *plan.prompts_of) if label not in asked.rows]
        if odd:
            raise InvalidSetting(f"running names row {odd[0]!r}: known are {', '.join(labels)}")
        if plan.rows and references[0] not in plan.rows:
            raise InvalidSetting(f"running leaves out {references[0]!r}, the reference")
        if plan.seeds > len(asked.clips.seeds):
            raise InvalidSetting(f"running takes {plan.seeds} seeds of {len(asked.clips.seeds)}")


def _check_primaries(primaries: Sequence[Primary]) -> None:
    for one in primaries:
        if one.name not in PRIMARIES:
            raise InvalidSetting(f"unknown primary {one.name!r}: known are {', '.join(PRIMARIES)}")
        if one.part != PRIMARIES[one.name]:
            raise InvalidSetting(
                f"primary {one.name!r} is from {one.part!r}, expected {PRIMARIES[one.name]!r}"
            )
    names = [one.name for one in primaries]
    if len(set(names)) < len(names):
        raise InvalidSetting(f"two primaries have one name among {', '.join(names)}")
