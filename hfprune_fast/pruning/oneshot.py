"""hf.oneshot: the whole job, from a model and text to a smaller checkpoint.

The checkpoint is opened once, the text tokenised once, the weights loaded once: the model that is
scored is the one that allocations are tried on and that down_proj is refitted to.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hfprune_fast.checkpoint import atomic, native
from hfprune_fast.checkpoint.layouts import check_layout
from hfprune_fast.checkpoint.ours import check_not_read, files_of
from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.config import (
    DATA_FREE,
    MEASURED_ALLOCATIONS,
    REFIT_TOKENS,
    Budget,
    CalibrationOptions,
    OutputOptions,
    PruningCalibration,
    Recipe,
    RecipeChanges,
    ReportOptions,
    RunOptions,
    ScoringOptions,
)
from hfprune_fast.console import say, to_path
from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.data.calibration import window_tokens
from hfprune_fast.engine.distributed import Processes, joined, launched
from hfprune_fast.engine.layerwise import ResidentModel, own_modes
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.errors import ArgumentError, shown
from hfprune_fast.options import keyword_options
from hfprune_fast.pruning import allocation
from hfprune_fast.pruning.after import AfterPruning, say_what_could_be_closer
from hfprune_fast.pruning.experts import ExpertBudget
from hfprune_fast.pruning.on_disk import check_output_folder, prune_checkpoint
from hfprune_fast.pruning.recipe import checked_recipe, for_experts
from hfprune_fast.pruning.record import is_padded
from hfprune_fast.pruning.refit_stored import refit_stored
from hfprune_fast.pruning.selection import Keep, WidthBudget, budget_of
from hfprune_fast.scoring.costs import TOKENS_A_NEURON
from hfprune_fast.scoring.data_free import data_free_table
from hfprune_fast.scoring.job import ScoringJob
from hfprune_fast.scoring.resume import check_state, delete_state, state_of
from hfprune_fast.scoring.score import open_job
from hfprune_fast.scoring.table import ImportanceTable, check_table, saved_on_failure


@keyword_options(
    changes=RecipeChanges,
    budget=Budget,
    sampling=PruningCalibration,
    run=RunOptions,
    scoring=ScoringOptions,
    output=OutputOptions,
    reported=ReportOptions,
)
@own_modes()
def oneshot(
    model: str | Path | ModelSource,
    calibration: str | Path | None,
    out: str | Path,
    *,
    recipe: str | Recipe = "default",
    scores: ImportanceTable | str | Path | None = None,
    distributed: bool = False,
    progress: bool = False,
    changes: Any,
    budget: Budget,
    sampling: PruningCalibration,
    run: RunOptions,
    scoring: ScoringOptions,
    output: OutputOptions,
    reported: ReportOptions,
) -> dict[str, Any]:
    """Score a model, choose its neurons, refit what stays and write the smaller checkpoint.

    Args:
        model: a model folder, hub name or `demo`; it is only read.
        calibration: text to score on and refit to; None where `scores` or a criterion without data
            is enough.
        out: the folder to make. It appears under this name only when whole.
        recipe: "default", "paper" or a Recipe; its fields can be changed one by one.
        scores: a table, or the file of one, to rank by instead of scoring.
        distributed: torchrun started this program: all processes score, the first does the rest.
        progress: show bars and the plan on stderr.

    Returns:
        What was achieved: `out`, widths, parameters, ratios, the recipe, the allocation chosen and
        its KL in nats, the fidelity if `text` is given; empty in the other processes of torchrun.

    Raises:
        HFPruneError: bad input, one line, before any work where that is possible.
    """
    out, processes = to_path(out, "out"), launched() if distributed else Processes()
    given = _given(scores, scoring)
    resolved = checked_recipe(recipe, asdict(changes), given, calibration, scoring, processes)
    source = open_source(model)
    widths = budget_of(source.spec, budget)
    params = source.spec.params_at(*widths.sizes(source.spec))
    check_output(source, out, params, output, calibration, resume=scoring.resume)
    if isinstance(widths, ExpertBudget):
        resolved = for_experts(resolved, budget)
        if output.layout != "auto":
            check_layout(source.config, output.layout)
    elif resolved.allocation != "uniform" or budget.protect:
        check_layout(source.config, output.layout)
    given = _checked(given, source, resolved, sampling)
    if calibration is not None:
        neurons = source.spec.intermediate_size if resolved.refits else 0
        drawn = sampling.drawn(window_tokens(calibration, source, sampling), neurons)
        sampling = replace(sampling, samples=drawn)
    if given is not None and processes.rank > 0:
        return {}
    after = AfterPruning.of(source, out, calibration, sampling, run, output, reported, processes)
    job = None
    if given is None or resolved.refits:
        criteria = () if resolved.criterion in DATA_FREE else (resolved.criterion,)
        obs = resolved.select == "obs"
        job = open_job(source, calibration, criteria, obs, sampling, run, scoring, processes)
    table, batches, dense = given, list[MicroBatch](), None
    covariances: dict[int, Tensor] = {}
    with ExitStack() as stack:
        if job is not None:
            with after.log.stage("scoring" if given is None else "opening the model"):
                dense, batches, table, covariances = _open_and_score(
                    stack, job, given, run, state_of(out), resolved, progress
                )
        if table is None or processes.rank > 0:
            return {}
        if given is None:
            stack.enter_context(saved_on_failure(table, out))
        with after.log.stage("choosing the neurons"):
            keep, chosen = _chosen(table, dense, batches, widths, resolved, progress)
        with after.log.stage("refitting"):
            metrics = covariances if resolved.refit == "reconstruct" else None
            refitted: dict[str | tuple[str, int], Tensor] = {}
            cut = {site: len(kept) for site, kept in keep.items()} != source.spec.sites
            if dense is not None and cut:  # else a refit gives the weights but for rounding
                refitted, facts = refit_stored(dense, batches, source, keep, metrics, progress)
                chosen |= facts
        record = {"requested": _requested(resolved, budget, widths, output)}
        record |= {"chosen": chosen, "provenance": table.provenance}
        with after.log.stage("writing"):
            written: dict[str, Any] = {"record": record, "progress": progress, **asdict(output)}
            achieved = prune_checkpoint(source, out, keep, replace=refitted, **written)
    del dense, batches, covariances, refitted, job  # memory for the models that are measured
    delete_state(out)
    say_what_could_be_closer(achieved, widths, recipe, calibration)
    chosen |= {"verified": output.verify, **after.finish(table, progress)}
    return {"out": str(out), **achieved, **asdict(resolved), **chosen}


def _given(
    scores: ImportanceTable | str | Path | None, scoring: ScoringOptions
) -> ImportanceTable | None:
    """Return the scores that are given instead of scoring."""
    if scores is not None and scoring.resume:
        raise ArgumentError("--resume continues scoring, so with --calibration, not --scores")
    given = ImportanceTable.load(scores) if isinstance(scores, str | Path) else scores
    if not isinstance(given, ImportanceTable | None):
        raise ArgumentError(f"scores must be an ImportanceTable or its file, got {shown(scores)}")
    return given


def _checked(
    given: ImportanceTable | None, source: ModelSource, recipe: Recipe, sampling: CalibrationOptions
) -> ImportanceTable | None:
    """Return scores that are this model's: those given, or those that need no text."""
    if is_padded(source.folder):
        raise ArgumentError(
            f"{source.name} is padded with zero neurons, which must not be ranked; prune what "
            "`hfprune export --to custom` makes of it"
        )
    if given is not None:
        check_table(given, source)
    elif recipe.criterion in DATA_FREE:
        return data_free_table(source, recipe.criterion, sampling.seed)
    return given


def _chosen(
    table: ImportanceTable,
    dense: ResidentModel | None,
    batches: list[MicroBatch],
    widths: WidthBudget | ExpertBudget,
    recipe: Recipe,
    progress: bool,
) -> tuple[Keep, dict[str, Any]]:
    """Return the neurons to keep, and the choice as it is recorded."""
    if isinstance(widths, ExpertBudget):
        keep = widths.keep(table, recipe.ranks_by, recipe.criterion)
        return keep, {"allocation": recipe.allocation}
    importance = table.importance(recipe.ranks_by, recipe.criterion)
    return allocation.choose(dense, batches, importance, widths, recipe, progress)


def _requested(
    recipe: Recipe, budget: Budget, widths: WidthBudget | ExpertBudget, output: OutputOptions
) -> dict[str, Any]:
    """Return what hfprune.json says of the request."""
    protect = sorted(budget.protect)
    step = widths.step if isinstance(widths, WidthBudget) else budget.round_to
    of_widths = {"round_to": step, "min_keep": budget.min_keep, "protect": protect}
    return {
        **budget.size,
        **budget.of_experts,
        **asdict(recipe),
        **of_widths,
        "layout": output.layout,
    }


def _open_and_score(
    stack: ExitStack,
    job: ScoringJob,
    given: ImportanceTable | None,
    run: RunOptions,
    state_file: Path,
    recipe: Recipe,
    progress: bool,
) -> tuple[ResidentModel | None, list[MicroBatch], ImportanceTable, dict[int, Tensor]]:
    """Load the weights and score, unless a table is given.

    The model stays open in `stack`, and is returned if it is needed for a refit. The covariances
    are those of `ScoringJob.run`.
    """
    if recipe.refits:
        _warn_of_few_tokens(job)
    if recipe.allocation in MEASURED_ALLOCATIONS and job.data.sequences < 2:
        raise ArgumentError(
            f"allocation {recipe.allocation} holds a calibration sample out, got 1 in all; give "
            "more --samples, or --allocation uniform"
        )
    processes = job.processes if given is None else Processes()
    with joined(job.subject.device, processes):
        plan, resume_file = job.plan(run, state_file if given is None else None, refit=recipe.refit)
        opened = open_model(
            job.subject, plan.offload,
            streams_on_device=plan.streams_on_device, backend=job.backend,
        )  # fmt: skip
        model = stack.enter_context(opened)
        scored = (given, {}) if given else job.run(model, plan, resume_file, progress)
    batches = job.data.split(plan.batch_size)
    return (model if recipe.refits else None), batches, *scored


def _warn_of_few_tokens(job: ScoringJob) -> None:
    tokens, neurons = job.data.tokens, job.spec.intermediate_size
    if tokens < TOKENS_A_NEURON * neurons:
        say(
            f"{tokens} calibration tokens are few to refit {neurons} neurons a layer; "
            f"{REFIT_TOKENS * neurons} bring it closer to the dense model"
        )


def check_output(
    source: ModelSource,
    out: Path,
    params: int,
    output: OutputOptions,
    text: str | Path | None = None,
    *,
    resume: bool = False,
) -> None:
    """Refuse an output of so many parameters before any work; say what earlier runs left there."""
    read = [] if text is None else files_of(Path(text))
    check_not_read([out, state_of(out)], [source.folder, *read])
    dense_bytes = sum(shard.path.stat().st_size for shard in source.shards.values())
    needed_bytes = dense_bytes * params // source.spec.total_params
    check_output_folder(out, source.folder, force=output.force, needed_bytes=needed_bytes)
    check_state(out, resume=resume, force=output.force)
    for leftover in atomic.leftovers(out):
        say(leftover)
    if native.UNUSED_REASON is not None:
        say(f"weights are moved by {native.description()}")
