"""The two-parameter latency model of methods 1.8: what four published speed-ups say together.

The time of latent frame f is A + L_f, in units of the attention of one frame over one latent frame:
L_f = f + 1 with a full cache, 2 + min(f - 1, m) when history costs at most m latent frames.
"""

from __future__ import annotations

import pytest

#: Paper, table 2, A40: speed-up over the full cache by (latent frames, measure).
A40 = {(7, "TOTAL"): 1.26, (7, "LAST"): 1.63, (13, "TOTAL"): 1.75, (13, "LAST"): 2.64}


def speed_up(latents: int, measure: str, a: float, m: float) -> float:
    """Full over packed; image-to-video, so frames 1..F-1 are generated."""
    frames = range(1, latents) if measure == "TOTAL" else [latents - 1]
    full = sum(a + f + 1 for f in frames)
    packed = sum(a + 2 + min(f - 1, m) for f in frames)
    return full / packed


@pytest.mark.parametrize("latents, measure", A40)
def test_two_parameters_give_the_four_published_numbers(latents, measure):
    assert speed_up(latents, measure, a=2.64, m=1.28) == pytest.approx(
        A40[latents, measure], rel=0.01
    )


def predictions(m: float) -> list[float]:
    return [speed_up(*key, a=2.64, m=m) for key in A40]


def test_three_whole_frames_of_history_are_rejected():
    """The reading b_min = 3 whole frames fits the four numbers at no A >= 0 (methods 1.6)."""
    assert predictions(m=3) == pytest.approx([1.07, 1.26, 1.42, 2.04], abs=0.01)
    for a in range(200):
        worst = max(abs(speed_up(*key, a=a / 20, m=3) / want - 1) for key, want in A40.items())
        assert worst > 0.05


def test_a_sliding_window_is_slightly_faster():
    """The paper says so; the model predicts it (m = 1)."""
    assert predictions(m=1) == pytest.approx([1.30, 1.70, 1.82, 2.76], abs=0.015)
    assert all(a > b for a, b in zip(predictions(m=1), predictions(m=1.28), strict=True))
