"""Pictures of a trace: everything is drawn, inside the sheet; what cannot be drawn is one line."""

from __future__ import annotations

import builtins
import dataclasses

import numpy as np
import pytest
from PIL import Image

from packcache.errors import InputError, InvalidSetting
from packcache.inspect.attention_plot import plot_attention, plot_kept
from packcache.policies import FullCache, NoHistory, PackCache, parse_policies
from packcache.timeline import FrameLayout
from tests.inspect.synthetic import LAYOUT, exponential, flat, trace

pytest.importorskip("matplotlib")

#: Colours of kept and kept though re-masked, as they are drawn.
KEPT, KEPT_MASKED = (25, 113, 194), (165, 205, 242)


@pytest.fixture(scope="module")
def made():
    visible = np.ones(LAYOUT.tokens, dtype=bool)
    visible[3:-1:2] = False
    return trace(exponential(0.5), frames=6, clips=2, noise=0.1, visible=visible)


def blank_edge(path) -> bool:
    """Nothing reaches the right and the lower edge of the sheet."""
    picture = Image.open(path).convert("L")
    width, height = picture.size
    strips = ((width - 8, 0, width, height), (0, height - 4, width, height))
    return all(picture.crop(strip).getextrema() == (255, 255) for strip in strips)


def test_attention_is_drawn(made, tmp_path):
    path = plot_attention(made, tmp_path / "attention.png")
    picture = Image.open(path).convert("RGB")
    assert picture.width > 1500 and len(picture.getcolors(1 << 22)) > 200
    assert blank_edge(path)
    assert [p.name for p in tmp_path.iterdir()] == ["attention.png"]


def words(path) -> str:
    return path.read_text()


def test_the_verdict_is_written_and_coloured(made, tmp_path):
    """In an .svg whose words are glyphs the colours of the fits remain to be read."""
    good = plot_attention(made, tmp_path / "good.svg").read_text()
    bad = plot_attention(trace(flat, frames=7, clips=2), tmp_path / "bad.svg").read_text()
    assert "#2f9e44" in good and "#c2255c" not in good
    assert "#c2255c" in bad and "#2f9e44" not in bad


@pytest.mark.parametrize(
    "settings",
    [
        {"image": False, "frames": 5},
        {"clips": 1, "frames": 3},
        {"steps": (-1,), "frames": 4},
        {"steps": (7,), "layers": 1, "frames": 4},
        {"frames": 5, "layers": 30},
        {"frames": 4, "layout": FrameLayout(rows=4, cols=10, header=0, footer=0, new_line=False)},
    ],
    ids=str,
)
def test_every_kind_of_trace(settings, tmp_path):
    path = plot_attention(trace(exponential(0.5), **settings), tmp_path / "a.png")
    assert blank_edge(path)


def test_without_history_there_is_no_picture_and_no_file(made, tmp_path):
    alone = dataclasses.replace(made, samples=[s for s in made.samples if s.frame == 1])
    with pytest.raises(InputError, match="the trace has no history"):
        plot_attention(alone, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def share_of(path, colour) -> float:
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return float((pixels == colour).all(axis=1).mean())


def test_more_tokens_kept_are_more_cells_drawn(made, tmp_path):
    policies = [NoHistory(), PackCache(budget=1), PackCache(budget=3), FullCache()]
    kept = []
    for number, policy in enumerate(policies):
        path = plot_kept(made, {"policy": policy}, tmp_path / f"{number}.png")
        kept.append(share_of(path, KEPT) + share_of(path, KEPT_MASKED))
    assert kept == sorted(kept) and len(set(kept)) == len(kept)


def test_remasked_tokens_have_their_own_colour(made, tmp_path):
    assert share_of(plot_kept(made, {"full": FullCache()}, tmp_path / "a.png"), KEPT_MASKED) > 0.01
    seen = trace(exponential(0.5), frames=6, clips=1)
    assert share_of(plot_kept(seen, {"full": FullCache()}, tmp_path / "b.png"), KEPT_MASKED) == 0


def test_a_row_a_policy_and_long_clips_end_at_the_edge(made, tmp_path):
    two = parse_policies("full,packcache:budget=1,window=4,order=novelty,half_life=2,min_share=0.1")
    tall = plot_kept(made, two, tmp_path / "two.png")
    assert (
        Image.open(tall).height
        > Image.open(plot_kept(made, {"full": FullCache()}, tmp_path / "one.png")).height
    )
    long = trace(flat, frames=30, clips=1, steps=(-1,), layers=1)
    assert blank_edge(plot_kept(long, two, tmp_path / "long.png"))


def test_what_cannot_be_drawn_is_one_line(made, tmp_path):
    with pytest.raises(InvalidSetting, match="no policy to draw: give at least one"):
        plot_kept(made, {}, tmp_path / "a.png")
    with pytest.raises(InvalidSetting, match=r"cannot draw 'a.pdf': known are .png and .svg"):
        plot_attention(made, tmp_path / "a.pdf")
    with pytest.raises(InvalidSetting, match="clip is 2, expected 0 to 1"):
        plot_kept(made, {"full": FullCache()}, tmp_path / "a.png", clip=2)


def test_without_matplotlib(made, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InvalidSetting, match=r"pip install 'packcache\[plot\]'"):
        plot_attention(made, tmp_path / "a.png")
