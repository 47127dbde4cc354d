"""The whole job: text and a model in (`score_job.score`), scores or a smaller checkpoint out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hfprune_fast.checkpoint import atomic, loading, native
from hfprune_fast.checkpoint import source as checkpoints
from hfprune_fast.config import PRESETS, Recipe
from hfprune_fast.console import say, token_bar
from hfprune_fast.data.calibration import DEFAULT_SEQ_LEN, windows_for
from hfprune_fast.engine import planner
from hfprune_fast.engine.streaming import running
from hfprune_fast.errors import ArgumentError, OutputError, ResumeError, ScoresFileError
from hfprune_fast.evaluation import fidelity
from hfprune_fast.models.families import neuron_axis
from hfprune_fast.pruning import on_disk, selection
from hfprune_fast.pruning.allocation import (
    Cut,
    Fitting,
    allocate,
    asked,
    fitting_options,
    score_in_steps,
)
from hfprune_fast.scoring.passes import column_norms
from hfprune_fast.scoring.score import DEFAULT_SAMPLES, score
from hfprune_fast.scoring.table import ImportanceTable

__all__ = [
    "check_prune",
    "check_score",
    "evaluate_paths",
    "fitting_options",
    "plan",
    "prune_to",
    "score",
    "score_by_recipe",
    "state_of",
    "weights_table",
]

Budget = float | int | None


def state_of(out: Path) -> Path:
    """Return the file that keeps the state of scoring for an output."""
    return out.with_name(f"{out.name}.state")


def check_state(out: Path, *, resume: bool, force: bool) -> None:
    """Refuse to run over what an interrupted run has left, unless told what to do with it."""
    left = state_of(out)
    if left.exists() and force and not resume:
        left.unlink(missing_ok=True)
    if left.exists() and not resume:
        raise ResumeError(
            f"an interrupted run has left {left}; --resume goes on from it, --force discards it"
        )


def check_score(
    model: str | Path, calibration: str | Path, out: Path, *, force: bool, resume: bool = False
) -> None:
    """Raise what would spoil the end of `score`'s run, before any work."""
    folder, target = checkpoints.find_model(model).resolve(), out.resolve()
    source = Path(calibration).resolve()
    if folder in target.parents or target == source or source in target.parents:
        raise OutputError(
            f"out {out} is in the model folder or the calibration text, which are never written to"
        )
    if out.exists() and (not force or not out.is_file()):
        raise OutputError(f"out {out} exists; --force replaces a file, but no folder")
    atomic.check_writable(out)
    check_state(out, resume=resume, force=force)


def check_prune(
    model: str | Path,
    out: str | Path,
    *,
    round_to: int = 1,
    force: bool = False,
    resume: bool = False,
    **budget: Budget,
) -> None:
    """Raise what `prune_to` would refuse of its model, output and budget, before any work."""
    folder = checkpoints.find_model(model)
    size = checkpoints.open_checkpoint(folder).size
    width = selection.target_width(size, round_to=round_to, **budget)  # type: ignore[arg-type]
    dense_bytes = sum(path.stat().st_size for path in checkpoints.weight_files(folder))
    needed_bytes = dense_bytes * size.params_at(width) // size.total_params
    on_disk.check_output_folder(Path(out), folder, force=force, needed_bytes=needed_bytes)
    check_state(Path(out), resume=resume, force=force)
    for leftover in atomic.leftovers(Path(out)):
        say(leftover)
    if native.UNUSED_REASON is not None:
        say(f"weights are moved by {native.description()}")


def score_by_recipe(
    model: str | Path,
    source: str | Path,
    recipe: Recipe,
    out: Path,
    *,
    min_keep: float = selection.MIN_KEEP,
    protect: Collection[int] = (),
    round_to: int = 1,
    prune_ratio: float | None = None,
    param_ratio: float | None = None,
    intermediate_size: int | None = None,
    **how: Any,
) -> ImportanceTable:
    """Score for `prune_to`, in the recipe's steps, whose models are beside `out` for a while."""
    size = checkpoints.open_checkpoint(checkpoints.find_model(model)).size
    width = selection.target_width(
        size,
        round_to=round_to,
        prune_ratio=prune_ratio,
        param_ratio=param_ratio,
        intermediate_size=intermediate_size,
    )
    cut = Cut(width, min_keep, protect, round_to)
    return score_in_steps(model, source, recipe, cut, out.resolve().parent, **how)


def prune_to(
    model: str | Path,
    out: str | Path,
    table: ImportanceTable,
    *,
    recipe: Recipe = PRESETS["paper"],
    calibration: str | Path | None = None,
    fitting: Mapping[str, Any] | None = None,
    min_keep: float = selection.MIN_KEEP,
    protect: Collection[int] = (),
    round_to: int = 1,
    layout: str = "auto",
    max_shard_size: str | None = None,
    verify: bool = False,
    force: bool = False,
    progress: bool = False,
    **budget: Budget,
) -> dict[str, Any]:
    """Select by a table, refit, and write the pruned checkpoint; return what was achieved.

    Args:
        recipe: see `Recipe`; its steps have been gone through when the table was made.
        calibration: what is refitted on, a recipe that does not refit needs none.
        fitting: further options of `prune_job.Fitting`.
        others: as of `select` and `prune_checkpoint`.
    """
    check_table(table, model)
    width = selection.target_width(table.model, round_to=round_to, **budget)  # type: ignore[arg-type]
    cut = Cut(width, min_keep, protect, round_to)
    fits = None
    if recipe.refit:
        if calibration is None:
            raise ArgumentError("refit needs --calibration, the text to fit to; or --no-refit")
        fits = Fitting(model, calibration, **(fitting or {}), progress=progress)
    importance = table.importance(recipe.ranks_by, recipe.criterion)
    keep, chosen = allocate(importance, cut, recipe, fits)
    record = {
        "asked": asked(recipe, cut, budget),
        "chosen": chosen,
        "provenance": table.provenance,
    }
    achieved = on_disk.prune_checkpoint(
        model,
        out,
        keep,
        replace=None if fits is None else fits.refit(keep),
        layout=layout,
        max_shard_size=max_shard_size,
        verify=verify,
        force=force,
        record=record,
        progress=progress,
    )
    return {"out": str(out), **achieved, **asdict(recipe), **chosen, "verified": verify}


def weights_table(model: str | Path, criterion: str, seed: int = 0) -> ImportanceTable:
    """Return a table made without data: "magnitude" of the weights, or "random" numbers."""
    folder = checkpoints.find_model(model)
    opened = checkpoints.open_checkpoint(folder)
    if criterion == "magnitude":
        statistics = {"weight_norm": weight_norms(opened)}
    else:
        generator = torch.Generator().manual_seed(seed)
        shape = opened.size.num_layers, opened.size.intermediate_size
        statistics = {"uniform": torch.rand(shape, dtype=torch.float64, generator=generator)}
    provenance = {
        "criteria": [criterion],
        "model": checkpoints.display_name(model),
        "model_fingerprint": checkpoints.fingerprint(folder),
        **({"seed": seed} if criterion == "random" else {}),
    }
    return ImportanceTable(statistics, opened.size, provenance)


def weight_norms(opened: checkpoints.Checkpoint) -> torch.Tensor:
    """Return the 2-norm of all of a neuron's weights: its gate and up row and its down column."""
    squares = torch.zeros(opened.size.num_layers, opened.size.intermediate_size).double()
    for name in opened.tensors:
        place = neuron_axis(opened.family, name)
        if place is not None and name.endswith(".weight"):
            layer, axis = place
            weight = opened.read(name)
            squares[layer] += column_norms(weight if axis == 1 else weight.t()).square()
    return squares.sqrt()


def check_table(table: ImportanceTable, model: str | Path) -> None:
    """Refuse a table that was scored on another model."""
    folder = checkpoints.find_model(model)
    opened = checkpoints.open_checkpoint(folder)
    size = opened.size
    theirs, ours = asdict(table.model), asdict(size)
    differing = [
        f"{key} {theirs[key]}, not {ours[key]}" for key in ours if theirs[key] != ours[key]
    ]
    if differing:
        raise ScoresFileError(
            f"the scores are of another model than {model}: {'; '.join(differing)}"
        )
    scored = table.provenance.get("model_fingerprint")
    if scored is not None:
        same = scored == checkpoints.fingerprint(folder)
    else:
        # Scored in memory, perhaps in another dtype, which moves a norm by its rounding at most.
        last = f".{size.num_layers - 1}.{opened.family.down}.weight"
        name = next(name for name in opened.tensors if name.endswith(last))
        down = opened.read(name)
        norms = column_norms(down)
        same = torch.allclose(norms, table.down_norm[-1, : len(norms)], rtol=2**-8)
    if not same:
        raise ScoresFileError(
            f"the scores are of another model than {model}: same shape, other weights "
            f"(they are of {table.provenance.get('model', 'a model in memory')})"
        )


def evaluate_paths(
    dense: str | Path,
    pruned: str | Path,
    source: str | Path,
    *,
    seq_len: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "auto",
    memory_budget: str | None = None,
    progress: bool = False,
) -> fidelity.Fidelity:
    """Compare two checkpoints over a text; by default over all of it, in order.

    One model is in memory at a time (or a layer of it, see `offload` of `score`), with the dense
    one's final hidden states.
    """
    folders = [checkpoints.find_model(dense), checkpoints.find_model(pruned)]
    ids = windows_for(folders[0], source, seq_len, samples, seed)
    blueprints = [loading.blueprint(f, dtype=dtype, device=device) for f in folders]
    shapes = [planner.ModelShape.of(b.checkpoint.size, b.model.config) for b in blueprints]
    fidelity.check_vocabularies(*(shape.vocab_size for shape in shapes))
    plan = planner.plan_scoring(
        shapes[0],
        device=blueprints[0].device,
        dtype=blueprints[0].dtype,
        seq_len=ids.shape[1],
        sequences=len(ids),
        batch_size=batch_size,
        offload=offload,
        memory_budget=memory_budget,
    )
    batches = fidelity.windows(ids.split(plan.batch_size), shapes[0].vocab_size)
    with token_bar("evaluating", 2 * ids.numel(), progress) as done:
        with running(blueprints[0], plan.offload) as model:
            hidden = [h.to("cpu") for h in model.final_hidden(batches, done)]
            head = model.head()
        del model, blueprints[0]
        with running(blueprints[0], plan.offload) as model:
            return fidelity.compare(
                batches, hidden, model.final_hidden(batches, done), head, model.head()
            )


def plan(
    model: str | Path,
    *,
    round_to: int = 1,
    seq_len: int | None = None,
    samples: int = DEFAULT_SAMPLES,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "auto",
    memory_budget: str | None = None,
    **budget: Budget,
) -> dict[str, Any]:
    """Say what pruning to a budget would give, and how scoring would run, from config.json alone.

    FLOPs are those of a forward pass over one sequence, per token: 2 for each weight of a linear
    layer, and 4 · seq_len · heads · head_dim a layer for attention's two products. "pruning" is of
    the default recipe, and its seconds are its products' at the speed of one that is timed here.
    """
    folder = checkpoints.find_model(model, config_only=True)
    size = loading.model_size(folder)
    config = loading.build_config(folder)
    width = selection.target_width(size, round_to=round_to, **budget)  # type: ignore[arg-type]
    if seq_len is None:
        seq_len = min(DEFAULT_SEQ_LEN, config.max_position_embeddings)
    if seq_len < 1:
        raise ArgumentError(f"seq_len must be at least 1, got {seq_len}")
    stored = config.dtype or torch.float32
    target = loading.torch_device(device)
    if dtype == "auto":
        to_run_in = loading.dtype_to_run_in(stored, target)
    else:
        to_run_in = getattr(torch, dtype)
    shape = planner.ModelShape.of(size, config)
    options: dict[str, Any] = {
        "device": target,
        "dtype": to_run_in,
        "seq_len": seq_len,
        "sequences": samples,
        "batch_size": batch_size,
        "offload": offload,
        "memory_budget": memory_budget,
    }
    scoring = planner.plan_scoring(shape, **options)
    pruning = planner.plan_scoring(shape, fitting=True, **options)
    flops = planner.pruning_flops(shape, samples * seq_len)
    seconds = flops / planner.product_flops_per_second(target, to_run_in)
    attention = 4 * seq_len * shape.attention_width * size.num_layers
    result = size.pruned_to(width)
    for prefix, neurons in (("dense_", size.intermediate_size), ("", width)):
        result[f"{prefix}weights_bytes"] = size.params_at(neurons) * stored.itemsize
        result[f"{prefix}flops_per_token"] = 2 * size.linear_params_at(neurons) + attention
    return {
        "model": checkpoints.display_name(model),
        **result,
        "dtype": str(stored).removeprefix("torch."),
        "seq_len": seq_len,
        "scoring": {"summary": str(scoring), "device": str(target), **asdict(scoring)},
        "pruning": {"summary": str(pruning), "flops": flops, "seconds": seconds, **asdict(pruning)},
    }
