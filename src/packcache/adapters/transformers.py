"""transformers' visual generators: a `Cache` for `past_key_values`, also through `generate()`.

    cache = make_cache(model, PackCache(), tokens_per_frame=4084)
    model.generate(ids, past_key_values=cache, ...)

Emu3 and Chameleon make a picture or a video token by token: text, then latent frame after latent
frame. Positions follow the logical length (tokens ever given), masks the physical one (tokens
held), and tokens leave only between two forwards, once a latent frame is whole (plugpoints 1.2).
All of the history is visible, so no mask is needed for it and holes in it do no harm.

With `staged=True` a latent frame is forwarded as often as wanted, each time over the one before,
and stays when `commit()` is called: for models that denoise a frame (plugpoints 2).

Keys are held as the model rotated them; these models turn by a 1-D index, so nothing is rebased.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from packcache.adapters.scored import refuse_scores
from packcache.adapters.shapes import check_same, frame_spans
from packcache.cache import FrameCache
from packcache.errors import CacheStateError, InvalidSetting
from packcache.policies import Policy
from packcache.timeline import FrameLayout, Role, Span

try:
    from transformers.cache_utils import Cache, CacheLayerMixin
except ImportError:  # pragma: no cover - the extra is not installed
    raise InvalidSetting(
        "packcache.adapters.transformers needs transformers 5: pip install 'packcache[hf]'"
    ) from None

__all__ = ["MODELS", "PackedCache", "PackedLayer", "make_cache"]

#: Models that were checked, by class name.
MODELS = (
    "ChameleonForConditionalGeneration", "ChameleonModel",
    "Emu3ForCausalLM", "Emu3ForConditionalGeneration", "Emu3Model", "Emu3TextModel",
)  # fmt: skip


def make_cache(
    model: nn.Module,
    policy: Policy,
    tokens_per_frame: int | FrameLayout,
    *,
    roles: Sequence[Role] = (),
    text_tokens: int | None = None,
    staged: bool = False,
) -> PackedCache:
    """A cache for one clip of a model, or of as many as the batch has.

    Args:
        model: one of `MODELS`.
        policy: which tokens stay; none that goes by scores, for `Cache.update` sees no queries.
        tokens_per_frame: tokens of a latent frame in the sequence, separators included; or how they
            lie, for the order in which they are given up.
        roles: of the first latent frames, `Role.IMAGE` for a condition image; all others are
            history. Images come with the prompt.
        text_tokens: of the prompt, all in front of the first latent frame [what the first forward
            brings beside images].
        staged: see above; otherwise every token that is forwarded stays.
    """
    name = type(model).__name__
    if name not in MODELS:
        raise InvalidSetting(
            f"{name} is not supported: known are {', '.join(MODELS)}; for another model see "
            "docs/adapters.md"
        )
    refuse_scores(policy, "transformers")
    layout = _layout(tokens_per_frame)
    if text_tokens is not None and text_tokens < 1:
        raise InvalidSetting(f"text_tokens is {text_tokens}, expected at least 1")
    return PackedCache(
        _decoder(model), policy, layout, roles=tuple(roles), text_tokens=text_tokens, staged=staged
    )


def _layout(tokens_per_frame: int | FrameLayout) -> FrameLayout:
    if isinstance(tokens_per_frame, FrameLayout):
        return tokens_per_frame
    if isinstance(tokens_per_frame, bool) or tokens_per_frame < 1:
        raise InvalidSetting(f"tokens_per_frame is {tokens_per_frame}, expected at least 1")
    return FrameLayout(rows=1, cols=tokens_per_frame, header=0, footer=0, new_line=False)


def _decoder(model: nn.Module) -> nn.Module:
    """The module that runs the layers and is given the cache."""
    return next(module for module in model.modules() if hasattr(module, "layers"))


class PackedCache(Cache):
    """All layers' K and V, packed at the end of each latent frame; made by `make_cache`."""

    def __init__(
        self,
        decoder: nn.Module,
        policy: Policy,
        layout: FrameLayout,
        *,
        roles: tuple[Role, ...],
        text_tokens: int | None,
        staged: bool,
    ) -> None:
        count = len(decoder.layers)  # type: ignore[arg-type]
        super().__init__(layers=[PackedLayer(self, index) for index in range(count)])
        self.policy, self.layout, self.roles, self.staged = policy, layout, roles, staged
        self.text_tokens = text_tokens
        self._held: FrameCache | None = None
        self._sizes = 0, 0, 0  # B, H, D
        self._is_running = False
        _watch(decoder, self)

    @property
    def held(self) -> FrameCache:
        """The cache behind it, of `B * H` heads; CacheStateError before the first forward."""
        if self._held is None:
            raise CacheStateError("nothing was cached yet: run the model once")
        return self._held

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of the tokens held, drafts left out."""
        if self._held is None:
            return 0
        return self._held.kv_bytes + self.begun * self._held.token_bytes

    def commit(self) -> None:
        """The latent frame that is whole stays. Staged caches need it, others do it themselves."""
        if self._held is None or not self._held.is_open:
            raise CacheStateError("commit without a forward: run the model on a frame first")
        self._held.commit()

    def frame_mask(self, tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A 4-D mask `[1, 1, tokens, held + tokens]` under which a frame sees all of itself."""
        length, _ = self.mask_sizes(tokens)
        return torch.zeros(1, 1, tokens, length, dtype=dtype)

    # --- what the layers ask ------------------------------------------------------------------

    @property
    def begun(self) -> int:
        """Tokens of the open frame that count as given."""
        return 0 if self._held is None or self.staged else self._held.begun

    @property
    def logical_length(self) -> int:
        """Tokens ever given, drafts left out."""
        return 0 if self._held is None else self._held.logical_length + self.begun

    @property
    def physical_length(self) -> int:
        """Tokens held, drafts left out."""
        return 0 if self._held is None else self._held.physical_length + self.begun

    def mask_sizes(self, tokens: int) -> tuple[int, int]:
        """Keys in the next forward, and how many tokens were left out in front of them."""
        self._settle()
        return self.physical_length + tokens, self.logical_length - self.physical_length

    def take(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V `[B, H, n, D]` of a layer; returns all there is to attend to, `[B, H, S, D]`."""
        if not self._is_running:
            raise CacheStateError("this cache was made for another model: make one for each")
        if layer == 0:
            self._place(k)
        write = self.held.update if self.staged else self.held.extend
        keys, values = write(layer, k.flatten(0, 1), v.flatten(0, 1))
        return keys.unflatten(0, (len(k), -1)), values.unflatten(0, (len(v), -1))

    def _settle(self) -> None:
        """Commit what is whole, before a forward looks at sizes: here tokens leave."""
        if self._held is not None and not self.staged and self._held.is_complete:
            self._held.commit()

    def _place(self, k: Tensor) -> None:
        """Open what the next tokens are; nothing is changed where they do not fit."""
        self._check(k)
        self._settle()
        tokens, held = k.shape[2], self._held
        if held is not None and held.is_open:
            if self.staged:
                if tokens == held.opened:
                    return
                held.close()
            elif held.begun + tokens <= held.opened:
                return
            else:
                raise InvalidSetting(
                    f"{tokens} tokens after {held.begun} of {held.opened} cross the end of a "
                    "latent frame: forward the rest of it first"
                )
        spans = self._spans(tokens)
        if held is None:
            held = self._held = self._make(k, spans[0].tokens)
        held.open(*spans)

    def _spans(self, tokens: int) -> list[Span]:
        """The text and its images, or whole latent frames, or the one that tokens begin."""
        size = self.layout.tokens
        images = sum(role is Role.IMAGE for role in self.roles)
        if self._held is None:
            text = tokens - images * size if self.text_tokens is None else self.text_tokens
            rest = max(0, tokens - text)
            if text < 1 or rest % size:
                raise InvalidSetting(
                    f"a prompt of {tokens} tokens is no text of {text} tokens and latent frames of "
                    f"{size}: give text_tokens and tokens_per_frame as they lie in the sequence"
                )
            return [Span.text(text), *self._frames(0, rest // size)]
        first = self._held.timeline.num_frames
        if tokens > size and tokens % size:
            raise InvalidSetting(
                f"{tokens} tokens are no whole latent frames of {size}: forward whole frames, or "
                "tokens of one"
            )
        if self.staged and tokens % size:
            raise InvalidSetting(f"{tokens} tokens are a draft of no whole latent frame of {size}")
        return self._frames(first, max(1, tokens // size))

    def _frames(self, first: int, count: int) -> list[Span]:
        return frame_spans(range(first, first + count), self.layout, self.roles)

    def _make(self, k: Tensor, text: int) -> FrameCache:
        batch, heads, _, size = k.shape
        self._sizes = batch, heads, size
        return FrameCache(
            self.policy, layers=len(self.layers), kv_heads=batch * heads, head_dim=size,
            layout=self.layout, text=(text,), positions="absolute", dtype=k.dtype, device=k.device,
        )  # fmt: skip

    def _check(self, k: Tensor) -> None:
        sizes = k.shape[0], k.shape[1], k.shape[3]
        if self._held is not None:
            check_same(sizes, k.dtype, self._sizes, self._held.dtype)

    # --- the rest of the protocol -------------------------------------------------------------

    def reset(self) -> None:
        """Forget the clip."""
        self._held, self._sizes = None, (0, 0, 0)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (a number <= 0, as in transformers), of the open frame only."""
        if tokens_to_remove > 0:
            raise InvalidSetting(f"crop({tokens_to_remove}), expected a number of at most 0")
        if tokens_to_remove:
            self.held.shorten(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in another order: what a policy holds is the same for all of them."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows of the batch."""
        if self._held is not None:
            batch, heads, size = self._sizes
            rows = torch.arange(batch * heads, device=indices.device).view(batch, heads)[indices]
            self._held.select_heads(rows.flatten())
            self._sizes = len(indices), heads, size

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch so often."""
        rows = torch.arange(self._sizes[0])
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Assisted decoding begins with this. It takes tokens back, whole frames among them."""
        raise InvalidSetting(
            "assisted decoding takes back tokens after a latent frame was packed: generate without "
            "an assistant"
        )

    def begin_forward(self, mask: Any) -> None:
        """The decoder is about to run; refuse what would be silently wrong."""
        first = self._held is None and isinstance(mask, Tensor) and mask.dim() == 2
        if first and bool((mask == 0).any()):
            raise InvalidSetting(
                "left padding: a mask of two dimensions cannot say which tokens are held after "
                "some have left; give prompts of equal length, or one at a time"
            )
        self._is_running = True

    def end_forward(self) -> None:
        self._is_running = False


class PackedLayer(CacheLayerMixin):
    """One layer's part of a `PackedCache`: what transformers asks a layer."""

    def __init__(self, owner: PackedCache, index: int) -> None:
        super().__init__()
        self.owner, self.index = weakref.proxy(owner), index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory is made with the first keys."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.owner.take(self.index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.mask_sizes(query_length)

    def get_seq_length(self) -> int:
        """The logical length: positions count every token that was ever given."""
        return self.owner.logical_length

    def get_max_length(self) -> int:
        return -1


def _watch(decoder: nn.Module, cache: PackedCache) -> None:
    """Tell a cache when its decoder runs, as long as the cache lives."""
    known = weakref.ref(cache)

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = known()
        if cache is not None and kwargs.get("past_key_values") is cache:
            cache.begin_forward(kwargs.get("attention_mask"))

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        cache = known()
        if cache is not None:
            cache.end_forward()

    handles = (
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, with_kwargs=True, always_call=True),
    )
    for handle in handles:
        weakref.finalize(cache, handle.remove)
