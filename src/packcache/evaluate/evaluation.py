"""A whole evaluation: what a protocol asks, clip by clip into a ledger, and what it comes to.

    asked = Evaluation(load("digits"), read_protocol(path), folder)
    asked.run()                      # goes on where it was stopped
    result = asked.result()          # packcache.evaluate/2, plain values

A result that is asked for earlier tells what there is, and says what is missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from packcache.digits.prompts import prompt
from packcache.environment import environment
from packcache.errors import InputError, InvalidSetting
from packcache.evaluate.clips import WHOLE, Share
from packcache.evaluate.drift import contrast, drift, marks, survival
from packcache.evaluate.ledger import Ledger
from packcache.evaluate.memory import CHANCE
from packcache.evaluate.protocol import Part, Protocol, Row
from packcache.evaluate.remembering import Remembering
from packcache.evaluate.replay import METRICS, Replay
from packcache.evaluate.running import BESIDE, SERIES, TRUE_SERIES, Running
from packcache.evaluate.statistics import bootstrap, known_mean, sign_flip
from packcache.evaluate.table import cases
from packcache.evaluate.verdict import judge_rows, power
from packcache.lumos.decode import Decoder
from packcache.lumos.pipeline import Pipeline
from packcache.lumos.vocab import latent_frames
from packcache.lumos.weights import fingerprint

__all__ = ["LEDGER", "PARTS", "SCHEMA", "Evaluation", "is_compared"]

SCHEMA = "packcache.evaluate/2"

#: Where what was found lies in a folder.
LEDGER = "clips.jsonl"

PARTS: tuple[Part, ...] = get_args(Part)

#: Numbers of a clip that tables show beside the primaries.
SCALARS = (
    "direction", "speed", "speed_variation", "background", "flow_motion_top5_dis", "dynamic_dis",
    "frozen_share", "flicker_mae", "flow_interp_smoothness_dis", "warp_error_dis", "held",
)  # fmt: skip

#: What rows are compared by, clip by clip, with the reference and with baselines: exploratory.
VERSUS = (
    "identity", "digit", "colour", "count", "direction", "flow_motion_top5_dis", "warp_error_dis",
    "flow_interp_smoothness_dis", "flicker_mae", "speed_variation", "jitter",
)  # fmt: skip

#: Series whose drift is told, beside the full cache's.
DRIFTS = ("identity", "sharpness", "hf_share", "luminance", "contrast", "saturation")

Values = NDArray[np.float64]


class Evaluation:
    """Asks the parts that are wanted and says what was found.

    Args:
        folder: where the ledger lies; None keeps nothing.
        parts: of PARTS; what was asked before counts all the same.
        on_step: called with the part's name, what is done of it and all there is.
        share: one process's part of the work, written beside the folder's ledger (`workers`).
    """

    def __init__(
        self,
        pipeline: Pipeline,
        protocol: Protocol,
        folder: Path | None = None,
        *,
        parts: Sequence[Part] = PARTS,
        on_step: Callable[[str, int, int], None] | None = None,
        share: Share | None = None,
    ) -> None:
        if protocol.clips.model != pipeline.name:
            raise InvalidSetting(
                f"the protocol is of model {protocol.clips.model!r}, this is {pipeline.name!r}"
            )
        odd = [part for part in parts if part not in PARTS]
        if odd:
            raise InvalidSetting(f"unknown part {odd[0]!r}: known are {', '.join(PARTS)}")
        self.pipeline, self.protocol, self.parts = pipeline, protocol, parts
        self.on_step = on_step
        self.share = share or WHOLE
        self.known = self._ledger(folder, None if share is None else share.number)
        self.replay = Replay(pipeline, protocol, self.known, self._tell("replay"), share=self.share)
        self.memory = Remembering(
            pipeline, protocol, self.known, self._tell("memory"), share=self.share
        )
        self.runnings = [
            Running(
                pipeline, protocol, plan, self.known, self._tell(f"{plan.frames} frames"),
                share=self.share,
            )
            for plan in protocol.running
        ]  # fmt: skip

    def _ledger(self, folder: Path | None, number: int | None) -> Ledger:
        """The folder's, or one of a process that knows what the folder's does."""
        if folder is None:
            return Ledger(None, self._identity())
        if number is None:
            return Ledger(folder / LEDGER, self._identity())
        own = Ledger((folder / LEDGER).with_suffix(f".{number}.jsonl"), self._identity())
        own.found = Ledger(folder / LEDGER, self._identity()).found | own.found
        return own

    def run(self) -> None:
        """All parts that are wanted; cheap ones first."""
        if "replay" in self.parts:
            self.replay.run()
        if "memory" in self.parts:
            self.memory.run()
        if "running" in self.parts:
            for running in self.runnings:
                running.run()

    def result(self) -> dict[str, Any]:
        """Everything found, in plain values. Raises InputError if nothing was."""
        if not self.known.found:
            raise InputError("nothing was evaluated yet: run a part of the protocol first")
        weight = self.pipeline.model.lm_head.weight
        paired = self._paired()
        compared = judge_rows(self.protocol, paired, gates=self._gates())
        return {
            "schema": SCHEMA,
            "environment": environment(weight.device, weight.dtype),
            "workload": self._workload(),
            "missing": self.missing,
            "spent": self._spent(),
            "primaries": [one.to_json() for one in compared],
            "power": [asdict(one) for one in power(self.protocol, compared)],
            "versus": self._beside_baselines(paired),
            "memory": self._memory_rows(),
            "replay": self._replay_rows(),
            "running": [self._running_rows(running) for running in self.runnings],
        }

    @property
    def missing(self) -> dict[str, int]:
        """Clips that the protocol asks for and nobody has told of, by part, over all rows."""
        missing = {"replay": self.replay.missing, "memory": self.memory.missing}
        missing |= {running.part: running.missing for running in self.runnings}
        return {part: count for part, count in missing.items() if count}

    @property
    def left(self) -> int:
        """Clips of the parts that are wanted."""
        wanted = {"replay": self.replay.missing, "memory": self.memory.missing}
        wanted["running"] = sum(running.missing for running in self.runnings)
        return sum(wanted[part] for part in self.parts)

    # --- what is asked ------------------------------------------------------------------------

    def _tell(self, what: str) -> Callable[[int, int], None] | None:
        return None if self.on_step is None else functools.partial(self.on_step, what)

    def _identity(self) -> dict[str, Any]:
        return {
            "protocol": self.protocol.hash,
            "quick": self.protocol.quick,
            "model": self.pipeline.name,
            "weights": fingerprint(self.pipeline.model),
            "sampling": asdict(self.pipeline.sampling),
            "device": self.pipeline.device.type,
            "dtype": str(self.pipeline.dtype).removeprefix("torch."),
        }

    def _spent(self) -> dict[str, Any]:
        """Hours of cores that answers took, and of how many of them that is known."""
        seconds = self.known.seconds
        hours = round(sum(seconds.values()) / 3600, 3)
        return {"core_hours": hours, "answers": len(seconds), "of": len(self.known.found)}

    def _workload(self) -> dict[str, Any]:
        plans = [
            {**asdict(plan), "prompts_of": dict(plan.prompts_of)} for plan in self.protocol.running
        ]
        return {
            **self._identity(),
            "exploratory": self.protocol.quick is not None,
            "rows": {label: asdict(row) for label, row in self.protocol.rows.items()},
            "replay": asdict(self.protocol.replay),
            "memory": asdict(self.protocol.memory),
            "running": plans,
            "primaries": [asdict(primary) for primary in self.protocol.primaries],
            "exclusions": list(self.protocol.exclusions),
        }

    # --- primaries ----------------------------------------------------------------------------

    def _paired(self) -> dict[str, dict[str, Values]]:
        """By primary and row, one value a prompt."""
        makers = {
            "recall": self._recall, "replay_kl": self._replay_kl,
            "identity_drift": self._identity_drift, "motion_ratio": self._motion,
        }  # fmt: skip
        odd = [p.name for p in self.protocol.primaries if p.name not in makers]
        if odd:
            raise InvalidSetting(f"unknown primary {odd[0]!r}: known are {', '.join(makers)}")
        full = self.protocol.reference.label
        paired: dict[str, dict[str, Values]] = {}
        for primary in self.protocol.primaries:
            rows = {label: makers[primary.name](row) for label, row in self.protocol.rows.items()}
            known = {label: own for label, own in rows.items() if own is not None}
            paired[primary.name] = known if full in known else {}
        return paired

    def _beside_baselines(self, paired: dict[str, dict[str, Values]]) -> list[dict[str, Any]]:
        """Primaries of every row less those of every baseline: mean difference, paired."""
        pairs = [
            (name, label, base.label)
            for name, rows in paired.items()
            for base in self.protocol.rows_of("baseline")
            for label in rows
            if label != base.label and base.label in rows
        ]

        def values(name: str, label: str, other: str) -> Values:
            if name != "replay_kl":
                return paired[name][label]
            rows = self.protocol.rows  # over the same latent frames, whoever gives up sooner
            own = self._replay_kl(rows[label], rows[other])
            return paired[name][label] if own is None else own

        return [
            {"row": label, "against": base, "metric": name, **told}
            for name, label, base in pairs
            if (told := _difference(values(name, label, base), values(name, base, label)))
        ]

    def _recall(self, row: Row) -> Values | None:
        """Points, mean over the gaps at which the codec tells the true object from all others."""
        right, told = (self.memory.values(row.label, n) for n in ("object", "told_apart"))
        if right is None or told is None:
            return None
        count = told.sum(axis=0)
        return np.where(count > 0, 100 * (right * told).sum(axis=0) / np.maximum(count, 1), np.nan)

    def _replay_kl(self, row: Row, beside: Row | None = None) -> Values | None:
        """Mean over the frames since a token was given up by the row, or by the one beside it."""
        if row is self.protocol.reference:  # nothing diverges from itself
            return np.zeros(self.protocol.replay.prompts)
        if row.other_draws or not self._asked(row, "replay"):
            return None
        kl = self.replay.values(row.label)["kl"]
        latents = self._latents(self.protocol.replay.frames)
        means = np.full(len(kl), np.nan)
        for number, case in enumerate(self.replay.cases):
            firsts = [
                self._first_missed(one, self.protocol.replay.frames, case.with_image)
                for one in (row, beside)
                if one is not None
            ]
            first = min((one for one in firsts if one is not None), default=0)
            means[number] = known_mean(kl[number, kl.shape[1] - (latents - first) :])
        return means

    @property
    def _main(self) -> Running | None:
        """Free running that the primaries are about: the first plan."""
        return self.runnings[0] if self.runnings else None

    def _identity_drift(self, row: Row) -> Values | None:
        """Points: last 15 % less first 15 %, clips with an image, mean over seeds."""
        main = self._main
        if main is None or not self._asked(row, main.part):
            return None
        change = 100 * contrast(main.values(row.label, "identity"))
        change[~self._with_image(main)] = np.nan
        return change.mean(axis=1)

    def _with_image(self, running: Running) -> NDArray[np.bool_]:
        """Which prompts begin with an image, the anchor whose identity may drift."""
        return np.array([case.with_image for case in running.cases])

    def _motion(self, row: Row) -> Values | None:
        main = self._main
        if main is None or not self._asked(row, main.part):
            return None
        return main.values(row.label, "flow_motion_top5_dis").mean(axis=1)

    def _asked(self, row: Row, part: str) -> bool:
        if part == "replay":
            return self.replay.knows(row.label)
        return any(key[:2] == (row.label, part) for key in self.known.found)

    def _gates(self) -> dict[str, str]:
        """Primaries on which "no worse" means nothing, since the reference itself fails."""
        gates, full = {}, self.protocol.reference
        recall = self._recall(full)
        if recall is not None:
            interval = bootstrap(recall[~np.isnan(recall)])
            if interval.low <= 100 * CHANCE["object"]:
                gates["recall"] = "the full cache itself recalls no more than chance"
        main = self._main
        if main is not None and self._asked(full, main.part):
            own, still = (
                known_mean(main.values(label, "identity")[self._with_image(main)].ravel())
                for label in (full.label, BESIDE[1])
            )
            if np.isnan(still):
                gates["identity_drift"] = "the clip that stands still was not made: go on"
            elif own <= still:
                gates["identity_drift"] = (
                    f"a clip that stands still keeps as much: {100 * still:.0f} % of frames right, "
                    f"the full cache {100 * own:.0f} %"
                )
        return gates

    # --- where the cache does something -------------------------------------------------------

    def _latents(self, frames: int) -> int:
        return latent_frames(frames, self.pipeline.model.config.compression[0])

    def _first_missed(self, row: Row, frames: int, image: bool) -> int | None:
        """The first latent frame that is made without a token of those before; None: there is
        none. Up to it the clip is the full cache's."""
        packs = marks(
            row.make(), layout=self._decoder.layout, latents=self._latents(frames), image=image,
            visible=self._decoder.visible,
        ).packs  # fmt: skip
        return None if packs is None or packs + 1 >= self._latents(frames) else packs + 1

    def _first_of(self, row: Row, frames: int) -> dict[str, int | None]:
        """By kind of clip, from text alone or with an image."""
        kinds = {"text": False, "image": True}
        return {name: self._first_missed(row, frames, image) for name, image in kinds.items()}

    @functools.cached_property
    def _decoder(self) -> Decoder:
        """Of a clip of the protocol: it knows how a latent frame lies and what is re-masked."""
        (case,) = cases(1, self.protocol.clips.seed)
        return self.pipeline.run([prompt(case.scene)], frames=self.protocol.replay.frames).decoder

    # --- tables -------------------------------------------------------------------------------

    def _memory_rows(self) -> list[dict[str, Any]]:
        rows = []
        for label in self.protocol.rows:
            values, held = (self.memory.values(label, name) for name in ("object", "held"))
            if values is None or held is None:
                continue
            for gap, own, tokens in zip(self.protocol.memory.gaps, values, held, strict=True):
                found = {"recall": _summary(100 * own), "held": float(tokens.mean())}
                rows.append({"row": label, "gap": gap, **found})
        return rows

    def _replay_rows(self) -> list[dict[str, Any]]:
        rows = []
        for label, row in self.protocol.rows.items():
            if row is self.protocol.reference or not self._asked(row, "replay"):
                continue
            values = self.replay.values(label)
            rows.append(
                {
                    "row": label,
                    "first_missed": self._first_of(row, self.protocol.replay.frames),
                    **{name: _summary(known_mean(values[name])) for name in METRICS},
                    "curves": {name: _curve(values[name]) for name in METRICS},
                    "nll_true": self._true(label),
                }
            )
        return rows

    def _true(self, label: str) -> dict[str, Any] | None:
        """Surprise at true clips, and by how much more than the full cache's."""
        own, full = (self._true_values(one) for one in (label, self.protocol.reference.label))
        if not own:
            return None
        both = sorted(own.keys() & full.keys())
        return {
            "mean": _summary(np.array([own[n] for n in both])),
            "more_than_full": _summary(np.array([own[n] - full[n] for n in both])),
        }

    def _true_values(self, label: str) -> dict[int, float]:
        return {
            int(key[2]): float(np.mean(values["nll_true"]))
            for key, values in self.known.found.items()
            if key[:2] == (label, "true")
        }

    def _running_rows(self, running: Running) -> dict[str, Any]:
        rows = [
            self._running_row(running, label)
            for label in (*self.protocol.rows, *BESIDE)
            if any(key[:2] == (label, running.part) for key in self.known.found)
        ]
        return {
            "frames": running.plan.frames,
            "latents": running.latents,
            "rows": rows,
            "versus": self._versus(running),
        }

    def _versus(self, running: Running) -> list[dict[str, Any]]:
        """Every row against the reference and against baselines: mean difference, paired."""
        asked = [row for row in self.protocol.rows.values() if self._asked(row, running.part)]
        pairs = [(row, other) for other in asked for row in asked if is_compared(row, other)]
        return [
            {"row": row.label, "against": other.label, "metric": name, **told}
            for row, other in pairs
            for name in VERSUS
            if (told := _difference(*_told(running, row.label, other.label, name)))
        ]

    def _running_row(self, running: Running, label: str) -> dict[str, Any]:
        row = self.protocol.rows.get(label)
        curves = {name: _curve(_by_prompt(running.values(label, name))) for name in SERIES}
        scalars = {name: _summary(_by_prompt(running.values(label, name))) for name in SCALARS}
        identity = {
            name: _summary(100 * known_mean(_by_prompt(running.values(label, name))))
            for name in TRUE_SERIES
        }
        return {
            "row": label,
            "first_missed": row and self._first_of(row, running.plan.frames),
            "diverged": _first_diverged(running.values(label, "diverged")),
            "true": identity,
            "clip": scalars,
            "curves": {name: curve for name, curve in curves.items() if curve},
            "drift": {name: self._drift(running, label, name) for name in DRIFTS},
            "survival": _survival(
                running.values(label, "survival"),
                running.values(label, "count"),
                running.plan.frames,
            ),
        }

    def _drift(self, running: Running, label: str, name: str) -> dict[str, Any] | None:
        """Drift of a series over clips that have all of it, beside the full cache's own."""
        full = self.protocol.reference.label
        own, other = (running.values(one, name) for one in (label, full))
        if own.shape != other.shape:  # rows that no policy made have one seed
            other = other[:, : own.shape[1]]
        whole = ~(np.isnan(own) | np.isnan(other)).any(axis=2)
        if not whole.any():
            return None
        found = drift(
            own[whole],
            seconds=self.pipeline.model.config.compression[0] / self.pipeline.fps,
            against=None if label == full else other[whole],
            prompts=np.nonzero(whole)[0].tolist(),
        ).to_json()
        return {name: value for name, value in found.items() if name != "curve"}


def is_compared(row: Row, other: Row) -> bool:
    """Is a row told beside another? Beside the reference, baselines and policies, and beside a
    control that is the same policy run otherwise."""
    if row is other or row.role == "reference":
        return False
    same = row.role == "policy" and other.role == "control" and row.policy == other.policy
    return same or other.role in ("reference", "baseline", "policy")


def _told(running: Running, row: str, other: str, name: str) -> tuple[Values, Values]:
    """What the clips of two rows come to, a prompt: seeds are averaged, and of a series the latent
    frames in which both say something."""
    own, theirs = (_by_prompt(running.values(label, name)) for label in (row, other))
    if name not in SERIES:
        return own, theirs
    both = ~(np.isnan(own) | np.isnan(theirs))
    first, second = (known_mean(np.where(both, values, np.nan)) for values in (own, theirs))
    return first, second


def _difference(own: Values, theirs: Values) -> dict[str, float] | None:
    """Mean over prompts that both have, with its interval and sign-flip p."""
    known = ~np.isnan(own) & ~np.isnan(theirs)
    if not known.any():
        return None
    less = (own - theirs)[known]
    return {**(bootstrap(less).at() or {}), "p": sign_flip(less)}


def _by_prompt(values: Values) -> Values:
    """Mean over the seeds of a prompt; NaN where there is no seed."""
    return known_mean(np.moveaxis(values, 1, -1))


def _summary(values: Values) -> dict[str, float] | None:
    """Mean and 95 % interval over prompts that have a value."""
    known = values[~np.isnan(values)]
    return bootstrap(known).at() if len(known) else None


def _curve(values: Values) -> dict[str, list[float | None]] | None:
    """Mean and band of `[prompts, latents]`, each latent frame over the prompts that have it."""
    if np.isnan(values).all():
        return None
    points = [_summary(column) for column in values.T]
    return {
        name: [None if point is None else point[name] for point in points]
        for name in ("mean", "low", "high")
    }


def _first_diverged(values: Values) -> dict[str, float] | None:
    """The first latent frame with a code that is not the full cache's; those that never differ."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    return {"median": float(np.median(known)), "first": float(known.min()), "clips": len(known)}


def _survival(values: Values, asked: Values, frames: int) -> dict[str, Any] | None:
    """Kaplan-Meier over clips `[prompts, seeds]` that were made, those of a prompt together: one
    that lost no digit was watched to its end."""
    made = ~np.isnan(asked).all(axis=-1)
    times = values[made]
    if not len(times):
        return None
    lost = ~np.isnan(times)
    prompts = np.nonzero(made)[0].tolist()
    return survival(np.where(lost, times, frames), lost, prompts=prompts).to_json()
