"""Where the bytes lie: drafts overwrite drafts, commits move the fence, packing closes the gaps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packcache.errors import CacheStateError
from packcache.store import KVStore
from tests.tools import bits

LAYERS, HEADS, SIZE = 3, 2, 4


def store(**settings_) -> KVStore:
    return KVStore(layers=LAYERS, kv_heads=HEADS, head_dim=SIZE, **settings_)


def content(start: int, count: int, layer: int = 0, dtype=torch.float32) -> torch.Tensor:
    """Keys that say which token they are: index + 1000 layer, in every channel."""
    index = torch.arange(start, start + count, dtype=torch.float64) + 1000 * layer
    return index[None, :, None].expand(HEADS, count, SIZE).to(dtype)


def write(target: KVStore, start: int, count: int) -> None:
    for layer in range(LAYERS):
        target.update(layer, content(start, count, layer), -content(start, count, layer))


def filled(*tokens: int, room: int = 0) -> KVStore:
    """A store with one commit per number."""
    out, start = store(), 0
    out.reserve(sum(tokens) + room)
    for count in tokens:
        out.open(count)
        write(out, start, count)
        out.commit()
        start += count
    return out


def held(target: KVStore) -> list[int]:
    """Which tokens every layer holds, K and V agreeing."""
    rows = [keys[0, :, 0] - 1000 * layer for layer, (keys, _) in enumerate(target)]
    for keys, values in target:
        assert torch.equal(keys, -values)
        assert torch.equal(keys, keys[:1, :, :1].expand_as(keys))
    assert all(torch.equal(rows[0], row) for row in rows)
    return rows[0].long().tolist()


def committed_bytes(target: KVStore) -> bytes:
    return b"".join(bits(x) for pair in target for x in pair)


def test_a_draft_leaves_the_committed_bytes_alone():
    """DESIGN 7, for any number of drafts, finished or not."""
    target = filled(5, 4, room=6)
    before = committed_bytes(target)
    target.open(6)
    for start in (100, 200):
        write(target, start, 6)
        assert committed_bytes(target) == before
        target.rollback()
    target.update(0, content(300, 6), content(300, 6))
    assert committed_bytes(target) == before
    assert held(target) == list(range(9))


def test_an_update_returns_views_of_everything_and_the_draft():
    target = filled(3, room=2)
    target.open(2)
    keys, values = target.update(1, content(50, 2, 1), -content(50, 2, 1))
    assert keys.shape == values.shape == (HEADS, 5, SIZE)
    assert (keys[0, :, 0] - 1000).tolist() == [0, 1, 2, 50, 51]
    assert keys.data_ptr() == target.keys(1).data_ptr()


def test_the_last_draft_is_what_a_commit_keeps():
    target = filled(3, room=2)
    target.open(2)
    write(target, 70, 2)
    target.rollback()
    write(target, 80, 2)
    target.commit()
    assert held(target) == [0, 1, 2, 80, 81]


def test_a_stale_draft_is_refused():
    """After a rollback every layer must write again before a commit."""
    target = filled(3, room=2)
    target.open(2)
    write(target, 70, 2)
    target.rollback()
    for written in range(LAYERS):
        missing = list(range(written, LAYERS))
        with pytest.raises(CacheStateError) as caught:
            target.commit()
        assert f"layers {missing} wrote no K/V since the last rollback" in str(caught.value)
        assert target.length == 3
        target.update(written, content(80, 2, written), -content(80, 2, written))
    target.commit()
    assert target.length == 5


def test_a_commit_needs_a_draft():
    target = filled(3, room=2)
    with pytest.raises(CacheStateError, match="commit without a forward"):
        target.commit()
    assert held(target) == [0, 1, 2]


def test_opening_again_forgets_what_was_written():
    target = filled(3, room=4)
    target.open(2)
    write(target, 70, 2)
    target.open(2)
    assert not target.complete
    with pytest.raises(CacheStateError, match="commit without a forward"):
        target.commit()


@pytest.mark.parametrize(
    "keys, values",
    [
        ((HEADS, 3, SIZE), (HEADS, 2, SIZE)),
        ((HEADS, 2, SIZE), (HEADS, 3, SIZE)),
        ((HEADS + 1, 2, SIZE), (HEADS + 1, 2, SIZE)),
        ((HEADS, 2, SIZE + 1), (HEADS, 2, SIZE + 1)),
        ((1, HEADS, 2, SIZE), (1, HEADS, 2, SIZE)),
    ],
)
def test_wrong_shapes_are_named(keys, values):
    target = filled(3, room=2)
    target.open(2)
    before = committed_bytes(target)
    with pytest.raises(CacheStateError) as caught:
        target.update(0, torch.zeros(keys), torch.zeros(values))
    assert f"keys {keys} and values {values}, expected (2, 2, 4)" in str(caught.value)
    assert committed_bytes(target) == before and not target.complete


@pytest.mark.parametrize("wrong", ["keys", "values"])
def test_wrong_dtypes_are_named(wrong):
    """K/V are never rounded on the way in by accident."""
    target = filled(room=2)
    target.open(2)
    pair = {"keys": content(0, 2), "values": content(0, 2)}
    pair[wrong] = pair[wrong].to(torch.bfloat16)
    with pytest.raises(CacheStateError, match=r"expected torch.float32 as the cache holds"):
        target.update(0, **pair)


def test_a_draft_must_fit():
    target = filled(3)
    with pytest.raises(CacheStateError, match="3 committed \\+ 1 draft tokens exceed capacity 3"):
        target.open(1)


def test_growth_carries_the_bytes_over():
    target = filled(5, 4)
    before = committed_bytes(target)
    target.reserve(40)
    assert (target.capacity, target.length) == (40, 9)
    assert committed_bytes(target) == before
    target.reserve(10)
    assert target.capacity == 40


@settings(max_examples=100)
@given(st.lists(st.booleans(), min_size=12, max_size=12))
def test_keep_holds_these_slots_in_order(mask):
    target = filled(5, 4, 3)
    wanted = [slot for slot, keep in enumerate(mask) if keep]
    where = [x.data_ptr() for x in (*target._keys, *target._values)]
    target.keep(np.array(wanted, dtype=np.int32))
    assert held(target) == wanted
    assert target.capacity == 12
    assert [x.data_ptr() for x in (*target._keys, *target._values)] == where


def test_packing_again_and_again_in_place():
    target = filled(5, 4, 3, room=3)
    target.keep(np.array([0, 1, 4, 6, 7, 11]))
    target.open(3)
    write(target, 12, 3)
    target.commit()
    target.keep(np.array([0, 1, 3, 6, 8]))
    assert held(target) == [0, 1, 6, 12, 14]


@pytest.mark.parametrize(
    "dtype, size", [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)]
)
def test_bytes_of_a_slot(dtype, size):
    """K and V of all layers: 3B in bf16 takes 112 KiB a token and branch (methods 1.9)."""
    assert store(dtype=dtype).slot_bytes == 2 * LAYERS * HEADS * SIZE * size
    assert (
        KVStore(layers=28, kv_heads=8, head_dim=128, dtype=torch.bfloat16).slot_bytes == 112 * 1024
    )


# --- a draft written in part --------------------------------------------------------------------


def test_some_rows_of_a_draft_are_written_again():
    target = filled(4, room=6)
    target.open(6)
    write(target, 4, 6)
    before = committed_bytes(target)
    rows = torch.tensor([5, 0, 2])
    for layer in range(LAYERS):
        new = 500.0 + rows.float()[None, :, None].expand(HEADS, 3, SIZE)
        keys, values = target.update(layer, new, -new, rows)
        assert keys.shape == (HEADS, 10, SIZE)
        plain = 1000.0 * layer
        assert keys[0, :, 0].tolist() == [
            *(plain + i for i in range(4)), 500, plain + 5, 502, plain + 7, plain + 8, 505,
        ]  # fmt: skip
        assert torch.equal(values, -keys)
    assert committed_bytes(target) == before


def test_rows_of_a_draft_that_was_never_whole_are_refused():
    target = filled(4, room=12)
    rows = torch.tensor([1])
    for _ in range(2):  # a draft before the last opening does not count
        target.open(6)
        with pytest.raises(
            CacheStateError, match="layer 0 was given 1 rows of a draft of 6 tokens"
        ):
            target.update(0, content(0, 1), content(0, 1), rows)
        write(target, 4, 6)


def test_a_draft_written_in_part_is_not_committed():
    target = filled(4, room=6)
    target.open(6)
    write(target, 4, 6)
    target.rollback()
    for layer in range(LAYERS):
        target.update(layer, content(0, 1, layer), -content(0, 1, layer), torch.tensor([1]))
    assert not target.complete
    with pytest.raises(CacheStateError, match=r"layers \[0, 1, 2\] wrote no K/V"):
        target.commit()


def test_rows_have_as_many_keys_as_they_say():
    target = filled(4, room=6)
    target.open(6)
    write(target, 4, 6)
    with pytest.raises(CacheStateError, match=r"expected \(2, 2, 4\)"):
        target.update(0, content(0, 3), content(0, 3), torch.tensor([1, 2]))


# --- a few tokens at a time ----------------------------------------------------------------------


def begun(tokens: int = 5):
    """A store of one layer with 3 committed tokens and a draft of which nothing is written."""
    store = KVStore(layers=1, kv_heads=2, head_dim=4)
    store.reserve(3 + tokens)
    store.open(3)
    store.update(0, *torch.randn(2, 2, 3, 4))
    store.commit()
    store.open(tokens)
    return store


def test_tokens_that_come_a_few_at_a_time_are_those_that_come_at_once():
    keys, values = torch.randn(2, 2, 5, 4)
    whole, parts = begun(), begun()
    for store in (whole, parts):
        store.keys(0)[:] = store.values(0)[:] = 1
    expected = whole.update(0, keys, values)
    for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
        assert not parts.complete
        seen = parts.extend(0, keys[:, part], values[:, part])
        assert seen[0].shape[1] == 3 + part.stop == 3 + parts.begun
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    for store in (whole, parts):
        store.commit()
    assert torch.equal(whole.keys(0), parts.keys(0)) and parts.begun == 0


def test_more_than_was_opened_is_refused_and_nothing_is_written():
    store = begun()
    store.extend(0, *torch.ones(2, 2, 4, 4))
    with pytest.raises(CacheStateError, match="given 2 tokens after 4 of a draft of 5: open what"):
        store.extend(0, *torch.ones(2, 2, 2, 4))
    with pytest.raises(CacheStateError, match=r"expected \(2, 1, 4\)"):
        store.extend(0, *torch.ones(2, 3, 1, 4))
    assert store.begun == 4
    with pytest.raises(CacheStateError, match="commit without a forward"):
        store.commit()


def test_what_was_taken_back_is_written_again():
    store = begun()
    store.extend(0, *torch.ones(2, 2, 5, 4))
    store.shorten(2)
    assert store.begun == 3 and not store.complete
    keys, _ = store.extend(0, *torch.full((2, 2, 2, 4), 7.0))
    assert keys[:, -2:].unique().tolist() == [7] and store.complete
    with pytest.raises(CacheStateError, match="6 tokens are to be taken back, expected at most 5"):
        store.shorten(6)


def test_heads_are_chosen_in_any_number():
    store = begun()
    held = store.keys(0).clone()
    store.select_heads(torch.tensor([1, 1, 0]))
    assert torch.equal(store.keys(0), held[[1, 1, 0]])
    assert store.slot_bytes == 2 * 3 * 4 * 4
    store.update(0, *torch.ones(2, 3, 5, 4))
    store.commit()
