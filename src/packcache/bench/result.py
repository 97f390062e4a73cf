"""The result of a benchmark: plain values for a file, and a table to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from packcache.bench.compose import Checked
from packcache.bench.parts import Ceilings, Workload
from packcache.bench.predict import EXACT, Prediction, predict
from packcache.bench.rows import OWN_LOOP, RowResult
from packcache.bench.workload import describe
from packcache.environment import environment
from packcache.errors import InputError
from packcache.policies import FullCache, Policy, SlidingWindow
from packcache.reuse import EXACT as NO_REUSE

__all__ = ["SCHEMA", "Report", "earlier_rows"]

SCHEMA = "packcache.bench/1"

#: What must agree for rows of two runs to stand in one table.
_SAME_PLACE = ("device", "processor", "threads", "dtype", "torch")
_MAY_DIFFER = ("policies", "presets", "baselines", "sampled_frames")


@dataclass(kw_only=True, eq=False)
class Report:
    """A benchmark, finished or not. `about` is the workload and `rows` are those of all runs.

    `checked` compares composed rows with networks of few layers that were really run.
    """

    workload: Workload
    about: dict[str, Any]
    environment: dict[str, Any]
    ceilings: Ceilings
    rows: list[RowResult]
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
            row = RowResult(
                policy=policy,
                preset=preset,
                settings=settings,
                reuse=asdict(workload.presets.get(preset, NO_REUSE)),
                generated=range(workload.given, workload.latents),
                run=run,
                reason=forecast.reasons.get((policy, preset)),
            )
            if row.reason is None:
                row.predicted = _predicted(forecast.rows[policy, preset], ceilings)
            rows.append(row)
        names = {row.name for row in rows}
        kept = [row for row in before if row.name not in names]
        return cls(
            workload=workload,
            about=describe(workload) | _named([*kept, *rows]),
            environment=environment(workload.device, workload.dtype),
            ceilings=ceilings,
            rows=[*kept, *rows],
        )

    @property
    def new(self) -> list[RowResult]:
        """The rows of this run."""
        run = max(row.run for row in self.rows)
        return [row for row in self.rows if row.run == run]

    # --- what the rows say of each other --------------------------------------------------------

    def done(self, row: RowResult) -> bool:
        """Was all of a row measured? Of an earlier run only such rows were kept."""
        work = self.workload
        return row not in self.new or row.complete(work.measured_frames, work.repeats)

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

    def to_json(self) -> dict[str, Any]:
        """Schema packcache.bench/1; `seconds` hold what was measured, the rest follows."""
        reference = self.reference
        return {
            "schema": SCHEMA,
            "complete": self.complete,
            "environment": self.environment,
            "workload": self.about,
            "ceilings": asdict(self.ceilings),
            "reference": None if reference is None else reference.name,
            "results": [self._row(row, reference) for row in self.rows],
            "equal_reuse": self.equal_reuse(),
            "checked": [_checked(made) for made in self.checked],
        }

    def _row(self, row: RowResult, reference: RowResult | None) -> dict[str, Any]:
        known = {
            **row.to_json(),
            "composed": self.workload.layers is not None,
            "sampled_frames": row.sampled_frames,
            "complete": self.done(row),
        }
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
    """Finished rows of an earlier result that may stand beside this workload's.

    Raises InputError for a result of something else, or of another machine.
    """
    if data.get("schema") != SCHEMA:
        raise InputError(
            f"the result there has schema {data.get('schema')!r}, expected {SCHEMA!r}: "
            "choose another --out"
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
    return [RowResult.from_json(row) for row in data["results"] if row["complete"]]


def _asked(workload: Workload) -> list[tuple[str, str, str]]:
    """Policy, preset and settings of each row: policies x presets, then the baselines."""
    rows = [
        (label, preset, repr(policy))
        for label, policy in workload.policies.items()
        for preset in workload.presets
    ]
    return rows + [(name, EXACT, OWN_LOOP) for name in workload.baselines]


def _checked(made: Checked) -> dict[str, Any]:
    return {
        "layers": made.layers,
        "part": made.part,
        "measured_s": made.measured.value,
        "composed_s": made.composed.value,
        "ratio": made.ratio.value,
        "ratio_interval": [made.ratio.low, made.ratio.high],
    }


def _against(row: RowResult, other: RowResult) -> dict[str, Any]:
    """Times faster than another row: measured with intervals, and predicted."""
    total, last = row.speedup_total(other), row.speedup_last(other)
    return {
        "speedup_total": total.value,
        "speedup_total_interval": [total.low, total.high],
        "speedup_last": last.value,
        "speedup_last_interval": [last.low, last.high],
        "predicted_total": other.predicted["total_s"] / row.predicted["total_s"],
        "predicted_last": other.predicted["last_s"] / row.predicted["last_s"],
    }


def _named(rows: Sequence[RowResult]) -> dict[str, Any]:
    """Policies, presets and baselines of all rows, in plain values."""
    return {
        "policies": {row.policy: row.settings for row in rows if not row.is_baseline},
        "presets": {row.preset: row.reuse for row in rows},
        "baselines": [row.policy for row in rows if row.is_baseline],
    }


def _predicted(row: Prediction, ceilings: Ceilings) -> dict[str, Any]:
    """What was said of a row before it was measured; `kernel_s` of the last latent frame."""
    last = row.work[-1]
    return {
        "operations": sum(row.operations),
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


def _kernel_shares(row: RowResult, last_s: float) -> dict[str, float] | None:
    """By kind of kernel, time at the ceiling as a share of the time it took in the last frame."""
    shares = row.shares()
    if shares is None:
        return None
    kinds = row.predicted["kernel_s"].items()
    return {kind: seconds / (shares[kind] * last_s) for kind, seconds in kinds if shares[kind] > 0}
