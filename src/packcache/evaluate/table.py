"""The truth table of the embedded model: what it gets right, beside ceiling, floor and targets.

    table = truth_table(load("digits"), clips=128)
    table.to_json(), table.lines()

Clips are made with the full cache, shipped steps and guidance, from scans never trained on: half
from the prompt alone, half from the first frame and the prompt; three of four show one digit, one
two. The ceiling is the truth seen through the codec; the floor repeats the clip's first frame.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from packcache.digits import world
from packcache.digits.prompts import prompt
from packcache.environment import environment
from packcache.errors import InvalidSetting
from packcache.evaluate import truth
from packcache.evaluate.memory import CHANCE, horizon
from packcache.evaluate.statistics import bootstrap
from packcache.lumos.pipeline import Pipeline
from packcache.lumos.vocab import latent_frames, pixel_frames
from packcache.policies import FullCache, parse_policy
from packcache.video import Frames

__all__ = ["LATE_POLICIES", "SCHEMA", "TARGETS", "Case", "Table", "Target", "cases", "truth_table"]

SCHEMA = "packcache.truth/1"

#: Where the frame that `late_digit` asks for ends: 8 seconds at 12 frames a second.
LATE_FRAMES = 97

#: Asked for the digit after 97 frames; the best of them counts.
LATE_POLICIES = (
    "full",
    "window:frames=1",
    "window:frames=3",
    "packcache",
    "packcache:budget=2,window=4,order=novelty",
)

#: Attributes of `truth.Judgement` that are means of shares.
_SHARES = ("digit", "colour", "count", "direction")
#: And those that are reported beside them, in pixels, pixels a frame and levels.
_NUMBERS = ("speed", "speed_variation", "reflection", "position", "background")

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A row: resolved only at `needed` (None: reported only), `aim` is what we want."""

    name: str
    title: str
    unit: str
    needed: float | None
    aim: float


TARGETS = (
    Target(name="psnr", title="codec PSNR", unit="dB", needed=26, aim=30),
    Target(name="psnr_box", title="codec PSNR in digits' boxes", unit="dB", needed=19, aim=22),
    Target(name="read", title="digit read from reconstructions", unit="%", needed=93, aim=97),
    Target(name="digit", title="digit right, one-digit clips", unit="%", needed=75, aim=90),
    Target(name="colour", title="colour right", unit="%", needed=92, aim=98),
    Target(name="count", title="count right", unit="%", needed=90, aim=97),
    Target(name="direction", title="direction right", unit="%", needed=85, aim=95),
    Target(name="recall", title="recall at gap 2, above chance", unit="points", needed=20, aim=60),
    Target(
        name="late_digit",
        title="digit right at frame 97, best policy",
        unit="%",
        needed=None,
        aim=75,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A clip to make: from the prompt alone, or with the scene's first frame given."""

    scene: world.Scene
    with_image: bool
    seed: int

    def judge(self, frames: Frames) -> truth.Judgement:
        """With an image places are known and the given frame does not count."""
        if self.with_image:
            return truth.judge(frames, self.scene, since=1)
        return truth.judge(frames, truth.Expected.from_scene(self.scene))


def cases(count: int, seed: int = 0) -> list[Case]:
    """The first `count` cases of a seed: more clips are the same clips and others."""
    if count < 1:
        raise InvalidSetting(f"clips is {count}, expected at least 1")
    found = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        scene = world.sample_scene(rng, "test", kind="two" if number % 4 == 3 else "one")
        found.append(Case(scene=scene, with_image=number // 4 % 2 == 1, seed=seed + number))
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """`measured`, `ceiling` and `floor` by target or attribute, one value a clip (NaN: not asked).

    `late` holds, by policy, the share of the last latent frame's digits that are right.
    """

    measured: dict[str, Values]
    ceiling: dict[str, Values]
    floor: dict[str, Values]
    late: dict[str, Values]
    workload: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One row a target: measured with its interval, ceiling, floor, and what was asked for."""
        late = dict(self.late)
        best = max(late, key=lambda label: np.nanmean(late[label])) if late else None
        measured = {**self.measured, **({"late_digit": late[best]} if best else {})}
        rows = []
        for target in TARGETS:
            row: dict[str, Any] = asdict(target)
            row["measured"] = _summary(measured.get(target.name), target.unit)
            row["ceiling"] = _summary(self.ceiling.get(target.name), target.unit)
            row["floor"] = _summary(self.floor.get(target.name), target.unit)
            if target.name == "late_digit":
                row["policy"] = best
            if row["measured"] is not None:
                mean = row["measured"]["mean"]
                row["meets_needed"] = target.needed is None or mean >= target.needed
                row["meets_aim"] = mean >= target.aim
            rows.append(row)
        return rows

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "workload": self.workload,
            "results": self.rows(),
            "late": {label: _summary(values, "%") for label, values in self.late.items()},
            "attributes": {
                f"{name}{task}": {
                    "measured": _summary(self.measured.get(name + task), ""),
                    "ceiling": _summary(self.ceiling.get(name + task), ""),
                    "floor": _summary(self.floor.get(name + task), ""),
                }
                for name in (*_SHARES, *_NUMBERS)
                for task in ("", _TEXT, _IMAGE)
            },
        }

    def lines(self) -> list[str]:
        """The table as text."""
        head = f"{'':38}{'measured':>9} {'95 % interval':>15}{'ceiling':>9}{'floor':>8}"
        lines = [head + f"{'needed':>8}{'aim':>6}"]
        for row in self.rows():
            measured = row["measured"]
            if measured is None:
                continue
            interval = f"{measured['low']:.1f} to {measured['high']:.1f}"
            lines.append(
                f"{row['title'] + ', ' + row['unit']:38}{measured['mean']:9.1f} {interval:>15}"
                + "".join(
                    f"{row[name]['mean']:{width}.1f}" if row[name] else " " * (width - 1) + "-"
                    for name, width in (("ceiling", 9), ("floor", 8))
                )
                + (f"{row['needed']:8}" if row["needed"] is not None else f"{'report':>8}")
                + f"{row['aim']:6}"
            )
        return lines


_TEXT, _IMAGE = ", from text", ", from an image"


def _summary(values: Values | None, unit: str) -> dict[str, float] | None:
    """Mean and bootstrap interval over clips, in the unit."""
    if values is None or np.isnan(values).all():
        return None
    if unit == "dB":  # values are squared errors; decibels of their mean
        interval = bootstrap(values[~np.isnan(values)]).at()
        assert interval
        mean, low, high = (
            float(-10 * np.log10(interval[name])) for name in ("mean", "high", "low")
        )
        return {"clips": interval["clips"], "mean": mean, "low": low, "high": high}
    scale = {"%": 100.0, "points": 100.0}.get(unit, 1.0)
    interval = bootstrap(values[~np.isnan(values)]).at()
    return interval and {
        name: value * (1 if name == "clips" else scale) for name, value in interval.items()
    }


def truth_table(
    pipeline: Pipeline,
    *,
    clips: int = 128,
    frames: int = 25,
    memory_clips: int = 64,
    late_clips: int = 8,
    late_policies: Sequence[str] = LATE_POLICIES,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> Table:
    """Make and judge `clips` clips; ask `memory_clips` clips at gap 2; run `late_clips` on.

    A count of 0 leaves that part out.
    """
    chosen = cases(clips, seed)
    one_digit = [case for case in chosen if case.scene.kind == "one"]
    if late_clips > len(one_digit):
        raise InvalidSetting(
            f"late_clips is {late_clips}, expected at most the {len(one_digit)} one-digit clips "
            f"among {clips}"
        )
    total = clips + late_clips * len(late_policies) + bool(memory_clips)
    steps = itertools.count(1)

    def advance() -> None:
        done = next(steps)
        if on_step:
            on_step(done, total)

    columns = _judged(pipeline, chosen, frames, advance)
    if memory_clips:
        columns["measured"]["recall"] = _recall(pipeline, memory_clips, seed)
        advance()
    late = _late(pipeline, one_digit[:late_clips], late_policies, advance)
    weight = pipeline.model.lm_head.weight
    workload = {
        "model": pipeline.name, "split": "test", "clips": clips, "frames": frames, "seed": seed,
        "memory_clips": memory_clips, "late_clips": late_clips, "late_frames": LATE_FRAMES,
        "policy": "full", "sampling": asdict(pipeline.sampling),
        "reader_accuracy": truth.reader().accuracy,
    }  # fmt: skip
    return Table(
        **columns,
        late=late,
        workload=workload,
        environment=environment(weight.device, weight.dtype),
    )


def _judged(
    pipeline: Pipeline, chosen: Sequence[Case], frames: int, advance: Callable[[], None]
) -> dict[str, dict[str, Values]]:
    """What was measured, its ceiling and its floor, each as columns over clips."""
    rows: dict[str, list[dict[str, float]]] = {"measured": [], "ceiling": [], "floor": []}
    for case in chosen:
        made = _generate(pipeline, case, frames, "full")
        rows["measured"].append(_attributes(case, case.judge(made)))
        rows["floor"].append(_attributes(case, case.judge(truth.copy_last(made, 1))))
        rows["ceiling"].append(_through_codec(pipeline, case, frames))
        advance()
    columns = {name: _columns(found) for name, found in rows.items()}
    # what the codec itself is asked for is a measurement, not a ceiling
    own = {name: columns["ceiling"].pop(name) for name in ("psnr", "psnr_box", "read")}
    columns["measured"] |= own
    return columns


def _late(
    pipeline: Pipeline,
    chosen: Sequence[Case],
    policies: Sequence[str],
    advance: Callable[[], None],
) -> dict[str, Values]:
    """By policy, the share of the last latent frame's digits that are right in each clip."""
    late = {}
    for policy in policies if chosen else ():
        late[policy] = np.full(len(chosen), np.nan)
        for number, case in enumerate(chosen):
            judgement = case.judge(_generate(pipeline, case, LATE_FRAMES, policy))
            late[policy][number] = np.nanmean(judgement.curves.digit[-world.GROUP :])
            advance()
    return late


def _generate(pipeline: Pipeline, case: Case, frames: int, policy: str) -> Frames:
    picture = Image.fromarray(world.render(case.scene, 1)[0]) if case.with_image else None
    return pipeline.generate(
        prompt(case.scene),
        frames=frames,
        image=picture,
        policy=FullCache() if policy == "full" else parse_policy(policy),
        seed=case.seed,
    ).frames


def _attributes(case: Case, judgement: truth.Judgement) -> dict[str, float]:
    """All numbers of a judgement, also under the task's name; `digit` counts one-digit clips."""
    task = _IMAGE if case.with_image else _TEXT
    row = {}
    for name in (*_SHARES, *_NUMBERS):
        value = getattr(judgement, name)
        if value is not None and not (name == "digit" and case.scene.kind != "one"):
            row |= {name: value, name + task: value}
    return row


def _through_codec(pipeline: Pipeline, case: Case, frames: int) -> dict[str, float]:
    """Squared errors of the codec (of a range of 1) and what is read from its reconstruction."""
    video = world.render(case.scene, pixel_frames(latent_frames(frames)))
    back = truth.through_codec(video, pipeline.codec.encode, pipeline.codec.decode)
    error = ((back.astype(np.float64) - video) / 255) ** 2
    boxes = []
    for digit in case.scene.digits:
        for t, (x, y) in enumerate(world.corners(digit, len(video))):
            boxes.append(error[t, y : y + world.SPRITE, x : x + world.SPRITE].mean())
    whole = truth.judge(back, case.scene)
    row = _attributes(case, case.judge(back[:frames]))
    return {
        **row, "psnr": float(error.mean()), "psnr_box": float(np.mean(boxes)),
        "read": np.nan if whole.digit is None else whole.digit,
    }  # fmt: skip


def _recall(pipeline: Pipeline, clips: int, seed: int) -> Values:
    """Whether the object that the full cache brings back at gap 2 is right, less chance."""
    curve = horizon(
        pipeline,
        {"full": "full"},
        gaps=(2,),
        clips=clips,
        seed=seed,
        judge=lambda frames, scene: truth.recall(frames, scene),
        judged=clips,
    )
    return curve.values["returned_object"][0, 0] - CHANCE["object"]


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, Values]:
    """Rows of numbers as columns; NaN where a row has none."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
