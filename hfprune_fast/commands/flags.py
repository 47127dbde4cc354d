"""Flags of the command line, made of groups of options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from hfprune_fast.errors import ArgumentError
from hfprune_fast.options import field_types

Command = Callable[..., Any]


class _Layers(click.ParamType[tuple[int, ...]]):
    name = "layers"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(layer) for layer in value.split(",") if layer.strip())
        except ValueError:
            raise ArgumentError(f"protect must be layers such as 0,1,31, got {value!r}") from None


def flags(
    group: type[Any],
    *,
    without: tuple[str, ...] = (),
    only: tuple[str, ...] | None = None,
    **defaults: Any,
) -> Callable[[Command], Command]:
    """Return a decorator that adds a flag for each field of a group of options.

    Args:
        without: fields that the command does not use.
        only: those that it does use; None is all others.
        defaults: of fields whose default differs for this command.
    """
    types = field_types(group)
    used = [
        each
        for each in fields(group)
        if each.name not in without and (only is None or each.name in only)
    ]

    def decorate(command: Command) -> Command:
        for each in reversed(used):
            default = defaults.get(each.name, each.default)
            name = f"--{each.name.replace('_', '-')}"
            options: dict[str, Any] = {"default": default, "help": each.metadata["text"]}
            if types[each.name] is bool:
                options["is_flag"] = True
            elif each.metadata["choices"]:
                options["type"] = click.Choice(each.metadata["choices"])
            elif each.name == "protect":
                options["type"] = _Layers()
            else:
                options["type"] = types[each.name]
            if each.metadata["metavar"]:
                options["metavar"] = each.metadata["metavar"]
            usual = each.metadata.get("usual")  # what stands where a change is not given
            if usual is not None:
                options["help"] += f" [default: {usual}]"
            options["show_default"] = not any(default is none for none in (None, False, ()))
            command = click.option(name, **options)(command)
        return command

    return decorate


def common(command: Command) -> Command:
    debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(
        debug(command)
    )


force = click.option("--force", is_flag=True, help="Replace an existing output.")
