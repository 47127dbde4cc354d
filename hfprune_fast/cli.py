"""Flags -> pipeline -> exit code: 0 done, 2 a mistake in the input, 130 or 143 interrupted."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
import torch

from hfprune_fast import console
from hfprune_fast._version import __version__
from hfprune_fast.checkpoint.layouts import LAYOUTS
from hfprune_fast.commands import demo as demonstration
from hfprune_fast.commands import doctor as doctoring
from hfprune_fast.commands import pipeline
from hfprune_fast.config import ALLOCATIONS, DATA_FREE, PRESETS, SELECTS, Recipe, resolve
from hfprune_fast.engine import distributed
from hfprune_fast.engine.planner import OFFLOADS
from hfprune_fast.errors import ArgumentError, HFPruneError, one_line
from hfprune_fast.kernels import BACKENDS
from hfprune_fast.models.spec import widths_text
from hfprune_fast.pruning import model_card
from hfprune_fast.pruning.selection import MIN_KEEP
from hfprune_fast.scoring.score import CRITERIA, DEFAULT_SAMPLES, SAVE_SECONDS
from hfprune_fast.scoring.table import STATISTICS, ImportanceTable

Command = Callable[..., Any]

_BUDGETS = ("prune_ratio", "param_ratio", "intermediate_size")
_SWITCHES = tuple(field.name for field in fields(Recipe))


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_common = _options(
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)
_memory = _options(
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ..."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16", "float64"]),
        default="auto",
        show_default=True,
        help="Dtype to run in; auto is the checkpoint's own.",
    ),
    click.option(
        "--seq-len", type=int, help="Tokens a sample. [default: 1024, or the model's longest]"
    ),
    click.option(
        "--batch-size", type=int, help="Samples at once. [default: what suits the device and fits]"
    ),
    click.option(
        "--offload",
        type=click.Choice(OFFLOADS),
        default="auto",
        show_default=True,
        help="Where weights wait for their turn: none keeps them on the device, cpu in host "
        "memory, disk in the checkpoint.",
    ),
    click.option(
        "--memory-budget", metavar="SIZE", help="Such as 24GiB. [default: all that is free]"
    ),
)
_seed = click.option(
    "--seed", type=int, default=0, show_default=True, help="Which samples are drawn."
)
_samples = click.option(
    "--samples",
    type=int,
    default=DEFAULT_SAMPLES,
    show_default=True,
    help="Calibration samples to draw.",
)
_scoring = _options(
    _samples,
    click.option(
        "--backend",
        type=click.Choice(BACKENDS),
        help="Kernels to score with. [default: HFPRUNE_BACKEND, else triton on a GPU, else torch]",
    ),
    click.option(
        "--parity", is_flag=True, help="Round products and totals as the paper's code does."
    ),
    click.option("--resume", is_flag=True, help="Go on with scoring that was interrupted."),
    click.option(
        "--save-seconds",
        type=float,
        default=SAVE_SECONDS,
        show_default=True,
        help="How often what is scored so far is put on the disk, for --resume.",
    ),
    _memory,
    _seed,
)
_budget = _options(
    click.option("--prune-ratio", type=float, help="Fraction of MLP neurons to remove, in [0, 1)."),
    click.option("--param-ratio", type=float, help="Fraction of ALL parameters to remove."),
    click.option("--intermediate-size", type=int, help="The MLP width to prune to."),
    click.option(
        "--round-to", type=int, default=1, show_default=True, help="Make the width a multiple."
    ),
)


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
    "criteria",
    type=click.Choice(CRITERIA),
    multiple=True,
    help="What to score by; several share the forward. [default: entropy, the paper's]",
)
@click.option(
    "--obs",
    is_flag=True,
    help="Also what each removal costs when the other neurons are refitted; with fisher.",
)
@_scoring
@click.option("--force", is_flag=True, help="Replace an existing scores file.")
@_common
def score(
    model: str,
    calibration: str,
    out: Path,
    criteria: tuple[str, ...],
    obs: bool,
    force: bool,
    **flags: Any,
) -> None:
    """Score every neuron, every statistic, in one pass: prune at any ratio later."""
    as_json, running = _split(flags)
    pipeline.check_score(model, calibration, out, force=force, resume=running["resume"])
    table = pipeline.score(
        model,
        calibration,
        criterion=criteria or ("entropy",),
        obs=obs,
        **_scoring_of(out, running),
    )
    if distributed.launched().rank > 0:
        return
    with _scores_saved_on_failure(table):
        table.save(out)
    pipeline.state_of(out).unlink(missing_ok=True)
    _print(
        as_json,
        {"out": str(out), **asdict(table.model), "provenance": table.provenance},
        f"{out}: {table.model.num_layers} layers x {widths_text(table.model.widths)} neurons "
        f"scored on {table.provenance['tokens']} tokens\n"
        f"next: hfprune prune {model} --scores {out} --calibration {calibration} "
        "--prune-ratio 0.2 --out DIR",
    )


@cli.command()
@click.argument("model")
@click.option("--out", required=True, type=Path, metavar="DIR", help="The folder to make.")
@_budget
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
@click.option("--criterion", type=click.Choice((*CRITERIA, *DATA_FREE)), help="What to score by.")
@click.option(
    "--select",
    type=click.Choice(SELECTS),
    help="Rank by obs, what a removal costs when the others are refitted, or by a statistic.",
)
@click.option("--statistic", type=click.Choice(STATISTICS), help="Which one; l1 is the paper's.")
@click.option(
    "--allocation",
    type=click.Choice(ALLOCATIONS),
    help="One width for all layers, one ranking across them, or what calibration shows is best.",
)
@click.option(
    "--refit/--no-refit", default=None, help="Fit down_proj of what is left to the dense model."
)
@click.option("--steps", type=int, help="Score and remove in so many parts.")
@click.option(
    "--min-keep",
    type=float,
    default=MIN_KEEP,
    show_default=True,
    help="Part of a layer's neurons that is left at least.",
)
@click.option("--protect", default="", metavar="LAYERS", help="Not pruned; such as 0,1,31.")
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="auto",
    show_default=True,
    help="How widths that differ are written; padded loads everywhere, and is larger.",
)
@click.option("--max-shard-size", metavar="SIZE", help="Such as 5GB. [default: shards are kept]")
@click.option("--verify", is_flag=True, help="Read the output back from disk and compare it.")
@_scoring
@click.option("--force", is_flag=True, help="Replace an earlier output.")
@_common
def prune(
    model: str,
    out: Path,
    scores: Path | None,
    calibration: str | None,
    preset: str,
    min_keep: float,
    protect: str,
    round_to: int,
    layout: str,
    max_shard_size: str | None,
    verify: bool,
    force: bool,
    **flags: Any,
) -> None:
    """Write a smaller checkpoint."""
    as_json, running = _split(flags)
    budget = {name: running.pop(name) for name in _BUDGETS}
    switches = {name: running.pop(name) for name in _SWITCHES}
    if scores is not None and running["resume"]:
        raise ArgumentError("--resume goes on with scoring, so with --calibration, not --scores")
    table = None if scores is None else ImportanceTable.load(scores)
    recipe = _recipe(preset, switches, table, calibration)
    layers = _layers(protect)
    # Everything that can be refused is refused before hours of scoring.
    resume = running["resume"]
    pipeline.check_prune(model, out, round_to=round_to, force=force, resume=resume, **budget)
    if table is None and recipe.criterion in DATA_FREE:
        table = pipeline.weights_table(model, recipe.criterion, running["seed"])
    elif table is None:
        table = pipeline.score_by_recipe(
            model,
            str(calibration),
            recipe,
            out,
            round_to=round_to,
            min_keep=min_keep,
            protect=layers,
            **budget,
            **_scoring_of(out, running),
        )
    if distributed.launched().rank > 0:
        return
    with nullcontext() if scores else _scores_saved_on_failure(table):
        result = pipeline.prune_to(
            model,
            out,
            table,
            recipe=recipe,
            calibration=calibration,
            fitting=pipeline.fitting_options(running),
            min_keep=min_keep,
            protect=layers,
            round_to=round_to,
            layout=layout,
            max_shard_size=max_shard_size,
            verify=verify,
            force=force,
            progress=True,
            **budget,
        )
    pipeline.state_of(out).unlink(missing_ok=True)
    if preset == "default" and calibration is None:
        console.say("nothing was refitted; with --calibration as well it stays closer to the dense")
    _print(
        as_json,
        result,
        f"{out}: {_widths(result)} "
        f"({result['prune_ratio']:.2%} of the neurons), "
        f"{result['dense_params']:,} -> {result['params']:,} parameters "
        f"({result['param_ratio']:.2%} removed)\n"
        f"{_loading(result)}next: hfprune evaluate {model} {out} --text SOURCE",
    )


@cli.command()
@click.argument("dense")
@click.argument("pruned")
@click.option("--text", required=True, metavar="SOURCE", help="Held-out text.")
@click.option("--samples", type=int, help="Samples to draw. [default: all of the text, in order]")
@_memory
@_seed
@_common
def evaluate(dense: str, pruned: str, text: str, **flags: Any) -> None:
    """Compare a pruned model with its dense one: KL, perplexity, top-1 agreement."""
    as_json, running = _split(flags)
    fidelity = pipeline.evaluate_paths(dense, pruned, text, progress=True, **running)
    _print(
        as_json,
        asdict(fidelity),
        f"KL(dense || pruned)  {fidelity.kl_nats:.4f} nats\n"
        f"perplexity           {fidelity.ppl_dense:.3f} dense, {fidelity.ppl_pruned:.3f} pruned\n"
        f"top-1 agreement      {fidelity.top1_agreement:.2%}\n"
        f"over                 {fidelity.tokens} tokens",
    )


@cli.command()
@click.argument("model")
@_budget
@_samples
@_memory
@_common
def plan(model: str, **flags: Any) -> None:
    """Say what pruning would give and how scoring would run; only config.json is read."""
    as_json, asked = _split(flags)
    result = pipeline.plan(model, **asked)

    def row(name: str, key: str, show: Callable[[Any], str]) -> tuple[str, ...]:
        dense, pruned = result[f"dense_{key}"], result[key]
        return name, show(dense), show(pruned), f"{1 - pruned / dense:.2%}"

    rows = [
        row("MLP neurons a layer", "intermediate_size", str),
        row("parameters", "params", "{:,}".format),
        row(f"bytes in {result['dtype']}", "weights_bytes", console.human_bytes),
        row(
            f"MFLOPs a token at {result['seq_len']}", "flops_per_token", lambda f: f"{f / 1e6:,.1f}"
        ),
    ]
    header = (result["model"], "dense", "pruned", "removed")
    scoring = f"scoring on {result['scoring']['device']}: {result['scoring']['summary']}"
    pruning = result["pruning"]
    told = f"prune, by the default recipe: {pruning['summary']}; "
    told += f"about {console.human_seconds(pruning['seconds'])} of products at this machine's speed"
    _print(as_json, result, f"{console.text_table(header, rows)}\n\n{scoring}\n{told}")


@cli.command()
@click.option("--out", type=Path, metavar="DIR", help="Keep the pruned model here.")
@click.option("--prune-ratio", type=float, default=0.2, show_default=True)
@click.option("--force", is_flag=True, help="Replace an earlier output.")
@_common
def demo(out: Path | None, prune_ratio: float, force: bool, as_json: bool, debug: bool) -> None:
    """Do the whole job on the small model that ships with this package, offline."""
    result = demonstration.run(out, prune_ratio=prune_ratio, force=force)
    _print(as_json, result, demonstration.table(result))


@cli.command()
@_common
def doctor(as_json: bool, debug: bool) -> None:
    """Say what this machine offers and which paths will be used."""
    result = doctoring.examine()
    names = {key: key.removesuffix("_bytes").replace("_", " ") for key in result}
    width = max(map(len, names.values()))
    lines = (f"{names[key]:{width}}  {doctoring.show(v)}" for key, v in result.items())
    _print(as_json, result, "\n".join(lines))


def _loading(result: dict[str, Any]) -> str:
    """Say what it takes to load what transformers does not know."""
    if result.get("layout") != "custom":
        return ""
    return (
        "loads with transformers after `import hfprune_fast`, or with trust_remote_code=True; "
        "--allocation uniform makes a plain checkpoint\n"
    )


def _widths(result: dict[str, Any]) -> str:
    if {"mlp_widths", "dense_mlp_widths"} & result.keys():
        return f"MLP neurons a layer {model_card.neurons_text(result)}"
    return f"intermediate_size {result['dense_intermediate_size']} -> {result['intermediate_size']}"


def _scoring_of(out: Path, running: dict[str, Any]) -> dict[str, Any]:
    """Score with a bar, the other processes of torchrun and a state beside the output."""
    state = {"state_file": pipeline.state_of(out)}
    return {**running, **state, "distributed": True, "progress": True}


def _recipe(
    preset: str,
    asked: dict[str, Any],
    table: ImportanceTable | None,
    calibration: str | None,
) -> Recipe:
    """Return the preset with what was asked for otherwise, if there is all that it takes."""
    scored = None if table is None else (table.criteria, "obs" in table.statistics)
    recipe = resolve(preset, asked, scored, fits=calibration is not None)
    data_free = recipe.criterion in DATA_FREE
    if table is None and calibration is None and not data_free:
        raise ArgumentError("give --calibration SOURCE, or --scores FILE, or both")
    if table is not None and data_free:
        raise ArgumentError(f"criterion {recipe.criterion} takes no --scores")
    if recipe.refit and calibration is None:
        raise ArgumentError("--refit needs --calibration, the text to fit to")
    if recipe.steps > 1 and distributed.launched().count > 1:
        raise ArgumentError("--steps is for one process; it writes models between its steps")
    if recipe.steps > 1 and (table is not None or data_free):
        raise ArgumentError("--steps scores again and again, so with --calibration and no --scores")
    return recipe


def _layers(protect: str) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in protect.split(",") if layer.strip())
    except ValueError:
        raise ArgumentError(f"protect must be layers such as 0,1,31, got {protect!r}") from None


def _split(flags: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Separate the flags that are about printing from those that are about running."""
    as_json = flags.pop("as_json")
    del flags["debug"]
    return as_json, flags


@contextmanager
def _scores_saved_on_failure(table: ImportanceTable) -> Iterator[None]:
    """Hours of scoring must not be lost to a full disk or a late Ctrl-C."""
    try:
        yield
    except BaseException:  # Ctrl-C too
        rescued = Path(tempfile.mkdtemp(prefix="hfprune-")) / "scores.safetensors"
        table.save(rescued)
        console.say(f"the scores are kept in {rescued}")
        raise


def _print(as_json: bool, value: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(value) if as_json else text)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `hfprune` command."""
    args = sys.argv[1:] if argv is None else argv
    debug = "--debug" in args
    if distributed.launched().rank > 0:
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
    """Return the exit code and the line for an error: 2 for what the user can mend, else 1."""
    if isinstance(error, HFPruneError):
        return 2, str(error)
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        return 2, error.format_message() + hint
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        advice = "try a smaller --batch-size or --seq-len, or --dtype bfloat16"
        return 2, f"out of memory; {advice} ({one_line(error)})"
    if isinstance(error, OSError):  # no permission to read, no room for what is printed: it says so
        return 2, one_line(error)
    what = f"{type(error).__name__}: {one_line(error)}"
    return 1, f"unexpected {what}; please report it with the traceback that --debug shows"
