"""WHEN a denoising step computes anew, and when it takes what an earlier step computed.

Two approximations, off by default, for models that forward one latent frame many times (methods
3.7): the attention to anchors and history is kept over steps (E4), and tokens that are decided rest
(E2). Both work under every policy; the commit is always computed in full. Integers only; the
tensors are the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from packcache.errors import InvalidSetting

__all__ = ["EXACT", "PRESETS", "StepReuse", "StepWork", "parse_reuse"]


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What one denoising step of a latent frame computes; `None` stands for all its tokens.

    `rows` tokens go through the network: those undecided a step ago, the `moved` first, which have
    been decided since. `fresh` of these attend to the history anew; `fresh_first` in the first
    layer, where nothing but a decision changes a query.
    """

    rows: int | None
    moved: int
    fresh: int | None
    fresh_first: int | None

    @classmethod
    def everything(cls) -> StepWork:
        """A step that takes nothing from an earlier one."""
        return cls(rows=None, moved=0, fresh=None, fresh_first=None)


@dataclass(frozen=True, kw_only=True)
class StepReuse:
    """How often what changes little from step to step is computed anew; 1 is every step: exact.

    `history_every` is R_H: attention over anchors and history, kept as output and log-sum-exp of
    each layer, is refreshed every R_H steps, or where a token was just decided. `rest_every` is R:
    keys and values of a token are computed until one step after it was decided, then every R steps.
    """

    history_every: int = 1
    rest_every: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidSetting(f"{field.name} is {value}, expected a number of steps, >= 1")

    @property
    def is_exact(self) -> bool:
        """Is everything computed in every step?"""
        return self.history_every == self.rest_every == 1

    @property
    def keeps_history(self) -> bool:
        """Is attention over the history carried from step to step?"""
        return self.history_every > 1

    def works(self, undecided: Sequence[int]) -> list[StepWork]:
        """The work of each step; `undecided` are the tokens undecided when it begins."""
        works = []
        for step, left in enumerate(undecided):
            before = undecided[step - 1] if step else left
            moved = before - left
            rows = None if step % self.rest_every == 0 else before
            anew = step % self.history_every == 0
            first = None if step == 0 or not self.keeps_history else moved
            works.append(
                StepWork(rows=rows, moved=moved, fresh=None if anew else moved, fresh_first=first)
            )
        return works


EXACT = StepReuse()

#: Named settings, from none to much; what each costs is measured (`packcache evaluate guard`).
PRESETS = {
    "exact": EXACT,
    "balanced": StepReuse(history_every=4, rest_every=4),
    "fast": StepReuse(history_every=8, rest_every=8),
}


def parse_reuse(text: str) -> StepReuse:
    """A preset by name, or settings such as `history_every=4,rest_every=8`."""
    if text in PRESETS:
        return PRESETS[text]
    known = [field.name for field in fields(StepReuse)]
    settings: dict[str, int] = {}
    for part in text.split(","):
        name, found, value = part.partition("=")
        if not found or name not in known or name in settings or not value.isdecimal():
            raise InvalidSetting(
                f"reuse is {text!r}, expected {', '.join(PRESETS)}, or settings such as "
                f"{known[0]}=4,{known[1]}=8"
            )
        settings[name] = int(value)
    return StepReuse(**settings)
