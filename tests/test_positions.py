"""WHERE survivors say they are: angles, the identity behind the rebase, and how far it moves."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packcache import positions
from packcache.lumos.config import SIZES
from packcache.lumos.vocab import Vocab
from packcache.positions import (
    FLOAT64_FROM,
    AnchorKeys,
    Rotation,
    advance_keys,
    inverse_frequencies,
    pair_axes,
    rebase_delta,
    rotary_angles,
    rotary_table,
    rotate,
    temporal_pairs,
)
from packcache.testing import oracle
from packcache.timeline import FrameLayout

HEADS = [(32, 10000.0), (64, 10000.0), (128, 500000.0)]


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids_of(t: int, h: int, w: int, text: int = 0, flag: int = 1) -> torch.Tensor:
    return torch.tensor([[text], [t], [h], [w], [flag]])


def turned(x: torch.Tensor, ids: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """`x [D]` rotated at one position, float64."""
    freq = inverse_frequencies(x.shape[-1], theta).double()
    cos, sin = rotary_table(ids, freq, pair_axes(x.shape[-1]))
    return rotate(x[None], cos, sin)[0]


# --- frequencies and axes -----------------------------------------------------------------------


@pytest.mark.parametrize("head, theta", HEADS)
def test_each_axis_gets_its_share_of_the_pairs(head, theta):
    """lumos1-spec 2.1: 2/8 time, 3/8 height, 3/8 width, each over the whole frequency range."""
    axes, pairs = pair_axes(head), head // 2
    assert [(axes == axis).sum().item() for axis in range(3)] == [
        pairs // 4,
        3 * pairs // 8,
        3 * pairs // 8,
    ]
    assert temporal_pairs(head).tolist() == [m for m in range(pairs) if m % 16 < 4]
    height = [m for m in range(pairs) if m % 16 in (4, 5, 8, 9, 12, 13)]
    assert (axes == 1).nonzero().squeeze(1).tolist() == height


@pytest.mark.parametrize("head, theta", HEADS)
def test_frequencies(head, theta):
    freq = inverse_frequencies(head, theta)
    assert freq.dtype == torch.float32 and freq[0] == 1
    want = [theta ** (-2 * m / head) for m in range(head // 2)]
    assert freq.tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("head", [16, 48, 33])
def test_a_head_holds_whole_groups_of_pairs(head):
    with pytest.raises(ValueError, match=f"head size {head} does not hold whole groups of 16"):
        pair_axes(head)


def test_a_default_device_leaves_no_trace():
    """The table of axes is cached: models made on the meta device must not spoil later ones."""
    pair_axes.cache_clear()
    with torch.device("meta"):
        assert pair_axes(96).device.type == "cpu"
    assert pair_axes(96).tolist()[:4] == [0, 0, 0, 0]


# --- rotation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("head, theta", HEADS)
def test_a_rotation_is_written_out(head, theta):
    """Pair (m, m + D/2) is a point in the plane, turned by position times frequency."""
    x = spread(head)
    ids = ids_of(t=40, h=24, w=88)
    out = turned(x, ids, theta)
    freq = inverse_frequencies(head, theta).double()
    for m in range(head // 2):
        place = (40, 24, 88)[pair_axes(head)[m]]
        point = torch.complex(x[m], x[m + head // 2])
        point = point * torch.polar(torch.ones(1).double(), freq[m : m + 1] * place)
        assert torch.allclose(
            torch.stack((out[m], out[m + head // 2])), torch.view_as_real(point)[0]
        )


def test_text_turns_all_pairs_by_its_index():
    """Flag 0: t, h and w are not looked at."""
    x = spread(64)
    same = turned(x, ids_of(1, 2, 3, text=77, flag=0))
    assert torch.equal(same, turned(x, ids_of(9, 9, 9, text=77, flag=0)))
    assert torch.equal(same, turned(x, ids_of(77, 77, 77, text=1, flag=1)))


def test_scores_depend_on_differences_only():
    q, k = spread(64, seed=1), spread(64, seed=2)
    near = turned(q, ids_of(40, 16, 24)) @ turned(k, ids_of(8, 0, 16))
    far = turned(q, ids_of(1040, 116, 324)) @ turned(k, ids_of(1008, 100, 316))
    assert near.item() == pytest.approx(far.item(), abs=1e-9)


@pytest.mark.parametrize("index", [FLOAT64_FROM - 1, FLOAT64_FROM, 10 * FLOAT64_FROM + 12345])
def test_angles_are_float64_where_float32_is_too_coarse(index):
    """Beyond 2^20 a float32 product is off by more than 0.03 rad; text and t, h, w count."""
    freq = inverse_frequencies(64, 10000.0)
    exact = index * freq.double()
    for ids in (ids_of(0, 0, 0, index, 0), ids_of(index, index, index)):
        angles = rotary_angles(ids, freq, pair_axes(64))[0]
        wide = index >= FLOAT64_FROM
        assert angles.dtype == (torch.float64 if wide else torch.float32)
        error = (angles.double() - exact).abs().max()
        assert error < (1e-6 if wide else 0.0625)
        cos, _ = rotary_table(ids, freq, pair_axes(64))
        assert cos.dtype == torch.float32
        assert not wide or (cos[0].double() - exact.cos()).abs().max() < 1e-6


def test_angles_below_are_float32_products():
    """Upstream's order float32(position) * float32(frequency), to the bit."""
    freq = inverse_frequencies(64, 10000.0)
    angles = rotary_angles(ids_of(0, 0, 0, 53321, 0), freq, pair_axes(64))
    assert torch.equal(angles[0], torch.tensor(53321.0) * freq)


def test_a_float64_model_has_float64_angles():
    freq = inverse_frequencies(64, 10000.0).double()
    assert rotary_table(ids_of(5, 6, 7), freq, pair_axes(64))[0].dtype == torch.float64


# --- position ids -------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [3, 19])
@pytest.mark.parametrize("rows, cols", [(4, 4), (4, 12), (8, 4)])
def test_position_ids_token_by_token(prefix, rows, cols):
    """Against lumos1-spec 2.2 written as a loop; every frame of a sequence."""
    layout = FrameLayout(rows=rows, cols=cols)
    vocab = Vocab(SIZES["toy"])
    want = oracle.sequence_positions(SIZES["toy"], prefix, 3, layout)
    parts = [positions.text_positions(0, prefix)]
    parts += [vocab.frame_positions(prefix, frame, layout) for frame in range(3)]
    assert torch.equal(torch.cat(parts, dim=1), want)


def test_new_lines_lie_behind_their_row():
    ids = Vocab(SIZES["toy"]).frame_positions(5, 2, FrameLayout(rows=2, cols=2))
    origin, start = 8, 5 + 2 * 10
    assert ids[:, 0].tolist() == [start] * 4 + [0]
    assert ids[:, 3].tolist() == [start + 3, origin + 8, origin, origin, 1]
    assert ids[:, 5].tolist() == [start + 5, origin + 8, origin, origin + 16, 1]
    assert ids[:, 9].tolist() == [start + 9] * 4 + [0]


# --- rebase -------------------------------------------------------------------------------------


@pytest.mark.parametrize("head, theta", HEADS)
@pytest.mark.parametrize("frames", [1, 7, 90])
def test_advancing_anchors_is_shifting_window_and_frame_back(head, theta, frames):
    """methods 3.5: P1 = P2, for content and for text anchors, to rounding in float64."""
    q, k = spread(head, seed=1), spread(head, seed=2)
    rotation = Rotation.mm_rope(inverse_frequencies(head, theta).double())
    here, back = ids_of(400, 16, 24), ids_of(400 - 4 * frames, 16, 24)
    for anchor in (ids_of(8, 0, 40), ids_of(0, 0, 0, text=13, flag=0)):
        shifted = turned(q, back, theta) @ turned(k, anchor, theta)
        advanced = turned(q, here, theta) @ advance_keys(turned(k, anchor, theta), frames, rotation)
        assert shifted.item() == pytest.approx(advanced.item(), abs=4e-13)
        assert abs(shifted - turned(q, here, theta) @ turned(k, anchor, theta)) > 1e-3


def test_a_shifted_border_query_is_one_rotation_more():
    """DESIGN 4.5: border q and k shifted on the temporal pairs make the two modes equal."""
    q, k = spread(64, seed=1), spread(64, seed=2)
    rotation = Rotation.mm_rope(inverse_frequencies(64, 10000.0).double())
    border, anchor = ids_of(0, 0, 0, text=500, flag=0), ids_of(8, 0, 40)
    shifted = advance_keys(turned(q, border), -5, rotation) @ turned(k, anchor)
    advanced = turned(q, border) @ advance_keys(turned(k, anchor), 5, rotation)
    assert shifted.item() == pytest.approx(advanced.item(), abs=4e-14)


@settings(max_examples=50)
@given(st.integers(-300, 300), st.integers(1, 8))
def test_advance_turns_temporal_pairs_only_and_adds_up(frames, stride):
    keys = spread(2, 5, 64)
    rotation = Rotation.mm_rope(inverse_frequencies(64, 10000.0).double(), stride)
    out = advance_keys(keys, frames, rotation)
    pairs = temporal_pairs(64)
    moved = torch.zeros(64, dtype=torch.bool)
    moved[torch.cat((pairs, pairs + 32))] = True
    assert torch.equal(out[..., ~moved], keys[..., ~moved])
    back = advance_keys(out, -frames, rotation)
    assert (back - keys).abs().max() < 1e-12
    assert torch.allclose(out.norm(dim=-1), keys.norm(dim=-1))
    twice = advance_keys(advance_keys(keys, frames, rotation), 3, rotation)
    assert (twice - advance_keys(keys, frames + 3, rotation)).abs().max() < 1e-11


def test_advancing_by_frames_is_the_key_of_a_later_frame():
    k = spread(64)
    rotation = Rotation.mm_rope(inverse_frequencies(64, 10000.0).double(), stride=4)
    later = advance_keys(turned(k, ids_of(8, 16, 24)), 3, rotation)
    assert torch.allclose(later, turned(k, ids_of(20, 16, 24)), atol=1e-12)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def test_rounding_stays_flat_from_a_pristine_copy_and_grows_without():
    """methods 3.5: bf16 over 64 slides, on the temporal channels; re-rotating is the control."""
    exact = spread(4, 200, 128)
    freq = inverse_frequencies(128, 10000.0)
    rotation, wide = Rotation.mm_rope(freq), Rotation.mm_rope(freq.double())
    pairs = temporal_pairs(128)
    temporal = torch.cat((pairs, pairs + 64))
    stored = exact.bfloat16()
    anchors = AnchorKeys(rotation)
    anchors.remember([stored])
    again, flat, grown = stored.clone(), [], []
    for slide in range(1, 65):
        keys = stored.clone()
        anchors.advance([keys], slide)
        again = advance_keys(again, 1, rotation)
        want = advance_keys(exact, slide, wide)[..., temporal]
        flat.append(relative_error(keys[..., temporal], want))
        grown.append(relative_error(again[..., temporal], want))
    assert max(flat) < 0.003 and max(flat) < 1.1 * min(flat)
    assert grown[0] == pytest.approx(flat[0], rel=0.01)
    assert grown[-1] > 5 * flat[-1]


def test_pristine_copies_cost_a_quarter_of_the_anchor_keys():
    anchors = AnchorKeys(Rotation.mm_rope(inverse_frequencies(64, 10000.0)))
    keys = [spread(2, 30, 64).float() for _ in range(3)]
    anchors.remember(keys)
    assert anchors.nbytes == sum(k.nbytes for k in keys) // 4


def test_without_memory_pristine_copies_are_as_large_and_only_grow(monkeypatch):
    """On the device "meta", whose ops compute sizes alone."""
    rotation = Rotation.mm_rope(inverse_frequencies(64, 10000.0))
    anchors, sizes = AnchorKeys(rotation), AnchorKeys(rotation)
    for count in (0, 13, 30, 13, 30):
        keys = [spread(2, count, 64).bfloat16() for _ in range(3)]
        anchors.remember(keys)
        sizes.remember([k.to("meta") for k in keys])
        assert sizes.nbytes == anchors.nbytes
    assert sizes.nbytes == 3 * 2 * 30 * 16 * 2
    monkeypatch.setattr(positions, "rotate", None)  # there is nothing to turn
    sizes.advance([k.to("meta") for k in keys], 2)
    assert sizes.nbytes == anchors.nbytes


def test_pristine_copies_are_taken_once():
    """What is remembered is the key as committed, though the stored one has been advanced since."""
    rotation = Rotation.mm_rope(inverse_frequencies(64, 10000.0).double())
    anchors, keys = AnchorKeys(rotation), spread(2, 6, 64)
    stored = keys.clone()
    anchors.remember([stored[:, :4]])
    anchors.advance([stored], 5)
    assert torch.equal(stored[:, 4:], keys[:, 4:])  # the fifth and sixth are no anchors yet
    anchors.remember([stored])
    anchors.advance([stored], 9)
    assert torch.allclose(stored, advance_keys(keys, 9, rotation), atol=1e-14)
    anchors.advance([stored], 0)
    assert torch.allclose(stored, keys, atol=1e-15)


@pytest.mark.parametrize(
    "frame, oldest, sinks, trained, rule, delta",
    [
        # trained: inside the range nothing moves, beyond it one latent frame at a time
        (6, 4, 0, 7, "trained", 0),
        (7, 4, 0, 7, "trained", 1),
        (12, 4, 0, 7, "trained", 6),
        (12, 4, 2, 7, "trained", 5),
        (12, 0, 0, 7, "trained", 6),
        # a window that reaches beyond the trained range is left whole
        (12, 9, 0, 7, "trained", 2),
        (12, 9, 2, 7, "trained", 0),
        (96, 4, 0, None, "trained", 0),
        # slide: image, sinks, window and current frame lie without a gap
        (5, 4, 0, 7, "slide", 0),
        (6, 4, 0, 7, "slide", 1),
        (7, 4, 0, 7, "slide", 2),
        (12, 4, 2, 7, "slide", 5),
        (12, 4, 2, None, "slide", 5),
        (12, 0, 0, 7, "slide", 11),
    ],
)
def test_how_far_the_anchors_move(frame, oldest, sinks, trained, rule, delta):
    got = rebase_delta(
        frame=frame,
        oldest_distance=oldest,
        sinks=sinks,
        trained_latent_frames=trained,
        rule=rule,
    )
    assert got == delta


@pytest.mark.parametrize("rule", ["trained", "slide"])
@pytest.mark.parametrize("trained", [None, 2, 7])
@pytest.mark.parametrize("image", [False, True])
def test_nothing_moves_while_nothing_was_evicted(rule, trained, image):
    """At any length: history reaches back to the first frame, sinks or not."""
    for frame in range(1, 60):
        history = frame - image
        for sinks in range(min(history, 3) + 1):
            oldest = history - sinks
            assert (
                rebase_delta(
                    frame=frame,
                    oldest_distance=oldest,
                    sinks=sinks,
                    trained_latent_frames=trained,
                    rule=rule,
                )
                == 0
            )


@pytest.mark.parametrize("image", [0, 1])
def test_the_first_slide_moves_one_frame_with_and_without_an_image(image):
    """Window of 3 history frames: delta counts the latent frames that left, from the first on."""
    for left in range(6):
        moved = rebase_delta(
            frame=image + 3 + left,
            oldest_distance=3,
            sinks=0,
            trained_latent_frames=7,
            rule="slide",
            image_frames=image,
        )
        assert moved == left


def test_a_full_window_slides_one_latent_frame_at_a_time():
    for rule in ("trained", "slide"):
        moves = [
            rebase_delta(
                frame=f, oldest_distance=min(f - 1, 4), sinks=0, trained_latent_frames=7, rule=rule
            )
            for f in range(1, 40)
        ]
        steps = [b - a for a, b in pairwise(moves)]
        first = steps.index(1)
        assert steps == [0] * first + [1] * (len(steps) - first)
