"""Orders that go by scores, in other people's models: who may use one, and one for all branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from packcache.errors import CacheStateError, InvalidSetting
from packcache.policies import Policy
from packcache.selectors import Score, Scores
from packcache.timeline import HeldFrame, Ints, Span, Timeline

__all__ = ["SharedOrder", "refuse_scores"]


def refuse_scores(policy: Policy, host: str) -> None:
    """Raise InvalidSetting for a policy that asks, where a host never shows its queries."""
    if policy.asks:
        raise InvalidSetting(
            f"{policy!r} goes by the queries of the attention (order {policy.asks!r}), and {host} "
            "shows a cache keys and values only: use a policy whose order reads no tensor, such as "
            "PackCache(order='visible')"
        )


class SharedOrder:
    """One order of each latent frame for all branches of a clip that have caches of their own.

    By its own queries each branch would keep other tokens, and guidance multiplies the difference
    (DESIGN 4.6). So one leads, the one whose cache is made first: what it fixes at a commit the
    others take over at theirs, and they are not asked for queries.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.leader: str | None = None
        self.ranks: dict[int, Ints | None] = {}  # of its last commit only, by latent frame

    def of(self, branch: str) -> Policy:
        """The policy of a branch's cache: the one that was given, if it asks for nothing."""
        if self.policy.asks is None:
            return self.policy
        self.leader = self.leader or branch
        return _OfBranch(shared=self, branch=branch)

    def begin(self, branch: str) -> None:
        """A commit of a branch begins: the leader's fixes new orders."""
        if branch == self.leader:
            self.ranks = {}


@dataclass(frozen=True, kw_only=True, repr=False)
class _OfBranch(Policy):
    """The policy in one branch: it asks and ranks in the leader, elsewhere it ranks as there."""

    shared: SharedOrder
    branch: str

    def __repr__(self) -> str:
        return repr(self.shared.policy)

    def settings(self) -> dict[str, Any]:
        return self.shared.policy.settings()

    @property
    def num_sinks(self) -> int:
        return self.shared.policy.num_sinks

    @property
    def reach(self) -> int | None:
        return self.shared.policy.reach

    def counts(
        self, frames: Sequence[HeldFrame], distances: Sequence[int], budget: int | None
    ) -> list[int]:
        return self.shared.policy.counts(frames, distances, budget)

    @property
    def asks(self) -> Score | None:
        return self.shared.policy.asks if self.branch == self.shared.leader else None

    def rank(self, span: Span, before: Span | None, scores: Scores | None = None) -> Ints | None:
        ranks, leader = self.shared.ranks, self.shared.leader
        if self.branch == leader:
            ranks[span.frame] = self.shared.policy.rank(span, before, scores)
        elif span.frame not in ranks:
            raise CacheStateError(
                f"branch {self.branch!r} commits latent frame {span.frame}, whose order queries of "
                f"branch {leader!r} fix: commit each chunk there, then here, then go on"
            )
        return ranks[span.frame]

    def budget_for(
        self, frame_tokens: int, visible_tokens: int | None = None, token_bytes: int | None = None
    ) -> int | None:
        return self.shared.policy.budget_for(frame_tokens, visible_tokens, token_bytes)

    def max_history(self, frame_tokens: int, budget: int | None) -> int | None:
        return self.shared.policy.max_history(frame_tokens, budget)

    def plan(self, timeline: Timeline, budget: int | None = None) -> list[int]:
        return self.shared.policy.plan(timeline, budget)

    def is_sink(self, timeline: Timeline, entry: HeldFrame) -> bool:
        return self.shared.policy.is_sink(timeline, entry)
