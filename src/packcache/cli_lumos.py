"""`packcache plan` before a clip, `packcache doctor` before trusting one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from packcache.cli_options import (
    POLICIES_HELP,
    AsJson,
    BudgetText,
    CodecFolder,
    Device,
    Dtype,
    FrameCount,
    Guidance,
    Model,
    Positions,
    Rebase,
    Reuse,
    Seed,
    SizeText,
    Steps,
    Subfolder,
    TokenizerFolder,
    Window,
    given,
    parse_size,
    with_settings,
)
from packcache.console import print_json, progress
from packcache.errors import InputError, InvalidSetting

SizedModel = Annotated[
    str, typer.Option("--model", help="1b, 3b, digits, a folder, or a hub id (config.json alone)")
]
Memory = Annotated[str | None, typer.Option("--memory", help="such as 16GiB [what is free here]")]
PolicyOrNone = Annotated[
    str | None, typer.Option("--policy", help=f"{POLICIES_HELP} [packcache; stock: full]")
]
Engine = Annotated[str, typer.Option("--engine", help="packcache, or stock: upstream's way")]
Folder = Annotated[str, typer.Argument(help="the model's folder, a hub id, or digits")]


def plan(
    model: SizedModel = "3b",
    subfolder: Subfolder = None,
    size: SizeText = None,
    frames: FrameCount = 48,
    policy: PolicyOrNone = None,
    budget: BudgetText = None,
    window: Window = None,
    steps: Steps = None,
    guidance: Guidance = None,
    dtype: Dtype = None,
    positions: Positions = "rebase",
    rebase: Rebase = "trained",
    reuse: Reuse = "exact",
    image: Annotated[bool, typer.Option(help="with a condition image")] = True,
    text_tokens: Annotated[
        int | None, typer.Option(help="tokens of the prompt, header included [200]")
    ] = None,
    prompts: Annotated[int, typer.Option("--batch", help="prompts in one call")] = 1,
    memory: Memory = None,
    device: Device = None,
    engine: Engine = "packcache",
    explain: Annotated[bool, typer.Option("--explain", help="show the sums")] = False,
    as_json: AsJson = False,
) -> None:
    """What a clip takes before any weight is loaded: memory, what fits, and time."""
    from packcache.lumos import plan as plans
    from packcache.lumos.config import SIZES
    from packcache.lumos.image import pick_size
    from packcache.models import usual
    from packcache.policies import parse_policy
    from packcache.reuse import parse_reuse

    source = Model(name=model, subfolder=subfolder, device=device, dtype=dtype)
    config, own = SIZES.get(model) or source.config(), usual(model)
    sampling = replace(own.sampling, **given(steps=steps, guidance=guidance))
    kind = policy or ("full" if engine == "stock" else "packcache")
    made = plans.plan(
        config,
        size=pick_size(parse_size(size), default=own.size, picture=None),
        frames=frames,
        policy=parse_policy(with_settings(kind, budget=budget, window=window)),
        image=image,
        prompts=prompts,
        memory=plans.parse_bytes(memory) if memory else plans.found_memory(source.place),
        engine=engine,  # type: ignore[arg-type]
        positions=positions,  # type: ignore[arg-type]
        rebase=rebase,  # type: ignore[arg-type]
        reuse=parse_reuse(reuse, sampling.steps),
        dtype=dtype or ("bfloat16" if model in SIZES else source.stored_dtype),
        sampling=sampling,
        **given(text_tokens=text_tokens),
    )
    rows = plans.paper_figures(SIZES["3b"]) if engine == "stock" else []
    if as_json:
        print_json(made.to_json() | ({"paper": [row.to_json() for row in rows]} if rows else {}))
        return
    print(*made.lines(explain=explain), sep="\n")
    for row in rows:
        print(f"{row.verdict:11} {row.claim}: paper {row.paper}, here {row.ours}")


def doctor(
    folder: Folder,
    subfolder: Subfolder = None,
    codec: CodecFolder = None,
    tokenizer: TokenizerFolder = None,
    device: Device = None,
    dtype: Dtype = None,
    clip: Annotated[Path | None, typer.Option("--clip", help="a real video [a drawn one]")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="what it shows")] = None,
    size: SizeText = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Is this set-up right? Template ids, codec, and likelihood against wrong settings."""
    from packcache.evaluate.doctor import examine
    from packcache.lumos.image import pick_size
    from packcache.video import at_rate, read_video

    if (clip is None) != (prompt is None):
        raise InvalidSetting(
            "expected --clip and --prompt together: what the video shows, in words"
        )
    frames, rate = (None, None) if clip is None else read_video(clip)
    source = Model(
        name=folder, subfolder=subfolder, codec=codec, tokenizer=tokenizer, device=device,
        dtype=dtype,
    )  # fmt: skip
    pipeline = source.load()
    if (asked := parse_size(size)) is not None:
        usual = pick_size(asked, default=pipeline.size, picture=None)
        pipeline = replace(pipeline, size=usual, target=None)
    if frames is not None and rate is not None:
        frames = at_rate(frames, rate, pipeline.fps)
    with progress("examining") as advance:
        diagnosis = examine(pipeline, clip=frames, prompt=prompt, seed=seed, on_step=advance)
    if as_json:
        print_json(diagnosis.to_json())
    else:
        print(*diagnosis.lines(), sep="\n")
    if not diagnosis.passed:
        raise InputError(f"{folder} did not pass: see the rows marked FAIL")
