"""WHEN a denoising step computes anew, and when it takes what an earlier step computed.

Two approximations, off by default, for models that forward one latent frame many times (methods
3.7): attention to anchors and history is kept over steps (E4), and tokens that are decided rest
(E2). Both work under every policy; the commit is always computed in full. Integers only; the
tensors are the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from packcache.errors import InvalidSetting

__all__ = ["EXACT", "PRESETS", "PRESET_STEPS", "StepReuse", "StepWork", "parse_reuse"]

#: Denoising steps of the frames that presets are told for: Lumos-1's.
PRESET_STEPS = 50

#: Steps that are computed in full: equal confidences decide many tokens in the first, so the second
#: sees another frame.
_WHOLE = 2

#: History is refreshed too when this share of those undecided at the last refresh is left: late in
#: a frame much is decided between two steps, and few tokens are left to compute.
_LEFT = 0.8


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What one denoising step of a latent frame computes; None stands for all its tokens.

    `rows` tokens go through the network: those undecided a step ago. `fresh` of these attend to the
    history anew: those whose queries moved most since they last did.
    """

    rows: int | None = None
    fresh: int | None = None


@dataclass(frozen=True, kw_only=True)
class StepReuse:
    """How often what changes little from step to step is computed anew; 1 is every step: exact.

    `history_every` is R_H: attention over anchors and history, kept as output and log-sum-exp of
    each layer, is refreshed after R_H steps, or when a fifth of the undecided tokens was decided,
    and between for the tokens whose queries moved most: `history_share` of a frame's tokens.
    `rest_every` is R: keys and values of a token are computed until one step after it was decided,
    then every R steps. A frame's first two steps are whole.
    """

    history_every: int = 1
    history_share: float = 0.0
    rest_every: int = 1

    def __post_init__(self) -> None:
        for name in ("history_every", "rest_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidSetting(f"{name} is {value}, expected a number of steps, >= 1")
        if not 0 <= self.history_share <= 1:
            raise InvalidSetting(f"history_share is {self.history_share}, expected 0 to 1")

    def for_steps(self, steps: int) -> StepReuse:
        """The same shares of a schedule of so many steps, where these are of `PRESET_STEPS`."""
        every = (
            max(1, round(count * steps / PRESET_STEPS))
            for count in (self.history_every, self.rest_every)
        )
        history_every, rest_every = every
        return replace(self, history_every=history_every, rest_every=rest_every)

    @property
    def is_exact(self) -> bool:
        """Is everything computed in every step?"""
        return self.history_every == self.rest_every == 1

    @property
    def keeps_history(self) -> bool:
        """Is attention over the history carried from step to step?"""
        return self.history_every > 1

    def works(self, undecided: Sequence[int], tokens: int) -> list[StepWork]:
        """The work of each step of a frame of `tokens`; `undecided` are left when it begins."""
        share = math.ceil(self.history_share * tokens)
        works, last = list[StepWork](), 0
        for step, left in enumerate(undecided):
            before = undecided[step - 1] if step else left
            whole = step < _WHOLE
            rows = None if whole or step % self.rest_every == 0 else before
            due = step - last >= self.history_every or left <= _LEFT * undecided[last]
            anew = whole or due
            last = step if anew else last
            # as many as were decided at least: their queries are others'
            few = min(tokens if rows is None else rows, max(share, before - left))
            works.append(StepWork(rows=rows, fresh=None if anew else few))
        return works


EXACT = StepReuse()

#: Named settings, from none to much, for a frame of `PRESET_STEPS` steps as Lumos-1 makes it; what
#: each costs is measured (`packcache evaluate guard`).
PRESETS = {
    "exact": EXACT,
    "balanced": StepReuse(history_every=8, history_share=0.25, rest_every=4),
    "fast": StepReuse(history_every=8, history_share=0.125, rest_every=8),
}

_KINDS = {"history_every": int, "history_share": float, "rest_every": int}


def parse_reuse(text: str, steps: int = PRESET_STEPS) -> StepReuse:
    """A preset by name, scaled to frames of `steps`, or settings as `history_every=8,rest_every=4`.

    Raises InvalidSetting.
    """
    if text in PRESETS:
        return PRESETS[text].for_steps(steps)
    settings: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            if name in settings:
                raise ValueError
            settings[name] = _KINDS[name](value)
        except (KeyError, ValueError):
            raise InvalidSetting(
                f"reuse is {text!r}, expected {', '.join(PRESETS)}, or settings such as "
                "history_every=8,history_share=0.25,rest_every=8"
            ) from None
    return StepReuse(**settings)  # type: ignore[arg-type]
