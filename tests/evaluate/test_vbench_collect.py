"""The collector: VBench's files with all their traps, joined by prompt and seed, by hand."""

from __future__ import annotations

import json

import pytest

from packcache.errors import InputError, InputFileError, InvalidSetting
from packcache.evaluate.vbench.collect import collect, read_results
from packcache.evaluate.vbench.export import export
from packcache.evaluate.vbench.names import Layout, clip_name
from packcache.evaluate.vbench.total import NINE
from tests.evaluate.vbench_files import draw, export_all, making, write_results


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Two policies, three images, two clips each: exported once, results are each test's own."""
    folder = tmp_path_factory.mktemp("vbench")
    chosen = draw(folder / "suite", clips=2)
    return chosen, export_all(chosen, folder / "out")


@pytest.fixture
def layout(exported, tmp_path):
    """The exports with an empty folder for results."""
    return Own(out=exported[1].out, own=tmp_path / "results")


class Own(Layout):
    """Exports of all, results of one test."""

    def __init__(self, out, own):
        super().__init__(out=out)
        object.__setattr__(self, "own", own)

    @property
    def results(self):
        return self.own


@pytest.fixture
def files(exported):
    return [clip_name(entry.prompt, index) for entry, index in exported[0].asked()]


def joined(layout, **settings):
    return collect(layout.out, results=layout.results, **settings)


def both(layout, files, dimension, ours, theirs):
    """The same dimension for both policies; `theirs` is the reference's."""
    write_results(layout, "full", {dimension: dict(zip(files, theirs, strict=True))})
    write_results(layout, "packcache", {dimension: dict(zip(files, ours, strict=True))})


# --- means and differences --------------------------------------------------------------------


def test_means_and_paired_differences_by_hand(layout, files):
    theirs = [0.50, 0.60, 0.70, 0.70, 0.20, 0.40]
    ours = [0.60, 0.70, 0.70, 0.70, 0.10, 0.40]
    both(layout, files, "aesthetic_quality", ours, theirs)
    found = joined(layout)
    assert found.policies == ("full", "packcache") and found.clips == {"aesthetic_quality": 6}
    assert found.means["full"]["aesthetic_quality"] == pytest.approx(3.1 / 6)
    assert found.means["packcache"]["aesthetic_quality"] == pytest.approx(3.2 / 6)
    against = found.against["packcache"]["aesthetic_quality"]
    # two clips of an image first become one number: +0.10, 0, -0.05
    assert (against.images, against.higher, against.lower) == (3, 1, 1)
    assert against.mean == pytest.approx(0.05 / 3)
    assert against.low == pytest.approx(-0.05) and against.high == pytest.approx(0.10)
    assert found.against["full"] == {}


def test_without_a_difference_the_interval_is_nothing(layout, files):
    both(layout, files, "i2v_subject", [0.9] * 6, [0.9] * 6)
    against = joined(layout).against["packcache"]["i2v_subject"]
    assert (against.mean, against.low, against.high) == (0, 0, 0)
    assert (against.higher, against.lower) == (0, 0)


# --- VBench's traps ---------------------------------------------------------------------------


def test_imaging_quality_of_a_clip_is_of_a_hundred(layout, files):
    both(layout, files, "imaging_quality", [70.0] * 6, [60.0] * 6)
    found = joined(layout)
    assert found.means["full"]["imaging_quality"] == pytest.approx(0.6)
    assert found.means["packcache"]["imaging_quality"] == pytest.approx(0.7)
    assert found.against["packcache"]["imaging_quality"].mean == pytest.approx(0.1)


def test_imaging_quality_that_is_scaled_already_is_refused(layout, files):
    values = dict.fromkeys(files, 0.65)
    path = write_results(
        layout, "full", {"imaging_quality": values}, stated={"imaging_quality": 0.65}
    )
    with pytest.raises(InputFileError, match=r"states a mean of 0\.6500, its clips have 0\.0065"):
        read_results(path.parent)


def test_dynamic_degree_is_true_or_false(layout, files):
    both(layout, files, "dynamic_degree", [True] * 3 + [False] * 3, [False] * 5 + [True])
    found = joined(layout)
    assert found.means["packcache"]["dynamic_degree"] == pytest.approx(3 / 6)
    assert found.means["full"]["dynamic_degree"] == pytest.approx(1 / 6)
    against = found.against["packcache"]["dynamic_degree"]
    assert (against.higher, against.lower, against.images) == (2, 1, 3)


def test_camera_motion_has_means_by_class_before_its_clips(layout, files):
    both(layout, files, "camera_motion", [1.0] * 6, [1.0, 0.0] * 3)
    path = layout.results / "full" / "results_eval_results.json"
    assert "NaN" in path.read_text() and len(json.loads(path.read_text())["camera_motion"]) == 3
    found = joined(layout)
    assert found.means["full"]["camera_motion"] == 0.5
    assert found.against["packcache"]["camera_motion"].mean == 0.5


def test_what_vbench_was_asked_lies_beside_its_results_and_is_passed_over(layout, files):
    both(layout, files, "i2v_subject", [0.9] * 6, [0.8] * 6)
    for label in ("full", "packcache"):
        (layout.results / label / "results_full_info.json").write_text('[{"prompt_en": "a"}]')
    assert joined(layout).clips == {"i2v_subject": 6}


def test_dimensions_may_come_in_several_files_but_each_once(layout, files):
    for dimension in ("i2v_subject", "i2v_background"):
        values = {dimension: dict.fromkeys(files, 0.9)}
        path = write_results(layout, "full", values, name=f"{dimension}_eval_results.json")
    assert set(read_results(path.parent)) == {"i2v_subject", "i2v_background"}
    write_results(layout, "full", values, name="later_eval_results.json")
    said = r"i2v_background is in i2v_background_eval\S+ and in later_eval\S+ of .*: keep one"
    with pytest.raises(InputFileError, match=said):
        read_results(path.parent)


def test_a_stated_mean_pooled_over_frames_is_noted_and_clips_count(layout, files):
    dimension = "subject_consistency"
    for label in ("full", "packcache"):
        values = {dimension: dict.fromkeys(files, 0.90)}
        write_results(layout, label, values, stated={dimension: 0.91})
    found = joined(layout)
    assert found.means["full"][dimension] == pytest.approx(0.90)
    said = "VBench states 0.9100, its clips have 0.9000 (it may pool over frames); the latter"
    assert any(f"{dimension} of full: {said}" in note for note in found.notes)


# --- aggregates -------------------------------------------------------------------------------


def test_a_missing_dimension_is_no_zero_and_no_total(layout, files):
    nine = {d: dict.fromkeys(files, 50.0 if d == "imaging_quality" else 0.5) for d in NINE}
    for label in ("full", "packcache"):
        write_results(layout, label, nine)
    whole = joined(layout)
    del nine["camera_motion"]
    write_results(layout, "packcache", nine)
    part = joined(layout)
    assert whole.aggregates()["full"][0].value is not None
    for label in ("full", "packcache"):
        official, weighted, _ = part.aggregates()[label]
        assert official.value is None and weighted.value is not None
    assert "camera_motion is left out: no results of packcache" in part.notes
    text = "\n".join(part.lines())
    assert "official Total (not computed without camera_motion)" in text
    assert "official weights over the 8 present dimensions" in text
    assert "plain mean of 7 raw values (paper-like, unconfirmed)" in text
    assert "overall" not in (text + json.dumps(part.to_json())).lower()


def test_consistency_without_motion_is_noted(layout, files):
    both(layout, files, "subject_consistency", [0.9] * 6, [0.8] * 6)
    assert any(note.startswith("dynamic degree was not measured") for note in joined(layout).notes)
    both(layout, files, "dynamic_degree", [True] * 6, [True] * 6)
    assert joined(layout).notes == []


def test_the_result_is_plain_data(layout, files):
    both(layout, files, "aesthetic_quality", [0.6] * 6, [0.5] * 6)
    told = json.loads(json.dumps(joined(layout).to_json()))
    assert told["schema"] == "packcache.vbench.scores/1"
    full, packed = told["results"]
    assert full["policy"] == "full" and full["against_reference"] == {}
    assert packed["made"]["label"] == "packcache"
    assert packed["against_reference"]["aesthetic_quality"]["images"] == 3
    assert packed["aggregates"]["official_total"]["value"] is None
    assert packed["aggregates"]["plain_mean"]["dimensions"] == ["aesthetic_quality"]


# --- joining ----------------------------------------------------------------------------------


def test_clips_that_a_policy_lacks_are_left_out_for_all(layout, files):
    write_results(layout, "full", {"aesthetic_quality": dict.fromkeys(files, 0.5)})
    some = dict.fromkeys(files[:4], 0.75)
    write_results(layout, "packcache", {"aesthetic_quality": some})
    found = joined(layout)
    assert found.clips == {"aesthetic_quality": 4}
    assert "aesthetic_quality: 2 clips of full are left out, others lack them" in found.notes
    assert found.against["packcache"]["aesthetic_quality"].images == 2


def test_clips_are_joined_by_seed_not_by_index(tmp_path):
    """Clip 1 of seed 0 and clip 0 of seed 1 are the same question."""
    chosen = draw(tmp_path / "suite", count=1, clips=2)
    layout = Layout(out=tmp_path / "out")
    export(chosen, layout.out, "full", making(), seed=0)
    export(chosen, layout.out, "packcache", making(), seed=1)
    names = [clip_name(chosen.entries[0].prompt, index) for index in range(2)]
    write_results(layout, "full", {"aesthetic_quality": dict(zip(names, (0.1, 0.5), strict=True))})
    ours = {"aesthetic_quality": dict(zip(names, (0.6, 0.9), strict=True))}
    write_results(layout, "packcache", ours)
    found = collect(layout.out)
    assert found.clips == {"aesthetic_quality": 1}
    assert found.against["packcache"]["aesthetic_quality"].mean == pytest.approx(0.1)


def test_nothing_in_common_is_one_line(layout, files):
    write_results(layout, "full", {"aesthetic_quality": {files[0]: 0.5}})
    write_results(layout, "packcache", {"aesthetic_quality": {files[1]: 0.5}})
    with pytest.raises(InputError, match="no clip of aesthetic_quality is in the results of every"):
        joined(layout)
    write_results(layout, "packcache", {"i2v_subject": {files[0]: 0.5}})
    with pytest.raises(InputError, match="no dimension has results of every policy: run VBench"):
        joined(layout)


def test_a_policy_without_results_is_left_out_and_noted(layout, files):
    write_results(layout, "full", {"aesthetic_quality": dict.fromkeys(files, 0.5)})
    found = joined(layout)
    assert found.policies == ("full",)
    assert found.notes[0].startswith("packcache is left out: no folder ")
    assert "  full  0.5000" in found.lines()


def test_the_reference_must_be_there(layout, files):
    with pytest.raises(InvalidSetting, match="reference 'best' is none of full, packcache"):
        joined(layout, reference="best")
    with pytest.raises(InputError, match="full does not exist: let VBench write its results there"):
        joined(layout)


# --- damaged files ----------------------------------------------------------------------------

GOOD = {"video_path": "a-0.mp4", "video_results": 0.5}


@pytest.mark.parametrize(
    "told, text",
    [
        ("no", r"is not JSON \("),
        ("3", "is of something else: expected what VBench's evaluation writes"),
        ({"beauty": [0.5, [GOOD]]}, "unknown dimension 'beauty': known are subject_consistency"),
        ({"i2v_subject": 0.5}, "i2v_subject is not as VBench writes it: expected"),
        ({"i2v_subject": [0.5]}, "i2v_subject is not as VBench writes it"),
        ({"i2v_subject": [0.5, []]}, "i2v_subject is not as VBench writes it"),
        ({"i2v_subject": [0.5, [{"video_path": "a"}]]}, "i2v_subject is not as VBench writes it"),
        ({"i2v_subject": [0.5, [GOOD, GOOD]]}, "i2v_subject has clip 'a-0.mp4' twice"),
        (
            {"i2v_subject": [0.5, [{**GOOD, "video_results": "True"}]]},
            "i2v_subject of 'a-0.mp4' is 'True', expected a number",
        ),
        (
            {"i2v_subject": [0.5, [{**GOOD, "video_results": float("nan")}]]},
            "i2v_subject of 'a-0.mp4' is nan, expected a number",
        ),
        (
            {"i2v_subject": [0.5, [{**GOOD, "video_results": 65.0}]]},
            "i2v_subject of 'a-0.mp4' is 65, expected 0 to 1",
        ),
        (
            {"imaging_quality": [0.5, [{**GOOD, "video_results": 165.0}]]},
            "imaging_quality of 'a-0.mp4' is 165, expected 0 to 100",
        ),
        (
            {"i2v_subject": [float("nan"), [GOOD]]},
            "i2v_subject of 'the mean' is nan, expected a number",
        ),
        ({"i2v_subject": [0.9, [GOOD]]}, "states a mean of 0.9000, its clips have 0.5000: they"),
        ("[]", "holds no results: expected what VBench's evaluation writes"),
    ],
    ids=str,
)
def test_a_damaged_file_is_one_line(tmp_path, told, text):
    path = tmp_path / "results_eval_results.json"
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    with pytest.raises(InputFileError) as error:
        read_results(tmp_path)
    assert text.replace("\\(", "(") in str(error.value) and len(str(error.value).splitlines()) == 1


def test_results_of_other_clips_are_refused(layout, files):
    write_results(layout, "full", {"i2v_subject": {"another-0.mp4": 0.5}})
    with pytest.raises(InputFileError, match=r"has clip 'another-0\.mp4', which was not exported"):
        joined(layout)


def test_paths_of_other_systems_are_read(tmp_path):
    told = {"i2v_subject": [0.5, [{**GOOD, "video_path": "C:\\clips\\full\\a-0.mp4"}]]}
    (tmp_path / "a.json").write_text(json.dumps(told))
    assert read_results(tmp_path)["i2v_subject"].values == {"a-0.mp4": 0.5}
