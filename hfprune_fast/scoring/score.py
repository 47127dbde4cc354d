"""hf.score: from a model and text, or a loaded model and token batches, to the table of scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.config import CalibrationOptions, RunOptions, ScoringOptions
from hfprune_fast.console import to_path
from hfprune_fast.data.batches import token_data
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.data.sources import STDIN
from hfprune_fast.engine.distributed import Processes, joined, launched, own_device
from hfprune_fast.engine.layerwise import ResidentModel, own_modes
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.errors import ArgumentError
from hfprune_fast.models.plain import plain_model
from hfprune_fast.models.spec import spec_of
from hfprune_fast.options import keyword_options
from hfprune_fast.scoring.job import ScoringJob, check_criteria
from hfprune_fast.scoring.run import backend_for
from hfprune_fast.scoring.table import ImportanceTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@keyword_options(calibration=CalibrationOptions, run=RunOptions, scoring=ScoringOptions)
@own_modes()
def score(
    model_or_path: PreTrainedModel | str | Path | ModelSource,
    batches_or_source: Iterable[Any] | Tensor | NDArray[Any] | str | Path,
    *,
    criterion: str | Sequence[str] = "entropy",
    obs: bool = False,
    state_file: str | Path | None = None,
    distributed: bool = False,
    progress: bool = False,
    calibration: CalibrationOptions,
    run: RunOptions,
    scoring: ScoringOptions,
) -> ImportanceTable:
    """Score every MLP neuron of a model, by default by the paper's criterion.

    Args:
        model_or_path: a loaded causal language model, or a folder, hub name or `demo`. Its MLPs
            and head must be plain (`models.plain.plain_model`); adapters on its attention are part
            of what is scored.
        batches_or_source: token batches: (B, T) integers each, or mappings with such `input_ids`
            and an `attention_mask` of padding on one side; or one (N, T) tensor or array; or, for a
            model given by path, a text as `data.calibration.token_windows` takes it.
        criterion: one or several of `scoring.criteria`, which share the forward.
        obs: also the cost of removing each neuron when the others are refitted (`scoring.obs`);
            needs criterion "fisher", another forward and O(F³) a layer.
        state_file: save the sums so far in this file, every `save_seconds` (after each pass if 0)
            and when interrupted, for `resume`. The caller deletes it when the table is safe.
        distributed: torchrun started this program, and every process calls this function with the
            same arguments: each scores its share, and all return the table of the whole.
        progress: show a bar on stderr.

    Returns:
        The table of all statistics, (L, F) float64 each, from which any ratio can be selected. The
        scores do not depend on batch_size and offload but for rounding, and the caller's autocast
        and inference mode do not affect them.

    Raises:
        HFPruneError: bad input, one line; its subclasses say which kind.
    """
    processes = launched() if distributed else Processes()
    one = isinstance(criterion, str) or not isinstance(criterion, Iterable)
    criteria: tuple[str, ...] = (criterion,) if one else tuple(criterion)  # type: ignore[assignment]
    state_file = None if state_file is None else to_path(state_file, "state_file")
    check_criteria(criteria, obs, scoring, processes)
    if scoring.resume and state_file is None:
        raise ArgumentError("resume needs the state_file of the interrupted run, got none")
    if isinstance(model_or_path, str | Path | ModelSource):
        job = open_job(
            model_or_path, batches_or_source, criteria, obs, calibration, run, scoring, processes
        )
    else:
        _check_loaded(run, batches_or_source, state_file)
        model_inside = plain_model(model_or_path, "score")
        loaded, spec = ResidentModel(model_inside), spec_of(model_inside)
        data = token_data(batches_or_source, spec.vocab_size)
        job = ScoringJob(loaded, spec, data, criteria, obs, scoring, calibration.seed, processes)
    with joined(job.subject.device, processes):
        plan, resume_file = job.plan(run, state_file)
        with open_model(
            job.subject, plan.offload,
            streams_on_device=plan.streams_on_device, backend=job.backend,
        ) as model:  # fmt: skip
            return job.run(model, plan, resume_file, progress)[0]


def open_job(
    model: str | Path | ModelSource,
    batches_or_text: Any,
    criteria: tuple[str, ...],
    obs: bool,
    calibration: CalibrationOptions,
    run: RunOptions,
    scoring: ScoringOptions,
    processes: Processes,
) -> ScoringJob:
    """Open a model by path and read its calibration; no weights are loaded yet."""
    device = own_device(run.device, processes)
    # Refused now rather than after minutes of reading; float32 stands for what will be loaded.
    like = torch.empty(0, device=loading.torch_device(device))
    backend_for(like, scoring.backend, scoring.parity)
    source = open_source(model)
    if isinstance(batches_or_text, str | Path):
        if str(batches_or_text) == STDIN and processes.count > 1:
            raise ArgumentError("stdin (-) is read by one process alone; give a file to several")
        data = calibrate(batches_or_text, source, calibration)
    else:
        data = token_data(batches_or_text, source.spec.vocab_size)
    dtype = run.dtype
    if scoring.parity and dtype == "auto" and source.stored_dtype == torch.bfloat16:
        dtype = "bfloat16"  # in which the paper's code rounds, however slow this CPU is in it
    blueprint = loading.blueprint(source, dtype=dtype, device=device, attention=run.attention)
    return ScoringJob(
        blueprint, source.spec, data, criteria, obs, scoring, calibration.seed, processes
    )


def _check_loaded(run: RunOptions, batches: Any, state_file: str | Path | None) -> None:
    if (run.device, run.dtype, run.attention) != ("auto", "auto", "auto"):
        raise ArgumentError(
            "device, dtype and attention are those of the loaded model; move or cast it first"
        )
    if state_file is not None:
        raise ArgumentError("state_file needs the model by path, to tell it from others")
    if isinstance(batches, str | Path):
        raise ArgumentError(
            "a loaded model is scored over token batches; give the model by path to use text"
        )
