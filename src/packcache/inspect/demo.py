"""The clip of `packcache demo`: a digit that only memory brings back from behind a curtain.

Drawing the world takes scikit-learn, which a plain install lacks: so the frames that are given come
as a picture, with what is known of the scene. `recipes/digits/demo.py` makes and measures both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from packcache.digits import world
from packcache.inspect.report import About
from packcache.video import Frames

__all__ = ["DemoClip", "load_clip"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DemoClip:
    """What is given, uint8 `[1 + 4n, H, W, 3]`, and the scene it was drawn from.

    `standing` says where the scene lies among others of its kind, by policy.
    """

    prompt: str
    seed: int
    scene: world.Scene
    given: Frames
    standing: dict[str, Any]

    def about(self, readings: Mapping[str, str]) -> About:
        """What to know of it; `readings` are what came back, by policy, if it was read."""
        hidden = self.scene.hidden
        assert hidden
        clips = self.standing["clips"]
        paragraphs = (
            f"Seed {self.seed}, a clip the weights never saw. Its first {len(self.given)} frames "
            "are given, up to the last one under the curtain; the model makes the rest. Behind the "
            f"curtain is a {hidden.colour} {hidden.value}: the prompt does not tell, only the "
            "frames before it do. It enters in the first history frame, which a sink (n_sinks=1) "
            "keeps whole.",
            f"How this clip compares with {clips} of its kind, measured beforehand and teacher-"
            f"forced: at which percentile of them seed {self.seed} lies by how much the returning "
            "digit surprises the model (0 is the least), and in how many of them the model knows "
            "digit and colour."
            + (" What came back is read from the first 8 frames." if readings else ""),
        )
        head = ["policy", f"percentile of seed {self.seed} among {clips}", "known"]
        rows = [[*head, "came back"] if readings else head]
        for label, own in self.standing["policies"].items():
            row = [label, f"{own['percentile']:g}", f"{own['known']} of {clips}"]
            rows.append([*row, readings.get(label, "")] if readings else row)
        return About(paragraphs=paragraphs, rows=rows)


def load_clip() -> DemoClip:
    """The clip that comes with the package."""
    folder = resources.files("packcache.digits") / "demo"
    facts = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    with (folder / "given.png").open("rb") as file:
        strip = np.asarray(Image.open(file).convert("RGB"))  # [H, T * W, 3]
    size = world.SIZE
    given = strip.reshape(size, -1, size, 3).swapaxes(0, 1)
    return DemoClip(
        prompt=facts["prompt"],
        seed=facts["seed"],
        scene=_scene(facts["scene"]),
        given=np.ascontiguousarray(given),
        standing=facts["standing"],
    )


def _scene(values: dict[str, Any]) -> world.Scene:
    """A scene from its `asdict`."""
    curtain = values["curtain"]
    parts = {
        "digits": tuple(world.Digit(**digit) for digit in values["digits"]),
        "curtain": world.Curtain(**{**curtain, "box": tuple(curtain["box"])}),
    }
    return world.Scene(**{**values, **parts})
