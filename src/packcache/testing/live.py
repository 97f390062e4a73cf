"""How many bytes of tensors are alive: counted op by op, on any device, fake tensors included.

    with LiveBytes() as live:
        run()
    live.peak, live.now                 # of all devices together
    live.peak_of("cuda")

Counted are the storages made inside the block, each once however many views it has, until nothing
refers to it any more. What an op allocates and frees inside itself (workspaces, the scores of a
fused attention) is not seen, nor is what an allocator rounds up.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LiveBytes"]

#: Ops whose input is new as well: `torch.tensor` and its kin show up here first.
_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default)


class LiveBytes(TorchDispatchMode):
    """Bytes of the live storages made inside the block; `now` and `peak`, over all devices."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._now: Counter[str] = Counter()
        self._peak: Counter[str] = Counter()
        self._known: set[int] = set()

    def now_of(self, device: str) -> int:
        """Live bytes on devices of a type ("cuda")."""
        return self._now[device]

    def peak_of(self, device: str) -> int:
        """Most bytes that were ever live at once on devices of a type."""
        return self._peak[device]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _LIFTS:
            for tensor in _tensors((args, kwargs)):
                self._meet(tensor, new=False)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._meet(tensor, new=True)
        return out

    def _meet(self, tensor: Tensor, *, new: bool) -> None:
        """Count a storage seen for the first time; one that was there before is only noted."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if new else 0
        weakref.finalize(storage, self._forget, key, size, tensor.device.type).atexit = False
        self._add(size, tensor.device.type)

    def _add(self, size: int, device: str) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)
        self._now[device] += size
        self._peak[device] = max(self._peak[device], self._now[device])

    def _forget(self, key: int, size: int, device: str) -> None:
        self._known.discard(key)
        self.now -= size
        self._now[device] -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
