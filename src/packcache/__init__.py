"""PackCache: the KV cache for autoregressive video, small and constant while the video grows.

    import packcache as pc
    gen = pc.load("digits")
    clip = gen.generate("a red 3 moving right", frames=48, policy=pc.PackCache(), seed=0)
    clip.save("clip.mp4")

Public names load on first use: importing the package touches no device, no disk and no logging,
and the integer rooms (timeline, budget, selectors, policies) never need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from packcache.cache import FrameCache as FrameCache
    from packcache.errors import CacheStateError as CacheStateError
    from packcache.errors import GenerationError as GenerationError
    from packcache.errors import InputError as InputError
    from packcache.errors import InputFileError as InputFileError
    from packcache.errors import InvalidSetting as InvalidSetting
    from packcache.errors import OutputError as OutputError
    from packcache.errors import PackCacheError as PackCacheError
    from packcache.lumos.clip import Clip as Clip
    from packcache.lumos.clip import Stats as Stats
    from packcache.lumos.decode import FrameResult as FrameResult
    from packcache.lumos.pipeline import Pipeline as Pipeline
    from packcache.lumos.pipeline import Run as Run
    from packcache.lumos.plan import Plan as Plan
    from packcache.lumos.plan import plan as plan
    from packcache.lumos.schedule import Sampling as Sampling
    from packcache.models import load as load
    from packcache.policies import DeepForcing as DeepForcing
    from packcache.policies import FadeMem as FadeMem
    from packcache.policies import FullCache as FullCache
    from packcache.policies import NoHistory as NoHistory
    from packcache.policies import PackCache as PackCache
    from packcache.policies import Policy as Policy
    from packcache.policies import RandomDrop as RandomDrop
    from packcache.policies import SinkWindow as SinkWindow
    from packcache.policies import SlidingWindow as SlidingWindow
    from packcache.policies import UniformHistory as UniformHistory
    from packcache.policies import parse_policy as parse_policy
    from packcache.reuse import StepReuse as StepReuse
    from packcache.reuse import parse_reuse as parse_reuse
    from packcache.timeline import FrameLayout as FrameLayout
    from packcache.timeline import Role as Role
    from packcache.timeline import Span as Span
    from packcache.timeline import Timeline as Timeline

_HOMES = {
    "packcache.cache": ("FrameCache",),
    "packcache.errors": (
        "CacheStateError",
        "GenerationError",
        "InputError",
        "InputFileError",
        "InvalidSetting",
        "OutputError",
        "PackCacheError",
    ),
    "packcache.lumos.clip": ("Clip", "Stats"),
    "packcache.lumos.decode": ("FrameResult",),
    "packcache.lumos.pipeline": ("Pipeline", "Run"),
    "packcache.lumos.plan": ("Plan", "plan"),
    "packcache.lumos.schedule": ("Sampling",),
    "packcache.models": ("load",),
    "packcache.policies": (
        "DeepForcing",
        "FadeMem",
        "FullCache",
        "NoHistory",
        "PackCache",
        "Policy",
        "RandomDrop",
        "SinkWindow",
        "SlidingWindow",
        "UniformHistory",
        "parse_policy",
    ),
    "packcache.reuse": ("StepReuse", "parse_reuse"),
    "packcache.timeline": ("FrameLayout", "Role", "Span", "Timeline"),
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_WHERE, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'packcache' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
