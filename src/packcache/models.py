"""A ready pipeline: the embedded model by name, or a checkpoint folder or hub id of Lumos-1.

gen = load("digits")
gen = load("weights/3B", subfolder="stage-2-joint-384p", codec="weights/Cosmos-DV4x8x8")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from packcache.errors import InputError, InvalidSetting
from packcache.lumos.codec import Codec
from packcache.lumos.config import LumosConfig, check_overrides, read_config
from packcache.lumos.cosmos import load_cosmos
from packcache.lumos.device import as_device, as_dtype
from packcache.lumos.hub import resolve
from packcache.lumos.image import Size
from packcache.lumos.pipeline import Pipeline
from packcache.lumos.schedule import Sampling
from packcache.lumos.text import Header, load_tokenizer
from packcache.lumos.weights import load_model

__all__ = [
    "FPS", "MODELS", "SIZE", "TARGET", "Usual", "check_source", "load", "load_config",
    "stored_dtype", "usual", "usual_device",
]  # fmt: skip

#: What the released video models were trained on: pixels, and frames a second (lumos1-spec 3.3).
SIZE, TARGET, FPS = (672, 384), 528, 12


@dataclass(frozen=True, kw_only=True)
class Usual:
    """What a model does unless asked otherwise (`Pipeline`), known before anything is read."""

    size: Size = SIZE
    target: int | None = TARGET
    fps: int = FPS
    sampling: Sampling = field(default_factory=Sampling)


def _load_digits(device: torch.device, dtype: torch.dtype) -> Pipeline:
    from packcache.digits import codec, model

    own = usual("digits")
    return Pipeline(
        name="digits",
        model=model.load_model().to(device=device, dtype=dtype),
        codec=codec.load_codec().to(device),
        tokenize=_digits_text,
        size=own.size,
        fps=own.fps,
        sampling=own.sampling,
        seconds=model.SECONDS,
    )


#: Models that come with the package.
MODELS: dict[str, Callable[[torch.device, torch.dtype], Pipeline]] = {"digits": _load_digits}


def usual(name: str | Path) -> Usual:
    """The defaults of what `load` would load."""
    if str(name) not in MODELS:
        return Usual()
    from packcache.digits import model, world

    size = (world.SIZE, world.SIZE)
    return Usual(size=size, target=None, fps=world.FPS, sampling=model.SAMPLING)


def usual_device(name: str | Path, device: str | torch.device | None = None) -> torch.device:
    """Where `load` would put it: a GPU if there is one; the embedded model stays on the CPU."""
    gpu = torch.cuda.is_available() and str(name) not in MODELS
    return as_device(device or ("cuda" if gpu else "cpu"))


def load(
    name: str | Path,
    *,
    subfolder: str | None = None,
    codec: str | Path | None = None,
    tokenizer: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **overrides: Any,
) -> Pipeline:
    """A ready pipeline.

    Args:
        name: "digits", which is embedded and needs no download; or a folder in the Hugging Face
            layout; or a hub id such as "organisation/name" (extra `[hf]`).
        subfolder: the model's folder inside `name`.
        codec: folder with the Cosmos tokenizer's `encoder.jit` and `decoder.jit`. These are
            programs and will be run: name only files you trust. "digits" is the embedded codec.
        tokenizer: folder with `tokenizer.json`, if the model's has none; "digits": the embedded
            model's words.
        device: default a GPU if there is one; the embedded model stays on the CPU.
        dtype: of the weights; default as stored ("digits": float32).
        overrides: fields of `LumosConfig` that are ours: `trained_latent_frames`, `token_ids`,
            `compression`, `fsq_levels`.

    Raises InputError for files that do not fit together, in one line, before weights are read.
    """
    check_source(name, subfolder=subfolder, codec=codec, tokenizer=tokenizer, **overrides)
    place = usual_device(name, device)
    kind = None if dtype is None else as_dtype(dtype)
    if str(name) in MODELS:
        return MODELS[str(name)](place, kind or torch.float32)
    assert codec is not None  # check_source
    folder = resolve(name, subfolder)
    config = read_config(folder, **overrides)
    language = _language(tokenizer, name, subfolder, config)
    pixels = _codec(codec, config, place)
    own = usual(name)
    return Pipeline(
        name=_title(name, subfolder),
        model=load_model(folder, config, device=place, dtype=kind),
        codec=pixels,
        tokenize=language,
        size=own.size,
        fps=own.fps,
        sampling=own.sampling,
        target=own.target,
        picture_header=True,
    )


def _title(name: str | Path, subfolder: str | None) -> str:
    """What results call the model: the hub id or the folder's own name, and what is inside."""
    folder = Path(name).expanduser()
    title = folder.resolve().name if folder.is_dir() else str(name)
    return f"{title}/{subfolder}" if subfolder else title


def load_config(name: str | Path, *, subfolder: str | None = None, **overrides: Any) -> LumosConfig:
    """The sizes of what `load` would load; no weight is read."""
    if str(name) in MODELS:
        from packcache.digits.model import digits_config

        return digits_config()
    _check_name(name)
    return read_config(resolve(name, subfolder, need="config"), **overrides)


def stored_dtype(name: str | Path, subfolder: str | None = None) -> str:
    """What the weights of a folder are stored in; a hub id's, unread, are taken for bfloat16."""
    if str(name) in MODELS:
        return "float32"
    files = sorted((Path(name).expanduser() / (subfolder or "")).glob("*.safetensors"))
    try:
        with safe_open(files[0], framework="pt") as file:
            stored = file.get_slice(next(iter(file.keys()))).get_dtype()
    except (OSError, SafetensorError, LookupError, StopIteration):  # `load` will say what is wrong
        return "bfloat16"
    return {"F32": "float32", "F16": "float16"}.get(stored, "bfloat16")


def check_source(
    name: str | Path,
    *,
    codec: str | Path | None = None,
    subfolder: str | None = None,
    tokenizer: str | Path | None = None,
    **overrides: Any,
) -> None:
    """Whether `load` is asked for something it can look for; reads nothing, downloads nothing."""
    if str(name) in MODELS:
        if overrides or any(x is not None for x in (codec, subfolder, tokenizer)):
            raise InvalidSetting(
                f"{str(name)!r} comes with its codec and language: give a device or a dtype, no "
                "more"
            )
        return
    _check_name(name)
    check_overrides(overrides)
    if not codec:
        raise InvalidSetting(
            "no codec: give codec=, the folder with encoder.jit and decoder.jit of "
            "Cosmos-Tokenizer-DV4x8x8 (they run as programs: name only files you trust)"
        )


def _check_name(name: str | Path) -> None:
    """A bare word that is no folder here is a slip of the pen, not a hub id."""
    if "/" not in str(name) and not Path(name).is_dir():
        raise InvalidSetting(
            f"unknown model {str(name)!r}: known are {', '.join(MODELS)}, folders, and hub ids "
            "such as organisation/name"
        )


def _digits_text(prompt: str, header: Header) -> list[int]:
    """The embedded model's wording has no place for numbers: its clips are all of one kind."""
    from packcache.digits.model import text_ids

    return text_ids(prompt)


def _language(
    tokenizer: str | Path | None, name: str | Path, subfolder: str | None, config: LumosConfig
) -> Callable[[str, Header], list[int]]:
    if tokenizer == "digits":
        return _digits_text
    folder = (
        resolve(tokenizer, need="tokenizer")
        if tokenizer
        else resolve(name, subfolder, need="tokenizer")
    )
    return load_tokenizer(folder, token_ids=config.token_ids, vocab_size=config.vocab_size)


def _codec(codec: str | Path, config: LumosConfig, device: torch.device) -> Codec:
    if codec != "digits":
        cosmos = load_cosmos(
            codec, device=device, compression=config.compression, levels=config.fsq_levels
        )
        cosmos.check(encoder=cosmos.paths["encoder"].is_file())
        return cosmos
    from packcache.digits.codec import LEVELS, load_codec

    if config.fsq_levels != LEVELS:
        raise InputError(
            f"the embedded codec has levels {LEVELS}, the model expects {config.fsq_levels}: "
            "name the codec the model was trained with"
        )
    return load_codec().to(device)
