"""Clips for VBench: the folder, the encoder, the manifest; nothing half-written, nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from packcache import files, video
from packcache.errors import InputError, InputFileError, InvalidSetting, OutputError
from packcache.evaluate.vbench import export as exports
from packcache.evaluate.vbench.export import Made, begin, export, generated, taken
from packcache.evaluate.vbench.manifest import read_manifest
from packcache.evaluate.vbench.names import Layout, clip_name
from packcache.evaluate.vbench.probe import probe
from packcache.evaluate.vbench.records import hash_file
from tests.evaluate.vbench_files import FakePipeline, draw, making, moving


@pytest.fixture
def chosen(tmp_path):
    return draw(tmp_path / "suite", clips=2)


@pytest.fixture
def layout(tmp_path):
    return Layout(out=tmp_path / "out")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def asked(chosen) -> list[str]:
    return sorted(clip_name(entry.prompt, index) for entry, index in chosen.asked())


class Counting:
    """A maker that counts, and may be stopped at a call."""

    def __init__(self, stop: int | None = None) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.stop = stop

    def __call__(self, entry, index, seed) -> Made:
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.calls.append((entry.prompt, index, seed))
        return making()(entry, index, seed)


# --- what is written --------------------------------------------------------------------------


def test_the_folder_of_a_policy_holds_its_clips_and_nothing_else(chosen, layout):
    export(chosen, layout.out, "packcache:budget=2", making())
    folder = layout.out / "clips" / "packcache_budget_2"
    assert names(folder) == asked(chosen) and len(asked(chosen)) == 6
    assert not list(layout.out.rglob(f"*{files.PARTIAL}"))
    assert not layout.images.exists()


def test_clips_are_of_one_encoder_setting_at_their_rate_and_whole(chosen, layout):
    export(chosen, layout.out, "full", making(frames=moving(7, size=(48, 34)), fps=12))
    for path in layout.clips("full").iterdir():
        facts = probe(path)
        assert facts.encoder == "h264 yuv420p crf=10.0"
        assert (facts.frames, facts.fps, facts.size) == (7, "12", "48x34")
        frames, fps = video.read_video(path)
        error = np.abs(frames.astype(int) - moving(7, size=(48, 34)))
        assert fps == 12 and error.mean() < 3


def test_the_manifest_says_how_each_clip_was_made(chosen, layout):
    pipeline = FakePipeline()
    make = generated(pipeline, chosen, policy="window", frames=5)  # type: ignore[arg-type]
    export(chosen, layout.out, "window", make, workload={"policy": "window"}, seed=7)
    told = json.loads(layout.manifest("window").read_text())
    assert told["schema"] == "packcache.vbench.clips/1"
    assert told["workload"] == {
        "policy": "window", "label": "window", "seed": 7, "mode": "standard",
    }  # fmt: skip
    assert told["environments"][0]["dtype"] == "float32" and len(told["environments"]) == 1
    assert sorted(clip["file"] for clip in told["clips"]) == asked(chosen)
    for clip in told["clips"]:
        path = layout.clips("window") / clip["file"]
        assert clip["sha256"] == hash_file(path) and clip["environment"] == 0
        assert clip["seed"] == 7 + clip["index"] and clip["source"] == "generated"
        assert clip["facts"]["encoder"] == "h264 yuv420p crf=10.0"
    again = read_manifest(layout.manifest("window"))
    assert again.to_json() == told


def test_the_model_is_told_caption_image_policy_and_seed(tmp_path, layout):
    captions = tmp_path / "captions.json"
    prompts = ("a cat's gaze - 3", "a hall")
    captions.write_text(json.dumps({prompt: f"long {prompt}" for prompt in prompts}))
    from packcache.evaluate.vbench import suite
    from tests.evaluate.vbench_files import write_suite

    chosen = suite.sample(*write_suite(tmp_path, prompts), count=2, captions=captions)
    pipeline = FakePipeline()
    make = generated(pipeline, chosen, policy="full", frames=5, steps=2)  # type: ignore[arg-type]
    export(chosen, layout.out, "full", make, seed=3)
    assert names(layout.clips("full")) == ["a cat's gaze - 3-0.mp4", "a hall-0.mp4"]
    assert pipeline.calls[0] == {
        "prompt": "long a cat's gaze - 3", "image": tmp_path / "crop" / "picture 0.jpg",
        "policy": "full", "seed": 3, "frames": 5, "steps": 2,
    }  # fmt: skip


def test_policies_share_their_seeds(chosen, layout):
    first, second = Counting(), Counting()
    export(chosen, layout.out, "full", first, seed=4)
    export(chosen, layout.out, "packcache", second, seed=4)
    assert first.calls == second.calls
    assert {(index, seed) for _, index, seed in first.calls} == {(0, 4), (1, 5)}


def test_custom_mode_has_images_by_the_names_of_the_prompts(chosen, layout):
    export(chosen, layout.out, "full", making(), mode="custom")
    assert names(layout.images) == sorted(f"{entry.prompt}.png" for entry in chosen.entries)
    for entry in chosen.entries:
        with Image.open(layout.images / f"{entry.prompt}.png") as shown:
            assert np.array_equal(shown, video.read_image(chosen.image(entry)))
    assert names(layout.clips("full")) == asked(chosen)


# --- going on ---------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_where_it_was(chosen, layout):
    with pytest.raises(KeyboardInterrupt):
        export(chosen, layout.out, "full", Counting(stop=2))
    assert len(names(layout.clips("full"))) == 2
    assert len(read_manifest(layout.manifest("full")).rows) == 2
    assert not list(layout.out.rglob(f"*{files.PARTIAL}"))
    rest = Counting()
    manifest = export(chosen, layout.out, "full", rest)
    assert len(rest.calls) == 4 and sorted(manifest.rows) == asked(chosen)
    nothing = Counting(stop=0)
    export(chosen, layout.out, "full", nothing)
    assert nothing.calls == []


def test_a_stop_while_encoding_leaves_nothing(chosen, layout, monkeypatch):
    def stop(frames, path, fps):
        path.write_bytes(b"half")
        assert layout.out in path.parents and layout.clips("full") not in path.parents
        raise KeyboardInterrupt

    monkeypatch.setattr(exports, "write_mp4", stop)
    with pytest.raises(KeyboardInterrupt):
        export(chosen, layout.out, "full", making())
    assert names(layout.clips("full")) == [] and not list(layout.out.rglob("*draft*"))


def test_clips_that_went_or_changed_are_made_again(chosen, layout):
    export(chosen, layout.out, "full", making())
    gone, changed, *_ = sorted(layout.clips("full").iterdir())
    before = gone.read_bytes(), changed.read_bytes()
    gone.unlink()
    changed.write_bytes(b"something else")
    again = Counting()
    export(chosen, layout.out, "full", again)
    assert len(again.calls) == 2 and (gone.read_bytes(), changed.read_bytes()) == before


def test_a_kill_between_the_clip_and_its_row_costs_that_clip(chosen, layout):
    export(chosen, layout.out, "full", making())
    path = layout.manifest("full")
    told = json.loads(path.read_text())
    told["clips"].pop()
    path.write_text(json.dumps(told))
    again = Counting()
    manifest = export(chosen, layout.out, "full", again)
    assert len(again.calls) == 1 and sorted(manifest.rows) == asked(chosen)


def test_an_export_that_goes_on_elsewhere_says_so(chosen, layout):
    with pytest.raises(KeyboardInterrupt):
        export(chosen, layout.out, "full", Counting(stop=1))
    here, there = {"device": "A"}, {"device": "B"}
    path = layout.manifest("full")
    for place in (here, there):
        next(layout.clips("full").iterdir()).unlink()
        manifest = export(chosen, layout.out, "full", making(environment=place))
    assert manifest.environments == [here, there] == read_manifest(path).environments
    assert [row.environment for row in manifest.rows.values()].count(1) == 1


def test_other_settings_are_refused_and_nothing_is_mixed(chosen, layout):
    export(chosen, layout.out, "full", making(), workload={"frames": 5})
    before = layout.manifest("full").read_bytes()
    with pytest.raises(
        InputFileError, match=r"begun with frames 5, now it is 9: give the same, or"
    ):
        export(chosen, layout.out, "full", making(), workload={"frames": 9})
    with pytest.raises(InputFileError, match=r"begun with seed 0, now it is 1"):
        export(chosen, layout.out, "full", making(), workload={"frames": 5}, seed=1)
    assert layout.manifest("full").read_bytes() == before


def test_policies_with_the_same_folder_are_refused(chosen, layout):
    export(chosen, layout.out, "a:b", making())
    with pytest.raises(InputFileError, match=r"begun with label 'a:b', now it is 'a,b'"):
        export(chosen, layout.out, "a,b", making())


def test_another_sample_is_refused(tmp_path, chosen, layout):
    export(chosen, layout.out, "full", making())
    with pytest.raises(
        InputError, match="was begun with another sample: give that one, or another"
    ):
        export(draw(tmp_path / "other", clips=1), layout.out, "window", making())


def test_the_same_sample_from_elsewhere_is_the_same(tmp_path, chosen, layout):
    export(chosen, layout.out, "full", making())
    export(draw(tmp_path / "copy", clips=2), layout.out, "window", making())


def test_two_processes_do_not_write_one_policy(chosen, layout):
    begin(chosen, layout.out, "standard")
    held = files.lock(layout.lock("full"))
    assert held is not None
    with pytest.raises(OutputError, match="is in use by another process: wait for it"):
        export(chosen, layout.out, "full", making())
    held.release()
    export(chosen, layout.out, "full", making())


def test_a_manifest_of_something_else_is_refused(chosen, layout):
    export(chosen, layout.out, "full", making())
    layout.manifest("full").write_text('{"schema": "other"}')
    with pytest.raises(InputFileError, match="is of something else: expected a manifest of"):
        export(chosen, layout.out, "full", making())


# --- clips that exist -------------------------------------------------------------------------


def test_clips_are_taken_from_videos_and_from_pictures(tmp_path, chosen, layout):
    source = tmp_path / "source"
    source.mkdir()
    for number, (entry, index) in enumerate(chosen.asked()):
        stem = Path(clip_name(entry.prompt, index)).stem
        ending = ".mp4" if number else ""
        video.write_video(moving(5), source / f"{stem}{ending}", 8)
    manifest = export(chosen, layout.out, "mine", taken(source, chosen, fps=12))
    rows = list(manifest.rows.values())
    assert [row.source for row in rows] == ["pictures"] + ["video"] * 5
    assert [row.facts.fps for row in rows] == ["12"] + ["8"] * 5
    assert {row.facts.encoder for row in rows} == {"h264 yuv420p crf=10.0"}
    assert {row.environment for row in rows} == {None}


def test_a_clip_that_is_missing_is_found_before_the_work(tmp_path, chosen):
    prompt = chosen.entries[0].prompt
    with pytest.raises(InputFileError, match=f"has no clip '{prompt}-0': expected a video, or a"):
        taken(tmp_path, chosen)


def test_pictures_need_a_rate(tmp_path, layout):
    chosen = draw(tmp_path / "suite", count=1)
    source = tmp_path / "source"
    source.mkdir()
    video.write_video(moving(2), source / f"{chosen.entries[0].prompt}-0", 8)
    with pytest.raises(InvalidSetting, match="does not say its frames a second: give fps"):
        export(chosen, layout.out, "mine", taken(source, chosen))


# --- errors -----------------------------------------------------------------------------------


def test_odd_sizes_are_refused(chosen, layout):
    with pytest.raises(InvalidSetting, match="frames are 31x32, expected even sizes"):
        export(chosen, layout.out, "full", making(frames=moving(size=(31, 32))))
    assert names(layout.clips("full")) == []


def test_an_unknown_mode_is_refused(chosen, layout):
    with pytest.raises(InvalidSetting, match="mode is 'own', expected standard or custom"):
        begin(chosen, layout.out, "own")  # type: ignore[arg-type]
    assert not layout.out.exists()


def test_camera_prompts_are_for_standard_mode(tmp_path, layout):
    chosen = draw(tmp_path / "suite", count=5, camera=True)
    with pytest.raises(InvalidSetting, match="the sample has camera prompts, which VBench would"):
        begin(chosen, layout.out, "custom")


def test_a_place_that_cannot_be_written_is_one_line(chosen, tmp_path):
    with pytest.raises(OutputError, match="does not exist: create it or choose another"):
        export(chosen, tmp_path / "no" / "out", "full", making())
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file, expected a folder"):
        export(chosen, tmp_path / "file", "full", making())


def test_a_disk_that_fails_is_one_line_and_leaves_no_clip(chosen, layout, monkeypatch):
    def fail(draft, path):
        raise OSError(28, "No space left on device")

    begin(chosen, layout.out, "standard")
    export(chosen, layout.out, "full", making())
    monkeypatch.setattr(exports.files, "take_place", fail)
    next(layout.clips("full").iterdir()).unlink()
    with pytest.raises(OutputError, match=r"cannot write .* \(?No space left on device"):
        export(chosen, layout.out, "full", making())
    assert len(names(layout.clips("full"))) == 5
