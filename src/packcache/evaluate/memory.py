"""The memory horizon: does the model know, when the curtain rises, what was behind it?

    curve = horizon(load("digits"), gaps=(1, 2, 3, 4), clips=64)
    memory_plot.plot(curve.to_json(), "memory.png")

Recall as a function of the gap (latent frames under the curtain), one curve a policy; the same
clips at every gap and for every policy, so all comparisons are paired.

Teacher-forced (evaluation 8d.1): the true frames up to the curtain's last are committed, then the
next frame is predicted with nothing of it decided. 60 candidates, every digit in every colour at
the true place, are compared by the probability of their tokens. An answer is right if it is
*strictly* more likely than all that is wrong: a tie is not knowing, so chance is 1 in 60 or less.
Free-running: the pipeline makes the frame itself, and an injected judge looks at the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packcache.digits import world
from packcache.digits.prompts import prompt
from packcache.digits.scans import scan_indices
from packcache.environment import environment
from packcache.errors import GenerationError, InvalidSetting
from packcache.evaluate.statistics import bootstrap, versus, wilson
from packcache.lumos.decode import Decoder
from packcache.lumos.pipeline import Pipeline
from packcache.lumos.vocab import Prefix, pixel_frames
from packcache.policies import FullCache, Policy, SlidingWindow, parse_policy
from packcache.timeline import HeldFrame, Role
from packcache.video import Frames

__all__ = [
    "ANCHOR_POLICIES",
    "CHANCE",
    "DEFAULT_POLICIES",
    "METRICS",
    "SHARES",
    "Horizon",
    "horizon",
    "memory_policy",
    "memory_scenes",
    "power",
    "until_risen",
]

SCHEMA = "packcache.memory/1"

#: Where the identity of the hidden digit was seen: in history frames, or in the condition image.
Source = Literal["history", "anchor"]

#: The spelling of the control that loses its anchors; no public policy, so only known here.
DROPPED = "dropped anchors"

#: What is compared, by label: the reference, groups that hold equally many tokens, controls.
DEFAULT_POLICIES: dict[str, str] = {
    "full": "full",
    "window 1": "window:frames=1",
    "uniform": "uniform:budget=1,window=4",
    "random": "random:budget=1,window=4",
    "paper": "packcache:budget=1,window=4",
    "paper literal": "packcache:budget=1,window=4,redistribute=false",
    "paper visible": "packcache:budget=3,window=4,drop_remasked=true",
    "novelty": "packcache:budget=1,window=4,order=novelty",
    "novelty x 2": "packcache:budget=2,window=4,order=novelty",
    "window 3": "window:frames=3",
    "sink 1 + 3": "sink:sinks=1,frames=3",
    "none": "none",
}
#: Where the object is in the condition image: policies that hold it all, and one that drops it.
ANCHOR_POLICIES: dict[str, str] = {
    **{label: DEFAULT_POLICIES[label] for label in ("full", "window 1", "paper", "none")},
    DROPPED: DROPPED,
}

_RETURNED = ("returned_object", "returned_digit", "returned_colour")

#: Asked of a clip: is the object, its digit, its colour known; is it so in the frame that the
#: pipeline made; does the codec tell the object from all others (the ceiling); nats a token of
#: the object; share of the uncovered ground's cells known; history tokens held when asked.
SHARES = ("object", "digit", "colour", *_RETURNED, "told_apart")
METRICS = (*SHARES, "nll", "ground", "held")

_DIGITS, _COLOURS = 10, len(world.COLOURS)
_CANDIDATES = _DIGITS * _COLOURS
CHANCE = {"object": 1 / _CANDIDATES, "digit": 1 / _DIGITS, "colour": 1 / _COLOURS, "ground": 1 / 2}

#: `judge(frames, scene)` says of the object that came back `.digit`, `.colour`, `.both` (right or
#: not). `frames` uint8 `[4 * rises + 1, H, W, 3]` are the whole clip up to the first latent frame
#: without the curtain; its last four frames were generated, all before them are the truth.
Judge = Callable[[Frames, world.Scene], Any]


# --- the clips and the question ------------------------------------------------------------------


def memory_scenes(
    count: int, gap: int, seed: int = 0, source: Source = "history"
) -> list[world.Scene]:
    """Test scenes with `gap` latent frames under the curtain; scene i is the same at every gap.

    "history": text-to-video and image-to-video clips in turn, the hidden digit seen in history
    frames only. "anchor": seen in the condition image only; the curtain falls right after it.
    """
    if count < 1:
        raise InvalidSetting(f"clips is {count}, expected at least 1")
    if gap < 1:
        raise InvalidSetting(f"gap is {gap}, expected at least 1 latent frame under the curtain")
    if source not in get_args(Source):
        raise InvalidSetting(f"source is {source!r}, expected {' or '.join(get_args(Source))}")
    scenes = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        kind = "enters" if source == "history" and number % 2 else "hidden"
        scene = world.sample_scene(rng, "test", kind=kind, gap=gap)
        if source == "anchor":
            scene = replace(scene, curtain=replace(_curtain(scene), falls=1, rises=1 + gap))
        scenes.append(scene)
    return scenes


def candidates(digit: world.Digit) -> list[world.Digit]:
    """The 60 digits that could stand at this one's place, digit by digit, in all colours.

    The true digit keeps its scan; another is one test scan, drawn by the true scan's number, so a
    clip asks the same question at every gap and of every policy.
    """
    found = []
    for value in range(_DIGITS):
        scans = scan_indices("test", value)
        drawn = scans[np.random.default_rng((digit.scan, value)).integers(len(scans))]
        scan = digit.scan if value == digit.value else int(drawn)
        found += [replace(digit, value=value, scan=scan, colour=name) for name in world.COLOURS]
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """What a scene asks of the frame in which its curtain has risen, in codes of N tokens.

    `codes [60 + C, N]` are the candidates, then the true frame with one ground cell flipped, for
    each of C cells. `truth` is the true candidate's row, `asked [N]` where candidates differ,
    `object [N]` where the true digit shows, `cells [C, n]` the tokens of each cell.
    """

    codes: Tensor
    truth: int
    asked: NDArray[np.bool_]
    object: NDArray[np.bool_]
    cells: NDArray[np.int64]


def question(pipeline: Pipeline, scene: world.Scene) -> Question:
    """Draw every candidate at the true place in the frame after the curtain, and encode it.

    A candidate is 5 frames, of which the last 4 are the latent frame asked for: the codec is
    causal, and before them there is nothing but the curtain where candidates differ.
    """
    *others, hidden = scene.digits
    first = world.GROUP * (_curtain(scene).rises - 1)
    shown = [(*others, digit) for digit in candidates(hidden)] + [tuple(others)]
    drawn = [world.render(replace(scene, digits=d), world.GROUP + 1, first) for d in shown]
    videos = np.stack(drawn)
    codes = pipeline.encode_video(videos)[:, 1].flatten(1).long().cpu()  # [61, N]
    truth = hidden.value * _COLOURS + list(world.COLOURS).index(hidden.colour)
    bare = codes[-1]
    differs = (codes != bare).any(dim=0).numpy()
    touched = (videos[:, 1:] != videos[-1, 1:]).any(axis=(0, 1, 4))  # [H, W]
    places = _free_cells(scene, touched, differs)
    flipped = [_flipped(videos[truth], scene, *place) for place in places]
    other = codes[:0]
    if flipped:
        other = pipeline.encode_video(np.stack(flipped))[:, 1].flatten(1).long().cpu()
    cells = [_tokens_of(*place, len(bare)) for place in places]
    # A cell that the codec writes alike, light or dark, asks nothing.
    known = [n for n, cell in enumerate(cells) if (other[n] != codes[truth])[cell].any()]
    return Question(
        codes=torch.cat((codes[:_CANDIDATES], other[known])),
        truth=truth,
        asked=(codes[:_CANDIDATES] != codes[0]).any(dim=0).numpy(),
        object=(codes[truth] != bare).numpy(),
        cells=np.array([cells[n] for n in known], dtype=np.int64),
    )


def _free_cells(
    scene: world.Scene, pixels: NDArray[np.bool_], tokens: NDArray[np.bool_]
) -> list[tuple[int, int]]:
    """Corners (x, y) of the cells of the uncovered half that no candidate touches, if patterned.

    `pixels [H, W]` and `tokens [N]` are where any candidate differs from bare ground.
    """
    left, top, width, height = _curtain(scene).box
    cell = world.CELL
    return [
        (x, y)
        for y in range(top, top + height, cell)
        for x in range(left, left + width, cell)
        if scene.pattern is not None
        and not pixels[y : y + cell, x : x + cell].any()
        and not tokens[_tokens_of(x, y, len(tokens))].any()
    ]


def _tokens_of(x: int, y: int, count: int) -> NDArray[np.int64]:
    """Content tokens of the ground cell at pixel (x, y), of `count` in a square grid, row-major."""
    side = int(count**0.5)
    rows, cols = (
        np.arange(at * side // world.SIZE, (at + world.CELL) * side // world.SIZE) for at in (y, x)
    )
    return (rows[:, None] * side + cols).ravel()


def _flipped(video: Frames, scene: world.Scene, x: int, y: int) -> Frames:
    """A copy whose cell at (x, y) is dark where it was light, in the uncovered frames."""
    light = world.ground(scene)[y, x, 0] > world.BACKGROUNDS[scene.background][0]
    out = video.copy()
    area = out[1:, y : y + world.CELL, x : x + world.CELL]
    area[:] = area.astype(np.int16) + (-world.PATTERN_STEP if light else world.PATTERN_STEP)
    return out


def answer(asked: Question, nll: NDArray[np.float64]) -> dict[str, float]:
    """The teacher-forced metrics of one clip, from the surprise `-log p [60 + C, N]` of each code.

    Right means: the most likely candidate that is right is strictly more likely than every wrong
    one. `ground` is NaN where the ground has no pattern.
    """
    costs = nll[:_CANDIDATES, asked.asked].sum(axis=1)
    digits, colours = np.divmod(np.arange(_CANDIDATES), _COLOURS)
    digit, colour = digits == digits[asked.truth], colours == colours[asked.truth]
    cells = [
        nll[asked.truth, cell].sum() < nll[_CANDIDATES + number, cell].sum()
        for number, cell in enumerate(asked.cells)
    ]
    own, codes = nll[asked.truth, asked.object], asked.codes[:_CANDIDATES]
    return {
        "object": _wins(costs, digit & colour),
        "digit": _wins(costs, digit),
        "colour": _wins(costs, colour),
        "told_apart": float((codes == codes[asked.truth]).all(dim=1).sum() == 1),
        "nll": float(own.mean()) if len(own) else float("nan"),
        "ground": float(np.mean(cells)) if cells else float("nan"),
    }


def _wins(costs: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    return float(costs[right].min() < costs[~right].min())


def _curtain(scene: world.Scene) -> world.Curtain:
    if scene.curtain is None:
        raise InvalidSetting(f"a scene of kind {scene.kind!r} hides nothing: give a memory clip")
    return scene.curtain


# --- the policies --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, repr=False)
class DroppedAnchors(FullCache):
    """A control: all history stays, but the condition image goes at its commit.

    Its clips have no text either (their prefix is the header alone), so nothing is anchored.
    """

    def _anchor_count(self, entry: HeldFrame) -> int:
        return 0 if entry.span.role is Role.IMAGE else entry.count


def memory_policy(text: str | Policy) -> Policy:
    """A policy from its spelling, the control `dropped anchors` among them, or one as it is."""
    if not isinstance(text, str):
        return text
    return DroppedAnchors() if text == DROPPED else parse_policy(text)


# --- one batch -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Case:
    """A clip to ask: codes `[rises, rows, cols]` up to the curtain's last frame.

    If `image`, the first of them is a condition image.
    """

    number: int
    scene: world.Scene
    image: bool
    given: Tensor
    question: Question


def _case(pipeline: Pipeline, number: int, scene: world.Scene, source: Source) -> _Case:
    """Encoded clip by clip, so that no code depends on what else is in the batch."""
    return _Case(
        number=number,
        scene=scene,
        image=source == "anchor" or scene.kind == "enters",
        given=pipeline.encode_video(until_risen(scene)).cpu(),
        question=question(pipeline, scene),
    )


def until_risen(scene: world.Scene) -> Frames:
    """The true frames up to the curtain's last."""
    return world.render(scene, world.GROUP * (_curtain(scene).rises - 1) + 1)


def _batches(
    scenes: Sequence[world.Scene], size: int, only: Container[int] | None
) -> Iterator[list[int]]:
    """Numbers of scenes that can run as one call: equal kind and time of rising."""
    groups: dict[tuple[str, int], list[int]] = {}
    for number, scene in enumerate(scenes):
        if only is not None and number not in only:
            continue
        groups.setdefault((scene.kind, _curtain(scene).rises), []).append(number)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _told(
    pipeline: Pipeline, cases: Sequence[_Case], policy: Policy, *, seed: int = 0, **settings: Any
) -> Decoder:
    """A decoder that has seen every clip up to the last frame of its curtain.

    A condition image is committed clean, every other frame as if it had been generated.
    """
    given = torch.stack([case.given for case in cases], dim=1)  # [rises, B, rows, cols]
    decoder = pipeline.run(
        [prompt(case.scene) for case in cases],
        frames=pixel_frames(len(given) + 1, world.GROUP),
        seed=[seed + case.number for case in cases],
        policy=policy,
        **settings,
    ).decoder
    if policy == DroppedAnchors():  # the header alone, as unconditional branches have it
        decoder = Decoder(
            decoder.model,
            [Prefix(ids=prefix.branch(1), video_start=0) for prefix in decoder.prefixes],
            layout=decoder.layout,
            sampling=decoder.sampling,
            policy=policy,
            draws=decoder.draws,
            positions=settings["positions"],
            rebase=settings["rebase"],
        )
    decoder.prefill()
    image = cases[0].image
    for frame, codes in enumerate(given):
        decoder.give(codes, as_generated=not (image and frame == 0))
    # Frames that count as generated have used up upstream's confidence noise (lumos1-spec 5.5.1).
    decoder.generated = len(given) - image
    return decoder


def _ask(
    pipeline: Pipeline, cases: Sequence[_Case], policy: Policy, **settings: Any
) -> Iterator[dict[str, float]]:
    """The teacher-forced metrics of each clip, and the history tokens held when it is asked."""
    decoder = _told(pipeline, cases, policy, **{**settings, "guidance": 1.0})
    log_p = decoder.predict().log_softmax(dim=-1)  # [B, N, codes]
    for case, own, cache in zip(cases, log_p, decoder.caches, strict=True):
        codes = case.question.codes.to(own.device)
        nll = -own.gather(1, codes.T).T.double().cpu().numpy()  # [60 + C, N]
        if np.isnan(nll).any():
            raise GenerationError(
                f"NaN logits after {len(case.given)} latent frames: the weights or the dtype are "
                "broken; try float32"
            )
        held = sum(cache.timeline.counts().values())
        yield {**answer(case.question, nll), "held": float(held)}


def _return(
    pipeline: Pipeline, cases: Sequence[_Case], policy: Policy, judge: Judge, **settings: Any
) -> Iterator[dict[str, float]]:
    """What a judge says of the frame that the pipeline makes as it always does."""
    result = _told(pipeline, cases, policy, **settings).generate()
    for case, codes in zip(cases, result.codes, strict=True):
        pair = torch.stack((case.given[-1], codes))
        frames = np.concatenate((until_risen(case.scene), pipeline.pixels(pair)[1:]))
        verdict = judge(frames, case.scene)
        right = (verdict.both, verdict.digit, verdict.colour)
        yield {metric: float(value) for metric, value in zip(_RETURNED, right, strict=True)}


# --- the curve -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Horizon:
    """Recall by policy and gap, clip by clip.

    `values[metric]` is float64 `[policies, gaps, clips]` for each of METRICS, SHARES being 1 or 0;
    NaN where nothing was asked. `bounds` are the most history tokens each policy ever holds.
    """

    policies: dict[str, str]
    gaps: tuple[int, ...]
    values: dict[str, NDArray[np.float64]]
    bounds: dict[str, int | None]
    workload: dict[str, Any]
    environment: dict[str, Any]

    @property
    def reference(self) -> str | None:
        """What differences refer to: the full cache, if it was asked."""
        full = [label for label, text in self.policies.items() if text == "full"]
        return full[0] if full else None

    def versus_full(self, gap: int) -> dict[str, dict[str, Any]]:
        """Every policy against the full cache at a gap: `versus` of the object's recall."""
        if self.reference is None:
            return {}
        recalled = self.values["object"][:, self.gaps.index(gap)]
        return versus(dict(zip(self.policies, recalled, strict=True)), self.reference)

    def to_json(self) -> dict[str, Any]:
        """Plain values: what was measured on what, then one row a policy and gap."""
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "workload": self.workload,
            "policies": [
                {"policy": label, "settings": text, "bound_tokens": self.bounds[label]}
                for label, text in self.policies.items()
            ],
            "results": self._rows(),
            "power": power(self),
        }

    def _rows(self) -> list[dict[str, Any]]:
        clips = {name: np.moveaxis(values, -1, 0) for name, values in self.values.items()}
        means = {name: bootstrap(clips[name], skip_incomplete=True) for name in METRICS}
        full = 0 if self.reference is None else list(self.policies).index(self.reference)
        changes = {
            name: bootstrap(clips[name] - clips[name][:, [full]], skip_incomplete=True)
            for name in ("object", "nll")
        }
        rows = []
        for g, gap in enumerate(self.gaps):
            against = self.versus_full(gap)
            for p, label in enumerate(self.policies):
                row: dict[str, Any] = {"policy": label, "gap": gap}
                row |= {name: interval.at(p, g) for name, interval in means.items()}
                for name in SHARES:
                    if row[name]:
                        hits = int(np.nansum(self.values[name][p, g]))
                        row[name]["wilson"] = list(wilson(hits, row[name]["clips"]))
                row["versus_full"] = None
                if label in against:
                    row["versus_full"] = {name: c.at(p, g) for name, c in changes.items()}
                    row["versus_full"] |= against[label]
                row["object_by_clip"] = "".join(str(int(x)) for x in self.values["object"][p, g])
                rows.append(row)
        return rows


def horizon(
    pipeline: Pipeline,
    policies: Mapping[str, str | Policy] = DEFAULT_POLICIES,
    *,
    gaps: Sequence[int] = (1, 2, 3, 4, 6, 8),
    clips: int = 64,
    seed: int = 0,
    source: Source = "history",
    judge: Judge | None = None,
    judged: int = 0,
    batch: int = 16,
    only: Container[int] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Horizon:
    """Ask every policy about the same clips at every gap.

    Args:
        policies: policies, or spellings (`memory_policy`), by label.
        gaps: latent frames under the curtain.
        clips, seed, source: as for `memory_scenes`.
        judge, judged: reads what the pipeline itself makes of the first `judged` clips.
        batch: most clips in one call; the answers do not depend on it.
        only: numbers of clips to ask, of all of them; the others stay NaN.
        on_step: `on_step(done, total)` after each call, in clips asked.
        settings: `positions`, `rebase`, sampling of judged frames, as for `Pipeline.run`.
    """
    chosen = {label: memory_policy(policy) for label, policy in policies.items()}
    _check(chosen, gaps, clips, judge, judged, batch)
    settings = {"positions": "rebase", "rebase": "trained", **settings}
    scenes = {gap: memory_scenes(clips, gap, seed, source) for gap in gaps}
    bounds, about = _prospect(pipeline, chosen, settings)
    values = {name: np.full((len(chosen), len(gaps), clips), np.nan) for name in METRICS}
    done, total = 0, len(chosen) * len(gaps) * (clips + judged)
    for g, gap in enumerate(gaps):
        for numbers in _batches(scenes[gap], batch, only):
            cases = [_case(pipeline, n, scenes[gap][n], source) for n in numbers]
            free = [case for case in cases if case.number < judged]
            for p, policy in enumerate(chosen.values()):
                answers = [*zip(cases, _ask(pipeline, cases, policy, **settings), strict=True)]
                if judge and free:
                    made = _return(pipeline, free, policy, judge, seed=seed, **settings)
                    answers += zip(free, made, strict=True)
                for case, found in answers:
                    for name, value in found.items():
                        values[name][p, g, case.number] = value
                done += len(answers)
                if on_step:
                    on_step(done, total)
    question = {"gaps": list(gaps), "clips": clips, "seed": seed, "source": source}
    weight = pipeline.model.lm_head.weight
    return Horizon(
        policies={label: str(policy) for label, policy in policies.items()},
        gaps=tuple(gaps),
        values=values,
        bounds=bounds,
        workload={**question, "judged": judged, **about},
        environment=environment(weight.device, weight.dtype),
    )


def _check(
    policies: Mapping[str, Policy],
    gaps: Sequence[int],
    clips: int,
    judge: Judge | None,
    judged: int,
    batch: int,
) -> None:
    if not policies:
        raise InvalidSetting("no policy to ask: give at least one, such as {'full': 'full'}")
    if not gaps or len(set(gaps)) < len(gaps):
        raise InvalidSetting(f"gaps are {list(gaps)}, expected at least one, each once")
    if batch < 1:
        raise InvalidSetting(f"batch is {batch}, expected at least 1 clip")
    if not 0 <= judged <= clips or (judge is None) != (judged == 0):
        raise InvalidSetting(
            f"judged is {judged} of {clips} clips {'with' if judge else 'without'} a judge, "
            "expected clips for a judge and a judge for clips"
        )


def _prospect(
    pipeline: Pipeline, policies: Mapping[str, Policy], settings: Mapping[str, Any]
) -> tuple[dict[str, int | None], dict[str, Any]]:
    """Bounds of all policies, and the workload; refuses a budget before anything has run."""
    bounds: dict[str, int | None] = {}
    workload: dict[str, Any] = {
        "model": pipeline.name,
        "split": "test",
        "chance": CHANCE,
        **settings,
    }
    for label, policy in policies.items():
        decoder = pipeline.run(
            ["a digit behind a curtain"], frames=1, policy=policy, **settings
        ).decoder
        tokens = decoder.layout.tokens
        bounds[label] = policy.max_history(tokens, decoder.caches[0].budget)
        # The sampling is that of judged frames; questions are asked without guidance.
        workload |= {"tokens_per_frame": tokens, "sampling": asdict(decoder.sampling)}
    return bounds, workload


def power(curve: Horizon, *, alpha: float = 0.01) -> list[dict[str, Any]]:
    """Controls that must fail, from a gap of 2 on, against full: `separated` if they surely do.

    They are random and window 1 where the source is history, dropped anchors where it is anchor.
    A curve whose controls are not separated says nothing about the policies between (evaluation
    8d.7). `difference` is of the object's recall, `p` McNemar's, uncorrected.
    """
    verdicts = []
    for gap in (gap for gap in curve.gaps if gap >= 2):
        for label, row in curve.versus_full(gap).items():
            if _is_control(curve.policies[label], curve.workload["source"]):
                verdict = {"control": label, "gap": gap, "p": row["p"]}
                verdict["difference"] = (row["gained"] - row["lost"]) / curve.workload["clips"]
                verdict["separated"] = row["p"] < alpha and row["gained"] < row["lost"]
                verdicts.append(verdict)
    return verdicts


def _is_control(text: str, source: Source) -> bool:
    if source == "anchor":
        return text == DROPPED
    return text.startswith("random") or memory_policy(text) == SlidingWindow(frames=1)
