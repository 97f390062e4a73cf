"""The checker: every problem is found and told in one line; all is well where all is well."""

from __future__ import annotations

import json
import shutil

import pytest

from packcache import video
from packcache.errors import InputError, InputFileError
from packcache.evaluate.vbench.checker import KINDS, check
from packcache.evaluate.vbench.export import export
from packcache.evaluate.vbench.manifest import read_manifest
from packcache.evaluate.vbench.names import Layout
from packcache.evaluate.vbench.records import hash_file
from tests.evaluate.vbench_files import draw, export_all, making, moving


@pytest.fixture
def chosen(tmp_path):
    return draw(tmp_path / "suite", count=2)


@pytest.fixture
def layout(tmp_path, chosen):
    """Two policies, two clips each, all well."""
    return export_all(chosen, tmp_path / "out")


def only(layout: Layout) -> str:
    """The one line of the one problem."""
    report = check(layout.out)
    assert not report.ok and len(report.lines()) == 1
    return report.lines()[0]


def clip(layout: Layout, label: str = "packcache"):
    return min(layout.clips(label).iterdir())


def adopt(layout: Layout, path, label: str = "packcache") -> None:
    """Write the file's hash into the manifest, as if it had been exported."""
    manifest = layout.manifest(label)
    told = json.loads(manifest.read_text())
    for row in told["clips"]:
        if row["file"] == path.name:
            row["sha256"] = hash_file(path)
    manifest.write_text(json.dumps(told))


def test_all_is_well(layout):
    report = check(layout.out)
    assert report.ok and report.lines() == ["4 clips of full, packcache: all is well"]
    assert report.to_json() == {
        "schema": "packcache.vbench.check/1", "policies": ["full", "packcache"], "clips": 4,
        "ok": True, "problems": {},
    }  # fmt: skip


def test_progress_is_told(layout):
    told = []
    check(layout.out, on_clip=lambda *counts: told.append(counts))
    assert told == [(n, 4) for n in range(1, 5)]


def test_a_missing_clip(layout):
    path = clip(layout)
    path.unlink()
    said = f"missing clips: 1, such as packcache/{path.name}; run the export again"
    assert only(layout) == said


def test_an_export_that_was_not_finished(chosen, layout):
    def stop(entry, index, seed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(chosen, layout.out, "window", stop)
    assert only(layout).startswith("missing clips: 2, such as window/")


@pytest.mark.parametrize("name", ["notes.txt", "a cat-9.mp4", ".DS_Store"])
def test_a_stray_file(layout, name):
    (layout.clips("full") / name).write_text("")
    assert only(layout).startswith(f"stray files: 1, such as full/{name}; VBench would trip over")


def test_a_clip_that_was_replaced(layout):
    path = clip(layout)
    path.unlink()
    video.write_video(moving(seed=5), path, 12)
    assert only(layout).startswith(f"changed clips: 1, such as packcache/{path.name}; they are not")


@pytest.mark.parametrize("keep", [0.0, 0.2, 0.24, 0.475, 0.6, 0.95])
def test_a_clip_that_cannot_be_decoded(layout, keep):
    path = clip(layout)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    line = only(layout)
    assert line.startswith("unreadable clips: 1, such as clip ") and "cannot be read (" in line
    assert line.endswith("remove them and run the export again")


def replaced(layout, chosen, **changed):
    """The second policy, exported with other clips."""
    shutil.rmtree(layout.clips("packcache"))
    layout.manifest("packcache").unlink()
    export(chosen, layout.out, "packcache", making(**changed))


def test_frame_counts_that_differ(layout, chosen):
    replaced(layout, chosen, frames=moving(7))
    line = only(layout)
    assert line.startswith("frame counts that differ: 2, such as '")
    assert "', 5 of full, 7 of packcache; clips of one prompt must be equally long" in line


def test_frame_rates_that_differ(layout, chosen):
    replaced(layout, chosen, fps=8)
    line = only(layout)
    assert line.startswith("frame rates that differ: 2, such as '")
    assert "', 12 of full, 8 of packcache; the rate changes dynamic degree" in line


def test_sizes_that_differ(layout, chosen):
    replaced(layout, chosen, frames=moving(size=(48, 32)))
    line = only(layout)
    assert line.startswith("sizes that differ: 2, such as '")
    assert "', 32x32 of full, 48x32 of packcache; export all policies with one size" in line


def test_encoders_that_differ(layout, monkeypatch):
    path = clip(layout)
    path.unlink()
    monkeypatch.setattr(video, "_CRF", "23")
    video.write_video(moving(), path, 12)
    adopt(layout, path)
    said = f"packcache/{path.name}, h264 yuv420p crf=23.0, not h264 yuv420p crf=10.0; the encoder"
    assert only(layout).startswith(f"encoders that differ: 1, such as {said}")


def test_frames_that_only_some_policies_encoded_twice(layout, chosen):
    replaced(layout, chosen, source="video")
    line = only(layout)
    assert line.startswith("frames encoded twice: 1, such as packcache/")
    assert "not those of full; not of all policies: take all from" in line


@pytest.mark.parametrize("name", ["model", "seed", "steps", "guidance", "reuse", "positions"])
def test_settings_that_differ(layout, name):
    for label, value in (("full", 1), ("packcache", 2)):
        told = json.loads(layout.manifest(label).read_text())
        told["workload"][name] = value
        layout.manifest(label).write_text(json.dumps(told))
    said = f"settings that differ: 1, such as {name} 1 of full, 2 of packcache; policies can be"
    assert only(layout).startswith(said)


def test_another_dtype_is_another_setting(layout, chosen):
    shutil.rmtree(layout.out / "clips")
    shutil.rmtree(layout.manifests)
    for label, dtype in (("full", "float32"), ("packcache", "bfloat16")):
        export(chosen, layout.out, label, making(environment={"device": "cpu", "dtype": dtype}))
    line = only(layout)
    assert "settings that differ: 1, such as dtype float32 of full, bfloat16 of packcache" in line


def test_settings_that_one_does_not_have_are_not_compared(layout):
    told = json.loads(layout.manifest("full").read_text())
    told["workload"]["steps"] = 25
    layout.manifest("full").write_text(json.dumps(told))
    assert check(layout.out).ok


def test_an_image_that_custom_mode_lacks(tmp_path, chosen):
    layout = export_all(chosen, tmp_path / "own", mode="custom")
    assert check(layout.out).ok
    (layout.images / f"{chosen.entries[0].prompt}.png").unlink()
    said = f"missing images: 1, such as {chosen.entries[0].prompt}.png; custom mode wants"
    assert only(layout).startswith(said)


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("cats/dogs", "'cats/dogs', which has a slash; change these prompts"),
        ("a" * 300, f"'{'a' * 60}', which makes a file name of 306 bytes; change"),
    ],
)
def test_names_that_cannot_be_files(layout, prompt, text):
    told = json.loads(layout.sample.read_text())
    told["entries"].append({**told["entries"][0], "prompt": prompt})
    layout.sample.write_text(json.dumps(told))
    names, missing = check(layout.out).lines()
    assert names == f"unusable names: 1, such as {text} and draw the sample again" or text in names
    assert missing.startswith("missing clips: 2")


def test_names_that_only_capitals_tell_apart(layout):
    told = json.loads(layout.sample.read_text())
    first = told["entries"][0]
    told["entries"].append({**first, "prompt": first["prompt"].upper()})
    layout.sample.write_text(json.dumps(told))
    assert "which is there twice" in check(layout.out).lines()[0]


def test_each_kind_is_one_line_in_a_fixed_order(layout):
    for label in ("full", "packcache"):
        clip(layout, label).unlink()
        (layout.clips(label) / "notes.txt").write_text("")
    lines = check(layout.out).lines()
    assert [line.partition(":")[0] for line in lines] == ["missing clips", "stray files"]
    assert all(": 2, such as full/" in line for line in lines)
    assert list(KINDS).index("missing clips") < list(KINDS).index("stray files")


def test_nothing_to_look_at_is_one_line(tmp_path, layout):
    with pytest.raises(InputFileError, match=r"sample\.json does not exist: expected a file of"):
        check(tmp_path / "none")
    shutil.rmtree(layout.manifests)
    with pytest.raises(InputError, match="holds no clips: expected the folder of vbench export"):
        check(layout.out)


def test_the_manifests_facts_are_those_of_the_files(layout):
    rows = read_manifest(layout.manifest("full")).rows.values()
    assert {(row.facts.frames, row.facts.size) for row in rows} == {(5, "32x32")}
