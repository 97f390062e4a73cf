"""What a benchmark is asked to do, checked before anything is loaded; and where a clip is timed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch

from packcache import models
from packcache.bench.parts import Task, Workload
from packcache.bench.predict import held_tokens
from packcache.errors import InvalidSetting
from packcache.lumos.config import SIZES, LumosConfig
from packcache.lumos.course import TEXT_TOKENS
from packcache.lumos.device import as_device, as_dtype
from packcache.lumos.schedule import Sampling
from packcache.lumos.vocab import HEADER, Vocab, latent_frames
from packcache.lumos.weights import parameter_count
from packcache.policies import Policy
from packcache.reuse import PRESETS

__all__ = ["BASELINES", "FEW", "MODELS", "describe", "make_workload", "parse_layers", "spread"]

#: Sizes with random weights, and the models that come with the package.
MODELS = (*SIZES, *models.MODELS)

#: Loops beside the library's engine, written for the benchmark.
BASELINES = ("torch-full", "stock")

#: Fewer repeats than this are allowed and said.
FEW = 7


@dataclass(frozen=True, kw_only=True)
class _Usual:
    """What is timed of a model unless asked otherwise."""

    size: tuple[int, int]
    sampling: Sampling
    dtype: torch.dtype
    text_tokens: int


def _usual(model: str) -> _Usual:
    own = models.usual(model)
    usual = _Usual(
        size=own.size, sampling=own.sampling, dtype=torch.bfloat16, text_tokens=TEXT_TOKENS
    )
    if model in models.MODELS:
        from packcache.digits.prompts import PROMPT_LENGTH

        text = PROMPT_LENGTH + HEADER + 2  # the first token and the separator
        return replace(usual, dtype=torch.float32, text_tokens=text)
    if model == "toy":  # a minute on a laptop
        return replace(
            usual, size=(128, 96), sampling=Sampling(steps=16), dtype=torch.float32, text_tokens=24
        )
    return usual


def make_workload(
    model: str = "toy",
    *,
    policies: Mapping[str, Policy],
    presets: Sequence[str] = tuple(PRESETS),
    baselines: Sequence[str] = (),
    task: str = "i2v",
    size: tuple[int, int] | None = None,
    frames: int = 48,
    steps: int | None = None,
    guidance: float | None = None,
    layers: int | None = None,
    repeats: int = FEW,
    sample_frames: int | None = None,
    sample_steps: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> Workload:
    """A workload from words, as the command line has them; None takes the model's own.

    Args:
        frames: pixel frames of the clip.
        layers: measure this many layers of the true width and compose rows of full depth.
        sample_frames: latent frames that are timed, the first and the last generated one among
            them; None times all. With baseline `stock` the second generated one comes on top.
        sample_steps: denoising steps that are timed in exact rows; None times all.

    Raises InvalidSetting, one line, for whatever cannot be run.
    """
    _check_words(model, task, presets, baselines)
    _between("frames", frames, 1)
    usual, config = _usual(model), _config(model)
    changed = {"steps": steps, "guidance": guidance}
    sampling = replace(usual.sampling, **{k: v for k, v in changed.items() if v is not None})
    size = size or usual.size
    workload = Workload(
        model=model,
        config=config,
        layout=Vocab(config).layout(*size),
        sampling=sampling,
        task=task,  # type: ignore[arg-type]  # checked above
        size=size,
        frames=frames,
        latents=latent_frames(frames, config.compression[0]),
        policies=policies,
        presets={name: PRESETS[name].for_steps(sampling.steps) for name in presets},
        baselines=tuple(baselines),
        device=_device(model, device),
        dtype=usual.dtype if dtype is None else as_dtype(dtype),
        text_tokens=usual.text_tokens,
        layers=layers,
        repeats=repeats,
        sampled_steps=sample_steps,
        seed=seed,
    )
    _check(workload)
    return _sampled(workload, sample_frames)


def _check_words(model: str, task: str, presets: Sequence[str], baselines: Sequence[str]) -> None:
    _known("model", [model], MODELS)
    _known("task", [task], get_args(Task))
    _known("preset", presets, PRESETS)
    _known("baseline", baselines, BASELINES)


def _sampled(workload: Workload, frames: int | None) -> Workload:
    """With the latent frames that are timed; composed rows have every frame and step."""
    composed = workload.layers is not None
    if composed or workload.sampled_steps == workload.sampling.steps:
        workload = replace(workload, sampled_steps=None)
    taken = spread(workload, None if composed else frames)
    if "stock" in workload.baselines:  # computes text and given frames with the first one's steps
        second = min(workload.given + 1, workload.latents - 1)
        taken = tuple(sorted({*taken, second}))
    return replace(workload, measured_frames=taken)


def _config(model: str) -> LumosConfig:
    return SIZES[model] if model in SIZES else models.load_config(model)


def _device(model: str, device: str | None) -> torch.device:
    place = models.usual_device(model) if device is None else as_device(device)
    if place.type not in ("cpu", "cuda"):
        raise InvalidSetting(f"device is {device!r}, expected cpu, cuda or cuda:N")
    return place


def _known(what: str, asked: Iterable[str], known: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in asked:
        if name not in known:
            raise InvalidSetting(f"unknown {what} {name!r}: known are {', '.join(known)}")
        if name in seen:
            raise InvalidSetting(f"{what} {name!r} is asked for twice: once is enough")
        seen.add(name)


def _between(name: str, value: int, least: int, most: int | None = None, why: str = "") -> None:
    if value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"{least} to {most}"
        raise InvalidSetting(f"{name} is {value}, expected {expected}{why}")


def _check(workload: Workload) -> None:
    """What only the whole tells."""
    config, sampling = workload.config, workload.sampling
    if workload.layers is not None:
        depth = config.num_hidden_layers
        _between("layers", workload.layers, 1, depth, f", the depth of {workload.model}")
    _between("repeats", workload.repeats, 1)
    if workload.sampled_steps is not None:
        _between("sample-steps", workload.sampled_steps, 1, sampling.steps, ", the steps there are")
    if workload.latents <= workload.given:
        raise InvalidSetting(
            f"frames is {workload.frames}, which {workload.task} has none to generate of: give more"
        )
    if "stock" in workload.baselines and sampling.branches == 1:
        raise InvalidSetting(
            "baseline 'stock' with guidance 1: upstream always computes both branches, expected "
            "another guidance, or leave 'stock' out"
        )
    for policy in workload.policies.values():
        held_tokens(workload, policy)  # raises if its budget does not fit the frames


def parse_layers(text: str, workload: Workload) -> list[int]:
    """Numbers of layers such as "4,8", for a composed workload. Raises InvalidSetting."""
    if workload.layers is None:
        raise InvalidSetting(f"check is {text!r} without layers: only composed rows are checked")
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise InvalidSetting(f"check is {text!r}, expected numbers of layers such as 4,8")
    for part in parts:
        _between("check", int(part), 1, workload.config.num_hidden_layers, ", the layers there are")
    return [int(part) for part in parts]


def spread(workload: Workload, most: int | None) -> tuple[int, ...]:
    """Which generated latent frames are timed, ascending; `most` None or enough: all of them.

    Time follows the tokens held, so frames are taken one by one where straight lines between those
    taken are farthest from what any policy holds; then in the middle of the widest gap.
    """
    frames = range(workload.given, workload.latents)
    if most is None or most >= len(frames):
        return tuple(frames)
    _between("sample-frames", most, 2, why=": the first generated latent frame and the last")
    held = [held_tokens(workload, policy) for policy in workload.policies.values()]
    curves = np.array(held, dtype=float).reshape(len(held), workload.latents)
    taken = [frames[0], frames[-1]]
    while len(taken) < most:
        taken = sorted([*taken, _farthest(curves, frames, taken)])
    return tuple(taken)


def _farthest(curves: np.ndarray, frames: range, taken: Sequence[int]) -> int:
    """The frame that straight lines between `taken` miss by most; ties: farthest from any of them.

    `curves [policies, latents]`.
    """
    rest = [frame for frame in frames if frame not in taken]
    missed = np.zeros(len(rest))
    for curve in curves:
        line = np.interp(rest, taken, curve[list(taken)])
        missed = np.maximum(missed, np.abs(curve[rest] - line) / curve[rest])
    apart = [min(abs(frame - other) for other in taken) for frame in rest]
    return max(zip(missed.round(6), apart, (-f for f in rest), rest, strict=True))[3]


def describe(workload: Workload) -> dict[str, Any]:
    """The workload in plain values, for a result."""
    config, sampling = workload.config, workload.sampling
    embedded = workload.model in models.MODELS and workload.layers is None
    every = len(workload.measured_frames) == workload.latents - workload.given
    return {
        "model": workload.model,
        "weights": "embedded" if embedded else "random",
        "parameters": parameter_count(config),
        "num_layers": config.num_hidden_layers,
        "task": workload.task,
        "size": list(workload.size),
        "frames": workload.frames,
        "latent_frames": workload.latents,
        "given_latents": workload.given,
        "tokens_per_frame": workload.layout.tokens,
        "text_tokens": workload.text_tokens,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "history_mask_ratio": sampling.history_mask_ratio,
        "layers": workload.layers,
        "repeats": workload.repeats,
        "few_repeats": workload.repeats < FEW,
        "sampled_frames": None if every else list(workload.measured_frames),
        "sampled_steps": workload.sampled_steps,
        "interleaved": True,
        "seed": workload.seed,
    }
