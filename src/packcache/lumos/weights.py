"""Checkpoints: safetensors in and out (lumos1-spec 1.6). Nothing is ever unpickled.

    config = read_config(folder)
    model = load_model(folder, config, device="cuda", dtype="bfloat16")

Every header is checked against the config before the first tensor is copied. Tensors go one by one
from the mapped file to the device, so memory holds the weights and one tensor, not two copies.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from packcache.errors import InputFileError, InvalidSetting, OutputError
from packcache.files import check_folder, replacing
from packcache.lumos.config import SIZES, UPSTREAM, LumosConfig, read_json
from packcache.lumos.cost import linear_parameters
from packcache.lumos.device import as_device, as_dtype
from packcache.lumos.model import Lumos

__all__ = [
    "filled", "fingerprint", "hollow", "load_model", "parameter_count", "save_model",
    "write_tensors",
]  # fmt: skip

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

#: The dtypes of `device.DTYPES` as safetensors headers name them.
_STORED = ("F32", "BF16", "F16")

#: Tensors that some checkpoints carry and the network does not need (lumos1-spec 1.6).
_IGNORED = ("model.vqmodel.*", "*.rotary_emb.inv_freq")

#: How many names an error lists, and values a fingerprint takes of a tensor.
_NAMED, _SAMPLED = 4, 4096


@dataclass(frozen=True)
class _Held:
    """A tensor as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


# --- in -----------------------------------------------------------------------------------------


def load_model(
    folder: str | Path,
    config: LumosConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
) -> Lumos:
    """The network of a checkpoint folder, for evaluation, without gradients.

    The folder holds `model.safetensors`, or one safetensors file of another name, or shards with
    `model.safetensors.index.json`. `dtype` None keeps the checkpoint's own. The result owns its
    memory: the files may be replaced afterwards.

    Raises InputFileError, before anything is copied, for a file that is missing or damaged and for
    tensors that are missing, unknown, of another shape than the config says or of another dtype
    than float32, bfloat16 and float16; InvalidSetting for a wrong device or dtype.
    """
    place = as_device(device)
    target = None if dtype is None else as_dtype(dtype)
    held = _headers(Path(folder))
    _check_dtypes(held)
    _check_sizes(Path(folder), held, config)
    skeleton = hollow(config)
    _check_names(Path(folder), held, skeleton)
    return filled(skeleton, _stream(held, place, target), place)


def _headers(folder: Path) -> dict[str, _Held]:
    """What the files of a folder hold, by name, without what is ignored; no tensor is read."""
    weights = _files(folder)
    held: dict[str, _Held] = {}
    for file, expected in weights.items():
        with _opened(file) as stored:
            names = set(stored.keys())
            if expected is not None and names != expected:
                lacking, extra = _some(expected - names), _some(names - expected)
                raise InputFileError(
                    f"{file} and {INDEX} disagree: the file lacks {lacking or 'nothing'} and has "
                    f"{extra or 'nothing'} beyond the index; download the folder again"
                )
            for name in sorted(names):
                part = stored.get_slice(name)
                held[name] = _Held(file, tuple(part.get_shape()), part.get_dtype())
    return {
        name: tensor
        for name, tensor in held.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in _IGNORED)
    }


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """The files to read, each with the names that the index expects in it (None: no index)."""
    if not folder.is_dir():
        raise InputFileError(f"{folder} is no folder: expected one with config.json and weights")
    if (folder / SINGLE).exists():
        return {folder / SINGLE: None}
    if (folder / INDEX).exists():
        return {**_indexed(folder / INDEX)}
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: None}
    if found:
        raise InputFileError(
            f"{folder} holds {len(found)} safetensors files ({_some(p.name for p in found)}) and "
            f"no {INDEX}: download the index that belongs to them"
        )
    pickled = _some(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
    raise InputFileError(
        f"{folder} holds no {SINGLE} and no {INDEX}"
        + (f", only {pickled}, and pickled files can run any code" if pickled else "")
        + ": expected weights as safetensors, "
        + ("convert them" if pickled else "download them")
    )


def _indexed(path: Path) -> dict[Path, set[str]]:
    """The shards that an index names, each with its tensors."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputFileError(f"{path} has no weight_map, expected tensor names with their files")
    shards: dict[Path, set[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputFileError(f"{path} places {name} in {file!r}, expected a file beside it")
        shards.setdefault(path.parent / file, set()).add(name)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise InputFileError(
            f"{path.parent} lacks {_some(missing)}, {len(missing)} of the {len(shards)} files that "
            f"{INDEX} names: download the rest"
        )
    return dict(sorted(shards.items()))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(str(path), framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise InputFileError(
            f"{path} is cut short or no safetensors file ({error}): download it again"
        ) from None


def _check_dtypes(held: Mapping[str, _Held]) -> None:
    kinds: dict[str, str] = {}
    for name, tensor in held.items():
        kinds.setdefault(tensor.dtype, name)
        if tensor.dtype not in _STORED:
            raise InputFileError(
                f"{name} in {tensor.file} has dtype {tensor.dtype}, expected one of "
                f"{', '.join(_STORED)}: take the checkpoint as it was released, not quantised"
            )
    if len(kinds) > 1:
        mixed = ", ".join(f"{dtype} ({name})" for dtype, name in kinds.items())
        raise InputFileError(f"weights have dtypes {mixed}, expected the same dtype for all")


def _check_sizes(folder: Path, held: Mapping[str, _Held], config: LumosConfig) -> None:
    """The sizes that shapes tell by themselves, so that swapped files are called by their name."""
    sizes = _sizes(held)
    wrong = [name for name, size in sizes.items() if size != getattr(config, name)]
    if not wrong:
        return
    like = [
        name
        for name, known in SIZES.items()
        if len(sizes) == 4 and all(getattr(known, n) == size for n, size in sizes.items())
    ]
    raise InputFileError(
        f"{folder}: the config says "
        + ", ".join(f"{name} {getattr(config, name)}" for name in wrong)
        + ", the weights have "
        + ", ".join(str(sizes[name]) for name in wrong)
        + (f" and look like the size {like[0]!r}" if like else "")
        + ": take the config.json that travels with them"
    )


def _sizes(held: Mapping[str, _Held]) -> dict[str, int]:
    layers = [
        int(found[1]) for name in held if (found := re.match(r"model\.layers\.(\d+)\.", name))
    ]
    sizes = {"num_hidden_layers": max(layers) + 1} if layers else {}
    for name, axes in (
        ("model.embed_tokens.weight", ("vocab_size", "hidden_size")),
        ("model.layers.0.mlp.gate_proj.weight", ("intermediate_size", "hidden_size")),
    ):
        if name in held and len(held[name].shape) == 2:
            sizes |= dict(zip(axes, held[name].shape, strict=True))
    return sizes


def _check_names(folder: Path, held: Mapping[str, _Held], skeleton: Lumos) -> None:
    """Exactly the network's tensors, each with its shape."""
    want = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    missing = [name for name in want if name not in held]
    unknown = [name for name in held if name not in want]
    if missing or unknown:
        parts = [f"lacks {len(missing)} tensors ({_some(missing)})"] if missing else []
        parts += [f"has {len(unknown)} unknown ones ({_some(unknown)})"] if unknown else []
        raise InputFileError(
            f"{folder} {' and '.join(parts)}, expected the {len(want)} that the config implies: "
            "take weights and config.json of one Lumos-1 checkpoint"
        )
    for name, shape in want.items():
        if held[name].shape != shape:
            raise InputFileError(
                f"{name} in {held[name].file} has shape {list(held[name].shape)}, expected "
                f"{list(shape)}: take the config.json that travels with the weights"
            )


def _some(names: Iterable[str]) -> str:
    """The first few names in order, and how many more there are."""
    names = sorted(names)
    more = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join(names[:_NAMED] + more)


def _stream(
    held: Mapping[str, _Held], device: torch.device, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor, copied from the mapped file to the device."""
    for file in sorted({tensor.file for tensor in held.values()}):
        with _opened(file) as stored:
            for name in (name for name, tensor in held.items() if tensor.file == file):
                mapped = stored.get_tensor(name)
                yield name, torch.empty_like(mapped, device=device, dtype=dtype).copy_(mapped)


class _Hollow(TorchFunctionMode):
    """Modules get their large weights on the meta device and draw no initial values.

    As `torch.device("meta")`, but buffers stay real and nothing there imports sympy (70 MB, 1 s).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.init.normal_:
            return None
        where = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **where})


def hollow(config: LumosConfig) -> Lumos:
    """The network without memory: names, shapes and buffers."""
    with torch.device("cpu"), _Hollow():  # whatever default device a caller has set
        return Lumos(config)


def filled(skeleton: Lumos, tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> Lumos:
    """The skeleton with these tensors as its parameters, and its buffers beside them."""
    skeleton.load_state_dict(dict(tensors), strict=True, assign=True)
    skeleton.inv_freq, skeleton.axes = skeleton.inv_freq.to(device), skeleton.axes.to(device)
    return skeleton.eval().requires_grad_(False)


# --- out ----------------------------------------------------------------------------------------


def save_model(model: Lumos, folder: str | Path, *, shard_bytes: int | None = None) -> Path:
    """Write `config.json`, our own fields included, and the weights; the folder is new or empty.

    `shard_bytes` splits the weights into files of at most that size (a larger tensor gets its own)
    with an index. The folder appears whole or not at all. Raises OutputError.
    """
    weights = model.state_dict()
    return write_tensors(
        Path(folder), model.config, weights.items(), model.lm_head.weight.dtype, shard_bytes
    )


def write_tensors(
    folder: Path,
    config: LumosConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    shard_bytes: int | None,
) -> Path:
    """Write a checkpoint of tensors that come in the order of the state dict; see `save_model`.

    Never more than one shard of them is in memory.
    """
    from safetensors.torch import save_file

    shards = _plan(config, dtype, shard_bytes)
    check_folder(folder.parent)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not an empty folder: give another name")
    coming = iter(tensors)
    with replacing(folder) as draft:
        draft.mkdir()
        for file, names in shards.items():
            shard = dict(itertools.islice(coming, len(names)))
            try:
                save_file(shard, draft / file, metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk, above all
                raise OSError(str(error)) from error
        if len(shards) > 1:
            size = parameter_count(config) * dtype.itemsize
            places = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (draft / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        fields = {**UPSTREAM, **config.to_dict()}
        (draft / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return folder


def _plan(config: LumosConfig, dtype: torch.dtype, shard_bytes: int | None) -> dict[str, list[str]]:
    """Names of the tensors of each file, in order."""
    if shard_bytes is not None and shard_bytes < 1:
        raise InvalidSetting(f"shard_bytes is {shard_bytes}, expected a positive number of bytes")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in hollow(config).state_dict().items():
        size = tensor.numel() * dtype.itemsize
        if shard_bytes is not None and shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    total = len(shards)
    return {f"model-{n:05d}-of-{total:05d}.safetensors": names for n, names in enumerate(shards, 1)}


# --- what a network is --------------------------------------------------------------------------


def fingerprint(model: Lumos) -> str:
    """16 hex digits for a config and its weights; another device gives the same ones.

    A sample: of each tensor name, shape, dtype and up to 4096 evenly spaced elements count, so a
    changed layer shows, and a change of a few elements may not.
    """
    told = hashlib.blake2b(digest_size=8)
    told.update(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        told.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.reshape(-1)
        count = min(len(flat), _SAMPLED)
        places = torch.arange(count, device=flat.device) * len(flat) // count
        told.update(flat[places].cpu().view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


def parameter_count(config: LumosConfig) -> int:
    """Number of weights, from the sizes alone (lumos1-spec 1.4)."""
    norms = 2 * config.hidden_size + 4 * config.model_parallel_size * config.head_dim
    tables = 2 * config.vocab_size * config.hidden_size
    last = config.hidden_size
    return linear_parameters(config) + config.num_hidden_layers * norms + tables + last
