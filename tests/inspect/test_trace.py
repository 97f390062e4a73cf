"""A trace file: what comes back is what was written, to a stated error."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packcache.errors import InputFileError, OutputError
from packcache.inspect.trace import COMMIT, CURRENT, SCHEMA, Sample, Trace
from packcache.timeline import FrameLayout, Role

LAYOUT = FrameLayout(rows=2, cols=2)  # 10 tokens
TEXT = 3


def random_mass(
    rng: np.random.Generator, layers: int, tokens: int, octaves: float = 30
) -> np.ndarray:
    """Attention that spans many orders of magnitude, rows summing to 1."""
    mass = 2.0 ** -rng.uniform(0, octaves, (layers, tokens))
    return (mass / mass.sum(axis=1, keepdims=True)).astype(np.float32)


def example(frames: int = 3, clips: int = 2, *, image: bool = True, ids: bool = True) -> Trace:
    """Two layers of five, random attention, two samples a latent frame."""
    rng = np.random.default_rng(7)
    samples = [
        Sample(
            clip=clip, frame=frame, step=step, steps=4, branch=0,
            mass=random_mass(rng, 2, TEXT + (frame + 1) * LAYOUT.tokens),
        )
        for clip in range(clips)
        for frame in range(frames)
        for step in (0, COMMIT)
    ]  # fmt: skip
    numbers = rng.integers(0, 70_000, (clips, frames, LAYOUT.tokens)).astype(np.int32)
    return Trace(
        layout=LAYOUT,
        text=TEXT,
        roles=(Role.IMAGE if image else Role.HISTORY, *[Role.HISTORY] * (frames - 1)),
        layers=(0, 4),
        num_layers=5,
        visible=np.arange(LAYOUT.tokens) % 3 > 0,
        ids=list(numbers) if ids else [],
        samples=samples,
        value_norm=np.array([2.5, 3.5], dtype=np.float32),
        workload={"model": "made up"},
        environment={"device": "cpu"},
    )


@pytest.mark.parametrize("ids", [True, False])
def test_what_is_saved_comes_back(tmp_path, ids):
    saved = example(ids=ids)
    path = tmp_path / "some.trace"
    saved.save(path)
    loaded = Trace.load(path)
    for name in ("layout", "text", "roles", "layers", "num_layers", "workload", "environment"):
        assert getattr(loaded, name) == getattr(saved, name), name
    assert np.array_equal(loaded.visible, saved.visible)
    assert np.array_equal(loaded.value_norm, saved.value_norm)
    assert loaded.clips == saved.clips == range(2)
    assert len(loaded.ids) == len(saved.ids)
    assert all(np.array_equal(a, b) for a, b in zip(loaded.ids, saved.ids, strict=True))
    for one, other in zip(loaded.samples, saved.samples, strict=True):
        for name in ("clip", "frame", "step", "steps", "branch"):
            assert getattr(one, name) == getattr(other, name), name
        assert one.mass.dtype == np.float32 and one.mass.shape == other.mass.shape
        assert np.allclose(one.mass.sum(axis=1, dtype=np.float64), 1, atol=1e-6)
        assert np.allclose(one.mass, other.mass, rtol=1e-3, atol=0)


def test_no_visibility_comes_back_as_none(tmp_path):
    bare = example()
    Trace(**{**vars(bare), "visible": None}).save(tmp_path / "a.trace")
    assert Trace.load(tmp_path / "a.trace").visible is None


def test_a_trace_saved_again_is_the_same_file(tmp_path):
    example().save(tmp_path / "a.trace")
    example().save(tmp_path / "b.trace")
    assert (tmp_path / "a.trace").read_bytes() == (tmp_path / "b.trace").read_bytes()


# --- what rounding costs -------------------------------------------------------------------------


def saved_and_loaded(mass: np.ndarray, path) -> np.ndarray:
    """One sample's attention through a file."""
    layout = FrameLayout(rows=1, cols=mass.shape[1], header=0, footer=0, new_line=False)
    sample = Sample(clip=0, frame=0, step=COMMIT, steps=1, branch=0, mass=mass)
    Trace(
        layout=layout, text=0, roles=(Role.HISTORY,), layers=tuple(range(len(mass))),
        num_layers=len(mass), visible=None, ids=[], samples=[sample],
        value_norm=np.ones(len(mass), dtype=np.float32),
    ).save(path)  # fmt: skip
    return Trace.load(path).samples[0].mass


def worst_sum(found: np.ndarray, true: np.ndarray) -> float:
    """The largest error that a sum over any tokens of a row can have."""
    error = found.astype(np.float64) - true
    return max(np.maximum(error, 0).sum(axis=1).max(), np.maximum(-error, 0).sum(axis=1).max())


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), tokens=st.integers(2, 3000), octaves=st.floats(0, 60))
def test_no_sum_of_tokens_is_off_by_a_thousandth(tmp_path_factory, seed, tokens, octaves):
    mass = random_mass(np.random.default_rng(seed), 2, tokens, octaves)
    found = saved_and_loaded(mass, tmp_path_factory.mktemp("trace") / "a.trace")
    assert worst_sum(found, mass) < 1e-3


def test_nor_over_as_many_tokens_as_a_large_clip_has(tmp_path):
    rng = np.random.default_rng(0)
    flat = np.full((1, 60_000), 1 / 60_000, dtype=np.float32)
    spread = random_mass(rng, 1, 60_000, 50)
    for mass in (flat, spread):
        assert worst_sum(saved_and_loaded(mass, tmp_path / "a.trace"), mass) < 1e-3


def test_nothing_stays_nothing_and_all_stays_all(tmp_path):
    mass = np.zeros((1, 9), dtype=np.float32)
    mass[0, 4] = 1
    assert np.array_equal(saved_and_loaded(mass, tmp_path / "a.trace"), mass)


# --- what the tokens are -------------------------------------------------------------------------


def test_tokens_say_role_frame_distance_and_offset():
    layout = FrameLayout(rows=1, cols=2, header=0, footer=0, new_line=False)
    base = example()
    trace = Trace(**{**vars(base), "layout": layout, "text": 3})
    mass = np.full((2, 9), 1 / 9, dtype=np.float32)
    told = trace.tokens(Sample(clip=0, frame=2, step=0, steps=4, branch=0, mass=mass))
    text, image, history = (list(Role).index(role) for role in Role)
    assert told.role.tolist() == [text] * 3 + [image] * 2 + [history] * 2 + [CURRENT] * 2
    assert told.frame.tolist() == [-1, -1, -1, 0, 0, 1, 1, 2, 2]
    assert told.distance.tolist() == [-1, -1, -1, 2, 2, 1, 1, 0, 0]
    assert told.offset.tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 1]


def test_tokens_without_text():
    trace = Trace(**{**vars(example()), "text": 0})
    told = trace.tokens(Sample(clip=0, frame=1, step=0, steps=4, branch=0, mass=np.zeros((2, 20))))
    assert told.distance.tolist() == [1] * 10 + [0] * 10
    assert told.offset.tolist() == [*range(10), *range(10)]


# --- what is no trace ----------------------------------------------------------------------------


def rewritten(path, **changes) -> None:
    """A saved trace with some arrays changed; None leaves one out."""
    example().save(path)
    with np.load(path) as file:
        arrays = {**{name: file[name] for name in file.files}, **changes}
    with path.open("wb") as file:
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


def head(**changes) -> np.ndarray:
    told = {**example()._head(), **changes}
    return np.frombuffer(json.dumps(told).encode(), dtype=np.uint8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": None}, "is no trace .KeyError"),
        ({"head": head(schema="packcache.bench/1")}, "has schema 'packcache.bench/1', expected"),
        ({"head": head(roles=["foreground"] * 3)}, "is no trace .ValueError"),
        ({"low": np.zeros(5, np.uint8), "high": np.zeros(5, np.uint8)}, "has 5 masses, expected"),
        ({"low": np.zeros(5, np.uint8)}, "is no trace .ValueError"),
        ({"ids": np.zeros((2, 3, 9), np.int32)}, r"ids of shape \(3, 9\) for clip 0, expected"),
        ({"ids": np.zeros((1, 3, 10), np.int32)}, "a sample of clip 1, latent frame 0, expected"),
        ({"own": np.ones((2, 3, 9), np.uint16)}, r"shares of shape \(3, 9\) for clip 0 of 2, exp"),
        ({"own": np.ones((1, 3, 10), np.uint16)}, r"clip 0 of 1, expected \(3, 10\) for 2 clips"),
        ({"value_norm": np.ones(3)}, "has 3 value norms, expected 2"),
        ({"value_norm": np.array([1, np.nan])}, r"norms \[1.0, nan\], expected lengths: finite"),
        ({"value_norm": np.array([-0.5, 1])}, r"value norms \[-0.5, 1.0\], expected .* at least 0"),
        ({"head": head(layers=[0, 5])}, r"has layers \[0, 5\], expected some of 0 to 4, ascending"),
        ({"head": head(layers=[4, 0])}, r"has layers \[4, 0\], expected some of 0 to 4, ascending"),
        ({"head": head(num_layers=3)}, r"has layers \[0, 4\], expected some of 0 to 2, ascending"),
        ({"head": head(workload=["digits"])}, r"has workload \['digits'\], expected an object"),
        ({"head": head(environment=None)}, "has environment None, expected an object of names"),
        ({"visible": np.ones(4, bool)}, "visibility of 4 tokens, expected 10"),
        ({"ids": np.array([{}, None], dtype=object)}, "is no trace .ValueError"),
    ],
)  # fmt: skip
def test_a_file_that_contradicts_itself_is_named(tmp_path, changes, said):
    rewritten(tmp_path / "odd.trace", **changes)
    with pytest.raises(InputFileError, match=said) as raised:
        Trace.load(tmp_path / "odd.trace")
    assert "odd.trace" in str(raised.value) and "\n" not in str(raised.value)


def test_attention_without_any_mass_is_named(tmp_path):
    path = tmp_path / "a.trace"
    example().save(path)
    with np.load(path) as file:
        zero = np.zeros_like(file["high"])
    rewritten(path, high=zero, low=zero)
    with pytest.raises(InputFileError, match="attention that sums to 0, expected 1"):
        Trace.load(path)


def test_other_files_are_named(tmp_path):
    with pytest.raises(InputFileError, match="is no file: record a trace with packcache trace"):
        Trace.load(tmp_path / "missing.trace")
    with pytest.raises(InputFileError, match="is no file"):
        Trace.load(tmp_path)
    (tmp_path / "words").write_text("not a trace at all")
    with pytest.raises(InputFileError, match="is no trace"):
        Trace.load(tmp_path / "words")
    (tmp_path / "empty").touch()
    with pytest.raises(InputFileError):
        Trace.load(tmp_path / "empty")
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(InputFileError, match="is no trace"):
        Trace.load(tmp_path / "array.npy")
    example().save(tmp_path / "whole.trace")
    data = (tmp_path / "whole.trace").read_bytes()
    (tmp_path / "half.trace").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputFileError, match=r"half\.trace"):
        Trace.load(tmp_path / "half.trace")


def test_a_byte_that_flipped_is_found(tmp_path):
    example().save(tmp_path / "a.trace")
    data = bytearray((tmp_path / "a.trace").read_bytes())
    with np.load(tmp_path / "a.trace") as file:
        assert set(file.files) >= {"head", "low"}
    place = data.index(b"low.npy") + 200
    data[place] ^= 0xFF
    (tmp_path / "a.trace").write_bytes(data)
    with pytest.raises(InputFileError, match=r"a\.trace"):
        Trace.load(tmp_path / "a.trace")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        example().save(tmp_path / "nowhere" / "a.trace")


def test_the_schema_is_what_readers_know():
    assert SCHEMA == "packcache.trace/1"
