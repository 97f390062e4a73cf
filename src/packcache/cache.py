"""FrameCache: timeline, policy and stores of one clip; the one object a model sees.

    cache = FrameCache(PackCache(), layers=6, kv_heads=3, head_dim=64, layout=layout, text=(13, 3))
    cache.open(Span.text(13)); forward; cache.commit()              # once
    cache.open(Span.of_frame(Role.HISTORY, 0, layout))              # a latent frame begins
    forward; cache.rollback()                                       # any number of drafts
    forward; cache.commit(visible=..., ids=...)                     # the one forward that stays

During a forward the attention calls `update(layer, k, v, branch)` and attends to what it returns,
without a mask: everything held and the open frame itself. Tokens leave only inside `commit`.
Where `asks` is true it then shows `observe` its queries, for a policy that goes by scores.
Sources: DESIGN 2, 3, 4 and 6; lumos1-spec 4.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packcache.errors import CacheStateError, InvalidSetting
from packcache.policies import Policy
from packcache.positions import AnchorKeys, PositionMode, RebaseRule, Rotation, rebase_delta
from packcache.scores import QueryWatch
from packcache.selectors import Scores
from packcache.store import KVStore
from packcache.timeline import FrameLayout, HeldFrame, Ints, Role, Span, Timeline

__all__ = ["FrameCache", "TrainedRangeWarning"]

#: An unbounded cache grows by this many latent frames, or by a quarter if that is more.
_GROWTH = 16


class TrainedRangeWarning(UserWarning):
    """Window and sinks together leave the temporal range the model was trained on."""


class FrameCache:
    """A bounded KV cache for video that is generated latent frame by latent frame.

    Args:
        policy: which tokens stay at a commit.
        layers, kv_heads, head_dim, dtype, device: of the K/V it holds.
        layout: the token layout of a latent frame.
        text: prefix tokens of each branch, the conditional one first, e.g. (13, 3) or (13,).
            Everything after the prefix is shared: timeline, kept set, rebase.
        visible_tokens: tokens of a committed frame that are not re-masked (default: all).
        rotation: needed for `positions="rebase"`; None is allowed with "absolute" only.
        positions: "absolute", or "rebase" to advance the anchors (DESIGN 4.5).
        rebase: "trained" as far as the trained range demands, "slide" at every slide (the paper).
        trained_latent_frames: F, the longest clip the model saw; None never rebases.
        latent_frames: how long the clip will be, if known: an unbounded policy then reserves
            that much at once instead of growing.

    Raises InvalidSetting for a budget that does not fit the window; warns `TrainedRangeWarning`.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        layout: FrameLayout,
        text: Sequence[int],
        visible_tokens: int | None = None,
        rotation: Rotation | None = None,
        positions: PositionMode = "rebase",
        rebase: RebaseRule = "trained",
        trained_latent_frames: int | None = None,
        latent_frames: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_modes(positions, rebase, rotation)
        self.policy, self.layout, self.text = policy, layout, tuple(text)
        moves = positions == "rebase" and (rebase == "slide" or trained_latent_frames is not None)
        self.rotation = rotation if moves else None
        self.positions: PositionMode = positions
        self.rebase: RebaseRule = rebase
        self.trained_latent_frames = trained_latent_frames
        self.latent_frames = latent_frames
        self.timeline = Timeline()
        self.stores = [
            KVStore(layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device=device)
            for _ in self.text
        ]
        self.token_bytes = self.stores[0].slot_bytes * len(self.stores)
        self.budget = policy.budget_for(layout.tokens, visible_tokens, self.token_bytes)
        self.delta = 0
        self._open: list[Span] = []
        score = policy.asks
        self._watch = None if score is None else QueryWatch(score, layers=layers, device=device)
        self._anchors: list[AnchorKeys] = []
        if self.rotation is not None:
            self._anchors = [AnchorKeys(self.rotation) for _ in self.stores]
            self._warn_if_out_of_range()

    # --- what a model calls -----------------------------------------------------------------

    def open(self, *spans: Span) -> None:
        """Begin a text prefix, a latent frame, or a chunk of frames; rebases the anchors if due."""
        if self._open:
            raise CacheStateError(f"{_name(self._open)} is still open: commit it first")
        if not spans:
            raise CacheStateError("open() needs at least one span")
        self._check_order(spans)
        self._open = list(spans)
        if spans[0].layout is not None:
            self._advance_anchors(spans[0].frame)
        for branch, store in enumerate(self.stores):
            draft = sum(self._tokens(span, branch) for span in spans)
            store.reserve(self._capacity(store, draft, spans[0].role))
            store.open(draft)
        if self._watch:
            self._watch.begin([(self._tokens(span, 0), span.layout) for span in spans])

    def update(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        branch: int = 0,
        *,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Write the open frame's K and V `[H, L, D]`; returns views `[H, S + L, D]` to attend to.

        Keys are given already rotated by their absolute position. With `rows` (int64 `[n]`, offsets
        into the frame) only those are given, `[H, n, D]`; the others are as the forward before left
        them, which must have written all. A commit needs a forward of all rows.
        """
        if not self._open:
            raise CacheStateError("update without an open frame: call open(span) first")
        return self.stores[branch].update(layer, keys, values, rows)

    def extend(
        self, layer: int, keys: Tensor, values: Tensor, branch: int = 0
    ) -> tuple[Tensor, Tensor]:
        """As `update`, for the next `n` tokens of the open frame: K and V `[H, n, D]`.

        For models that make a frame token by token: the views end with what was given so far.
        """
        if not self._open:
            raise CacheStateError("extend without an open frame: call open(span) first")
        return self.stores[branch].extend(layer, keys, values)

    def observe(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, branch: int = 0
    ) -> None:
        """Show what a layer attends with: queries `[H, L, D]`, and what `update` returned for them.

        Only where `asks` is true, in every layer. The conditional branch counts, the one that every
        model has: the kept set is shared, and one branch's scores cost half of two's.
        """
        if self._watch and branch == 0:
            self._watch.see(layer, queries, keys, values)

    def shorten(self, tokens: int) -> None:
        """Take back the last tokens that `extend` was given."""
        for store in self.stores:
            store.shorten(tokens)

    def select_heads(self, heads: Tensor) -> None:
        """Hold these heads (int64 `[n]`, of any number, some perhaps twice), in this order.

        Where a batch lies in the heads, these are its rows.
        """
        for store in self.stores:
            store.select_heads(heads)
        for anchors in self._anchors:
            anchors.select_heads(heads)
        if self._watch:
            self._watch.forget()  # other heads were seen
        self.token_bytes = self.stores[0].slot_bytes * len(self.stores)

    def rollback(self) -> None:
        """Forget the draft; the frame stays open for the next forward."""
        for store in self.stores:
            store.rollback()

    def close(self) -> None:
        """Abandon the open frame: nothing of it stays, another may be opened."""
        self.rollback()
        self._end()

    def commit(self, *, visible: NDArray[np.bool_] | None = None, ids: Ints | None = None) -> None:
        """The last forward stays, then the policy evicts; `visible`, `ids` as in `Span.of_frame`.

        With several open spans give `visible` and `ids` to the spans themselves.
        """
        if not self._open:
            raise CacheStateError("commit without an open frame: call open(span) first")
        if not all(store.complete for store in self.stores):
            raise CacheStateError(
                f"commit of {_name(self._open)} without a forward of every layer and branch since "
                "the last rollback: run the commit forward first"
            )
        ranked = self._ranked([_completed(span, visible, ids) for span in self._open])
        for store in self.stores:
            store.commit()
        for span, rank in ranked:
            self.timeline.append(span, rank)
        self._end()
        self._evict()
        self._remember_pristine()

    def rewind(self, frame: int) -> None:
        """Forget every latent frame from `frame` on; what is held of earlier ones stays as it is.

        For hosts that encode their last frames again, after a switch of prompts for example.
        """
        if self._open:
            raise CacheStateError(f"{_name(self._open)} is still open: commit or close it first")
        if not 0 <= frame <= self.timeline.num_frames:
            raise InvalidSetting(
                f"rewind to latent frame {frame}, expected 0 to {self.timeline.num_frames}, those "
                "that were committed"
            )
        if frame == self.timeline.num_frames:
            return
        stay = [
            slot
            for entry, where in self.timeline.slots()
            if entry.span.layout is None or entry.span.frame < frame
            for slot in where
        ]
        self.timeline.rewind(frame, stay, self.text[0] + frame * self.layout.tokens)
        self._keep(stay)
        for length, anchors in zip(self.text, self._anchors, strict=False):
            anchors.forget(self._fixed() - self.text[0] + length)

    # --- out of memory and back -------------------------------------------------------------

    def export(self, entry: HeldFrame) -> list[Tensor]:
        """K and V `[H, n, D]` of what an entry holds, as committed: branch, layer, K then V.

        Views, so take what you need before the next `open`. Raises CacheStateError for an anchor
        or a sink that a rebase has turned.
        """
        if self.delta and (entry.span.role.is_anchor or self.policy.is_sink(self.timeline, entry)):
            raise CacheStateError(
                f"{_name([entry.span])} was advanced by {self.delta} latent frames, expected as "
                "committed: export anchors and sinks before the first rebase"
            )
        where = next(where for held, where in self.timeline.slots() if held is entry)
        views: list[Tensor] = []
        for length, store in zip(self.text, self.stores, strict=True):
            shift = self.text[0] - length  # the text lies at the front, shorter by that much
            own = slice(max(0, where.start - shift), where.stop - shift)
            views += [tensor[:, own] for pair in store for tensor in pair]
        return views

    def restore(
        self,
        timeline: Timeline,
        tensors: Iterable[Tensor],
        *,
        delta: int,
        capacities: Sequence[int],
    ) -> None:
        """Hold what another cache held, to the last bit; this one must be new.

        `tensors` are those of `export`, entry by entry of the timeline, only tokens still held;
        `delta` and `capacities` are the other's.
        """
        if self._open or self.logical_length:
            raise CacheStateError(f"restore after {self.logical_length} tokens: make a new cache")
        coming = iter(tensors)
        for store, capacity in zip(self.stores, capacities, strict=True):
            store.reserve(capacity)
        for entry in timeline.entries:
            for length, store in zip(self.text, self.stores, strict=True):
                store.open(length if entry.span.role is Role.TEXT else entry.count)
                for layer in range(store.layers):
                    store.update(layer, next(coming), next(coming))
                store.commit()
        self.timeline = timeline
        self._remember_pristine()
        self._turn_anchors(delta)

    @property
    def capacities(self) -> list[int]:
        """Slots allocated in each branch."""
        return [store.capacity for store in self.stores]

    # --- what anyone may ask ----------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.stores[0].dtype

    @property
    def is_open(self) -> bool:
        """Is a frame open?"""
        return bool(self._open)

    @property
    def asks(self) -> bool:
        """Does the policy need the queries of what is open? Then show them to `observe`."""
        return self._watch is not None and self._watch.is_due

    @property
    def is_complete(self) -> bool:
        """Is a frame open that every layer and branch has written whole?"""
        return self.is_open and all(store.complete for store in self.stores)

    @property
    def opened(self) -> int:
        """Tokens of what is open, conditional branch."""
        return self.stores[0].draft

    @property
    def begun(self) -> int:
        """Of these, tokens that every layer was given by `extend`."""
        return min(store.begun for store in self.stores)

    @property
    def logical_length(self) -> int:
        """Tokens ever committed, conditional branch."""
        return self.timeline.logical_length

    @property
    def physical_length(self) -> int:
        """Tokens held, conditional branch."""
        return self.timeline.physical_length

    @property
    def kv_bytes(self) -> int:
        """Bytes of the committed tokens' K and V, all branches, pristine anchor copies included."""
        held = sum(store.length * store.slot_bytes for store in self.stores)
        return held + self._anchor_bytes()

    @property
    def capacity_bytes(self) -> int:
        """Bytes allocated."""
        held = sum(store.capacity * store.slot_bytes for store in self.stores)
        return held + self._anchor_bytes()

    def summary(self) -> dict[str, Any]:
        """Plain numbers: lengths, bytes, tokens kept per history frame, rebase."""
        return {
            "policy": repr(self.policy),
            "logical_length": self.logical_length,
            "physical_length": self.physical_length,
            "latent_frames": self.timeline.num_frames,
            "kept": self.timeline.counts(),
            "budget_tokens": self.budget,
            "kv_bytes": self.kv_bytes,
            "capacity_bytes": self.capacity_bytes,
            "metadata_bytes": self.timeline.metadata_bytes,
            "rebase_frames": self.delta,
        }

    # --- inside -----------------------------------------------------------------------------

    def _tokens(self, span: Span, branch: int) -> int:
        return self.text[branch] if span.role is Role.TEXT else span.tokens

    def _capacity(self, store: KVStore, draft: int, role: Role) -> int:
        """Slots to reserve: all that a bounded policy or a known clip needs, or room to grow."""
        needed = store.length + draft
        if needed <= store.capacity or role.is_anchor:
            return needed
        rest = None
        if self.latent_frames is not None:
            left = self.latent_frames - self.timeline.num_frames - len(self._open)
            rest = needed + left * self.layout.tokens if left >= 0 else None
        bound = self.policy.max_history(self.layout.tokens, self.budget)
        if bound is None:
            grown = needed + max(_GROWTH * self.layout.tokens, store.length // 4)
            return grown if rest is None else rest
        anchors = store.length - sum(self.timeline.counts().values())
        most = max(needed, anchors + bound + draft)
        return most if rest is None else min(most, rest)

    def _check_order(self, spans: Sequence[Span]) -> None:
        """Text first and once, then latent frames in order: checked before anything is written."""
        frame, length = self.timeline.num_frames, self.timeline.logical_length
        for span in spans:
            if span.role is Role.TEXT and span.tokens != self.text[0]:
                raise InvalidSetting(f"text has {span.tokens} tokens, expected {self.text[0]}")
            if length > 0 if span.role is Role.TEXT else length < self.text[0]:
                raise CacheStateError(
                    f"{_name([span])} was opened after {length} tokens, expected a text prefix of "
                    f"{self.text[0]} tokens first, once, then latent frames"
                )
            if span.layout is not None and span.frame != frame:
                raise CacheStateError(
                    f"latent frame {span.frame} was opened, expected frame {frame}: "
                    "frames come in order, each once"
                )
            frame += span.layout is not None
            length += span.tokens

    def _ranked(self, spans: Sequence[Span]) -> list[tuple[Span, Ints | None]]:
        """Each new span with its order; the order may look at the frame before, and at scores."""
        frames = [e.span for e in self.timeline.entries if e.span.layout is not None]
        before = [frames[-1] if frames else None, *spans]
        known = [None if last is None or last.layout is None else last for last in before]
        scores = self._scores(spans)
        return [
            (span, self.policy.rank(span, last, *scores.get(span.frame, ())))
            for last, span in zip(known, spans, strict=False)
        ]

    def _scores(self, spans: Sequence[Span]) -> dict[int, tuple[Scores]]:
        """By latent frame, what a policy that asks is told of it; no entry for any other policy."""
        frames = [span for span in spans if span.layout is not None]
        if self._watch is None or not frames:
            return {}
        if self.stores[0].device.type == "meta":  # of a plan: sizes only
            scores = [np.zeros(span.tokens) for span in frames]
        else:
            scores = self._watch.scores()
        return {span.frame: (own,) for span, own in zip(frames, scores, strict=True)}

    def _end(self) -> None:
        """Nothing is open any more."""
        self._open = []
        if self._watch:
            self._watch.begin([])  # it looks at the stores' tensors, which may now move

    def _evict(self) -> None:
        slots = self.policy.plan(self.timeline, self.budget)
        if len(slots) == self.physical_length:
            return
        self.timeline.keep(slots)
        self._keep(slots)

    def _keep(self, slots: Sequence[int]) -> None:
        """Hold these slots only, counted in the conditional branch, in the stores of all."""
        kept = np.asarray(slots, dtype=np.int32)
        for length, store in zip(self.text, self.stores, strict=True):
            shift = self.text[0] - length  # this branch has that many text tokens less
            text = np.arange(length, dtype=np.int32)
            store.keep(np.concatenate((text, kept[self.text[0] :] - shift)))

    def _advance_anchors(self, frame: int) -> None:
        """Turn anchors and sinks to where rebase says, each from its pristine copy."""
        if not self._anchors:
            return
        sinks, rest = self._split_history()
        delta = rebase_delta(
            frame=frame,
            oldest_distance=frame - rest[-1].span.frame if rest else 0,
            sinks=len(sinks),
            trained_latent_frames=self.trained_latent_frames,
            rule=self.rebase,
            image_frames=sum(e.span.role is Role.IMAGE for e in self.timeline.entries),
        )
        self._turn_anchors(delta)

    def _turn_anchors(self, delta: int) -> None:
        if delta == self.delta:
            return
        self.delta = delta
        for anchors, store in zip(self._anchors, self.stores, strict=True):
            anchors.advance([store.keys(i) for i in range(store.layers)], delta)

    def _remember_pristine(self) -> None:
        """Copy the temporal channels of new anchors and sinks: the head of the sequence."""
        for length, anchors, store in zip(self.text, self._anchors, self.stores, strict=False):
            count = self._fixed() - self.text[0] + length
            anchors.remember([store.keys(i)[:, :count] for i in range(store.layers)])

    def _fixed(self) -> int:
        """Tokens held of anchors and sinks, conditional branch."""
        sinks, _ = self._split_history()
        return sum(entry.count for entry in (*self.timeline.anchors, *sinks))

    def _split_history(self) -> tuple[list[HeldFrame], list[HeldFrame]]:
        """Sinks and the other history frames, newest first."""
        history = self.timeline.history
        sinks = [e for e in history if self.policy.is_sink(self.timeline, e)]
        return sinks, [e for e in history if not self.policy.is_sink(self.timeline, e)]

    def _anchor_bytes(self) -> int:
        return sum(anchors.nbytes for anchors in self._anchors)

    def _warn_if_out_of_range(self) -> None:
        trained, reach = self.trained_latent_frames, self.policy.reach
        bounded = self.policy.max_history(self.layout.tokens, self.budget) is not None
        if trained is None or not bounded:
            return
        held = None if reach is None else reach + self.policy.num_sinks
        if held is None or held > trained - 2:
            warnings.warn(
                f"{self.policy!r} holds {'any number of' if held is None else held} latent frames "
                f"of history, but the model was trained on {trained} latent frames, which leaves "
                f"room for {trained - 2} beside the image and the current one: later frames leave "
                "the trained range whatever is rebased; use a smaller window or fewer sinks",
                TrainedRangeWarning,
                stacklevel=3,
            )


def _check_modes(mode: PositionMode, rule: RebaseRule, rotation: Rotation | None) -> None:
    for name, value, known in (("positions", mode, PositionMode), ("rebase", rule, RebaseRule)):
        if value not in get_args(known):
            raise InvalidSetting(f"{name} is {value!r}, expected {' or '.join(get_args(known))}")
    if mode == "rebase" and rotation is None:
        raise InvalidSetting(
            "positions='rebase' must know the rotary pairs that carry time: give rotation=..., "
            "or use positions='absolute'"
        )


def _completed(span: Span, visible: NDArray[np.bool_] | None, ids: Ints | None) -> Span:
    """The span with what only the commit knows."""
    if span.layout is None or (visible is None and ids is None):
        return span
    known = {"visible": visible, "ids": ids}
    return Span.of_frame(
        span.role,
        span.frame,
        span.layout,
        **{k: getattr(span, k) if v is None else v for k, v in known.items()},
    )


def _name(spans: Sequence[Span]) -> str:
    return "text" if spans[0].layout is None else f"latent frame {spans[0].frame}"
