"""Flags -> options -> commands -> exit code: 0 done, 2 bad input, 130, 141 or 143 interrupted."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import click

from hfprune_fast import console
from hfprune_fast._version import __version__
from hfprune_fast.commands.flags import common, flags, force
from hfprune_fast.config import (
    CRITERIA,
    EXPORTS,
    PRESETS,
    Budget,
    CalibrationOptions,
    OutputOptions,
    PruningCalibration,
    RecipeChanges,
    RecoveryOptions,
    ReportOptions,
    RunOptions,
    ScoringOptions,
    TaskOptions,
)
from hfprune_fast.engine.distributed import launched
from hfprune_fast.errors import printable
from hfprune_fast.exit_codes import explain

Command = Callable[..., Any]
_TERMINATED = 128 + signal.SIGTERM


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hfprune")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Score the MLP neurons of a language model by its own output, and cut out the least important.

    MODEL is a folder, a hub name, or `demo`, the small model that ships with this package. A text
    SOURCE is a .txt, .jsonl, .json or .parquet file, a folder of them, `demo`, a hub data set, a
    .npy file of token ids, or - for stdin.
    """
    if launched().rank > 0 and ctx.invoked_subcommand not in ("score", "prune", "recover"):
        ctx.exit()  # torchrun started several; the other commands are the first one's work


@cli.command()
@click.argument("model")
@click.option("--calibration", required=True, metavar="SOURCE", help="Text to score on.")
@click.option("--out", required=True, type=Path, metavar="FILE", help="The scores file to write.")
@click.option(
    "--criterion",
    type=click.Choice(CRITERIA),
    multiple=True,
    default=("entropy",),
    help="What to score by; several share the forward pass. [default: entropy, the paper's]",
)
@click.option(
    "--obs",
    is_flag=True,
    help="Also the cost of removing each neuron when the others are refitted; with fisher.",
)
@flags(CalibrationOptions)
@flags(ScoringOptions)
@flags(RunOptions)
@force
@common
def score(
    model: str, calibration: str, out: Path, as_json: bool, debug: bool, **flags: Any
) -> None:
    """Score every neuron, every statistic, in one pass: prune at any ratio later."""
    from hfprune_fast.commands import score as command

    result = command.run(model, calibration, out, **flags)
    if result:
        _print(as_json, result, command.text(result, model, calibration, flags))


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
@flags(RecipeChanges)
@flags(Budget)
@flags(OutputOptions)
@flags(ReportOptions)
@flags(PruningCalibration)
@flags(ScoringOptions)
@flags(RunOptions)
@common
def prune(
    model: str, calibration: str | None, out: Path, as_json: bool, debug: bool, **flags: Any
) -> None:
    """Remove the least important MLP neurons, refit the others, write a smaller checkpoint."""
    from hfprune_fast.commands import prune as command

    result = command.run(model, calibration, out, **flags)
    if result:
        _print(as_json, result, command.text(result, model))


@cli.command()
@click.argument("dense")
@click.argument("pruned")
@click.option("--text", required=True, metavar="SOURCE", help="Text to train on, a part held out.")
@click.option("--out", required=True, type=Path, metavar="DIR", help="The folder to make.")
@flags(RecoveryOptions)
@flags(OutputOptions, without=("layout",))
@flags(CalibrationOptions, without=("samples",))
@flags(RunOptions)
@common
def recover(
    dense: str, pruned: str, text: str, out: Path, as_json: bool, debug: bool, **flags: Any
) -> None:
    """Train a pruned model to give the dense model's output (KL), by LoRA or all weights."""
    from hfprune_fast.commands import recover as command

    result = command.run(dense, pruned, text, out, **flags)
    if result:
        _print(as_json, result, command.text(result, dense))


@cli.command()
@click.argument("dense")
@click.argument("pruned")
@click.option("--text", metavar="SOURCE", help="Held-out text: KL, perplexity, agreement.")
@flags(TaskOptions)
@flags(CalibrationOptions, samples=None)
@flags(RunOptions)
@common
def evaluate(
    dense: str, pruned: str, text: str | None, as_json: bool, debug: bool, **flags: Any
) -> None:
    """Compare a pruned model with its dense one, over a text (--text), by tasks, or both."""
    from hfprune_fast.commands import evaluate as command

    result = command.run(dense, pruned, text, progress=True, **flags)
    _print(as_json, result, command.text(result))


@cli.command()
@click.argument("model")
@flags(Budget, without=("min_keep", "protect"))
@flags(PruningCalibration, without=("seed", "text_field", "chat_template"))
@flags(RunOptions, without=("attention",))
@click.option("--recover", is_flag=True, help="Also what `hfprune recover` would take afterwards.")
@flags(RecoveryOptions, only=("tokens", "lora", "train"))
@common
def plan(model: str, as_json: bool, debug: bool, **flags: Any) -> None:
    """Show the pruned sizes and how scoring would run; only config.json is read."""
    from hfprune_fast.commands import plan as command

    result = command.run(model, **flags)
    _print(as_json, result, command.text(result))


@cli.command()
@click.argument("pruned")
@click.option("--to", type=click.Choice(EXPORTS), required=True, help="The form to write.")
@click.option("--out", required=True, type=Path, metavar="PATH", help="Folder or .gguf file.")
@click.option(
    "--converter",
    type=Path,
    metavar="PATH",
    help="llama.cpp's convert_hf_to_gguf.py, for gguf. [default: the one on the PATH]",
)
@force
@common
def export(pruned: str, as_json: bool, debug: bool, **flags: Any) -> None:
    """Write a pruned model in another form: for llama.cpp, vLLM, or plain transformers."""
    from hfprune_fast.commands import export as command

    result = command.run(pruned, **flags)
    _print(as_json, result, command.text(result))


@cli.command()
@click.argument("pruned")
@click.option("--out", type=Path, default="report.html", show_default=True, metavar="FILE")
@click.option("--scores", type=Path, metavar="FILE", help="The scores that PRUNED was chosen by.")
@click.option("--dense", metavar="MODEL", help="The dense model, to compare PRUNED with.")
@click.option("--text", metavar="SOURCE", help="Held-out text to compare the two over.")
@flags(CalibrationOptions, samples=None)
@flags(RunOptions)
@force
@common
def report(pruned: str, out: Path, as_json: bool, debug: bool, **flags: Any) -> None:
    """Write a page (HTML) with pictures of a pruned model."""
    from hfprune_fast.commands import report as command

    result = command.run(pruned, out, progress=True, **flags)
    _print(as_json, result, command.text(result))


@cli.command()
@click.option("--out", type=Path, metavar="DIR", help="Keep the pruned model here.")
@click.option("--prune-ratio", type=float, default=0.25, show_default=True)
@force
@common
def demo(out: Path | None, prune_ratio: float, force: bool, as_json: bool, debug: bool) -> None:
    """Do the whole job on the small model that ships with this package, offline."""
    from hfprune_fast.commands import demo as command

    result = command.run(out, prune_ratio=prune_ratio, force=force)
    _print(as_json, result, command.text(result))


@cli.command()
@common
def doctor(as_json: bool, debug: bool) -> None:
    """Show versions, devices, memory, and which implementations will be used."""
    from hfprune_fast.commands import doctor as command

    result = command.run()
    _print(as_json, result, command.text(result))


def _print(as_json: bool, value: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(value) if as_json else "\n".join(map(printable, text.split("\n"))))


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `hfprune` command."""
    args = sys.argv[1:] if argv is None else argv
    with suppress(OSError, ValueError, AttributeError):
        # Else a file that is opened gets the number of a stream that was closed, and its text.
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    with redirect_stderr(console.Tolerant(sys.stderr)):
        code = _run(args)
    for stream in (sys.stdout, sys.stderr):
        try:
            with suppress(AttributeError, ValueError):  # None, or closed
                stream.flush()
        except OSError:  # Python would try again and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _run(args: list[str]) -> int:
    """Run a command line and return its exit code; only with --debug does an error come out."""
    debug = "--debug" in args
    received: list[int] = []

    def terminate(number: int, _: object) -> None:
        received.append(number)
        sys.exit(_TERMINATED)

    try:
        if launched().rank > 0:
            console.mute()
        # So that `docker stop` and job schedulers leave no unfinished output either.
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, terminate)
        if not debug:  # libraries' warnings and retries must not hide the one line
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            console.hide_libraries()
            for library in ("huggingface_hub", "datasets", "lm_eval"):
                logging.getLogger(library).setLevel(logging.ERROR)
        return cli.main(args, prog_name="hfprune", standalone_mode=False) or 0
    except (KeyboardInterrupt, click.exceptions.Abort):
        console.say_last("interrupted; no unfinished output is left")
        return 128 + signal.SIGINT
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except BaseException as error:  # a panic in a Rust library is no Exception
        if received:  # also where a library made an error of its own of the exit
            console.say_last("terminated; no unfinished output is left")
            return _TERMINATED
        if isinstance(error, SystemExit):  # of click, when nobody reads stdout any more
            return 128 + signal.SIGPIPE
        if debug:
            raise
        code, message = explain(error)
        console.say_last(f"error: {' '.join(message.split())}")
        return code
