"""hf.recover: from a dense and a pruned model to a pruned one that is closer to the dense one.

The dense model runs once and its final hidden states are kept; then only the pruned model is in
memory, and is trained to give the dense model's output.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hfprune_fast.checkpoint.atomic import check_writable, on_one_disk
from hfprune_fast.checkpoint.ours import check_not_read, files_of, real
from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.config import CalibrationOptions, OutputOptions, RecoveryOptions, RunOptions
from hfprune_fast.console import say, to_path
from hfprune_fast.engine.distributed import joined, launched, others_alive
from hfprune_fast.engine.layerwise import own_modes
from hfprune_fast.errors import ArgumentError, CheckpointError, shown
from hfprune_fast.evaluation.fidelity import check_vocabularies
from hfprune_fast.options import keyword_options
from hfprune_fast.pruning.on_disk import check_output_folder
from hfprune_fast.pruning.record import facts_of, read_record
from hfprune_fast.recovery.adapters import Trained, check_packages, reset_lora
from hfprune_fast.recovery.data import RecoveryData, recovery_data
from hfprune_fast.recovery.output import write_adapter, write_recovered
from hfprune_fast.recovery.setup import Setup, open_all, set_up
from hfprune_fast.recovery.teacher import check_cache, hidden_bytes
from hfprune_fast.recovery.work import WorkFolder, check_work, work_of

_PRECISION = "ACCELERATE_MIXED_PRECISION"
_NOT_SHARED_BY = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")


@keyword_options(
    {
        "samples": "recover takes tokens, not samples: how much is trained on in all",
        "layout": "recover takes no layout: it keeps the pruned model's; export it afterwards",
    },
    options=RecoveryOptions,
    sampling=CalibrationOptions,
    run=RunOptions,
    output=OutputOptions,
)
@own_modes()
def recover(
    dense: str | Path | ModelSource,
    pruned: str | Path | ModelSource,
    text: str | Path,
    out: str | Path,
    *,
    distributed: bool = False,
    progress: bool = False,
    options: RecoveryOptions,
    sampling: CalibrationOptions,
    run: RunOptions,
    output: OutputOptions,
) -> dict[str, Any]:
    """Train a pruned model to give the dense model's output, and write it in the same layout.

    Args:
        dense, pruned: model folders, hub names or `demo`; they are only read. They must have one
            vocabulary and hidden size.
        text: what to train on; a part of it is held out, and KL is measured on that.
        out: the folder to make. It appears under this name only when whole. While the run lasts,
            OUT.recovery has what an interrupted one is resumed from.
        distributed: torchrun started this program: all processes train, the first does the rest.
        progress: show bars on stderr.

    Returns:
        `out`; the held-out KL `kl_before` and `kl_after` in nats; `steps`, `best_step`, `tokens`,
        `learning_rate` and the like; `losses` and `held_out`, lists of (step, value). Empty in the
        other processes of torchrun. Where no step was better on held-out text, the pruned model is
        written unchanged, and a line says so.

    Raises:
        HFPruneError: bad input, one line, before any work where that is possible.
    """
    check_packages()
    _check_launch()
    if not isinstance(text, str | Path):
        raise ArgumentError(f"text must be a path or the name of a data set, got {shown(text)}")
    out, processes = to_path(out, "out"), launched()
    if processes.count > 1 and not distributed:
        raise ArgumentError(
            f"recover runs in one of {processes.count} processes; distributed=True lets all of "
            "them train"
        )
    first, second = open_source(dense), open_source(pruned)
    _check_pair(first, second, options, output)
    if processes.rank == 0:
        _say_if_of_another(first, second)
        _check_output(first, second, text, out, options, output)
    data = recovery_data(text, first, sampling, options, processes.count)
    setup = set_up(first, second, options, run, data, processes, sampling.seed)
    work = WorkFolder(real(out), _identity(first, second, data, setup))
    if processes.rank == 0:
        _check_room(first, second, out, work.path, data, setup)
        work.begin(resume=options.resume)
    cache = work.teacher if options.cache is None else Path(options.cache)
    from hfprune_fast.recovery.trainer import train  # which takes seconds to import

    with joined(setup.device, processes), work.kept_if_interrupted(processes), ExitStack() as stack:
        opened = open_all(stack, first, second, data, setup, cache, progress)
        with others_alive(), _own_precision():
            outcome = train(opened.student, data, opened.batch, setup, work.path, progress)
        if processes.rank > 0:
            return {}
        if not outcome.best_step:
            say("no step was better on held-out text; the pruned model is written unchanged")
        record = {
            "dense": first.name,
            "dense_fingerprint": first.fingerprint,
            "text": data.data.description["source"],
            **_settings(data, setup),
            "tokens": outcome.steps * data.step_windows * data.window_tokens,
            **outcome.record(),
        }
        changes = opened.changes if outcome.best_step else {}
        if options.adapter:
            if not outcome.best_step:
                reset_lora(opened.student.model)
            write_adapter(opened.student.model, second, out, record, output)
        else:
            write_recovered(second, out, Trained(second, changes), record, output, progress)
    work.delete()
    result = {"out": str(out), "adapter": options.adapter, **record}
    return {**result, "losses": outcome.losses, "held_out": outcome.held_out}


def _check_launch() -> None:
    """Refuse a launch by accelerate that shards the weights.

    Checkpoints and the result are written by one process, which must hold all of them.
    """
    for name in _NOT_SHARED_BY:
        value = os.environ.get(f"ACCELERATE_USE_{name}", "")
        if value.lower() not in ("", "0", "false", "no", "off", "n", "f"):
            raise ArgumentError(
                "recover shares its steps among processes, not the weights, and accelerate's "
                f"configuration asks for {name}; start it with torchrun, or with "
                "accelerate launch --multi_gpu"
            )


@contextmanager
def _own_precision() -> Iterator[None]:
    """Inside, accelerate takes no precision from its launcher's configuration: `dtype` says it."""
    given = os.environ.pop(_PRECISION, None)
    try:
        yield
    finally:
        if given is not None:
            os.environ[_PRECISION] = given


def _check_pair(
    dense: ModelSource,
    pruned: ModelSource,
    options: RecoveryOptions,
    output: OutputOptions,
) -> None:
    """Refuse models that do not belong together, and options that mean nothing here."""
    check_vocabularies(dense.spec.vocab_size, pruned.spec.vocab_size)
    facts_of(pruned.folder)  # raises if the record, which is carried over at the end, is damaged
    sizes = dense.spec.hidden_size, pruned.spec.hidden_size
    if sizes[0] != sizes[1]:
        raise ArgumentError(
            f"dense and pruned must share a hidden size, got {sizes[0]} and {sizes[1]}; recover "
            "takes a model and what was pruned from it"
        )
    if dense.fingerprint == pruned.fingerprint:
        raise ArgumentError(f"dense and pruned are one model, {dense.name}: nothing is to recover")
    if dense.spec.total_params < pruned.spec.total_params:
        raise ArgumentError(
            f"dense must be the larger model, got {dense.spec.total_params:,} and "
            f"{pruned.spec.total_params:,} parameters; are they swapped?"
        )
    if options.lora > sizes[0]:
        raise ArgumentError(
            f"lora must be at most the hidden size, {sizes[0]}, got {options.lora}; lora 0 trains "
            "the weights themselves"
        )
    if options.adapter and (output.verify or output.max_shard_size is not None):
        raise ArgumentError("adapter takes no verify or max_shard_size: peft writes it")
    if options.adapter and pruned.family.tower is not None:
        raise ArgumentError(
            f"adapter: {pruned.name} has its text model within another, where peft would not find "
            "the layers by their names; leave it out, and a whole model is written"
        )


def _say_if_of_another(dense: ModelSource, pruned: ModelSource) -> None:
    """Say it where a pruned model's record names other weights than the dense model's."""
    try:
        record = read_record(pruned.folder)
        known = record["provenance"]["model_fingerprint"], record["base_model"]
    except (CheckpointError, KeyError, TypeError):
        return
    if known[0] != dense.fingerprint:
        say(
            f"{pruned.name} was pruned from {known[1]!s:.100}, whose weights are not those of "
            f"{dense.name}; it is trained to give what {dense.name} gives"
        )


def _check_output(
    dense: ModelSource,
    pruned: ModelSource,
    text: str | Path,
    out: Path,
    options: RecoveryOptions,
    output: OutputOptions,
) -> None:
    """Refuse an output before any work."""
    read = [dense.folder, pruned.folder, *files_of(Path(text))]
    check_not_read([out, work_of(out)], read)
    if options.cache:
        check_not_read([Path(options.cache)], read, "cache")
        check_cache(Path(options.cache), [out, work_of(out)])
    check_output_folder(out, pruned.folder, force=output.force)
    check_work(real(out), resume=options.resume, force=output.force)


def _check_room(
    dense: ModelSource,
    pruned: ModelSource,
    out: Path,
    work: Path,
    data: RecoveryData,
    setup: Setup,
) -> None:
    """Refuse a disk without room for the output, the checkpoints and the dense model's states.

    What an interrupted run has left in `work` takes part of that room already, or is deleted
    before anything is written; its file of states has the room of all of them from the start.
    """
    options, needed = setup.options, setup.checkpoints_bytes
    if not options.adapter:
        needed += sum(shard.path.stat().st_size for shard in pruned.shards.values())
    if options.teacher == "cached":
        states = hidden_bytes(
            data.of_teacher.sequences, data.window_tokens, dense.spec.hidden_size, setup.dtype
        )
        cache = None if options.cache is None else Path(options.cache)
        if cache is None or (not cache.exists() and on_one_disk(cache, out)):
            needed += states
        elif not cache.exists():
            check_writable(cache, states, "cache")
    left = files_of(work) if work.is_dir() else ()
    check_writable(out, max(0, needed - sum(path.lstat().st_size for path in left)))


def _settings(data: RecoveryData, setup: Setup) -> dict[str, Any]:
    """Return how a run is to train."""
    names = ("lora", "train", "loss")
    return {
        "tokens": data.tokens,
        **{name: value for name, value in asdict(setup.options).items() if name in names},
        "learning_rate": setup.learning_rate,
        "step_tokens": data.step_windows * data.window_tokens,
        "seq_len": data.window_tokens,
        "held_out_tokens": len(data.held_out) * data.window_tokens,
        "seed": setup.seed,
        "dtype": str(setup.dtype).removeprefix("torch."),
    }


def _identity(
    dense: ModelSource, pruned: ModelSource, data: RecoveryData, setup: Setup
) -> dict[str, Any]:
    """Return what tells a run from others: all that its result depends on."""
    return {
        "recovery": 1,
        "dense": dense.fingerprint,
        "pruned": pruned.fingerprint,
        "windows": data.data.sha256,
        **_settings(data, setup),
    }
