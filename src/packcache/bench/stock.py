"""`stock`: upstream's way of computing, in our own words (lumos1-spec 5.8, methods 1.10).

Same tokens as the library's engine with the full cache, and what upstream does besides: a dense
mask over all tokens for each latent frame, given to attention though nothing is masked; keys and
values of all layers copied at every step; heads repeated; rotary tables made in every layer; two
forwards a step, one a branch; the head on every row and all ids, and sampling over all of them.
No statement is upstream's. `benchmarks/stock_upstream.py` times this beside upstream's own modules.

Narrow weights run under autocast, as upstream's: on CUDA that makes QK-norm and so the cached keys
float32, on a CPU it leaves them narrow.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packcache.bench.candidates import make_prefix, now, random_codes
from packcache.bench.parts import Workload
from packcache.errors import GenerationError
from packcache.lumos import schedule
from packcache.lumos.model import Attention, HeadNorm, Layer, Lumos, Rotary
from packcache.lumos.schedule import Draws, FrameDraws
from packcache.lumos.vocab import Vocab
from packcache.positions import text_positions

__all__ = ["GrowingCache", "LateStock", "Stock"]

#: What a blocked pair of tokens gets: upstream writes the smallest int64 into float32.
_BLOCKED = torch.iinfo(torch.int64).min


class GrowingCache:
    """K and V `[1, KV, S, D]` of each layer, copied whole whenever something is added."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add K and V behind those held; all of both."""
        if layer == len(self.layers):
            self.layers.append((k, v))
        else:
            keys, values = self.layers[layer]
            self.layers[layer] = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
        return self.layers[layer]

    def crop(self, length: int) -> None:
        """Hold the first tokens only; their memory stays as it is until the next copy."""
        self.layers = [(k[:, :, :length], v[:, :, :length]) for k, v in self.layers]

    def copy(self) -> GrowingCache:
        """The same tensors, which nobody writes to."""
        twin = GrowingCache()
        twin.layers = list(self.layers)
        return twin


class _Parts:
    """Seconds by what is done, while somebody asks; otherwise no device is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] | None = None

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Somebody asks."""
        self.seconds = defaultdict(float)
        try:
            yield
        finally:
            self.seconds = None

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to a part."""
        if self.seconds is None:
            yield
            return
        start = now(self.device)
        yield
        self.seconds[name] += now(self.device) - start

    def take(self) -> dict[str, float]:
        """The seconds since the last time."""
        taken, self.seconds = dict(self.seconds or {}), defaultdict(float)
        return taken


class _Network:
    """Upstream's forward of one branch, with the library's weights."""

    def __init__(self, model: Lumos, parts: _Parts) -> None:
        self.model, self.parts = model, parts
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        axes = torch.cat((model.axes, model.axes))
        self.channels = [(axes == axis).nonzero()[:, 0] for axis in range(3)]

    def _autocast(self) -> torch.autocast:
        narrow = self.dtype.itemsize < torch.float32.itemsize
        return torch.autocast(self.device.type, self.dtype, enabled=narrow)

    def __call__(
        self, ids: Tensor, places: Tensor, mask: Tensor, cache: GrowingCache, *, head: bool = True
    ) -> Tensor | None:
        """float32 logits `[L, all ids]` of tokens `[L]` behind those in the cache, if asked for."""
        body = self.model.model
        with self.parts.of("check"):
            mask = self._checked(mask)
        with self._autocast():
            x = body.embed_tokens(ids[None])
            for index, layer in enumerate(body.layers):
                assert isinstance(layer, Layer)
                x = self._layer(layer, index, x, places, mask, cache)
            x = body.norm(x)
            if not head:
                return None
            with self.parts.of("head"):
                return self.model.lm_head(x)[0].float()

    def _checked(self, mask: Tensor) -> Tensor:
        """Read all of a mask, as upstream does before every forward; on CUDA write it anew too."""
        if mask.max() != 0:
            raise GenerationError("no token sees any other: the attention mask is broken")
        if mask.device.type != "cuda":
            return mask
        unseen = (mask == torch.finfo(self.dtype).min).all(dim=-1, keepdim=True)
        return mask.mul(~unseen)

    def _layer(
        self, layer: Layer, index: int, x: Tensor, places: Tensor, mask: Tensor, cache: GrowingCache
    ) -> Tensor:
        if layer.norm_after:
            mixed = self._attention(layer.self_attn, index, x, places, mask, cache)
            x = x + layer.input_layernorm(mixed)
            return x + layer.post_attention_layernorm(layer.mlp(x))
        mixed = layer.input_layernorm(x)
        x = x + self._attention(layer.self_attn, index, mixed, places, mask, cache)
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def _attention(
        self,
        own: Attention,
        index: int,
        x: Tensor,
        places: Tensor,
        mask: Tensor,
        cache: GrowingCache,
    ) -> Tensor:
        """x `[1, L, hidden]`, as returned."""
        q = _normed(own.q_proj(x).unflatten(-1, (own.heads, -1)), own.q_norm).transpose(1, 2)
        k = _normed(own.k_proj(x).unflatten(-1, (own.kv_heads, -1)), own.k_norm).transpose(1, 2)
        v = own.v_proj(x).unflatten(-1, (own.kv_heads, -1)).transpose(1, 2)
        with self.parts.of("rotary"):
            rotary = self._rotary(places, v.dtype)
            q, k = _turned(q, rotary), _turned(k, rotary)
        with self.parts.of("concat"):
            keys, values = cache.update(index, k, v)
        with self.parts.of("repeat"):
            group = own.heads // own.kv_heads
            keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
            if mask.device.type == "cuda":
                q = q.contiguous()
        with self.parts.of("attention"):
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return own.o_proj(out.transpose(1, 2).contiguous().flatten(-2))

    def _rotary(self, places: Tensor, dtype: torch.dtype) -> Rotary:
        """cos and sin `[L, D]`: four full tables, of which each token and channel takes one."""
        text, t, h, w, flag = places
        cos, sin = self._table(t, dtype)
        for place, channels in ((h, self.channels[1]), (w, self.channels[2])):
            for table, other in zip((cos, sin), self._table(place, dtype), strict=True):
                table[:, channels] = other[:, channels]
        inside = flag[:, None]
        flat = self._table(text, dtype)
        cos = inside * cos + (1 - inside) * flat[0]
        sin = inside * sin + (1 - inside) * flat[1]
        return cos, sin

    def _table(self, place: Tensor, dtype: torch.dtype) -> Rotary:
        half = torch.outer(self.model.inv_freq, place.float()).T
        angles = torch.cat((half, half), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Frame:
    """A latent frame that is being made: all ids so far `[N]`, of which the last P are its own.

    `content [N]` says where it has content, `mask [1, 1, N, N]` is added to scores, `places` are
    the position ids `[5, N]` of each branch.
    """

    ids: Tensor
    content: Tensor
    mask: Tensor
    places: tuple[Tensor, ...]


class Stock:
    """One clip, upstream's way; both branches always, whatever the guidance.

    As upstream, the text and given frames are computed in the first step of the first generated
    frame, so `prefill` and their `advance` only note them.

    Args:
        draws: the randomness of a latent frame over the visual ids; None draws as upstream, over
            all ids, from torch's own generator.
    """

    def __init__(self, model: Lumos, workload: Workload, *, draws: Draws | None = None) -> None:
        layout, sampling = workload.layout, workload.sampling
        self.model, self.workload, self.layout, self.sampling = model, workload, layout, sampling
        self.draws = draws
        self.vocab = Vocab(model.config)
        self.prefix = make_prefix(workload)
        self.offsets = (0, self.prefix.video_start)
        self.device = model.lm_head.weight.device
        self.history = schedule.history_mask(
            layout.rows, layout.row_length, sampling.history_mask_ratio
        )
        self.counts = schedule.cosine_counts(layout.content, sampling.steps)
        self.temperatures = schedule.temperatures(sampling.steps, sampling.temperature)
        self.suppressed = torch.ones(model.config.vocab_size, dtype=torch.bool, device=self.device)
        self.suppressed[self.vocab.ids.video_lo : self.vocab.ids.video_hi] = False
        self.generator = torch.Generator(self.device).manual_seed(workload.seed)
        self.ids = torch.empty(0, dtype=torch.int64, device=self.device)
        self.caches = [GrowingCache() for _ in self.offsets]
        self.frame = self.generated = 0
        #: What upstream's loop still refers to while it makes the next of its kind.
        self.outlived: dict[str, Tensor] = {}
        self.parts = _Parts(self.device)
        self.network = _Network(model, self.parts)

    # --- what a benchmark calls -------------------------------------------------------------

    def prefill(self) -> float:
        """Note the text; nothing is computed yet."""
        self.ids = torch.tensor(self.prefix.ids, device=self.device)
        return 0.0

    @torch.no_grad()
    def advance(self) -> float:
        """Commit the next latent frame, of random codes: given first, then as if generated.

        Nothing is packed, so its seconds are 0.
        """
        ids = self.vocab.frame(self.layout, random_codes(self.workload, self.frame)[0])
        if self.frame < self.workload.given:
            self.ids = torch.cat((self.ids, ids.to(self.device)))
        else:
            frame = self._open()
            frame.ids[-self.layout.tokens :] = ids.to(self.device)
            if not self.caches[0].length:
                self._run_before(frame, head=False)
            self._commit(frame, head=False)
            self.ids = frame.ids
        self.frame += 1
        return 0.0

    def rehearse(self, steps: Sequence[int] | None = None) -> tuple[float, float]:
        """Seconds of the steps of the next latent frame (all, or those numbers), and of what is
        done once a frame: mask, positions, the forward of its commit. It is forgotten again.

        In the first generated frame all steps begin with the text and the given frames. If steps
        are named these run before them and count once.
        """
        spent: defaultdict[str, float] = defaultdict(float)
        with self._forgotten():
            for what, seconds in self.making(steps):
                spent[what] += seconds
        return spent["step"], spent["open"] + spent["commit"]

    def generate(self) -> Tensor:
        """Make the next latent frame and commit it, re-masked; its clean ids `[P]`."""
        for _ in self.making():
            pass
        self.frame += 1
        self.generated += 1
        return self.ids[-self.layout.tokens :].cpu()

    @torch.no_grad()
    def making(self, steps: Sequence[int] | None = None) -> Iterator[tuple[str, float]]:
        """Make the next latent frame: what was done (open, step, commit) and its seconds."""
        start = now(self.device)
        frame = self._open()
        if steps is not None and not self.caches[0].length:
            self._run_before(frame)
        yield "open", now(self.device) - start
        for step in range(self.sampling.steps) if steps is None else steps:
            start = now(self.device)
            self._step(frame, step)
            yield "step", now(self.device) - start
        start = now(self.device)
        self._commit(frame)
        self.outlived.clear()
        self.ids = frame.ids
        yield "commit", now(self.device) - start

    def statistics(self) -> dict[str, Any]:
        """Bytes and tokens held now; nothing before the first generated frame."""
        held = [t for cache in self.caches for pair in cache.layers for t in pair]
        return {
            "kv_bytes": sum(t.nbytes for t in held),
            "capacity_bytes": sum(t.untyped_storage().nbytes() for t in held),
            "held": self.caches[0].length,
        }

    def shares(self, steps: Sequence[int] | None = None) -> Mapping[str, float]:
        """Seconds of one rehearsal by what is done: the parts of all steps together, of which
        `linear` is the rest, and what is done once: `mask`, `positions` and `commit`."""
        shares: defaultdict[str, float] = defaultdict(float)
        with self.parts.asked(), self._forgotten():
            for what, seconds in self.making(steps):
                spent = self.parts.take()
                if what == "commit":
                    spent = {what: seconds}
                for name, part in {**spent, "linear": seconds - sum(spent.values())}.items():
                    shares[name] += part
        return shares

    @contextlib.contextmanager
    def _forgotten(self) -> Iterator[None]:
        """Whatever is made inside leaves no trace."""
        ids, caches = self.ids, [cache.copy() for cache in self.caches]
        try:
            yield
        finally:
            self.ids, self.caches = ids, caches
            self.outlived.clear()

    # --- once a frame -----------------------------------------------------------------------

    def _open(self) -> _Frame:
        """The next latent frame, all of it masked."""
        blank = self.vocab.frame(self.layout).to(self.device)
        ids = torch.cat((self.ids, blank))
        with self.parts.of("mask"):
            mask = self._attention_mask(ids)
        with self.parts.of("positions"):
            places = tuple(self._places(branch, ids[shift:]) for branch, shift in self._branches())
        return _Frame(ids=ids, content=ids == self.vocab.ids.mask, mask=mask, places=places)

    def _branches(self) -> Iterator[tuple[int, int]]:
        """Each branch and the index of its first token in the conditional one."""
        return enumerate(self.offsets)

    def _attention_mask(self, ids: Tensor) -> Tensor:
        """Every pair of tokens `[1, 1, N, N]`: 0 where the row sees the column (lumos1-spec 4)."""
        starts, ends = ids == self.vocab.ids.image_start, ids == self.vocab.ids.image_end
        number = starts.cumsum(0)
        inside = (number > ends.cumsum(0)) | starts | ends
        seen = torch.ones((len(ids), len(ids)), dtype=torch.bool, device=self.device).tril()
        own = torch.zeros_like(seen)
        own[inside[:, None] & inside & (number[:, None] == number)] = True
        seen[own] = True
        of_a_kind = inside | ~inside  # upstream asks again: text or image, which all tokens are
        seen = seen & (of_a_kind[:, None] & of_a_kind)
        blocked = 1.0 - seen.long()
        return blocked.masked_fill(blocked.bool(), _BLOCKED)[None, None]

    def _places(self, branch: int, ids: Tensor) -> Tensor:
        """Position ids int64 `[5, N]` of a branch; its text is read token by token."""
        index, parts, known = 0, [], self.vocab.ids
        length = self.prefix.lengths[branch]
        while index < len(ids):
            if ids[index] == known.image_start:
                number = len(parts) - length  # the text has a part a token
                parts.append(self.vocab.frame_positions(length, number, self.layout))
                index += self.layout.tokens
            else:
                parts.append(text_positions(index, 1))
                index += 1
        return torch.cat(parts, dim=1).to(self.device)

    def _run_before(self, frame: _Frame, *, head: bool = True) -> None:
        """Compute text and given frames by themselves; upstream does with the first step."""
        before = len(frame.ids) - self.layout.tokens
        for branch, shift in self._branches():
            mask = frame.mask[..., shift:before, shift:before]
            self._forward(frame, branch, frame.ids[shift:before], mask, head=head)

    def _commit(self, frame: _Frame, *, head: bool = True) -> None:
        """The forward that stays, of the re-masked frame; its logits are for nobody."""
        ids = self.vocab.remask(self.layout, frame.ids[-self.layout.tokens :], self.history)
        for branch, name in enumerate(("conditional", "unconditional")):
            mask = self._mask_of(frame, branch)
            logits = self._forward(frame, branch, ids, mask, head=head)
            if logits is not None:
                self.outlived[name] = logits

    def _mask_of(self, frame: _Frame, branch: int) -> Tensor:
        """The mask of this frame's tokens, `[1, 1, P, S]`."""
        return frame.mask[..., -self.layout.tokens :, self.offsets[branch] :]

    def _forward(
        self, frame: _Frame, branch: int, ids: Tensor, mask: Tensor, *, head: bool = True
    ) -> Tensor | None:
        """Logits of tokens `[L]` that lie right behind those a branch holds."""
        cache = self.caches[branch]
        places = frame.places[branch][:, cache.length : cache.length + len(ids)]
        return self.network(ids, places, mask, cache, head=head)

    # --- a step -----------------------------------------------------------------------------

    def _step(self, frame: _Frame, step: int) -> None:
        """Two forwards, guidance, sampling; the content of the frame is decided in place."""
        names = ("conditional", "unconditional")
        first = not self.caches[0].length
        starts = [shift if first else len(frame.ids) - self.layout.tokens for shift in self.offsets]
        for branch, name in enumerate(names):
            mask, ids = self._mask_of(frame, branch), frame.ids[starts[branch] :]
            if first:
                shift = self.offsets[branch]
                mask, ids = frame.mask[..., shift:, shift:].clone(), ids.clone()
            logits = self._forward(frame, branch, ids, mask)
            assert logits is not None
            self.outlived[name] = logits
            del logits
        with self.parts.of("sampling"):
            one, other = (self.outlived[name] for name in names)
            here = [frame.content[start:] for start in starts]
            guided = self.sampling.guidance * (one[here[0]] - other[here[1]]) + other[here[1]]
        for cache, shift in zip(self.caches, self.offsets, strict=True):
            cache.crop(len(frame.ids) - self.layout.tokens - shift)
        with self.parts.of("sampling"):
            frame.ids[frame.content] = self._choose(guided, frame.ids[frame.content], step)

    def _choose(self, guided: Tensor, tokens: Tensor, step: int) -> Tensor:
        """New tokens `[N]` from logits `[N, all ids]`."""
        draws = None
        if self.draws is not None:
            draws = schedule.stack_draws([self.draws(0, self.frame)], self.device)
        guided = torch.where(self.suppressed, -torch.inf, guided)
        self.outlived["guided"] = guided
        probs = guided.softmax(dim=-1)
        self.outlived["probabilities"] = probs
        unknown = tokens == self.vocab.ids.mask
        new = torch.where(unknown, self._draw(probs, draws, step), tokens)
        if step == self.sampling.steps - 1:
            return new
        picked = probs.gather(-1, new[:, None])[:, 0]
        selected = torch.where(unknown, picked, schedule.KNOWN)[None]
        noise = draws.noise[:, step] if draws else schedule.gumbel(self._uniform(selected))
        cut = (unknown.sum()[None, None] - 1).clamp_max(self.counts[step]).clamp_min(1)
        fresh = self.generated == 0 or self.sampling.reset_temperature
        temperature = self.temperatures[step] if fresh else 0.0
        back = schedule.remask(selected, noise, cut, temperature)[0]
        return torch.where(back, self.vocab.ids.mask, new)

    def _draw(self, probs: Tensor, draws: FrameDraws | None, step: int) -> Tensor:
        """An id for each row of `[N, all ids]`."""
        if self.sampling.greedy:
            return probs.argmax(dim=-1)
        if draws is None:
            return torch.multinomial(probs, 1, generator=self.generator)[:, 0]
        ids = self.vocab.ids
        visual = probs[None, :, ids.video_lo : ids.video_hi]
        everywhere = torch.arange(len(probs), device=self.device)[None]
        return schedule.pick(visual, draws, step, everywhere)[0] + ids.video_lo

    def _uniform(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).uniform_(generator=self.generator)


class LateStock(Stock):
    """`Stock` at a latent frame that nobody made the way to: ids and random keys and values of
    what would be held, for true widths where the whole would not fit.

    The mask is that of the open frame's tokens, all that a step reads; upstream makes it of all
    pairs. A model without layers does what is left of a step: mask, embedding, head, sampling.
    """

    def __init__(self, model: Lumos, workload: Workload, frame: int) -> None:
        super().__init__(model, workload)
        self.prefill()
        before = [self.vocab.frame(self.layout, random_codes(workload, n)[0]) for n in range(frame)]
        self.ids = torch.cat((self.ids, *(ids.to(self.device) for ids in before)))
        self.frame, self.generated = frame, frame - workload.given
        generator = torch.Generator(self.device).manual_seed(workload.seed)
        for cache, shift in zip(self.caches, self.offsets, strict=True):
            cache.layers = list(self._drawn(len(self.ids) - shift, generator))

    def _drawn(self, tokens: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each layer; of none, no channels, so that a length is still held."""
        layers, config = len(self.model.model.layers), self.model.config
        width = config.head_dim if layers else 0
        size = 1, config.num_key_value_heads, tokens, width
        for _ in range(layers or 1):
            keys, values = (
                torch.empty(size, dtype=self.network.dtype, device=self.device) for _ in range(2)
            )
            yield keys.normal_(generator=generator), values.normal_(generator=generator)

    def _attention_mask(self, ids: Tensor) -> Tensor:
        return torch.zeros(1, 1, self.layout.tokens, len(ids), device=self.device)

    def step_seconds(self) -> float:
        """Of one denoising step, which all are like; forgotten again."""
        with self._forgotten():
            return next(seconds for what, seconds in self.making([0]) if what == "step")


def _normed(x: Tensor, norm: HeadNorm) -> Tensor:
    """QK-norm of `[1, L, H, D]` in whatever dtype autocast makes of it."""
    share = x.shape[-2] // len(norm.weight)
    weight, bias = (t.repeat_interleave(share, dim=0) for t in (norm.weight, norm.bias))
    return F.layer_norm(x, x.shape[-1:], eps=norm.EPS) * weight + bias


def _turned(x: Tensor, rotary: Rotary) -> Tensor:
    """x `[1, H, L, D]` rotated by full tables: a second tensor with its halves swapped."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotary
    return x * cos + torch.cat((-second, first), dim=-1) * sin
