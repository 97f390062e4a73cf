"""Other people's methods: what is peculiar to each, its source, and that its file stays its own.

That they keep every promise of a policy is tested with the others (test_policies, test_cache,
test_promises).
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re

import numpy as np
import pytest
import torch

from packcache import policies
from packcache.cache import FrameCache
from packcache.policies import POLICIES, DeepForcing, FadeMem, SinkWindow
from packcache.positions import Rotation, advance_keys, inverse_frequencies
from packcache.rivals.deep_forcing import DeepSink
from packcache.rivals.fademem import PowerLaw
from packcache.timeline import FrameLayout, Role, Span
from tests.tools import ROOT, counts, grow

FILES = sorted((ROOT / "src" / "packcache" / "rivals").glob("[!_]*.py"))

#: What a rival may know of the package: integers, nothing of a tensor.
BELOW = {"errors", "checks", "timeline", "budget", "selectors"}

SMALL = FrameLayout(rows=2, cols=3, header=0, footer=0, new_line=False)

every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)


# --- a file each --------------------------------------------------------------------------------


@every_file
def test_a_rival_says_where_it_comes_from_and_what_differs(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert re.search(r"\b\d{4}\.\d{5}\b", text), "the paper's arXiv number"
    assert "Theirs" in text and "Ours" in text
    assert doctest.testmod(importlib.import_module(f"packcache.rivals.{path.stem}")).attempted


@every_file
def test_a_rival_is_integers_and_looks_up_to_nobody(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module)
    ours = {name.split(".")[1] for name in names if name.startswith("packcache.")}
    assert ours <= BELOW and "torch" not in names and "packcache" not in names


@every_file
def test_a_rival_is_a_policy_with_a_name(path):
    module = importlib.import_module(f"packcache.rivals.{path.stem}")
    parts = tuple(getattr(module, name) for name in module.__all__)
    named = [make for make in POLICIES.values() if issubclass(make, parts)]
    assert len(named) == 1
    assert named[0].__name__ in policies.__all__
    assert re.search(r"\b\d{4}\.\d{5}\b", named[0].__doc__ or "")


# --- FadeMem ------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.2, 0.3, 0.7])
def test_shares_are_the_density_of_entries_even_in_a_power_of_the_age(beta):
    """Entries even in a^beta: how many lie between two ages is told by the ages to that power."""
    weights = np.array(PowerLaw(beta=beta).weights(range(1, 1001)))
    for low, high in ((10, 20), (50, 100), (400, 900)):
        have = weights[low:high].sum() / weights[100:200].sum()
        ages = np.array([low, high, 100, 200]) + 0.5
        want = np.diff(ages**beta)[0] / np.diff(ages**beta)[2]
        assert have == pytest.approx(want, rel=1e-3)


def test_a_power_law_has_no_scale_and_beta_one_is_uniform():
    """From any distance to twice that the share falls alike: by 2^(beta - 1)."""
    weights = PowerLaw(beta=0.3).weights(range(1, 65))
    assert [weights[2 * d - 1] / weights[d - 1] for d in (1, 5, 32)] == pytest.approx([2**-0.7] * 3)
    assert PowerLaw(beta=1.0).weights([1, 2, 9]) == [1.0, 1.0, 1.0]


def test_fademem_forgets_no_frame_while_there_is_a_token_for_each():
    """Dense near, sparse far: the whole past, by fewer tokens each; the budget is used up."""
    *_, timeline = grow(FadeMem(), 40)
    held = counts(timeline)
    assert len(held) == 40 and sum(held) == 76
    assert held == sorted(held, reverse=True) and held[0] > 3 * held[10]
    *_, timeline = grow(FadeMem(), 90)
    assert counts(timeline) == [1] * 76


def test_fademem_gives_the_far_past_more_than_a_half_life_does():
    (*_, power), (*_, decay) = (
        grow(policy, 30) for policy in (FadeMem(), policies.PackCache(window=None))
    )
    assert sum(counts(power)[8:]) > sum(counts(decay)[8:])
    assert counts(power)[0] < counts(decay)[0]


def test_the_first_frame_may_be_an_anchor_as_theirs_is():
    *_, timeline = grow(FadeMem(sinks=1), 12)
    assert counts(timeline)[-1] == 76 and sum(counts(timeline)) == 2 * 76


# --- Deep Forcing -------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [2, 3, 4, 5, 8, 21])
def test_half_of_the_window_are_sinks_and_all_of_it_is_held(frames):
    policy = DeepForcing(frames=frames)
    assert policy.num_sinks == frames // 2
    *_, timeline = grow(policy, 3 * frames)
    assert sum(counts(timeline)) == frames * 76
    assert list(timeline.counts())[: frames // 2] == list(range(frames // 2))
    assert counts(timeline)[0] == 76


def test_candidates_behind_the_newest_frames_share_what_is_left():
    *_, timeline = grow(DeepForcing(frames=8, recent=2, candidates=5), 20)
    assert counts(timeline) == [76, 76, 31, 31, 30, 30, 30, *[76] * 4]


def test_with_nothing_to_prune_it_is_sinks_and_a_window():
    for frame, (ours, plain) in enumerate(
        zip(
            grow(DeepForcing(frames=4, recent=2), 9), grow(SinkWindow(sinks=2, frames=2), 9),
            strict=True,
        )
    ):  # fmt: skip
        assert ours.counts() == plain.counts(), frame


def played(frames: int, wanted: int, **settings) -> FrameCache:
    """A cache whose every frame has one token that is attended to."""
    out = FrameCache(
        DeepForcing(), layers=1, kv_heads=1, head_dim=32, layout=SMALL, text=(0,),
        dtype=torch.float64, **settings,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    for frame in range(frames):
        out.open(Span.of_frame(Role.HISTORY, frame, SMALL))
        keys = 0.1 * torch.randn(1, 6, 32, generator=rng, dtype=torch.float64)
        keys[:, wanted] += 9.0
        out.observe(0, torch.ones(1, 6, 32).double(), *out.update(0, keys, keys))
        out.commit()
    return out


@pytest.mark.parametrize("wanted", range(6))
def test_old_frames_keep_what_was_attended_to(wanted):
    target = played(8, wanted, positions="absolute")
    assert target.timeline.counts() == {0: 6, 1: 6, 5: 3, 6: 3, 7: 6}
    assert all(wanted in entry.held for entry in target.timeline.history)


def test_the_phase_of_the_sinks_follows_the_timeline():
    """Their deep sink: the rebase of the anchors turns the sinks, from what was committed."""
    rotation = Rotation.mm_rope(inverse_frequencies(32, 100.0).double())
    still = played(9, 2, positions="absolute").stores[0].keys(0)
    target = played(9, 2, positions="rebase", rebase="slide", rotation=rotation)
    assert target.delta == 8 - 5  # when frame 8 opened, sinks and three frames lay before it
    moved, sinks = target.stores[0].keys(0), slice(0, 12)
    assert torch.allclose(moved[:, sinks], advance_keys(still[:, sinks], target.delta, rotation))
    assert torch.equal(moved[:, 12:], still[:, 12:])


def test_sinks_and_prune_are_settings_of_their_own():
    assert DeepSink(frames=7, recent=3).pruned == 1
    assert (DeepSink().reach, DeepSink(recent=2).reach) == (3, 2)
