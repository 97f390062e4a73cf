"""The quality guard: what reuse across denoising steps costs, on the same clips with and without.

    found = guard(load("digits"), parse_presets("balanced,fast", 12), policies=("full",))
    found.to_json(), found.lines()

Prompts, scenes and draws are the same for every preset, so everything is paired by clip. Three
questions to the embedded model, the only one whose clips can be read:

    digit    clips of one digit, free-running, half from text and half with an image: the share of
             frames whose digit is read right, as in `table`
    recall   memory clips, given up to the curtain's last frame: the frame in which it rises is made
             with the preset and read, as `memory` does
    forced   the same frame along the exact run: at every step the preset sees the exact run's
             tokens. KL(exact || preset) of the guided distribution, and how often the most likely
             code agrees, over undecided tokens (methods 3.11b)

A preset holds if digit and recall fall by no more than `LIMITS`, by the upper bound of the 95 %
interval of the paired difference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from packcache.digits import world
from packcache.digits.prompts import prompt
from packcache.environment import environment
from packcache.errors import InvalidSetting
from packcache.evaluate import truth
from packcache.evaluate.ledger import Ledger
from packcache.evaluate.memory import memory_scenes, until_risen
from packcache.evaluate.statistics import bootstrap
from packcache.evaluate.table import Case
from packcache.lumos.decode import Decoder, Step
from packcache.lumos.pipeline import Pipeline
from packcache.lumos.schedule import FrameDraws
from packcache.lumos.vocab import pixel_frames
from packcache.lumos.weights import fingerprint
from packcache.policies import parse_policy
from packcache.reuse import EXACT, PRESETS, StepReuse, parse_reuse
from packcache.timeline import Role

__all__ = [
    "LIMITS", "METRICS", "POLICIES", "SCHEMA", "Drafter", "Drop", "Guard", "compare", "drop",
    "guard", "parse_presets",
]  # fmt: skip

SCHEMA = "packcache.guard/1"

#: Points by which digit reading and recall may fall.
LIMITS = {"digit": 2.0, "recall": 3.0}

#: Policies that still know at gap 2 what was behind the curtain.
POLICIES = ("full", "packcache")

#: Latent frames under the curtain of memory clips.
GAP = 2

#: Shares of 1 a clip, but `kl`, nats a token. `recall` is digit and colour, `recalled_digit` the
#: digit alone.
METRICS = ("digit", "recall", "recalled_digit", "kl", "agreement")

#: The row that all others are held against; it is always there.
_REFERENCE = "exact"

Verdict = Literal["holds", "undecided", "breaks"]
_WORST: tuple[Verdict, ...] = ("breaks", "undecided", "holds")

Values = NDArray[np.float64]
Found = tuple[int, dict[str, list[float]]]


# --- the verdict ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Drop:
    """By how many points a share fell, mean over `clips` pairs and its 95 % interval.

    It holds if the upper bound is within `limit`, breaks if the lower is not. Between the two, and
    with too few clips to see a loss as rare as the limit, it is undecided: `needed` clips would
    tell, should mean and spread stay as they are.
    """

    mean: float
    low: float
    high: float
    clips: int
    limit: float
    verdict: Verdict
    needed: int | None = None


def drop(exact: Values, other: Values, limit: float) -> Drop:
    """Judge the fall from `exact [clips]` to `other [clips]`, shares of 1, against points."""
    falls = 100 * (exact - other)
    interval = bootstrap(falls)
    mean, low, high = (float(bound) for bound in (interval.mean, interval.low, interval.high))
    # A bootstrap of equal pairs has no width, so the rule of three: what did not happen in n clips
    # has a chance of at most 3 / n.
    least = math.ceil(300 / limit)
    verdict: Verdict = "undecided"
    needed = None
    if low > limit:
        verdict = "breaks"
    elif high <= limit and len(falls) >= least:
        verdict = "holds"
    elif mean < limit:
        spread = float(falls.std(ddof=1)) if len(falls) > 1 else 0.0
        needed = max(least, len(falls) + 1, math.ceil((1.96 * spread / (limit - mean)) ** 2))
        needed = least if high <= limit else needed
    return Drop(
        mean=mean, low=low, high=high, clips=len(falls), limit=limit, verdict=verdict,
        needed=needed,
    )  # fmt: skip


# --- the same frame several times ----------------------------------------------------------------


class Drafter(Decoder):
    """A decoder that makes its next frame as often as it is asked, and keeps none of them."""

    trail: list[Tensor]  # of the last draft: tokens [B, N] after each step but the last
    follow: Sequence[Tensor] = ()

    @torch.inference_mode()
    def draft(
        self,
        reuse: StepReuse,
        *,
        follow: Sequence[Tensor] = (),
        on_step: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Codes `[B, rows, cols]` of the next latent frame, made with a reuse.

        `follow` is the trail of another draft: these tokens leave each step, whatever is drawn.
        """
        self.reuse, self.works = reuse, reuse.works(self.undecided, self.layout.tokens)
        self.attend_step = self._step_attention()
        self.on_step, self.follow, self.trail = on_step, follow, []
        self._open(Role.HISTORY)
        ids = self._blank()
        finished = self._read_back(ids, self._denoise(ids, self.tables.at(self.frame)))
        for cache in self.caches:
            cache.close()
        return self.vocab.codes(self.layout, finished)

    def _remask(
        self, new: Tensor, selected: Tensor, known: Tensor, draws: FrameDraws, step: int
    ) -> Tensor:
        left = super()._remask(new, selected, known, draws, step)
        self.trail.append(self.follow[step] if self.follow else left)
        return self.trail[-1]


def compare(exact: Sequence[Step], other: Sequence[Step]) -> tuple[Values, Values]:
    """KL(exact || other) in nats, and agreement of the most likely code, `[B]` each.

    Means over all steps and undecided tokens; both must have seen the same tokens.
    """
    divergence: list[list[Tensor]] = [[] for _ in exact[0].logits]
    agreed: list[list[Tensor]] = [[] for _ in exact[0].logits]
    for ours, theirs in zip(exact, other, strict=True):
        for clip in range(len(ours.logits)):
            own, its = (step.logits[clip][~step.known[clip]] for step in (ours, theirs))
            p, q = own.log_softmax(dim=-1), its.log_softmax(dim=-1)
            divergence[clip].append((p.exp() * (p - q)).sum(dim=-1))
            agreed[clip].append(own.argmax(dim=-1) == its.argmax(dim=-1))
    kl, agreement = (
        np.array([float(torch.cat(steps).double().mean()) for steps in clips])
        for clips in (divergence, agreed)
    )
    return kl, agreement


# --- the three questions -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """What is asked, as for `guard`; `sampling` are settings that are not the model's own."""

    pipeline: Pipeline
    presets: dict[str, StepReuse]
    clips: int
    recall_clips: int
    forced_clips: int
    frames: int
    seed: int
    batch: int
    sampling: dict[str, Any]

    def wanted(self) -> Iterator[tuple[str, int, set[str]]]:
        """Each question, clip by clip, and the metrics that answer it."""
        for number in range(self.clips):
            yield "digit", number, {"digit"}
        for number in range(self.recall_clips):
            forced = {"kl", "agreement"} if number < self.forced_clips else set[str]()
            yield "recall", number, {"recall", "recalled_digit"} | forced

    def workload(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """What is the same for all clips."""
        return {
            "model": self.pipeline.name, "split": "test", "frames": self.frames, "gap": GAP,
            "seed": self.seed, "limits": LIMITS, "sampling": sampling,
            "presets": {name: asdict(reuse) for name, reuse in self.presets.items()},
            "reader_accuracy": truth.reader().accuracy,
        }  # fmt: skip

    def answer(
        self,
        policies: Sequence[str],
        known: Ledger,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        """Make and read the clips that are not known yet."""
        wanted = list(self.wanted())
        total = len(policies) * len(wanted)
        missing = {
            (policy, question): [
                number
                for own, number, metrics in wanted
                if own == question and not known.has((policy, question, number), metrics)
            ]
            for policy in policies
            for question in ("digit", "recall")
        }
        done = itertools.count(total - sum(map(len, missing.values())) + 1)
        ask = {"digit": self.digits, "recall": self.memory}
        for (policy, question), numbers in missing.items():
            for number, found in ask[question](policy, numbers):
                known.add((policy, question, number), found)
                if on_step:
                    on_step(next(done), total)

    def values(self, policies: Sequence[str], known: Ledger) -> dict[str, Values]:
        """What is known, `[policies, presets, clips]` for each metric."""
        counts = self.clips, self.recall_clips, self.recall_clips, *[self.forced_clips] * 2
        values = {
            metric: np.full((len(policies), len(self.presets), count), np.nan)
            for metric, count in zip(METRICS, counts, strict=True)
        }
        for p, policy in enumerate(policies):
            for question, number, metrics in self.wanted():
                for metric in metrics:
                    own = known.found[policy, question, number][metric]
                    values[metric][p, :, number] = own
        return values

    def digits(self, policy: str, missing: Sequence[int]) -> Iterator[Found]:
        """Clip by clip its number and, by metric, a value a preset."""
        chosen = {number: _one_digit(self.seed, number) for number in missing}
        kinds = {number: case.with_image for number, case in chosen.items()}
        for numbers in _batches(kinds, self.batch):
            cases = [chosen[number] for number in numbers]
            read = [self._read(cases, policy, reuse) for reuse in self.presets.values()]
            for number, values in zip(numbers, zip(*read, strict=True), strict=True):
                yield number, {"digit": list(values)}

    def _read(self, cases: Sequence[Case], policy: str, reuse: StepReuse) -> list[float]:
        """The share of digits read right in each clip, all from text or all with an image."""
        pictures = [Image.fromarray(world.render(case.scene, 1)[0]) for case in cases]
        clips = self.pipeline.generate_many(
            [prompt(case.scene) for case in cases],
            frames=self.frames,
            image=pictures if cases[0].with_image else None,
            policy=policy,
            seed=[case.seed for case in cases],
            reuse=reuse,
            **self.sampling,
        )
        judged = [case.judge(clip.frames) for case, clip in zip(cases, clips, strict=True)]
        return [float(judgement.digit or 0) for judgement in judged]

    def memory(self, policy: str, missing: Sequence[int]) -> Iterator[Found]:
        """As `digits`; the first clips are asked teacher-forced as well."""
        count, forced = self.recall_clips, self.forced_clips
        scenes = memory_scenes(count, GAP, self.seed) if count else []
        kinds = {
            number: (number < forced, scenes[number].kind, _rises(scenes[number]))
            for number in missing
        }
        for numbers in _batches(kinds, self.batch):
            own = [scenes[number] for number in numbers]
            given = torch.stack([self.pipeline.encode_video(until_risen(s)) for s in own], dim=1)
            drafter = self._told(own, given, policy, [self.seed + number for number in numbers])
            found = self._drafts(drafter, own, given, forced=numbers[0] < forced)
            for clip, number in enumerate(numbers):
                yield number, {name: [v[clip] for v in values] for name, values in found.items()}

    def _told(
        self, scenes: Sequence[world.Scene], given: Tensor, policy: str, seeds: Sequence[int]
    ) -> Drafter:
        """A decoder that has seen `given [t, B, rows, cols]` as if it had generated them."""
        plain = self.pipeline.run(
            [prompt(scene) for scene in scenes],
            frames=pixel_frames(len(given) + 1, world.GROUP),
            seed=seeds,
            policy=policy,
            **self.sampling,
        ).decoder
        drafter = Drafter(
            plain.model, plain.prefixes, layout=plain.layout, sampling=plain.sampling,
            policy=parse_policy(policy), draws=plain.draws, latents=plain.latents,
        )  # fmt: skip
        image = scenes[0].kind == "enters"
        drafter.prefill()
        for frame, codes in enumerate(given):
            drafter.give(codes, as_generated=not (image and frame == 0))
        # Frames that count as generated have used up the confidence noise (lumos1-spec 5.5.1).
        drafter.generated = len(given) - image
        return drafter

    def _drafts(
        self, drafter: Drafter, scenes: Sequence[world.Scene], given: Tensor, *, forced: bool
    ) -> dict[str, list[list[float]]]:
        """By metric, for each preset a value a clip; the exact run comes first."""
        found: dict[str, list[list[float]]] = {}
        exact: list[Step] = []
        trail: list[Tensor] = []
        for name, reuse in self.presets.items():
            seen: list[Step] = []
            hear = seen.append if forced else None
            codes = drafter.draft(reuse, on_step=hear if name == _REFERENCE else None)
            if name == _REFERENCE:
                exact, trail = seen, drafter.trail
            elif forced:
                drafter.draft(reuse, follow=trail, on_step=hear)
            values = self._recalled(scenes, given, codes)
            if forced:
                values |= dict(zip(("kl", "agreement"), compare(exact, seen), strict=True))
            for metric, clips in values.items():
                found.setdefault(metric, []).append([float(value) for value in clips])
        return found

    def _recalled(
        self, scenes: Sequence[world.Scene], given: Tensor, codes: Tensor
    ) -> dict[str, Any]:
        """Whether what came out from behind the curtain is right, clip by clip."""
        read = []
        for scene, last, own in zip(scenes, given[-1], codes, strict=True):
            shown = self.pipeline.pixels(torch.stack((last, own)))[1:]
            read.append(truth.recall(np.concatenate((until_risen(scene), shown)), scene))
        return {"recall": [r.both for r in read], "recalled_digit": [r.digit for r in read]}


def _one_digit(seed: int, number: int) -> Case:
    """The case of a clip: as many with an image as without."""
    rng = np.random.default_rng((seed, number))
    scene = world.sample_scene(rng, "test", kind="one")
    return Case(scene=scene, with_image=number % 2 == 1, seed=seed + number)


def _rises(scene: world.Scene) -> int:
    assert scene.curtain  # memory scenes have one
    return scene.curtain.rises


def _batches(kinds: Mapping[int, Any], size: int) -> Iterator[list[int]]:
    """Numbers of clips that can run as one call: of one kind, at most `size`."""
    for kind in dict.fromkeys(kinds.values()):
        group = [number for number, own in kinds.items() if own == kind]
        for start in range(0, len(group), size):
            yield group[start : start + size]


# --- the result ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Guard:
    """What was found: `values[metric]` is float64 `[policies, presets, clips]`, exact first.

    A metric that was not asked has no clips.
    """

    policies: tuple[str, ...]
    presets: dict[str, StepReuse]
    values: dict[str, Values]
    workload: dict[str, Any]
    environment: dict[str, Any]

    def drops(self, policy: str, preset: str) -> dict[str, Drop]:
        """The drop of each share that was asked, against the exact run of the policy."""
        p, own = self.policies.index(policy), list(self.presets).index(preset)
        return {
            metric: drop(self.values[metric][p, 0], self.values[metric][p, own], limit)
            for metric, limit in LIMITS.items()
            if self.values[metric].shape[-1]
        }

    def verdict(self, policy: str, preset: str) -> Verdict:
        """The worst of the two verdicts; what was not asked is undecided."""
        return _worst(self.drops(policy, preset))

    def holds(self, preset: str) -> bool:
        """Does a preset hold with every policy?"""
        return all(self.verdict(policy, preset) == "holds" for policy in self.policies)

    def rows(self) -> list[dict[str, Any]]:
        """One row a policy and preset; the exact ones have nothing to be held against."""
        rows = []
        for p, policy in enumerate(self.policies):
            for number, (preset, reuse) in enumerate(self.presets.items()):
                row: dict[str, Any] = {"policy": policy, "preset": preset, **asdict(reuse)}
                for metric, values in self.values.items():
                    asked = values.shape[-1] > 0
                    row[metric] = bootstrap(values[p, number]).at() if asked else None
                row |= {"drops": None, "verdict": None, "holds": None}
                if number:
                    drops = self.drops(policy, preset)
                    row["drops"] = {metric: asdict(fall) for metric, fall in drops.items()}
                    row["verdict"] = _worst(drops)
                    row["holds"] = row["verdict"] == "holds"
                rows.append(row)
        return rows

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "workload": self.workload,
            "results": self.rows(),
        }

    def lines(self) -> list[str]:
        """The table as text: shares in %, drops in points with their interval."""
        rows = self.rows()
        name = max(len(row["policy"] + row["preset"]) for row in rows) + 2
        limits = ", ".join(f"{metric} {limit:g}" for metric, limit in LIMITS.items())
        head = "".join(f"{metric:>8}{'lost':>6}  {'interval':14}" for metric in LIMITS)
        lines = [
            f"most points that may be lost, by the upper bound of the 95 % interval: {limits}",
            f"{'':{name}}{head}{'KL':>8}{'top-1':>7}",
        ]
        for row in rows:
            line = f"{row['policy']} {row['preset']}".ljust(name)
            for metric in LIMITS:
                line += _share(row[metric], 8) + _lost((row["drops"] or {}).get(metric))
            kl = f"{row['kl']['mean']:8.2g}" if row["kl"] else f"{'-':>8}"
            lines.append(f"{line}{kl}{_share(row['agreement'], 7)}  {_in_words(row)}".rstrip())
        return lines


def _worst(drops: Mapping[str, Drop]) -> Verdict:
    found = {drops[metric].verdict if metric in drops else "undecided" for metric in LIMITS}
    return next(verdict for verdict in _WORST if verdict in found)


def _share(interval: Mapping[str, float] | None, width: int) -> str:
    return f"{100 * interval['mean']:{width}.1f}" if interval else f"{'-':>{width}}"


def _lost(fall: Mapping[str, Any] | None) -> str:
    if fall is None:
        return " " * 22
    bounds = f"{fall['low']:.1f} to {fall['high']:.1f}"
    return f"{fall['mean']:6.1f}  {bounds:14}"


def _in_words(row: Mapping[str, Any]) -> str:
    """The verdict, with the clips that would decide it."""
    if row["verdict"] != "undecided":
        return row["verdict"] or ""
    needed = [f"{fall['needed']} {m} clips" for m, fall in row["drops"].items() if fall["needed"]]
    return "undecided" + (f": needs {', '.join(needed)}" if needed else "")


# --- all of it -----------------------------------------------------------------------------------


def guard(
    pipeline: Pipeline,
    presets: Mapping[str, StepReuse],
    *,
    policies: Sequence[str] = POLICIES,
    clips: int = 160,
    recall_clips: int = 256,
    forced_clips: int = 32,
    frames: int = 25,
    seed: int = 0,
    steps: int | None = None,
    batch: int = 8,
    kept: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Guard:
    """Hold presets against the exact run, for each policy.

    Hours for narrow intervals, so what is found is kept clip by clip.

    Args:
        presets: settings by name; "exact" is added, or has to be exact.
        policies: spellings as for `parse_policy`.
        clips: one-digit clips to make and read, `frames` pixel frames each; 0: none.
        recall_clips: memory clips; 0: none. More clips are the same clips and others.
        forced_clips: the first of them, asked teacher-forced as well.
        seed: of clips and draws.
        steps: denoising steps a frame; default the model's own.
        batch: most clips in one call; it changes no answer.
        kept: a file of clips that are done (`Ledger`): they are not made again. More clips or other
            policies may be asked of it, nothing else.
        on_step: `on_step(done, total)` in clips, of all policies.
    """
    asked = _Asked(
        pipeline=pipeline, presets={_REFERENCE: EXACT, **presets}, clips=clips,
        recall_clips=recall_clips, forced_clips=forced_clips, frames=frames, seed=seed, batch=batch,
        sampling={} if steps is None else {"steps": steps},
    )  # fmt: skip
    _check(asked, policies)
    probe = pipeline.run(["a digit behind a curtain"], frames=1, **asked.sampling).decoder
    workload = asked.workload(asdict(probe.sampling))
    weights = {"weights": fingerprint(pipeline.model), "torch": str(torch.__version__)}
    known = Ledger(kept, workload | weights)
    asked.answer(policies, known, on_step)
    return Guard(
        policies=tuple(policies),
        presets=asked.presets,
        values=asked.values(policies, known),
        workload=workload
        | {
            "clips": clips, "recall_clips": recall_clips, "forced_clips": forced_clips,
            "policies": list(policies),
        },
        environment=environment(pipeline.device, pipeline.dtype),
    )  # fmt: skip


def _check(asked: _Asked, policies: Sequence[str]) -> None:
    if not asked.presets[_REFERENCE].is_exact:
        raise InvalidSetting(
            f"preset {_REFERENCE!r} is {asked.presets[_REFERENCE]}: all others are held against "
            "it, expected exact steps; choose another name"
        )
    if not policies or len(set(policies)) < len(policies):
        raise InvalidSetting(f"policies are {list(policies)}, expected at least one, each once")
    for policy in policies:
        parse_policy(policy, stored=True)
    least = {"clips": 0, "recall_clips": 0, "forced_clips": 0, "frames": 2, "seed": 0, "batch": 1}
    for name, lowest in least.items():
        if getattr(asked, name) < lowest:
            raise InvalidSetting(f"{name} is {getattr(asked, name)}, expected at least {lowest}")
    if not asked.clips + asked.recall_clips:
        raise InvalidSetting("clips and recall_clips are 0: nothing is asked, give one of them")
    if asked.forced_clips > asked.recall_clips:
        raise InvalidSetting(
            f"forced_clips is {asked.forced_clips}, expected at most the {asked.recall_clips} "
            "recall_clips"
        )


def parse_presets(text: str, steps: int) -> dict[str, StepReuse]:
    """Presets by their spelling, from a list with commas: `balanced,history_every=4+rest_every=8`.

    Named ones are scaled to frames of `steps`. A plus joins the settings of one preset, whose name
    is what was written.
    """
    labels = [part.strip() for part in text.split(",") if part.strip()]
    if not labels:
        raise InvalidSetting(f"no preset in {text!r}: known are {', '.join(PRESETS)}")
    return {label: parse_reuse(label.replace("+", ","), steps) for label in labels}
