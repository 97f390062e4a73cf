"""How much memory hangs on an object: everything that only it and its like refer to.

    footprint(cache)          # bytes

A tensor counts with its whole storage, however small the view.
"""

from __future__ import annotations

import gc
import sys
import types
from typing import Any

import numpy as np
import torch

__all__ = ["footprint"]

#: What is shared by all: code, not state.
_SHARED = (
    type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType,
    types.CodeType, torch.nn.Module, torch.dtype, torch.device,
)  # fmt: skip


def footprint(root: Any) -> int:
    """Bytes of `root` and of all that can be reached from it; tensors count their storages.

    Models, classes and code are left out, and each object and storage counts once.
    """
    seen: set[int] = set()
    storages: dict[int, int] = {}
    total, todo = 0, [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, _SHARED):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, np.ndarray):
            total += sys.getsizeof(item) + (0 if item.base is None else item.base.nbytes)
        else:
            total += sys.getsizeof(item)
            todo += gc.get_referents(item)
    return total + sum(storages.values())
