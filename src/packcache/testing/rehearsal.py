"""A full-size run without the machine: the whole loop on fake CUDA tensors.

    rehearsal = rehearse(SIZES["3b"], size=(672, 384), frames=48, policy=PackCache())
    rehearsal.peak_bytes, rehearsal.syncs_in_steps

PyTorch's `FakeTensorMode` computes shapes, dtypes and devices and no numbers; it needs no GPU. What
asks a device tensor for its value (`.item()`, `bool()`, `nonzero`) has none to give and raises, so
a run that ends is the proof that its step loop never waits for the device. Host arithmetic stays
real. The one place where a frame comes to the host, `Decoder._read_back`, answers with made-up ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from packcache import positions
from packcache.lumos.config import LumosConfig
from packcache.lumos.course import TEXT_TOKENS
from packcache.lumos.decode import Decoder, FrameResult
from packcache.lumos.model import Lumos
from packcache.lumos.schedule import UPSTREAM, Sampling, philox_draws
from packcache.lumos.vocab import Vocab, latent_frames
from packcache.policies import Policy
from packcache.reuse import StepReuse
from packcache.testing.live import LiveBytes

__all__ = ["Rehearsal", "RehearsalDecoder", "rehearse"]

#: Where everything is said to be.
DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a run would have done. Bytes on the device, weights apart from the peak's other parts.

    `kv_bytes` and `capacity_bytes` have an entry a latent frame. `syncs_in_steps` counts ops of the
    step loop that read host tensors of more than one number, or leave their result on the host.
    `devices` names where the step loop's results lie; `dtypes` those of K/V, hidden states, logits.
    """

    frames: int
    peak_bytes: int
    weights_bytes: int
    kv_bytes: tuple[int, ...]
    capacity_bytes: tuple[int, ...]
    syncs_in_steps: int
    ops_in_steps: int
    devices: frozenset[str]
    dtypes: dict[str, str]


def rehearse(
    config: LumosConfig,
    *,
    size: tuple[int, int],
    frames: int,
    policy: Policy,
    sampling: Sampling = UPSTREAM,
    dtype: torch.dtype = torch.bfloat16,
    text_tokens: int = TEXT_TOKENS,
    image: bool = True,
    reuse: StepReuse | None = None,
    decoder: type[RehearsalDecoder] | None = None,
) -> Rehearsal:
    """The loop of `frames` pixel frames at `size` in pixels, with `text_tokens` prefix tokens.

    `decoder` may be another rehearsal decoder. Raises torch's `DataDependentOutputException` or
    `DynamicOutputShapeException` where a run would wait for the device.
    """
    vocab = Vocab(config)
    layout = vocab.layout(*size)
    text = [config.token_ids.bos] * (text_tokens - len(vocab.prefix([], seconds=1, fps=1).ids))
    given = torch.zeros(1, 1, layout.rows, layout.cols, dtype=torch.int64) if image else None
    live, watch = LiveBytes(), _Watch()
    with _fake(), live, watch:
        model = _fake_model(config, dtype)
        before = live.now_of(DEVICE.type)
        made = (decoder or RehearsalDecoder)(
            model,
            [vocab.prefix(text, seconds=1, fps=1)],
            layout=layout,
            sampling=sampling,
            policy=policy,
            reuse=reuse,
            draws=philox_draws([0], sampling.steps, layout.content),
            latents=latent_frames(frames, config.compression[0]),
        )
        made.watch = watch
        results = list(made.frames(given))
    return Rehearsal(
        frames=len(results),
        peak_bytes=live.peak_of(DEVICE.type) - before,
        weights_bytes=sum(weight.nbytes for weight in model.parameters()),
        kv_bytes=tuple(result.kv_bytes for result in results),
        capacity_bytes=tuple(result.capacity_bytes for result in results),
        syncs_in_steps=watch.syncs,
        ops_in_steps=sum(watch.results.values()),
        devices=frozenset(watch.results),
        dtypes=made.dtypes,
    )


class RehearsalDecoder(Decoder):
    """The engine's decoder, told what only a device could know, and watched in its step loop."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.watch = _Watch()
        self.dtypes: dict[str, str] = {}
        self._denoising = False

    def generate(self) -> FrameResult:
        result = super().generate()
        kinds = {t.dtype for cache in self.caches for kv in cache.stores[0] for t in kv}
        self.dtypes["K/V"] = ", ".join(sorted(map(str, kinds)))
        return result

    def _denoise(self, *arguments: Any, **named: Any) -> Tensor:
        self._denoising = True
        try:
            return super()._denoise(*arguments, **named)
        finally:
            self._denoising = self.watch.on = False

    def _forward(self, *arguments: Any, **named: Any) -> Tensor:
        self.watch.on = self._denoising  # from the first step on: noise has been copied by now
        hidden = super()._forward(*arguments, **named)
        self.dtypes["hidden"] = str(hidden.dtype)
        return hidden

    def _guided(self, hidden: Tensor, place: Tensor) -> Tensor:
        logits = super()._guided(hidden, place)
        self.dtypes["logits"] = str(logits.dtype)
        return logits

    def _read_back(self, ids: Tensor, finite: Tensor) -> Tensor:
        codes = torch.zeros(self.layout.content, dtype=torch.int64)
        return self.vocab.frame(self.layout, codes).expand(len(ids), -1).clone()


class _Watch(TorchDispatchMode):
    """Counts, while `on`, where results lie and which ops touch the host."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.syncs = 0
        self.results: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.on:
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            host_in = any(t.device.type == "cpu" and t.numel() > 1 for t in given)
            host_out = any(t.device.type == "cpu" for t in made)
            self.syncs += host_in or host_out
            self.results.update(t.device.type for t in made)
        return out


# --- fake tensors -------------------------------------------------------------------------------


@contextmanager
def _fake() -> Iterator[None]:
    """Tensors on the device are fake; whatever concerns the host alone is computed."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, _HostIsReal(fake):
        yield


class _HostIsReal(TorchFunctionMode):
    """Runs host functions outside the fake mode, and a few of Python's operators without a driver.

    PyTorch's `x[...]` and `~x` ask the CUDA driver for its device; the ops behind them do not.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(_on_device(leaf) for leaf in tree_leaves((args, kwargs))):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, self._seen_by_device, (args, kwargs))
        if func is Tensor.__getitem__:
            return _read(*args)
        if func is Tensor.__setitem__:
            return _write(*args)
        if func is Tensor.__invert__:
            return torch.bitwise_not(*args)
        if func is torch.tensor:
            with unset_fake_temporarily():
                host = torch.tensor(*args, **{**kwargs, "device": "cpu"})
            return self._seen_by_device(host).to(kwargs["device"])
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _seen_by_device(self, tensor: Tensor) -> Tensor:
        """A host tensor on its way to the device: fake from here on, still on the host."""
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)


def _on_device(leaf: Any) -> bool:
    if isinstance(leaf, (str, torch.device)):
        return str(leaf).startswith(DEVICE.type)
    return isinstance(leaf, FakeTensor)


def _read(tensor: Tensor, key: Any) -> Tensor:
    view, indices = _view(tensor, key)
    return torch.ops.aten.index.Tensor(view, indices) if indices else view


def _write(tensor: Tensor, key: Any, value: Any) -> None:
    view, indices = _view(tensor, key)
    if indices:
        torch.ops.aten.index_put_.default(view, indices, value)
    elif isinstance(value, Tensor):
        torch.ops.aten.copy_.default(view, value)
    else:
        torch.ops.aten.fill_.Scalar(view, value)


def _attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
    """Flash attention, or the kernel for float32, whose results lie in memory the other way."""
    if q.dtype == torch.float32:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
        return efficient(q, k, v, None, False, is_causal=is_causal)[0]
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    return flash(q, k, v, is_causal=is_causal)[0]


def _view(tensor: Tensor, key: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What slices and numbers of a key select, and the index tensors left to apply, if any."""
    keys = key if isinstance(key, tuple) else (key,)
    used = sum(k is not None and k is not Ellipsis for k in keys)
    view, indices = tensor, list[Tensor | None]()
    for k in keys:
        dim = len(indices)
        if k is Ellipsis:
            indices += [None] * (tensor.dim() - used)
        elif k is None:
            view = view.unsqueeze(dim)
            indices.append(None)
        elif isinstance(k, slice):
            view = torch.ops.aten.slice.Tensor(view, dim, k.start, k.stop, k.step or 1)
            indices.append(None)
        elif isinstance(k, int):
            view = view.select(dim, k)
        else:
            indices.append(k)
    return view, indices if any(index is not None for index in indices) else []


def _fake_model(config: LumosConfig, dtype: torch.dtype) -> Lumos:
    """The network with weights that have a shape, a dtype and a device."""
    with torch.device("meta"):
        model = Lumos(config)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            empty = torch.empty(weight.shape, dtype=dtype, device=DEVICE)
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=False))
    frequencies = positions.inverse_frequencies(config.head_dim, config.rope_theta)
    model.inv_freq = frequencies.to(DEVICE)
    model.axes = positions.pair_axes(config.head_dim).to(DEVICE)
    return model.eval()
