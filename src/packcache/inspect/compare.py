"""The same prompt under several policies with the same noise, and what each cost.

The policies take turns latent frame by latent frame: a machine that slows down slows all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from packcache.environment import environment
from packcache.errors import InvalidSetting
from packcache.lumos.clip import Clip
from packcache.lumos.cost import clip_work
from packcache.lumos.pipeline import Picture, Pipeline, Run
from packcache.lumos.vocab import latent_frames
from packcache.policies import FullCache, Policy
from packcache.timeline import FrameLayout
from packcache.video import Frames

__all__ = ["SCHEMA", "Comparison", "Entry", "compare"]

SCHEMA = "packcache.compare/1"


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One policy's clip. `held` maps history frames to the offsets held at the end."""

    label: str
    clip: Clip
    operations: list[int]
    held: dict[int, list[int]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """All clips of one comparison, in the order asked for, with the workload."""

    entries: list[Entry]
    workload: dict[str, Any]
    environment: dict[str, Any]
    layout: FrameLayout

    @property
    def reference(self) -> Entry:
        """What speed-ups refer to: the full cache, or the first policy without one."""
        full = [e for e in self.entries if e.clip.policy == FullCache()]
        return (full or self.entries)[0]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "workload": self.workload,
            "results": [self._row(entry) for entry in self.entries],
        }

    def speedups(self, entry: Entry) -> dict[str, float]:
        """Times faster than the reference, measured and predicted from operation counts."""
        own, other = entry.clip.stats, self.reference.clip.stats
        counted, base = entry.operations, self.reference.operations
        return {
            "speedup_total": other.total_s / own.total_s,
            "speedup_last": other.last_s / own.last_s,
            "predicted_total": sum(base) / sum(counted),
            "predicted_last": base[-1] / counted[-1],
        }

    def _row(self, entry: Entry) -> dict[str, Any]:
        return {
            "policy": entry.label,
            "settings": repr(entry.clip.policy),
            **entry.clip.stats.to_json(),
            "reference": self.reference.label,
            **self.speedups(entry),
        }


def compare(
    pipeline: Pipeline,
    prompt: str,
    policies: Mapping[str, Policy],
    *,
    frames: int,
    seed: int = 0,
    image: Picture | None = None,
    video: Frames | None = None,
    on_frame: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Comparison:
    """Make the clip once per policy; settings as for `Pipeline.run`."""
    if not policies:
        raise InvalidSetting("no policy to compare: give at least one")
    given = {"image": image, "video": video}
    runs = {
        label: pipeline.run([prompt], frames=frames, seed=seed, policy=p, **given, **settings)
        for label, p in policies.items()
    }
    results: dict[str, list[torch.Tensor]] = {label: [] for label in runs}
    iterators = {label: iter(run) for label, run in runs.items()}
    rounds = [
        label
        for _ in range(latent_frames(frames, pipeline.model.config.compression[0]))
        for label in runs
    ]
    for done, label in enumerate(rounds, start=1):
        results[label].append(next(iterators[label]).codes[0])
        if on_frame:
            on_frame(done, len(rounds))
    entries = [
        _entry(pipeline, label, run, torch.stack(results[label]), frames)
        for label, run in runs.items()
    ]
    run = next(iter(runs.values()))
    decoder, first = run.decoder, entries[0].clip
    workload = {
        **first.workload(),
        "image": _image_name(image),
        "given_frames": int(image is not None) if video is None else len(video),
        "tokens_per_frame": decoder.layout.tokens,
        "interleaved": True,
    }
    return Comparison(
        entries=entries,
        workload=workload,
        environment=environment(pipeline.device, pipeline.dtype),
        layout=decoder.layout,
    )


def _image_name(image: Picture | None) -> str | None:
    """The picture's file name: a result should not name somebody's folders."""
    if isinstance(image, (str, Path)):
        return Path(image).name
    return None if image is None else "given as pixels"


def _entry(pipeline: Pipeline, label: str, run: Run, codes: torch.Tensor, frames: int) -> Entry:
    (clip,) = pipeline.clips(run, codes[None], frames)
    before = [run.decoder.caches[0].text[0], *run.stats.physical_length[:-1]]
    work = clip_work(
        pipeline.model.config,
        run.decoder.layout,
        run.decoder.sampling,
        before,
        given=run.stats.given_latents,
        reuse=run.decoder.reuse,
    )
    timeline = run.decoder.caches[0].timeline
    held = {entry.span.frame: entry.held.tolist() for entry in timeline.history}
    operations = [frame.total for frame in work]
    return Entry(label=label, clip=clip, operations=operations, held=held)
