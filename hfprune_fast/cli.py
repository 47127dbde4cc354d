"""Flags -> options -> commands -> exit code: 0 done, 2 bad input, 130 or 143 interrupted."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
import torch

from hfprune_fast import console
from hfprune_fast._version import __version__
from hfprune_fast.config import (
    CRITERIA,
    PRESETS,
    Budget,
    CalibrationOptions,
    OutputOptions,
    RecipeChanges,
    RunOptions,
    ScoringOptions,
    field_types,
)
from hfprune_fast.engine.distributed import launched
from hfprune_fast.errors import ArgumentError, HFPruneError, one_line

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


def _flags(
    group: type[Any], *, without: tuple[str, ...] = (), **defaults: Any
) -> Callable[[Command], Command]:
    """Return a decorator that adds a flag for each field of a group of options.

    Args:
        without: fields that the command does not use.
        defaults: of fields whose default differs for this command.
    """
    types = field_types(group)

    def decorate(command: Command) -> Command:
        for each in reversed([each for each in fields(group) if each.name not in without]):
            default = defaults.get(each.name, each.default)
            names = [f"--{each.name.replace('_', '-')}"]
            options: dict[str, Any] = {"default": default, "help": each.metadata["text"]}
            if types[each.name] is bool and default is None:
                names = [f"{names[0]}/--no-{each.name}"]
            elif types[each.name] is bool:
                options["is_flag"] = True
            elif each.metadata["choices"]:
                options["type"] = click.Choice(each.metadata["choices"])
            elif each.name == "protect":
                options["type"] = _Layers()
            else:
                options["type"] = types[each.name]
            if each.metadata["metavar"]:
                options["metavar"] = each.metadata["metavar"]
            options["show_default"] = default not in (None, False, ())
            command = click.option(*names, **options)(command)
        return command

    return decorate


def _common(command: Command) -> Command:
    debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(
        debug(command)
    )


_force = click.option("--force", is_flag=True, help="Replace an existing output.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hfprune")
def cli() -> None:
    """Rank the MLP neurons of a language model by output entropy and cut out the least important.

    MODEL is a folder, a hub name, or `demo`, the small model that ships with this package. A text
    SOURCE is a .txt, .jsonl or .parquet file, a folder of them, `demo`, a hub data set, or a .npy
    file of token ids.
    """


@cli.command()
@click.argument("model")
@click.option("--calibration", required=True, metavar="SOURCE", help="Text to score on.")
@click.option("--out", required=True, type=Path, metavar="FILE", help="The scores file to write.")
@click.option(
    "--criterion",
    type=click.Choice(CRITERIA),
    multiple=True,
    default=("entropy",),
    help="What to score by; several share the forward. [default: entropy, the paper's]",
)
@click.option(
    "--obs",
    is_flag=True,
    help="Also the cost of removing each neuron when the others are refitted; with fisher.",
)
@_flags(CalibrationOptions)
@_flags(ScoringOptions)
@_flags(RunOptions)
@_force
@_common
def score(
    model: str, calibration: str, out: Path, as_json: bool, debug: bool, **flags: Any
) -> None:
    """Score every neuron, every statistic, in one pass: prune at any ratio later."""
    from hfprune_fast.commands import score as command

    result = command.run(model, calibration, out, **flags)
    if result:
        _print(as_json, result, command.text(result, model, calibration))


@cli.command()
@click.argument("model")
@click.option("--out", required=True, type=Path, metavar="DIR", help="The folder to make.")
@click.option("--scores", type=Path, metavar="FILE", help="Scores of `hfprune score`.")
@click.option(
    "--calibration", metavar="SOURCE", help="Text to refit on, and to score on without --scores."
)
@click.option(
    "--preset",
    type=click.Choice(tuple(PRESETS)),
    default="default",
    show_default=True,
    help="paper: entropy, l1, uniform, no refit. The options below change single parts of it.",
)
@_flags(RecipeChanges)
@_flags(Budget)
@_flags(OutputOptions)
@_flags(CalibrationOptions)
@_flags(ScoringOptions)
@_flags(RunOptions)
@_common
def prune(
    model: str, calibration: str | None, out: Path, as_json: bool, debug: bool, **flags: Any
) -> None:
    """Write a smaller checkpoint."""
    from hfprune_fast.commands import prune as command

    result = command.run(model, calibration, out, **flags)
    if result:
        _print(as_json, result, command.text(result, model))


@cli.command()
@click.argument("dense")
@click.argument("pruned")
@click.option("--text", required=True, metavar="SOURCE", help="Held-out text.")
@_flags(CalibrationOptions, samples=None)
@_flags(RunOptions)
@_common
def evaluate(dense: str, pruned: str, text: str, as_json: bool, debug: bool, **flags: Any) -> None:
    """Compare a pruned model with its dense one: KL, perplexity, top-1 agreement."""
    from hfprune_fast.commands import evaluate as command

    fidelity = command.run(dense, pruned, text, progress=True, **flags)
    _print(as_json, asdict(fidelity), command.text(fidelity))


@cli.command()
@click.argument("model")
@_flags(Budget, without=("min_keep", "protect"))
@_flags(CalibrationOptions, without=("seed",))
@_flags(RunOptions, without=("attention",))
@_common
def plan(model: str, as_json: bool, debug: bool, **flags: Any) -> None:
    """Show the pruned sizes and how scoring would run; only config.json is read."""
    from hfprune_fast.commands import plan as command

    result = command.run(model, **flags)
    _print(as_json, result, command.text(result))


@cli.command()
@click.option("--out", type=Path, metavar="DIR", help="Keep the pruned model here.")
@click.option("--prune-ratio", type=float, default=0.2, show_default=True)
@_force
@_common
def demo(out: Path | None, prune_ratio: float, force: bool, as_json: bool, debug: bool) -> None:
    """Do the whole job on the small model that ships with this package, offline."""
    from hfprune_fast.commands import demo as command

    result = command.run(out, prune_ratio=prune_ratio, force=force)
    _print(as_json, result, command.text(result))


@cli.command()
@_common
def doctor(as_json: bool, debug: bool) -> None:
    """Show versions, devices, memory, and which implementations will be used."""
    from hfprune_fast.commands import doctor as command

    result = command.run()
    _print(as_json, result, command.text(result))


def _print(as_json: bool, value: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(value) if as_json else text)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `hfprune` command."""
    args = sys.argv[1:] if argv is None else argv
    debug = "--debug" in args
    if launched().rank > 0:
        console.mute()
    # So that `docker stop` and job schedulers leave no unfinished output either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if not debug:  # libraries' warnings and retries must not hide the one line
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        for library in ("huggingface_hub", "datasets"):
            logging.getLogger(library).setLevel(logging.ERROR)
    try:
        code = cli.main(args, prog_name="hfprune", standalone_mode=False) or 0
    except (KeyboardInterrupt, click.exceptions.Abort):
        click.echo("hfprune: interrupted; no unfinished output is left", err=True)
        code = 130
    except SystemExit:  # of the signal
        click.echo("hfprune: terminated; no unfinished output is left", err=True)
        code = 128 + signal.SIGTERM
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 0
    except Exception as error:
        if debug:
            raise
        code, message = _explain(error)
        click.echo(f"hfprune: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _explain(error: Exception) -> tuple[int, str]:
    """Return the exit code and the line for an error: 2 for what the user can fix, else 1."""
    if isinstance(error, HFPruneError):
        return 2, str(error)
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        return 2, error.format_message() + hint
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        advice = "try a smaller --batch-size or --seq-len, or --dtype bfloat16"
        return 2, f"out of memory; {advice} ({one_line(error)})"
    if isinstance(error, OSError):  # its text names the file and the reason
        return 2, one_line(error)
    what = f"{type(error).__name__}: {one_line(error)}"
    return 1, f"unexpected {what}; please report it with the traceback that --debug shows"
