"""Checkpoints on tiny folders: written and read back, and every damage named before a copy."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from packcache.errors import InputFileError, InvalidSetting, OutputError
from packcache.lumos import random_weights, weights
from packcache.lumos.config import SIZES, UPSTREAM, LumosConfig, read_config
from packcache.lumos.device import as_dtype
from packcache.lumos.model import Lumos
from packcache.lumos.random_weights import random_model, random_tensors, write_random
from packcache.lumos.weights import (
    fingerprint,
    hollow,
    load_model,
    parameter_count,
    save_model,
)
from packcache.testing.oracle import whole_forward
from tests.tools import ROOT

TOY = SIZES["toy"]
INDEX = "model.safetensors.index.json"

#: Small enough that the toy network needs several files.
SHARD = 200_000


@pytest.fixture(scope="module")
def model() -> Lumos:
    return random_model(TOY, seed=3)


@pytest.fixture
def single(tmp_path: Path, model: Lumos) -> Path:
    return save_model(model, tmp_path / "single")


@pytest.fixture
def sharded(tmp_path: Path, model: Lumos) -> Path:
    return save_model(model, tmp_path / "sharded", shard_bytes=SHARD)


def load(folder: Path, **settings: object) -> Lumos:
    return load_model(folder, read_config(folder), **settings)  # type: ignore[arg-type]


def refused(folder: Path, words: str, config: LumosConfig = TOY) -> str:
    """Loading fails as a bad file, in one line with these words, and copies no tensor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_stream", lambda *_: pytest.fail("a tensor was about to be copied"))
        with pytest.raises(InputFileError) as caught:
            load_model(folder, config)
    text = str(caught.value)
    assert words in text
    assert "\n" not in text
    return text


def change(file: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors into a file, or take them out (None); `__` in a name stands for a dot."""
    held = load_file(file)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del held[name]
        else:
            held[name] = tensor
    save_file(held, file)


def rewrite_index(folder: Path, edit) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [None, SHARD, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_comes_back_as_it_was(tmp_path, dtype, shard_bytes):
    model = random_model(TOY, seed=1, dtype=dtype)
    folder = save_model(model, tmp_path / "new", shard_bytes=shard_bytes)
    again = load(folder)
    assert again.config == TOY
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        other = again.state_dict()[name]
        assert other.dtype == as_dtype(dtype)
        assert torch.equal(tensor, other), name
    assert fingerprint(again) == fingerprint(model)
    files = sorted(p.name for p in folder.iterdir())
    if shard_bytes is None:
        assert files == ["config.json", "model.safetensors"]
    else:
        total = len(files) - 2
        assert files[1] == f"model-00001-of-{total:05d}.safetensors"
        assert total == (
            len(model.state_dict()) if shard_bytes == 1 else {"float32": 8}.get(dtype, 4)
        )


def test_shards_stay_within_their_size(sharded):
    sizes = {file: file.stat().st_size for file in sharded.glob("*.safetensors")}
    assert len(sizes) > 2
    for file, size in sizes.items():
        assert size <= SHARD + 4096 or len(load_file(file)) == 1


def test_the_index_says_the_whole_size(sharded):
    total = json.loads((sharded / INDEX).read_text())["metadata"]["total_size"]
    assert total == 4 * parameter_count(TOY)


def test_a_folder_looks_like_upstream_s(single):
    said = json.loads((single / "config.json").read_text())
    assert said.items() >= UPSTREAM.items()
    assert said["token_ids"]["mask"] == TOY.token_ids.mask


def test_a_loaded_model_computes_the_same(single, model):
    ids = torch.tensor([5, 7, 11, 13])
    where = torch.arange(4).expand(5, 4).clone()
    where[4] = 0
    with torch.inference_mode():
        want, got = (whole_forward(m, ids, where) for m in (model, load(single)))
    assert torch.equal(want, got)


def test_a_loaded_model_is_for_evaluation(single):
    model = load(single, dtype="bfloat16")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.inv_freq.dtype == torch.float32
    assert torch.equal(model.inv_freq, Lumos(TOY).inv_freq)
    assert torch.equal(model.axes, Lumos(TOY).axes)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("dtype", [torch.float16, "float16"])
def test_a_dtype_that_is_asked_for_wins(single, model, dtype):
    loaded = load(single, dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half())


def test_the_files_may_be_overwritten_after_loading(single, model):
    loaded = load(single)
    file = single / "model.safetensors"
    with file.open("r+b") as opened:  # in place: a mapping would see it
        opened.seek(file.stat().st_size // 4)
        opened.write(os.urandom(file.stat().st_size // 2))
    assert fingerprint(loaded) == fingerprint(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_one_file_of_any_name_will_do(single):
    (single / "model.safetensors").rename(single / "lumos.safetensors")
    assert load(single).config == TOY


@pytest.mark.parametrize(
    "name", ["model.vqmodel.encoder.conv.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
)
def test_what_the_network_does_not_need_is_ignored(single, model, name):
    """In any dtype and shape."""
    change(single / "model.safetensors", **{name: torch.ones(3, dtype=torch.int8)})
    assert fingerprint(load(single)) == fingerprint(model)


def test_ignored_tensors_in_shards(sharded, model):
    name = "model.vqmodel.quantize.embedding.weight"
    first = sorted(sharded.glob("*.safetensors"))[0]
    change(first, **{name: torch.ones(2, 2)})
    rewrite_index(sharded, lambda places: places.update({name: first.name}))
    assert fingerprint(load(sharded)) == fingerprint(model)


# --- bad files -----------------------------------------------------------------------------------


def test_a_missing_folder(tmp_path):
    refused(tmp_path / "none", f"{tmp_path}/none is no folder: expected one with config.json")


def test_an_empty_folder(tmp_path):
    refused(tmp_path, "holds no model.safetensors and no model.safetensors.index.json: expected")


def test_pickled_weights_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    words = "only pytorch_model.bin, and pickled files can run any code: expected weights as safe"
    refused(tmp_path, words)
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Leaves a file behind when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_trap_springs_when_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


def test_shards_without_an_index(sharded):
    (sharded / INDEX).unlink()
    refused(sharded, "holds 8 safetensors files (model-00001-of-00008.safetensors, ")
    refused(sharded, "and 4 more) and no model.safetensors.index.json: download the index")


def test_a_missing_shard(sharded):
    (sharded / "model-00002-of-00008.safetensors").unlink()
    words = "lacks model-00002-of-00008.safetensors, 1 of the 8 files that model.safetensors.index"
    refused(sharded, words)


def test_an_index_that_names_a_file_that_is_not_there(sharded):
    rewrite_index(sharded, lambda places: places.update(extra="other.safetensors"))
    refused(sharded, "lacks other.safetensors, 1 of the 9 files that")


@pytest.mark.parametrize("place", ["../model.safetensors", "/dev/null", "a/b", 5, None])
def test_an_index_that_points_out_of_its_folder(sharded, place):
    rewrite_index(sharded, lambda places: places.update(extra=place))
    refused(sharded, f"places extra in {place!r}, expected a file beside it")


@pytest.mark.parametrize(
    "text, words",
    [
        ("{nonsense", "index.json is not JSON (Expecting property name"),
        ("[]", "index.json holds a list, expected an object"),
        ("{}", "index.json has no weight_map, expected tensor names with their files"),
        ('{"weight_map": [1]}', "index.json has no weight_map"),
    ],
)
def test_a_corrupted_index(sharded, text, words):
    (sharded / INDEX).write_text(text)
    refused(sharded, words)


def test_an_index_that_knows_more_than_the_files(sharded):
    file = "model-00003-of-00008.safetensors"
    rewrite_index(sharded, lambda places: places.update(extra=file))
    refused(sharded, f"{file} and {INDEX} disagree: the file lacks extra and has nothing beyond")


def test_an_index_that_knows_less_than_the_files(sharded):
    change(sharded / "model-00003-of-00008.safetensors", stray=torch.ones(1))
    refused(sharded, "disagree: the file lacks nothing and has stray beyond the index; download")


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -5000])
def test_a_truncated_file(single, keep):
    """Nothing, half a length, half a header; one byte and many bytes of data less."""
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(single, "model.safetensors is cut short or no safetensors file (")


def test_a_truncated_shard_is_named(sharded):
    file = sharded / "model-00004-of-00008.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(sharded, f"{file} is cut short or no safetensors file (")


@given(st.binary(max_size=60))
def test_no_bytes_crash_the_reader(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "")


@pytest.mark.parametrize(
    "dtype, name",
    [
        (torch.int8, "I8"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float64, "F64"),
        (torch.int64, "I64"),
    ],
)
def test_a_dtype_that_is_not_for_weights(single, dtype, name):
    change(single / "model.safetensors", model__norm__weight=torch.ones(128).to(dtype))
    words = f"model.safetensors has dtype {name}, expected one of F32, BF16, F16: take the"
    assert refused(single, words).startswith("model.norm.weight in ")


def test_mixed_dtypes(single):
    change(single / "model.safetensors", model__norm__weight=torch.ones(128).half())
    text = refused(single, "expected the same dtype for all")
    assert "F32 (lm_head.weight)" in text and "F16 (model.norm.weight)" in text


def test_missing_tensors(single):
    change(
        single / "model.safetensors",
        model__norm__weight=None,
        model__layers__1__mlp__up_proj__weight=None,
    )
    words = "lacks 2 tensors (model.layers.1.mlp.up_proj.weight, model.norm.weight), expected the"
    refused(single, words)


def test_unknown_tensors(single):
    extra = {f"model.layers.1.self_attn.{n}_proj.bias": torch.ones(2) for n in "abcdef"}
    change(single / "model.safetensors", **extra)
    text = refused(single, "has 6 unknown ones (model.layers.1.self_attn.a_proj.bias, ")
    assert "d_proj.bias, and 2 more), expected the" in text


def test_renamed_tensors(single):
    change(single / "model.safetensors", model__norm__weight=None, norm=torch.ones(128))
    refused(single, "lacks 1 tensors (model.norm.weight) and has 1 unknown ones (norm), expected")


def test_a_wrong_shape(single):
    name = "model.layers.2.self_attn.k_norm.bias"
    change(single / "model.safetensors", **{name: torch.zeros(2, 32)})
    words = "model.safetensors has shape [2, 32], expected [1, 32]: take the config.json that"
    assert refused(single, words).startswith(f"{name} in ")


def test_a_config_that_says_other_heads(single):
    other = dataclasses.replace(TOY, num_key_value_heads=4)
    words = "has shape [64, 128], expected [128, 128]: take the config.json"
    assert "k_proj.weight" in refused(single, words, other)


def test_a_config_that_says_more_layers(single):
    """However many: no network of that size is built to find out."""
    other = dataclasses.replace(TOY, num_hidden_layers=10**9, intermediate_size=97)
    words = (
        "the config says num_hidden_layers 1000000000, intermediate_size 97, the weights have 3, "
        "96 and look like the size 'toy': take the config.json that travels with them"
    )
    refused(single, words, other)


@pytest.mark.parametrize("said, held", [("1b", "3b"), ("3b", "1b")])
def test_swapped_sizes_are_called_by_their_name(tmp_path, said, held):
    write_hollow(tmp_path / "model.safetensors", SIZES[held])
    text = refused(tmp_path, f"and look like the size {held!r}: take the config.json", SIZES[said])
    sizes = (SIZES[said].hidden_size, SIZES[held].hidden_size)
    assert f"hidden_size {sizes[0]}" in text and str(sizes[1]) in text


def write_hollow(file: Path, config: LumosConfig) -> None:
    """A checkpoint of full size whose data is one hole, which takes no room on the disk."""
    shapes = {n: list(t.shape) for n, t in hollow(config).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"dtype": "int8"}, "dtype is int8, expected one of float32, bfloat16, float16"),
        ({"dtype": torch.float64}, "dtype is torch.float64, expected one of float32, bfloat16"),
        ({"device": "gpu"}, "device is 'gpu', expected cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "device is cuda:99, but torch sees "),
    ],
)
def test_wrong_settings_are_wrong_use(single, settings, words):
    with pytest.raises(InvalidSetting, match=words):
        load(single, **settings)


# --- writing -------------------------------------------------------------------------------------


def test_nothing_is_written_over(single, model):
    before = (single / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists and is not an empty folder: give another name"):
        save_model(model, single)
    with pytest.raises(OutputError, match="does not exist: create it or choose another"):
        save_model(model, single / "no" / "where")
    assert (single / "model.safetensors").read_bytes() == before


def test_a_failure_leaves_nothing(tmp_path, model, monkeypatch):
    from safetensors import SafetensorError
    from safetensors import torch as library

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(library, "save_file", full)
    with pytest.raises(OutputError, match="No space left on device; nothing was left there"):
        save_model(model, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_shards_have_a_size(tmp_path, model):
    with pytest.raises(InvalidSetting, match="shard_bytes is 0, expected a positive number"):
        save_model(model, tmp_path / "new", shard_bytes=0)


# --- random weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [None, SHARD])
def test_random_weights_are_the_same_on_disk(tmp_path, shard_bytes):
    folder = write_random(tmp_path / "r", TOY, seed=5, dtype="bfloat16", shard_bytes=shard_bytes)
    assert fingerprint(load(folder)) == fingerprint(random_model(TOY, seed=5, dtype="bfloat16"))


def test_a_tensor_depends_on_seed_and_name_only():
    longer = dataclasses.replace(TOY, num_hidden_layers=5)
    few, many = dict(random_tensors(TOY, 7)), dict(random_tensors(longer, 7))
    assert few.keys() < many.keys()
    assert all(torch.equal(tensor, many[name]) for name, tensor in few.items())
    other = dict(random_tensors(TOY, 8))
    assert not any(torch.equal(tensor, other[name]) for name, tensor in few.items())
    layers = [few[f"model.layers.{n}.mlp.up_proj.weight"] for n in (0, 1)]
    assert not torch.equal(*layers)


def test_random_weights_have_a_realistic_scale():
    for name, tensor in random_tensors(TOY, 0):
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        assert tensor.mean().item() == pytest.approx(centre, abs=0.02), name
        assert tensor.std().item() == pytest.approx(0.02, rel=0.5), name


def test_large_tensors_are_drawn_in_parts(monkeypatch):
    whole = dict(random_tensors(TOY, 2))
    monkeypatch.setattr(random_weights, "_DRAWN", 1 << 12)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in random_tensors(TOY, 2))


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_that_is_no_key(seed):
    with pytest.raises(InvalidSetting, match=rf"seed is {seed}, expected an integer from 0"):
        random_model(TOY, seed=seed)


# --- what a network is ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", [
    TOY,
    dataclasses.replace(TOY, num_hidden_layers=5, num_key_value_heads=4, model_parallel_size=2),
])  # fmt: skip
def test_parameters_are_counted_exactly(config):
    assert parameter_count(config) == sum(p.numel() for p in Lumos(config).parameters())


@pytest.mark.parametrize("name, billions", [("1b", 1.504), ("3b", 3.615)])
def test_parameters_of_the_inferred_sizes(name, billions):
    """lumos1-spec 1.4: 1.504 B and 3.615 B with untied embeddings."""
    count = sum(tensor.numel() for tensor in hollow(SIZES[name]).parameters())
    assert parameter_count(SIZES[name]) == count
    assert count / 1e9 == pytest.approx(billions, abs=0.0005)


def test_a_network_without_memory_has_real_buffers():
    skeleton = hollow(TOY)
    assert skeleton.lm_head.weight.is_meta and skeleton.model.embed_tokens.weight.is_meta
    assert torch.equal(skeleton.inv_freq, Lumos(TOY).inv_freq)


def test_a_fingerprint_is_16_hex_digits(model):
    assert len(fingerprint(model)) == 16
    assert int(fingerprint(model), 16) >= 0


@pytest.mark.parametrize("name", list(Lumos(TOY).state_dict()))
def test_a_fingerprint_sees_every_tensor(model, name):
    before = fingerprint(model)
    tensor = model.state_dict()[name]
    kept = tensor.clone()
    tensor.mul_(1.5)
    try:
        assert fingerprint(model) != before
    finally:
        tensor.copy_(kept)
    assert fingerprint(model) == before


def test_a_fingerprint_sees_config_and_dtype(model):
    others = [
        dataclasses.replace(TOY, rope_theta=500000.0),
        dataclasses.replace(TOY, rms_norm_eps=1e-6),
        dataclasses.replace(TOY, trained_latent_frames=None),
    ]
    prints = {fingerprint(random_model(config, seed=3)) for config in [TOY, *others]}
    prints.add(fingerprint(random_model(TOY, seed=3, dtype="float16")))
    assert len(prints) == 5
    assert fingerprint(model) in prints


# --- memory --------------------------------------------------------------------------------------

#: Loads the folder named by its argument; prints anonymous bytes before, and their peak meanwhile.
MEASURE = """
import sys, threading
from packcache.lumos.config import read_config
from packcache.lumos.weights import load_model

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.0005):
        seen.append(anonymous())

config = read_config(sys.argv[1])
seen, done = [anonymous()], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(sys.argv[1], config)
done.set()
watcher.join()
seen.append(anonymous())
print(seen[0], max(seen), seen[-1], len(seen))
"""

#: What the interpreter, the loader's threads and the network's objects may take besides.
BASE_BYTES = 16 << 20


@pytest.mark.skipif(
    not Path("/proc/self/status").exists()
    or "RssAnon" not in Path("/proc/self/status").read_text(),
    reason="anonymous memory is read from the proc file system",
)
def test_loading_holds_no_second_copy(tmp_path):
    """Anonymous memory, so mapped pages of the files do not count: 1.15 times the weights."""
    config = dataclasses.replace(
        TOY, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8
    )
    need = 2 * parameter_count(config)
    assert 150e6 < need < 250e6
    folder = write_hollow_folder(tmp_path / "large", config)
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, peak, after, samples = map(int, told.stdout.split())
    assert samples > 20
    assert after - before > 0.9 * need
    assert peak - before < 1.15 * need + BASE_BYTES


def write_hollow_folder(folder: Path, config: LumosConfig) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    write_hollow(folder / "model.safetensors", config)
    return folder
