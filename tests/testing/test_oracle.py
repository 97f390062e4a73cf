"""The judges judged: masks and twins on cases small enough to write out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from packcache.lumos.vocab import Vocab
from packcache.policies import FullCache, SlidingWindow
from packcache.testing import oracle
from packcache.timeline import FrameLayout, Role, Span, Timeline
from tests.tools import commit

LAYOUT = FrameLayout(rows=1, cols=2, header=0, footer=0, new_line=False)


def test_who_saw_whom():
    """Text causally; each frame itself and what was held when it was computed."""
    seen = oracle.seen_mask([2, 2, 2], [np.array([], int), np.array([0, 1]), np.array([0, 3])])
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 1],
        [1, 0, 0, 1, 1, 1],
    ]


def test_held_tokens_are_logical():
    timeline = Timeline()
    commit(timeline, FullCache(), Span.text(3))
    for number in range(4):
        span = Span.of_frame(Role.HISTORY, number, LAYOUT)
        commit(timeline, SlidingWindow(), span)
    assert oracle.held_tokens(timeline).tolist() == [0, 1, 2, 9, 10]


@pytest.mark.parametrize("branch", [0, 1])
def test_the_unrotated_twin_without_eviction_is_a_whole_forward(tiny64, branch):
    """Nothing evicted, nothing shifted: the same hidden states as no cache at all."""
    vocab, layout = Vocab(tiny64.config), Vocab(tiny64.config).layout(32, 32)
    prefix = vocab.prefix([11, 57, 23], seconds=2, fps=4)
    twin = oracle.UnrotatedCache(tiny64, FullCache(), layout=layout, text=prefix.lengths)
    text = torch.tensor(prefix.branch(branch))
    frames = [vocab.frame(layout, torch.arange(16) * (f + 3) % 128) for f in range(3)]
    spans = [Span.text(len(prefix.ids))]
    spans += [Span.of_frame(Role.HISTORY, f, layout) for f in range(3)]
    last = {}
    for span, ids in zip(spans, [text, *frames], strict=True):
        twin.open(span)
        for other in (0, 1):
            own = torch.tensor(prefix.branch(other)) if span.layout is None else ids
            last[other] = twin.forward(own, other)
        twin.commit()
    where = oracle.sequence_positions(tiny64.config, len(text), 3, layout)
    with torch.inference_mode():
        whole = oracle.whole_forward(tiny64, torch.cat([text, *frames]), where)
    assert (whole[-layout.tokens :] - last[branch]).abs().max() < 1e-12
