"""The checkpoint: every byte comes back, every frame goes on the same, and damage is named."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import logging
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import packcache as pc
from packcache.cache import FrameCache
from packcache.errors import InputError, InputFileError, InvalidSetting, OutputError
from packcache.files import PARTIAL, lock
from packcache.lumos import journal, saved, sealed
from packcache.lumos.decode import FrameResult
from packcache.lumos.journal import LOCK, SLOTS, Journal, frame_bytes, has_state, remove
from packcache.policies import FullCache, NoHistory, PackCache, Policy, SlidingWindow
from tests.test_cache import POLICIES
from tests.tools import PROMPTS, Recorder, bits, kv_bytes_of, picture, recorder, trained_on

pytestmark = pytest.mark.filterwarnings("ignore::packcache.cache.TrainedRangeWarning")

#: A small clip: few steps are enough, the K/V of a commit does not know how many there were.
STEPS = 1

#: Between them: both position modes, both rules, with and without image, guidance, and prompts.
SETTINGS = {
    "trained": {"prompts": PROMPTS[:1]},
    "slide-image-unguided": {"rebase": "slide", "image": True, "guidance": 1.0},
    "absolute-batch": {"positions": "absolute", "prompts": PROMPTS[:2]},
    "trained-image-batch": {"image": True, "prompts": PROMPTS[:2]},
    "slide-batch-unguided": {"rebase": "slide", "prompts": PROMPTS[:2], "guidance": 1.0},
}

#: Long enough for evictions, and for a rebase on a model trained on 4.
LATENTS = 7


def opened(
    folder: Path,
    model,
    policy: Policy | None = None,
    *,
    resume: bool = False,
    latents: int | None = LATENTS,
    image: bool = False,
    given: torch.Tensor | None = None,
    **settings,
) -> tuple[Recorder, Journal, Iterator[FrameResult]]:
    """A run, its checkpoint, and its frames to come."""
    settings.setdefault("steps", STEPS)
    run = recorder(model, policy or PackCache(), **settings)
    run.latents = latents
    given = picture(model, len(run.prefixes)) if image else given
    journal = Journal(folder, run, {"seeds": [0]}, resume=resume)
    return run, journal, journal.record(run.frames(given))


def begin(*args, **settings) -> tuple[Recorder, Iterator[FrameResult]]:
    run, _, frames = opened(*args, **settings)
    return run, frames


def state_of(caches: list[FrameCache]) -> list[tuple]:
    """All that the rest of a clip depends on."""
    return [
        (
            cache.summary(),
            [(e.span.role, e.span.frame, e.start, e.held.tolist()) for e in cache.timeline.entries],
            [
                None if a is None else a.tobytes()
                for e in cache.timeline.entries
                for a in (e.rank, e.span.visible, e.span.ids)
            ],
            cache.timeline.counters(),
            [bits(layer) for anchors in cache._anchors for layer in anchors._layers],
        )
        for cache in caches
    ]


def same(one: FrameResult, other: FrameResult) -> bool:
    """The same frame at the same cost; seconds may differ."""
    rest = ("frame", "given", "kept", "kv_bytes", "capacity_bytes", "logical_length")
    return torch.equal(one.ids, other.ids) and all(
        getattr(one, name) == getattr(other, name)
        for name in (*rest, "physical_length", "rebase_frames")
    )


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Nothing here pulls a plug."""
    monkeypatch.setattr(sealed.os, "fsync", lambda handle: None)


class Story:
    """An uninterrupted run with everything kept: the folder and the state after each frame."""

    def __init__(
        self, folder: Path, model, policy: Policy, *, copies: Sequence[int], **settings
    ) -> None:
        self.folder, self.again = folder, (model, policy, settings)
        run, journal, frames = opened(folder / "live", model, policy, **settings)
        self.results, self.states, self.kv = [], [], []
        for result in frames:
            self.results.append(result)
            self.states.append(state_of(run.caches))
            self.kv.append(kv_bytes_of(run))
            journal.close()  # what it writes next does not ask for the lock again
            self.check_bytes(*self.resumed("live")[:2], result.frame)
            if result.frame + 1 in copies:
                shutil.copytree(folder / "live", folder / str(result.frame + 1))

    def resumed(self, name: str) -> tuple[Recorder, Journal, Iterator[FrameResult]]:
        model, policy, settings = self.again
        return opened(self.folder / name, model, policy, resume=True, **settings)

    def check_bytes(self, run: Recorder, journal: Journal, newest: int) -> None:
        """What was taken up is what was held."""
        assert run.frame == journal.frame == newest + 1
        assert kv_bytes_of(run) == self.kv[newest]
        assert state_of(run.caches) == self.states[newest]
        journal.close()

    def check_rest(self, frame: int, *, ahead: int | None = None) -> None:
        """Resumed after `frame` frames, the next ones (None: all) are the same, byte for byte."""
        run, _, frames = self.resumed(str(frame))
        count = len(self.results) if ahead is None else min(frame + ahead, len(self.results))
        for number, want in enumerate(self.results[:count]):
            result = next(frames)
            assert same(result, want)
            if number < frame:
                assert result.seconds == want.seconds
            else:
                assert kv_bytes_of(run) == self.kv[number]
        frames.close()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("policy", [*POLICIES, PackCache(order="novelty")], ids=repr)
def test_every_byte_comes_back_after_every_frame(tiny, tmp_path, policy, settings):
    """All policies, modes, rules, branches, prompts; then the next frame is made of the same."""
    story = Story(tmp_path, trained_on(tiny, 4), policy, copies=[5], **settings)
    story.check_rest(5, ahead=1)


@pytest.mark.parametrize("settings", ["trained", "trained-image-batch"])
def test_the_rest_of_the_clip_is_the_same_from_every_frame(tiny, tmp_path, settings):
    policy = PackCache(n_sinks=1, window=2)
    frames = range(1, LATENTS + 1)
    given = {**SETTINGS[settings], "steps": 3}  # so that frames after the first draw otherwise
    story = Story(tmp_path, trained_on(tiny, 4), policy, copies=frames, **given)
    assert story.results[-1].rebase_frames > 0
    for frame in frames:
        story.check_rest(frame)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_comes_back(tiny, tmp_path, dtype):
    model = trained_on(copy.deepcopy(tiny).to(dtype), 4)
    story = Story(tmp_path, model, PackCache(), copies=[5], latents=6, image=True)
    story.check_rest(5)


def test_given_frames_go_on_in_their_middle(tiny, tmp_path):
    """A clip that starts with several frames, cut while they were committed."""
    given = torch.cat([picture(tiny), picture(tiny).flip(-1), picture(tiny).flip(-2)], dim=1)
    frames, settings = range(1, 6), {"latents": 6, "given": given}
    story = Story(tmp_path, trained_on(tiny, 4), PackCache(), copies=frames, **settings)
    assert [r.given for r in story.results] == [True] * 3 + [False] * 3
    for frame in frames:
        story.check_rest(frame)


def test_a_checkpoint_without_a_frame_begins_again(tiny, tmp_path):
    begin(tmp_path / "c", tiny)[1].close()
    _, frames = begin(tmp_path / "c", tiny, resume=True)
    _, fresh = begin(tmp_path / "d", tiny)
    assert all(same(a, b) for a, b in zip(frames, fresh, strict=True))


def test_a_clip_may_go_on_longer_and_longer(tiny, tmp_path):
    """How long it will be is no part of what it is; a shorter one shows its frames only."""
    whole = list(begin(tmp_path / "whole", tiny, latents=9)[1])
    for latents in (2, 5, 3, 9):
        frames = list(begin(tmp_path / "c", tiny, latents=latents, resume=latents > 2)[1])
        assert [f.frame for f in frames] == list(range(latents))
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(frames, whole, strict=False))


# --- through the pipeline -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def gen():
    return pc.load("digits")


PROMPT = "a red 3 moving right"


def test_generate_and_stream_return_the_whole_clip(gen, tmp_path):
    settings = {"frames": 10, "steps": 1}
    whole = gen.generate(PROMPT, **settings)
    first = iter(gen.run([PROMPT], checkpoint=tmp_path / "c", **settings))
    assert [next(first).frame for _ in range(2)] == [0, 1]
    del first  # abandoned: its lock goes with it
    streamed = gen.stream(PROMPT, checkpoint=tmp_path / "c", resume=True, **settings)
    assert np.array_equal(np.stack(list(streamed)), whole.frames)
    clip = gen.generate(PROMPT, checkpoint=str(tmp_path / "c"), resume=True, **settings)
    assert torch.equal(clip.codes, whole.codes)
    for name in ("kept", "kv_bytes", "capacity_bytes", "physical_length", "rebase_frames"):
        assert getattr(clip.stats, name) == getattr(whole.stats, name)
    assert clip.stats.prefill_s > 0 and len(clip.stats.frame_s) == 4


def test_resume_needs_a_folder(gen):
    with pytest.raises(InvalidSetting, match="resume without a checkpoint: name the folder that"):
        gen.run([PROMPT], frames=5, resume=True)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"steps": 2}, r"sampling\.steps is 1 there, 2 here; use its settings"),
        ({"seed": 4}, r"seeds is \[0\] there, \[4\] here"),
        ({"policy": FullCache()}, r"policy is 'PackCache\(budget=1, window=4\)' there, 'FullCache"),
        ({"positions": "absolute"}, "positions is 'rebase' there, 'absolute' here"),
        ({"rebase": "slide"}, "rebase is 'trained' there, 'slide' here"),
        ({"reuse": "rest_every=2"}, r"reuse\.rest_every is 1 there, 2 here"),
        ({"fps": 6}, "fps is 12 there, 6 here; prompt is .* there"),
        ({"seconds": 1}, "seconds is 2 there, 1 here"),
        ({"size": (64, 96)}, "width is 96 there, 64 here"),
        ({"video": np.zeros((1, 96, 96, 3), np.uint8)}, "image or video is None there, '"),
        ({"steps": 3, "seed": 1}, r"steps is 1 there, 3 here; seeds is \[0\] there, \[1\] here"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_a_checkpoint_of_other_settings_is_refused_by_name_and_hash(gen, tmp_path, change, words):
    settings = {"frames": 5, "steps": 1}
    next(gen.run([PROMPT], checkpoint=tmp_path / "c", **settings).results())
    with pytest.raises(InputError, match=words) as error:
        gen.run([PROMPT], checkpoint=tmp_path / "c", resume=True, **{**settings, **change})
    assert len(str(error.value).splitlines()) == 1
    assert "is of another run, " in str(error.value)
    gen.run([PROMPT], checkpoint=tmp_path / "c", resume=True, **settings)


def test_seconds_that_follow_the_frames_are_stated_to_make_a_clip_longer(gen, tmp_path):
    """Models that state the clip's own duration tell a longer clip otherwise in their prompt."""
    lumos = dataclasses.replace(gen, seconds=None)
    settings = {"steps": 1, "checkpoint": tmp_path / "c"}
    first = list(lumos.run([PROMPT], frames=5, **settings))
    words = (
        r"seconds is 1 there, 2 here; .*; state --seconds 1 \(seconds=1\) to make it longer, use "
    )
    with pytest.raises(InputError, match=words) as error:
        lumos.run([PROMPT], frames=24, resume=True, **settings)
    assert len(str(error.value).splitlines()) == 1
    longer = list(lumos.run([PROMPT], frames=24, seconds=1, resume=True, **settings))
    assert len(longer) == 7
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, longer, strict=False))


def test_a_checkpoint_of_another_prompt_or_model_or_version_is_refused(gen, tmp_path, monkeypatch):
    settings = {"frames": 5, "steps": 1, "checkpoint": tmp_path / "c"}
    next(gen.run([PROMPT], **settings).results())
    with pytest.raises(InputError, match=r"prompts is \['a red 3 moving right'\] there, \['a blu"):
        gen.run(["a blue 5"], resume=True, **settings)
    other = copy.copy(gen)
    object.__setattr__(other, "model", copy.deepcopy(gen.model))
    other.model.lm_head.weight.data[0, 0] += 1
    with pytest.raises(InputError, match=r"model is '[0-9a-f]{16}' there, '[0-9a-f]{16}' here"):
        other.run([PROMPT], resume=True, **settings)
    monkeypatch.setattr(pc, "__version__", "9.9")
    with pytest.raises(InputError, match=r"packcache is '.*' there, '9\.9' here"):
        gen.run([PROMPT], resume=True, **settings)


# --- the folder ---------------------------------------------------------------------------------


def test_a_folder_that_is_taken_is_refused(tiny, tmp_path):
    list(begin(tmp_path / "c", tiny, latents=2)[1])
    with pytest.raises(OutputError, match="holds a checkpoint already: add --resume to go on"):
        begin(tmp_path / "c", tiny)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match=r"not empty and no checkpoint, it holds letter\.txt: ch"):
        begin(tmp_path / "d", tiny)
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["letter.txt"]
    with pytest.raises(OutputError, match="is a file, expected a folder for the checkpoint"):
        begin(tmp_path / "d" / "letter.txt", tiny)
    with pytest.raises(OutputError, match="does not exist: create it or choose another"):
        begin(tmp_path / "no" / "where", tiny)


@pytest.mark.parametrize("name, words", [("d", "holds no checkpoint"), ("no", "is no folder")])
def test_nothing_to_resume_is_said(tiny, tmp_path, name, words):
    (tmp_path / "d").mkdir()
    with pytest.raises(InputFileError, match=f"{words}, expected one to resume: check the name"):
        begin(tmp_path / name, tiny, resume=True)
    assert not any((tmp_path / "d").iterdir())


def test_a_folder_has_a_state_once_there_is_a_manifest(tiny, tmp_path):
    assert not has_state(tmp_path / "c")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / LOCK).touch()
    assert not has_state(tmp_path / "c")
    _, frames = begin(tmp_path / "c", tiny)
    assert has_state(tmp_path / "c")
    next(frames)
    (tmp_path / "c" / SLOTS[0]).unlink()
    assert has_state(str(tmp_path / "c"))


def test_a_folder_killed_before_its_first_manifest_is_taken_up_as_new(tiny, tmp_path):
    begin(tmp_path / "c", tiny)[1].close()
    (tmp_path / "c" / SLOTS[0]).rename(tmp_path / "c" / (SLOTS[0] + PARTIAL))
    for name in ("codes.bin", "results.jsonl"):
        (tmp_path / "c" / (name + PARTIAL)).touch()
    assert not has_state(tmp_path / "c")
    assert len(list(begin(tmp_path / "c", tiny, latents=3)[1])) == 3


def test_two_runs_never_share_a_folder(tiny, tmp_path):
    _, frames = begin(tmp_path / "c", tiny)
    next(frames)
    for resume in (False, True):
        with pytest.raises(OutputError, match="c is in use by another process: wait for it, or ch"):
            begin(tmp_path / "c", tiny, resume=resume)
    remove(tmp_path / "c")  # not now
    assert has_state(tmp_path / "c")
    frames.close()
    assert len(list(begin(tmp_path / "c", tiny, resume=True)[1])) == LATENTS


def test_a_run_that_is_never_asked_for_a_frame_holds_nothing(tiny, tmp_path):
    kept = [begin(tmp_path / "c", tiny)]
    kept += [begin(tmp_path / "c", tiny, resume=True) for _ in range(2)]
    assert len(list(begin(tmp_path / "c", tiny, resume=True)[1])) == LATENTS
    for _, frames in kept:
        with pytest.raises(OutputError, match=r"was changed by another run .*: resume once more"):
            next(frames)
    assert len(list(begin(tmp_path / "c", tiny, resume=True)[1])) == LATENTS  # and lets go of it


def test_a_folder_that_is_in_use_when_the_first_frame_is_asked_for(tiny, tmp_path):
    _, late = begin(tmp_path / "c", tiny)
    _, frames = begin(tmp_path / "c", tiny, resume=True)
    next(frames)
    with pytest.raises(OutputError, match="c is in use by another process: wait for it, or choose"):
        next(late)


@pytest.mark.parametrize("name", ["codes.bin", "results.jsonl"])
def test_a_file_that_vanishes_before_the_first_frame_is_said(tiny, tmp_path, name):
    list(begin(tmp_path / "c", tiny, latents=2)[1])
    _, frames = begin(tmp_path / "c", tiny, latents=2, resume=True)
    (tmp_path / "c" / name).unlink()
    with pytest.raises(InputFileError, match=r"c cannot be read \(No such .*\): try again, or"):
        next(frames)


# --- gone ---------------------------------------------------------------------------------------


def test_a_removed_checkpoint_leaves_nothing(tiny, tmp_path):
    list(begin(tmp_path / "c", tiny, latents=3)[1])
    for name in ("codes.bin", SLOTS[1], "kv/000009.bin"):
        (tmp_path / "c" / (name + PARTIAL)).touch()
    remove(str(tmp_path / "c"))
    assert not any(tmp_path.iterdir())
    remove(tmp_path / "c")  # nothing to do


def test_removing_a_checkpoint_spares_the_files_of_others(tiny, tmp_path):
    list(begin(tmp_path / "c", tiny, latents=3)[1])
    others = ["letter.txt", "kv/letter.txt", "manifest.json", "old/codes.bin"]
    (tmp_path / "c" / "old").mkdir()
    for name in others:
        (tmp_path / "c" / name).write_text("dear")
    remove(tmp_path / "c")
    left = [path for path in (tmp_path / "c").rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(tmp_path / "c")) for path in left) == sorted(others)


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(tiny, tmp_path, monkeypatch, caplog):
    list(begin(tmp_path / "c", tiny, latents=2)[1])

    def refuse(*args, **settings):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    remove(tmp_path / "c")
    assert re.search(r"c cannot be removed \(Permission denied\): delete it yourself", caplog.text)


# --- a folder that cannot be used ---------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_said(tiny, tmp_path, monkeypatch):
    def refuse(*args, **settings):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(OutputError, match=r"cannot lock in .*c \(Permission denied\): use anot"):
        begin(tmp_path / "c", tiny)


def full_disk(monkeypatch, calls: int) -> None:
    """The disk is full from that fsync on."""
    left = [calls]

    def fsync(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sealed.os, "fsync", fsync)


@pytest.mark.parametrize("calls", range(6))  # two files and folders, two appended to
def test_a_full_disk_costs_no_finished_frame(tiny, tmp_path, monkeypatch, caplog, calls):
    """Whatever of the fourth frame's files cannot be written: one line, three frames are safe."""
    whole = list(begin(tmp_path / "whole", tiny)[1])
    _, frames = begin(tmp_path / "c", tiny)
    for _ in range(3):
        next(frames)
    with monkeypatch.context() as patch:
        full_disk(patch, calls)
        with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\): 3 "):
            next(frames)
    resumed = list(begin(tmp_path / "c", tiny, resume=True)[1])
    assert all(same(a, b) for a, b in zip(resumed, whole, strict=True))
    assert not caplog.records


def test_a_disk_that_fills_up_amid_a_tensor_leaves_nothing_half(tiny, tmp_path, monkeypatch):
    _, frames = begin(tmp_path / "c", tiny)
    next(frames)
    before = sorted(p.name for p in (tmp_path / "c").rglob("*"))
    with monkeypatch.context() as patch:
        left, raw = [5], saved.raw

        def fails(piece):
            left[0] -= 1
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return raw(piece)

        patch.setattr(saved, "raw", fails)
        with pytest.raises(OutputError, match="1 latent frames are safe in it: make room, resume"):
            next(frames)
    assert sorted(p.name for p in (tmp_path / "c").rglob("*")) == before


# --- damage -------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


NEWEST = f"kv/{4:06d}.bin"

DAMAGE = [
    (SLOTS[1], cut, r"manifest\.b\.json is unreadable"),
    (SLOTS[1], flip, r"manifest\.b\.json is unreadable"),
    (SLOTS[1], Path.unlink, r"manifest\.b\.json is missing"),
    (NEWEST, Path.unlink, r"000004\.bin is missing"),
    (NEWEST, cut, r"000004\.bin has \d+ bytes, expected \d+"),
    (NEWEST, flip, r"000004\.bin has CRC-32 [0-9a-f]{8}, expected [0-9a-f]{8}"),
    ("codes.bin", cut, r"codes\.bin has 317 bytes, expected 320"),
    ("results.jsonl", cut, r"results\.jsonl has \d+ bytes, expected \d+"),
]


@pytest.fixture(scope="module")
def five(tiny, tmp_path_factory):
    """A checkpoint after five frames, and the whole clip."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("five")
    whole = list(begin(folder / "whole", tiny)[1])
    _, frames = begin(folder / "c", tiny)
    for _ in range(5):
        next(frames)
    frames.close()
    return folder / "c", whole


@pytest.mark.parametrize("name, act, words", DAMAGE)
def test_a_damaged_newest_state_falls_back_to_the_one_before(
    tiny, five, tmp_path, caplog, name, act, words
):
    folder, whole = tmp_path / "c", five[1]
    shutil.copytree(five[0], folder)
    act(folder / name)
    run, frames = begin(folder, tiny, resume=True)
    assert run.frame == 4
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = rf"{folder} is damaged \({words}\): going on from the state after 4 latent frames"
    assert re.search(text, record.getMessage())
    assert all(same(a, b) for a, b in zip(frames, whole, strict=True))
    caplog.clear()
    assert len(list(begin(folder, tiny, resume=True)[1])) == LATENTS  # whole again
    assert not caplog.records


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    """A manifest with a right sum that says something else."""
    state = json.loads(path.read_bytes())["state"]
    state = change(state)
    told = {"state": state, "crc32": zlib.crc32(journal._canonical(state))}
    path.write_text(json.dumps(told))


SHAPES = {
    "no caches": lambda state: {k: v for k, v in state.items() if k != "caches"},
    "no identity": lambda state: {k: v for k, v in state.items() if k != "identity"},
    "something new": lambda state: {**state, "more": 1},
    "nothing": lambda state: None,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_manifest_of_another_shape_is_damage(tiny, five, tmp_path, shape):
    folder = tmp_path / "c"
    shutil.copytree(five[0], folder)
    for name in SLOTS:
        rewrite(folder / name, SHAPES[shape])
    words = r"manifest\.a\.json is (unreadable|incomplete); manifest\.b\.json is"
    with pytest.raises(InputFileError, match=rf"is damaged \({words}"):
        begin(folder, tiny, resume=True)


def test_a_checkpoint_of_another_format_is_refused_by_name(tiny, five, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(five[0], folder)
    for name in SLOTS:
        rewrite(
            folder / name,
            lambda state: {"identity": {**state["identity"], "format": "packcache.checkpoint/0"}},
        )
    with pytest.raises(InputError, match=r"format is 'packcache\.checkpoint/0' there"):
        begin(folder, tiny, resume=True)


@pytest.mark.parametrize(
    "names, words",
    [
        (SLOTS, r"manifest\.a\.json is unreadable; manifest\.b\.json is unreadable"),
        (["kv/text.bin"], r"text\.bin has CRC-32 .*; text\.bin has CRC-32"),
        (["codes.bin"], r"codes\.bin has CRC-32 .*; codes\.bin has CRC-32"),
    ],
)
def test_two_damaged_states_are_one_clear_line(tiny, five, tmp_path, names, words):
    folder = tmp_path / "c"
    shutil.copytree(five[0], folder)
    for name in names:
        flip(folder / name)
    with pytest.raises(InputFileError, match=rf"is damaged \({words}.*\), expected one whole"):
        begin(folder, tiny, resume=True)
    held = lock(folder / LOCK)  # refused, so not held
    assert held
    held.release()


def test_a_torn_tail_is_cut(tiny, five, tmp_path, caplog):
    """What was appended after the last manifest belongs to no state."""
    folder, whole = tmp_path / "c", five[1]
    shutil.copytree(five[0], folder)
    for name in ("codes.bin", "results.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(b"half a record" * 400)
    resumed = list(begin(folder, tiny, resume=True)[1])
    assert all(same(a, b) for a, b in zip(resumed, whole, strict=True))
    assert (folder / "codes.bin").stat().st_size == LATENTS * 16 * 4
    assert len((folder / "results.jsonl").read_bytes().splitlines()) == LATENTS
    assert not caplog.records


# --- how much -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize(
    "policy", [FullCache(), NoHistory(), SlidingWindow(), PackCache(budget=0.5, window=4)], ids=repr
)
def test_bytes_of_a_frame_are_those_on_the_disk(tiny, tmp_path, policy, prompts):
    run, frames = begin(tmp_path / "c", tiny, policy, prompts=PROMPTS[:prompts])
    codes = 0
    for result in frames:
        told = frame_bytes(
            run.layout,
            kept=result.kept.get(result.frame, 0),
            token_bytes=run.caches[0].token_bytes,
            prompts=prompts,
        )
        kv = tmp_path / "c" / "kv" / f"{result.frame:06d}.bin"
        size = (tmp_path / "c" / "codes.bin").stat().st_size
        assert told == (kv.stat().st_size if kv.exists() else 0) + size - codes
        codes = size


def test_an_endless_checkpoint_keeps_what_two_states_need(tiny, tmp_path):
    """Files, manifest and the journal's own memory stay as they are; codes are appended."""
    _, frames = begin(tmp_path / "c", tiny, latents=None, guidance=1.0)
    seen = []
    for result in frames:
        names = {path.stem for path in (tmp_path / "c" / "kv").iterdir()}
        manifest = (tmp_path / "c" / SLOTS[(result.frame + 1) % 2]).read_bytes()
        held = [set(json.loads(manifest)["state"]["files"])]
        if result.frame:
            other = (tmp_path / "c" / SLOTS[result.frame % 2]).read_bytes()
            held.append(set(json.loads(other)["state"]["files"]))
        assert names == set.union(*held)
        seen.append((len(names), len(manifest)))
        if result.frame == 60:
            break
    assert {count for count, _ in seen[8:]} == {6}  # text, four of the window, the one before
    assert seen[60][1] - seen[20][1] < 64


@given(st.integers(1, 4200), st.integers(0, 2**32))
def test_packed_offsets_come_back(tokens, seed):
    rng = np.random.default_rng(seed)
    offsets = np.flatnonzero(rng.random(tokens) < rng.random()).astype(np.int32)
    packed = saved.pack(offsets, tokens)
    assert np.array_equal(saved._unpack(packed, tokens), offsets)
    assert len(packed) <= tokens / 6 + 8


# --- mutations ----------------------------------------------------------------------------------


def test_a_journal_that_does_not_check_is_noticed(tiny, five, tmp_path, monkeypatch, caplog):
    """Mutation: without the CRC a flipped bit comes back as if nothing were."""
    folder = tmp_path / "c"
    shutil.copytree(five[0], folder)
    flip(folder / NEWEST)
    monkeypatch.setattr(sealed, "check", lambda *args, **settings: None)
    run, _ = begin(folder, tiny, resume=True)
    assert run.frame == 5 and not caplog.records


class Killed(BaseException):
    """A process that ends here."""


def killed_amid_manifest(tiny, folder: Path, monkeypatch, replace) -> None:
    """Five frames are durable; the sixth manifest is begun and never ended."""
    _, frames = begin(folder, tiny)
    for _ in range(5):
        next(frames)

    def stops(path: Path, pieces):
        if not path.name.startswith("manifest"):
            return replace(path, pieces)
        (piece,) = pieces

        def half():
            yield piece[: len(piece) // 2]
            raise Killed

        return replace(path, half())

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sealed, "replace", stops)
        next(frames)


def in_place(path: Path, pieces):
    """A file that has its name before it is written."""
    path.write_bytes(b"")
    data = b""
    for piece in pieces:
        data += bytes(piece)
        path.write_bytes(data)
    return sealed.extend(path, sealed.EMPTY, data)


def test_a_manifest_named_before_it_is_written_is_noticed(tiny, tmp_path, monkeypatch, caplog):
    """Mutation: the older state is destroyed too early, so that nothing would be left behind it."""
    killed_amid_manifest(tiny, tmp_path / "right", monkeypatch, sealed.replace)
    assert begin(tmp_path / "right", tiny, resume=True)[0].frame == 5
    assert not caplog.records
    killed_amid_manifest(tiny, tmp_path / "wrong", monkeypatch, in_place)
    assert begin(tmp_path / "wrong", tiny, resume=True)[0].frame == 5
    assert "manifest.a.json is unreadable" in caplog.text
