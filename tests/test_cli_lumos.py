"""`packcache plan` and `packcache doctor` as a user calls them."""

import json

import pytest

import packcache as pc
from packcache.inspect.demo import load_clip
from packcache.lumos.weights import save_model
from packcache.video import write_video
from tests.lumos.folder import write_codec, write_folder
from tests.lumos.tokenizer_file import write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


# --- plan -----------------------------------------------------------------------------------------


def test_a_plan_is_a_table(run):
    code, printed, err = run("plan", "--model", "3b", "--memory", "16GiB")
    assert code == 0 and err == ""
    assert "672x384, 48 frames = 13 latent frames of 4084 tokens, PackCache(" in printed
    assert "fits 16.00 GiB" in printed and "packcache any length" in printed
    assert "gate, up and product" not in printed
    code, explained, _ = run("plan", "--model", "3b", "--memory", "16GiB", "--explain")
    assert code == 0 and explained.startswith(printed) and "gate, up and product" in explained


def test_a_plan_is_json(run):
    code, printed, _ = run("plan", "--model", "1b", "--size", "448x256", "--frames", 24, "--json")
    made = json.loads(printed)
    assert code == 0 and made["schema"] == "packcache.plan/1"
    assert made["total_bytes"] < 6 * 2**30 and made["workload"]["size"] == [448, 256]
    assert made["frame_bytes"] == 1828 * 2 * 32768  # lumos1-spec 1.4


def test_options_reach_the_plan(run):
    _, printed, _ = run(
        "plan", "--model", "digits", "--policy", "packcache:half_life=2", "--window", 3,
        "--guidance", 1, "--steps", 4, "--frames", 9, "--no-image", "--batch", 2, "--json",
        "--positions", "absolute", "--rebase", "slide", "--text-tokens", 33, "--budget", 0.5,
        "--dtype", "float16", "--reuse", "history_every=3",
    )  # fmt: skip
    work = json.loads(printed)["workload"]
    assert work["policy"] == "PackCache(budget=0.5, window=3, half_life=2)"
    assert (work["positions"], work["rebase"], work["text_tokens"]) == ("absolute", "slide", 33)
    assert (work["guidance"], work["steps"], work["frames"], work["prompts"]) == (1, 4, 9, 2)
    assert work["reuse"] == {"history_every": 3, "history_share": 0.0, "rest_every": 1}
    assert work["image"] is False and work["dtype"] == "float16" and work["size"] == [96, 96]


def test_a_plan_prints_what_a_checkpoint_writes(run):
    """K and V of the newest frame, kept whole in both branches, its index arrays and its codes."""
    options = ("--model", "3b", "--policy", "window", "--memory", "16GiB")
    _, printed, _ = run("plan", *options)
    (line,) = (line for line in printed.splitlines() if line.startswith("checkpoint"))
    made = json.loads(run("plan", *options, "--json")[1])
    written = 4084 * (2 * 112 * 1024 + 9) + 4032 * 4
    assert made["checkpoint_bytes"] == written
    assert f" {written / 2**20:.1f} MiB " in line and "a latent frame" in line


def test_upstreams_way_beside_the_papers_figures(run):
    code, printed, _ = run("plan", "--engine", "stock", "--memory", "48GB")
    assert code == 0 and "stock engine" in printed and "does not fit" in printed
    verdicts = [line.split()[0] for line in printed.splitlines() if ": paper " in line]
    assert len(verdicts) >= 5 and set(verdicts) == {"reproduced", "disputed"}


def test_a_folder_is_planned_by_its_config_alone(run, tmp_path):
    folder = write_folder(tmp_path / "model")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    code, printed, _ = run("plan", "--model", folder, "--json")
    assert code == 0
    parameters = json.loads(printed)["workload"]["parameters"]
    assert parameters == 8_308_128  # 2 x 129536 x 32, two layers of 8,896 and the last norm


@pytest.mark.parametrize(
    "options, code, text",
    [
        (("--memory", "much"), 2, "much"),
        (("--engine", "magic"), 2, "engine is 'magic', expected packcache or stock"),
        (("--model", "7b"), 2, "unknown model '7b'"),
        (("--frames", "0"), 2, "frames is 0, expected at least 1"),
        (("--size", "100x100"), 2, "width is 100 pixels, expected a positive multiple of 32"),
        (("--model", "./nowhere"), 1, "does not exist"),
    ],
    ids=str,
)
def test_wrong_plans_get_one_clear_line(run, options, code, text):
    found, printed, err = run("plan", *options)
    assert (found, printed, len(err.splitlines())) == (code, "", 1) and text in err


# --- doctor ---------------------------------------------------------------------------------------


def test_the_embedded_model_is_well(run):
    code, printed, err = run("doctor", "digits")
    assert code == 0 and err == "" and printed.splitlines()[-1] == "PASS"


def test_a_folder_with_one_wrong_setting_is_not(run, tmp_path):
    folder = tmp_path / "mine"
    save_model(pc.load("digits").model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}))
    code, printed, err = run(
        "doctor", folder, "--codec", "digits", "--tokenizer", "digits", "--size", "96x96", "--json"
    )
    made = json.loads(printed)
    assert code == 1 and made["schema"] == "packcache.doctor/1" and not made["passed"]
    assert "rope_theta" in next(r["name"] for r in made["results"] if r["verdict"] == "FAIL")
    assert "did not pass: see the rows marked FAIL" in err and len(err.splitlines()) == 1


def test_random_weights_do_not_pass(run, tmp_path):
    folder, codec = write_folder(tmp_path / "model"), write_codec(tmp_path / "codec")
    code, printed, _ = run("doctor", folder, "--codec", codec, "--size", "64x32")
    assert code == 1 and printed.splitlines()[-1].startswith("FAIL")
    assert "PASS     template ids" in printed


def test_a_wrong_tokenizer_is_refused(run, tmp_path):
    folder, codec = write_folder(tmp_path / "model"), write_codec(tmp_path / "codec")
    write_tokenizer(folder / "tokenizer.json", wrong=True)
    code, printed, err = run("doctor", folder, "--codec", codec)
    assert code == 1 and printed == "" and "most likely another model's tokenizer" in err


def test_a_clip_needs_its_caption(run, tmp_path):
    code, _, err = run("doctor", "digits", "--clip", tmp_path / "clip.mp4")
    assert code == 2 and "expected --clip and --prompt together" in err


def test_a_clip_of_ones_own(run, tmp_path):
    """Drawn, as all that the model was trained on; a clip that a model made is no real one."""
    clip = load_clip()
    write_video(clip.given, tmp_path / "clip", 12)
    code, printed, _ = run("doctor", "digits", "--clip", tmp_path / "clip", "--prompt", clip.prompt)
    assert code == 0 and "note:" not in printed


# --- a whole folder -------------------------------------------------------------------------------


def test_a_clip_and_a_comparison_from_a_folder(run, tmp_path):
    """Every option that names a file of the model, as docs/lumos1.md has them."""
    (tmp_path / "weights").mkdir()
    write_folder(tmp_path / "weights" / "stage")
    words, codec = tmp_path / "words", write_codec(tmp_path / "codec")
    words.mkdir()
    (tmp_path / "weights" / "stage" / "tokenizer.json").rename(words / "tokenizer.json")
    source = (
        "--model", tmp_path / "weights", "--subfolder", "stage", "--codec", codec,
        "--tokenizer", words, "--device", "cpu", "--dtype", "float32",
        "--size", "64x32", "--steps", 1, "--frames", 5,
    )  # fmt: skip
    code, printed, err = run(
        "generate", "a cat in fresh snow", *source, "--out", tmp_path / "c.mp4", "--json"
    )
    made = json.loads(printed)
    assert (code, err) == (0, "") and made["workload"]["model"] == "weights/stage"
    assert made["environment"]["dtype"] == "float32"
    code, _, err = run("compare", "a cat in fresh snow", *source, "--out", tmp_path / "out")
    assert (code, err) == (0, "") and (tmp_path / "out" / "report.html").exists()
