"""A suite of tiny images, a pipeline that takes no time, and results as VBench writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from packcache.evaluate.vbench import suite
from packcache.evaluate.vbench.export import Made, Maker, export
from packcache.evaluate.vbench.names import Layout
from packcache.video import Frames

#: Prompts as odd as a caption can be and still be a file name; all but two have a subject.
PROMPTS = ("a cat's gaze - 3", "é, a well-lit pier", "dots... and-12", "a street", "a hall")
KINDS = ("animal", "other", "food", "architecture", "indoor")


def write_suite(folder: Path, prompts: Sequence[str] = PROMPTS) -> tuple[Path, Path]:
    """The file that describes the suite, and the folder of its images."""
    images = folder / "crop"
    images.mkdir(parents=True)
    rows = []
    for number, prompt in enumerate(prompts):
        name = f"picture {number}.jpg"
        Image.new("RGB", (56, 32), (40 * number % 256, 90, 200)).save(images / name)
        kind = KINDS[number % len(KINDS)]
        rows.append({"file_name": name, "type": kind, "caption": prompt, "url": "unused"})
    info = folder / "i2v-bench-info.json"
    info.write_text(json.dumps(rows))
    return info, images


def draw(folder: Path, **settings: Any) -> suite.Sample:
    """A sample of a suite in that folder."""
    return suite.sample(*write_suite(folder), **{"count": 3, **settings})


def moving(count: int = 5, *, seed: int = 0, size: tuple[int, int] = (32, 32)) -> Frames:
    """Frames `[T, H, W, 3]` of a bar that moves."""
    frames = np.full((count, size[1], size[0], 3), (seed * 31) % 200 + 20, dtype=np.uint8)
    for number, frame in enumerate(frames):
        frame[:, number : number + 4] = 255
    return frames


class FakePipeline:
    """Clips in no time; `calls` holds what was asked."""

    name = "fake"

    def __init__(self, frames: int = 5, fps: int = 12) -> None:
        self.calls: list[dict[str, Any]] = []
        self.made = {"frames": moving(frames), "fps": fps}

    def generate(self, prompt: str, **settings: Any) -> Any:
        self.calls.append({"prompt": prompt, **settings})
        place = {"device": torch.device("cpu"), "dtype": torch.float32}
        return SimpleNamespace(**self.made, **place)


def making(source: str = "generated", **changed: Any) -> Maker:
    """A maker of small clips."""

    def make(entry: suite.Entry, index: int, seed: int) -> Made:
        told = {"frames": moving(seed=seed), "fps": 12, "source": source, **changed}
        return Made(**told)

    return make


def export_all(
    chosen: suite.Sample, out: Path, labels: Sequence[str] = ("full", "packcache"), **settings: Any
) -> Layout:
    for label in labels:
        export(chosen, out, label, making(), **settings)
    return Layout(out=out)


def write_results(
    layout: Layout,
    label: str,
    values: Mapping[str, Mapping[str, Any]],
    *,
    stated: Mapping[str, float] | None = None,
    name: str = "results_eval_results.json",
) -> Path:
    """A result file of values by dimension and clip, with the means VBench would state."""
    folder = layout.results / layout.clips(label).name
    folder.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {}
    for dimension, own in values.items():
        clips = [
            {"video_path": f"some/where/{file}", "video_results": value}
            for file, value in own.items()
        ]
        mean = float(np.mean([float(value) for value in own.values()]))
        mean = mean / 100 if dimension == "imaging_quality" else mean
        mean = (stated or {}).get(dimension, mean)
        classes = [{"pan_left": mean, "static": float("nan")}] * (dimension == "camera_motion")
        told[dimension] = [mean, *classes, clips]
    path = folder / name
    path.write_text(json.dumps(told))
    return path
