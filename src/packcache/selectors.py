"""IN WHICH ORDER a latent frame gives up its tokens. One order, fixed at commit, so kept sets nest.

An order is returned as ranks: `rank[offset]` is the token's place, and the highest ranks go
first. These orders read no tensor; `novelty` reads token ids, which discrete models have for free.
Scored orders are given a number for each token, which whoever sees the attention makes (`scores`).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from packcache.errors import InvalidSetting
from packcache.timeline import FrameLayout, Ints, Kind, Span

#: What a scored order goes by; the cache makes these numbers for a policy that asks.
Score = Literal["expected", "observed"]
Order = Literal["visible", "spatial", "novelty", "random", Score]
Borders = Literal["first", "last"]
Scores = NDArray[np.float64]

__all__ = ["Borders", "Order", "Score", "Scores", "asked", "low_discrepancy", "rank_tokens"]

#: The real root of x^3 = x + 1; its powers give the R2 sequence its two steps.
_PLASTIC = 1.32471795724474602596

_BORDER_LAST = 9


def low_discrepancy(layout: FrameLayout) -> NDArray[np.float64]:
    """A value in [0, 1) for each of the P tokens such that tokens below any cut lie evenly.

    The R2 sequence's lattice `frac(x / g + y / g^2)` at the cell centres, g the plastic number;
    border tokens, which have no cell, get -1 (DESIGN 4.3, order O1 of methods 3.2).
    """
    y, x = layout.cells()
    value = np.mod((x + 0.5) / _PLASTIC + (y + 0.5) / _PLASTIC**2, 1.0)
    return np.where(y < 0, -1.0, value)


def asked(order: Order) -> Score | None:
    """The score that an order goes by, None for an order without any."""
    return next((score for score in get_args(Score) if score == order), None)


def rank_tokens(
    span: Span,
    before: Span | None = None,
    *,
    order: Order = "visible",
    borders: Borders = "first",
    remasked_last: bool = False,
    seed: int = 0,
    scores: Scores | None = None,
) -> Ints:
    """Ranks int32 `[tokens]` of a latent frame's tokens: 0 is kept longest.

    - `visible`: border, visible content, visible new lines, re-masked; evenly spread inside each.
    - `spatial`: border, content, new lines, whether re-masked or not.
    - `novelty`: as `visible`, but content whose id differs from the same place in the frame
      `before` comes first.
    - `random`: a permutation of all tokens, drawn from `seed` and the frame's number.
    - `expected`, `observed`: border, then all others by `scores [tokens]`, highest first, whether
      re-masked or not; ties evenly spread.

    `borders="last"` moves border tokens to the end; `remasked_last` puts re-masked tokens behind
    all others whatever the order.
    """
    if span.layout is None:
        raise InvalidSetting("text has no order of tokens: it is an anchor and keeps all of them")
    if order not in get_args(Order):
        raise InvalidSetting(f"order is {order!r}, expected one of {', '.join(get_args(Order))}")
    if borders not in get_args(Borders):
        raise InvalidSetting(f"borders is {borders!r}, expected first or last")
    _check_scores(span, order, scores)
    if order == "random":
        rng = np.random.default_rng((seed, span.frame))
        tier = np.zeros(span.tokens, dtype=np.int64)
        value = rng.random(span.tokens)
    else:
        tier = _tiers(span, before, order)
        value = low_discrepancy(span.layout)
        if borders == "last":
            tier[span.layout.kinds() == Kind.BORDER] = _BORDER_LAST
    if remasked_last:
        tier = tier + np.where(span.visible_mask(), 0, _BORDER_LAST + 1)
    least = np.zeros(span.tokens) if scores is None else -scores
    offsets = np.lexsort((np.arange(span.tokens), value, least, tier))
    rank = np.empty(span.tokens, dtype=np.int32)
    rank[offsets] = np.arange(span.tokens, dtype=np.int32)
    return rank


def _tiers(span: Span, before: Span | None, order: Order) -> NDArray[np.int64]:
    """Classes, kept longest first: border 0, content 1 (2 if stale), new line 3, re-masked +4.

    Where scores decide there are two: border 0, all others 1.
    """
    assert span.layout is not None
    if asked(order):
        return np.where(span.layout.kinds() == Kind.BORDER, 0, 1).astype(np.int64)
    tier = np.select(
        [span.layout.kinds() == Kind.BORDER, span.layout.kinds() == Kind.CONTENT], [0, 1], 3
    ).astype(np.int64)
    if order == "novelty":
        tier[(tier == 1) & ~_changed(span, before)] = 2
    if order != "spatial":
        tier[~span.visible_mask()] += 4
    return tier


def _check_scores(span: Span, order: Order, scores: Scores | None) -> None:
    """Scores are given where an order goes by them, one a token, and nowhere else."""
    if scores is None and asked(order):
        raise InvalidSetting(
            f"order {order!r} goes by scores, and none were given: use 'visible' or 'spatial', or "
            "a cache that is shown the queries of the attention"
        )
    if scores is None:
        return
    if not asked(order):
        raise InvalidSetting(f"order {order!r} goes by no scores, and some were given: leave them")
    if scores.shape != (span.tokens,):
        raise InvalidSetting(
            f"scores have shape {scores.shape}, expected ({span.tokens},): one a token"
        )


def _changed(span: Span, before: Span | None) -> NDArray[np.bool_]:
    """Where a token id differs from the frame before; everything is new without one."""
    if span.ids is None:
        raise InvalidSetting(
            "order 'novelty' compares token ids, and this model commits none: "
            "use 'visible' or 'spatial'"
        )
    if before is None or before.ids is None or before.layout != span.layout:
        return np.ones(span.tokens, dtype=bool)
    return span.ids != before.ids
