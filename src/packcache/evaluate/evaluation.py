"""A whole evaluation: what a protocol asks, clip by clip into a ledger, and what it comes to.

    asked = Evaluation(load("digits"), read_protocol(path), folder)
    asked.run()                      # goes on where it was stopped
    result = asked.result()          # packcache.evaluate/4, plain values

A result that is asked for earlier tells what there is, and says what is missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np

from packcache.environment import environment
from packcache.errors import InputError, InvalidSetting
from packcache.evaluate.clips import WHOLE, Share
from packcache.evaluate.ledger import Ledger
from packcache.evaluate.primaries import Primaries
from packcache.evaluate.protocol import Part, Protocol
from packcache.evaluate.reach import Reach
from packcache.evaluate.remembering import Remembering
from packcache.evaluate.replay import METRICS, Replay
from packcache.evaluate.running import Running
from packcache.evaluate.running_tables import RunningTables
from packcache.evaluate.statistics import known_mean
from packcache.evaluate.told import curve, summary
from packcache.evaluate.verdict import beside_intact, judge_rows, power
from packcache.lumos.pipeline import Pipeline
from packcache.lumos.weights import fingerprint

__all__ = ["LEDGER", "PARTS", "SCHEMA", "Evaluation"]

SCHEMA = "packcache.evaluate/4"

#: Where what was found lies in a folder.
LEDGER = "clips.jsonl"

PARTS: tuple[Part, ...] = get_args(Part)


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
        self.reach = Reach(pipeline, protocol)
        main = self.runnings[0] if self.runnings else None
        self.primaries = Primaries(protocol, self.replay, self.memory, main, self.reach)

    def _ledger(self, folder: Path | None, number: int | None) -> Ledger:
        """The folder's, or one of a process that knows what the folder's does."""
        place = environment(self.pipeline.device)
        on = place["processor"] if place["device"] == "cpu" else place["device"]
        if folder is None:
            return Ledger(None, self._identity(), on)
        if number is None:
            return Ledger(folder / LEDGER, self._identity(), on)
        own = Ledger((folder / LEDGER).with_suffix(f".{number}.jsonl"), self._identity(), on)
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
        paired = self.primaries.paired()
        compared = judge_rows(self.protocol, paired, gates=self.primaries.gates())
        controls = beside_intact(self.protocol, self.primaries.beside_intact(paired))
        return {
            "schema": SCHEMA,
            "environment": environment(weight.device, weight.dtype),
            "workload": self._workload(),
            "missing": self.missing,
            "spent": self.known.spent(),
            "primaries": [one.to_json() for one in compared],
            "controls": [one.to_json() for one in controls],
            "power": [asdict(one) for one in power(self.protocol, compared, controls)],
            "versus": self.primaries.versus(paired),
            "memory": self._memory_rows(),
            "replay": self._replay_rows(),
            "running": [RunningTables(running, self.reach).told() for running in self.runnings],
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

    def _workload(self) -> dict[str, Any]:
        plans = [
            {**asdict(plan), "prompts_of": dict(plan.prompts_of)} for plan in self.protocol.running
        ]
        return {
            **self._identity(),
            "exploratory": self.protocol.exploratory,
            "rows": {label: asdict(row) for label, row in self.protocol.rows.items()},
            "replay": asdict(self.protocol.replay),
            "memory": asdict(self.protocol.memory),
            "running": plans,
            "primaries": [asdict(primary) for primary in self.protocol.primaries],
            "exclusions": list(self.protocol.exclusions),
        }

    # --- tables -------------------------------------------------------------------------------

    def _memory_rows(self) -> list[dict[str, Any]]:
        rows = []
        for label in self.protocol.rows:
            values, held = (self.memory.values(label, name) for name in ("object", "held"))
            if values is None or held is None:
                continue
            for gap, own, tokens in zip(self.protocol.memory.gaps, values, held, strict=True):
                found = {"recall": summary(100 * own), "held": float(tokens.mean())}
                rows.append({"row": label, "gap": gap, **found})
        return rows

    def _replay_rows(self) -> list[dict[str, Any]]:
        rows = []
        for label, row in self.protocol.rows.items():
            if row is self.protocol.reference or not self.replay.knows(label):
                continue
            values = self.replay.values(label)
            rows.append(
                {
                    "row": label,
                    "first_missed": self.reach.first_of(row, self.protocol.replay.frames),
                    "marks": self.reach.marks_of(row, self.protocol.replay.frames),
                    **{name: summary(known_mean(values[name])) for name in METRICS},
                    "curves": {name: curve(values[name]) for name in METRICS},
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
            "mean": summary(np.array([own[n] for n in both])),
            "more_than_full": summary(np.array([own[n] - full[n] for n in both])),
        }

    def _true_values(self, label: str) -> dict[int, float]:
        return {
            int(key[2]): float(np.mean(values["nll_true"]))
            for key, values in self.known.found.items()
            if key[:2] == (label, "true")
        }
