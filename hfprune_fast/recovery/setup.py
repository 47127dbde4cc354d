"""How a recovery runs on this machine, and what it trains: teacher, student and batches, opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.config import RecoveryOptions, RunOptions
from hfprune_fast.console import human_seconds, say
from hfprune_fast.engine import machine
from hfprune_fast.engine.distributed import Processes, own_device
from hfprune_fast.engine.layerwise import Head, ResidentModel, check_finite
from hfprune_fast.engine.plan import Plan
from hfprune_fast.engine.planner import plan_run
from hfprune_fast.engine.weights import CheckpointTensors
from hfprune_fast.errors import ArgumentError, UnsupportedModelError, one_line_errors
from hfprune_fast.models.sites import parts_of
from hfprune_fast.recovery.adapters import Changes, add_lora, unfreeze
from hfprune_fast.recovery.data import RecoveryData
from hfprune_fast.recovery.estimate import checkpoints_bytes, held_bytes, product_flops
from hfprune_fast.recovery.loss import RecoveryLoss
from hfprune_fast.recovery.student import Student, final_hidden
from hfprune_fast.recovery.teacher import TeacherFile, fill, is_teacher

# The default learning rate times the hidden size, by a sweep: see docs/recovery.md. With Adam, the
# best rate of a matrix falls as its width grows.
_LORA_RATE, _FULL_RATE = 0.4, 0.1
_LONG_SECONDS = 24 * 3600.0  # of products, which are told before they begin


@dataclass(frozen=True)
class Setup:
    """How a run runs here: its options, and what they leave open."""

    options: RecoveryOptions
    run: RunOptions
    seed: int
    device: torch.device
    dtype: torch.dtype  # that both models run in
    plan: Plan  # of the student
    batch_size: int  # windows at once, in each process
    processes: Processes
    learning_rate: float
    recompute: bool
    checkpoints_bytes: int  # on disk


@dataclass(frozen=True)
class Opened:
    """A student with its teacher, ready to train."""

    student: Student
    data: RecoveryData
    changes: Changes
    teacher: TeacherFile | None

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Return what the student takes of windows, by their numbers."""
        batch, places = {"ids": self.data.ids[list(numbers)]}, self.data.places(numbers)
        if self.teacher is not None and places is not None:
            batch["states"] = self.teacher.read(places)
        return batch


def set_up(
    dense: ModelSource,
    pruned: ModelSource,
    options: RecoveryOptions,
    run: RunOptions,
    data: RecoveryData,
    processes: Processes,
    seed: int,
) -> Setup:
    """Choose device, dtype and how many windows run at once.

    Raises:
        ArgumentError: a device or dtype that nothing is trained on or in.
    """
    device = loading.torch_device(own_device(run.device, processes))
    if device.type == "cuda" and processes.count == 1 and device.index:
        raise ArgumentError(
            f"recover trains on the first GPU that it sees, got device {run.device}; choose one "
            "with CUDA_VISIBLE_DEVICES"
        )
    dtype = loading.dtype_to_run_in(run.dtype, pruned.stored_dtype, device)
    if dtype == torch.float16:
        if run.dtype == "float16":
            raise ArgumentError(
                "recover does not train in float16; choose --dtype bfloat16 or float32"
            )
        dtype = torch.bfloat16
    spec = pruned.spec
    config, sizes = pruned.transformers_config, (spec.widths, None)
    trained, held = held_bytes(config, spec, sizes, options, dtype, dense.spec.total_params)
    plan = plan_run(
        spec,
        replace(run, offload="none"),
        device=device,
        dtype=dtype,
        seq_len=data.window_tokens,
        sequences=len(data.order),
        resident_bytes=sum(held.values()),
    )
    if plan.recompute and not options.gradient_checkpointing:
        say("memory is short, so activations are computed again in the backward pass")
    states = data.of_teacher.tokens
    flops = product_flops(dense.spec, sizes, options, trained, states) / processes.count
    seconds = flops / machine.product_flops_per_second(device, dtype)
    if seconds > _LONG_SECONDS and processes.rank == 0:
        say(
            f"{data.tokens:,} tokens in {data.steps:,} steps are about {human_seconds(seconds)} of "
            "products at this machine's speed"
        )
    share = data.step_windows // processes.count
    batch_size = max(n for n in range(1, share + 1) if share % n == 0 and n <= plan.batch_size)
    rate = options.learning_rate
    if rate is None:
        rate = (_LORA_RATE if options.lora else _FULL_RATE) / pruned.spec.hidden_size
    return Setup(
        options=options,
        run=run,
        seed=seed,
        device=device,
        dtype=dtype,
        plan=plan,
        batch_size=batch_size,
        processes=processes,
        learning_rate=rate,
        recompute=options.gradient_checkpointing or plan.recompute,
        checkpoints_bytes=checkpoints_bytes(held["trained_bytes"]),
    )


def open_all(
    stack: ExitStack,
    dense: ModelSource,
    pruned: ModelSource,
    data: RecoveryData,
    setup: Setup,
    cache: Path,
    progress: bool,
) -> Opened:
    """Run the dense model, or open it, and then open the student.

    Args:
        cache: the file of the dense model's hidden states.
    """
    options = setup.options
    where: dict[str, Any] = {"device": str(setup.device), "attention": setup.run.attention}
    in_dtype = {**where, "dtype": _name(setup.dtype)}
    resident, file = None, None
    if options.teacher == "resident":
        built = loading.build(loading.blueprint(dense, **in_dtype))
        teacher = stack.enter_context(ResidentModel(built))

        def resident(ids: Tensor) -> Tensor:
            with torch.no_grad():
                return final_hidden(teacher.parts, ids)

        head = teacher.head()
    else:
        file = _cached(dense, pruned, in_dtype, data, setup, cache, progress)
        head = _head_alone(dense, setup)
    # Weights that are trained are in float32, beside which products are made in the run's dtype.
    dtype = setup.dtype if options.lora else torch.promote_types(setup.dtype, torch.float32)
    opened = stack.enter_context(
        ResidentModel(loading.build(loading.blueprint(pruned, dtype=_name(dtype), **where)))
    )
    model: Any = opened.model
    if setup.recompute:
        with one_line_errors("gradient checkpointing", UnsupportedModelError):
            _recompute(model)
    if options.lora:
        model, changes = add_lora(model, opened.parts, options, setup.seed)
    else:
        changes = unfreeze(model, opened.parts, options)
    own, frozen = opened.parts.head, None
    if not own.weight.requires_grad:  # cast once, if at all
        weight, bias = (None if t is None else t.to(setup.dtype) for t in (own.weight, own.bias))
        assert weight is not None
        if torch.equal(weight, head.weight):  # pruning does not change it
            head = Head(weight, head.bias, head.logits)
        frozen = Head(weight, bias, opened.parts.logits)
    loss = RecoveryLoss(options.loss, head, setup.plan.logits_budget_bytes)
    student = Student(model, opened.parts, loss, frozen, resident)
    return Opened(student, data, changes, file)


def _cached(
    dense: ModelSource,
    pruned: ModelSource,
    in_dtype: Mapping[str, Any],
    data: RecoveryData,
    setup: Setup,
    cache: Path,
    progress: bool,
) -> TeacherFile:
    """Return the dense model's hidden states; the first process makes them, the others wait.

    The model itself is gone then.
    """
    windows = data.of_teacher
    identity = {"model": dense.fingerprint, "windows": windows.sha256}
    shape = (windows.sequences, windows.longest, dense.spec.hidden_size)
    if setup.processes.rank == 0:
        file = TeacherFile(cache, identity, shape, setup.dtype)
        if not file.is_whole:
            _check_weights(pruned)
        fill(file, loading.blueprint(dense, **in_dtype), windows, setup.run, progress)
    setup.processes.as_the_first(0)
    made = TeacherFile(cache, identity, shape, setup.dtype) if is_teacher(cache) else None
    if made is None or not made.is_whole:
        raise ArgumentError(
            f"this process has no whole {cache}, which the first one made: all of them must share "
            "the folder of out, or of --cache"
        )
    return made


def _check_weights(pruned: ModelSource) -> None:
    """Raise NumericsError for NaN or inf in the student, which opens after the dense model ran."""
    for name in dict.fromkeys(name for stored in pruned.names.values() for name in stored):
        check_finite(name, pruned.read(name))


def _head_alone(dense: ModelSource, setup: Setup) -> Head:
    """Return the dense model's head, and load nothing else of it."""
    plan = loading.blueprint(dense, dtype=_name(setup.dtype), device=str(setup.device))
    parts, path = parts_of(plan.model), dense.family.head
    tensors = CheckpointTensors(dense, setup.dtype)
    weight, bias = (
        tensors.tensor(dense.names[name]).to(setup.device) if name in dense.names else None
        for name in (f"{path}.weight", f"{path}.bias")
    )
    assert weight is not None
    return Head(weight, bias, parts.logits)


def _recompute(model: Any) -> None:
    """Let layers compute their activations again in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
