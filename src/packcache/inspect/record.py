"""Traces recorded: a few queries of a full-cache run show where all attention goes.

    trace = record(load("digits"), ["a red 3 moving right"], frames=49)
    trace.save("digits.trace")

A `Recorder` is shown what an attention attends with (`observe`) and keeps, for chosen layers and
forwards, the mean over sampled queries and heads of softmax(q k / sqrt D), in float32. `watch` lets
it look at a `Decoder`: for a while that has an attention which computes what it always did, and
shows it; `watch_diffusers` does so for the adapter. Any other code may call `observe`. A clip's
trace grows with the square of its latent frames, so of a long one some are sampled, evenly. Memory
beyond the trace is one head group's scores at a time. Axes: H query heads, KV key heads, L queries,
S keys, D head size, P tokens of a latent frame.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from packcache.adapters.shapes import heads_first
from packcache.cache import FrameCache
from packcache.environment import environment
from packcache.errors import InvalidSetting
from packcache.inspect.trace import COMMIT, SAMPLED, TRAINED, Sample, Trace
from packcache.lumos.attend import CachedAttention
from packcache.lumos.decode import Decoder
from packcache.lumos.pipeline import Picture, Pipeline, Run
from packcache.lumos.units import show_bytes
from packcache.policies import FullCache, Policy
from packcache.reuse import StepWork
from packcache.timeline import FrameLayout, Ints, Role

if TYPE_CHECKING:
    from packcache.adapters.diffusers import Installed

__all__ = [
    "CLIP_MEMORY",
    "LAYERS",
    "QUERIES",
    "Recorder",
    "record",
    "sampled_frames",
    "scenes",
    "spread",
    "watch_diffusers",
]

#: Queries of a latent frame that are sampled, and layers recorded, unless asked otherwise.
QUERIES, LAYERS = 32, 8

#: Bytes that the attention of a clip may take in memory; half of that in a file, before it is
#: packed. And how many forwards of a latent frame are recorded, unless asked otherwise.
CLIP_MEMORY, _FORWARDS = 128 << 20, 4


def spread(count: int, most: int) -> tuple[int, ...]:
    """At most `most` of the numbers below `count`, evenly, the first and the last among them."""
    places = np.linspace(0, count - 1, min(count, most)).round().astype(int)
    return tuple(dict.fromkeys(places.tolist()))


def sampled_frames(
    latent_frames: int,
    *,
    layout: FrameLayout,
    text: int,
    layers: int,
    forwards: int = _FORWARDS,
    memory: int = CLIP_MEMORY,
) -> tuple[int, ...]:
    """As many latent frames as fit, evenly, the first and the last among them: all of a short clip.

    A forward of latent frame f takes a float32 of each recorded layer for each of `text` and f + 1
    frames of tokens. Raises InvalidSetting where the first and the last do not fit.
    """

    def size(frames: Sequence[int]) -> int:
        return sum(4 * layers * forwards * (text + (f + 1) * layout.tokens) for f in frames)

    for count in range(latent_frames, 0, -1):
        frames = spread(latent_frames, count)
        if size(frames) <= memory and frames[-1] == latent_frames - 1:
            return frames
    least = size(sorted({0, latent_frames - 1}))
    raise InvalidSetting(
        f"clip memory is {show_bytes(memory)}, expected at least {show_bytes(least)} for two of "
        f"{latent_frames} latent frames of {layout.tokens} tokens (forwards {forwards}, layers "
        f"{layers}): allow more, or record fewer layers or frames"
    )


class Recorder:
    """Collects the samples of one trace, clip by clip; `clip` is the number of the one that runs.

    Args:
        layout: of a latent frame.
        num_layers: of the model.
        text: prefix tokens of the branch that is observed, the conditional one.
        queries: content tokens of a frame whose queries are sampled, drawn by `seed`, clip and
            frame; all of them where there are no more.
        layers: numbers of the layers to record; default `LAYERS` of them, evenly.
        at_steps: denoising steps to record, -1 the commit; default the first, the middle and the
            last one, and the commit.
        latent_frames: of each clip, where they are known: then no more of them are sampled than
            `clip_memory` bytes hold (`sampled_frames`). Of the others only what a commit's queries
            say of their own frame is kept, which policies may ask for.

    Raises InvalidSetting for layers that the model has not, too few queries and too little memory.
    """

    def __init__(
        self,
        *,
        layout: FrameLayout,
        num_layers: int,
        text: int,
        queries: int = QUERIES,
        layers: Sequence[int] | None = None,
        at_steps: Sequence[int] | None = None,
        latent_frames: int | None = None,
        clip_memory: int = CLIP_MEMORY,
        seed: int = 0,
    ) -> None:
        if queries < 1:
            raise InvalidSetting(f"queries is {queries}, expected at least 1")
        chosen = spread(num_layers, LAYERS) if layers is None else tuple(sorted(set(layers)))
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < num_layers:
            raise InvalidSetting(
                f"layers is {list(chosen)}, expected numbers of 0 to {num_layers - 1}"
            )
        self.layout, self.num_layers, self.text = layout, num_layers, text
        self.queries, self.layers, self.seed = queries, chosen, seed
        self.at_steps = None if at_steps is None else frozenset(at_steps)
        self.frames = None  # all
        if latent_frames is not None:
            forwards = _FORWARDS if self.at_steps is None else len(self.at_steps)
            frames = sampled_frames(
                latent_frames, layout=layout, text=text, layers=len(chosen), forwards=forwards,
                memory=clip_memory,
            )  # fmt: skip
            self.frames = frames if len(frames) < latent_frames else None
        self.clip = 0
        self._own: dict[tuple[int, int], dict[int, Tensor]] = {}
        self._mass: dict[tuple[int, int, int, int], dict[int, Tensor]] = {}
        self._longest = dict.fromkeys(chosen, 0.0)

    # --- what an attention calls ------------------------------------------------------------

    def wants(self, layer: int, step: int, steps: int) -> bool:
        """Is this layer of this forward to be recorded? Else it need not be shown."""
        usual = {COMMIT, 0, steps // 2, steps - 1}
        return layer in self.layers and step in (usual if self.at_steps is None else self.at_steps)

    @torch.no_grad()
    def observe(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        frame: int,
        step: int = COMMIT,
        steps: int = 0,
    ) -> None:
        """Queries `[H, P, D]` of latent frame `frame`, and all `[KV, S, D]` that they attend to.

        The frame's tokens in their order; keys in logical order, the frame's own last; both as they
        are multiplied. `step` is -1 in the forward that is committed, else of `steps`. What is not
        wanted is passed over; of a forward shown twice the last time counts. Raises InvalidSetting
        where tokens are missing: they have no attention to record.
        """
        if not self.wants(layer, step, steps):
            return
        is_sampled = self.frames is None or frame in self.frames
        if not (is_sampled or step == COMMIT):
            return
        self._check(frame, queries.shape[1], keys.shape[1])
        rows = torch.from_numpy(self.sampled(frame)).to(queries.device)
        mass = _attention(queries[:, rows], keys).cpu()
        if is_sampled:
            self._mass.setdefault((self.clip, frame, step, steps), {})[layer] = mass
        if self.frames is not None and step == COMMIT:
            own = mass[-self.layout.tokens :].double()
            self._own.setdefault((self.clip, frame), {})[layer] = own / own.sum()
        self._longest[layer] = max(self._longest[layer], *(_longest(head) for head in values))

    def sampled(self, frame: int) -> NDArray[np.int64]:
        """Offsets of the sampled queries of this clip, ascending: content tokens, without order."""
        content = self.layout.content_offsets()
        rng = np.random.default_rng((self.seed, self.clip, frame))
        count = min(self.queries, len(content))
        return np.sort(rng.choice(content, size=count, replace=False)).astype(np.int64)

    def _check(self, frame: int, queries: int, keys: int) -> None:
        tokens = self.layout.tokens
        if queries != tokens:
            raise InvalidSetting(
                f"latent frame {frame} attends with {queries} tokens, expected {tokens}, a whole "
                "frame: record exact steps, and one latent frame at a time"
            )
        expected = self.text + (frame + 1) * tokens
        if keys != expected:
            raise InvalidSetting(
                f"latent frame {frame} attends to {keys} tokens, expected {expected}: {self.text} "
                f"of text and {frame + 1} x {tokens}; a trace is taken along the full cache"
            )

    # --- our engine -------------------------------------------------------------------------

    @contextlib.contextmanager
    def watch(self, decoder: Decoder, clip: int = 0) -> Iterator[None]:
        """Record what a decoder of one prompt makes meanwhile; its tokens are what they would be.

        Raises InvalidSetting for another policy than the full cache, for several prompts and for
        steps that reuse earlier ones.
        """
        _check_full(decoder.caches[0].policy)
        if len(decoder.caches) > 1 or not decoder.reuse.is_exact:
            raise InvalidSetting(
                f"{len(decoder.caches)} prompts with {decoder.reuse}, expected one prompt with "
                "exact steps"
            )
        before = decoder.attend, decoder.attend_step
        self.clip = clip
        decoder.attend, decoder.attend_step = _Watched(decoder, self), _WatchedSteps(decoder, self)
        try:
            yield
        finally:
            decoder.attend, decoder.attend_step = before

    # --- what was recorded ------------------------------------------------------------------

    def samples(self) -> list[Sample]:
        """All samples, by clip, latent frame and step, the commit last.

        Raises InvalidSetting for a forward of which not all layers were shown.
        """
        ordered = sorted(
            self._mass.items(), key=lambda one: (*one[0][:2], one[0][2] < 0, one[0][2])
        )
        return [
            Sample(
                clip=clip, frame=frame, step=step, steps=steps, branch=0,
                mass=np.stack([mass.numpy() for mass in self._all(frame, step, found)]),
            )
            for (clip, frame, step, steps), found in ordered
        ]  # fmt: skip

    def _all(self, frame: int, step: int, found: dict[int, Tensor]) -> list[Tensor]:
        """The attention of every recorded layer in one forward."""
        missing = [layer for layer in self.layers if layer not in found]
        if missing:
            raise InvalidSetting(
                f"layers {missing} of latent frame {frame}, step {step}, were not shown: observe "
                "every layer of a forward"
            )
        return [found[layer] for layer in self.layers]

    def _own_shares(self, frames: int) -> list[NDArray[np.float32]]:
        """`Trace.own` of a thinned recording: of all latent frames of all clips, or of none."""
        clips = range(1 + max((clip for clip, _ in self._own), default=-1))
        if any((clip, frame) not in self._own for clip in clips for frame in range(frames)):
            return []  # commits were not asked for
        return [
            np.stack(
                [
                    torch.stack(self._all(frame, COMMIT, self._own[clip, frame])).mean(dim=0)
                    for frame in range(frames)
                ]
            ).astype(np.float32)
            for clip in clips
        ]

    def trace(
        self,
        *,
        roles: Sequence[Role],
        visible: NDArray[np.bool_] | None = None,
        ids: Sequence[Ints] = (),
        workload: dict[str, Any] | None = None,
        environment: dict[str, Any] | None = None,
    ) -> Trace:
        """All that was observed, with what only the caller knows (see `Trace`)."""
        told: dict[str, Any] = {"queries": self.queries}
        if self.frames is not None:
            told[SAMPLED] = list(self.frames)
        return Trace(
            layout=self.layout,
            text=self.text,
            roles=tuple(roles),
            layers=self.layers,
            num_layers=self.num_layers,
            visible=visible,
            ids=list(ids),
            samples=self.samples(),
            own=self._own_shares(len(roles)),
            value_norm=np.array([self._longest[n] for n in self.layers], dtype=np.float32),
            workload={**(workload or {}), **told},
            environment=environment or {},
        )


class _Watched(CachedAttention):
    """A decoder's attention of commits, which shows a recorder the conditional branch."""

    def __init__(self, decoder: Decoder, recorder: Recorder) -> None:
        super().__init__(decoder.caches, decoder.branches)
        self.decoder, self.recorder, self.step = decoder, recorder, COMMIT

    def _attend(
        self, layer: int, g: int, q: Tensor, keys: Tensor, values: Tensor, rows: Tensor | None
    ) -> Tensor:
        if g == 0:
            frame, steps = self.decoder.frame, self.decoder.sampling.steps
            self.recorder.observe(layer, q, keys, values, frame=frame, step=self.step, steps=steps)
        return super()._attend(layer, g, q, keys, values, rows)


class _WatchedSteps(_Watched):
    """The attention of denoising steps, all of a frame in turn."""

    def begin(self, work: StepWork, rows: Tensor | None) -> None:
        super().begin(work, rows)
        self.step = (self.step + 1) % self.decoder.sampling.steps


def _check_full(policy: Policy) -> None:
    if policy != FullCache():
        raise InvalidSetting(
            f"policy is {policy!r}, expected FullCache(): a trace is taken along the full cache, "
            "since tokens that left have no attention to record"
        )


def _attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Mean attention `[S]` of queries `[H, r, D]` on keys `[KV, S, D]`; a head group at a time."""
    groups = queries.reshape(len(keys), -1, queries.shape[-1])  # [KV, H/KV * r, D]
    total = torch.zeros(keys.shape[1], dtype=torch.float64, device=keys.device)
    for query, key in zip(groups, keys, strict=True):
        logits = query.float() @ key.float().T / math.sqrt(key.shape[-1])
        total += logits.softmax(dim=-1).sum(dim=0)
    return (total / groups.shape[:2].numel()).float()


def _longest(values: Tensor) -> float:
    """Largest length of values `[S, D]`."""
    return float(torch.linalg.vector_norm(values.float(), dim=-1).max())


# --- diffusers' transformers ---------------------------------------------------------------------


@contextlib.contextmanager
def watch_diffusers(
    recorder: Recorder, installed: Installed, *, clip: int = 0, branch: str = "cond"
) -> Iterator[None]:
    """Record what a cache of `packcache.adapters.diffusers` attends with, in one branch.

    Its forwards are those of one latent frame each, its recorder has no text; each `frame()` is a
    step and the committed one the commit, so name the steps to record (`at_steps`). The adapter
    is not changed: forward hooks see normed queries and rotary tables, and for a while two of its
    methods are ours. Raises InvalidSetting for another policy than the full cache.
    """
    _check_full(installed.policy)
    watched = _WatchedWan(recorder, installed, branch)
    recorder.clip = clip
    transformer = installed.transformer
    hooks = [transformer.rope.register_forward_hook(watched.see_rotary)]
    hooks += [b.attn1.norm_q.register_forward_hook(watched.see_queries) for b in transformer.blocks]
    installed.frame, installed.attend_to = watched.frame, watched.attend_to
    try:
        yield
    finally:
        del installed.frame, installed.attend_to
        for hook in hooks:
            hook.remove()


class _WatchedWan:
    """Queries, rotary tables and keys of a forward, put together layer by layer."""

    def __init__(self, recorder: Recorder, installed: Installed, branch: str) -> None:
        self.recorder, self.installed, self.branch = recorder, installed, branch
        self.own_frame, self.own_attend_to = installed.frame, installed.attend_to
        self.step, self.drafts, self.is_on = COMMIT, 0, False

    def see_rotary(self, module: Any, inputs: Any, tables: tuple[Tensor, Tensor]) -> None:
        cos, sin = tables  # [1, n, 1, D], each angle twice
        self.turn = torch.complex(cos[..., 0::2].double(), sin[..., 1::2].double())

    def see_queries(self, module: Any, inputs: Any, queries: Tensor) -> None:
        self.queries = queries  # [B, n, H * D]

    @contextlib.contextmanager
    def frame(self, *, commit: bool = False, branch: str = "cond") -> Iterator[FrameCache | None]:
        self.is_on = branch == self.branch
        if self.is_on:
            self.step = COMMIT if commit else self.drafts
            self.drafts = 0 if commit else self.drafts + 1
        with self.own_frame(commit=commit, branch=branch) as cache:
            yield cache

    def attend_to(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.own_attend_to(layer, k, v)
        if self.is_on:
            self.recorder.observe(
                layer,
                heads_first(self._turned(k)),
                heads_first(keys),
                heads_first(values),
                frame=self.installed.caches[self.branch].timeline.num_frames,
                step=self.step,
            )
        return keys, values

    def _turned(self, like: Tensor) -> Tensor:
        """The queries `[B, n, H, D]`, pairs (2m, 2m + 1) turned by their place."""
        pairs = self.queries.unflatten(2, (like.shape[2], -1, 2)).double()
        return torch.view_as_real(torch.view_as_complex(pairs) * self.turn).flatten(3).to(like)


# --- whole clips ---------------------------------------------------------------------------------


def record(
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    frames: int,
    seed: int = 0,
    images: Sequence[Picture] | None = None,
    queries: int = QUERIES,
    layers: Sequence[int] | None = None,
    at_steps: Sequence[int] | None = None,
    clip_memory: int = CLIP_MEMORY,
    on_frame: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Trace:
    """Make a clip of each prompt with the full cache and record it.

    Args:
        prompts: as long as each other in tokens, for a trace has one length of text.
        frames: pixel frames of each clip.
        seed: clip n draws with `seed + n`; of the sampled queries too.
        images: a condition image for each prompt; None: all from text.
        queries, layers, at_steps, clip_memory: as for `Recorder`.
        on_frame: `on_frame(done, total)` after every latent frame.
        settings: as for `Pipeline.run`.
    """
    if not prompts or (images is not None and len(images) != len(prompts)):
        raise InvalidSetting(
            f"{len(prompts)} prompts and {len(images or ())} images, expected at least one prompt, "
            "and an image for each or for none"
        )

    def run(clip: int) -> Run:
        image = None if images is None else images[clip]
        given = {"frames": frames, "image": image, "policy": FullCache(), "seed": seed + clip}
        return pipeline.run([prompts[clip]], **given, **settings)

    first = _first([run(clip).decoder for clip in range(len(prompts))], prompts)
    latents = first.latents or 0
    recorder = Recorder(
        layout=first.layout, num_layers=pipeline.model.config.num_hidden_layers,
        text=first.caches[0].text[0], queries=queries, layers=layers, at_steps=at_steps,
        latent_frames=latents, clip_memory=clip_memory, seed=seed,
    )  # fmt: skip
    ids: list[Ints] = []
    for clip in range(len(prompts)):
        tell = _advance(on_frame, clip * latents, len(prompts) * latents)
        ids.append(_watched_clip(recorder, run(clip), clip, tell))
    start = Role.HISTORY if images is None else Role.IMAGE
    return recorder.trace(
        roles=[start, *[Role.HISTORY] * (latents - 1)],
        visible=None if first.visible.all() else first.visible,
        ids=ids,
        workload={
            "model": pipeline.name, "prompts": list(prompts), "image": images is not None,
            "frames": frames, "latent_frames": latents, "seed": seed, "policy": "full",
            "sampling": asdict(first.sampling), "token_bytes": first.caches[0].token_bytes,
            TRAINED: pipeline.model.config.trained_latent_frames,
        },
        environment=environment(pipeline.device, pipeline.dtype),
    )  # fmt: skip


def _advance(
    on_frame: Callable[[int, int], None] | None, before: int, total: int
) -> Callable[[int], None]:
    """Tells latent frames done in one clip as those of all."""
    return lambda done: None if on_frame is None else on_frame(before + done, total)


def _watched_clip(recorder: Recorder, run: Run, clip: int, tell: Callable[[int], None]) -> Ints:
    """Make and record a clip; its token ids `[frames, P]`."""
    ids = []
    with recorder.watch(run.decoder, clip):
        for result in run.results():
            ids.append(result.ids[0].numpy().astype(np.int32))
            tell(len(ids))
    return np.stack(ids)


def _first(decoders: Sequence[Decoder], prompts: Sequence[str]) -> Decoder:
    """The first one, if all have as much text: a trace has one length of it."""
    text = decoders[0].caches[0].text[0]
    for prompt, decoder in zip(prompts, decoders, strict=True):
        own = decoder.caches[0].text[0]
        if own != text:
            raise InvalidSetting(
                f"prompt {prompt!r} has {own} tokens of text, expected {text} as the first one: "
                "record prompts of different lengths apart"
            )
    return decoders[0]


def scenes(
    clips: int, *, with_image: bool = False, seed: int = 0
) -> tuple[list[str], list[Image.Image] | None]:
    """Prompts of the truth table's first scenes, and their first frames if asked for."""
    from packcache.digits import world
    from packcache.digits.prompts import prompt
    from packcache.evaluate.table import cases

    chosen = [case.scene for case in cases(clips, seed)]
    pictures = [Image.fromarray(world.render(scene, 1)[0]) for scene in chosen if with_image]
    return [prompt(scene) for scene in chosen], pictures or None
