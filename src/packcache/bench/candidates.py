"""The library's engine as something to be timed, and the weights that all rows of a run share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from packcache import models
from packcache.bench.ceilings import now
from packcache.bench.parts import Candidate, Workload
from packcache.lumos.decode import Decoder
from packcache.lumos.model import Lumos
from packcache.lumos.schedule import philox_draws
from packcache.lumos.vocab import Prefix, Vocab
from packcache.lumos.weights import filled, hollow
from packcache.policies import Policy
from packcache.reuse import StepReuse
from packcache.timeline import Role, Span

__all__ = ["DecoderCandidate", "make_model", "make_prefix", "maker", "random_codes"]

#: Standard deviation of random weights.
_SCALE = 0.02


def make_model(workload: Workload) -> Lumos:
    """The weights that are timed, on the device: the embedded model's, or random ones.

    Random weights are drawn where they stay: billions of numbers take minutes elsewhere.
    """
    if workload.model in models.MODELS:
        device, dtype = workload.device, workload.dtype
        return models.load(workload.model, device=device, dtype=dtype).model
    generator = torch.Generator(workload.device).manual_seed(workload.seed)

    def drawn() -> Iterator[tuple[str, Tensor]]:
        for name, like in hollow(workload.config).state_dict().items():
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            weight = torch.empty(like.shape, dtype=workload.dtype, device=workload.device)
            yield name, weight.normal_(centre, _SCALE, generator=generator)

    return filled(hollow(workload.config), drawn(), workload.device)


def make_prefix(workload: Workload) -> Prefix:
    """A text of `text_tokens` tokens, header included; which words they are costs nothing."""
    vocab = Vocab(workload.config)
    rest = workload.text_tokens - len(vocab.prefix([], seconds=1, fps=1).ids)
    return vocab.prefix([workload.config.token_ids.bos] * rest, seconds=1, fps=1)


def random_codes(workload: Workload, frame: int) -> Tensor:
    """Codes `[1, rows, cols]` of a latent frame, the same for every row of a run."""
    shape = (1, workload.layout.rows, workload.layout.cols)
    generator = torch.Generator().manual_seed(workload.seed * workload.latents + frame)
    return torch.randint(workload.config.token_ids.num_codes, shape, generator=generator)


class DecoderCandidate:
    """`lumos.decode.Decoder` with a policy and a reuse, at any latent frame of a clip."""

    def __init__(
        self, model: Lumos, workload: Workload, policy: Policy, reuse: StepReuse | None = None
    ) -> None:
        self.workload = workload
        sampling, layout = workload.sampling, workload.layout
        self.decoder = Decoder(
            model,
            [make_prefix(workload)],
            layout=layout,
            sampling=sampling,
            policy=policy,
            reuse=reuse,
            draws=philox_draws([workload.seed], sampling.steps, layout.content),
            latents=workload.latents,
        )
        self._opening = 0.0

    def prefill(self) -> float:
        """Commit the text; seconds."""
        self.decoder.prefill()
        self._opening = self._open_next()
        return self.decoder.prefill_s

    def advance(self) -> float:
        """Commit the next latent frame; seconds of its opening (rebase) and of packing."""
        frame, (cache,) = self.decoder.frame, self.decoder.caches
        codes = random_codes(self.workload, frame)
        clock = _Clock(self.workload.device)
        with clock.around(cache, "commit"):
            self.decoder.give(codes, as_generated=frame >= self.workload.given)
        spent = self._opening + clock.seconds
        self._opening = self._open_next()
        return spent

    def _open_next(self) -> float:
        """Seconds of opening the next frame, which a rehearsal would do unseen; closed again."""
        frame, (cache,) = self.decoder.frame, self.decoder.caches
        if frame >= self.workload.latents:
            return 0.0
        role = Role.IMAGE if frame < self.workload.given else Role.HISTORY
        start = now(self.workload.device)
        cache.open(Span.of_frame(role, frame, self.workload.layout))
        spent = now(self.workload.device) - start
        cache.close()
        return spent

    def rehearse(self, steps: Sequence[int] | None = None) -> tuple[float, float]:
        """Seconds of the steps of the next latent frame, and of the forward of its commit."""
        return self.decoder.rehearse(steps)

    def statistics(self) -> dict[str, Any]:
        """Bytes and tokens held now."""
        (cache,) = self.decoder.caches
        return {
            "kv_bytes": cache.kv_bytes,
            "capacity_bytes": cache.capacity_bytes,
            "held": cache.physical_length,
        }

    def shares(self, steps: Sequence[int] | None = None) -> Mapping[str, float]:
        """Seconds of one rehearsal by kind; attention includes the writing of keys and values."""
        decoder, device = self.decoder, self.workload.device
        attention, network = _Clock(device), _Clock(device)
        exact, step = decoder.attend, decoder.attend_step
        decoder.attend = attention.proxy(exact)
        decoder.attend_step = attention.proxy(step)
        try:
            with network.around(decoder.model, "forward"):
                total = sum(decoder.rehearse(steps))
        finally:
            decoder.attend, decoder.attend_step = exact, step
        return {
            "attention": attention.seconds,
            "linear": network.seconds - attention.seconds,
            "head": total - network.seconds,
        }


class _Clock:
    """Seconds spent in calls; waits for the device before and after each."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = now(self.device)
            result = call(*args, **kwargs)
            self.seconds += now(self.device) - start
            return result

        return run

    @contextlib.contextmanager
    def around(self, owner: Any, name: str) -> Iterator[None]:
        """Time a method of one object for a while."""
        setattr(owner, name, self.timed(getattr(owner, name)))
        try:
            yield
        finally:
            delattr(owner, name)

    def proxy(self, call: Any) -> Any:
        """Something that answers as `call` does, and is timed."""
        return _Proxy(call, self.timed(call))


class _Proxy:
    """Another object's attributes, and a call in its stead."""

    def __init__(self, inner: Any, call: Callable[..., Any]) -> None:
        self.inner, self.call = inner, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def maker(workload: Workload) -> Callable[[str, str], Candidate]:
    """Makes the engine of a row by its policy's label and preset's name, or by a baseline's name.

    All share the weights, which are made when the first engine is.
    """
    shared: list[Lumos] = []

    def make(policy: str, preset: str) -> Candidate:
        from packcache.bench.baselines import TorchFull
        from packcache.bench.stock import Stock

        if not shared:
            shared.append(make_model(workload))
        if policy in workload.policies:
            return DecoderCandidate(
                shared[0], workload, workload.policies[policy], workload.presets[preset]
            )
        return {"torch-full": TorchFull, "stock": Stock}[policy](shared[0], workload)

    return make
