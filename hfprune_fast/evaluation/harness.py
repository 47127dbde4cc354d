"""Tasks of lm-evaluation-harness on a dense and a pruned model, side by side.

lm-eval builds requests and computes metrics; models load through our own loader (any layout, no
remote code), one at a time, after the tasks and their data.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfprune_fast.checkpoint.loading import Blueprint, blueprint, build
from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.config import RunOptions, TaskOptions
from hfprune_fast.console import Tolerant, say
from hfprune_fast.engine.layerwise import check_finite
from hfprune_fast.errors import ArgumentError, is_out_of_memory, one_line_errors, shown
from hfprune_fast.evaluation.tasks import hub_code_refused, load_tasks, seed_fewshot
from hfprune_fast.options import keyword_options

_GPU_BATCH_SIZE = 8  # it is halved when memory runs out


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task; a standard error is None where the harness gives none.

    `difference` is pruned - dense. Its error is that of the mean over documents of the difference,
    both models having answered the same ones, so it is smaller than those of the two.
    """

    task: str
    metric: str
    dense: float
    dense_stderr: float | None
    pruned: float
    pruned_stderr: float | None
    difference: float
    difference_stderr: float | None


@keyword_options(options=RunOptions, which=TaskOptions)
def evaluate_tasks(
    dense: str | Path | ModelSource,
    pruned: str | Path | ModelSource,
    *,
    options: RunOptions,
    which: TaskOptions,
    seq_len: int | None = None,
    progress: bool = False,
) -> list[TaskResult]:
    """Run tasks of lm-evaluation-harness on two checkpoints, one in memory at a time.

    Args:
        dense, pruned: model folders, hub names or `demo`.
        seq_len: tokens of a window, or of a question with its answer, at most; default: the
            longest that the model takes.

    Raises:
        ArgumentError: tasks are unknown, lack data or are refused (see
            `evaluation/tasks.py`); the harness is missing; weights would be offloaded.
        CheckpointError: a model or its tokenizer cannot be loaded.
    """
    sources = open_source(dense), open_source(pruned)
    for source in sources:
        _check(source, options, seq_len)
    loaded = load_tasks(which)
    answers = [
        _answers(name, source, loaded, options, which.limit, seq_len, progress)
        for name, source in zip(("dense", "pruned"), sources, strict=True)
    ]
    return _side_by_side(*answers)


def _check(source: ModelSource, options: RunOptions, seq_len: int | None) -> None:
    """Refuse a model that tasks cannot run on, or raise what is wrong with its files."""
    longest = source.transformers_config.max_position_embeddings
    if seq_len is not None and not (type(seq_len) is int and 2 <= seq_len <= longest):
        raise ArgumentError(
            f"seq_len must be a whole number from 2 to {longest}, the model's longest "
            f"position, for tasks; got {shown(seq_len)}"
        )
    if options.offload in ("cpu", "disk") or options.memory_budget is not None:
        raise ArgumentError(
            "tasks need the whole model on the device; leave offload and memory_budget out"
        )
    _ = source.tokenizer
    _blueprint(source, options)


def _blueprint(source: ModelSource, options: RunOptions) -> Blueprint:
    return blueprint(
        source, dtype=options.dtype, device=options.device, attention=options.attention
    )


def _answers(
    name: str,
    source: ModelSource,
    loaded: dict[str, Any],
    options: RunOptions,
    limit: int | None,
    seq_len: int | None,
    progress: bool,
) -> dict[str, Any]:
    """Return the harness's results of one model, which is in memory meanwhile."""
    from lm_eval.evaluator import evaluate

    plan = _blueprint(source, options)
    model = build(plan)
    for key, parameter in model.named_parameters():
        check_finite(key, parameter)
    lm = _retrying_model()(
        pretrained=model,
        tokenizer=source.tokenizer,
        backend="causal",
        batch_size=options.batch_size or (_GPU_BATCH_SIZE if plan.device.type == "cuda" else 1),
        max_length=seq_len,
    )
    if progress:
        say(f"tasks on the {name} model")
    what = "tasks" if seq_len is None else f"tasks with seq_len {seq_len}"
    with (
        redirect_stderr(Tolerant(sys.stderr if progress else None)),
        redirect_stdout(sys.stderr),  # of a task's own Python; stdout is the command's
        hub_code_refused(),
        one_line_errors(what, ArgumentError),
    ):
        seed_fewshot(loaded)
        try:
            return dict(evaluate(lm, loaded, limit=limit))
        except BaseException:
            sys.stderr.write("\n")  # the harness leaves its bar open; the error gets a line
            raise


def _retrying_model() -> Any:
    """Return the class of the harness's models, with smaller batches where memory runs out."""
    from lm_eval.models.huggingface import HFLM

    stderr = sys.stderr  # messages are shown without progress too

    def halving(lm: Any, answer: Callable[[Any], Any], requests: Any) -> Any:
        while True:
            try:
                return answer(requests)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or lm.batch_size == 1:
                    raise
                error.__traceback__ = None  # its frames hold the logits
            lm.batch_size_per_gpu //= 2
            with redirect_stderr(stderr):
                say(f"out of memory; continuing with batches of {lm.batch_size}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    class Retrying(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: Any) -> Any:
            return halving(self, super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: Any) -> Any:
            return halving(self, super().loglikelihood_rolling, requests)

        def generate_until(self, requests: Any) -> Any:
            return halving(self, super().generate_until, requests)

    return Retrying


def _side_by_side(dense: dict[str, Any], pruned: dict[str, Any]) -> list[TaskResult]:
    """Return the metrics of both models, in the harness's order: groups come after tasks."""
    rows = []
    for task, metrics in dense["results"].items():
        others = pruned["results"][task]
        samples = [each["samples"].get(task, []) for each in (dense, pruned)]
        for key in metrics:
            metric, comma, choice = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            p, q = metrics[key], others[key]
            if not _is_number(p) or not _is_number(q):
                say(f"{task}: {metric} is {p} and {q}; it is left out")
                continue
            errors = [each.get(f"{metric}_stderr,{choice}") for each in (metrics, others)]
            p_error, q_error = (error if _is_number(error) else None for error in errors)
            name = metric if choice == "none" else f"{metric} ({choice})"
            paired = _paired_error(samples, metric, choice, (p, q))
            rows.append(TaskResult(task, name, p, p_error, q, q_error, q - p, paired))
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _paired_error(
    samples: list[list[dict[str, Any]]], metric: str, choice: str, means: tuple[float, float]
) -> float | None:
    """Return the standard error of the mean difference, if the metric is a mean over documents."""
    per_model = [
        [each.get(metric) for each in some if each["filter"] == choice] for some in samples
    ]
    if len(per_model[0]) < 2 or not all(_is_number(x) for xs in per_model for x in xs):
        return None
    both = torch.tensor(per_model, dtype=torch.float64)
    if not torch.allclose(both.mean(dim=1), torch.tensor(means, dtype=torch.float64), rtol=1e-9):
        return None
    return float((both[1] - both[0]).std() / math.sqrt(both.shape[1]))
