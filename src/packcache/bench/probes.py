"""The engine's own functions, timed one by one at true widths: what composed rows are made of.

One layer of random (or given) weights is enough, or the mean of the workload's `layers`, and one
group of heads where all of them would take minutes. Kinds of pieces, seconds of one call each:

- `step`: a denoising step of a network without layers, where `rows` tokens are undecided: the
  embedding, the last norm, head and sampling. `frame` is what a latent frame pays once (draws,
  tables), and every `step` too; `ends` is a forward of the network without layers.
- `layer`: one layer for `rows` tokens of every branch, all but its attention.
- `attend`: one branch's attention in one layer over `held` tokens and the open frame; its queries
  are `rows` of the frame's. K/V are written as in a run.
- `current`: the same of a step that takes the history's part from an earlier one, merge included;
  `history`: that part computed for `rows` queries.
- `cache`: opening, packing and rebase around latent frame `rows` in a cache of one layer; `deeper`:
  how much longer a cache of two takes, which is what a layer adds. `prefill`: the text through one
  layer.
- `stock`: a step upstream's way (`bench.stock`) at latent frame `rows`, of a network of one layer;
  `stock ends` of one without layers, at the first generated frame.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from packcache.attention import attend_lse
from packcache.bench.ceilings import head_groups, now
from packcache.bench.parts import Workload
from packcache.bench.pieces import Piece, Probe
from packcache.bench.predict import course_workload
from packcache.bench.stock import LateStock
from packcache.cache import FrameCache, TrainedRangeWarning
from packcache.errors import InvalidSetting
from packcache.lumos.attend import CachedAttention, ReusedAttention
from packcache.lumos.decode import Decoder
from packcache.lumos.model import Lumos
from packcache.lumos.random_weights import random_model
from packcache.lumos.schedule import philox_draws, undecided
from packcache.lumos.vocab import HEADER, Prefix, Vocab
from packcache.lumos.weights import filled, hollow
from packcache.policies import FullCache, Policy
from packcache.reuse import StepReuse, StepWork
from packcache.timeline import Role, Span

__all__ = [
    "CACHES", "STOCKS", "Probes", "cut", "decoder", "groups_at_once", "shallow_model",
]  # fmt: skip

#: Pieces of the cache. Two of its layers are needed to tell what a layer adds.
CACHES = ("cache", "deeper")

#: Pieces of upstream's way: with a layer, and without.
STOCKS = ("stock", "stock ends")

Run = Callable[[], Sequence[float]]


def groups_at_once(workload: Workload) -> int:
    """Groups of heads in an attention piece: by the most keys a clip can have."""
    return head_groups(workload, workload.text_tokens + workload.latents * workload.layout.tokens)


def shallow_model(workload: Workload, layers: int = 1) -> Lumos:
    """Random weights of true widths, but few layers."""
    config = dataclasses.replace(workload.config, num_hidden_layers=layers)
    return random_model(config, seed=workload.seed, device=workload.device, dtype=workload.dtype)


def cut(model: Lumos, layers: int) -> Lumos:
    """The first layers of a network and its ends, the same weights in memory.

    Raises InvalidSetting if it has fewer.
    """
    if not 1 <= layers <= model.config.num_hidden_layers:
        raise InvalidSetting(
            f"layers is {layers}, expected 1 to {model.config.num_hidden_layers}, what there are"
        )
    config = dataclasses.replace(model.config, num_hidden_layers=layers)
    skeleton = hollow(config)
    names = skeleton.state_dict().keys()
    weights = ((name, t) for name, t in model.state_dict().items() if name in names)
    return filled(skeleton, weights, model.lm_head.weight.device)


def decoder(
    workload: Workload,
    model: Lumos,
    policy: Policy | None = None,
    reuse: StepReuse | None = None,
    latents: int | None = None,
) -> Decoder:
    """The engine on one prompt of the workload's length; the policy's default is the full cache."""
    text = workload.text_tokens
    sampling, layout = workload.sampling, workload.layout
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainedRangeWarning)  # the run itself will warn
        return Decoder(
            model,
            [Prefix(ids=(workload.config.token_ids.bos,) * text, video_start=text - HEADER)],
            layout=layout,
            sampling=sampling,
            policy=policy or FullCache(),
            draws=philox_draws([workload.seed], sampling.steps, layout.content),
            reuse=reuse,
            latents=workload.latents if latents is None else latents,
        )


class Probes:
    """Makes the probes of a workload's pieces; what they share is made when it is first needed."""

    def __init__(self, workload: Workload, model: Lumos) -> None:
        self.workload, self.model, self.whole = workload, cut(model, 1), model
        self.groups = groups_at_once(workload)
        self.left = undecided(workload.layout.content, workload.sampling.steps)
        self.generator = torch.Generator(workload.device).manual_seed(workload.seed)
        self._bare: Decoder | None = None

    def of(self, pieces: Iterable[Piece]) -> list[Probe]:
        """One probe for each piece, but one for all pieces of a policy's cache, and of the ends."""
        makers: dict[str, Callable[[Piece], Run]] = {
            "step": self._step,
            "layer": self._layer,
            "attend": self._attend,
            "current": self._current,
            "history": self._history,
            "prefill": self._prefill,
            "stock": self._stock,
            "stock ends": self._stock,
        }
        probes, joined = [], dict[tuple[bool, str], list[Piece]]()
        for piece in pieces:
            if piece.kind in makers:
                make = _bind(makers[piece.kind], piece)
                probes.append(Probe(pieces=(piece,), make=make))
            else:
                joined.setdefault((piece.kind in CACHES, piece.label), []).append(piece)
        for (cache, label), together in joined.items():
            make = _bind(self._cache, together, label) if cache else _bind(self._ends, together)
            probes.append(Probe(pieces=tuple(together), make=make))
        return probes

    # --- the network ------------------------------------------------------------------------

    def _layer(self, piece: Piece) -> Run:
        """A layer, its queries given back as if they were attention's output: the mean of several,
        one after another, if the workload asks for more than one."""
        work = self.workload
        x = self._random(work.sampling.branches, piece.rows, work.config.hidden_size)
        ids = Vocab(work.config).frame_positions(work.text_tokens, 0, work.layout)
        cos, sin = (
            table[: piece.rows].expand(len(x), 1, -1, -1).contiguous()
            for table in self.model.rotary(ids)
        )
        count = min(work.layers or 1, self.whole.config.num_hidden_layers)
        layers = cut(self.whole, count).model.layers

        def forward() -> None:
            for layer in layers:
                layer(x, (cos, sin), 0, lambda _layer, q, k, v: q)

        return self._timed(forward, share=count)

    def _attend(self, piece: Piece) -> Run:
        rows = self._rows(piece.rows)
        attention = CachedAttention([self._held_cache(piece.held)], 1)
        return self._attention(attention, rows, StepWork())

    def _current(self, piece: Piece) -> Run:
        """The current frame's part, the merge, and finding out whose queries moved."""
        rows = self._rows(piece.rows)
        cache = self._held_cache(self.workload.text_tokens)
        attention = ReusedAttention([cache], 1, self.workload.layout.tokens)
        return self._attention(attention, rows, StepWork(rows=piece.rows, fresh=1))

    def _attention(self, attention: CachedAttention, rows: Tensor | None, work: StepWork) -> Run:
        """The engine's attention object in a step of those rows, after one of all."""
        every = self._heads(self.workload.layout.tokens)
        attention(0, *every)
        own = every if rows is None else tuple(x[:, :, : rows.shape[1]].contiguous() for x in every)
        attention.begin(work, rows)
        return self._timed(lambda: attention(0, *own))

    def _history(self, piece: Piece) -> Run:
        """Some queries of a frame over what is held, as output and log-sum-exp."""
        q = self._heads(self.workload.layout.tokens)[0][0, :, : piece.rows]
        cache = self._held_cache(piece.held)
        keys, values = (x[:, : piece.held] for x in cache.update(0, *self._draft()))
        return self._timed(lambda: attend_lse(q, keys, values))

    def _prefill(self, piece: Piece) -> Run:
        def run() -> list[float]:
            fresh = decoder(self.workload, self.model, latents=1)
            fresh.prefill()
            return [fresh.prefill_s]

        return run

    # --- the ends -----------------------------------------------------------------------------

    def _step(self, piece: Piece) -> Run:
        bare, step = self._no_layers(), self.left.index(piece.rows)
        return lambda: bare.rehearse([step])[:1]

    def _ends(self, pieces: Sequence[Piece]) -> Run:
        bare = self._no_layers()

        def run() -> list[float]:
            frame, ends = bare.rehearse([])
            return [frame if piece.kind == "frame" else ends for piece in pieces]

        return run

    def _no_layers(self) -> Decoder:
        """The engine on a network without layers, its prompt committed."""
        if self._bare is None:
            model = cut(self.model, 1)  # of its own: it loses its layer, once the prompt is in
            bare = decoder(self.workload, model, latents=1)
            bare.prefill()
            model.model.layers = nn.ModuleList()
            self._bare = bare
        return self._bare

    def _stock(self, piece: Piece) -> Run:
        model = cut(self.model, 1)
        if piece.kind == "stock ends":
            model.model.layers = nn.ModuleList()
        late = LateStock(model, self.workload, max(piece.rows, self.workload.given))
        return lambda: [late.step_seconds()]

    # --- the cache ----------------------------------------------------------------------------

    def _cache(self, pieces: Sequence[Piece], label: str) -> Run:
        """A whole clip through a cache of one layer, then through one of two: what is planned once
        is in both. Where noise makes the second faster, a layer adds nothing."""
        policy = self.workload.policies[label]
        models = [self.model, cut(self.whole, 2)]
        visible = course_workload(self.workload, layers=1).visible()

        def run() -> list[float]:
            one, two = (self._drive(self._whole_cache(m, policy), visible) for m in models)
            more = [max(0.0, b - a) for a, b in zip(one, two, strict=True)]
            taken = {"cache": one, "deeper": more}
            return [taken[piece.kind][piece.rows] for piece in pieces]

        return run

    def _whole_cache(self, model: Lumos, policy: Policy) -> FrameCache:
        """The cache of both branches that a run of this network would have."""
        (cache,) = decoder(self.workload, model, policy).caches
        return cache

    def _drive(self, cache: FrameCache, visible: NDArray[np.bool_]) -> list[float]:
        """Seconds of opening and committing each latent frame, the forward between not counted."""
        layout, device = self.workload.layout, self.workload.device
        cache.open(Span.text(cache.text[0]))
        self._fill(cache, cache.text)
        cache.commit()
        ids = np.zeros(layout.tokens, dtype=np.int32)
        seconds = []
        for frame in range(self.workload.latents):
            clean = frame < self.workload.given
            start = now(device)
            cache.open(Span.of_frame(Role.IMAGE if clean else Role.HISTORY, frame, layout))
            opened = now(device)
            self._fill(cache, [layout.tokens] * len(cache.text))
            complete = now(device)
            cache.commit(visible=None if clean else visible, ids=ids)
            seconds.append(opened - start + now(device) - complete)
        return seconds

    def _fill(self, cache: FrameCache, tokens: Sequence[int]) -> None:
        """What a forward leaves behind."""
        config, device = self.workload.config, cache.stores[0].device
        for branch, count in enumerate(tokens):
            shape = (config.num_key_value_heads, count, config.head_dim)
            draft = torch.zeros(shape, dtype=self.workload.dtype, device=device)
            for layer in range(cache.stores[0].layers):
                cache.update(layer, draft, draft, branch)

    def _held_cache(self, held: int) -> FrameCache:
        """A cache of one branch and layer that holds so many tokens, with a latent frame open."""
        config, layout = self.workload.config, self.workload.layout
        cache = FrameCache(
            FullCache(),
            layers=1,
            kv_heads=self.groups,
            head_dim=config.head_dim,
            layout=layout,
            text=(held,),
            positions="absolute",
            latent_frames=1,
            dtype=self.workload.dtype,
            device=self.workload.device,
        )
        cache.open(Span.text(held))
        keys, values = (self._random(self.groups, held, config.head_dim) for _ in range(2))
        cache.update(0, keys, values)
        cache.commit()
        cache.open(Span.of_frame(Role.HISTORY, 0, layout))
        return cache

    # --- tensors ------------------------------------------------------------------------------

    def _heads(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """q `[1, H, L, D]` of the groups that are timed at once, k and v `[1, KV, L, D]`."""
        config = self.workload.config
        share = config.num_attention_heads // config.num_key_value_heads
        sizes = (self.groups * share, self.groups, self.groups)
        q, k, v = (self._random(1, heads, tokens, config.head_dim) for heads in sizes)
        return q, k, v

    def _draft(self) -> tuple[Tensor, Tensor]:
        _, k, v = self._heads(self.workload.layout.tokens)
        return k[0], v[0]

    def _rows(self, count: int) -> Tensor | None:
        """Offsets `[1, n]` of so many tokens all over a latent frame; None for all."""
        tokens = self.workload.layout.tokens
        if count == tokens:
            return None
        drawn = torch.randperm(tokens, generator=self.generator, device=self.workload.device)
        return drawn[None, :count]

    def _random(self, *shape: int) -> Tensor:
        made = torch.randn(shape, generator=self.generator, device=self.workload.device)
        return made.to(self.workload.dtype)

    def _timed(self, call: Callable[[], object], share: int = 1) -> Run:
        """Seconds of a call, or of one of the `share` equal parts it has."""
        device = self.workload.device

        def run() -> list[float]:
            start = now(device)
            call()
            return [(now(device) - start) / share]

        return run


def _bind(make: Callable[..., Run], *arguments: object) -> Callable[[], Run]:
    return lambda: make(*arguments)
