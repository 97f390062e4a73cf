"""Deep Forcing: half of the window are sinks; of the old, what is attended to stays (2512.05081).

    >>> DeepSink(frames=4).num_sinks, DeepSink(frames=4).pruned
    (2, 1)

Theirs (from the paper; only a project page was public when this was written): half of a sliding
window are the first frames, kept for good, whose temporal phase is moved to the current timeline
("deep sink"). When the cache is full it is pruned: sinks and the newest frames stay, and of all
tokens between the C are kept that receive most attention, summed over the queries of the newest
frames, q . k without a softmax ("participative compression"). Self Forcing, no training.

Ours, in this cache:
- the sinks are history frames; text and condition image stay beside them, as under every policy.
  Their phase is moved by the rebase of the anchors, as far as its rule says (DESIGN 4.5);
- a frame's tokens are ordered once, when it is committed, by the attention received from queries of
  that frame (order `observed`), and its kept set only shrinks. Theirs are scored again at every
  pruning, by newer queries, and all frames compete for C; here C is shared equally by the
  `candidates` frames behind the newest;
- one set for all layers, heads and branches, so that guidance sees no mismatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from packcache.budget import allocate
from packcache.checks import at_least
from packcache.errors import InvalidSetting
from packcache.selectors import Score, Scores, rank_tokens
from packcache.timeline import HeldFrame, Ints, Span

__all__ = ["DeepSink"]


@dataclass(frozen=True, kw_only=True, repr=False)
class DeepSink:
    """A window of `frames` latent frames: half sinks, `recent` whole, the rest is C tokens.

    `candidates` frames behind the recent ones share C; None: twice as many as C would hold whole.
    """

    frames: int = 4
    recent: int = 1
    candidates: int | None = None

    def __post_init__(self) -> None:
        at_least("frames", self.frames, 2)
        at_least("recent", self.recent, 0)
        if self.pruned < 0:
            raise InvalidSetting(
                f"recent is {self.recent}, expected at most {self.frames - self.num_sinks} with "
                f"frames={self.frames}, half of which are sinks: lower it or raise frames"
            )
        if self.candidates is not None:
            at_least("candidates", self.candidates, max(1, self.pruned))

    @property
    def num_sinks(self) -> int:
        return self.frames // 2

    @property
    def pruned(self) -> int:
        """C, in latent frames."""
        return self.frames - self.num_sinks - self.recent

    @property
    def reach(self) -> int:
        behind = 2 * self.pruned if self.candidates is None else self.candidates
        return self.recent + (behind if self.pruned else 0)

    @property
    def asks(self) -> Score:
        return "observed"

    def counts(
        self, frames: Sequence[HeldFrame], distances: Sequence[int], budget: int | None
    ) -> list[int]:
        near = sum(1 for d in distances if d <= self.recent)
        between = [
            f for f, d in zip(frames, distances, strict=True) if self.recent < d <= self.reach
        ]
        kept = [frame.count for frame in frames[:near]]
        if between:
            tokens = self.pruned * between[0].span.tokens
            caps = [frame.count for frame in between]
            kept += allocate(caps, tokens, weights=[1.0 for _ in caps])
        return kept + [0] * (len(frames) - len(kept))

    def rank(self, span: Span, before: Span | None, scores: Scores | None = None) -> Ints | None:
        if span.role.is_anchor:
            return None
        return rank_tokens(span, before, order=self.asks, scores=scores)

    def max_history(self, frame_tokens: int, budget: int | None) -> int:
        return self.frames * frame_tokens
