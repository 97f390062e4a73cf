"""The result of a benchmark: plain values for a file, and a table to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from packcache.bench.compose import Checked
from packcache.bench.parts import Ceilings, Workload
from packcache.bench.predict import EXACT, STOCK, Prediction, frame_seconds, frame_traffic, predict
from packcache.bench.rows import OWN_LOOP, RowResult
from packcache.bench.workload import describe
from packcache.environment import environment
from packcache.errors import InputError
from packcache.lumos.cost import Operations
from packcache.policies import FullCache, Policy, SlidingWindow
from packcache.reuse import EXACT as NO_REUSE
from packcache.reuse import StepReuse

__all__ = ["SCHEMA", "Report", "earlier_rows"]

SCHEMA = "packcache.bench/1"

#: What must agree for rows of two runs to stand in one table.
_SAME_PLACE = (
    "device", "processor", "threads", "dtype", "torch", "python", "packcache", "commit",
)  # fmt: skip
_MAY_DIFFER = ("policies", "presets", "baselines", "sampled_frames")


@dataclass(kw_only=True, eq=False)
class Report:
    """A benchmark, finished or not. `about` is the workload, `new` are the rows of this run and
    `before` those of earlier ones, each of which stays until its place is taken.

    `checked` compares composed rows with networks of few layers that were really run.
    """

    workload: Workload
    about: dict[str, Any]
    environment: dict[str, Any]
    ceilings: Ceilings
    before: list[RowResult]
    new: list[RowResult]
    checked: list[Checked] = field(default_factory=list)
    complete: bool = False

    @classmethod
    def begin(
        cls, workload: Workload, ceilings: Ceilings, before: Sequence[RowResult] = ()
    ) -> Report:
        """Every row with what is predicted of it, none measured."""
        run = 1 + max((row.run for row in before), default=-1)
        forecast = predict(workload, ceilings)
        rows = []
        for policy, preset, settings in _asked(workload):
            reuse = workload.presets.get(preset, NO_REUSE)
            row = RowResult(
                policy=policy,
                preset=preset,
                settings=settings,
                reuse=asdict(reuse),
                generated=range(workload.given, workload.latents),
                ceilings=ceilings,
                run=run,
                reason=forecast.reasons.get((policy, preset)),
            )
            if row.reason is None:
                said = forecast.rows[policy, preset]
                row.predicted = _predicted(workload, said, reuse, ceilings)
            rows.append(row)
        return cls(
            workload=workload,
            about=describe(workload) | _named([*before, *rows]),
            environment=environment(workload.device, workload.dtype),
            ceilings=ceilings,
            before=list(before),
            new=rows,
        )

    @property
    def rows(self) -> list[RowResult]:
        """One of each name, earlier ones first: what was measured once is given up only for what
        was measured again."""
        measured = {row.name for row in self.before if self.done(row)}
        new = [row for row in self.new if self.done(row) or row.name not in measured]
        names = {row.name for row in new}
        return [*(row for row in self.before if row.name not in names), *new]

    # --- what the rows say of each other --------------------------------------------------------

    def done(self, row: RowResult) -> bool:
        """Was all of a row measured? Of earlier runs only rows that were, or say why not, stay."""
        if row not in self.new:
            return row.reason is None
        return row.complete(self.workload.measured_frames, self.workload.repeats)

    def find(self, policy: str, preset: str) -> RowResult | None:
        """A finished row."""
        rows = [row for row in self.rows if (row.policy, row.preset) == (policy, preset)]
        return next((row for row in rows if self.done(row)), None)

    @property
    def full(self) -> str | None:
        """The label of the full cache."""
        return next(iter(self._labels(FullCache())), None)

    def _labels(self, policy: Policy) -> list[str]:
        return [row.policy for row in self.rows if row.settings == repr(policy)]

    @property
    def reference(self) -> RowResult | None:
        """What speed-ups refer to: the full cache, exact; without one the first finished row."""
        full = self.find(self.full, EXACT) if self.full else None
        return full or next((row for row in self.rows if self.done(row)), None)

    @property
    def predicted_reference(self) -> RowResult | None:
        """What predictions refer to, measured or not: the full cache, exact, or the first row."""
        rows = [row for row in (*self.new, *self.before) if row.predicted]
        full = (row for row in rows if (row.policy, row.preset) == (self.full, EXACT))
        return next(full, rows[0] if rows else None)

    def equal_reuse(self) -> list[dict[str, Any]]:
        """Packing's share: each policy against the full cache at the same preset."""
        shares = []
        for row in self.rows:
            other = self.find(self.full, row.preset) if self.full else None
            base = row.policy == self.full or row.is_baseline
            if other is None or base or not self.done(row):
                continue
            shares.append({"policy": row.policy, "preset": row.preset, **_against(row, other)})
        return shares

    def _over(self, row: RowResult) -> dict[str, Any]:
        """Against each baseline, and against the window of one frame at equal reuse."""
        found = {name: self.find(name, EXACT) for name in self.about["baselines"]}
        window = self._labels(SlidingWindow())
        if window:
            found["window"] = self.find(window[0], row.preset)
        return {name: _against(row, other) for name, other in found.items() if other}

    # --- for a file -----------------------------------------------------------------------------

    def to_json(self, rows: Sequence[RowResult] | None = None) -> dict[str, Any]:
        """Schema packcache.bench/1; `seconds` hold what was measured, the rest follows.

        `ceilings` are those of this run, each row has its own. `rows` are all, unless some are
        named. `not_replaced` are rows that failed here and stand as an earlier run left them.
        """
        reference, first = self.reference, self.predicted_reference
        return {
            "schema": SCHEMA,
            "complete": self.complete,
            "environment": self.environment,
            "workload": self.about,
            "ceilings": asdict(self.ceilings),
            "reference": None if reference is None else reference.name,
            "predicted_reference": None if first is None else first.name,
            "results": [self._row(row, reference) for row in (rows or self.rows)],
            "not_replaced": self._not_replaced(),
            "equal_reuse": self.equal_reuse(),
            "checked": [made.to_json() for made in self.checked],
        }

    def _not_replaced(self) -> list[dict[str, Any]]:
        stand = self.rows
        failed = [row for row in self.new if row.reason is not None and row not in stand]
        return [{"policy": r.policy, "preset": r.preset, "reason": r.reason} for r in failed]

    def _row(self, row: RowResult, reference: RowResult | None) -> dict[str, Any]:
        first = self.predicted_reference
        known = {
            **row.to_json(),
            "composed": self.workload.layers is not None,
            "sampled_frames": row.sampled_frames,
            "repeats": row.repeats,
            "complete": self.done(row),
        }
        if row.predicted and first is not None:
            known["predicted"] = {**row.predicted, **_said(row, first, "speedup")}
        if not self.done(row) or reference is None:
            nothing: dict[str, Any] = dict.fromkeys(_NUMBERS)
            return {"policy": row.policy, "preset": row.preset, **nothing, **known}
        total, last = row.total(), row.last()
        return {
            "policy": row.policy,
            "preset": row.preset,
            "total_s": total.value,
            "total_s_interval": [total.low, total.high],
            "last_s": last.value,
            "last_s_interval": [last.low, last.high],
            "frame_s": row.frames(),
            **_against(row, reference),
            "paired": row.run == reference.run,
            "floor_share": row.predicted["floor_last_s"] / last.value,
            "shares": row.shares(),
            "bookkeeping_share": row.bookkeeping_share(),
            "kernel_shares": _kernel_shares(row, last.value),
            "over": self._over(row),
            **known,
        }


#: What a row without numbers has none of.
_NUMBERS = (
    "total_s", "last_s", "frame_s", "speedup_total", "speedup_last", "predicted_total",
    "predicted_last", "floor_share", "shares", "bookkeeping_share", "kernel_shares", "over",
)  # fmt: skip


def earlier_rows(data: Mapping[str, Any], workload: Workload) -> list[RowResult]:
    """Rows of an earlier result that may stand beside this workload's: finished, or with a reason.

    Raises InputError for a result of something else, of another machine or of composed rows.
    """
    if data.get("schema") != SCHEMA:
        raise InputError(
            f"the result there has schema {data.get('schema')!r}, expected {SCHEMA!r}: "
            "choose another --out"
        )
    if data["workload"].get("layers") is not None:
        raise InputError(
            "the rows there are composed, and the pieces they are made of are in no file: measure "
            "all rows in one run, without --append"
        )
    about = describe(workload)
    for part, mine, names in (
        ("environment", environment(workload.device, workload.dtype), _SAME_PLACE),
        ("workload", about, [name for name in about if name not in _MAY_DIFFER]),
    ):
        for name in names:
            if data[part].get(name) != mine[name]:
                raise InputError(
                    f"the result there was measured with {name} {data[part].get(name)!r}, this run "
                    f"has {mine[name]!r}: choose another --out"
                )
    rows = [row for row in data["results"] if row["complete"] or row["reason"]]
    return [RowResult.from_json(row) for row in rows]


def _asked(workload: Workload) -> list[tuple[str, str, str]]:
    """Policy, preset and settings of each row: policies x presets, then the baselines."""
    rows = [
        (label, preset, repr(policy))
        for label, policy in workload.policies.items()
        for preset in workload.presets
    ]
    return rows + [(name, EXACT, OWN_LOOP) for name in workload.baselines]


def _against(row: RowResult, other: RowResult) -> dict[str, Any]:
    """Times faster than another row: measured with intervals, and predicted."""
    total, last = row.speedup_total(other), row.speedup_last(other)
    return {
        "speedup_total": total.value,
        "speedup_total_interval": [total.low, total.high],
        "speedup_last": last.value,
        "speedup_last_interval": [last.low, last.high],
        **_said(row, other, "predicted"),
    }


def _said(row: RowResult, other: RowResult, word: str) -> dict[str, float]:
    """Times faster than another row, as predicted: both at the ceilings of this row's run."""
    ratios = {}
    for part in ("total", "last"):
        took, takes = (
            frame_seconds(Operations(**one.predicted["operations"][part]), row.ceilings)
            for one in (other, row)
        )
        ratios[f"{word}_{part}"] = took / takes
    return ratios


def _named(rows: Sequence[RowResult]) -> dict[str, Any]:
    """Policies, presets and baselines of all rows, in plain values."""
    return {
        "policies": {row.policy: row.settings for row in rows if not row.is_baseline},
        "presets": {row.preset: row.reuse for row in rows},
        "baselines": list(dict.fromkeys(row.policy for row in rows if row.is_baseline)),
    }


def _predicted(
    workload: Workload, row: Prediction, reuse: StepReuse, ceilings: Ceilings
) -> dict[str, Any]:
    """What was said of a row before it was measured; `kernel_s` of the last latent frame.

    Operations, and bytes that must be read at least, by kind of kernel.
    """
    last = row.work[-1]
    read = [
        frame_traffic(workload, held, given=frame < workload.given, reuse=reuse)
        for frame, held in enumerate(row.held)
    ]
    return {
        "operations": _by_kind(row.work),
        "bytes": _by_kind(read),
        "total_s": row.total_s,
        "last_s": row.last_s,
        "frame_s": list(row.seconds),
        "floor_total_s": sum(row.floor_s),
        "floor_last_s": row.floor_s[-1],
        "live_bytes": row.live_bytes,
        "held": list(row.held),
        "kernel_s": {
            "attention": last.attention / ceilings.attention,
            "linear": last.linear / ceilings.matmul,
            "head": last.head / ceilings.matmul,
        },
    }


def _by_kind(frames: Sequence[Any]) -> dict[str, dict[str, int]]:
    """Counts of all latent frames by kind of kernel: their sum, and the last one's."""
    kinds = [asdict(frame) for frame in frames]
    return {
        "total": {kind: sum(one[kind] for one in kinds) for kind in kinds[-1]},
        "last": kinds[-1],
    }


def _kernel_shares(row: RowResult, last_s: float) -> dict[str, float] | None:
    """By kind of kernel, time at the ceiling as a share of the time it took in the last frame.

    None for upstream's way, whose parts are told apart otherwise: its commit is one of them.
    """
    shares = row.shares()
    if shares is None or (row.is_baseline and row.policy == STOCK):
        return None
    kinds = row.predicted["kernel_s"].items()
    return {kind: seconds / (shares[kind] * last_s) for kind, seconds in kinds if shares[kind] > 0}
