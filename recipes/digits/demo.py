"""Make and measure the clip of `packcache demo`: a scene whose hidden digit must be remembered.

python recipes/digits/demo.py      # writes src/packcache/digits/demo/given.png and demo.json

The scene of seed 0 stands in a crowd: the same question is asked of 64 scenes of its kind, and
demo.json says at which percentile of them it lies. As in the demo, and unlike
`evaluate.memory.horizon`, the given frames are committed clean.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from packcache.cli import DEMO_POLICIES
from packcache.digits import world
from packcache.digits.prompts import prompt
from packcache.environment import environment
from packcache.evaluate import memory
from packcache.lumos.pipeline import Pipeline
from packcache.models import load
from packcache.policies import Policy, parse_policies

FOLDER = Path(__file__).parents[2] / "src" / "packcache" / "digits" / "demo"
SEED, KIND, GAP, CLIPS = 0, "enters", 2, 64


def scene_of(seed: int) -> world.Scene:
    return world.sample_scene(np.random.default_rng(seed), "test", kind=KIND, gap=GAP)


def given_frames(scene: world.Scene) -> np.ndarray:
    """The true frames up to the last one under the curtain, uint8 `[1 + 4n, H, W, 3]`."""
    assert scene.curtain
    return world.render(scene, world.GROUP * (scene.curtain.rises - 1) + 1)


def ask(
    pipeline: Pipeline, scene: world.Scene, asked: memory.Question, policy: Policy
) -> dict[str, float]:
    """The teacher-forced metrics of the latent frame in which the curtain has risen."""
    video = given_frames(scene)
    run = pipeline.run(
        [prompt(scene)], frames=len(video) + 1, video=video, policy=policy, guidance=1.0
    )
    decoder = run.decoder
    decoder.prefill()
    assert run.given is not None
    for codes in run.given:
        decoder.give(codes[None])
    log_p = decoder.predict()[0].log_softmax(dim=-1)  # [N, codes]
    return memory.answer(asked, -log_p.gather(1, asked.codes.T).T.double().numpy())


def standing(values: np.ndarray, right: np.ndarray) -> dict[str, float | int]:
    """Where clip 0 lies among all: the share with less surprise, its own place counted half."""
    return {
        "percentile": round(100 * (int((values < values[0]).sum()) + 0.5) / len(values), 1),
        "surprise": round(float(values[0]), 3),
        "median": round(float(np.median(values)), 3),
        "known": int(right.sum()),
    }


def weights_digest() -> str:
    """SHA-256 of the shipped weights, codec before model: numbers of others are stale."""
    folder = FOLDER.parent / "weights"
    parts = [(folder / f"{name}.safetensors").read_bytes() for name in ("codec", "model")]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def measure(pipeline: Pipeline) -> dict[str, Any]:
    """Seed 0 among its like, under every policy of the demo."""
    policies = parse_policies(DEMO_POLICIES)
    found: dict[str, list[dict[str, float]]] = {label: [] for label in policies}
    for seed in range(CLIPS):
        scene = scene_of(seed)
        asked = memory.question(pipeline, scene)
        for label, policy in policies.items():
            found[label].append(ask(pipeline, scene, asked, policy))
        print(seed, {label: round(rows[-1]["nll"], 2) for label, rows in found.items()}, flush=True)
    return {
        "metric": "nats a token of the hidden digit in the latent frame in which the curtain has "
        "risen, teacher-forced, given frames clean, no guidance; percentile 0 has the least",
        "known": "clips in which the true digit and colour are likelier than 59 others",
        "clips": CLIPS,
        "seeds": [0, CLIPS - 1],
        "policies": {
            label: standing(
                np.array([row["nll"] for row in rows]), np.array([row["object"] for row in rows])
            )
            for label, rows in found.items()
        },
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    pipeline, scene = load("digits"), scene_of(SEED)
    Image.fromarray(np.concatenate(given_frames(scene), axis=1)).save(FOLDER / "given.png")
    weight = pipeline.model.lm_head.weight
    facts = {
        "schema": "packcache.demo/1",
        "prompt": prompt(scene),
        "seed": SEED,
        "split": "test",
        "gap": GAP,
        "scene": asdict(scene),
        "weights": weights_digest(),
        "standing": measure(pipeline),
        "environment": environment(weight.device, weight.dtype),
    }
    (FOLDER / "demo.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
