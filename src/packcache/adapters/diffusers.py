"""diffusers' Wan-type transformers, chunk by chunk over a bounded cache, without a fork.

    cache = install(transformer, PackCache(budget=3, window=9))
    for latents in chunks:
        for t in timesteps:
            with cache.frame():                       # a draft
                noise = transformer(latents, t, text).sample
            ...
        with cache.frame(commit=True):                # the forward that stays, with clean latents
            transformer(latents, zero, text)

Outside of `frame()` the transformer is the one it was, bit for bit. Inside, self-attention sees
what the cache holds and the chunk itself, the rotary embedding counts on from the frames committed,
and nothing else is changed: the attention back end that was chosen is used. `branch=` names the
halves of guidance, each with a cache of its own. `uninstall()` puts every object back.

A policy that goes by scores is shown the queries of the forward that stays, those of drafts are
not: nothing of a draft is left. The branch that runs first leads, all others keep the same tokens;
of a batch, all rows count alike.

Chunks are causal only if the weights were trained so (Self-Forcing, CausVid and the like in Wan
layout): bidirectional weights run, exactly, and make poor video.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from packcache.adapters.scored import SharedOrder
from packcache.adapters.shapes import check_same, frame_spans, heads_first, heads_last
from packcache.cache import FrameCache
from packcache.errors import CacheStateError, InvalidSetting
from packcache.policies import Policy
from packcache.positions import PositionMode, Rotation
from packcache.timeline import FrameLayout, Role

try:
    from diffusers.models.attention_dispatch import dispatch_attention_fn
except ImportError:  # pragma: no cover - the extra is not installed
    raise InvalidSetting(
        "packcache.adapters.diffusers needs diffusers: pip install 'packcache[diffusers]'"
    ) from None

__all__ = ["MODELS", "Installed", "install"]

#: Transformers that were checked, by class name.
MODELS = ("SkyReelsV2Transformer3DModel", "WanTransformer3DModel")


def install(
    transformer: Any,
    policy: Policy,
    *,
    positions: PositionMode = "absolute",
    trained_latent_frames: int | None = None,
    image_frames: int = 0,
) -> Installed:
    """Put a cache into a transformer; it stays off until a `frame()` is opened.

    Args:
        transformer: one of `MODELS`.
        policy: which tokens stay.
        positions, trained_latent_frames: as for `FrameCache`.
        image_frames: of these first latent frames, condition images, no token ever leaves.

    Raises InvalidSetting for another model, or if there is a cache in it already.
    """
    name = type(transformer).__name__
    if name not in MODELS:
        raise InvalidSetting(
            f"{name} is not supported: known are {', '.join(MODELS)}; for another model see "
            "docs/adapters.md"
        )
    if isinstance(transformer.rope, _Rope):
        raise InvalidSetting("there is a cache in this transformer already: uninstall() it first")
    if image_frames < 0:
        raise InvalidSetting(f"image_frames is {image_frames}, expected at least 0")
    return Installed(transformer, policy, positions, trained_latent_frames, image_frames)


class Installed:
    """A cache in a transformer: `frame()` runs it, `uninstall()` takes it out."""

    def __init__(
        self,
        transformer: Any,
        policy: Policy,
        positions: PositionMode,
        trained_latent_frames: int | None,
        image_frames: int,
    ) -> None:
        self.transformer, self.policy, self.image_frames = transformer, policy, image_frames
        self.caches: dict[str, FrameCache] = {}
        self._order = SharedOrder(policy)
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._layout: FrameLayout | None = None
        self._branch: str | None = None  # None: off
        self._stays = False  # does the forward that is run?
        self._frames = 0  # latent frames of the chunk that is run
        self._rope = _Rope(transformer.rope, self)
        self._settings: dict[str, Any] = {
            "positions": positions, "trained_latent_frames": trained_latent_frames,
            "rotation": self._rope.rotation() if positions == "rebase" else None,
        }  # fmt: skip
        self._attentions = [block.attn1 for block in transformer.blocks]
        for layer, attention in enumerate(self._attentions):
            attention.processor = _Processor(attention.processor, self, layer)
        transformer.rope = self._rope

    def uninstall(self) -> None:
        """Put every object back where it was; a back end chosen meanwhile is kept."""
        if self.transformer.rope is not self._rope:
            raise CacheStateError("this cache is not in the transformer any more")
        if self._branch is not None:
            raise CacheStateError("a frame is open: leave it before uninstall()")
        for attention in self._attentions:
            attention.processor = attention.processor.restored()
        self.transformer.rope = self._rope.inner

    def reset(self) -> None:
        """Forget the clip, in every branch."""
        if self._branch is not None:
            raise CacheStateError("a frame is open: leave it before reset()")
        self.caches, self._sizes, self._layout = {}, {}, None
        self._order = SharedOrder(self.policy)

    @contextlib.contextmanager
    def frame(self, *, commit: bool = False, branch: str = "cond") -> Iterator[FrameCache | None]:
        """The forward inside is one of the next latent frames; with `commit` it stays.

        How many frames they are follows from the latents. Without `commit` nothing of it is left,
        and the next one is of the same frames.
        """
        if self.transformer.rope is not self._rope:
            raise CacheStateError("this cache is not in the transformer any more")
        if self._branch is not None:
            raise CacheStateError("a frame is open already: leave it before the next one")
        self._branch, self._stays, self._frames = branch, commit, 0
        try:
            yield self.caches.get(branch)
            if not self._frames:
                raise CacheStateError("a frame was left without a forward: run the transformer")
            if commit:
                self._order.begin(branch)
                self.caches[branch].commit()
        finally:
            cache = self.caches.get(branch)
            if cache is not None and cache.is_open:
                cache.close()
            self._branch = None

    # --- what the pieces ask ------------------------------------------------------------------

    @property
    def is_on(self) -> bool:
        """Is a frame open?"""
        return self._branch is not None

    def begin(self, frames: int, rows: int, cols: int) -> int:
        """A forward of so many latent frames begins; returns the number of the first one."""
        layout = FrameLayout(rows=rows, cols=cols, header=0, footer=0, new_line=False)
        known = self._layout or layout
        if known != layout:
            raise InvalidSetting(
                f"a latent frame has {rows} x {cols} tokens, and had {known.rows} x {known.cols}: "
                "reset() before another clip"
            )
        self._layout, self._frames = layout, frames
        cache = self.caches.get(str(self._branch))
        return 0 if cache is None else cache.timeline.num_frames

    def attend_to(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V `[B, n, H, D]` of a layer; returns all there is to attend to."""
        branch = str(self._branch)
        if layer == 0:
            self._open(branch, k)
        cache = self.caches[branch]
        keys, values = cache.update(layer, heads_first(k), heads_first(v))
        return heads_last(keys, len(k)), heads_last(values, len(v))

    def show(self, layer: int, q: Tensor, keys: Tensor, values: Tensor) -> None:
        """Queries `[B, n, H, D]` of a layer and what they attend to, if the policy asks."""
        cache = self.caches[str(self._branch)]
        if self._stays and cache.asks:
            cache.observe(layer, heads_first(q), heads_first(keys), heads_first(values))

    def _open(self, branch: str, k: Tensor) -> None:
        """Open the chunk, or the same once more; nothing is changed where it does not fit."""
        assert self._layout is not None  # the rotary embedding runs before the first layer
        if k.shape[1] != self._frames * self._layout.tokens:
            raise InvalidSetting(
                f"{k.shape[1]} tokens are not {self._frames} latent frames of "
                f"{self._layout.tokens}: the transformer packs them in another way"
            )
        sizes = k.shape[0], k.shape[2], k.shape[3]
        cache = self.caches.get(branch)
        if cache is None:
            cache = self.caches[branch] = self._make(self._order.of(branch), k)
            self._sizes[branch] = sizes
        else:
            check_same(sizes, k.dtype, self._sizes[branch], cache.dtype)
        if cache.is_open:
            cache.close()
        first = cache.timeline.num_frames
        numbers, roles = range(first, first + self._frames), [Role.IMAGE] * self.image_frames
        cache.open(*frame_spans(numbers, self._layout, roles))

    def _make(self, policy: Policy, k: Tensor) -> FrameCache:
        assert self._layout is not None
        return FrameCache(
            policy, layers=len(self._attentions), kv_heads=k.shape[0] * k.shape[2],
            head_dim=k.shape[3], layout=self._layout, text=(0,), dtype=k.dtype, device=k.device,
            **self._settings,
        )  # fmt: skip


class _Processor:
    """Self-attention over the cache; off, the processor that was there.

    diffusers sets the two private attributes on whatever processor it finds.
    """

    def __init__(self, inner: Any, owner: Installed, layer: int) -> None:
        self.inner, self.owner, self.layer = inner, owner, layer
        self._attention_backend = inner._attention_backend
        self._parallel_config = inner._parallel_config

    def restored(self) -> Any:
        """The processor that was there, with the back end of this one."""
        self.inner._attention_backend = self._attention_backend
        self.inner._parallel_config = self._parallel_config
        return self.inner

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if not self.owner.is_on:
            own = self.restored()
            return own(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        q, k, v = self._projected(attn, hidden_states)
        if rotary_emb is not None:
            q, k = _rotated(q, *rotary_emb), _rotated(k, *rotary_emb)
        keys, values = self.owner.attend_to(self.layer, k, v)
        self.owner.show(self.layer, q, keys, values)
        out = dispatch_attention_fn(
            q, keys, values, attn_mask=None, dropout_p=0.0, is_causal=False,
            backend=self._attention_backend, parallel_config=self._parallel_config,
        )  # fmt: skip
        out = attn.to_out[0](out.flatten(2, 3).type_as(q))
        return attn.to_out[1](out)

    @staticmethod
    def _projected(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed queries and keys, and values, `[B, n, H, D]`."""
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in (q, k, v))
        return q, k, v


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2m, 2m + 1) of `[B, n, H, D]` turned; each angle stands twice in the tables."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


class _Rope(nn.Module):
    """The rotary embedding that was there, counting on from the frames that are committed."""

    inner: Any  # of the two classes of `MODELS`, which are alike

    def __init__(self, inner: nn.Module, owner: Installed) -> None:
        super().__init__()
        self.inner = inner
        self._owner = [owner]  # in a list, since an attribute would make it a part of the model
        self._kept: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        owner = self._owner[0]
        if not owner.is_on:
            return self.inner(hidden_states)
        shape, patch = hidden_states.shape, self.inner.patch_size
        frames, rows, cols = (shape[2 + axis] // patch[axis] for axis in range(3))
        first = owner.begin(frames, rows, cols)
        asked = first, frames, rows, cols, hidden_states.device
        if self._kept is None or self._kept[0] != asked:
            self._kept = asked, self._from(first, frames * rows * cols, hidden_states)
        return self._kept[1]

    def _from(self, first: int, tokens: int, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of latent frames from `first` on: the tail of what more frames would have."""
        batch, channels, length, height, width = hidden_states.shape
        longer = length + first * self.inner.patch_size[0]
        limit = len(self.inner.freqs_cos) * self.inner.patch_size[0]
        if longer > limit:
            raise InvalidSetting(
                f"latent frame {longer - 1} lies behind the {limit} that the rotary embedding has: "
                "make the transformer with a larger rope_max_seq_len"
            )
        asked = torch.empty(1, device="meta").expand(batch, channels, longer, height, width)
        cos, sin = self.inner(asked)
        return cos[:, -tokens:], sin[:, -tokens:]

    def rotation(self) -> Rotation:
        """Which pairs carry time, and how fast."""
        time = int(self.inner.t_dim)
        cos, sin = (
            table[1, :time:2].double() for table in (self.inner.freqs_cos, self.inner.freqs_sin)
        )
        pairs = torch.arange(time // 2, device=cos.device)
        return Rotation(pairs=pairs, freq=torch.atan2(sin, cos), stride=1, interleaved=True)
