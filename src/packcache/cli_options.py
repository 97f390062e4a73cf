"""Options that several commands of the command line share, and what they mean together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packcache.errors import InvalidSetting

if TYPE_CHECKING:
    from packcache.lumos.config import LumosConfig
    from packcache.lumos.pipeline import Pipeline

POLICIES_HELP = (
    "full, window, sink, uniform, random, packcache, none, fademem, deepforcing; settings as "
    "packcache:budget=1; or a .json file of packcache calibrate"
)

ModelName = Annotated[str, typer.Option("--model", help="digits, a folder, or a hub id")]
Subfolder = Annotated[str | None, typer.Option("--subfolder", help="the model's folder in there")]
CodecFolder = Annotated[
    str | None, typer.Option("--codec", help="folder of encoder.jit, decoder.jit (run as programs)")
]
TokenizerFolder = Annotated[
    str | None, typer.Option("--tokenizer", help="folder of tokenizer.json [the model's]")
]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda [a GPU if there is one]")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="bfloat16, float32 [as stored]")]

ImageFile = Annotated[Path | None, typer.Option("--image", help="first frame of the clip")]
VideoFile = Annotated[Path | None, typer.Option("--video", help="a clip to go on from")]
FrameCount = Annotated[int, typer.Option("--frames", help="pixel frames to make")]
SizeText = Annotated[
    str | None, typer.Option("--size", help="672x384, or 528: about 528x528 pixels, image's shape")
]
Fps = Annotated[int | None, typer.Option("--fps", help="frames a second [model's own]")]
Seconds = Annotated[int | None, typer.Option("--seconds", help="duration stated [the clip's own]")]
Seed = Annotated[int, typer.Option("--seed", help="seed of the draws")]
Steps = Annotated[int | None, typer.Option("--steps", help="denoising steps a frame [model's own]")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="text guidance [model's own]")]
Positions = Annotated[str, typer.Option("--positions", help="rebase or absolute")]
Rebase = Annotated[
    str, typer.Option("--rebase", help="trained (as far as needed) or slide (paper)")
]
Reuse = Annotated[
    str,
    typer.Option(
        "--reuse",
        help="exact, balanced, fast, or history_every=4,rest_every=8: steps that reuse earlier "
        "ones; approximate unless exact",
    ),
]
PolicyText = Annotated[str, typer.Option("--policy", help=POLICIES_HELP)]
BudgetText = Annotated[
    str | None, typer.Option("--budget", help="latent frames, or 4084tok, 512MiB")
]
Window = Annotated[int | None, typer.Option("--window", help="latent frames that may hold tokens")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which model, from where, and where to."""

    name: str = "digits"
    subfolder: str | None = None
    codec: str | None = None
    tokenizer: str | None = None
    device: str | None = None
    dtype: str | None = None

    def check(self) -> None:
        """Wrong use that needs no look at any file."""
        from packcache import models

        models.check_source(
            self.name, subfolder=self.subfolder, codec=self.codec, tokenizer=self.tokenizer
        )

    def load(self) -> Pipeline:
        from packcache import models

        return models.load(
            self.name,
            subfolder=self.subfolder,
            codec=self.codec,
            tokenizer=self.tokenizer,
            device=self.device,
            dtype=self.dtype,
        )

    @property
    def place(self) -> str:
        """The device, as `load` chooses it."""
        from packcache import models

        return str(models.usual_device(self.name, self.device))

    @property
    def stored_dtype(self) -> str:
        """The weights' dtype, as `load` will have it."""
        from packcache import models

        return self.dtype or models.stored_dtype(self.name, self.subfolder)

    def config(self) -> LumosConfig:
        from packcache import models

        return models.load_config(self.name, subfolder=self.subfolder)


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {key: value for key, value in options.items() if value is not None}


def parse_size(text: str | int | None) -> tuple[int, int] | int | None:
    """The text 672x384 as (672, 384), 528 as itself."""
    if text is None or isinstance(text, int):
        return text
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise InvalidSetting(f"--size is {text!r}, expected WIDTHxHEIGHT such as 672x384, or 528")
    sizes = [int(number) for number in numbers]
    return (sizes[0], sizes[1]) if len(sizes) == 2 else sizes[0]


def with_settings(policy: str, **settings: str | int | None) -> str:
    """`--budget` and `--window` are short for settings of the policy."""
    extra = [f"{key}={value}" for key, value in settings.items() if value is not None]
    if not extra:
        return policy
    return policy + ("," if ":" in policy else ":") + ",".join(extra)
