"""What a setting must be: a check that fails says the value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from packcache.errors import InvalidSetting

__all__ = ["at_least", "flag", "number", "one_of"]


def at_least(name: str, value: Any, least: int) -> None:
    """A whole number, not below `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidSetting(f"{name} is {value!r}, expected a whole number of at least {least}")


def number(name: str, value: Any, holds: Callable[[float], bool], expected: str) -> None:
    """A finite number for which `holds` is true; `expected` says so in words."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and holds(value)):
        raise InvalidSetting(f"{name} is {value!r}, expected {expected}")


def flag(name: str, value: Any) -> None:
    """True or false, nothing that counts as one of them."""
    if not isinstance(value, bool):
        raise InvalidSetting(f"{name} is {value!r}, expected true or false")


def one_of(name: str, value: object, known: Sequence[str]) -> None:
    """One of the words that are known."""
    if value not in known:
        raise InvalidSetting(f"{name} is {value!r}, expected one of {', '.join(known)}")
