"""Teacher-forced replay: the full cache's own tokens, fed to every policy (evaluation 8d.1).

    replay = Replay(load("digits"), protocol, ledger)
    replay.run(); replay.values("packcache 2")["kl"]           # [clips, latent frames]

No sampling noise: every row sees the same clip, latent frame by latent frame, and is asked for the
next one when a share of its codes is known. What it answers is held against the full cache's
answer: KL(full || row) of the guided distribution, how often the most likely code agrees, the
surprise at the code that was recorded; and the share of the full cache's attention that goes to
tokens which the row holds no more. Along true clips the surprise at the true code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packcache.digits import world
from packcache.digits.prompts import prompt
from packcache.errors import GenerationError
from packcache.evaluate.attended import Attended, held_tokens
from packcache.evaluate.clips import (
    BATCH,
    WHOLE,
    Clips,
    Share,
    batches,
    kernel,
    place_of,
    settings_of,
)
from packcache.evaluate.ledger import Ledger
from packcache.evaluate.protocol import Protocol, Row
from packcache.evaluate.table import Case, cases
from packcache.lumos.decode import Decoder
from packcache.lumos.pipeline import Pipeline
from packcache.lumos.vocab import latent_frames, pixel_frames

__all__ = ["METRICS", "Replay"]

#: One value a generated latent frame, mean over undecided codes and shares known.
METRICS = ("kl", "agreement", "nll", "nll_full", "lost")

#: Along true clips, which the full cache did not make.
TRUE_METRICS = ("nll_true",)

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What a row says of the next latent frame: log p `[B, shares, N, codes]`, which tokens it
    holds `[S]` by clip, and where its queries look, if that was asked."""

    log_p: Tensor
    held: list[NDArray[np.bool_]]
    mass: list[Values]


#: Told of a clip that is shown: its codes `[B, latents, rows, cols]` and which codes are known,
#: bool `[B, shares, latents, N]`.
Shown = tuple[Tensor, Tensor]


class Replay:
    """Asks what a ledger does not know yet.

    Args:
        pipeline: the model that the protocol names.
        on_step: called with clips done and all there are, over rows.
        share: the batches that are asked.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        protocol: Protocol,
        known: Ledger,
        on_step: Callable[[int, int], None] | None = None,
        *,
        share: Share = WHOLE,
    ) -> None:
        self.pipeline, self.protocol, self.known = pipeline, protocol, known
        self.share = share
        self.plan, self.on_step = protocol.replay, on_step
        self.cases = cases(self.plan.prompts, protocol.clips.seed)
        self.clips = Clips(pipeline, protocol, known)
        self.rows = [
            row for row in protocol.rows.values()
            if not row.other_draws and row is not protocol.reference
        ]  # fmt: skip
        self.done = 0

    # --- asking -------------------------------------------------------------------------------

    def run(self) -> None:
        """All clips of all rows; what is known already is not asked again. The answers of a batch
        are held until every row was asked."""
        for numbers in batches(self.cases, range(self.plan.prompts), BATCH):
            if self.share.takes(place_of(self.cases, numbers)):
                self._recorded(numbers)
                self._true([n for n in numbers if n < self.plan.true_prompts])

    def _recorded(self, numbers: Sequence[int]) -> None:
        """Make the full cache's clips, and ask every row along them."""
        missing = self._missing(numbers, "replay", set(METRICS))
        if not missing:
            self._advance(numbers)
            return
        codes = self._codes(numbers)
        shown = codes, self._told(numbers, codes)
        full = list(self._answers(self.protocol.reference, numbers, shown, looks=True))
        own = _surprise(full, shown, self._given(numbers))
        for row in self.rows:
            if row.label in missing:
                found = _held_against(full, self._answers(row, numbers, shown), shown)
                for place, number in enumerate(numbers):
                    values = {name: v[place].tolist() for name, v in found.items()}
                    values["nll_full"] = own[place].tolist()
                    self.known.add((row.label, "replay", number), values)
        self._advance(numbers)

    def _true(self, numbers: Sequence[int]) -> None:
        """The surprise of every row, the reference too, along true clips."""
        rows = [self.protocol.reference, *self.rows]
        if not numbers:
            return
        videos = [world.render(self.cases[n].scene, self._frames) for n in numbers]
        codes = torch.stack([self.pipeline.encode_video(video) for video in videos]).long()
        shown = codes, self._told(numbers, codes)
        for row in rows:
            keys = [(row.label, "true", number) for number in numbers]
            if all(self.known.has(key, set(TRUE_METRICS)) for key in keys):
                continue
            found = _surprise(self._answers(row, numbers, shown), shown, self._given(numbers))
            for key, own in zip(keys, found, strict=True):
                self.known.add(key, {"nll_true": own.tolist()})

    @property
    def missing(self) -> int:
        """Clips of all rows that are not known yet, true ones among them."""
        reference = self.protocol.reference
        asked = [(row.label, "replay", METRICS, self.plan.prompts) for row in self.rows]
        asked += [
            (row.label, "true", TRUE_METRICS, self.plan.true_prompts)
            for row in (reference, *self.rows)
        ]
        return sum(
            not self.known.has((label, part, number), set(names))
            for label, part, names, count in asked
            for number in range(count)
        )

    def _missing(self, numbers: Sequence[int], part: str, names: set[str]) -> set[str]:
        """Labels of rows that have not answered all of these clips."""
        return {
            row.label
            for row in self.rows
            if not all(self.known.has((row.label, part, n), names) for n in numbers)
        }

    def _advance(self, numbers: Sequence[int]) -> None:
        self.done += len(numbers)
        if self.on_step:
            self.on_step(self.done, self.plan.prompts)

    # --- one batch ----------------------------------------------------------------------------

    @property
    def _frames(self) -> int:
        """Pixel frames that fill whole latent frames."""
        group = self.pipeline.model.config.compression[0]
        return pixel_frames(-(-(self.plan.frames - 1) // group) + 1, group)

    def _given(self, numbers: Sequence[int]) -> int:
        """Latent frames that a clip of this batch starts with."""
        return int(self.cases[numbers[0]].with_image)

    def _codes(self, numbers: Sequence[int]) -> Tensor:
        """Codes `[B, latents, rows, cols]` that the full cache makes, its usual way."""
        latents = latent_frames(self.plan.frames, self.pipeline.model.config.compression[0])
        made = self.clips.get(self.protocol.reference, numbers, seed=0, latents=latents)
        return torch.stack([own.codes for own in made])

    def _told(self, numbers: Sequence[int], codes: Tensor) -> Tensor:
        """Which codes are known, bool `[B, shares, latents, N]`: drawn clip by clip, nested."""
        _, latents, *grid = codes.shape
        count = int(np.prod(grid))
        told = torch.zeros(len(numbers), len(self.plan.known), latents, count, dtype=torch.bool)
        for place, number in enumerate(numbers):
            rng = np.random.default_rng((self.protocol.clips.seed, number))
            for latent in range(latents):
                order = torch.from_numpy(rng.permutation(count))
                for state, share in enumerate(self.plan.known):
                    told[place, state, latent, order[: round(share * count)]] = True
        return told

    def _answers(
        self, row: Row, numbers: Sequence[int], shown: Shown, *, looks: bool = False
    ) -> Iterator[Answer]:
        """Of each latent frame that is not given; `looks`: where its queries look, too."""
        codes, told = shown
        chosen = [self.cases[number] for number in numbers]
        decoder = self._decoder(row, chosen)
        seen = Attended(decoder) if looks else None
        with kernel(row.kernel):
            decoder.prefill()
            for latent, own in enumerate(codes.unbind(1)):
                given = latent < self._given(numbers)
                if not given:
                    flat = own.flatten(1)
                    asked = [torch.where(t[:, latent], flat, -1) for t in told.unbind(1)]
                    with seen.looking() if seen else contextlib.nullcontext():
                        log_p = torch.stack([_log_p(decoder, known) for known in asked], dim=1)
                    yield Answer(
                        log_p=log_p,
                        held=[
                            held_tokens(cache.timeline, decoder.layout.tokens)
                            for cache in decoder.caches
                        ],
                        mass=seen.take() if seen else [],
                    )
                decoder.give(own, as_generated=not given)

    def _decoder(self, row: Row, chosen: Sequence[Case]) -> Decoder:
        return self.pipeline.run(
            [prompt(case.scene) for case in chosen],
            frames=self.plan.frames,
            policy=row.make(),
            **{**settings_of(row, chosen), "image": None},
        ).decoder

    # --- what was found -----------------------------------------------------------------------

    def values(self, label: str) -> dict[str, Values]:
        """By metric, `[clips, generated latent frames]` of clips with an image and without; NaN
        where a clip has no such frame, which is the first one of those that are given it."""
        latents = max(len(v["kl"]) for v in self._found(label).values())
        found = {name: np.full((self.plan.prompts, latents), np.nan) for name in METRICS}
        for number, own in self._found(label).items():
            for name in METRICS:
                found[name][number, latents - len(own[name]) :] = own[name]
        return found

    def knows(self, label: str) -> bool:
        """Was a row asked along any clip?"""
        return bool(self._found(label))

    def _found(self, label: str) -> dict[int, Mapping[str, Any]]:
        """By clip; what was told before a metric was there is asked again, and does not count."""
        keys = {number: (label, "replay", number) for number in range(self.plan.prompts)}
        asked = {n: key for n, key in keys.items() if self.known.has(key, set(METRICS))}
        return {n: self.known.found[key] for n, key in asked.items()}


# --- numbers from answers ------------------------------------------------------------------------


def _log_p(decoder: Decoder, known: Tensor) -> Tensor:
    log_p = decoder.predict(known).log_softmax(dim=-1)
    if bool(log_p.isnan().any()):
        raise GenerationError(
            f"NaN logits in latent frame {decoder.frame}: the weights or the dtype are broken; try "
            "float32"
        )
    return log_p


def _held_against(
    full: Sequence[Answer], answers: Iterator[Answer], shown: Shown
) -> dict[str, Values]:
    """KL, agreement and surprise of a row, mean over what was asked, and the attention that the
    full cache gives to what the row holds no more; `[B, frames]` each."""
    codes, told = shown
    first = codes.shape[1] - len(full)
    rows: dict[str, list[Tensor]] = {"kl": [], "agreement": [], "nll": [], "lost": []}
    for latent, (whole, own) in enumerate(zip(full, answers, strict=True), start=first):
        p, q = whole.log_p, own.log_p
        open_ = ~told[:, :, latent].to(p.device)
        lost = [mass[~held].sum() for mass, held in zip(whole.mass, own.held, strict=True)]
        rows["lost"].append(torch.tensor(lost))
        rows["kl"].append(_mean((p.exp() * (p - q)).sum(dim=-1), open_))
        rows["agreement"].append(_mean((p.argmax(-1) == q.argmax(-1)).float(), open_))
        rows["nll"].append(_mean(_own(q, codes[:, latent]), open_))
    return {name: torch.stack(own, dim=1).double().cpu().numpy() for name, own in rows.items()}


def _surprise(answers: Iterator[Answer] | Sequence[Answer], shown: Shown, first: int) -> Values:
    """Nats a code of the clip shown, `[B, frames]`."""
    codes, told = shown
    found = [
        _mean(_own(own.log_p, codes[:, latent]), ~told[:, :, latent].to(own.log_p.device))
        for latent, own in enumerate(answers, start=first)
    ]
    return torch.stack(found, dim=1).double().cpu().numpy()


def _own(log_p: Tensor, codes: Tensor) -> Tensor:
    """-log p `[B, shares, N]` of the codes `[B, rows, cols]` that came."""
    index = codes.flatten(1).to(log_p.device)[:, None, :, None].expand(-1, log_p.shape[1], -1, -1)
    return -log_p.gather(-1, index)[..., 0]


def _mean(values: Tensor, asked: Tensor) -> Tensor:
    """Mean of `[B, shares, N]` over what was asked, `[B]`."""
    return (values * asked).sum(dim=(1, 2)) / asked.sum(dim=(1, 2))
