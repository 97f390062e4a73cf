"""`torch-full`: what the library's engine must not be slower than, with the full cache.

A plain loop over one contiguous cache, written for the benchmark: no FrameCache, no policy, no
batch of prompts. The work of a step is the engine's (lumos1-spec 5.3): linear layers over both
branches at once, one unmasked attention call a branch and layer, guided logits of the undecided
positions and the visual ids only. The network, the schedule and the ids are the library's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packcache.bench.candidates import make_prefix, now, random_codes
from packcache.bench.parts import Workload
from packcache.errors import InvalidSetting
from packcache.lumos import schedule
from packcache.lumos.decode import HEAD_BYTES
from packcache.lumos.model import Lumos, Rotary
from packcache.lumos.schedule import FrameDraws, philox_draws
from packcache.lumos.vocab import Vocab
from packcache.positions import text_positions

__all__ = ["TorchFull"]


class TorchFull:
    """One clip with a cache that is allocated once, `[layers, KV, S, D]` a branch.

    Axes: G branches, P tokens of a latent frame, N content tokens, R rows that the head sees.
    """

    def __init__(self, model: Lumos, workload: Workload) -> None:
        layout, sampling, config = workload.layout, workload.sampling, model.config
        self.model, self.workload, self.layout, self.sampling = model, workload, layout, sampling
        self.vocab = Vocab(config)
        self.prefix = make_prefix(workload)
        self.device = model.lm_head.weight.device
        self.content = self.vocab.content(layout).to(self.device)
        self.history = schedule.history_mask(
            layout.rows, layout.row_length, sampling.history_mask_ratio
        )
        self.draws = philox_draws([workload.seed], sampling.steps, layout.content)
        self.counts = schedule.cosine_counts(layout.content, sampling.steps)
        self.rows = schedule.undecided(layout.content, sampling.steps)
        self.temperatures = schedule.temperatures(sampling.steps, sampling.temperature)
        self.head_rows = max(1, HEAD_BYTES // (4 * self.vocab.ids.num_codes))
        self.frame = self.generated = 0
        self.held = [0] * sampling.branches
        self.cache = [
            torch.empty(
                (2, config.num_hidden_layers, config.num_key_value_heads, slots, config.head_dim),
                dtype=model.lm_head.weight.dtype,
                device=self.device,
            )
            for slots in self._slots()
        ]

    # --- what a benchmark calls -------------------------------------------------------------

    @torch.inference_mode()
    def prefill(self) -> float:
        """Commit the text; seconds."""
        start = now(self.device)
        for branch in range(self.sampling.branches):
            ids = torch.tensor([self.prefix.branch(branch)], device=self.device)
            rotary = self.model.rotary(text_positions(0, ids.shape[1]))

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, branch: int = branch) -> Tensor:
                keys, values = self._write(branch, layer, k[0], v[0])
                return F.scaled_dot_product_attention(
                    q, keys[None], values[None], is_causal=True, enable_gqa=True
                )

            self.model(ids, rotary, attend)
            self.held[branch] = ids.shape[1]
        return now(self.device) - start

    @torch.inference_mode()
    def advance(self) -> float:
        """Commit the next latent frame, of random codes: given first, then as if generated.

        Nothing is packed, so its seconds are 0.
        """
        ids = self.vocab.frame(self.layout, random_codes(self.workload, self.frame)[0])
        if self.frame >= self.workload.given:
            ids = self.vocab.remask(self.layout, ids, self.history)
        self._forward(ids.to(self.device), self._rotary())
        self._keep()
        return 0.0

    @torch.inference_mode()
    def rehearse(self, steps: Sequence[int] | None = None) -> tuple[float, float]:
        """Seconds of the steps of the next latent frame (all, or those numbers), and of the forward
        of its commit; it is forgotten again."""
        start = now(self.device)
        rotary, ids = self._rotary(), self._blank()
        self._denoise(ids, rotary, range(self.sampling.steps) if steps is None else steps)
        between = now(self.device)
        self._forward(ids, rotary)
        return between - start, now(self.device) - between

    @torch.inference_mode()
    def generate(self) -> Tensor:
        """Make the next latent frame and commit it, re-masked; its clean ids `[P]`."""
        rotary, ids = self._rotary(), self._blank()
        self._denoise(ids, rotary, range(self.sampling.steps))
        ids = ids.cpu()
        masked = self.vocab.remask(self.layout, ids, self.history)
        self._forward(masked.to(self.device), rotary)
        self._keep()
        self.generated += 1
        return ids

    def statistics(self) -> dict[str, Any]:
        """Bytes and tokens held now."""
        slot = sum(cache.nbytes // cache.shape[3] for cache in self.cache) // len(self.cache)
        return {
            "kv_bytes": sum(self.held) * slot,
            "capacity_bytes": sum(cache.nbytes for cache in self.cache),
            "held": self.held[0],
        }

    # --- the cache --------------------------------------------------------------------------

    def _slots(self) -> list[int]:
        """What each branch holds at the end of the clip."""
        frames = self.workload.latents * self.layout.tokens
        return [n + frames for n in self.prefix.lengths[: self.sampling.branches]]

    def _write(self, branch: int, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put K and V `[KV, L, D]` behind what is held; all of both, `[KV, S, D]`."""
        end = self.held[branch] + k.shape[1]
        keys, values = self.cache[branch][:, layer, :, :end]
        keys[:, self.held[branch] :] = k
        values[:, self.held[branch] :] = v
        return keys, values

    def _keep(self) -> None:
        """What was written last stays."""
        self.held = [n + self.layout.tokens for n in self.held]
        self.frame += 1

    # --- a forward --------------------------------------------------------------------------

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `[G, H, P, D]`; heads that share keys lie behind one another, so none is repeated."""
        out = torch.empty_like(q)
        for branch in range(len(q)):
            keys, values = self._write(branch, layer, k[branch], v[branch])
            grouped = q[branch].reshape(1, len(keys), -1, q.shape[-1])
            mixed = F.scaled_dot_product_attention(grouped, keys[None], values[None])
            out[branch] = mixed.reshape(q.shape[1:])
        return out

    def _forward(self, ids: Tensor, rotary: Rotary) -> Tensor:
        """Hidden states `[G, P, hidden]` of a frame `[P]` in all branches."""
        return self.model(ids.expand(self.sampling.branches, -1), rotary, self._attend)

    def _rotary(self) -> Rotary:
        """cos and sin `[G, 1, P, D/2]` of the next frame, for which there must be room."""
        if self.frame >= self.workload.latents:
            raise InvalidSetting(
                f"latent frame {self.frame} of a clip of {self.workload.latents}: expected no more"
            )
        tables = [
            self.model.rotary(self.vocab.frame_positions(n, self.frame, self.layout))
            for n in self.prefix.lengths[: self.sampling.branches]
        ]
        cos, sin = (torch.stack(part)[:, None] for part in zip(*tables, strict=True))
        return cos, sin

    def _blank(self) -> Tensor:
        return self.vocab.frame(self.layout).to(self.device)

    # --- a step -----------------------------------------------------------------------------

    def _denoise(self, ids: Tensor, rotary: Rotary, steps: Sequence[int]) -> None:
        """Decide the content of `ids [P]` in place."""
        draws = schedule.stack_draws([self.draws(0, self.frame)], self.device)
        mask, low = self.vocab.ids.mask, self.vocab.ids.video_lo
        for step in steps:
            tokens = ids[self.content]
            known = tokens != mask
            chosen = known.long().argsort(stable=True)[: self.rows[step]]  # undecided ones first
            hidden = self._forward(ids, rotary)[:, self.content[chosen]]
            codes, picked = self._draw(hidden, chosen, draws, step)
            was_known = known[chosen]
            new = tokens.clone()
            new[chosen] = torch.where(was_known, tokens[chosen], codes + low)
            if step < self.sampling.steps - 1:
                selected = torch.full(tokens.shape, schedule.KNOWN, device=self.device)
                selected[chosen] = torch.where(was_known, schedule.KNOWN, picked)
                new = torch.where(self._remasked(selected, known, draws, step), mask, new)
            ids[self.content] = new

    def _draw(
        self, hidden: Tensor, chosen: Tensor, draws: FrameDraws, step: int
    ) -> tuple[Tensor, Tensor]:
        """A code for each row of hidden states `[G, R, hidden]` and its probability, `[R]` each."""
        guided = hidden[0]
        if len(hidden) > 1:  # the head is linear, so guidance can come before it
            told, untold = hidden.float()
            guided = torch.lerp(untold, told, self.sampling.guidance).to(hidden.dtype)
        codes, picked = [], []
        ids, greedy = self.vocab.ids, self.sampling.greedy
        parts = guided.split(self.head_rows), chosen.split(self.head_rows)
        for rows, where in zip(*parts, strict=True):
            logits = self.model.head(rows, ids.video_lo, ids.video_hi)
            probs = logits.softmax(dim=-1, dtype=torch.float32)
            drawn = schedule.pick(probs[None], draws, step, where[None], greedy=greedy)[0]
            codes.append(drawn)
            picked.append(probs.gather(-1, drawn[:, None])[:, 0])
        return torch.cat(codes), torch.cat(picked)

    def _remasked(self, selected: Tensor, known: Tensor, draws: FrameDraws, step: int) -> Tensor:
        """Which positions go back to mask, bool `[N]`."""
        unknown = (~known).sum()[None, None]
        cut = (unknown - 1).clamp_max(self.counts[step]).clamp_min(1)
        # upstream never resets the temperature: 0 from the second generated frame on
        fresh = self.generated == 0 or self.sampling.reset_temperature
        temperature = self.temperatures[step] if fresh else 0.0
        return schedule.remask(selected[None], draws.noise[:, step], cut, temperature)[0]
