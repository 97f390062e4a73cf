"""Where the cache of a row fills, packs and slides in the clips of a protocol."""

from __future__ import annotations

import functools
from typing import Any

from packcache.digits.prompts import prompt
from packcache.evaluate.drift import Marks, marks
from packcache.evaluate.protocol import Protocol, Row
from packcache.evaluate.table import cases
from packcache.lumos.decode import Decoder
from packcache.lumos.pipeline import Pipeline
from packcache.lumos.vocab import latent_frames

__all__ = ["KINDS", "Reach"]

#: Kinds of clips, and whether they begin with an image.
KINDS = {"text": False, "image": True}


class Reach:
    """Of a pipeline's clips, told without running one."""

    def __init__(self, pipeline: Pipeline, protocol: Protocol) -> None:
        self.pipeline, self.protocol = pipeline, protocol

    def latents(self, frames: int) -> int:
        """Latent frames of so many pixel frames."""
        return latent_frames(frames, self.pipeline.model.config.compression[0])

    def marks(self, row: Row, frames: int, image: bool) -> Marks:
        """Latent frames at whose commit the row's cache fills, packs and slides."""
        return marks(
            row.make(), layout=self._decoder.layout, latents=self.latents(frames), image=image,
            visible=self._decoder.visible,
        )  # fmt: skip

    def first_missed(self, row: Row, frames: int, image: bool) -> int | None:
        """The first latent frame that is made without a token of those before; None: there is
        none. Up to it the clip is the full cache's."""
        packs = self.marks(row, frames, image).packs
        return None if packs is None or packs + 1 >= self.latents(frames) else packs + 1

    def first_of(self, row: Row, frames: int) -> dict[str, int | None]:
        """`first_missed` by kind of clip."""
        return {name: self.first_missed(row, frames, image) for name, image in KINDS.items()}

    def marks_of(self, row: Row, frames: int) -> dict[str, dict[str, Any]]:
        """`marks` by kind of clip, in plain values."""
        return {name: self.marks(row, frames, image).to_json() for name, image in KINDS.items()}

    def most(self, row: Row) -> int | None:
        """Most tokens of history that a row holds; None without bound."""
        policy, decoder = row.make(), self._decoder
        shown = None if decoder.visible is None else int(decoder.visible.sum())
        budget = policy.budget_for(decoder.layout.tokens, shown)
        return policy.max_history(decoder.layout.tokens, budget)

    @functools.cached_property
    def _decoder(self) -> Decoder:
        """Of a clip of the protocol: it knows how a latent frame lies and what is re-masked."""
        (case,) = cases(1, self.protocol.clips.seed)
        return self.pipeline.run([prompt(case.scene)], frames=self.protocol.replay.frames).decoder
