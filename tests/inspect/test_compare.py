"""A comparison: fair, and shown as it was measured."""

import re

import pytest

import packcache as pc
from packcache.inspect.compare import compare
from packcache.inspect.picture import film_strip, readable_bytes, side_by_side
from packcache.inspect.report import headline, save
from packcache.lumos.cost import clip_operations, linear_parameters
from packcache.policies import parse_policies


@pytest.fixture(scope="module")
def comparison():
    gen = pc.load("digits")
    return compare(
        gen, "a red 3 moving right", parse_policies("full,window,packcache"), frames=29, steps=1
    )


def test_noise_is_shared(comparison):
    full, window, packed = (entry.clip.codes for entry in comparison.entries)
    assert full[:2].equal(window[:2]) and full[:2].equal(packed[:2])


def test_speedups_refer_to_the_full_cache(comparison):
    full, _, packed = comparison.entries
    assert comparison.reference is full
    assert comparison.speedups(full)["speedup_total"] == 1
    times = comparison.speedups(packed)
    assert times["speedup_last"] == full.clip.stats.last_s / packed.clip.stats.last_s
    assert 1 < times["predicted_total"] < times["predicted_last"]


def test_operations_are_counted_from_shapes(comparison):
    """One frame by hand: 2 branches x (2 forwards of linear and attention, and the head)."""
    gen = pc.load("digits")
    config, entry = gen.model.config, comparison.entries[0]
    linear = sum(p.numel() for n, p in gen.model.named_parameters() if "proj" in n)
    assert linear_parameters(config) == linear
    forward = 2 * linear * 76 + 6 * 4 * 76 * (100 + 76) * 192
    head = 2 * 64 * 192 * config.token_ids.num_codes
    (counted,) = clip_operations(config, comparison.layout, entry.clip.sampling, [100])
    assert counted == 2 * (2 * forward + head)


def test_held_tokens_at_the_end(comparison):
    _, window, packed = comparison.entries
    assert {f: len(held) for f, held in packed.held.items()} == {7: 38, 6: 19, 5: 10, 4: 9}
    assert {f: len(held) for f, held in window.held.items()} == {7: 76}


def test_pictures_have_even_sizes_and_every_frame(comparison):
    frames = side_by_side(comparison)
    assert len(frames) == 29 and frames.shape[1] % 2 == 0 and frames.shape[2] % 2 == 0
    assert film_strip(comparison).height > 3 * 100


def test_report_shows_the_measured_numbers(comparison, tmp_path):
    page = save(comparison, tmp_path)["report.html"].read_text()
    for entry in comparison.entries:
        assert f"{entry.clip.stats.total_s:.2f} s" in page
    drawn = len(re.findall("holds [0-9]+ of 76", page))
    assert drawn == sum(len(kept) for e in comparison.entries for kept in e.clip.stats.kept)


def test_headline_speaks_of_packcache(comparison):
    numbers = headline(comparison)
    packed = comparison.entries[2].clip.stats
    assert len(numbers) == 3 and readable_bytes(packed.kv_bytes[-1]) in numbers[0][0]


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1500, "1.5 kB"), (1.9e6, "1.9 MB"), (5e12, "5000.0 GB")]
)
def test_readable_bytes(count, text):
    assert readable_bytes(count) == text
