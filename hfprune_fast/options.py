"""What one option is: a field of a frozen dataclass, with its range, choices and help, checked."""

from __future__ import annotations

import math
import numbers
import typing
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from types import NoneType
from typing import Any

from hfprune_fast.errors import ArgumentError, shown

LARGEST_COUNT = 2**31 - 1  # of what is counted; far below where torch's own integers end
_EXPECTED = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "layers such as 0,1,31",
    NoneType: "None",
}


def option(
    default: Any,
    text: str,
    *,
    choices: Sequence[str] = (),
    metavar: str = "",
    least: float = -math.inf,
    most: float = math.inf,
) -> Any:
    """Return a dataclass field with its range, and what the command line and docs say about it."""
    about = {"choices": tuple(choices), "metavar": metavar, "least": least, "most": most}
    return field(default=default, metadata={"text": text, **about})


def _checked(each: Field[Any], hint: Any, value: Any) -> Any:
    """Return the value of a field, numbers as Python's own, or raise ArgumentError."""
    union = [] if typing.get_origin(hint) is tuple else typing.get_args(hint)
    kinds = [typing.get_origin(kind) or kind for kind in union or [hint]]
    about, name = each.metadata, each.name
    if about["choices"] and value is not None and value not in about["choices"]:
        choices = ", ".join(about["choices"])
        raise ArgumentError(f"{name} must be one of {choices}, got {shown(value)}")
    try:
        value = _as_kind(value, kinds)
    except TypeError:
        expected = " or ".join(_EXPECTED[kind] for kind in kinds)
        raise ArgumentError(f"{name} must be {expected}, got {shown(value)}") from None
    least, most = about["least"], about["most"]
    if isinstance(value, int | float) and not least <= value <= most:
        bound = f"at least {least}" if value < least else f"at most {most}"
        if isinstance(value, float) and most < math.inf:
            bound = f"in [{least}, {most}]"
        raise ArgumentError(f"{name} must be {bound}, got {shown(value)}")
    return value


def _as_kind(value: Any, kinds: Sequence[type[Any]]) -> Any:
    """Return the value as one of the kinds, or raise TypeError."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_number and int in kinds and isinstance(value, numbers.Integral):
        return int(value)
    if is_number and float in kinds and value == value:  # not NaN
        try:
            return float(value)
        except OverflowError:  # of whole numbers, which have no end
            return math.inf if value > 0 else -math.inf
    if tuple in kinds and not isinstance(value, str | bytes):
        return tuple(_as_kind(layer, [int]) for layer in value)
    if not any(isinstance(value, kind) for kind in (bool, str, NoneType) if kind in kinds):
        raise TypeError
    return value


@dataclass(frozen=True)
class Options:
    """A group of options; each is checked against its annotation, choices and range."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for each in fields(self):
            value = _checked(each, hints[each.name], getattr(self, each.name))
            object.__setattr__(self, each.name, value)
