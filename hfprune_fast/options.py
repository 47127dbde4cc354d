"""What one option is: a field of a frozen dataclass, with its range, choices and help, checked."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from types import NoneType
from typing import Any, TypeVar

from hfprune_fast.errors import ArgumentError, shown

Result = TypeVar("Result")
Group = TypeVar("Group")
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


def keyword_options(
    refused: Mapping[str, str] | None = None, /, **groups: type[Any]
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let a function take options flat: `@keyword_options(run=RunOptions)` makes f(device="cpu").

    The function gets each group in the parameter of that name; its signature and docstring show the
    fields. A name that is neither a field nor a parameter is a TypeError. Its own parameters that
    are annotated bool take nothing else.

    Args:
        refused: fields that mean nothing to the function, with what is said where one is given.
    """
    without = refused or {}

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        signature = inspect.signature(function)
        own = [p for name, p in signature.parameters.items() if name not in groups]
        options = [
            each for group in groups.values() for each in fields(group) if each.name not in without
        ]
        switches = [p.name for p in own if p.annotation in ("bool", bool)]
        keyword = inspect.Parameter.KEYWORD_ONLY
        flat = [
            inspect.Parameter(o.name, keyword, default=o.default, annotation=o.type)
            for o in options
        ]

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Result:
            for name in without.keys() & given.keys():
                raise ArgumentError(without[name])
            for name in switches:
                if not isinstance(given.get(name, False), bool):
                    raise ArgumentError(f"{name} must be True or False, got {shown(given[name])}")
            made = {name: take_options(group, given) for name, group in groups.items()}
            return function(*args, **given, **made)

        call.__signature__ = signature.replace(parameters=[*own, *flat])  # type: ignore[attr-defined]
        lines = [f"    {o.name}: {o.metadata['text']}" for o in options]
        call.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", *lines])
        return call

    return decorate


def take_options(group: type[Group], given: dict[str, Any]) -> Group:
    """Take the keyword arguments that are fields of a group of options out, and make the group."""
    names = [each.name for each in fields(group) if each.name in given]  # type: ignore[arg-type]
    return group(**{name: given.pop(name) for name in names})


def field_types(group: type[Any]) -> dict[str, Any]:
    """Return the type of each field, `int` for `int | None`."""
    hints = typing.get_type_hints(group)
    return {name: (*typing.get_args(hint), hint)[0] for name, hint in hints.items()}
