"""Random weights in place of a checkpoint's: of realistic scale, drawn by name.

So any part of a network can be made without the rest, and is the same in memory and on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from packcache.errors import InvalidSetting
from packcache.lumos.config import LumosConfig
from packcache.lumos.device import as_device, as_dtype
from packcache.lumos.model import Lumos
from packcache.lumos.weights import filled, hollow, write_tensors

__all__ = ["random_model", "random_tensors", "write_random"]

#: Standard deviation of random weights.
_SCALE = 0.02

#: How many numbers are drawn at once.
_DRAWN = 1 << 22


def random_model(
    config: LumosConfig,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> Lumos:
    """The network with random weights of realistic scale, for evaluation, without gradients."""
    place = as_device(device)
    tensors = random_tensors(config, seed, dtype)
    return filled(hollow(config), ((name, t.to(place)) for name, t in tensors), place)


def random_tensors(
    config: LumosConfig, seed: int = 0, dtype: str | torch.dtype = "float32"
) -> Iterator[tuple[str, Tensor]]:
    """Names and random CPU tensors, one at a time, in the order of the state dict.

    Normal with deviation 0.02, around 1 for the weights of norms. Each depends on `seed` and its
    name only (numpy Philox), so parts can be made apart.
    """
    kind = as_dtype(dtype)
    if not 0 <= seed < 1 << 64:
        raise InvalidSetting(f"seed is {seed}, expected an integer from 0 to 2^64 - 1")
    for name, like in hollow(config).state_dict().items():
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        key = np.array([seed, int.from_bytes(digest, "little")], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        tensor = torch.empty(like.shape, dtype=kind, device="cpu")
        for part in tensor.view(-1).split(_DRAWN):  # float32 numbers of a part only are in memory
            drawn = torch.from_numpy(generator.standard_normal(len(part), dtype=np.float32))
            part.copy_(drawn.mul_(_SCALE).add_(centre))
        yield name, tensor


def write_random(
    folder: str | Path,
    config: LumosConfig,
    *,
    seed: int = 0,
    dtype: str | torch.dtype = "bfloat16",
    shard_bytes: int | None = None,
) -> Path:
    """Write a checkpoint of random weights; never more than one shard is in memory."""
    kind = as_dtype(dtype)
    return write_tensors(
        Path(folder), config, random_tensors(config, seed, kind), kind, shard_bytes
    )
