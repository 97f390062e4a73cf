"""Clips that rows of a protocol make, each made once and shared by every part that asks for it.

    clips = Clips(load("digits"), protocol, ledger)
    made = clips.get(row, numbers, seed=0, latents=13)       # codes [B, 13, rows, cols]

Draws are keyed by seed and latent frame, so a clip starts with all shorter ones of its prompt, and
is the reference's own until its policy gives up the first token. What is known from either is
committed again instead of being decided again: one forward a latent frame and not one a step.
"""

from __future__ import annotations

import base64
import contextlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from packcache.digits import world
from packcache.digits.prompts import prompt
from packcache.evaluate.drift import marks
from packcache.evaluate.ledger import Ledger
from packcache.evaluate.protocol import Kernel, Protocol, Row
from packcache.evaluate.table import Case, cases
from packcache.lumos.pipeline import Pipeline, Run
from packcache.lumos.vocab import pixel_frames

__all__ = [
    "BATCH",
    "WHOLE",
    "Clips",
    "Made",
    "Share",
    "batches",
    "kernel",
    "place_of",
    "settings_of",
]

#: Clips that run as one call.
BATCH = 8

#: Seeds of clips are below it.
OTHER_DRAWS = 1_000_003


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """One clip: `codes [latents, rows, cols]`, and tokens `held` after every latent frame."""

    codes: Tensor
    held: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.codes)

    def cut(self, latents: int) -> Made:
        return Made(codes=self.codes[:latents], held=self.held[:latents])

    def to_json(self) -> dict[str, Any]:
        told = zlib.compress(self.codes.numpy().astype("<i4").tobytes(), 9)
        shape, held = list(self.codes.shape), list(self.held)
        return {"codes": base64.b64encode(told).decode(), "shape": shape, "held": held}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Made:
        told = np.frombuffer(zlib.decompress(base64.b64decode(values["codes"])), dtype="<i4")
        codes = torch.from_numpy(told.astype(np.int64)).reshape(values["shape"])
        return Made(codes=codes, held=tuple(values["held"]))


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of the work is one process's: of every `of` batches the one in place `number`."""

    number: int = 0
    of: int = 1

    def takes(self, place: int) -> bool:
        return place % self.of == self.number


#: Everything.
WHOLE = Share()


class Clips:
    """Makes what a ledger does not know yet. Clips of one call are all from text or all with an
    image."""

    def __init__(self, pipeline: Pipeline, protocol: Protocol, known: Ledger) -> None:
        self.pipeline, self.protocol, self.known = pipeline, protocol, known
        most = max([protocol.replay.prompts, *(plan.prompts for plan in protocol.running)])
        self.cases = cases(most, protocol.clips.seed)

    def get(self, row: Row, numbers: Sequence[int], *, seed: int, latents: int) -> list[Made]:
        """Clips of `latents` latent frames, by number of their case."""
        stored = [self.stored(row, number, seed) for number in numbers]
        short = [n for n, own in zip(numbers, stored, strict=True) if len(own or ()) < latents]
        if short:
            for number, own in zip(short, self._make(row, short, seed, latents), strict=True):
                self.known.add(_key(row, number, seed), own.to_json())
        found = [self.stored(row, number, seed) for number in numbers]
        return [own.cut(latents) for own in found if own is not None]

    def stored(self, row: Row, number: int, seed: int) -> Made | None:
        """As much of a clip as is known."""
        values = self.known.found.get(_key(row, number, seed))
        return None if values is None else Made.from_json(values)

    def _make(self, row: Row, numbers: Sequence[int], seed: int, latents: int) -> list[Made]:
        chosen = [self.cases[number] for number in numbers]
        compression = self.pipeline.model.config.compression[0]
        with kernel(row.kernel):
            run = self.pipeline.run(
                [prompt(case.scene) for case in chosen],
                frames=pixel_frames(latents, compression),
                policy=row.make(),
                **settings_of(row, chosen, seed),
            )
            if run.policy.asks != "expected":  # which counts the queries of all steps
                known = self._known(row, numbers, seed, latents, run)
                run.made = None if known is None else known[:, int(chosen[0].with_image) :]
            results = list(run)
        codes = torch.stack([result.codes for result in results], dim=1)
        held = tuple(sum(result.kept.values()) for result in results)
        return [Made(codes=own, held=held) for own in codes]

    def _known(
        self, row: Row, numbers: Sequence[int], seed: int, latents: int, run: Run
    ) -> Tensor | None:
        """Codes `[B, t, rows, cols]` that these clips start with, as far as all are known: their
        own, or the reference's up to where this row misses something of it."""
        alike = self._alike(row, run, latents)
        start = latents
        clips = []
        for number in numbers:
            own = self.stored(row, number, seed)
            theirs = self.stored(self.protocol.reference, number, seed)
            longest = max(own, theirs and theirs.cut(alike), key=lambda made: len(made or ()))
            clips.append(longest)
            start = min(start, len(longest or ()))
        if start == 0:
            return None
        return torch.stack([made.codes[:start] for made in clips if made is not None])

    def _alike(self, row: Row, run: Run, latents: int) -> int:
        """Latent frames in which a clip of this row is the reference's to the code: those that
        miss no token. 0 for rows that are the reference run otherwise."""
        reference = self.protocol.reference
        if row.other_draws or row.kernel != reference.kernel:
            return 0
        decoder = run.decoder
        packs = marks(
            row.make(), layout=decoder.layout, latents=latents, image=run.given is not None,
            visible=decoder.visible,
        ).packs  # fmt: skip
        alike = latents if packs is None else packs + 1
        if row.positions != reference.positions:
            alike = min(alike, self.pipeline.model.config.trained_latent_frames or alike)
        return alike


def _key(row: Row, number: int, seed: int) -> tuple[str, str, int, int]:
    return row.label, "clip", number, seed


# --- how a row runs ------------------------------------------------------------------------------


def settings_of(row: Row, chosen: Sequence[Case], seed: int = 0) -> dict[str, Any]:
    """How a row runs clips, all from text or all with an image: keywords for `Pipeline.run`."""
    pictures = [Image.fromarray(world.render(case.scene, 1)[0]) for case in chosen]
    return {
        "image": pictures if chosen[0].with_image else None,
        "seed": [_seed(row, case.seed, seed) for case in chosen],
        "positions": row.positions,
        "rebase": row.rebase,
    }


def _seed(row: Row, own: int, seed: int) -> int:
    """Draws of a clip; another seed, or a row of other draws, shares none."""
    return own + (2 * seed + row.other_draws) * OTHER_DRAWS


@contextlib.contextmanager
def kernel(name: Kernel) -> Iterator[None]:
    """Attention as usual, or by plain products, whose sums come in another order."""
    if name == "usual":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def batches(chosen: Sequence[Case], numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    """Numbers of clips that can run as one call: with an image or without, at most `size`."""
    for with_image in (False, True):
        group = [number for number in numbers if chosen[number].with_image == with_image]
        for start in range(0, len(group), size):
            yield group[start : start + size]


def place_of(chosen: Sequence[Case], numbers: Sequence[int]) -> int:
    """A batch's place among all there are: the same however many clips a row or a plan has."""
    first = numbers[0]
    return first // (2 * BATCH) + chosen[first].with_image
