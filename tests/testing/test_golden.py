"""The golden runner: right data pass, and every way to be wrong is said in words and exits 1.

A second folder, with other sizes, ids, theta, eps, norms and two parallel parts, is recorded here
with the engine itself: nothing about the first folder may be built into the runner.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from packcache import positions
from packcache.lumos.config import LumosConfig, TokenIds
from packcache.lumos.decode import Decoder, Step
from packcache.lumos.model import Lumos
from packcache.lumos.schedule import Sampling, philox_draws
from packcache.lumos.vocab import Vocab
from packcache.testing import golden
from tests.tools import GOLDEN

STEMS = sorted(path.stem for path in GOLDEN.glob("*.json"))


def run(folder: Path, capsys) -> tuple[int, list[str]]:
    code = golden.main([str(folder)])
    return code, capsys.readouterr().out.splitlines()


def some(folder: Path, *stems: str) -> Path:
    for stem in stems:
        for suffix in (".json", ".safetensors"):
            shutil.copy(GOLDEN / (stem + suffix), folder)
    return folder


def change(folder: Path, stem: str, **arrays) -> None:
    """Rewrite arrays of a file: a function of the old one, a tensor, or None to drop it."""
    path = folder / f"{stem}.safetensors"
    content = load_file(path)
    for name, new in arrays.items():
        name = name.replace("__", ".")
        if new is None:
            del content[name]
        else:
            content[name] = (new(content[name].clone()) if callable(new) else new).contiguous()
    save_file(content, path)


def edit(folder: Path, stem: str, change_) -> None:
    path = folder / f"{stem}.json"
    meta = json.loads(path.read_text())
    change_(meta)
    path.write_text(json.dumps(meta))


def bump(x: torch.Tensor) -> torch.Tensor:
    """One element a little wrong."""
    x.view(-1)[-1] += 1 if not x.is_floating_point() else 0.5
    return x


def test_every_recorded_file_passes(capsys):
    """The engine against numbers recorded from upstream (golden, float32 on a CPU)."""
    code, lines = run(GOLDEN, capsys)
    assert code == 0
    assert [line.split()[0] for line in lines] == STEMS
    for line in lines:
        words = line.split()
        assert line.endswith("  ok")
        assert words[1] == "compared" and words[2] == words[4] and int(words[2]) > 0


# --- every way to be wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "stem, array",
    [
        ("fsq", "code"),
        ("fsq", "z_index"),
        ("history_pattern", "p0"),
        ("sampling", "m0.masking"),
        ("sampling", "cosine_50"),
        ("rotary", "r0.cos"),
        ("rotary", "r0.k_rot_t_minus_delta"),
        ("image_crop", "c0.cropped"),
        ("tiny_sequences", "s0.logits"),
        ("tiny_sequences", "s0.attend"),
        ("tiny_cached_path", "cond.k_after_commit.2"),
        ("tiny_cached_path", "uncond.step_logits"),
        ("gen_t2v_greedy", "frames"),
        ("gen_t2v_greedy", "step_selected"),
        ("gen_i2v_greedy", "step_temperature"),
    ],
)
def test_one_wrong_number_fails(tmp_path, capsys, stem, array):
    folder = some(tmp_path, stem, *(["tiny_model"] if stem.startswith(("tiny", "gen")) else []))
    names = load_file(folder / f"{stem}.safetensors")
    assert array in names, sorted(names)

    def wrong(x):
        if x.dtype in (torch.bool, torch.uint8):
            return x.logical_not().to(x.dtype) if x.dtype == torch.bool else 255 - x
        return x + 1 if array == "step_selected" and x.max() > 2 else bump(x)

    change(folder, stem, **{array.replace(".", "__"): wrong})
    code, lines = run(folder, capsys)
    assert code == 1
    (line,) = [line for line in lines if line.startswith(stem)]
    assert "FAIL" in line and f"{array} differs by" in line


def test_what_is_inside_the_tolerance_passes_and_no_more(tmp_path, capsys):
    folder = some(tmp_path, "fsq")
    change(folder, "fsq", code=lambda x: x + 5e-7)
    assert run(folder, capsys)[0] == 0
    change(folder, "fsq", code=lambda x: x + 5e-6)
    assert run(folder, capsys)[0] == 1


def test_nan_fails(tmp_path, capsys):
    folder = some(tmp_path, "sampling")
    change(folder, "sampling", cosine_50=lambda x: x * float("nan"))
    code, (line,) = run(folder, capsys)
    assert code == 1 and "cosine_50 differs by nan" in line


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_half_a_pair_fails(tmp_path, capsys, suffix):
    folder = some(tmp_path, "fsq", "sampling")
    (folder / f"fsq{suffix}").unlink()
    code, lines = run(folder, capsys)
    assert code == 1
    assert lines[0].split(maxsplit=1)[1] == f"FAIL  fsq{suffix} is missing"
    assert lines[1].endswith("  ok")  # the other file is still compared


def test_an_unknown_file_fails(tmp_path, capsys):
    folder = some(tmp_path, "fsq")
    for suffix in (".json", ".safetensors"):
        (folder / f"fsq{suffix}").rename(folder / f"other{suffix}")
    code, (line,) = run(folder, capsys)
    assert code == 1 and line.split(maxsplit=1)[1] == "FAIL  no rule for this file"


@pytest.mark.parametrize(
    "stem, words", [("fsq", "no rule for array extra"), ("gen_x", "array extra was not compared")]
)
def test_an_unknown_array_fails(tmp_path, capsys, stem, words):
    folder = some(tmp_path, "fsq" if stem == "fsq" else "gen_t2v_greedy", "tiny_model")
    if stem == "gen_x":
        for suffix in (".json", ".safetensors"):
            (folder / f"gen_t2v_greedy{suffix}").rename(folder / f"gen_x{suffix}")
    change(folder, stem, extra=torch.zeros(3))
    code, lines = run(folder, capsys)
    assert code == 1
    assert lines[0].endswith(f"FAIL  {words}")


def test_a_missing_array_fails(tmp_path, capsys):
    folder = some(tmp_path, "fsq")
    change(folder, "fsq", code=None)
    code, (line,) = run(folder, capsys)
    assert code == 1 and "FAIL  KeyError: 'code'" in line


def test_a_wrong_shape_fails(tmp_path, capsys):
    folder = some(tmp_path, "fsq")
    change(folder, "fsq", z_index=lambda x: x[..., :-1])
    code, (line,) = run(folder, capsys)
    assert code == 1 and "z_index has shape" in line and "expected" in line


def test_a_wrong_word_of_the_json_fails(tmp_path, capsys):
    folder = some(tmp_path, "fsq")
    edit(folder, "fsq", lambda meta: meta["basis"].reverse())
    code, (line,) = run(folder, capsys)
    assert code == 1 and "basis is [" in line


def test_a_broken_json_hides_no_other_file(tmp_path, capsys):
    folder = some(tmp_path, "fsq", "sampling")
    (folder / "fsq.json").write_text("{")
    code, lines = run(folder, capsys)
    assert code == 1
    assert "FAIL  JSONDecodeError" in lines[0] and lines[1].endswith("  ok")


@pytest.mark.parametrize("missing", [False, True])
def test_an_empty_or_missing_folder_fails(tmp_path, capsys, missing):
    folder = tmp_path / "none" if missing else tmp_path
    code, (line,) = run(folder, capsys)
    assert code == 1 and line.startswith(f"no golden file in {folder}: expected pairs of .json")


# --- a folder of another model ------------------------------------------------------------------

IDS = TokenIds(
    bos=1, image_end=40, image_start=41, sep=42, new_line=43, size_zero=50, mask=90,
    video_start=91, video_end=92, video_lo=100, video_hi=148,
)  # fmt: skip

OTHER = LumosConfig(
    vocab_size=150,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    rope_theta=500000.0,
    rms_norm_eps=1e-3,
    model_parallel_size=2,
    swin_norm=True,
    token_ids=IDS,
)

SIZE, LATENTS, STEPS, TEXT = (64, 32), 3, 4, [5, 9, 13, 21]


def other_model() -> Lumos:
    """Random weights, norms included, so that each setting shows."""
    generator = torch.Generator().manual_seed(4)
    model = Lumos(OTHER).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + noise / 4 if name.endswith("norm.weight") else noise / p.shape[-1] ** 0.5)
    return model


def save(folder: Path, stem: str, arrays: dict, **meta) -> None:
    ids = {**OTHER.to_dict()["token_ids"], "vocab": OTHER.vocab_size}
    config = {k: v for k, v in OTHER.to_dict().items() if k != "token_ids"}
    save_file({k: v.contiguous() for k, v in arrays.items()}, folder / f"{stem}.safetensors")
    text = json.dumps({"config": config, "token_ids": ids, **meta})
    (folder / f"{stem}.json").write_text(text)


def write_generation(folder: Path, model: Lumos) -> None:
    vocab, layout = Vocab(OTHER), Vocab(OTHER).layout(*SIZE)
    prefix = vocab.prefix(TEXT, seconds=3, fps=7)
    sampling = Sampling(steps=STEPS, guidance=2.5, history_mask_ratio=0.4)
    steps: list[Step] = []
    draws = philox_draws([8], STEPS, layout.content)
    decoder = Decoder(
        model, [prefix], layout=layout, sampling=sampling, draws=draws,
        on_step=steps.append, all_rows=True, latents=LATENTS,
    )  # fmt: skip
    codes = torch.arange(layout.content).view(1, 1, layout.rows, layout.cols) % IDS.num_codes
    frames = torch.cat([result.ids for result in decoder.frames(codes)])
    made = LATENTS - 1

    def grid(name: str) -> torch.Tensor:
        order = [s.positions[0].argsort() for s in steps]
        rows = [getattr(s, name)[0][o] for s, o in zip(steps, order, strict=True)]
        return torch.stack(rows).view(made, STEPS, -1)

    def logits(step: Step) -> torch.Tensor:
        return step.logits[0][step.positions[0].argsort()]

    ids = torch.tensor(prefix.ids)
    temperature = torch.tensor([s.temperature for s in steps], dtype=torch.float64)
    arrays = {
        "prefix_ids": torch.cat((ids, frames[0])),
        "frames": frames,
        "output_ids": torch.cat(
            (ids[prefix.video_start :], frames.flatten(), torch.tensor([IDS.video_end]))
        ),
        "commit_ids": vocab.remask(layout, frames[1:], decoder.history),
        "step_input_tokens": grid("tokens"),
        "step_sampled": grid("sampled"),
        "step_selected": grid("selected"),
        "step_gumbel": torch.stack([draws(0, f).noise for f in range(1, LATENTS)]),
        "step_mask_len": torch.stack([s.num_mask[0, 0] for s in steps]).view(made, STEPS),
        "step_temperature": temperature.view(made, STEPS),
        "guided_logits_first_frame_step0": logits(steps[0]),
        "guided_logits_last_frame_last_step": logits(steps[-1]),
    }
    save(
        folder, "gen_other", arrays, given_latent_frames=1, video_start_index=prefix.video_start,
        duration=3, fps=7, greedy=False, latent_frames=LATENTS, resolution_wh=list(SIZE),
        steps=STEPS, guidance_scale=2.5, mask_history_ratio=0.4, start_temperature=1.0,
        tolerance={"tokens": "exact", "guided_logits": {"atol": 1e-3}},
    )  # fmt: skip


def write_sequence(folder: Path, model: Lumos) -> None:
    vocab, layout = Vocab(OTHER), Vocab(OTHER).layout(*SIZE)
    prefix = vocab.prefix(TEXT, seconds=3, fps=7)
    codes = torch.arange(layout.content) * 5 % IDS.num_codes
    ids = torch.cat([torch.tensor(prefix.ids), vocab.frame(layout, codes), vocab.frame(layout)])
    arrays = {"s0.input_ids": ids[None]}
    for start, label in ((0, ""), (prefix.video_start, "uncond_")):
        length = len(prefix.ids) - start
        parts = [positions.text_positions(0, length)]
        parts += [vocab.frame_positions(length, frame, layout) for frame in range(2)]
        where = torch.cat(parts, dim=1)
        with torch.inference_mode():
            hidden = golden.whole_forward(model, ids[start:], where)
            arrays[f"s0.{label}logits"] = model.head(hidden[-layout.tokens :])
        arrays[f"s0.{label}position_ids"] = where
    arrays["s0.attend"] = golden.attend_mask(ids, IDS.image_start, IDS.image_end)
    case = {"W": SIZE[0], "H": SIZE[1], "dur": 3, "fps": 7, "video_start_index": prefix.video_start}
    save(folder, "tiny_sequences", arrays, sequences=[case], tolerance={"atol": 1e-4})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    folder, model = tmp_path_factory.mktemp("other"), other_model()
    save(folder, "tiny_model", model.state_dict(), tolerance={"atol": 0})
    write_generation(folder, model)
    write_sequence(folder, model)
    return folder


@pytest.fixture
def other(recorded, tmp_path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "other"))


def test_another_model_passes(other, capsys):
    """Sizes, ids, theta, eps, parallel parts and norms all come from the folder."""
    code, lines = run(other, capsys)
    assert code == 0, lines
    assert [line.split()[0] for line in lines] == ["gen_other", "tiny_model", "tiny_sequences"]
    assert all(line.endswith("  ok") for line in lines)


@pytest.mark.parametrize(
    "stem, array",
    [
        ("gen_other", "frames"),
        ("gen_other", "guided_logits_last_frame_last_step"),
        ("tiny_sequences", "s0__uncond_logits"),
        ("tiny_sequences", "s0__position_ids"),
    ],
)
def test_another_model_with_one_wrong_number_fails(other, capsys, stem, array):
    change(other, stem, **{array: bump})
    code, lines = run(other, capsys)
    assert code == 1
    assert [line.split()[0] for line in lines if "FAIL" in line] == [stem]


@pytest.mark.parametrize(
    "setting, value",
    [
        ("rope_theta", 10000.0),
        ("rms_norm_eps", 1e-5),
        ("swin_norm", False),
        ("model_parallel_size", 1),
    ],
)
def test_another_setting_is_another_model(other, capsys, setting, value):
    """The runner reads each setting: with a wrong one the recorded logits are not met."""
    edit(other, "tiny_model", lambda meta: meta["config"].update({setting: value}))
    code, lines = run(other, capsys)
    assert code == 1
    failed = [line.split()[0] for line in lines if "FAIL" in line]
    assert {"gen_other", "tiny_sequences"} <= set(failed)


@pytest.mark.parametrize("name", ["mask", "new_line", "video_lo", "image_start"])
def test_another_id_is_another_vocabulary(other, capsys, name):
    edit(other, "tiny_model", lambda meta: meta["token_ids"].update({name: 3}))
    assert run(other, capsys)[0] == 1
