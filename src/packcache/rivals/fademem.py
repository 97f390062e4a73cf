"""FadeMem's schedule: dense near, sparse far, by a power of the age (arXiv 2606.10671).

    >>> [round(w, 2) for w in PowerLaw(beta=0.5).weights([1, 4, 9])]
    [1.0, 0.5, 0.33]

Theirs (paper and its released code, Apache-2.0, read and not copied): every frame that leaves the
newest chunk becomes an entry of a memory of fixed size; when that is full, the two neighbours whose
ages to the power beta lie closest are merged into one entry, a mean of un-rotated keys and values
weighted by how much each stands for. So entries end up evenly spaced in age^beta. The first frame
stays as an anchor, and keys are given new temporal positions inside the trained range. LongLive.

Ours is a SELECTION VARIANT. Entries evenly spaced in a^beta have the density beta * a^(beta - 1)
per frame, so a frame of distance d is given that share of the budget, w_d = d^(beta - 1), by
water-filling; the order inside the frame says which tokens those are. What differs: tokens are
selected and never averaged (methods 2.2 on why), a frame thins out instead of vanishing into its
neighbour, and positions are what they were, or the anchors' are rebased. Their anchor frame is the
condition image here, an anchor for every policy; in text-to-video add `sinks=1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from packcache.checks import at_least, number

__all__ = ["PowerLaw"]


@dataclass(frozen=True, kw_only=True, repr=False)
class PowerLaw:
    """Weights `w_d = d^(beta - 1)`; `beta` 0.3 as in their released settings, 1 is uniform.

    `sinks` are first history frames kept whole, on top of the budget.
    """

    beta: float = 0.3
    sinks: int = 0

    def __post_init__(self) -> None:
        number("beta", self.beta, lambda x: 0 < x <= 1, "above 0, at most 1")
        at_least("sinks", self.sinks, 0)

    @property
    def num_sinks(self) -> int:
        return self.sinks

    def weights(self, distances: Sequence[int]) -> list[float]:
        """Not growing with the distance, so that kept sets nest."""
        return [float(d) ** (self.beta - 1) for d in distances]
