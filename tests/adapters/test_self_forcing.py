"""The Self-Forcing protocol: the kit, recaching, new clips, growth past the table, wrong use."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from packcache.adapters.self_forcing import SelfForcingCache, longer_table, wan_rotation
from packcache.errors import CacheStateError, InvalidSetting
from packcache.policies import FullCache, PackCache, SinkWindow, SlidingWindow
from packcache.testing.causal_wan import CausalWan, dict_cache, rotary_table
from packcache.testing.conformance import check
from packcache.testing.subjects import SUBJECTS
from tests.tools import ROOT

GRID, CHUNK = (2, 3), 3
SIZE = GRID[0] * GRID[1]


@pytest.fixture
def model() -> CausalWan:
    return CausalWan(grid=GRID)


def made(model: CausalWan, policy, **settings) -> SelfForcingCache:
    return SelfForcingCache(policy, layers=len(model.blocks), grid=GRID, **settings)


def chunk(number: int, frames: int = CHUNK, batch: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(number)
    return torch.randn(batch, frames * SIZE, 48, generator=draw)


def play(model: CausalWan, cache, chunks, start: int = 0) -> list[Tensor]:
    """Chunk after chunk, as a pipeline does: two noisy forwards, then the clean one."""
    outputs = []
    for x in chunks:
        for timestep in (0.8, 0.3):
            model(x + timestep, timestep=timestep, kv_cache=cache, current_start=start)
        outputs.append(model(x, kv_cache=cache, current_start=start))
        start += x.shape[1]
    return outputs


@pytest.mark.parametrize("name", ["self-forcing", "longlive"])
def test_it_passes_the_kit(name):
    report = check(SUBJECTS[name]())
    assert report.ok, "\n".join(report.lines())
    assert {found.state for found in report.findings} == {"holds"}


def test_nothing_is_built_in():
    """The sizes of one checkpoint, which copies of this protocol carry around."""
    text = (ROOT / "src/packcache/adapters/self_forcing.py").read_text()
    code = re.sub(r'""".*?"""', "", text, flags=re.DOTALL)
    assert not re.findall(r"\b(1560|30|12|32760|128|52)\b", code)


@pytest.mark.parametrize("deferred", [False, True])
def test_a_window_of_theirs_is_a_window_of_ours(model, deferred):
    """Their rolling buffer with a sink, and our policy of the same frames: the same video."""
    theirs = CausalWan(grid=GRID, local_attn_size=3 * CHUNK, sink_size=CHUNK, deferred=deferred)
    chunks = [chunk(n) for n in range(7)]
    plain = play(theirs, dict_cache(theirs, 3 * CHUNK * SIZE), chunks)
    # their window counts the open chunk and the sink
    ours = play(model, made(model, SinkWindow(sinks=CHUNK, frames=CHUNK)), chunks)
    for one, other in zip(plain, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_held_bytes_are_the_policys_prediction(model):
    policy = PackCache(budget=2, window=4)
    cache = made(model, policy)
    play(model, cache, [chunk(n) for n in range(6)])
    cache.commit()
    held = policy.max_history(SIZE, policy.budget_for(SIZE))
    assert cache.cache.kv_bytes == held * 2 * 2 * 48 * 4  # K and V, layers, width, float32
    assert cache.cache.kv_bytes < 2 * 2 * 48 * 4 * 6 * CHUNK * SIZE


def test_a_batch_is_its_rows(model):
    chunks = [chunk(n, batch=2) for n in range(5)]
    policy = PackCache(budget=2, window=4)
    both = play(model, made(model, policy), chunks)
    for row in range(2):
        alone = play(model, made(model, policy), [x[row : row + 1] for x in chunks])
        for one, other in zip(both, alone, strict=True):
            torch.testing.assert_close(one[row], other[0], rtol=1e-5, atol=1e-5)


# --- another prompt, another clip ----------------------------------------------------------------


def test_a_recache_is_the_video_with_those_frames_from_the_start(model):
    """The last two chunks are encoded again with other content: what was before stays."""
    cache = made(model, FullCache())
    play(model, cache, [chunk(n) for n in range(4)])
    again = torch.cat((chunk(12), chunk(13)), dim=1)
    model(again, kv_cache=cache, current_start=2 * CHUNK * SIZE)
    (after,) = play(model, cache, [chunk(4)], start=4 * CHUNK * SIZE)

    fresh = made(model, FullCache())
    play(model, fresh, [chunk(0), chunk(1)])
    model(again, kv_cache=fresh, current_start=2 * CHUNK * SIZE)
    (straight,) = play(model, fresh, [chunk(4)], start=4 * CHUNK * SIZE)
    assert torch.equal(after, straight)
    cache.commit()
    assert cache.cache.timeline.counts() == dict.fromkeys(range(5 * CHUNK), SIZE)


def test_sinks_survive_a_recache_from_the_start(model):
    """Everything is encoded again, and the sinks are as they were before, to the bit."""
    cache = made(model, SinkWindow(sinks=2, frames=CHUNK))
    play(model, cache, [chunk(0), chunk(1)])
    cache.commit()
    sinks = [k[:, : 2 * SIZE].clone() for k, _ in cache.cache.stores[0]]
    again = torch.cat((chunk(20), chunk(21)), dim=1)
    model(again, kv_cache=cache, current_start=0)
    cache.commit()
    for before, (k, _) in zip(sinks, cache.cache.stores[0], strict=True):
        assert torch.equal(before, k[:, : 2 * SIZE])
    assert cache.cache.timeline.num_frames == 2 * CHUNK


@pytest.mark.parametrize("chunks", [5, 6, 7])
def test_a_recache_as_longlive_does_it(chunks):
    """A prompt is switched: the last window is encoded again in one forward, sinks stay. The same
    video as with the model's own dicts. (From the front LongLive writes its sinks anew; ours stay.)
    """
    window = 4 * CHUNK
    settings = {"local_attn_size": window, "sink_size": CHUNK, "deferred": True}
    videos = []
    for ours in (False, True):
        model = CausalWan(grid=GRID, **settings)
        policy = SinkWindow(sinks=CHUNK, frames=window - 2 * CHUNK)
        cache = made(model, policy) if ours else dict_cache(model, window * SIZE)
        before = play(model, cache, [chunk(n) for n in range(chunks)])
        x = torch.cat([chunk(n) for n in range(chunks)], dim=1)[:, -window * SIZE :] + 0.5
        start = (chunks * CHUNK - window) * SIZE
        recached = model(x, kv_cache=cache, current_start=start)
        after = play(model, cache, [chunk(20), chunk(21)], start=chunks * CHUNK * SIZE)
        videos.append([*before, recached, *after])
    for one, other in zip(*videos, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def reads(model, cache, *slots: tuple[int, int]) -> Tensor:
    return torch.cat([cache[0]["k"][:, a * SIZE : b * SIZE] for a, b in slots], dim=1)


def test_reads_in_parts_make_the_whole(model):
    """Held tokens come with the first part, the chunk's by their slots; a repeat is a repeat."""
    cache = made(model, SlidingWindow(frames=2))
    play(model, cache, [chunk(n) for n in range(3)])
    whole = reads(model, cache, (0, 9))
    assert whole.shape[1] == 5 * SIZE
    model(chunk(2), kv_cache=cache, current_start=6 * SIZE)
    assert torch.equal(reads(model, cache, (0, 1), (1, 9)), whole)
    assert torch.equal(reads(model, cache, (0, 1), (1, 9)), whole)
    model(chunk(2), kv_cache=cache, current_start=6 * SIZE)
    assert torch.equal(reads(model, cache, (0, 7), (7, 8), (8, 9)), whole)
    model(chunk(2), kv_cache=cache, current_start=6 * SIZE)
    last = torch.cat((whole[:, : 2 * SIZE], whole[:, 3 * SIZE :]), dim=1)
    assert torch.equal(reads(model, cache, (7, 9)), last)  # a window that is less than the chunk


def test_counters_at_zero_begin_a_new_clip(model):
    """Also a clip of another batch: nothing of the one before is left."""
    cache = made(model, PackCache(budget=2, window=4))
    play(model, cache, [chunk(n) for n in range(4)])
    for layer in cache:
        for name in ("global_end_index", "local_end_index"):
            layer[name] = torch.tensor([0])
    chunks = [chunk(30 + n, batch=2) for n in range(3)]
    second = play(model, cache, chunks)
    fresh = play(model, made(model, PackCache(budget=2, window=4)), chunks)
    assert all(torch.equal(a, b) for a, b in zip(second, fresh, strict=True))


def test_a_reset_leaves_counters_of_the_kind_they_were(model):
    cache = made(model, FullCache())
    play(model, cache, [chunk(0)])
    cache[0]["global_end_index"] = 18  # FastVideo's are plain integers
    cache.reset()
    assert cache[0]["global_end_index"] == 0 and isinstance(cache[0]["global_end_index"], int)
    assert torch.equal(cache[1]["global_end_index"], torch.tensor([0]))


def test_condition_images_never_leave(model):
    cache = made(model, SlidingWindow(frames=1), image_frames=1)
    play(model, cache, [chunk(0, frames=1), *(chunk(n) for n in range(1, 5))])
    cache.commit()
    assert [entry.span.frame for entry in cache.cache.timeline.anchors] == [0]
    assert list(cache.cache.timeline.counts()) == [4 * CHUNK]


# --- positions -----------------------------------------------------------------------------------


def test_a_table_is_continued_as_it_began():
    whole, short = rotary_table(40, 24), rotary_table(16, 24)
    assert torch.equal(longer_table(short, 16), short)
    longer = longer_table(short, 40)
    assert torch.equal(longer[:16], short)
    torch.testing.assert_close(longer, whole, rtol=0, atol=1e-12)


def test_more_frames_than_the_table_has(model):
    """Past the end a host fails; with a longer table it makes what a long table would make."""
    model.freqs = rotary_table(9, 24)
    chunks = [chunk(n) for n in range(6)]
    with pytest.raises(IndexError):
        play(model, made(model, SlidingWindow(frames=CHUNK)), chunks)
    model.freqs = longer_table(model.freqs, 6 * CHUNK)
    outputs = play(model, made(model, SlidingWindow(frames=CHUNK)), chunks)
    straight = play(CausalWan(grid=GRID), made(model, SlidingWindow(frames=CHUNK)), chunks)
    torch.testing.assert_close(outputs[-1], straight[-1], rtol=1e-6, atol=1e-6)


def test_time_carries_the_first_pairs(model):
    """Keys advanced by the rotation are the keys of a later frame; height and width stay."""
    from packcache.positions import advance_keys

    rotation = wan_rotation(model.freqs)
    keys = torch.randn(1, SIZE, 2, 24, dtype=torch.float64)
    here, later = (model.rotate(keys, frame * SIZE) for frame in (2, 7))
    turned = advance_keys(here.transpose(1, 2), 5, rotation).transpose(1, 2)
    torch.testing.assert_close(turned, later, rtol=1e-9, atol=1e-9)


def test_sinks_are_rebased_as_if_the_window_had_moved_back(model):
    """One layer, from un-rotated keys in float64: sinks lie `delta` frames later."""
    one = CausalWan(grid=GRID, layers=1)
    policy, trained = SinkWindow(sinks=CHUNK, frames=CHUNK), 3 * CHUNK + 1
    cache = made(
        one, policy, positions="rebase", rotation=wan_rotation(one.freqs),
        trained_latent_frames=trained,
    )  # fmt: skip
    chunks = [chunk(n) for n in range(6)]
    out = play(one, cache, chunks)[-1]
    delta = cache.cache.delta
    assert delta == 5 * CHUNK - max(trained - 1, 2 * CHUNK + 1)

    block, attended = one.blocks[0], []
    for number, moved in ((0, delta), (4, 0), (5, 0)):
        parts = block.qkv(block.norm1(chunks[number])).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (2, 24)).double() for part in parts)
        start = (number * CHUNK + moved) * SIZE
        attended.append((one.rotate(q, start), one.rotate(k, start), v))
    q = attended[-1][0].transpose(1, 2)
    k, v = (torch.cat([x[i] for x in attended], dim=1).transpose(1, 2) for i in (1, 2))
    seen = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    x = chunks[-1] + block.out(seen.transpose(1, 2).flatten(2).float())
    expected = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# --- wrong use -----------------------------------------------------------------------------------


def held(cache: SelfForcingCache) -> list[Tensor]:
    return [tensor.clone() for pair in cache.cache.stores[0] for tensor in pair]


@pytest.mark.parametrize(
    ("x", "start", "error", "message"),
    [
        (chunk(9)[:, :-1], 12, InvalidSetting, "17 tokens at token 72 of the video are no whole"),
        (chunk(9), 13, CacheStateError, "a chunk begins at token 78 of the video, expected 72"),
        (
            chunk(9, batch=2),
            12,
            CacheStateError,
            r"are \(2, 2, 24\) in torch.float32, and were \(1",
        ),
        (chunk(9).double(), 12, CacheStateError, "in torch.float64, and were"),
    ],
)
def test_a_wrong_chunk_is_one_line_and_leaves_the_cache_as_it_was(
    model, monkeypatch, x, start, error, message
):
    cache = made(model, PackCache(budget=2, window=4))
    play(model, cache, [chunk(n) for n in range(4)])
    cache.commit()
    before = held(cache)
    size = len(x), x.shape[1], 2, 24
    wrong = torch.zeros(size, dtype=x.dtype)
    place = slice(start * SIZE, start * SIZE + x.shape[1])
    cache[0]["k"][:, place] = wrong
    with pytest.raises(error, match=message):
        cache[0]["v"][:, place] = wrong
    assert all(torch.equal(a, b) for a, b in zip(before, held(cache), strict=True))
    play(model, cache, [chunk(4)], start=4 * CHUNK * SIZE)  # and it goes on


def test_values_may_be_written_before_keys(model):
    cache, straight = (made(model, PackCache(budget=2, window=4)) for _ in range(2))
    keys, values = torch.randn(2, 1, 18, 2, 24)
    for layer in range(2):
        cache[layer]["v"][:, 0:18], cache[layer]["k"][:, 0:18] = values, keys
        straight[layer]["k"][:, 0:18], straight[layer]["v"][:, 0:18] = keys, values
        for name in ("k", "v"):
            assert torch.equal(cache[layer][name][:, 0:18], straight[layer][name][:, 0:18])


def test_a_chunk_that_not_all_layers_wrote_cannot_be_committed(model):
    cache = made(model, FullCache())
    play(model, cache, [chunk(0)])
    cache[0]["k"][:, 18:36] = torch.zeros(1, 18, 2, 24)
    cache[0]["v"][:, 18:36] = torch.zeros(1, 18, 2, 24)
    with pytest.raises(CacheStateError, match="without a forward of every layer"):
        cache.commit()


def test_layers_out_of_order_are_another_models(model):
    cache = made(model, FullCache())
    play(model, cache, [chunk(0)])
    cache[1]["k"][:, 18:36] = torch.zeros(1, 18, 2, 24)
    with pytest.raises(CacheStateError, match="layers are written in order, one cache a model"):
        cache[1]["v"][:, 18:36] = torch.zeros(1, 18, 2, 24)


def test_a_recache_of_sinks_alone_is_refused(model):
    cache = made(model, SinkWindow(sinks=CHUNK, frames=CHUNK))
    play(model, cache, [chunk(0), chunk(1)])
    with pytest.raises(CacheStateError, match="frames 0 to 2 are sinks or condition images"):
        model(chunk(5), kv_cache=cache, current_start=0)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda c: c[0]["k"][0], r"k\[0\] is no slice of slots: expected \[:, start:end\]"),
        (lambda c: c[0]["v"][:, :], "is no slice of slots"),
        (lambda c: c[0]["k"][:, 0:18], "'k' was read before k and v of the chunk were written"),
        (lambda c: c[0].__setitem__("k", torch.zeros(1)), "'k' was replaced, expected writes to"),
        (lambda c: c[0]["k"].__setitem__((slice(None), slice(0, 5)), torch.zeros(1, 6, 2, 24)),
         "6 tokens were written to slots 0 to 5"),
        (lambda c: c.cache, "nothing was written yet: run the model once"),
    ],
)  # fmt: skip
def test_what_is_no_use_of_the_protocol_is_one_line(model, use, message):
    with pytest.raises(CacheStateError, match=message):
        use(made(model, FullCache()))


@pytest.mark.parametrize("settings", [{"layers": 0}, {"grid": (0, 3)}, {"image_frames": -1}])
def test_settings_are_checked(settings):
    with pytest.raises(InvalidSetting, match="expected a model of at least one layer"):
        SelfForcingCache(FullCache(), **{"layers": 2, "grid": GRID, **settings})
