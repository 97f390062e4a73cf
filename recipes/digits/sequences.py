"""Token sequences that train all frames of a clip in one forward, as the engine will meet them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from clips import Clips
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from packcache.digits import world
from packcache.digits.model import FPS, SECONDS, text_ids
from packcache.lumos.model import Lumos
from packcache.lumos.schedule import history_mask
from packcache.lumos.vocab import Vocab


class Sequences:
    """Sequences of one shape: `frames` latent frames, with or without text.

    Two copies: prefix, committed frames (re-masked, as the cache will hold them), then the same
    frames at the same positions as frames to be decided. One of those sees the prefix, the
    committed copies of earlier frames and itself. With `tube` there is one copy, masked once and
    for all, as the paper trains; a frame sees the prefix, the frames before it and itself.
    """

    def __init__(self, model: Lumos, frames: int, with_text: bool, *, tube: bool = False) -> None:
        self.vocab, self.frames, self.with_text = Vocab(model.config), frames, with_text
        self.tube = tube
        self.layout = self.vocab.layout(world.SIZE, world.SIZE)
        self.device = model.lm_head.weight.device
        self.content = self.vocab.content(self.layout).to(self.device)
        words = len(text_ids("a red 3"))
        whole = self.vocab.prefix([0] * words, seconds=SECONDS, fps=FPS)
        self.prefix = torch.tensor(whole.branch(0 if with_text else 1), device=self.device)
        self.text_slots = slice(1, 1 + words)
        self.rotary = model.rotary(self._positions().to(self.device))

    def _order(self) -> list[int]:
        """Frame numbers of the copies in sequence order: committed ones, then current ones."""
        return [*range(0 if self.tube else self.frames - 1), *range(self.frames)]

    def _positions(self) -> Tensor:
        n = len(self.prefix)
        index = torch.arange(n)
        parts = [torch.stack((index, index, index, index, torch.zeros_like(index)))]
        parts += [self.vocab.frame_positions(n, f, self.layout) for f in self._order()]
        return torch.cat(parts, dim=1)

    @torch.compiler.disable
    def attend(self, _: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The prefix is causal; a copy sees the prefix, earlier committed copies and itself."""
        sizes = [len(self.prefix)] + [self.layout.tokens] * len(self._order())
        queries, keys, values = (x.split(sizes, dim=2) for x in (q, k, v))
        out = [F.scaled_dot_product_attention(queries[0], keys[0], values[0], is_causal=True)]
        for copy, frame in enumerate(self._order(), start=1):
            seen_k = torch.cat((*keys[: frame + 1], keys[copy]), dim=2)
            seen_v = torch.cat((*values[: frame + 1], values[copy]), dim=2)
            out.append(F.scaled_dot_product_attention(queries[copy], seen_k, seen_v))
        return torch.cat(out, dim=2)

    def ids(
        self,
        clips: Clips,
        clean: Tensor,
        hidden: Tensor,
        *,
        ratio: float,
        past: Tensor | None = None,
    ) -> Tensor:
        """Token ids `[G, L]`; content `hidden [G, F, tokens]` of the current copies is masked.

        The first `clean [G]` committed frames are not re-masked: they were given. `past` are the
        committed copies' codes where they differ from the clips'.
        """
        size = len(clips)
        current = self.vocab.frame(self.layout).to(self.device).repeat(size, self.frames, 1)
        current[..., self.content] = clips.codes + self.vocab.ids.video_lo
        copies = [] if self.tube else [self._committed(current, clean, ratio, past).flatten(1)]
        current[..., self.content] = current[..., self.content].masked_fill(
            hidden, self.vocab.ids.mask
        )
        prefix = self.prefix.repeat(size, 1)
        if self.with_text:
            prefix[:, self.text_slots] = clips.text
        return torch.cat((prefix, *copies, current.flatten(1)), dim=1)

    def _committed(
        self, current: Tensor, clean: Tensor, ratio: float, past: Tensor | None
    ) -> Tensor:
        committed = current[:, :-1].clone()
        if past is not None:
            committed[..., self.content] = past[:, :-1] + self.vocab.ids.video_lo
        history = history_mask(self.layout.rows, self.layout.row_length, ratio)
        committed = self.vocab.remask(self.layout, committed, history)
        given = torch.arange(self.frames - 1, device=self.device) < clean[:, None]
        return torch.where(given[..., None], current[:, :-1], committed)

    def logits(self, model: nn.Module, ids: Tensor, hidden: Tensor) -> Tensor:
        """float32 logits `[n, codes]` of the masked tokens of all current copies."""
        states = model(ids, self.rotary, self.attend)
        current = states[:, -self.frames * self.layout.tokens :].unflatten(1, (self.frames, -1))
        masked = current[:, :, self.content][hidden]
        core = model.module if isinstance(model, AveragedModel) else model
        return F.linear(masked, core.lm_head.weight[self.vocab.ids.video_lo :]).float()
