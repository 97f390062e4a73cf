"""Teacher-forced replay: nothing diverges before something is given up, a slow twin, going on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import packcache as pc
from packcache import scores
from packcache.digits import world
from packcache.digits.prompts import prompt
from packcache.evaluate.clips import batches, settings_of
from packcache.evaluate.ledger import Ledger
from packcache.evaluate.protocol import Protocol, ReplayPlan, Row
from packcache.evaluate.replay import Replay
from packcache.evaluate.table import cases
from packcache.inspect.record import Recorder
from tests.evaluate.asked import small

FRAMES = 13  # four latent frames

ROWS = (
    Row(label="full", policy="full", role="reference"),
    Row(label="again", policy="full"),
    Row(label="other kernel", policy="full", role="floor", kernel="math"),
    Row(label="window", policy="window:frames=1"),
    Row(label="no image", policy="packcache", role="control", drops_image=True),
    Row(label="other draws", policy="full", role="floor", other_draws=True),
)


def protocol(rows=ROWS, prompts: int = 5) -> Protocol:
    replay = ReplayPlan(prompts=prompts, frames=FRAMES, known=(0.0, 0.5), true_prompts=1)
    return small(rows, replay=replay)


@pytest.fixture(scope="module")
def pipeline():
    """Few steps: what is replayed need not be good."""
    loaded = pc.load("digits")
    return replace(loaded, sampling=replace(loaded.sampling, steps=2))


@pytest.fixture(scope="module")
def asked(pipeline):
    replay = Replay(pipeline, protocol(), Ledger(None, {}))
    replay.run()
    return replay


def test_the_full_cache_does_not_differ_from_itself(asked):
    again = asked.values("again")
    assert np.nanmax(np.abs(again["kl"])) == 0 and np.nanmin(again["agreement"]) == 1
    np.testing.assert_array_equal(again["nll"], again["nll_full"])


def test_another_kernel_differs_by_rounding(asked):
    kl = asked.values("other kernel")["kl"]
    assert 0 < np.nanmax(np.abs(kl)) < 1e-5


def test_nothing_diverges_before_something_is_given_up(asked):
    """Clips 0 to 3 are from text: frame 0 is history, so frame 2 is the first to miss one; clip 4
    has an image, an anchor, and misses nothing before frame 3."""
    kl = asked.values("window")["kl"]
    assert kl.shape == (5, 4)
    assert (kl[:4, :2] == 0).all() and (kl[:4, 2:] > 1e-6).all()
    assert np.isnan(kl[4:, 0]).all() and (kl[4:, 1:3] == 0).all() and (kl[4:, 3:] > 1e-6).all()


def test_attention_is_lost_where_something_is_given_up(asked):
    lost = asked.values("window")["lost"]
    assert (lost[:4, :2] == 0).all() and np.isnan(lost[4:, 0]).all() and (lost[4:, 1:3] == 0).all()
    for late in (lost[:4, 2:], lost[4:, 3:]):
        assert (late > 0).all() and (late < 0.9).all()
    assert np.nanmax(asked.values("again")["lost"]) == 0
    dropped = asked.values("no image")["lost"]
    assert (dropped[4:, 1] > 0.05).all()  # the image is looked at


def test_attention_lost_by_another_way(pipeline, asked, monkeypatch):
    """A slow twin: what a recorder of traces sees of the full cache, and slots counted by hand."""
    monkeypatch.setattr(scores, "SAMPLES", 1000)  # all content tokens
    replay = Replay(pipeline, protocol(prompts=5), Ledger(None, {}))
    replay.known.found |= {k: v for k, v in asked.known.found.items() if k[1] == "clip"}
    replay._recorded([4])
    codes = asked.clips.stored(ROWS[0], 4, 0).codes
    case, last = cases(5)[4], 3
    picture = Image.fromarray(world.render(case.scene, 1)[0])
    full = pipeline.run([prompt(case.scene)], frames=FRAMES, policy="full", image=picture).decoder
    recorder = Recorder(
        layout=full.layout, num_layers=6, text=full.caches[0].text[0], queries=1000, layers=range(6)
    )
    full.prefill()
    for frame in range(last):
        full.give(codes[frame][None], as_generated=frame > 0)
    told = asked._told([4], codes[None])[0]
    masses = []
    for state in told:
        known = torch.where(state[last], codes[last].flatten(), -1)[None]
        with recorder.watch(full):
            full.predict(known)
        masses.append(recorder.samples()[-1].mass.mean(axis=0))
    # the window holds text, the image, the newest frame, and the open one
    tokens, text = full.layout.tokens, full.caches[0].text[0]
    gone = slice(text + tokens, text + 2 * tokens)
    expected = np.mean(masses, axis=0)[gone].sum()
    found = replay.known.found["window", "replay", 4]["lost"][last - 1]
    assert found == pytest.approx(expected, rel=1e-4) and found > 0.01


def test_a_dropped_image_is_missed_at_once_and_only_where_there_is_one(asked):
    dropped, window = (asked.values(label)["kl"] for label in ("no image", "window"))
    assert (dropped[:4, :2] == 0).all()
    assert (dropped[4:, 1] > 10 * window[4:, 3]).all()


def test_other_draws_have_no_part_in_it(asked):
    assert not any(key[0] == "other draws" for key in asked.known.found)


def test_a_slow_twin(pipeline, asked):
    """Clip 4 by itself, from an image: one latent frame's KL from whole distributions, by hand."""
    case, latent = cases(5)[4], 3
    codes = asked.clips.stored(ROWS[0], 4, 0).codes
    told = asked._told([4], codes[None])[0]
    logits = []
    for policy in ("full", "window:frames=1"):
        picture = Image.fromarray(world.render(case.scene, 1)[0])
        decoder = pipeline.run(
            [prompt(case.scene)], frames=FRAMES, policy=policy, image=picture, seed=case.seed
        ).decoder
        decoder.prefill()
        for frame in range(latent):
            decoder.give(codes[frame][None], as_generated=frame > 0)
        flat = codes[latent].flatten()
        known = [torch.where(state[latent], flat, -1)[None] for state in told]
        logits.append([decoder.predict(k)[0].double().softmax(-1) for k in known])
    total = count = 0.0
    for state, p, q in zip(told, *logits, strict=True):
        own = ~state[latent]
        total += float((p[own] * (p[own] / q[own]).log()).sum())
        count += int(own.sum())
    assert asked.values("window")["kl"][4, latent] == pytest.approx(total / count, rel=1e-3)


def test_half_of_the_codes_are_told(asked):
    told = asked._told([0, 4], torch.zeros(2, 4, 12, 12))
    assert told.shape == (2, 2, 4, 144)
    assert told[:, 0].sum() == 0 and (told[:, 1].sum(-1) == 72).all()
    assert not torch.equal(told[0, 1, 0], told[0, 1, 1])


def test_along_true_clips_every_row_is_asked(asked):
    rows = {
        key[0]: values["nll_true"] for key, values in asked.known.found.items() if key[1] == "true"
    }
    assert set(rows) == {"full", "again", "other kernel", "window", "no image"}
    assert rows["again"] == rows["full"] != rows["window"]
    assert len(rows["full"]) == 4


def test_what_is_known_is_not_asked_again(pipeline, asked, monkeypatch):
    again = Replay(pipeline, protocol(), asked.known)
    monkeypatch.setattr(type(pipeline), "run", lambda *a, **k: pytest.fail("asked again"))
    again.run()
    assert again.done == 5


def test_a_new_row_is_asked_along_the_same_clips(pipeline, asked):
    """The clips are not made again: their codes are in the ledger."""
    more = Row(label="none", policy="none")
    replay = Replay(pipeline, protocol((*ROWS, more), prompts=2), asked.known)
    before = asked.known.found["full", "clip", 0, 0]["codes"]
    replay.run()
    assert asked.known.found["full", "clip", 0, 0]["codes"] is before
    assert (replay.values("none")["kl"][:, 1:] > 0).all()


def test_batches_are_of_one_kind():
    chosen = cases(12)
    found = list(batches(chosen, range(12), 3))
    assert sorted(n for batch in found for n in batch) == list(range(12))
    for batch in found:
        assert len(batch) <= 3 and len({chosen[n].with_image for n in batch}) == 1


def test_seeds_are_shared_but_by_other_draws():
    chosen = cases(2)
    seeds = [settings_of(row, chosen)["seed"] for row in ROWS]
    assert seeds[0] == [0, 1] and all(own == seeds[0] for own in seeds[:-1])
    everything = [*seeds[0], *seeds[-1], *settings_of(ROWS[0], chosen, seed=1)["seed"]]
    assert len(set(everything)) == 6
