"""What a clip takes, before any weight is loaded: memory, what fits, and time.

    made = plan(SIZES["3b"], size=(672, 384), frames=48, memory=parse_bytes("16GiB"))
    print(*made.lines(), sep="\n")

The cache's bytes come from driving a real cache without memory (`course`), what the forwards take
beside it from sums with named terms (`memory`), upstream's way from `stock`, time from `cost`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import torch

from packcache.errors import InputError, InvalidSetting
from packcache.lumos import journal
from packcache.lumos.config import LumosConfig
from packcache.lumos.cost import attention_share, clip_work, stock_frame_operations
from packcache.lumos.course import TEXT_TOKENS, Workload
from packcache.lumos.device import as_dtype
from packcache.lumos.memory import ALLOWANCE, Phase
from packcache.lumos.schedule import UPSTREAM, Sampling
from packcache.lumos.stock import PaperRow, Stock, paper_figures
from packcache.lumos.units import found_memory, parse_bytes, show_bytes
from packcache.lumos.vocab import HEADER, Vocab, latent_frames, pixel_frames
from packcache.policies import FullCache, PackCache, Policy, SlidingWindow
from packcache.positions import PositionMode, RebaseRule
from packcache.reuse import EXACT, StepReuse

__all__ = [
    "CANDIDATES", "SCHEMA", "TEXT_TOKENS", "Engine", "Longest", "PaperRow", "Plan",
    "found_memory", "paper_figures", "parse_bytes", "plan", "show_bytes",
]  # fmt: skip

SCHEMA = "packcache.plan/1"

Engine = Literal["packcache", "stock"]

#: Policies whose longest clip is told unless others are asked for.
CANDIDATES: dict[str, Policy] = {
    "full": FullCache(),
    "window": SlidingWindow(),
    "packcache": PackCache(),
}

#: A plan counts frame by frame; this is a day of video.
_FRAMES = 1_000_000

#: A clip of so many latent frames stands for "any length".
_ENDLESS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Longest:
    """The longest clip that fits under a policy, in pixel frames.

    None: any length fits, because the policy is bounded; 0: not even one latent frame does.
    """

    label: str
    frames: int | None

    def __str__(self) -> str:
        if self.frames is None:
            return f"{self.label} any length"
        return f"{self.label} {self.frames} frames" if self.frames else f"{self.label} none"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one call takes. Bytes of all prompts and branches; `phases` in order of the run.

    `kv_bytes` are held after the last commit, `capacity_bytes` allocated then, `frame_bytes` what
    one whole latent frame adds. `metadata_bytes` (who owns which slot) lie on the host;
    `checkpoint_bytes` are what a checkpoint writes for a latent frame, `score_bytes` what an order
    that goes by scores holds of the queries of an open one (in `phases` too). `memory` is
    what there is, None if nobody knows. `relative_total` and `relative_last` are operations as a
    share of the full cache's on this package's engine: the whole clip, and its last latent frame.
    `attention_shares` say how much of the layers' work is attention, one entry a latent frame.
    """

    workload: dict[str, Any]
    weights_bytes: int
    frame_bytes: int
    kv_bytes: int
    capacity_bytes: int
    metadata_bytes: int
    checkpoint_bytes: int
    phases: tuple[Phase, ...]
    relative_total: float
    relative_last: float
    attention_shares: tuple[float, ...]
    score_bytes: int = 0
    memory: int | None = None
    allowance_bytes: int = ALLOWANCE
    search: Callable[[], list[Longest]] = field(default=list, repr=False, compare=False)

    @functools.cached_property
    def longest(self) -> list[Longest]:
        """The longest clip under each candidate, if the memory is known: searched when asked."""
        return self.search()

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def transient_bytes(self) -> int:
        """At the peak, beside weights and cache."""
        return self.peak.moment.bytes

    @property
    def total_bytes(self) -> int:
        """Weights, cache and transient at the peak."""
        return self.weights_bytes + self.peak.bytes

    @property
    def needed_bytes(self) -> int:
        """What should be free: the total and the allowance for what is not counted."""
        return self.total_bytes + self.allowance_bytes

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.needed_bytes <= self.memory

    def check(self) -> None:
        """Raises InputError if the clip cannot fit, in one line with the way out."""
        if self.memory is None or self.fits:
            return
        fitting = ", ".join(str(longest) for longest in self.longest if longest.frames != 0)
        raise InputError(
            f"this clip needs {show_bytes(self.needed_bytes)}, and {show_bytes(self.memory)} are "
            f"there; what fits: {fitting or 'nothing at this size'}; choose fewer frames, a "
            "smaller size or a bounded policy"
        )

    def to_json(self) -> dict[str, Any]:
        """Schema packcache.plan/1: all numbers, every phase with its terms."""
        phases = [
            {
                "name": phase.moment.name,
                "bytes": phase.bytes,
                "cache_bytes": phase.cache_bytes,
                "terms": [asdict(term) for term in phase.moment.terms],
            }
            for phase in self.phases
        ]
        return {
            "schema": SCHEMA,
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "search"},
            "phases": phases,
            "longest": [asdict(longest) for longest in self.longest],
            "peak": self.peak.moment.name,
            "transient_bytes": self.transient_bytes,
            "total_bytes": self.total_bytes,
            "needed_bytes": self.needed_bytes,
            "fits": self.fits,
        }

    def lines(self, *, explain: bool = False) -> list[str]:
        """A table to read; with `explain` every phase with its terms and how they come about."""
        work, peak = self.workload, self.peak
        rows = [
            ("weights", self.weights_bytes, f"{work['dtype']}, {work['parameters']:,} numbers"),
            ("cache", peak.cache_bytes, "allocated at the peak"),
            ("transient", self.transient_bytes, f"at the peak: {peak.moment.name}"),
            ("total", self.total_bytes, ""),
            ("allowance", self.allowance_bytes, "not counted: codec, CUDA context, rounding"),
            ("needed", self.needed_bytes, self._verdict()),
            ("K/V at the end", self.kv_bytes, f"held, of {show_bytes(self.capacity_bytes)}"),
            ("K/V of a frame", self.frame_bytes, "a whole latent frame, all branches"),
            ("bookkeeping", self.metadata_bytes, "who owns which slot, on the host"),
            ("checkpoint", self.checkpoint_bytes, "written to disk for a latent frame, if asked"),
        ]
        if self.score_bytes:
            rows.append(("scores", self.score_bytes, "queries of a frame, held until its commit"))
        text = [self._title()]
        text += [f"{name:<16}{show_bytes(size):>12}  {note}".rstrip() for name, size, note in rows]
        text.append(
            f"{'time':<16}{self.relative_total:>11.2f}x  of the full cache by operations; "
            f"last latent frame {self.relative_last:.2f}x"
        )
        shares = self.attention_shares
        text.append(
            f"{'attention':<16}{shares[-1]:>11.0%}   of the layers' work in the last latent frame, "
            f"{min(shares):.0%} at least"
        )
        if self.longest:
            text.append(f"{'longest clip':<16}  " + "; ".join(str(one) for one in self.longest))
        return text + (self._explanation() if explain else [])

    def _title(self) -> str:
        work = self.workload
        width, height = work["size"]
        return (
            f"{width}x{height}, {work['frames']} frames = {work['latent_frames']} latent frames of "
            f"{work['frame_tokens']} tokens, {work['policy']}, {work['steps']} steps, guidance "
            f"{work['guidance']:g}, {work['engine']} engine"
        )

    def _verdict(self) -> str:
        if self.memory is None:
            return ""
        return f"{'fits' if self.fits else 'does not fit'} {show_bytes(self.memory)}"

    def _explanation(self) -> list[str]:
        text = []
        for phase in self.phases:
            text.append(f"{phase.moment.name}: {show_bytes(self.weights_bytes + phase.bytes)}")
            text.append(f"  {'weights':<44}{show_bytes(self.weights_bytes):>12}")
            text.append(f"  {'cache, allocated':<44}{show_bytes(phase.cache_bytes):>12}")
            text += [
                f"  {term.name:<44}{show_bytes(term.bytes):>12}  {term.how}"
                for term in phase.moment.terms
            ]
        return text


def plan(
    config: LumosConfig,
    *,
    size: tuple[int, int],
    frames: int,
    policy: Policy | None = None,
    sampling: Sampling = UPSTREAM,
    dtype: str | torch.dtype = "bfloat16",
    text_tokens: int = TEXT_TOKENS,
    image: bool = True,
    prompts: int = 1,
    memory: int | None = None,
    engine: Engine = "packcache",
    positions: PositionMode = "rebase",
    rebase: RebaseRule = "trained",
    reuse: StepReuse | None = None,
    candidates: Mapping[str, Policy] | None = None,
) -> Plan:
    """The plan of a clip of `frames` pixel frames at `size` (width, height) in pixels.

    Args:
        policy: default `PackCache()`; upstream's engine knows the full cache only.
        sampling: steps, guidance, and how much of a committed frame is re-masked.
        text_tokens: tokens of the longest prefix, header included.
        image: the clip starts with a given latent frame, the condition image.
        memory: bytes there are; tells what fits and the longest clip under each candidate.
        engine: this package's, or "stock" for upstream's way (`stock`).
        positions, rebase: as for `FrameCache`.
        reuse: what steps take from earlier ones; time is told against the exact full cache.
        candidates: policies by label, default `CANDIDATES`.

    Raises InvalidSetting for settings that no run could have.
    """
    _check_between("frames", frames, 1, _FRAMES)
    _check_between("prompts", prompts, 1, _FRAMES)
    _check_between("text_tokens", text_tokens, HEADER + 2, config.max_position_embeddings)
    if engine not in get_args(Engine):
        raise InvalidSetting(f"engine is {engine!r}, expected {' or '.join(get_args(Engine))}")
    shape = Workload(
        config=config,
        layout=Vocab(config).layout(*size),
        sampling=sampling,
        dtype=as_dtype(dtype),
        text_tokens=text_tokens,
        image=image,
        prompts=prompts,
        positions=positions,
        rebase=rebase,
        reuse=reuse or EXACT,
    )
    make = _stock_plan if engine == "stock" else _own_plan
    return make(
        shape,
        policy or (FullCache() if engine == "stock" else PackCache()),
        {"size": list(size), "frames": frames, "engine": engine},
        memory,
        CANDIDATES if candidates is None else candidates,
    )


def _check_between(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or value < least:
        raise InvalidSetting(f"{name} is {value}, expected at least {least}")
    if value > most:
        raise InvalidSetting(f"{name} is {value}, expected at most {most}")


# --- the two engines ----------------------------------------------------------------------------


def _own_plan(
    shape: Workload,
    policy: Policy,
    asked: dict[str, Any],
    memory: int | None,
    candidates: Mapping[str, Policy],
) -> Plan:
    latents = latent_frames(asked["frames"], shape.config.compression[0])
    course = shape.course(policy, latents)
    held = course.held_before(latents)
    own = _operations(shape, held, shape.reuse)
    full = _operations(shape, _full_held(shape, latents))

    def search() -> list[Longest]:
        if memory is None:
            return []
        return [
            Longest(label=label, frames=_longest(shape, candidate, memory))
            for label, candidate in candidates.items()
        ]

    return Plan(
        workload=_workload(shape, policy, asked, latents),
        weights_bytes=shape.weights_bytes,
        frame_bytes=shape.frame_bytes,
        kv_bytes=course.kv_bytes * shape.prompts,
        capacity_bytes=course.end_bytes * shape.prompts,
        metadata_bytes=course.metadata_bytes * shape.prompts,
        checkpoint_bytes=journal.frame_bytes(
            shape.layout,
            kept=course.newest,
            token_bytes=shape.frame_bytes // shape.layout.tokens // shape.prompts,
            prompts=shape.prompts,
        ),
        phases=shape.phases(course, latents),
        relative_total=sum(own) / sum(full),
        relative_last=own[-1] / full[-1],
        attention_shares=_shares(shape, held),
        score_bytes=sum(term.bytes for term in shape.watched(policy.asks)),
        memory=memory,
        search=search,
    )


def _stock_plan(
    shape: Workload,
    policy: Policy,
    asked: dict[str, Any],
    memory: int | None,
    candidates: Mapping[str, Policy],
) -> Plan:
    """Upstream's engine; `candidates` do not matter, it has one way only."""
    exact = shape.reuse.is_exact
    if policy != FullCache() or shape.prompts != 1 or shape.sampling.branches != 2 or not exact:
        raise InvalidSetting(
            f"the stock engine was asked for {policy!r}, {shape.prompts} prompts, guidance "
            f"{shape.sampling.guidance:g} and {shape.reuse}, expected FullCache(), one prompt, a "
            "guidance other than 1 and exact steps, which is all it can do: use the packcache "
            "engine"
        )
    latents = latent_frames(asked["frames"], shape.config.compression[0])
    stock = _stock(shape, latents)
    held = _full_held(shape, latents)
    own = [
        stock_frame_operations(shape.config, shape.layout, shape.sampling, tokens)
        for tokens in held[stock.given :]
    ]
    full = _operations(shape, held)[stock.given :]

    def search() -> list[Longest]:
        if memory is None:
            return []
        most = _most(lambda count: _stock_needed(shape, count), memory)
        return [Longest(label="stock", frames=_in_pixels(shape, most))]

    return Plan(
        workload=_workload(shape, policy, asked, latents),
        weights_bytes=shape.weights_bytes,
        frame_bytes=2 * shape.layout.tokens * stock.token_bytes,
        kv_bytes=stock.kv_bytes(latents),
        capacity_bytes=stock.kv_bytes(latents),
        metadata_bytes=0,
        checkpoint_bytes=0,
        phases=tuple(stock.phases()),
        relative_total=sum(own) / sum(full),
        relative_last=own[-1] / full[-1],
        attention_shares=_shares(shape, held),
        memory=memory,
        search=search,
    )


def _stock(shape: Workload, latents: int) -> Stock:
    return Stock(
        config=shape.config,
        layout=shape.layout,
        latents=latents,
        dtype=shape.dtype,
        text_tokens=shape.text_tokens,
        given=int(shape.image and latents > 1),
    )


def _stock_needed(shape: Workload, latents: int) -> int:
    peak = max(phase.bytes for phase in _stock(shape, latents).phases())
    return shape.weights_bytes + peak + ALLOWANCE


def _workload(
    shape: Workload, policy: Policy, asked: dict[str, Any], latents: int
) -> dict[str, Any]:
    """What the plan is of, in plain values."""
    return {
        **asked,
        "latent_frames": latents,
        "frame_tokens": shape.layout.tokens,
        "policy": repr(policy),
        "guidance": shape.sampling.guidance,
        "steps": shape.sampling.steps,
        "history_mask_ratio": shape.sampling.history_mask_ratio,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "parameters": shape.weights_bytes // shape.dtype.itemsize,
        "text_tokens": shape.text_tokens,
        "image": shape.image,
        "prompts": shape.prompts,
        "positions": shape.positions,
        "rebase": shape.rebase,
        "reuse": asdict(shape.reuse),
    }


# --- time, and the longest clip -----------------------------------------------------------------


def _full_held(shape: Workload, latents: int) -> list[int]:
    """Tokens a full cache holds before each latent frame."""
    return [shape.text_tokens + frame * shape.layout.tokens for frame in range(latents)]


def _operations(shape: Workload, held: list[int], reuse: StepReuse = EXACT) -> list[int]:
    work = clip_work(
        shape.config, shape.layout, shape.sampling, held, given=int(shape.image), reuse=reuse
    )
    return [frame.total for frame in work]


def _shares(shape: Workload, held: list[int]) -> tuple[float, ...]:
    return tuple(attention_share(shape.config, shape.layout, tokens) for tokens in held)


def _longest(shape: Workload, policy: Policy, memory: int) -> int | None:
    """Pixel frames of the longest clip that fits; None: any length."""
    if shape.is_bounded(policy) and shape.needed(policy, _ENDLESS) <= memory:
        return None
    return _in_pixels(shape, _most(lambda count: shape.needed(policy, count), memory))


def _in_pixels(shape: Workload, latents: int) -> int:
    return pixel_frames(latents, shape.config.compression[0]) if latents else 0


def _most(needed: Callable[[int], int], memory: int) -> int:
    """The most latent frames for which what is needed, which grows with them, fits."""
    low, high = 0, 1
    while high < _ENDLESS and needed(high) <= memory:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= memory else (low, middle)
    return low
