"""What a clip was asked to be: texts and files as `Pipeline.run` takes them, before any weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from packcache.cli_options import Model, given, parse_size
from packcache.errors import InvalidSetting

if TYPE_CHECKING:
    from packcache.lumos.pipeline import Pipeline
    from packcache.lumos.schedule import Sampling
    from packcache.video import Frames

#: Tokens of the prompt's wording, header included; a caption has fewer tokens than bytes.
_WORDING = 64


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One clip: `settings` are ready for `Pipeline.run`, all but the `video`, still as it was."""

    source: Model
    prompt: str
    frames: int
    sampling: Sampling
    settings: dict[str, Any]
    video: Frames | None

    @classmethod
    def read(cls, source: Model, prompt: str, told: dict[str, Any]) -> Asked:
        """From options or a line of a prompts file. Wrong ones are errors of one line."""
        from packcache.lumos.pipeline import check_count
        from packcache.lumos.schedule import philox_draws
        from packcache.models import usual
        from packcache.policies import parse_policy
        from packcache.positions import PositionMode, RebaseRule
        from packcache.reuse import parse_reuse
        from packcache.video import at_rate, read_image, read_video

        own = usual(source.name)
        policy = told["policy"]
        ready = {**told, "policy": parse_policy(policy) if isinstance(policy, str) else policy}
        for name, known in (("positions", PositionMode), ("rebase", RebaseRule)):
            if told[name] not in get_args(known):
                words = " or ".join(get_args(known))
                raise InvalidSetting(f"{name} is {told[name]!r}, expected {words}")
        for name in ("frames", "fps", "seconds"):
            check_count(name, told.get(name))
        philox_draws([told["seed"]], 1, 1)
        changed = given(steps=told.get("steps"), guidance=told.get("guidance"))
        sampling = replace(own.sampling, **changed)
        ready["reuse"] = parse_reuse(told["reuse"], sampling.steps)
        if "size" in told:
            ready["size"] = parse_size(told["size"])
        if "image" in told:
            ready["image"] = read_image(told["image"])
        video = None
        if "video" in told:
            video, rate = read_video(ready.pop("video"))
            video = video if rate is None else at_rate(video, rate, told.get("fps", own.fps))
        return cls(
            source=source, prompt=prompt, frames=told["frames"], sampling=sampling,
            settings=ready, video=video,
        )  # fmt: skip

    @property
    def size(self) -> tuple[int, int]:
        """Pixels of the clip, as `Pipeline` will choose them."""
        from packcache.lumos.image import pick_size
        from packcache.models import usual

        own = usual(self.source.name)
        picture = self.settings["image"].size if "image" in self.settings else None
        if self.video is not None:
            picture = self.video.shape[2], self.video.shape[1]
        return pick_size(
            self.settings.get("size"), default=own.size, target=own.target, picture=picture
        )

    def check_fits(self, memory: int) -> None:
        """Refuses in one line what cannot fit into that many bytes, weights included."""
        from packcache.lumos.plan import plan

        plan(
            self.source.config(),
            size=self.size,
            frames=self.frames,
            policy=self.settings["policy"],
            sampling=self.sampling,
            dtype=self.source.stored_dtype,
            text_tokens=_WORDING + len(self.prompt.encode()),
            image="image" in self.settings or self.video is not None,
            positions=self.settings["positions"],
            rebase=self.settings["rebase"],
            reuse=self.settings["reuse"],
            memory=memory,
        ).check()

    def run_settings(self, pipeline: Pipeline) -> dict[str, Any]:
        """What `Pipeline.generate` takes beside the prompt; a video is scaled and cropped."""
        if self.video is None:
            return self.settings
        return {**self.settings, "video": pipeline.fit_video(self.video, self.size)}
