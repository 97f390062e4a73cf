"""The image suite of VBench-I2V, and the sample of it that every policy is asked.

    chosen = sample(Path("i2v-bench-info.json"), Path("crop/7-4"), count=160, seed=0)

The paper scored 160 images, which ones it does not say (evaluation 0.2, 8a). Which are drawn here
depends on their names and the seed alone, on no library's generator: images are put in the order of
a hash of both, so the same seed draws the same images everywhere and a smaller sample is a part of
a larger one. The suite is described by either of two files of VBench: `i2v-bench-info.json`, which
comes with the images, or `vbench2_i2v_full_info.json` of the checkout.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packcache.errors import InputError, InputFileError, InvalidSetting
from packcache.evaluate.vbench.names import MOST_CLIPS, name_fault, twins
from packcache.evaluate.vbench.records import hash_file
from packcache.files import read_json

__all__ = ["BACKGROUND", "CAMERA", "COUNT", "SCHEMA", "Entry", "Sample", "read_sample", "sample"]

SCHEMA = "packcache.vbench/1"

#: Images of the paper's protocol.
COUNT = 160

#: Types of images without a subject; only they have prompts for the camera.
BACKGROUND = ("architecture", "scenery", "indoor", "abstract")

#: What VBench adds to a caption to ask for a move of the camera.
CAMERA = (
    "camera pans left", "camera pans right", "camera tilts up", "camera tilts down",
    "camera zooms in", "camera zooms out", "camera static",
)  # fmt: skip

#: Prompt, file and type of an image, as either file calls them.
_KEYS = (("caption", "file_name", "type"), ("prompt_en", "image_name", "image_type"))

_SUITE = "i2v-bench-info.json or vbench2_i2v_full_info.json of VBench"
_CAPTIONS = "an object of texts by prompt"
_SAMPLE = f"a file of packcache vbench sample ({SCHEMA})"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One prompt: `prompt` names its clips, `caption` is told to the model, `image` is a file."""

    prompt: str
    caption: str
    image: str
    kind: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What every policy is asked: `clips` clips of each entry, from images in a folder.

    `suite` says what it was drawn from, `draw` how.
    """

    entries: tuple[Entry, ...]
    clips: int
    images: Path
    suite: dict[str, Any]
    draw: dict[str, Any]

    def to_json(self, beside: Path) -> dict[str, Any]:
        """Plain data for a file in folder `beside`, from where the images are looked for."""
        try:
            images = Path(os.path.relpath(self.images, beside))
        except ValueError:  # another drive
            images = self.images.absolute()
        return {
            "schema": SCHEMA,
            "suite": self.suite,
            "draw": self.draw,
            "clips": self.clips,
            "images": images.as_posix(),
            "entries": [asdict(entry) for entry in self.entries],
        }

    def image(self, entry: Entry) -> Path:
        return self.images / entry.image

    def asked(self) -> Iterator[tuple[Entry, int]]:
        """Every clip: its entry and its index."""
        return ((entry, index) for entry in self.entries for index in range(self.clips))

    def check(self) -> None:
        """Names that can be files, and images that are those of the draw. Raises InputError."""
        prompts = [entry.prompt for entry in self.entries]
        for prompt in prompts:
            if fault := name_fault(prompt):
                raise InputError(f"prompt {prompt[:60]!r} {fault}: clips cannot be called by it")
        if found := twins(prompts):
            raise InputError(f"prompt {found[0]!r} is there twice: clips cannot be told apart")
        for entry in self.entries:
            if hash_file(self.image(entry)) != entry.sha256:
                raise InputFileError(
                    f"{self.image(entry)} is not the image that was drawn: draw the sample again"
                )


@dataclass(frozen=True, kw_only=True)
class _Item:
    """An image of the suite."""

    prompt: str
    image: str
    kind: str

    def prompts(self, camera: bool) -> list[str]:
        moves = CAMERA if camera and self.kind in BACKGROUND else ()
        return [self.prompt, *(f"{self.prompt}, {move}" for move in moves)]


def sample(
    info: Path,
    images: Path,
    *,
    count: int = COUNT,
    seed: int = 0,
    clips: int = 1,
    camera: bool = False,
    captions: Path | None = None,
) -> Sample:
    """Draw images of the suite.

    Args:
        info: one of the two files that describe the suite.
        images: folder of the crop that fits the clips, such as crop/7-4 for 672x384.
        count, seed: how many images, and which.
        clips: of each prompt; VBench's own protocol has 5.
        camera: add the seven camera prompts of every image without a subject; without them there
            is no camera motion, and no official Total.
        captions: JSON, longer texts for the model by prompt; clips keep their prompt as name.
    """
    if not 1 <= clips <= MOST_CLIPS:
        raise InvalidSetting(f"clips is {clips}, expected 1 to {MOST_CLIPS}, which VBench looks at")
    items = _read_suite(info)
    if not 1 <= count <= len(items):
        raise InvalidSetting(f"count is {count}, expected 1 to {len(items)}, the images there are")
    longer = None if captions is None else _read_captions(captions)
    drawn = sorted(_ranked(items, seed)[:count], key=lambda item: item.prompt)
    chosen = Sample(
        entries=tuple(e for item in drawn for e in _entries(item, images, camera, longer)),
        clips=clips,
        images=images,
        suite={"file": info.name, "sha256": hash_file(info), "images": len(items)},
        draw={"count": count, "seed": seed, "camera": camera},
    )
    chosen.check()
    return chosen


def _ranked(items: Sequence[_Item], seed: int) -> list[_Item]:
    def place(item: _Item) -> str:
        return hashlib.sha256(f"{seed} {item.image}".encode()).hexdigest()

    return sorted(items, key=place)


def _entries(
    item: _Item, images: Path, camera: bool, longer: Mapping[str, str] | None
) -> list[Entry]:
    sha256 = hash_file(images / item.image)
    return [
        Entry(
            prompt=prompt,
            caption=prompt if longer is None else _caption(item, prompt, longer),
            image=item.image,
            kind=item.kind,
            sha256=sha256,
        )
        for prompt in item.prompts(camera)
    ]


def _caption(item: _Item, prompt: str, longer: Mapping[str, str]) -> str:
    """The longer text of a prompt; a camera prompt without one takes its image's, and the move."""
    if prompt in longer:
        return longer[prompt]
    if item.prompt in longer:
        return longer[item.prompt] + prompt.removeprefix(item.prompt)
    raise InputError(f"captions have none for prompt {item.prompt!r}: add it, or leave them out")


def _read_suite(path: Path) -> list[_Item]:
    told = read_json(path, _SUITE)
    if not isinstance(told, list) or not told:
        raise InputFileError(f"{path} holds no list of images: expected {_SUITE}")
    items = [
        _item(path, number, row)
        for number, row in enumerate(told)
        if not (isinstance(row, dict) and row.get("dimension") == ["camera_motion"])
    ]
    names = [item.image for item in items]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputFileError(f"{path} names image {twice!r} twice: expected {_SUITE}")
    return items


def _item(path: Path, number: int, row: Any) -> _Item:
    told = row if isinstance(row, dict) else {}
    for keys in _KEYS:
        texts = [told.get(key) for key in keys]
        if all(isinstance(text, str) and text for text in texts):
            prompt, image, kind = map(str, texts)
            if Path(image).name != image:
                raise InputFileError(f"{path} entry {number}: image {image!r} is no file name")
            return _Item(prompt=prompt, image=image, kind=kind)
    words = " or ".join(", ".join(keys) for keys in _KEYS)
    raise InputFileError(f"{path} entry {number}: expected texts named {words}")


def _read_captions(path: Path) -> dict[str, str]:
    told = read_json(path, _CAPTIONS)
    if not isinstance(told, dict) or not all(isinstance(text, str) for text in told.values()):
        raise InputFileError(f"{path} holds something else: expected {_CAPTIONS}")
    return told


def read_sample(path: Path) -> Sample:
    """A sample from its file; names and images are not looked at (`Sample.check`)."""
    told = read_json(path, _SAMPLE)
    try:
        if told["schema"] != SCHEMA:
            raise ValueError
        found = Sample(
            entries=tuple(Entry(**entry) for entry in told["entries"]),
            clips=told["clips"],
            images=path.parent / told["images"],
            suite=told["suite"],
            draw=told["draw"],
        )
        if not (found.entries and found.clips in range(1, MOST_CLIPS + 1)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise InputFileError(f"{path} is of something else: expected {_SAMPLE}") from None
    return found
