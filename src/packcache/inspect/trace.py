"""A trace: how much attention every token got, so that a policy can be judged without a model.

    trace = Trace.load("digits.trace")
    sample = trace.samples[0]
    sample.mass                     # [layers recorded, S], rows sum to 1
    trace.tokens(sample).distance   # [S], 0 is the current frame, 1 the newest history

A file is a compressed npz without pickles. Of each mass its logarithm is stored, 16 bits, 2048
codes an octave over 32 octaves: a code says its mass to 0.017 %, so no sum is off by more than
that, however many tokens it has; what is smaller than 2^-32 is 0. Rows are scaled to sum to 1 when
they are read, which leaves the error of any sum below 0.1 %. High and low bytes lie apart, since
the high ones repeat. `schema` says how to read it.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from packcache.errors import InputFileError
from packcache.files import check_folder, replacing
from packcache.timeline import FrameLayout, Ints, Role

__all__ = ["COMMIT", "CURRENT", "SAMPLED", "SCHEMA", "TRAINED", "Sample", "Tokens", "Trace"]

SCHEMA = "packcache.trace/1"

#: Where a trace's workload says how many latent frames its model was trained on.
TRAINED = "trained_latent_frames"

#: Where it says which latent frames were sampled, if not all.
SAMPLED = "sampled_latent_frames"

#: The step of a forward that is committed.
COMMIT = -1

#: Role code of the frame that is being made; those of `Role` are their places in it.
CURRENT = len(Role)

#: Codes of a factor of two in mass, and how many of those lie between the least mass and 1.
_OCTAVE, _OCTAVES = 2048, 32

#: Numbers of a sample in its file, in this order.
_NUMBERS = ("clip", "frame", "step", "steps", "branch")

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """The attention of one forward, a mean over sampled queries of the current frame and heads.

    Attributes:
        clip: number of the clip in its trace.
        frame: latent frame that was being made.
        step, steps: denoising step, and of how many; step -1 is the forward that was committed.
        branch: 0 is the conditional half of guidance.
        mass: softmax probability float32 `[layers recorded, S]` of every token in logical order:
            text, frame 0, ..., the current frame; rows sum to 1 up to rounding.
    """

    clip: int
    frame: int
    step: int
    steps: int
    branch: int
    mass: Floats


class Tokens(NamedTuple):
    """What the S tokens of a sample are, int32 `[S]` each.

    `role` is the place in `Role`, or `CURRENT`; `frame` the latent frame, -1 for text; `distance`
    0 in the current frame, 1 in the one before it, -1 for text; `offset` the place in the frame or
    the text.
    """

    role: Ints
    frame: Ints
    distance: Ints
    offset: Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Clips of one kind that were made with the full cache, and where their attention went.

    Attributes:
        layout: of a latent frame, P tokens.
        text: tokens of the conditional branch's prefix, the same for all clips.
        roles: of each latent frame.
        layers: numbers of the recorded layers, of `num_layers`.
        visible: bool `[P]`, False where history that was generated is re-masked; None: nowhere.
        ids: true token ids int32 `[frames, P]` of each clip; empty for a model without ids.
        samples: what was seen.
        value_norm: float32 `[layers recorded]`, largest length of a value over tokens and heads.
        workload, environment: plain data; what was run and where.
        own: float32 `[frames, P]` of each clip, the shares that each latent frame's tokens received
            of what its own queries paid to that frame at its commit, mean over the layers; empty
            where every latent frame was sampled, for samples say it.
    """

    layout: FrameLayout
    text: int
    roles: tuple[Role, ...]
    layers: tuple[int, ...]
    num_layers: int
    visible: NDArray[np.bool_] | None
    ids: list[Ints]
    samples: list[Sample]
    value_norm: Floats
    workload: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    own: list[Floats] = field(default_factory=list)

    @property
    def clips(self) -> range:
        """Numbers of the clips."""
        seen = max((sample.clip + 1 for sample in self.samples), default=0)
        return range(len(self.ids) or seen)

    def length(self, frame: int) -> int:
        """S, tokens that a full cache attends to in latent frame `frame`, itself included."""
        return self.text + (frame + 1) * self.layout.tokens

    def tokens(self, sample: Sample) -> Tokens:
        """What each token of a sample is."""
        place = np.arange(self.length(sample.frame), dtype=np.int32) - self.text
        frame = np.maximum(place // self.layout.tokens, -1)
        code = {role: number for number, role in enumerate(Role)}
        before = [code[role] for role in self.roles[: sample.frame]]
        codes = np.array([code[Role.TEXT], *before, CURRENT], dtype=np.int32)
        return Tokens(
            role=codes[frame + 1],
            frame=frame,
            distance=np.where(frame < 0, -1, sample.frame - frame).astype(np.int32),
            offset=np.where(frame < 0, place + self.text, place % self.layout.tokens).astype(
                np.int32
            ),
        )

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises OutputError."""
        path = Path(path)
        check_folder(path.parent)
        codes = np.concatenate([np.zeros(0, np.uint16), *(_codes(s.mass) for s in self.samples)])
        arrays = {
            "head": np.frombuffer(json.dumps(self._head()).encode(), dtype=np.uint8),
            "ids": np.array(self.ids, dtype=np.int32),
            "samples": np.array([_numbers(one) for one in self.samples], dtype=np.int32),
            "high": (codes >> 8).astype(np.uint8),
            "low": (codes & 255).astype(np.uint8),
            "value_norm": self.value_norm.astype(np.float32),
            "visible": np.ones(0, bool) if self.visible is None else self.visible,
        }
        if self.own:
            arrays["own"] = _codes(np.stack(self.own)).reshape(len(self.own), len(self.roles), -1)
        with replacing(path) as draft, draft.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote. Raises InputFileError for any other file."""
        path = Path(path)
        if not path.is_file():
            raise InputFileError(
                f"{path} is no file: record a trace with packcache trace record --out {path}"
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            return _read(arrays)
        except _Unlike as error:
            raise InputFileError(f"{path} {error}: record it again, or name another file") from None
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputFileError(
                f"{path} cannot be read ({error}): a trace that is whole was expected"
            ) from None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputFileError(
                f"{path} is no trace ({type(error).__name__}: {error}), expected a file that "
                "packcache trace record wrote"
            ) from None

    def _head(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "layout": asdict(self.layout),
            "text": self.text,
            "roles": [role.value for role in self.roles],
            "layers": list(self.layers),
            "num_layers": self.num_layers,
            "workload": self.workload,
            "environment": self.environment,
        }


class _Unlike(Exception):
    """A file that contradicts itself, in words that go on after its name."""


def _numbers(sample: Sample) -> list[int]:
    return [getattr(sample, name) for name in _NUMBERS]


def _codes(mass: Floats) -> NDArray[np.uint16]:
    """Masses of 0 to 1 as codes, flat: 0 is no mass."""
    with np.errstate(divide="ignore"):
        octave = _OCTAVES + np.log2(mass.astype(np.float64).ravel())
    return np.clip(np.rint(octave * _OCTAVE), 0, np.iinfo(np.uint16).max).astype(np.uint16)


def _mass(codes: NDArray[np.uint16]) -> Floats:
    """Masses of codes `[rows, S]`, each row scaled to sum to 1."""
    mass = np.exp2(codes.astype(np.float64) / _OCTAVE - _OCTAVES)
    mass[codes == 0] = 0
    total = mass.sum(axis=1, keepdims=True)
    if not total.all():
        raise _Unlike("has attention that sums to 0, expected 1")
    return (mass / total).astype(np.float32)


def _read(arrays: Mapping[str, NDArray[Any]]) -> Trace:
    head = json.loads(bytes(arrays["head"]).decode())
    if head["schema"] != SCHEMA:
        raise _Unlike(f"has schema {head['schema']!r}, expected {SCHEMA!r}")
    visible = arrays["visible"]
    trace = Trace(
        layout=FrameLayout(**head["layout"]),
        text=int(head["text"]),
        roles=tuple(Role(role) for role in head["roles"]),
        layers=tuple(head["layers"]),
        num_layers=int(head["num_layers"]),
        visible=visible if len(visible) else None,
        ids=list(arrays["ids"]),
        samples=[],
        value_norm=arrays["value_norm"],
        workload=head["workload"],
        environment=head["environment"],
        own=[_mass(codes) for codes in arrays.get("own", ())],
    )
    codes = (arrays["high"].astype(np.uint16) << 8 | arrays["low"]).astype(np.uint16)
    trace.samples.extend(_samples(trace, arrays["samples"].reshape(-1, len(_NUMBERS)), codes))
    _check(trace)
    return trace


def _samples(trace: Trace, numbers: Ints, codes: NDArray[np.uint16]) -> list[Sample]:
    """Samples from their numbers and all their codes, one after the other."""
    rows, samples, start = len(trace.layers), [], 0
    frames = numbers[:, _NUMBERS.index("frame")].tolist()
    needed = sum(rows * trace.length(frame) for frame in frames)
    if len(codes) != needed:
        raise _Unlike(f"has {len(codes)} masses, expected {needed} for {len(numbers)} samples")
    for own in numbers.tolist():
        named = dict(zip(_NUMBERS, own, strict=True))
        count = rows * trace.length(named["frame"])
        mass = _mass(codes[start : start + count].reshape(rows, -1))
        samples.append(Sample(**named, mass=mass))
        start += count
    return samples


def _check(trace: Trace) -> None:
    """What a file says of itself must fit together."""
    frames, tokens, clips = len(trace.roles), trace.layout.tokens, len(trace.clips)
    numbers = range(trace.num_layers)
    if not trace.layers or sorted({*trace.layers} & {*numbers}) != list(trace.layers):
        raise _Unlike(
            f"has layers {list(trace.layers)}, expected some of 0 to {trace.num_layers - 1}, "
            "ascending"
        )
    for name in ("workload", "environment"):
        if not isinstance(getattr(trace, name), dict):
            raise _Unlike(f"has {name} {getattr(trace, name)!r}, expected an object of names")
    for clip, ids in enumerate(trace.ids):
        if ids.shape != (frames, tokens):
            raise _Unlike(
                f"has ids of shape {ids.shape} for clip {clip}, expected {(frames, tokens)}"
            )
    for clip, own in enumerate(trace.own):
        if own.shape != (frames, tokens) or len(trace.own) != clips:
            raise _Unlike(
                f"has shares of shape {own.shape} for clip {clip} of {len(trace.own)}, expected "
                f"{(frames, tokens)} for {clips} clips"
            )
    for sample in trace.samples:
        if not (0 <= sample.clip < clips and 0 <= sample.frame < frames):
            raise _Unlike(
                f"has a sample of clip {sample.clip}, latent frame {sample.frame}, expected below "
                f"{clips} and {frames}"
            )
    if trace.value_norm.shape != (len(trace.layers),):
        raise _Unlike(
            f"has {trace.value_norm.size} value norms, expected {len(trace.layers)}, one a layer"
        )
    if not (np.isfinite(trace.value_norm) & (trace.value_norm >= 0)).all():
        raise _Unlike(
            f"has value norms {trace.value_norm.tolist()}, expected lengths: finite, at least 0"
        )
    if trace.visible is not None and trace.visible.shape != (tokens,):
        raise _Unlike(f"has visibility of {trace.visible.size} tokens, expected {tokens}")
