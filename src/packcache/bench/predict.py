"""What each row of a benchmark should take, said before it is measured.

Operations by kind of kernel come from `lumos.cost`, tokens held from driving a cache without
memory, seconds from the operations and the ceilings of the same run. The text prefix is left out:
one forward of some hundred tokens beside the fifty of each latent frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from packcache.bench.parts import Ceilings, Workload
from packcache.errors import PackCacheError
from packcache.lumos import course
from packcache.lumos.cost import (
    Operations,
    attention_operations,
    frame_work,
    linear_parameters,
    stock_frame_operations,
)
from packcache.lumos.plan import plan
from packcache.lumos.schedule import undecided
from packcache.policies import FullCache, Policy
from packcache.reuse import StepReuse

__all__ = [
    "Forecast", "Prediction", "Row", "Traffic", "course_workload", "frame_floor", "frame_seconds",
    "frame_traffic", "held_tokens", "predict", "predict_row", "stock_work",
]  # fmt: skip

#: A row of the table: label of the policy, or name of the baseline, and name of the preset.
Row = tuple[str, str]

EXACT = "exact"
STOCK = "stock"


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes a latent frame must read at least, by kind of kernel: weights and K/V, nothing else."""

    linear: int
    attention: int
    head: int


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One row, predicted; entries of sequences are latent frames, given ones first.

    `seconds` by the time model: operations of each kind over its ceiling. `floor_s` by
    `frame_floor`. `total_s` and `last_s` sum and end `seconds`. `live_bytes` are the planner's:
    weights, cache and transient at the peak.
    """

    held: tuple[int, ...]
    work: tuple[Operations, ...]
    seconds: tuple[float, ...]
    floor_s: tuple[float, ...]
    live_bytes: int

    @property
    def total_s(self) -> float:
        return sum(self.seconds)

    @property
    def last_s(self) -> float:
        return self.seconds[-1]

    @property
    def operations(self) -> list[int]:
        """Operations of each latent frame, kinds summed."""
        return [work.total for work in self.work]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """All rows that can be, in the order asked. `reasons` say why others cannot."""

    rows: dict[Row, Prediction]
    reasons: dict[Row, str]


def predict(workload: Workload, ceilings: Ceilings) -> Forecast:
    """Policies x presets, then the baselines: the full cache, exact, or upstream's way (`stock`).

    Upstream's operations count at the same ceilings: what its kernels lose beside is not predicted.
    """
    rows: dict[Row, Prediction] = {}
    reasons: dict[Row, str] = {}
    asked = [
        ((label, preset), (policy, reuse, False))
        for label, policy in workload.policies.items()
        for preset, reuse in workload.presets.items()
    ]
    asked += [
        ((name, EXACT), (FullCache(), StepReuse(), name == STOCK)) for name in workload.baselines
    ]
    for row, (policy, reuse, stock) in asked:
        try:
            rows[row] = predict_row(workload, policy, reuse, ceilings, stock=stock)
        except PackCacheError as error:
            reasons[row] = str(error)
    return Forecast(rows=rows, reasons=reasons)


def predict_row(
    workload: Workload,
    policy: Policy,
    reuse: StepReuse,
    ceilings: Ceilings,
    *,
    stock: bool = False,
) -> Prediction:
    """One row. Raises InvalidSetting for a policy that cannot fit."""
    held = held_tokens(workload, policy)
    given = [number < workload.given for number in range(workload.latents)]
    frames = list(zip(held, given, strict=True))
    if stock:
        work = [stock_work(workload, tokens, given=known) for tokens, known in frames]
    else:
        work = [
            frame_work(
                workload.config,
                workload.layout,
                workload.sampling,
                tokens,
                given=known,
                reuse=reuse,
            )
            for tokens, known in frames
        ]
    traffic = [
        frame_traffic(workload, tokens, given=known, reuse=reuse) for tokens, known in frames
    ]
    return Prediction(
        held=tuple(held),
        work=tuple(work),
        seconds=tuple(frame_seconds(one, ceilings) for one in work),
        floor_s=tuple(
            frame_floor(one, read, ceilings) for one, read in zip(work, traffic, strict=True)
        ),
        live_bytes=_live_bytes(workload, policy, reuse, stock),
    )


# --- the pieces of a prediction -----------------------------------------------------------------


def held_tokens(workload: Workload, policy: Policy) -> list[int]:
    """Tokens held before each latent frame, conditional branch, which holds most.

    Raises InvalidSetting for a policy that cannot fit.
    """
    return course_workload(workload).course(policy, workload.latents).held_before(workload.latents)


def course_workload(workload: Workload, layers: int | None = None) -> course.Workload:
    """The workload for caches without memory, at the config's depth or another."""
    depth = workload.config.num_hidden_layers if layers is None else layers
    return course.Workload(
        config=replace(workload.config, num_hidden_layers=depth),
        layout=workload.layout,
        sampling=workload.sampling,
        dtype=workload.dtype,
        text_tokens=workload.text_tokens,
        image=bool(workload.given),
        prompts=1,
        positions="rebase",
        rebase="trained",
    )


def frame_seconds(work: Operations, ceilings: Ceilings) -> float:
    """The time model: each kind's operations at its ceiling; the head is a matrix product."""
    return (work.linear + work.head) / ceilings.matmul + work.attention / ceilings.attention


def frame_floor(work: Operations, traffic: Traffic, ceilings: Ceilings) -> float:
    """The least seconds of a latent frame: for each kind, computing or reading, whichever takes
    longer. Reading is at the speed of a copy, which counts what is read and what is written."""
    rates = {"linear": ceilings.matmul, "attention": ceilings.attention, "head": ceilings.matmul}
    return sum(
        max(getattr(work, kind) / rate, getattr(traffic, kind) / ceilings.copy)
        for kind, rate in rates.items()
    )


def frame_traffic(
    workload: Workload, held: int, *, given: bool = False, reuse: StepReuse | None = None
) -> Traffic:
    """What a latent frame on top of `held` tokens reads at least.

    A forward reads the body's weights once, for both branches, and each layer's keys and values
    once a branch: the open frame's always, the history's where a query attends to it anew. A step
    reads the head's rows of all codes once.
    """
    config, tokens, layers = (
        workload.config,
        workload.layout.tokens,
        workload.config.num_hidden_layers,
    )
    left = [] if given else undecided(workload.layout.content, workload.sampling.steps)
    reuse = reuse or StepReuse()
    read = layers * (held + tokens)  # the commit; token slots, layers summed
    for work in reuse.works(left, tokens):
        read += layers * (tokens + held * (work.fresh != 0))
    slot = 2 * config.num_key_value_heads * config.head_dim
    size = workload.dtype.itemsize
    return Traffic(
        linear=(len(left) + 1) * linear_parameters(config) * size,
        attention=workload.sampling.branches * slot * read * size,
        head=len(left) * config.hidden_size * config.token_ids.num_codes * size,
    )


def stock_work(workload: Workload, held: int, *, given: bool = False) -> Operations:
    """Operations of upstream's way by kind; they sum to `cost.stock_frame_operations`.

    A given latent frame is one forward, of which others have one a step and one more.
    """
    config, layout, sampling = workload.config, workload.layout, workload.sampling
    forwards = sampling.steps + 1
    total = stock_frame_operations(config, layout, sampling, held)
    linear = 2 * forwards * 2 * linear_parameters(config) * layout.tokens
    attention = 2 * forwards * attention_operations(config, layout, held)
    part = forwards if given else 1
    return Operations(
        linear=linear // part,
        attention=attention // part,
        head=(total - linear - attention) // part,
    )


def _live_bytes(workload: Workload, policy: Policy, reuse: StepReuse, stock: bool) -> int:
    made = plan(
        workload.config,
        size=workload.size,
        frames=workload.frames,
        policy=policy,
        sampling=workload.sampling,
        dtype=workload.dtype,
        text_tokens=workload.text_tokens,
        image=bool(workload.given),
        engine="stock" if stock else "packcache",
        reuse=reuse,
    )
    return made.total_bytes
