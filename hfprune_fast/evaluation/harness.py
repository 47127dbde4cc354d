"""Tasks of lm-evaluation-harness on a dense and a pruned model, side by side.

The harness asks and counts; the models are loaded as everywhere here (any layout, no remote code),
one at a time, and the tasks with their data are made before the first of them.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfprune_fast.checkpoint.loading import Blueprint, blueprint, build
from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.config import RunOptions, TaskOptions
from hfprune_fast.console import count_bar, say
from hfprune_fast.engine.layerwise import check_finite
from hfprune_fast.errors import ArgumentError, is_out_of_memory, one_line_errors, shown
from hfprune_fast.evaluation.tasks import hub_code_refused, load_tasks, seed_fewshot
from hfprune_fast.options import keyword_options

_REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
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
        ArgumentError: tasks are unknown, without data, or not to be run (see
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
    from lm_eval.models.huggingface import HFLM

    plan = _blueprint(source, options)
    model = build(plan)
    for key, parameter in model.named_parameters():
        check_finite(key, parameter)
    what = "tasks" if seq_len is None else f"tasks with seq_len {seq_len}"
    batch_size = options.batch_size or (_GPU_BATCH_SIZE if plan.device.type == "cuda" else 1)
    while True:
        lm = HFLM(
            pretrained=model,
            tokenizer=source.tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=seq_len,
        )
        try:
            with (
                _bars_of_ours(lm, name, progress),
                hub_code_refused(),
                one_line_errors(what, ArgumentError),
            ):
                seed_fewshot(loaded)
                return dict(evaluate(lm, loaded, limit=limit))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or batch_size == 1:
                raise
            error.__traceback__ = None  # its frames hold the logits
        batch_size //= 2
        say(f"out of memory; continuing with batches of {batch_size}")
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Counter:
    """Takes the place of the harness's cache, which is given every answer."""

    on_answer: Any

    def add_partial(self, *_: Any) -> None:
        self.on_answer(1)


@contextmanager
def _bars_of_ours(lm: Any, name: str, show: bool) -> Iterator[None]:
    """Show one bar for each kind of request in place of the harness's own bars."""
    stderr = sys.stderr

    def counted(kind: str) -> Any:
        method = getattr(lm, kind)

        def answer(requests: Sequence[Any]) -> Any:
            with (
                redirect_stderr(stderr),
                count_bar(f"{name}, {kind}", len(requests), show) as on_answer,
                redirect_stderr(nowhere),
            ):
                lm.cache_hook = _Counter(on_answer)
                return method(requests, disable_tqdm=True)

        return answer

    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stderr(nowhere),
        redirect_stdout(nowhere),  # of a task's own Python
    ):
        for kind in _REQUESTS:
            setattr(lm, kind, counted(kind))
        try:
            yield
        finally:  # they hold the model, which holds them
            for kind in _REQUESTS:
                delattr(lm, kind)


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
