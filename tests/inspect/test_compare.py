"""A comparison: fair, and shown as it was measured."""

import re

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import packcache as pc
from packcache.inspect.compare import compare
from packcache.inspect.picture import (
    _columns,
    _two_lines,
    film_strip,
    readable_bytes,
    side_by_side,
)
from packcache.inspect.report import About, headline, save
from packcache.lumos.cost import clip_work, linear_parameters
from packcache.lumos.schedule import undecided
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
    """One frame by hand: 2 branches x 2 forwards of linear and attention, one guided head."""
    gen = pc.load("digits")
    config, entry = gen.model.config, comparison.entries[0]
    linear = sum(p.numel() for n, p in gen.model.named_parameters() if "proj" in n)
    assert linear_parameters(config) == linear
    forward = 2 * linear * 160 + 6 * 4 * 160 * (100 + 160) * 256
    head = 2 * 144 * 256 * config.token_ids.num_codes
    (counted,) = clip_work(config, comparison.layout, entry.clip.sampling, [100])
    assert counted.total == 2 * 2 * forward + head


def test_operations_of_steps_that_reuse_earlier_ones():
    """Four steps by hand: rows of the network, pairs of attention, rows of the head."""
    config = pc.load("digits").model.config
    layout = pc.FrameLayout(rows=12, cols=12)
    left = undecided(144, 4)
    reuse = pc.StepReuse(history_every=2, rest_every=9)
    (counted,) = clip_work(config, layout, pc.Sampling(steps=4), [100], reuse=reuse)
    rows = [160, 160, left[1], left[2], 160]  # the last is the commit
    fresh = [160, 160, left[1], left[2], 160]  # more than a fifth was decided in each
    own, history = sum(rows) * 160 * 6, sum(fresh) * 100 * 6
    assert counted.linear == 2 * 2 * linear_parameters(config) * sum(rows)
    assert counted.attention == 2 * 4 * 256 * (own + history)
    assert counted.head == 2 * 256 * config.token_ids.num_codes * sum(left)
    (exact,) = clip_work(config, layout, pc.Sampling(steps=4), [100])
    assert exact.linear == 2 * 2 * linear_parameters(config) * 5 * 160
    assert exact.attention == 2 * 4 * 256 * 6 * 5 * 160 * 260


def test_held_tokens_at_the_end(comparison):
    _, window, packed = comparison.entries
    assert {f: len(held) for f, held in packed.held.items()} == {7: 80, 6: 40, 5: 20, 4: 20}
    assert {f: len(held) for f, held in window.held.items()} == {7: 160}


def test_pictures_have_even_sizes_and_every_frame(comparison):
    frames = side_by_side(comparison)
    assert len(frames) == 29 and frames.shape[1] % 2 == 0 and frames.shape[2] % 2 == 0
    assert film_strip(comparison).height > 3 * 100


def test_report_shows_the_measured_numbers(comparison, tmp_path):
    page = save(comparison, tmp_path)["report.html"].read_text()
    for entry in comparison.entries:
        assert f"{entry.clip.stats.total_s:.2f} s" in page
    drawn = len(re.findall("holds [0-9]+ of 160", page))
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


@pytest.fixture(scope="module")
def continued():
    """A comparison that starts with 9 given frames, of a flat grey."""
    grey = np.full((9, 96, 96, 3), 60, dtype=np.uint8)
    policies = parse_policies("full,packcache:budget=2,window=3,order=novelty,n_sinks=1")
    return compare(pc.load("digits"), "a red 3", policies, frames=29, steps=1, video=grey)


def test_given_frames_start_every_clip_and_are_counted(continued, comparison):
    full, packed = (entry.clip for entry in continued.entries)
    assert np.array_equal(full.frames[:9], packed.frames[:9])
    assert full.stats.given_latents == packed.stats.given_latents == 3
    assert continued.workload["given_frames"] == 9 and continued.workload["image"] is None
    assert comparison.workload["given_frames"] == 0
    (first, second, third, fourth, *_) = continued.entries[0].operations
    assert first < second < third < fourth / 2  # a given frame is one forward, no step


def test_given_frames_are_marked_until_they_end(continued):
    frames = side_by_side(continued)
    corner = (slice(112, 145), slice(28, 100))  # upper left of the first picture
    grey = frames[8][corner].astype(int), frames[9][corner].astype(int)
    assert (grey[0] < 40).any() and (grey[0] > 200).any()  # a dark plate with light letters
    assert not (grey[1] > 200).any()


def test_film_strip_shows_the_given_start_and_the_frame_after_it():
    assert _columns(97, 17, 9).tolist() == [0, 8, 16, 17, 33, 49, 64, 80, 96]
    assert _columns(97, 0, 9).tolist() == [0, 12, 24, 36, 48, 60, 72, 84, 96]
    assert _columns(97, 1, 9).tolist() == [0, 1, 15, 28, 42, 55, 69, 82, 96]
    assert _columns(6, 5, 9).tolist() == [0, 2, 4, 5]


def test_long_settings_take_two_lines():
    draw, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), ImageFont.load_default(13)
    text = "budget=2,window=4,order=novelty,n_sinks=1"
    first, second = _two_lines(draw, text, font, 190)
    assert first + "," + second == text
    assert max(draw.textlength(line, font) for line in (first, second)) <= 190
    assert _two_lines(draw, "", font, 190) == [] and _two_lines(draw, "a=1", font, 190) == ["a=1"]


def test_report_tells_what_the_clip_is_about(continued, tmp_path):
    about = About(paragraphs=["What is <behind> it.", "More."], rows=[["policy"], ["a<b"]])
    page = save(continued, tmp_path, about)["report.html"].read_text()
    assert "<p>What is &lt;behind&gt; it.</p><p>More.</p>" in page
    assert "<tr><th>policy</th></tr>" in page and "<tr><td>a&lt;b</td></tr>" in page
