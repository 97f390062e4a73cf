"""Golden data: recorded numbers against this engine, `python -m packcache.testing.golden DIR`.

One line a file: `name  compared N of N arrays  max error  tolerance  ok|FAIL`; exit 1 if any fails.
Sizes, ids, theta, eps and tolerances come from the json beside each file, so any folder of the
format works. `RULES` says how each array is read; an array without a rule is a failure, and so is
one that a rule names and nothing compared. An `input` counts as compared once a comparison used it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from packcache import positions
from packcache.cache import FrameCache
from packcache.lumos import attend, image, schedule
from packcache.lumos.codec import FSQ
from packcache.lumos.config import LumosConfig
from packcache.lumos.decode import Decoder, Step
from packcache.lumos.model import Lumos
from packcache.lumos.schedule import FrameDraws, Sampling
from packcache.lumos.vocab import Prefix, Vocab
from packcache.policies import FullCache
from packcache.testing.oracle import attend_mask, whole_forward
from packcache.timeline import FrameLayout, Role, Span

__all__ = ["RULES", "Rule", "main", "run"]

EXACT = 0.0


@dataclass(frozen=True)
class Rule:
    """How the arrays of one name in one kind of file are judged.

    `tolerance` is the entry of the json's tolerance that applies ("" the top level); `atol` is
    used where the json gives no number. Integers are exact whatever stands here. `given` arrays
    are inputs of other comparisons.
    """

    file: str
    array: str
    tolerance: str = ""
    atol: float = EXACT
    given: bool = False


RULES = (
    Rule("tiny_model", "*", given=True),
    Rule("fsq", "z", given=True),
    Rule("fsq", "index", "index"),
    Rule("fsq", "z_index", "index"),
    Rule("fsq", "*code", "code"),
    Rule("history_pattern", "p*"),
    Rule("sampling", "m*.selected", given=True),
    Rule("sampling", "m*.gumbel", given=True),
    Rule("sampling", "m*.masking", "masking"),
    Rule("sampling", "cosine_*", "cosine"),
    Rule("sampling", "mask_len_*.*"),
    Rule("sampling", "temperature_*", atol=1e-12),
    Rule("rotary", "*.position_ids", given=True),
    Rule("rotary", "*.q", given=True),
    Rule("rotary", "*.k", given=True),
    Rule("rotary", "*.k_rot_t_minus_delta", "shift"),
    Rule("rotary", "*.*"),
    Rule("*sequences*", "*.input_ids"),
    Rule("*sequences*", "*.attend"),
    Rule("*sequences*", "*position_ids"),
    Rule("*sequences*", "*logits", atol=1e-4),
    Rule("tiny_cached_path", "*_ids"),
    Rule("tiny_cached_path", "history_mask_index"),
    Rule("tiny_cached_path", "*.[kv]_after_commit.*", "kv", atol=2e-5),
    Rule("tiny_cached_path", "*logits*", atol=1e-4),
    Rule("gen_*", "step_gumbel", given=True),
    Rule("gen_*", "step_selected", "step_selected", atol=2e-4),
    Rule("gen_*", "step_temperature", "step_temperature", atol=1e-12),
    Rule("gen_*", "guided_logits_*", "guided_logits", atol=1e-3),
    Rule("gen_*", "*", "tokens"),
    Rule("realvocab", "state_dict.*", given=True),
    Rule("realvocab", "*columns", given=True),
    Rule("realvocab", "*", atol=1e-4),
    Rule("image_crop", "*.image", given=True),
    Rule("image_crop", "*.cropped", "pixels", atol=1.0),
)


class Golden:
    """One recorded file while it is compared."""

    def __init__(self, path: Path) -> None:
        self.name, self.folder = path.stem, path.parent
        self.meta: dict[str, Any] = json.loads(path.read_text())
        with safe_open(path.with_suffix(".safetensors"), framework="pt") as file:
            names = file.keys()
            self.arrays: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
        self.seen: set[str] = set()
        self.faults: list[str] = []
        self.error, self.tolerance = 0.0, EXACT

    def rule(self, name: str) -> Rule | None:
        for rule in RULES:
            if fnmatch.fnmatch(self.name, rule.file) and fnmatch.fnmatch(name, rule.array):
                return rule
        return None

    def given(self, name: str) -> Tensor:
        """An input array, integers as int64."""
        self.seen.add(name)
        return _wide(self.arrays[name])

    def names(self, pattern: str) -> list[str]:
        return [name for name in self.arrays if fnmatch.fnmatch(name, pattern)]

    def check(self, name: str, got: Tensor | np.ndarray, where: Tensor | None = None) -> None:
        """Compare with the recorded array (at `where` only); shapes must agree."""
        rule, want = self.rule(name), _wide(self.arrays[name])
        self.seen.add(name)
        have = _wide(torch.as_tensor(got))
        if rule is None:
            return
        if have.shape != want.shape:
            self.faults.append(f"{name} has shape {list(have.shape)}, expected {list(want.shape)}")
            return
        if where is not None:
            have, want = have[where], want[where]
        atol, rtol = self._limits(rule, want)
        self._judge(name, have.double(), want.double(), atol, rtol)

    def check_value(self, name: str, got: object, want: object) -> None:
        """Compare a plain value of the json."""
        if got != want:
            self.faults.append(f"{name} is {got}, expected {want}")

    def _judge(self, name: str, have: Tensor, want: Tensor, atol: float, rtol: float) -> None:
        error = (have - want).abs()
        if not error.numel():
            return
        worst = float(error.max())
        if not bool((error <= atol + rtol * want.abs()).all()):  # NaN fails too
            self.faults.append(f"{name} differs by {worst:.2e}, tolerance {atol:g} + {rtol:g} x")
        if worst > self.error or (worst == self.error and atol > self.tolerance):
            self.error, self.tolerance = worst, atol

    def _limits(self, rule: Rule, want: Tensor) -> tuple[float, float]:
        """Absolute and relative tolerance: the json's number wins; "exact" and integers are 0."""
        stated = self.meta.get("tolerance", {})
        entry = stated.get(rule.tolerance, {}) if rule.tolerance else stated
        if isinstance(entry, str):
            return (EXACT if entry.startswith("exact") else rule.atol), 0.0
        if "atol" in entry:
            return float(entry["atol"]), float(entry.get("rtol", 0.0))
        return (rule.atol if want.is_floating_point() or rule.atol >= 1 else EXACT), 0.0

    def finish(self) -> str:
        """The line of this file; unread arrays and arrays without a rule become faults."""
        for name in self.arrays:
            if self.rule(name) is None:
                self.faults.append(f"no rule for array {name}")
            elif name not in self.seen:
                self.faults.append(f"array {name} was not compared")
        verdict = "ok" if not self.faults else f"FAIL  {self.faults[0]}"
        return (
            f"{self.name:20} compared {len(self.seen)} of {len(self.arrays)} arrays  "
            f"max error {self.error:.1e}  tolerance {self.tolerance:g}  {verdict}"
        )


def _wide(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.long()


# --- reading the format -------------------------------------------------------------------------


def config_of(meta: dict[str, Any]) -> LumosConfig:
    return LumosConfig.from_dict({**meta["config"], "token_ids": meta["token_ids"]})


def tiny_model(folder: Path) -> Lumos:
    """The weights that `tiny_*` and `gen_*` were recorded with: a strict load."""
    recorded = Golden(folder / "tiny_model.json")
    model = Lumos(config_of(recorded.meta))
    model.load_state_dict(recorded.arrays, strict=True)
    return model.eval()


@dataclass(frozen=True)
class Parsed:
    """A recorded sequence taken apart: prefix, frames, and whether an end token follows."""

    vocab: Vocab
    prefix: Prefix
    layout: FrameLayout
    frames: list[Tensor]
    ended: bool

    @classmethod
    def of(cls, ids: Tensor, vocab: Vocab, case: dict[str, Any], video_start: int) -> Parsed:
        layout = vocab.layout(case["W"], case["H"])
        text = ids[1 : video_start - 1].tolist()
        prefix = vocab.prefix(text, seconds=case["dur"], fps=case["fps"])
        body = ids[len(prefix.ids) :]
        count = len(body) // layout.tokens
        frames = list(body[: count * layout.tokens].view(count, layout.tokens))
        return cls(vocab, prefix, layout, frames, len(body) > count * layout.tokens)

    def ids(self) -> Tensor:
        """The sequence put together again by our own layout."""
        parts = [torch.tensor(self.prefix.ids)]
        parts += [_rebuilt(self.vocab, self.layout, frame) for frame in self.frames]
        if self.ended:
            parts.append(torch.tensor([self.vocab.ids.video_end]))
        return torch.cat(parts)

    def positions(self, branch: int) -> Tensor:
        """Position ids `[5, N]` of a branch."""
        start = self.prefix.lengths[branch]
        parts = [positions.text_positions(0, start)]
        for index in range(len(self.frames)):
            parts.append(self.vocab.frame_positions(start, index, self.layout))
        if self.ended:
            parts.append(positions.text_positions(sum(p.shape[1] for p in parts), 1))
        return torch.cat(parts, dim=1)


# --- one function a kind of file ----------------------------------------------------------------


def check_model(golden: Golden) -> None:
    tiny_model(golden.folder)
    golden.seen.update(golden.arrays)


def check_fsq(golden: Golden) -> None:
    fsq = FSQ(golden.meta["levels"])
    golden.check_value("basis", fsq.basis.tolist(), golden.meta["basis"])
    index = golden.arrays["index"].long()
    golden.check("code", fsq.indices_to_codes(index))
    golden.check("index", fsq.codes_to_indices(golden.arrays["code"]))
    codes = fsq.quantise(golden.given("z").movedim(1, -1))
    golden.check("z_code", codes.movedim(-1, 1))
    golden.check("z_index", fsq.codes_to_indices(codes))


def check_history(golden: Golden) -> None:
    for number, case in enumerate(golden.meta["cases"]):
        index = schedule.history_mask(case["h"], case["w"] + 1, case["ratio"])
        golden.check(f"p{number}", index)
        new_lines = int((index % (case["w"] + 1) == case["w"]).sum())
        golden.check_value(f"p{number} new lines", new_lines, case["newline_positions_masked"])


def check_sampling(golden: Golden) -> None:
    for number, case in enumerate(golden.meta["cases"]):
        selected, noise = golden.given(f"m{number}.selected"), golden.given(f"m{number}.gumbel")
        rank = torch.tensor([[case["mask_len"]]])
        masking = schedule.remask(selected, noise, rank, case["temperature"])
        golden.check(f"m{number}.masking", masking)
    for name in golden.names("cosine_*"):
        golden.check(name, schedule.cosine(int(name.split("_")[1])))
    for name in golden.names("mask_len_*.*"):
        steps, tokens = name.removeprefix("mask_len_").split(".")
        golden.check(name, torch.tensor(schedule.cosine_counts(int(tokens), int(steps))))
    for name in golden.names("temperature_*"):
        values = schedule.temperatures(int(name.split("_")[1]), 1.0)
        golden.check(name, torch.tensor(values, dtype=torch.float64))


def check_rotary(golden: Golden) -> None:
    for number, case in enumerate(golden.meta["cases"]):
        inv_freq = positions.inverse_frequencies(case["head_dim"], case["rope_theta"])
        ids = golden.given(f"r{number}.position_ids")
        cos, sin = positions.rotary_table(ids, inv_freq, positions.pair_axes(case["head_dim"]))
        golden.check(f"r{number}.inv_freq", inv_freq)
        golden.check(f"r{number}.cos", torch.cat((cos, cos), dim=-1))
        golden.check(f"r{number}.sin", torch.cat((sin, sin), dim=-1))
        queries = positions.rotate(golden.given(f"r{number}.q"), cos, sin)
        golden.check(f"r{number}.q_rot", queries)
        keys = positions.rotate(golden.given(f"r{number}.k"), cos, sin)
        golden.check(f"r{number}.k_rot", keys)
        stride = case["delta_t_units"] // case["delta_latent_frames"]
        rotation = positions.Rotation.mm_rope(inv_freq, stride)
        shifted = positions.advance_keys(keys, -case["delta_latent_frames"], rotation)
        visual = ids[positions.FLAG].bool()[:, None]
        golden.check(f"r{number}.k_rot_t_minus_delta", torch.where(visual, shifted, keys))


def check_sequences(golden: Golden) -> None:
    model = tiny_model(golden.folder) if golden.names("*.logits") else None
    for number, case in enumerate(golden.meta["sequences"]):
        recorded = golden.arrays[f"s{number}.input_ids"][0].long()
        ids_config = LumosConfig.from_dict(_layout_only(golden.meta))
        parsed = Parsed.of(recorded, Vocab(ids_config), case, case["video_start_index"])
        ids = parsed.ids()
        golden.check(f"s{number}.input_ids", ids[None])
        for branch, (start, label) in enumerate(((0, ""), (case["video_start_index"], "uncond_"))):
            golden.check(f"s{number}.{label}position_ids", parsed.positions(branch))
            if model is not None and f"s{number}.{label}logits" in golden.arrays:
                hidden = whole_forward(model, ids[start:], parsed.positions(branch))
                rows = golden.arrays[f"s{number}.{label}logits"].shape[0]
                golden.check(f"s{number}.{label}logits", model.head(hidden[-rows:]))
        if f"s{number}.attend" in golden.arrays:
            tokens = ids_config.token_ids
            golden.check(
                f"s{number}.attend", attend_mask(ids, tokens.image_start, tokens.image_end)
            )


def _layout_only(meta: dict[str, Any]) -> dict[str, Any]:
    """A config that is good for ids alone, where the file records no network."""
    sizes = meta.get("config") or {
        "vocab_size": meta["token_ids"]["vocab"],
        "hidden_size": 32,
        "intermediate_size": 1,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
    }
    return {**sizes, "token_ids": meta["token_ids"]}


def check_cached_path(golden: Golden) -> None:
    model, case = tiny_model(golden.folder), golden.meta["case"]
    vocab = Vocab(model.config)
    recorded = golden.arrays["cond.prefill_ids"][0].long()
    parsed = Parsed.of(recorded, vocab, case, golden.meta["video_start_index"])
    history = schedule.history_mask(parsed.layout.rows, parsed.layout.row_length, case["ratio"])
    golden.check("history_mask_index", history)
    for branch, name in enumerate(("cond", "uncond")):
        prefix = parsed.prefix.branch(branch)
        golden.check(f"{name}.prefill_ids", parsed.ids()[None, -len(prefix) - _body(parsed) :])
        _cached_branch(golden, model, parsed, history, branch, name)


def _body(parsed: Parsed) -> int:
    return len(parsed.frames) * parsed.layout.tokens


def _cached_branch(
    golden: Golden, model: Lumos, parsed: Parsed, history: np.ndarray, branch: int, name: str
) -> None:
    """One branch: prefill, given frames, two drafts, the commit, the next frame's first draft."""
    vocab, layout, config = parsed.vocab, parsed.layout, model.config
    prefix = parsed.prefix.branch(branch)
    cache = FrameCache(
        FullCache(),
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layout=layout,
        text=(len(prefix),),
        positions="absolute",
    )
    attention = attend.CachedAttention([cache], 1)

    def forward(ids: Tensor, frame: int) -> Tensor:
        rotary = model.rotary(vocab.frame_positions(len(prefix), frame, layout))
        return model.head(model(ids[None], rotary, attention)[0])

    cache.open(Span.text(len(prefix)))
    text = model.rotary(positions.text_positions(0, len(prefix)))
    model(torch.tensor([prefix]), text, attend.causal_attention(cache, 0))
    cache.commit()
    *given, current = parsed.frames
    for frame, ids in enumerate(given):
        cache.open(Span.of_frame(Role.IMAGE if not frame else Role.HISTORY, frame, layout))
        forward(ids, frame)
        cache.commit()
    frame = len(given)
    cache.open(Span.of_frame(Role.HISTORY, frame, layout))
    golden.check(f"{name}.prefill_logits_frame", forward(current, frame))
    cache.rollback()
    step = golden.arrays[f"{name}.step_ids"][0].long()
    golden.check(f"{name}.step_ids", _rebuilt(vocab, layout, step)[None])
    golden.check(f"{name}.step_logits", forward(step, frame))
    cache.rollback()
    finished = golden.arrays[f"{name}.commit_ids"][0].long()
    commit = vocab.remask(layout, _rebuilt(vocab, layout, finished), history)
    golden.check(f"{name}.commit_ids", commit[None])
    forward(commit, frame)
    cache.commit()
    for layer in golden.meta["kv_layers"]:
        golden.check(f"{name}.k_after_commit.{layer}", cache.stores[0].keys(layer))
        golden.check(f"{name}.v_after_commit.{layer}", cache.stores[0].values(layer))
    cache.open(Span.of_frame(Role.HISTORY, frame + 1, layout))
    blank = vocab.frame(layout)
    golden.check(f"{name}.next_frame_ids", blank[None])
    where = vocab.frame_positions(len(prefix), frame + 1, layout)
    golden.check(f"{name}.next_frame_position_ids", where)
    golden.check(f"{name}.next_frame_logits", forward(blank, frame + 1))


def _rebuilt(vocab: Vocab, layout: FrameLayout, frame: Tensor) -> Tensor:
    """A frame by our own layout; content, and which of the body is masked, are data."""
    blank, where = vocab.frame(layout), vocab.content(layout)
    blank[where] = frame[where]
    body = slice(layout.header, layout.header + layout.body)
    blank[body][frame[body] == vocab.ids.mask] = vocab.ids.mask
    return blank


def check_generation(golden: Golden) -> None:
    meta, model = golden.meta, tiny_model(golden.folder)
    given, start = meta["given_latent_frames"], meta["video_start_index"]
    decoder, records = _replay(golden, model)
    vocab, layout = decoder.vocab, decoder.layout
    frames = golden.arrays["frames"].long()
    decoder.prefill()
    results = [decoder.give(vocab.codes(layout, f)[None]) for f in frames[:given]]
    results += [decoder.generate() for _ in range(meta["latent_frames"] - given)]
    made = torch.cat([result.ids for result in results])
    golden.check("frames", made)
    prefix = torch.tensor(decoder.prefixes[0].ids)
    golden.check("prefix_ids", torch.cat((prefix, made[:given].flatten())))
    end = torch.tensor([vocab.ids.video_end])
    golden.check("output_ids", torch.cat((prefix[start:], made.flatten(), end)))
    golden.check("commit_ids", vocab.remask(layout, made[given:], decoder.history))
    _check_steps(golden, records, layout.content, vocab)


def _replay(golden: Golden, model: Lumos) -> tuple[Decoder, list[Step]]:
    """A decoder that is fed the recorded draws and noise."""
    meta = golden.meta
    vocab, given = Vocab(model.config), meta["given_latent_frames"]
    start = meta["video_start_index"]
    recorded = golden.arrays["prefix_ids"].long()
    prefix = vocab.prefix(
        recorded[1 : start - 1].tolist(), seconds=meta["duration"], fps=meta["fps"]
    )
    noise = golden.given("step_gumbel")
    drawn = golden.arrays["step_sampled"].long() - vocab.ids.video_lo

    def draws(prompt: int, frame: int) -> FrameDraws:
        at = frame - given
        tokens = None if meta["greedy"] else drawn[at]
        return FrameDraws(uniform=torch.zeros_like(noise[at]), noise=noise[at], tokens=tokens)

    records: list[Step] = []
    decoder = Decoder(
        model,
        [prefix],
        layout=vocab.layout(*meta["resolution_wh"]),
        sampling=Sampling(
            steps=meta["steps"],
            guidance=meta["guidance_scale"],
            history_mask_ratio=meta["mask_history_ratio"],
            temperature=meta["start_temperature"],
            greedy=meta["greedy"],
        ),
        draws=draws,
        on_step=records.append,
        all_rows=True,
    )
    return decoder, records


def _check_steps(golden: Golden, records: list[Step], content: int, vocab: Vocab) -> None:
    """Per-step arrays `[frame, step, content]`, compared where the entering token is the mask."""
    shape = golden.arrays["step_mask_len"].shape

    def grid(value: Callable[[Step], Tensor]) -> Tensor:
        rows = []
        for record in records:
            row = torch.zeros(content, dtype=value(record).dtype)
            rows.append(row.scatter(0, record.positions[0], value(record)[0]))
        return torch.stack(rows).view(*shape, content)

    entering = grid(lambda r: torch.where(r.known, r.tokens, vocab.ids.mask))
    golden.check("step_input_tokens", entering)
    open_positions = entering == vocab.ids.mask
    golden.check("step_sampled", grid(lambda r: r.sampled), open_positions)
    golden.check("step_selected", grid(lambda r: r.selected), open_positions)
    golden.check("step_mask_len", torch.stack([r.num_mask[0, 0] for r in records]).view(shape))
    temperature = torch.tensor([r.temperature for r in records], dtype=torch.float64)
    golden.check("step_temperature", temperature.view(shape))
    for name, record in (
        ("guided_logits_first_frame_step0", records[0]),
        ("guided_logits_last_frame_last_step", records[-1]),
    ):
        golden.check(name, record.logits[0][record.positions[0].argsort()])


def check_realvocab(golden: Golden) -> None:
    meta = golden.meta
    model = Lumos(config_of(meta))
    vocab_size, hidden = model.config.vocab_size, model.config.hidden_size
    state = {n.removeprefix("state_dict."): golden.given(n) for n in golden.names("state_dict.*")}
    state["model.embed_tokens.weight"] = formula_weight(vocab_size, hidden, meta["embed_formula"])
    state["lm_head.weight"] = formula_weight(vocab_size, hidden, meta["lm_head_formula"])
    model.load_state_dict(state, strict=True)
    recorded = golden.arrays["input_ids"][0].long()
    start = int((recorded == model.config.token_ids.video_start).nonzero()[0])
    parsed = Parsed.of(recorded, Vocab(model.config), meta["case"], start)
    golden.check("input_ids", parsed.ids()[None])
    golden.check("position_ids", parsed.positions(0))
    rows = golden.arrays["logits_last_frame"].shape[0]
    hidden_rows = whole_forward(model, parsed.ids(), parsed.positions(0))[-rows:]
    golden.check("logits_last_frame", model.head(hidden_rows)[:, golden.given("logits_columns")])
    ids = model.config.token_ids
    video = model.head(hidden_rows, ids.video_lo, ids.video_hi)
    golden.check("video_logits_last_frame", video[:, golden.given("video_code_columns")])
    golden.check("video_logsumexp", video.logsumexp(dim=-1))
    golden.check("video_argmax", video.argmax(dim=-1))
    top = video.topk(2, dim=-1).values
    golden.check("video_top1_minus_top2", top[:, 0] - top[:, 1])


def formula_weight(rows: int, cols: int, formula: dict[str, float]) -> Tensor:
    """`W[v, d] = scale (2 z / p - 1)`, `z = ((v+1)(d+1) a + v b + d c) mod p`, as float32."""
    v = np.arange(rows, dtype=np.int64)[:, None]
    d = np.arange(cols, dtype=np.int64)[None]
    a, b, c, p = (int(formula[key]) for key in "abcp")
    z = ((v + 1) * (d + 1) * a + v * b + d * c) % p
    return torch.from_numpy((formula["scale"] * (2 * z / p - 1)).astype(np.float32))


def check_image_crop(golden: Golden) -> None:
    from PIL import Image

    sizes = golden.meta["crop_size_lists_wh"]
    for target, listed in sizes.items():
        ours = [list(size) for size in image.crop_sizes(int(target))]
        golden.check_value(f"crop sizes {target}", sorted(ours), sorted(listed))
    for choice in golden.meta["choices"]:
        candidates = image.crop_sizes(choice["target_size"])
        got = image.choose_crop(tuple(choice["image_wh"]), candidates)
        golden.check_value(f"crop of {choice['image_wh']}", list(got), choice["crop_wh"])
    for number, case in enumerate(golden.meta["cases"]):
        picture = Image.fromarray(golden.given(f"c{number}.image").numpy().astype(np.uint8))
        crop = image.choose_crop(picture.size, [tuple(size) for size in case["crop_list"]])
        golden.check_value(f"c{number} crop", list(crop), case["crop_wh"])
        golden.check(f"c{number}.cropped", np.asarray(image.crop_to(picture, crop)).copy())


CHECKS: dict[str, Callable[[Golden], None]] = {
    "tiny_model": check_model,
    "fsq": check_fsq,
    "history_pattern": check_history,
    "sampling": check_sampling,
    "rotary": check_rotary,
    "*sequences*": check_sequences,
    "tiny_cached_path": check_cached_path,
    "gen_*": check_generation,
    "realvocab": check_realvocab,
    "image_crop": check_image_crop,
}


def run(folder: Path) -> Iterator[tuple[str, bool]]:
    """(line, passed) for each recorded file of a folder."""
    stems = sorted({p.stem for p in folder.glob("*") if p.suffix in (".json", ".safetensors")})
    if not stems:
        yield f"no golden file in {folder}: expected pairs of .json and .safetensors  FAIL", False
    for stem in stems:
        yield _run_file(folder / stem)


@torch.inference_mode()
def _run_file(stem: Path) -> tuple[str, bool]:
    for suffix in (".json", ".safetensors"):
        if not stem.with_suffix(suffix).exists():
            return f"{stem.name:20} FAIL  {stem.name}{suffix} is missing", False
    check = next((c for name, c in CHECKS.items() if fnmatch.fnmatch(stem.name, name)), None)
    if check is None:
        return f"{stem.name:20} FAIL  no rule for this file", False
    try:
        golden = Golden(stem.with_suffix(".json"))
        check(golden)
    except Exception as error:  # one broken file must not hide the others
        return f"{stem.name:20} FAIL  {type(error).__name__}: {error}", False
    line = golden.finish()
    return line, not golden.faults


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m packcache.testing.golden", description=__doc__)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    passed = True
    for line, good in run(arguments.folder):
        print(line)  # noqa: T201
        passed &= good
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
