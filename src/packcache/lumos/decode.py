"""The decoding loop: a generator that yields one result per latent frame (lumos1-spec 5).

    decoder = Decoder(model, [prefix], layout=layout, policy=PackCache(), latents=13, ...)
    for result in decoder.frames():
        result.codes, result.seconds, result.kept, result.kv_bytes

Per latent frame: S drafts (both branches at once), the decided tokens, one commit. The rows of a
forward are branches: prompt 0 conditional, prompt 0 unconditional, prompt 1 conditional, ...
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from packcache.cache import FrameCache
from packcache.errors import GenerationError, InputError, InvalidSetting, is_out_of_memory
from packcache.lumos import schedule
from packcache.lumos.attend import CachedAttention, ReusedAttention, causal_attention
from packcache.lumos.model import Lumos
from packcache.lumos.schedule import Draws, Sampling
from packcache.lumos.tables import FrameTables
from packcache.lumos.vocab import Prefix, Vocab
from packcache.policies import FullCache, Policy
from packcache.positions import PositionMode, RebaseRule, Rotation, text_positions
from packcache.reuse import EXACT, StepReuse
from packcache.timeline import FrameLayout, Role, Span

#: Logits are made for so many rows at a time that one float32 copy of them is at most this large:
#: all rows of a 672x384 frame over 64,000 codes would be 1 GB a copy, and sampling makes several.
HEAD_BYTES = 128 << 20

__all__ = ["HEAD_BYTES", "Decoder", "FrameResult", "Step"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameResult:
    """One finished latent frame and what it cost.

    `ids [B, P]` are its clean tokens, `codes [B, rows, cols]` the codec's view of them. `seconds`
    covers all steps, the commit and packing. `kept` maps history frames to the tokens they hold
    after the commit; `kv_bytes` and `capacity_bytes` sum over the prompts.
    """

    frame: int
    ids: Tensor
    codes: Tensor
    given: bool
    seconds: float
    kept: dict[int, int]
    kv_bytes: int
    capacity_bytes: int
    logical_length: int
    physical_length: int
    rebase_frames: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What one denoising step saw and chose, `[B, rows]` at content `positions`.

    `tokens` entered the step, `known` were decided before, `sampled` are the draws (also where
    known), `selected` their probabilities, `logits [B, rows, codes]` are guided.
    """

    frame: int
    step: int
    positions: Tensor
    tokens: Tensor
    known: Tensor
    sampled: Tensor
    selected: Tensor
    num_mask: Tensor
    temperature: float
    logits: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class StepRows:
    """The tokens of one denoising step, int64 `[B, n]` each, as many for every prompt.

    `chosen` are the content positions whose codes are drawn and `place` their rows in the forward;
    `rows` are the offsets of the tokens forwarded, None for all of the frame.
    """

    chosen: Tensor
    place: Tensor
    rows: Tensor | None = None


class Decoder:
    """The state of one call: caches of B prompts, the frames made so far, the sampler.

    Args:
        prefixes: one per prompt.
        draws: `draws(prompt, frame)` gives that frame's randomness.
        on_step: called with every `Step`; for tests and inspection.
        reuse: what a step may take from earlier steps of its frame; default nothing, exact.
        all_rows: run the head on decided positions as well (slower, same tokens; exact only).
        latents: latent frames of the whole clip, if known; memory is then reserved at once.
    """

    def __init__(
        self,
        model: Lumos,
        prefixes: Sequence[Prefix],
        *,
        layout: FrameLayout,
        sampling: Sampling,
        policy: Policy | None = None,
        draws: Draws,
        positions: PositionMode = "rebase",
        rebase: RebaseRule = "trained",
        reuse: StepReuse | None = None,
        on_step: Callable[[Step], None] | None = None,
        all_rows: bool = False,
        latents: int | None = None,
    ) -> None:
        if not prefixes:
            raise InvalidSetting("no prompt: expected at least one")
        self.reuse = reuse or EXACT
        if all_rows and not self.reuse.is_exact:
            raise InvalidSetting(f"all_rows with {self.reuse}: expected exact steps")
        self.model, self.prefixes, self.layout, self.sampling = model, prefixes, layout, sampling
        self.draws, self.on_step, self.all_rows = draws, on_step, all_rows
        self.vocab = Vocab(model.config)
        self.branches = sampling.branches
        self.history = schedule.history_mask(
            layout.rows, layout.row_length, sampling.history_mask_ratio
        )
        self.visible = np.ones(layout.tokens, dtype=bool)
        self.visible[layout.header + self.history] = False
        self.counts = schedule.cosine_counts(layout.content, sampling.steps)
        self.undecided = schedule.undecided(layout.content, sampling.steps)
        self.works = self.reuse.works(self.undecided, layout.tokens)
        self.temperatures = schedule.temperatures(sampling.steps, sampling.temperature)
        self.device = model.lm_head.weight.device
        self.content = self.vocab.content(layout).to(self.device)
        self.head_rows = max(1, HEAD_BYTES // (4 * self.vocab.ids.num_codes * len(prefixes)))
        self.latents = latents
        self.caches = [
            self._cache(prefix, policy or FullCache(), positions, rebase) for prefix in prefixes
        ]
        self.attend = CachedAttention(self.caches, self.branches)
        self.attend_step = self._step_attention()
        lengths = [n for prefix in prefixes for n in prefix.lengths[: self.branches]]
        self.tables = FrameTables(model, self.vocab, layout, lengths)
        self.blank = self.vocab.frame(layout).to(self.device)
        self.frame = 0
        self.generated = 0
        self.prefill_s = 0.0

    def _cache(
        self, prefix: Prefix, policy: Policy, positions: PositionMode, rebase: RebaseRule
    ) -> FrameCache:
        config = self.model.config
        return FrameCache(
            policy,
            layers=config.num_hidden_layers,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            layout=self.layout,
            text=prefix.lengths[: self.branches],
            visible_tokens=int(self.visible.sum()),
            rotation=Rotation.mm_rope(self.model.inv_freq, config.compression[0]),
            positions=positions,
            rebase=rebase,
            trained_latent_frames=config.trained_latent_frames,
            latent_frames=self.latents,
            dtype=self.model.lm_head.weight.dtype,
            device=self.device,
        )

    def _step_attention(self) -> CachedAttention:
        """The attention of denoising steps; commits and given frames are always exact."""
        if self.reuse.keeps_history:
            return ReusedAttention(self.caches, self.branches, self.layout.tokens)
        return CachedAttention(self.caches, self.branches)

    def frames(
        self, given: Tensor | None = None, made: Tensor | None = None
    ) -> Iterator[FrameResult]:
        """Latent frames one by one: the given ones first, then generated ones, `latents` in all.

        `given [B, t, rows, cols]` are codes of given latent frames (image-to-video: t = 1), `made`
        those that this decoder is known to decide next: they are committed as if it had. What was
        done before a `resume` is not done again.
        """
        if not self.caches[0].logical_length:
            self.prefill()
        for codes in () if given is None else given.unbind(1)[self.frame :]:
            yield self.give(codes)
        start = 0 if given is None else given.shape[1]
        for codes in () if made is None else made.unbind(1)[self.frame - start :]:
            self.generated += 1
            yield self.give(codes, as_generated=True)
        while self.latents is None or self.frame < self.latents:
            yield self.generate()

    def resume(self, *, frame: int, generated: int, prefill_s: float) -> None:
        """Go on after `frame` latent frames, `generated` of them made; the caches hold them."""
        self.frame, self.generated, self.prefill_s = frame, generated, prefill_s

    # --- the three kinds of forward ---------------------------------------------------------

    @torch.inference_mode()
    def prefill(self) -> None:
        """Commit the text prefix of every branch; the only causal attention there is."""
        start = self._now()
        with self._memory("the prompt"):
            for cache, prefix in zip(self.caches, self.prefixes, strict=True):
                cache.open(Span.text(len(prefix.ids)))
                for branch in range(self.branches):
                    ids = torch.tensor([prefix.branch(branch)], device=self.device)
                    rotary = self.model.rotary(text_positions(0, ids.shape[1]))
                    self.model(ids, rotary, causal_attention(cache, branch))
                cache.commit()
        self.prefill_s = self._now() - start

    @torch.inference_mode()
    def give(self, codes: Tensor, *, as_generated: bool = False) -> FrameResult:
        """Commit a given latent frame, codes `[B, rows, cols]`, clean; the first is the anchor.

        With `as_generated` it is committed as if it had just been decided: history, re-masked.
        """
        start = self._now()
        self._check_given(codes)
        ids = torch.stack([self.vocab.frame(self.layout, c) for c in codes])
        with self._memory(f"latent frame {self.frame}"):
            if as_generated:
                self._open(Role.HISTORY)
                self._commit_generated(ids, self.tables.at(self.frame))
            else:
                self._open(Role.IMAGE if self.frame == 0 else Role.HISTORY)
                self._forward(ids.to(self.device), self.tables.at(self.frame))
                self._commit(ids, visible=None)
        return self._result(ids, start, given=True)

    @torch.inference_mode()
    def predict(self, known: Tensor | None = None) -> Tensor:
        """Guided float32 logits `[B, N, codes]` of the next latent frame; leaves no trace.

        What the model says before it decides anything, or when it is told a part: `known [B, N]`
        are codes of content tokens, negative where the token is masked.
        """
        ids = self._blank()
        if known is not None:
            self._tell(ids, known)
        self._open(Role.HISTORY)
        hidden = self._forward(ids, self.tables.at(self.frame))
        logits = self._guided(hidden, self.content.expand(len(ids), -1)).float()
        for cache in self.caches:
            cache.close()
        return logits

    @torch.inference_mode()
    def generate(self) -> FrameResult:
        """Decide the next latent frame step by step, then commit it re-masked."""
        start = self._now()
        with self._memory(f"latent frame {self.frame}"):
            self._open(Role.HISTORY)
            rotary = self.tables.at(self.frame)
            ids = self._blank()
            finished = self._read_back(ids, self._denoise(ids, rotary))
            self._commit_generated(finished, rotary)
        self.generated += 1
        return self._result(finished, start, given=False)

    @torch.inference_mode()
    def rehearse(self, steps: Sequence[int] | None = None) -> tuple[float, float]:
        """Make the next latent frame and forget it: seconds of its steps, and of its last forward.

        For timing. Steps may be named, in order: those alone are made.
        """
        self._open(Role.HISTORY)
        start = self._now()
        rotary, ids = self.tables.at(self.frame), self._blank()
        self._denoise(ids, rotary, steps)
        between = self._now()
        self._forward(ids, rotary)
        end = self._now()
        for cache in self.caches:
            cache.close()
        return between - start, end - between

    def _check_given(self, codes: Tensor) -> None:
        expected = (len(self.caches), self.layout.rows, self.layout.cols)
        if tuple(codes.shape) != expected:
            raise InvalidSetting(
                f"given codes have shape {tuple(codes.shape)}, expected {expected} "
                "(prompts, rows, columns of the token grid)"
            )
        most = self.vocab.ids.num_codes - 1
        if int(codes.min()) < 0 or int(codes.max()) > most:
            raise InputError(
                f"given codes lie in {int(codes.min())}..{int(codes.max())}, expected 0..{most}: "
                "they come from another codec"
            )

    # --- one frame --------------------------------------------------------------------------

    def _now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def _memory(self, what: str) -> Iterator[None]:
        """One clear line instead of a traceback when memory runs out."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(str(error)):
                raise
            raise GenerationError(
                f"out of memory in {what}: see packcache plan; choose a bounded policy, a smaller "
                "size or fewer prompts; a checkpoint keeps what is finished"
            ) from error

    def _open(self, role: Role) -> None:
        for cache in self.caches:
            cache.open(Span.of_frame(role, self.frame, self.layout))

    def _blank(self) -> Tensor:
        """Token ids `[B, P]` of frames of which nothing is decided."""
        return self.blank.expand(len(self.caches), -1).clone()

    def _tell(self, ids: Tensor, known: Tensor) -> None:
        """Write the codes `known [B, N]` into frames `[B, P]`, but for negative ones."""
        expected, most = (len(ids), self.layout.content), self.vocab.ids.num_codes - 1
        if tuple(known.shape) != expected or int(known.max()) > most:
            raise InvalidSetting(
                f"known codes have shape {tuple(known.shape)} and reach {int(known.max())}, "
                f"expected {expected} (prompts, content tokens) and at most {most}"
            )
        known = known.to(self.device)
        told = (known + self.vocab.ids.video_lo).to(ids.dtype)
        ids[:, self.content] = torch.where(known < 0, ids[:, self.content], told)

    def _forward(
        self,
        ids: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: CachedAttention | None = None,
    ) -> Tensor:
        """Hidden states `[B, branches, L, hidden]` of frames `[B, P]`, or of the rows attended."""
        attend = attend or self.attend
        if attend.rows is not None:
            ids = ids.gather(1, attend.rows)
            index = attend.rows.repeat_interleave(self.branches, dim=0)[:, None, :, None]
            cos, sin = (t.gather(2, index.expand(-1, -1, -1, t.shape[-1])) for t in rotary)
            rotary = cos, sin
        rows = ids.repeat_interleave(self.branches, dim=0)
        return self.model(rows, rotary, attend).unflatten(0, (-1, self.branches))

    def _denoise(
        self, ids: Tensor, rotary: tuple[Tensor, Tensor], steps: Sequence[int] | None = None
    ) -> Tensor:
        """Fill the content of `ids [B, P]` in place; returns whether all logits were finite.

        Only some of the steps, if named, leave tokens masked: to be timed, not to be kept.
        """
        draws = schedule.stack_draws(
            [self.draws(prompt, self.frame) for prompt in range(len(self.caches))], self.device
        )
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        before = torch.zeros(len(ids), self.layout.content, dtype=torch.bool, device=self.device)
        for step in range(self.sampling.steps) if steps is None else steps:
            tokens = ids[:, self.content]
            known = tokens != self.vocab.ids.mask
            which = self._step_rows(step, known, before)
            self.attend_step.begin(self.works[step], which.rows)
            hidden = self._forward(ids, rotary, self.attend_step)
            for cache in self.caches:
                cache.rollback()
            new, selected = self._choose(hidden, tokens, known, which, draws, step)
            del hidden  # or the next forward would run beside it
            finite &= selected.isfinite().all()
            if step < self.sampling.steps - 1:
                new = self._remask(new, selected, known, draws, step)
            ids[:, self.content] = new
            before = known
        return finite

    def _step_rows(self, step: int, known: Tensor, before: Tensor) -> StepRows:
        """Who is computed and decided in a step, from what is decided `[B, N]`, and was a step ago.

        As many for every prompt as the schedule says, so that no device is asked. Equal confidences
        are decided together, so fewer may be undecided; decided ones then fill up and stay so.
        """
        old = known if self.reuse.is_exact else known.long() + (known & before)
        order = old.long().argsort(dim=1, stable=True)  # undecided, just decided, all others
        count = self.layout.content if self.all_rows else self.undecided[step]
        chosen, work = order[:, :count], self.works[step]
        if work.rows is None:
            return StepRows(chosen=chosen, place=self.content[chosen])
        place = torch.arange(count, device=self.device).expand(len(known), -1)
        return StepRows(chosen=chosen, place=place, rows=self.content[order[:, : work.rows]])

    def _read_back(self, ids: Tensor, finite: Tensor) -> Tensor:
        """A finished frame's ids on the host: the one place where a frame waits for its device."""
        if not finite:
            raise GenerationError(
                f"NaN or infinite logits in latent frame {self.frame}: the weights or the dtype "
                "are broken; try float32, or check the weights with their source"
            )
        return ids.cpu()

    def _guided(self, hidden: Tensor, place: Tensor) -> Tensor:
        """Guided logits `[B, rows, codes]` of rows `place` of hidden states, in their dtype.

        The head is linear, so the branches are guided before it, in float32: half the work of two
        heads, and what bf16 rounds in a logit is not multiplied by the guidance.
        """
        index = place[:, None, :, None].expand(-1, self.branches, -1, hidden.shape[-1])
        rows = hidden.gather(2, index)
        guided = rows[:, 0]
        if self.branches == 2:
            wide = torch.promote_types(rows.dtype, torch.float32)
            told, untold = rows.to(wide).unbind(1)
            guided = torch.lerp(untold, told, self.sampling.guidance).to(rows.dtype)
        return self.model.head(guided, self.vocab.ids.video_lo, self.vocab.ids.video_hi)

    def _choose(
        self,
        hidden: Tensor,
        tokens: Tensor,
        known: Tensor,
        which: StepRows,
        draws: schedule.FrameDraws,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """New tokens `[B, N]` and the probability of each (`KNOWN` where decided before)."""
        chosen = which.chosen
        parts = [
            self._draw(hidden, place, part, draws, step)
            for place, part in zip(
                which.place.split(self.head_rows, dim=1),
                chosen.split(self.head_rows, dim=1),
                strict=True,
            )
        ]
        codes, picked, logits = (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
        was_known = known.gather(1, chosen)
        sampled = codes + self.vocab.ids.video_lo
        drawn = torch.where(was_known, tokens.gather(1, chosen), sampled)
        picked = torch.where(was_known, schedule.KNOWN, picked)
        new = tokens.scatter(1, chosen, drawn)
        selected = torch.full(tokens.shape, schedule.KNOWN, device=self.device)
        selected.scatter_(1, chosen, picked)
        if self.on_step:
            self.on_step(
                Step(
                    frame=self.frame,
                    step=step,
                    positions=chosen,
                    tokens=tokens.gather(1, chosen),
                    known=was_known,
                    sampled=sampled,
                    selected=picked,
                    num_mask=self._num_mask(known, step),
                    temperature=self._temperature(step),
                    logits=logits,
                )
            )
        return new, selected

    def _draw(
        self,
        hidden: Tensor,
        place: Tensor,
        chosen: Tensor,
        draws: schedule.FrameDraws,
        step: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[B, rows]`, their probabilities, and the logits (none kept unless asked for)."""
        logits = self._guided(hidden, place)
        probs = logits.softmax(dim=-1, dtype=torch.float32)  # and their running sums: no more
        codes = schedule.pick(probs, draws, step, chosen, greedy=self.sampling.greedy)
        picked = probs.gather(-1, codes[..., None])[..., 0]
        return codes, picked, logits.float() if self.on_step else picked[..., :0, None]

    def _remask(
        self,
        new: Tensor,
        selected: Tensor,
        known: Tensor,
        draws: schedule.FrameDraws,
        step: int,
    ) -> Tensor:
        back = schedule.remask(
            selected, draws.noise[:, step], self._num_mask(known, step), self._temperature(step)
        )
        return torch.where(back, self.vocab.ids.mask, new)

    def _num_mask(self, known: Tensor, step: int) -> Tensor:
        """Rank of the cut `[B, 1]`: the schedule, at least 1, and at least one token decided."""
        unknown = (~known).sum(dim=1, keepdim=True)
        return (unknown - 1).clamp_max(self.counts[step]).clamp_min(1)

    def _temperature(self, step: int) -> float:
        """Upstream never resets it: 0 from the second generated frame on (lumos1-spec 5.5.1)."""
        fresh = self.generated == 0 or self.sampling.reset_temperature
        return self.temperatures[step] if fresh else 0.0

    def _commit_generated(self, ids: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        masked = self.vocab.remask(self.layout, ids, self.history)
        self._forward(masked.to(self.device), rotary)
        self._commit(ids, visible=self.visible)

    def _commit(self, ids: Tensor, visible: np.ndarray | None) -> None:
        for cache, frame in zip(self.caches, ids, strict=True):
            cache.commit(visible=visible, ids=frame.numpy().astype(np.int32))

    def _result(self, ids: Tensor, start: float, *, given: bool) -> FrameResult:
        first = self.caches[0]
        result = FrameResult(
            frame=self.frame,
            ids=ids,
            codes=self.vocab.codes(self.layout, ids),
            given=given,
            seconds=self._now() - start,
            kept=first.timeline.counts(),
            kv_bytes=sum(cache.kv_bytes for cache in self.caches),
            capacity_bytes=sum(cache.capacity_bytes for cache in self.caches),
            logical_length=first.logical_length,
            physical_length=first.physical_length,
            rebase_frames=first.delta,
        )
        self.frame += 1
        return result
