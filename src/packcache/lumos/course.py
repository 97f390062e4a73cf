"""The course of a clip without memory: what the cache allocates and holds, phase by phase.

A real `FrameCache` on the device "meta" is opened, filled and packed as `Decoder` does it, so the
bytes predicted and the bytes measured are the same code's. What the forwards take beside the cache
are sums with named terms (`memory`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from packcache import positions as rotary
from packcache.cache import FrameCache, TrainedRangeWarning
from packcache.lumos.config import LumosConfig
from packcache.lumos.memory import (
    ALLOWANCE,
    Moment,
    Phase,
    Term,
    forward_moments,
    head_moment,
    keep_moment,
    kept_terms,
    parts_moment,
    reserve_moment,
    scoring_moment,
    state_terms,
    watched_terms,
)
from packcache.lumos.schedule import Sampling, history_mask
from packcache.lumos.vocab import HEADER
from packcache.lumos.weights import parameter_count
from packcache.policies import Policy
from packcache.positions import PositionMode, RebaseRule, Rotation
from packcache.reuse import EXACT, StepReuse
from packcache.selectors import Score
from packcache.timeline import FrameLayout, Role, Span

__all__ = ["TEXT_TOKENS", "Course", "Workload"]

#: Tokens of a prompt, header included, where nobody says how long it is: a long paragraph.
TEXT_TOKENS = 200


@dataclass(frozen=True, kw_only=True)
class Course:
    """What the cache does over a clip, one prompt: bytes allocated by phase, tokens held.

    `kv_bytes`, `metadata_bytes` and `end_bytes` (allocated) are those after the last commit;
    `held` the tokens before each latent frame, up to where nothing changes any more; `newest` what
    the last history frame holds after its commit; `slots` those allocated in a branch at the end,
    `old_slots` before it last grew; `score` what the policy asks for.
    """

    prefill_bytes: int
    given_bytes: int
    step_bytes: int
    end_bytes: int
    kv_bytes: int
    metadata_bytes: int
    held: tuple[int, ...]
    newest: int
    slots: int
    old_slots: int
    score: Score | None

    def extended(self, before: Course, more: int) -> Course:
        """This course after `more` latent frames, each as the last one; `before` is without it."""
        step = self.held[-1] - before.held[-1]
        coming = range(self.held[-1] + step, self.held[-1] + step * more + 1, step)
        return replace(
            self,
            kv_bytes=self.kv_bytes + more * (self.kv_bytes - before.kv_bytes),
            metadata_bytes=self.metadata_bytes
            + more * (self.metadata_bytes - before.metadata_bytes),
            held=(*self.held, *coming),
        )

    def held_before(self, latents: int) -> list[int]:
        """Tokens held before each of that many latent frames."""
        return [self.held[min(frame, len(self.held) - 1)] for frame in range(latents)]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """All of a workload but its length and its policy."""

    config: LumosConfig
    layout: FrameLayout
    sampling: Sampling
    dtype: torch.dtype
    text_tokens: int
    image: bool
    prompts: int
    positions: PositionMode
    rebase: RebaseRule
    reuse: StepReuse = EXACT

    @property
    def weights_bytes(self) -> int:
        return parameter_count(self.config) * self.dtype.itemsize

    @property
    def layer_slot_bytes(self) -> int:
        """One token's keys, or values, of one layer and branch."""
        return self.config.num_key_value_heads * self.config.head_dim * self.dtype.itemsize

    @property
    def frame_bytes(self) -> int:
        layers, rows = self.config.num_hidden_layers, self.prompts * self.sampling.branches
        return 2 * layers * self.layer_slot_bytes * self.layout.tokens * rows

    def cache(self, policy: Policy, latents: int) -> FrameCache:
        """The cache that `Decoder` would make, without memory."""
        config = self.config
        frequencies = rotary.inverse_frequencies(config.head_dim, config.rope_theta)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrainedRangeWarning)  # the run itself will warn
            return FrameCache(
                policy,
                layers=config.num_hidden_layers,
                kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                layout=self.layout,
                text=(self.text_tokens, HEADER)[: self.sampling.branches],
                visible_tokens=int(self.visible().sum()),
                rotation=Rotation.mm_rope(frequencies, config.compression[0]),
                positions=self.positions,
                rebase=self.rebase,
                trained_latent_frames=config.trained_latent_frames,
                latent_frames=latents,
                dtype=self.dtype,
                device="meta",
            )

    def visible(self) -> NDArray[np.bool_]:
        """Which tokens of a committed frame are not re-masked, as `Decoder` has them."""
        history = history_mask(
            self.layout.rows, self.layout.row_length, self.sampling.history_mask_ratio
        )
        visible = np.ones(self.layout.tokens, dtype=bool)
        visible[self.layout.header + history] = False
        return visible

    def course(self, policy: Policy, latents: int) -> Course:
        """The whole clip. Without a bound every frame adds the same, so a few tell the rest."""
        few = 4 + policy.num_sinks
        if latents <= few or self.is_bounded(policy):
            return self.walk(policy, latents)
        before, now = (self.walk(policy, latents, most=count) for count in (few - 1, few))
        return now.extended(before, latents - few)

    def walk(self, policy: Policy, latents: int, *, most: int | None = None) -> Course:
        """Drive the cache through a clip, until it ends, nothing changes, or `most` frames."""
        cache = self.cache(policy, latents)
        self._commit(cache, Span.text(self.text_tokens))
        prefill = given = cache.capacity_bytes
        step = old = 0
        held: list[int] = []
        for frame in range(latents if most is None else min(latents, most)):
            before, slots = _state(cache), cache.stores[0].capacity
            held.append(cache.physical_length)
            self._commit_frame(cache, frame)
            if self.image and frame == 0:
                given = cache.capacity_bytes
            else:
                step = max(step, cache.capacity_bytes)
            old = slots if cache.stores[0].capacity > slots else old
            if _state(cache) == before:
                break
        return Course(
            prefill_bytes=prefill,
            given_bytes=given,
            step_bytes=step,
            end_bytes=cache.capacity_bytes,
            kv_bytes=cache.kv_bytes,
            metadata_bytes=cache.timeline.metadata_bytes,
            held=tuple(held),
            newest=next((entry.count for entry in cache.timeline.history), 0),
            slots=cache.stores[0].capacity,
            old_slots=old,
            score=policy.asks,
        )

    def _commit_frame(self, cache: FrameCache, frame: int) -> None:
        clean = self.image and frame == 0
        span = Span.of_frame(Role.IMAGE if clean else Role.HISTORY, frame, self.layout)
        ids = np.zeros(self.layout.tokens, dtype=np.int32)
        self._commit(cache, span, visible=None if clean else self.visible(), ids=ids)

    def _commit(self, cache: FrameCache, span: Span, **known: Any) -> None:
        """What a forward of all layers and branches leaves behind."""
        cache.open(span)
        heads, head_dim = self.config.num_key_value_heads, self.config.head_dim
        for branch, text in enumerate(cache.text):
            tokens = text if span.role is Role.TEXT else span.tokens
            draft = torch.empty(heads, tokens, head_dim, dtype=self.dtype, device="meta")
            for layer in range(self.config.num_hidden_layers):
                cache.update(layer, draft, draft, branch)
        cache.commit(**known)

    # --- the moments of a run -------------------------------------------------------------------

    def watched(self, score: Score | None, prompts: int | None = None) -> list[Term]:
        """What prompts [all] hold of an open frame's queries for a policy that asks."""
        prompts = self.prompts if prompts is None else prompts
        return watched_terms(self.config, self.layout, score, self.dtype, prompts=prompts)

    def phases(self, course: Course, latents: int) -> tuple[Phase, ...]:
        """Each phase of a run of several prompts, at its largest moment."""
        rows = self.prompts * self.sampling.branches * self.layout.tokens
        state = state_terms(
            self.config, self.layout, self.sampling, self.dtype, prompts=self.prompts
        )
        kept = kept_terms(
            self.config, self.layout, self.sampling, self.dtype,
            prompts=self.prompts, reuse=self.reuse,
        )  # fmt: skip
        watched = self.watched(course.score)
        quiet = [*watched, *(term for term in state if term.name != "draws")]
        text = forward_moments(self.config, self.text_tokens, self.dtype)
        given = forward_moments(self.config, rows, self.dtype, quiet)
        commit = forward_moments(self.config, rows, self.dtype, [*kept, *quiet])
        state = [*kept, *watched, *state]
        step = forward_moments(self.config, rows, self.dtype, state)
        if kept:
            step.append(parts_moment(self.config, self.layout, rows, self.dtype, state))
        head = head_moment(
            self.config, self.layout, self.sampling, self.dtype, prompts=self.prompts, held=state
        )
        phases = [self._phase("prefill", course.prefill_bytes, text)]
        if self.image:
            phases.append(self._phase("given frame", course.given_bytes, given))
        scoring = self._scoring(course, [*kept, *quiet])
        if latents == self.image:
            phases += scoring
        else:
            grow = reserve_moment(self.layer_slot_bytes * course.old_slots, kept)
            moved = max(course.held) - self.text_tokens
            others = self.watched(course.score, self.prompts - 1)
            pack = keep_moment(self.layer_slot_bytes * moved, moved, [*kept, *others])
            phases += [
                self._phase("growth", course.step_bytes, [grow]),
                self._phase("step", course.step_bytes, step),
                self._phase("head", course.step_bytes, [head]),
                self._phase("commit", course.step_bytes, commit),
                *scoring,
                self._phase("packing", course.step_bytes, [pack]),
            ]
        return tuple(phases)

    def _scoring(self, course: Course, held: list[Term]) -> list[Phase]:
        """The scores of a commit, beside `held`, if the policy asks."""
        if course.score is None:
            return []
        moment = scoring_moment(
            self.config, self.layout, course.score, self.dtype, course.slots, held
        )
        return [self._phase("scoring", max(course.given_bytes, course.step_bytes), [moment])]

    def _phase(self, name: str, cache_bytes: int, moments: Iterable[Moment]) -> Phase:
        top = max(moments, key=lambda moment: moment.bytes)
        label = name if top.name == name else f"{name}, {top.name}"
        return Phase(
            cache_bytes=cache_bytes * self.prompts, moment=Moment(name=label, terms=top.terms)
        )

    def needed(self, policy: Policy, latents: int) -> int:
        """Bytes that should be free; a known clip reserves at once, so few frames tell them."""
        course = self.walk(policy, latents, most=2 + self.image + policy.num_sinks)
        peak = max(phase.bytes for phase in self.phases(course, latents))
        return self.weights_bytes + peak + ALLOWANCE

    def is_bounded(self, policy: Policy) -> bool:
        """Does the history this policy holds have a limit?"""
        visible = int(self.visible().sum())
        token_bytes = self.frame_bytes // self.prompts // self.layout.tokens
        budget = policy.budget_for(self.layout.tokens, visible, token_bytes)
        return policy.max_history(self.layout.tokens, budget) is not None


def _state(cache: FrameCache) -> list[tuple[Role, int, int]]:
    """All that decides how a policy goes on, as seen from the newest frame; sinks do not age."""
    timeline = cache.timeline
    return [
        (
            e.span.role,
            0
            if e.span.role.is_anchor or cache.policy.is_sink(timeline, e)
            else timeline.distance(e),
            e.count,
        )
        for e in timeline.entries
    ]
