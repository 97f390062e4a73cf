"""`packcache doctor`: is a model put together rightly? For whoever has the weights.

    diagnosis = examine(load("digits"))
    diagnosis.passed, diagnosis.lines(), diagnosis.to_json()

A wrong number in `config.json` or a codec of another make raises no error: the clips are only
worse. So the model judges. A real clip is given to it frame by frame (teacher-forced, through the
real engine), half the tokens of each next frame masked, and -log p of the true ones is averaged:
under what the set-up states, and under one deliberately wrong setting at a time. What was trained
must win every contrast (near values must not beat it). Otherwise something is wrong, or the clip is
too short to tell; neither passes.

Not seen, and so not vouched for: a `rope_theta` wrong by a factor of 2 or less; a
`rms_norm_eps` that is wrong and changes next to nothing, as it does while it is small beside the
mean square of what is normalised (one 50 times the usual ones is not let through all the same); a
codec wrong in the same way in and out.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from packcache import positions
from packcache.environment import environment
from packcache.errors import GenerationError, InputError, InvalidSetting
from packcache.evaluate.statistics import bootstrap
from packcache.inspect.demo import load_clip
from packcache.lumos.codec import chunk_differences
from packcache.lumos.config import LumosConfig, TokenIds
from packcache.lumos.model import HeadNorm, Lumos, RMSNorm
from packcache.lumos.pipeline import Pipeline
from packcache.lumos.text import LumosTokenizer, template_report
from packcache.lumos.vocab import pixel_frames
from packcache.policies import FullCache
from packcache.video import Frames

__all__ = ["MARGIN", "PSNR", "SCHEMA", "Check", "Diagnosis", "examine"]

SCHEMA = "packcache.doctor/1"

#: What a codec's round trip must reach, in dB: so much more than the clip's mean colour has, and
#: no less than the one nor more than the other. Cosmos DV4x8x8 has about 30 on natural video, the
#: digits codec 33 and more on its own; a wrong pixel range has less than 16, unless all is dark.
BETTER, PSNR, PSNR_MOST = 3.0, 20.0, 30.0

#: Red minus blue must come back at least so strong (1: as it was, below 0: swapped), where it
#: varies by so many of 255 levels.
COLOUR, COLOURFUL = 0.5, 8.0

#: Nats a token by which the stated settings must win, with the whole 95 % interval: on a long clip
#: any difference is significant. The embedded model's win by half a nat and more.
MARGIN = 0.02

#: Share of a frame's tokens that the model is told; the others are asked for.
KNOWN = 0.5

#: Latent frames of a clip for the codec, where the model does not say how long it was trained.
_LATENTS = 7

Verdict = Literal["PASS", "FAIL", "not run", "info"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A row: what was found, what is expected, and the verdict with its reason.

    `info` rows are measured and not judged. `values` are the numbers behind `found`.
    """

    name: str
    verdict: Verdict
    found: str = ""
    expected: str = ""
    reason: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All rows. `notes` say what limits them, such as a clip that is not the user's own."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    workload: dict[str, Any]
    environment: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Nothing failed. What depends on a check that failed is not run."""
        return all(check.verdict != "FAIL" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "workload": self.workload,
            "passed": self.passed,
            "results": [asdict(check) for check in self.checks],
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """The table as text: a line a check, what to know of it below, the verdict at the end."""
        lines = []
        for check in self.checks:
            head = f"{check.verdict:9}{check.name:42}"
            if len(check.found) <= 40:
                lines.append(f"{head}{check.found:27} {check.expected}".rstrip())
            else:
                below = f"  found    {check.found}", f"  expected {check.expected}"
                lines += [head.rstrip(), *below]
            if check.reason:
                lines.append(f"  {check.reason}")
        failed = sum(check.verdict == "FAIL" for check in self.checks)
        verdict = "PASS" if self.passed else f"FAIL: {failed} of {len(self.checks)} rows"
        return [*lines, *(f"note: {note}" for note in self.notes), verdict]


def examine(
    pipeline: Pipeline,
    *,
    clip: Frames | None = None,
    prompt: str | None = None,
    fps: int | None = None,
    latents: int = 3,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Check tokenizer, codec and settings of a model on a real clip.

    Args:
        clip: uint8 frames `[T, H, W, 3]`, scaled and cropped to the model's size; as many as
            `latents` need (3: 9 frames), and what exceeds the trained length is left out. Default:
            a drawn clip that comes with the package. Only what the model was trained on speaks
            clearly: give a video of your own, with the caption as `prompt`.
        fps: of the clip; default the model's.
        latents: latent frames that the model is asked about, the first of which is given.
        seed: of the tokens that are masked, and of the intervals.
        on_step: `on_step(done, total)` after each pass over the clip.

    Raises:
        InvalidSetting: the clip, the prompt or `latents` cannot be used.
    """
    if seed < 0:
        raise InvalidSetting(f"seed is {seed}, expected at least 0")
    shown, prompt, notes = _material(pipeline, clip, prompt, latents)
    tokenizer = _check_tokenizer(pipeline)
    codec, codes = _check_codec(pipeline, shown)
    broken = [check.name for check in (tokenizer, *codec) if check.verdict == "FAIL"]
    if codes is None or broken:
        reason = f"{broken[0]} must be right first"
        likelihood = [Check(name="likelihood", verdict="not run", reason=reason)]
    else:
        height, width = shown.shape[1:3]
        stated = _Asked(
            pipeline=pipeline, codes=codes[:latents], prompt=prompt, fps=fps, seed=seed,
            size=(width, height),
        )  # fmt: skip
        likelihood = list(_check_likelihood(stated, on_step))
    return Diagnosis(
        checks=(tokenizer, *codec, *likelihood),
        notes=tuple(notes),
        workload={
            "model": pipeline.name, "clip": "bundled" if clip is None else "given",
            "prompt": prompt, "frames": len(shown), "width": shown.shape[2],
            "height": shown.shape[1], "fps": fps or pipeline.fps, "latents": latents,
            "seed": seed, "known": KNOWN, "margin": MARGIN,
        },
        environment=environment(pipeline.device, pipeline.dtype),
    )  # fmt: skip


def _material(
    pipeline: Pipeline, clip: Frames | None, prompt: str | None, latents: int
) -> tuple[Frames, str, list[str]]:
    """The clip at the model's size and of at most the trained length, its prompt, and notes."""
    if (clip is None) != (prompt is None):
        lacking = "clip" if clip is None else "prompt"
        raise InvalidSetting(f"{lacking} is missing: give clip and prompt, or neither")
    group = pipeline.model.config.compression[0]
    trained = pipeline.model.config.trained_latent_frames or _LATENTS
    if not 2 <= latents <= max(2, trained):
        raise InvalidSetting(
            f"latents is {latents}, expected 2 to {max(2, trained)}, the trained length"
        )
    notes = []
    if clip is None or prompt is None:
        bundled = load_clip()
        clip, prompt = bundled.given, bundled.prompt
        notes.append(
            "the clip is the drawing that comes with the package: a model of real videos is better "
            "tested on one of your own, with its caption"
        )
    kind = getattr(clip, "dtype", type(clip).__name__)
    if np.ndim(clip) != 4 or np.shape(clip)[-1] != 3 or kind != np.uint8:
        raise InvalidSetting(
            f"clip is {kind} of shape {np.shape(clip)}, expected uint8 [T, H, W, 3]"
        )
    least = pixel_frames(latents, group)
    if len(clip) < least:
        raise InvalidSetting(
            f"clip has {len(clip)} frames, expected at least {least} for {latents} latent frames: "
            "give a longer clip or fewer latents"
        )
    length = min(len(clip), pixel_frames(max(2, trained), group))
    return pipeline.fit_video(clip[: length - (length - 1) % group]), prompt, notes


# --- the tokenizer --------------------------------------------------------------------------------


def _check_tokenizer(pipeline: Pipeline) -> Check:
    """The ids of the wording around every caption, which are known for Lumos-1's own."""
    name, tokenizer = "template ids", pipeline.tokenize
    if not isinstance(tokenizer, LumosTokenizer):
        if pipeline.model.config.token_ids != TokenIds():
            reason = "the model has words of its own and no text tokenizer"
            return Check(name=name, verdict="not run", reason=reason)
        reason = f"the tokenizer is a {type(tokenizer).__name__}: load one with load_tokenizer"
        return Check(name=name, verdict="FAIL", reason=reason)
    if tokenizer.token_ids != TokenIds():
        reason = "the model has token ids of its own: none are known to compare with"
        return Check(name=name, verdict="not run", reason=reason)
    try:
        report = template_report(tokenizer)
    except InputError as error:
        return Check(name=name, verdict="FAIL", reason=str(error))
    expected, found = (
        " | ".join(" ".join(map(str, ids)) for ids in side) for side in zip(*report, strict=True)
    )
    right = found == expected
    return Check(
        name=name,
        found=found,
        expected=expected,
        verdict="PASS" if right else "FAIL",
        reason="" if right else "another model's tokenizer: name the folder of the right one",
    )


# --- the codec ------------------------------------------------------------------------------------


def _check_codec(pipeline: Pipeline, shown: Frames) -> tuple[list[Check], Tensor | None]:
    """The rows of the codec, and the codes `[t, h, w]` of the clip if it gave any."""
    try:
        codes = pipeline.encode_video(shown).long()
        back = pipeline.pixels(codes)
        if back.shape != shown.shape:
            raise InputError(
                f"the codec makes {back.shape} of frames {shown.shape}, expected the same: it has "
                "another compression"
            )
        rows = [
            _round_trip(back, shown), _colours(back, shown),
            *_codes(codes, pipeline.model.config), _chunks(pipeline, codes),
        ]  # fmt: skip
    except (InputError, GenerationError) as error:
        return [Check(name="codec", verdict="FAIL", reason=str(error))], None
    return rows, codes


def _round_trip(back: Frames, shown: Frames) -> Check:
    """How like the clip its reconstruction is; a dark clip is like any dark picture."""
    flat = np.broadcast_to(shown.mean(axis=(0, 1, 2)), shown.shape)
    psnr, needed = _psnr(back, shown), min(max(_psnr(flat, shown) + BETTER, PSNR), PSNR_MOST)
    right = psnr >= needed
    return Check(
        name="codec round trip",
        found=f"{psnr:.1f} dB",
        expected=f"at least {needed:.1f} dB",
        verdict="PASS" if right else "FAIL",
        reason=""
        if right
        else "encoder and decoder do not belong together, or the pixel range is not -1 to 1",
        values={"psnr_db": psnr, "needed_db": needed},
    )


def _psnr(video: NDArray[Any], shown: Frames) -> float:
    error = float(np.mean((video.astype(np.float64) - shown) ** 2)) / 255**2
    return -10 * math.log10(max(error, 1e-10))


def _colours(back: Frames, shown: Frames) -> Check:
    """How strongly red minus blue comes back: the slope of a line through all pixels."""
    name, expected = "channel order", f"red minus blue: slope at least {COLOUR:g}"
    was, now = (v[..., 0].astype(np.float64) - v[..., 2] for v in (shown, back))
    was, now = was - was.mean(), now - now.mean()
    if was.std() < COLOURFUL:
        reason = "the clip has too little red and blue to tell: give a more colourful one"
        return Check(name=name, expected=expected, verdict="not run", reason=reason)
    slope = float((was * now).mean() / was.var())
    return Check(
        name=name,
        found=f"{slope:.2f}",
        expected=expected,
        verdict="PASS" if slope >= COLOUR else "FAIL",
        reason="" if slope >= COLOUR else "the codec takes or gives red for blue",
        values={"slope": slope},
    )


def _codes(codes: Tensor, config: LumosConfig) -> Iterator[Check]:
    """Whether the model has a token for each code, and how many different ones there are."""
    low, high, most = int(codes.min()), int(codes.max()), config.token_ids.num_codes - 1
    fits = low >= 0 and high <= most
    yield Check(
        name="codes",
        found=f"{low} to {high}",
        expected=f"0 to {most}",
        verdict="PASS" if fits else "FAIL",
        reason="" if fits else "the model has no token for some: it was trained on another codec",
    )
    used = len(codes.unique())
    yield Check(
        name="codes used by the clip",
        found=f"{100 * used / (most + 1):.2g} % of all ({used})",
        verdict="info",
        values={"used": used, "codes": most + 1},
    )


def _chunks(pipeline: Pipeline, codes: Tensor) -> Check:
    """Decoding in pieces of half the clip, so that a short one has seams too."""
    with torch.inference_mode():
        where = codes[None].to(pipeline.codec_device)
        found = chunk_differences(pipeline.codec, where, chunk=len(codes) // 2)
    return Check(
        name="decoding in pieces, off by at most",
        found=", ".join(f"{levels:.3g}" for levels in found.values()) + " of 255",
        expected=f"for overlaps of {', '.join(map(str, found))} latent frames",
        verdict="info",
        values={"levels": {str(overlap): levels for overlap, levels in found.items()}},
    )


# --- the likelihood -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """A set-up and what it is asked: codes `[t, h, w]`, of which the first frame is given."""

    pipeline: Pipeline
    codes: Tensor
    prompt: str
    fps: int | None
    seed: int
    size: tuple[int, int]

    def under(self, model: Lumos) -> _Asked:
        return replace(self, pipeline=replace(self.pipeline, model=model))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Contrast:
    """A wrong setting: the set-up with it, what it is called, and what to do where it wins.

    One that is `near` need not lose.
    """

    name: str
    asked: _Asked
    hint: str
    near: bool = False


def _surprise(asked: _Asked) -> NDArray[np.float64]:
    """-log p of a true code in nats, averaged over the masked tokens of each row of each frame.

    The first frame is the condition image; each later one is asked for with half of its tokens
    told, then committed as if it had been generated.
    """
    pipeline, codes = asked.pipeline, asked.codes
    group, fps = pipeline.model.config.compression[0], asked.fps or pipeline.fps
    trained = pixel_frames(pipeline.model.config.trained_latent_frames or len(codes), group)
    decoder = pipeline.run(
        [asked.prompt],
        frames=pixel_frames(len(codes), group),
        policy=FullCache(),
        size=asked.size,
        fps=fps,
        seconds=pipeline.seconds or max(1, (trained - 1) // fps),
        guidance=1.0,
    ).decoder
    decoder.prefill()
    decoder.give(codes[:1])
    found = []
    for frame in range(1, len(codes)):
        true = codes[frame]
        masked = _masked(true.shape[0], true.shape[1], (asked.seed, frame))
        logits = decoder.predict(torch.where(masked, -1, true).view(1, -1))[0]
        nll = _nll(logits, torch.where(masked, true, -1).flatten().to(logits.device))
        found.append(nll.view(true.shape).sum(1).cpu().double().numpy() / masked.sum(1).numpy())
        if frame + 1 < len(codes):  # nothing looks at the last one
            decoder.give(true[None], as_generated=True)
    surprise = np.concatenate(found)
    if not np.isfinite(surprise).all():
        raise GenerationError(
            "NaN or infinite logits: the weights or the dtype are broken; try float32"
        )
    return surprise


def _masked(rows: int, columns: int, seed: tuple[int, int]) -> Tensor:
    """Which tokens are asked for, bool `[rows, columns]`: equally many in each row."""
    row = np.arange(columns) >= KNOWN * columns
    drawn = np.random.default_rng(seed).permuted(np.tile(row, (rows, 1)), axis=1)
    return torch.from_numpy(drawn)


def _nll(logits: Tensor, true: Tensor) -> Tensor:
    """-log p `[N]` of codes `[N]` under `logits [N, codes]`, 0 where the code is negative.

    In parts: a second copy of all logits may be a gigabyte.
    """
    parts = zip(logits.split(256), true.split(256), strict=True)
    return torch.cat([F.cross_entropy(a, b, ignore_index=-1, reduction="none") for a, b in parts])


def _check_likelihood(
    stated: _Asked, on_step: Callable[[int, int], None] | None
) -> Iterator[Check]:
    """The surprise itself, then one row a contrast."""
    contrasts = list(_contrasts(stated))
    total = 1 + len(contrasts)
    try:
        base = _surprise(stated)
    except (InputError, GenerationError) as error:
        yield Check(name="likelihood", verdict="FAIL", reason=str(error))
        return
    if on_step:
        on_step(1, total)
    yield _known(base, stated)
    if stated.pipeline.model.config.model_parallel_size == 1:
        yield Check(
            name="model_parallel_size",
            found="1",
            expected="1",
            verdict="PASS",
            reason="the norms of q and k have one row: no other value could be loaded",
        )
    for number, contrast in enumerate(contrasts, 2):
        yield _judge(contrast, base, stated.seed)
        if on_step:
            on_step(number, total)


def _known(base: NDArray[np.float64], stated: _Asked) -> Check:
    """Weights that were not trained on such codes find them all equally likely, at best."""
    uniform = math.log(stated.pipeline.model.config.token_ids.num_codes)
    interval = bootstrap(base, seed=stated.seed)
    right = float(interval.high) < uniform - MARGIN
    return Check(
        name="likelihood of the clip's codes",
        found=f"{float(interval.mean):.3f} nats a token",
        expected=f"below {uniform:.3f}, all equally likely",
        verdict="PASS" if right else "FAIL",
        reason="" if right else "the model does not know such codes: other weights or codec",
        values={**_numbers(interval.mean, interval.low, interval.high), "uniform": uniform},
    )


def _judge(contrast: _Contrast, base: NDArray[np.float64], seed: int) -> Check:
    """Rows of tokens are resampled: neighbours in a row are not independent."""
    interval = bootstrap(_surprise(contrast.asked) - base, seed=seed)
    mean, low, high = float(interval.mean), float(interval.low), float(interval.high)
    bound = "not better by more than" if contrast.near else "worse by more than"
    reason = ""
    if high < -MARGIN:
        reason = f"the clip is likelier that way: {contrast.hint}"
    elif low <= MARGIN and not contrast.near:
        reason = f"the clip is as likely that way: {contrast.hint}, or give another clip"
    return Check(
        name=contrast.name,
        found=f"{mean:+.3f} ({low:+.3f} to {high:+.3f})",
        expected=f"{bound} {MARGIN:g} nats a token",
        verdict="FAIL" if reason else "PASS",
        reason=reason,
        values=_numbers(mean, low, high),
    )


def _numbers(mean: Any, low: Any, high: Any) -> dict[str, float]:
    return {"mean": float(mean), "low": float(low), "high": float(high)}


# --- what could be wrong --------------------------------------------------------------------------


def _contrasts(stated: _Asked) -> Iterator[_Contrast]:
    """The stated set-up with one setting wrong, for each of the settings that could be."""
    model = stated.pipeline.model
    config = model.config
    check = "check config.json"
    for name, (far, near) in (
        ("rope_theta", other_thetas(config.rope_theta)),
        ("rms_norm_eps", other_eps(config.rms_norm_eps)),
    ):
        for other in (*far, *near):
            title = f"{name} {other:g}, not {getattr(config, name):g}"
            asked = stated.under(_twin(model, **{name: other}))
            yield _Contrast(name=title, asked=asked, hint=f"{check}, {name}", near=other in near)
    parts = config.model_parallel_size
    for shift in sorted({1, parts - 1} if parts > 1 else ()):
        yield _Contrast(
            name=f"model_parallel_size {parts}, rows rolled by {shift}",
            asked=stated.under(_rolled(model, shift)),
            hint="the norms of q and k have their rows in another order",
        )
    yield _Contrast(
        name="positions without 3-D",
        asked=stated.under(_flat(model)),
        hint="the positions of this engine are not those of these weights",
    )
    for offset in (1, -1):
        codes = (stated.codes + offset) % config.token_ids.num_codes
        yield _Contrast(
            name=f"codec offset {offset:+d}",
            asked=replace(stated, codes=codes),
            hint="the codec counts from another number than token_ids.video_lo",
        )


def other_thetas(theta: float) -> tuple[list[float], list[float]]:
    """Values that must lose, and near ones that must not win.

    Ten times less and more, and those of Llama 2 and 3, none within a factor of 2; three times less
    and more, which a model may hardly notice.
    """
    far = {theta / 10, theta * 10, 1e4, 5e5}
    return sorted(x for x in far if max(x, theta) >= 2 * min(x, theta)), [theta / 3, theta * 3]


def other_eps(eps: float) -> tuple[list[float], list[float]]:
    """Values that must lose, and one that must not win.

    One so large that it shows, at least 1000 times this; and the usual ones where they are far
    smaller: an eps must earn its size, and is not believed if it makes no difference. Just 1000
    times this may make none.
    """
    usual = [x for x in (1e-6, 1e-5) if eps > 50 * x]
    largest = max(10.0, 1000 * eps)
    return [*usual, largest], [x for x in (1000 * eps,) if x < largest]


def _twin(model: Lumos, **changed: float) -> Lumos:
    """The same weights, not copied, under a changed config."""
    shared = itertools.chain(model.parameters(), model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    twin.config = config = replace(model.config, **changed)  # type: ignore[arg-type]
    frequencies = positions.inverse_frequencies(config.head_dim, config.rope_theta)
    twin.inv_freq = frequencies.to(model.inv_freq)
    for module in twin.modules():
        if isinstance(module, RMSNorm):
            module.eps = config.rms_norm_eps
    return twin


def _rolled(model: Lumos, shift: int) -> Lumos:
    """Every share of heads with the row of the norms that belongs to another share."""
    twin = _twin(model)
    for norm in (module for module in twin.modules() if isinstance(module, HeadNorm)):
        norm.weight = nn.Parameter(norm.weight.detach().roll(shift, 0), requires_grad=False)
        norm.bias = nn.Parameter(norm.bias.detach().roll(shift, 0), requires_grad=False)
    return twin


def _flat(model: Lumos) -> Lumos:
    """Every token turned by its index in the sequence."""
    twin = _twin(model)

    def rotary(position_ids: Tensor) -> tuple[Tensor, Tensor]:
        flat = position_ids.clone()
        flat[positions.FLAG] = 0
        return model.rotary(flat)

    twin.rotary = rotary
    return twin
