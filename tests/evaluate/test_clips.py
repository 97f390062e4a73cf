"""Clips of rows: what is taken over from another clip is what would have been made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import packcache as pc
from packcache.digits.prompts import prompt
from packcache.evaluate import clips as module
from packcache.evaluate.clips import Clips, Made, settings_of
from packcache.evaluate.ledger import Ledger
from packcache.evaluate.protocol import ClipsPlan, Protocol, ReplayPlan, Row
from tests.evaluate.asked import small

ROWS = {
    row.label: row
    for row in (
        Row(label="full", policy="full", role="reference"),
        Row(label="window", policy="window:frames=1"),
        Row(label="packcache", policy="packcache:budget=1,window=2"),
        Row(label="random", policy="random:budget=1,window=2", role="control"),
        Row(label="no image", policy="packcache:budget=1", role="control", drops_image=True),
        Row(label="absolute", policy="packcache:budget=1", role="control", positions="absolute"),
        Row(label="expected", policy="packcache:budget=1,window=2,order=expected"),
        Row(label="observed", policy="packcache:budget=1,window=2,order=observed"),
        Row(label="slide", policy="packcache:budget=1", rebase="slide"),
        Row(label="other kernel", policy="full", role="floor", kernel="math"),
        Row(label="other draws", policy="full", role="floor", other_draws=True),
    )
}
TEXT, IMAGE = (1, 2), (4, 5)
LATENTS = 5


@pytest.fixture(scope="module")
def pipeline():
    """Few steps: clips need not be good."""
    loaded = pc.load("digits")
    return replace(loaded, sampling=replace(loaded.sampling, steps=2))


def asked() -> Protocol:
    return small(
        ROWS.values(), clips=ClipsPlan(seeds=(0, 1)), replay=ReplayPlan(prompts=6, frames=13)
    )


@pytest.fixture(scope="module")
def clips(pipeline):
    """Of every row, short clips first, then longer ones; the reference is known."""
    found = Clips(pipeline, asked(), Ledger(None, {}))
    for numbers in (TEXT, IMAGE):
        for row in ROWS.values():
            found.get(row, numbers, seed=0, latents=3)
            found.get(row, numbers, seed=0, latents=LATENTS)
    return found


@pytest.mark.parametrize("label", ROWS)
@pytest.mark.parametrize("numbers", [TEXT, IMAGE], ids=["text", "image"])
def test_what_is_taken_over_is_what_would_have_been_made(pipeline, clips, label, numbers):
    """The slow twin: every latent frame decided, nothing taken over."""
    row, chosen = ROWS[label], [clips.cases[number] for number in numbers]
    with module.kernel(row.kernel):
        whole = pipeline.generate_many(
            [prompt(case.scene) for case in chosen], frames=4 * LATENTS - 3, policy=row.make(),
            **settings_of(row, chosen),
        )  # fmt: skip
    for number, clip in zip(numbers, whole, strict=True):
        own = clips.stored(row, number, 0)
        assert torch.equal(own.codes, clip.codes)
        assert own.held == tuple(sum(kept.values()) for kept in clip.stats.kept)


def decided(clips, monkeypatch, row, numbers, latents, seed=0) -> int:
    """Latent frames that are decided step by step to answer."""
    from packcache.lumos.decode import Decoder

    count, generate = 0, Decoder.generate

    def counted(self):
        nonlocal count
        count += 1
        return generate(self)

    monkeypatch.setattr(Decoder, "generate", counted)
    clips.get(ROWS[row], numbers, seed=seed, latents=latents)
    return count


@pytest.mark.parametrize(
    "row, numbers, frames",
    [
        ("full", TEXT, 5),
        ("window", TEXT, 3),  # latent frames 0 and 1 miss nothing
        ("window", IMAGE, 2),  # nor does 2 beside an image, which is an anchor
        ("no image", IMAGE, 4),  # nothing is alike behind a dropped image
        ("other draws", TEXT, 5),
        ("other kernel", TEXT, 5),
        ("observed", TEXT, 3),  # goes by the last forward of a frame
        ("expected", TEXT, 5),  # counts the queries of all steps: none is taken over
    ],
)
def test_no_more_is_decided_than_has_to_be(pipeline, monkeypatch, row, numbers, frames):
    fresh = Clips(pipeline, asked(), Ledger(None, {}))
    if row != "full":
        fresh.get(ROWS["full"], numbers, seed=0, latents=LATENTS)
    assert decided(fresh, monkeypatch, row, numbers, LATENTS) == frames
    assert decided(fresh, monkeypatch, row, numbers, 3) == 0


def test_a_clip_goes_on_from_its_own_start(clips, monkeypatch):
    assert decided(clips, monkeypatch, "window", TEXT, LATENTS + 1) == 1


def test_a_batch_takes_over_what_all_of_it_knows(pipeline, monkeypatch):
    fresh = Clips(pipeline, asked(), Ledger(None, {}))
    fresh.get(ROWS["full"], [0], seed=0, latents=3)
    assert decided(fresh, monkeypatch, "full", [0, 1], 3) == 3
    assert len(fresh.stored(ROWS["full"], 0, 0)) == 3


def test_another_seed_is_another_clip(clips, monkeypatch):
    assert decided(clips, monkeypatch, "full", TEXT, 2, seed=1) == 2


def test_a_wrong_reference_would_be_seen(pipeline, clips):
    """Taken over as far as nothing is missed, and no frame further: a row that forgets earlier
    than its policy says is another clip."""
    fresh = Clips(pipeline, asked(), Ledger(None, {}))
    for number in TEXT:
        fresh.known.add(
            ("full", "clip", number, 0), clips.stored(ROWS["full"], number, 0).to_json()
        )
    wrong = Row(label="window", policy="window:frames=2")
    fresh._alike = lambda row, run, latents: LATENTS
    taken = fresh.get(wrong, TEXT, seed=0, latents=LATENTS)
    assert not torch.equal(taken[0].codes, clips.stored(ROWS["window"], TEXT[0], 0).codes)


def test_a_clip_survives_being_written(clips):
    own = clips.stored(ROWS["window"], TEXT[0], 0)
    again = Made.from_json(own.to_json())
    assert torch.equal(again.codes, own.codes) and again.held == own.held
    assert len(own.cut(2)) == 2 and len(own.cut(2).held) == 2
