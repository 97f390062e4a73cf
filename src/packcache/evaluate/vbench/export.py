"""Clips as VBench wants them: one folder a policy, one encoder setting, nothing else in there.

    make = generated(packcache.load("digits"), sample, policy="packcache", frames=24)
    export(sample, Path("vbench"), "packcache", make, workload={"policy": "packcache"})

All clips are H.264 yuv420p of one setting (`encode`), at their true rate, with all frames: the
encoder moves scores as much as a policy may (evaluation 2). A clip appears under its name whole,
and is made once: asked again, a run makes what is missing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from packcache import files, video
from packcache.environment import environment
from packcache.errors import (
    GenerationError,
    InputError,
    InputFileError,
    InvalidSetting,
    OutputError,
)
from packcache.evaluate.vbench.manifest import Manifest, Mode, Row, Source, read_manifest
from packcache.evaluate.vbench.names import Layout, clip_name
from packcache.evaluate.vbench.probe import probe
from packcache.evaluate.vbench.records import hash_file
from packcache.evaluate.vbench.suite import Entry, Sample, read_sample
from packcache.video import Frames, write_mp4

if TYPE_CHECKING:
    from packcache.lumos.pipeline import Pipeline
    from packcache.policies import Policy

__all__ = ["Made", "Maker", "begin", "export", "generated", "taken"]

#: Endings of clips that can be taken; a folder of PNG has none.
_ENDINGS = ("", ".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """A clip before it is encoded: `frames [T, H, W, 3]` uint8, and where it comes from."""

    frames: Frames
    fps: float
    source: Source
    environment: dict[str, Any] | None = None


#: Makes the clip of an entry, by its index and seed.
Maker = Callable[[Entry, int, int], Made]


def generated(
    pipeline: Pipeline, sample: Sample, *, policy: Policy | str, **settings: Any
) -> Maker:
    """Clips from a pipeline; settings as for `Pipeline.generate`."""

    def make(entry: Entry, index: int, seed: int) -> Made:
        clip = pipeline.generate(
            entry.caption, image=sample.image(entry), policy=policy, seed=seed, **settings
        )
        return Made(
            frames=clip.frames,
            fps=clip.fps,
            source="generated",
            environment=environment(clip.device, clip.dtype),
        )

    return make


def taken(folder: Path, sample: Sample, *, fps: float | None = None) -> Maker:
    """Clips that exist: PROMPT-INDEX with the ending of a video, or a folder of PNG.

    `fps` is of clips that do not say their own. Raises InputFileError if one is missing.
    """
    for entry, index in sample.asked():
        _find(folder, entry, index)

    def make(entry: Entry, index: int, seed: int) -> Made:
        path = _find(folder, entry, index)
        frames, own = video.read_video(path)
        rate = own or fps
        if rate is None:
            raise InvalidSetting(f"{path} does not say its frames a second: give fps")
        return Made(frames=frames, fps=rate, source="pictures" if path.is_dir() else "video")

    return make


def _find(folder: Path, entry: Entry, index: int) -> Path:
    stem = Path(clip_name(entry.prompt, index)).stem
    for ending in _ENDINGS:
        path = folder / f"{stem}{ending}"
        if path.is_file() if ending else path.is_dir():
            return path
    raise InputFileError(f"{folder} has no clip {stem!r}: expected a video, or a folder of PNG")


def begin(sample: Sample, out: Path, mode: Mode) -> Layout:
    """Make the folder of exports, or find the one that was begun with the same sample and mode.

    Everything that can be known to be wrong is found here, before any clip is made.
    """
    if mode not in get_args(Mode):
        raise InvalidSetting(f"mode is {mode!r}, expected {' or '.join(get_args(Mode))}")
    if mode == "custom" and sample.draw.get("camera"):
        raise InvalidSetting(
            "the sample has camera prompts, which VBench would score in every dimension in custom "
            "mode: use standard, or draw without"
        )
    sample.check()
    files.check_output_folder(out)
    out.mkdir(exist_ok=True)
    layout = Layout(out=out)
    told = sample.to_json(out)
    if not layout.sample.exists():
        files.write_json(told, layout.sample)
    elif _deciding(read_sample(layout.sample).to_json(out)) != _deciding(told):
        raise InputError(f"{out} was begun with another sample: give that one, or another folder")
    if mode == "custom":
        _copy_images(sample, layout)
    return layout


def _deciding(told: Mapping[str, Any]) -> dict[str, Any]:
    """A sample without where its images lie."""
    return {key: value for key, value in told.items() if key != "images"}


def _copy_images(sample: Sample, layout: Layout) -> None:
    """Each prompt's image under its name, as VBench looks for it in custom mode."""
    layout.images.mkdir(exist_ok=True)
    for entry in sample.entries:
        target = layout.images / f"{entry.prompt}.png"
        if not target.exists():
            with _placing(target, layout.out) as draft:
                video.read_image(sample.image(entry)).save(draft)


@contextmanager
def _placing(target: Path, outside: Path) -> Iterator[Path]:
    """A temporary name that takes its place at the end; in a folder apart, which VBench never sees.

    Raises OutputError.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".", suffix=files.PARTIAL, dir=outside) as work:
            draft = Path(work) / f"draft{target.suffix}"
            yield draft
            files.take_place(draft, target)
    except OSError as error:
        raise OutputError(f"cannot write {target} ({error.strerror or error})") from error


def export(
    sample: Sample,
    out: Path,
    label: str,
    make: Maker,
    *,
    workload: Mapping[str, Any] | None = None,
    seed: int = 0,
    mode: Mode = "standard",
    on_clip: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Make what is missing of a policy's clips.

    Args:
        label: the policy, as it is called in results.
        make: see `generated` and `taken`.
        workload: what else decides the clips, in plain values; it must be the same when asked
            again.
        seed: of clips 0; clip i has seed + i, the same for every policy.
        on_clip: called with clips done and clips asked.

    Raises OutputError where another process is at work on the same policy.
    """
    layout = begin(sample, out, mode)
    held = files.lock(layout.lock(label))
    if held is None:
        raise OutputError(f"{layout.clips(label)} is in use by another process: wait for it")
    try:
        common = {**(workload or {}), "label": label, "seed": seed, "mode": mode}
        manifest = _open(layout, label, common)
        asked = list(sample.asked())
        for done, (entry, index) in enumerate(asked, 1):
            if not _is_there(layout, manifest, clip_name(entry.prompt, index)):
                _add(layout, manifest, entry, index, seed + index, make)
            if on_clip:
                on_clip(done, len(asked))
    finally:
        held.release()
    return manifest


def _open(layout: Layout, label: str, workload: dict[str, Any]) -> Manifest:
    path = layout.manifest(label)
    for folder in (path.parent, layout.clips(label)):
        folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        manifest = Manifest(workload=workload)
        manifest.save(path)
        return manifest
    manifest = read_manifest(path)
    manifest.check_same(workload, path)
    return manifest


def _is_there(layout: Layout, manifest: Manifest, name: str) -> bool:
    """The file stands and is the one that was made."""
    row, path = manifest.rows.get(name), layout.clips(manifest.label) / name
    return row is not None and path.is_file() and hash_file(path) == row.sha256


def _add(
    layout: Layout, manifest: Manifest, entry: Entry, index: int, seed: int, make: Maker
) -> None:
    made = make(entry, index, seed)
    target = layout.clips(manifest.label) / clip_name(entry.prompt, index)
    with _placing(target, layout.out) as draft:
        write_mp4(made.frames, draft, made.fps)
        facts, sha256 = probe(draft), hash_file(draft)
        if facts.frames != len(made.frames):
            raise GenerationError(
                f"{target.name}: {facts.frames} of {len(made.frames)} frames were encoded"
            )
    manifest.rows[target.name] = Row(
        file=target.name,
        prompt=entry.prompt,
        index=index,
        seed=seed,
        image=entry.image,
        caption=entry.caption,
        sha256=sha256,
        source=made.source,
        environment=manifest.place(made.environment),
        facts=facts,
    )
    manifest.save(layout.manifest(manifest.label))
