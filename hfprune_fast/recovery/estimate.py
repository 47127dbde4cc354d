"""What a recovery takes: memory, disk and products, from a model's config.json alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hfprune_fast.checkpoint.skeleton import skeleton
from hfprune_fast.config import RecoveryOptions, RunOptions
from hfprune_fast.console import human_bytes
from hfprune_fast.engine.planner import plan_run
from hfprune_fast.models.sites import parts_of
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.recovery.adapters import linears
from hfprune_fast.recovery.teacher import hidden_bytes

_TRAINED_COPIES = 4  # of a trained number: itself, its gradient, Adam's two moments
_CHECKPOINTS = 3  # on disk at once, without gradients: the last, the best, one being written


def estimate(
    config: Any,
    spec: ModelSpec,
    sizes: tuple[Any, Any],
    options: RecoveryOptions,
    run: RunOptions,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seq_len: int,
) -> dict[str, Any]:
    """Return the bytes and FLOPs of a recovery of a model that is pruned to these sizes.

    Without the products of attention. Activations are the dense model's, which are more.

    Args:
        config: of transformers, of the dense model.
        sizes: widths and experts, as `ModelSpec.params_at` takes them.
    """
    trained, held = held_bytes(config, spec, sizes, options, dtype, spec.total_params)
    student = replace(run, offload="none")
    windows = -(-options.tokens // seq_len) + options.held_out
    shape: dict[str, Any] = {"device": device, "dtype": dtype, "seq_len": seq_len}
    plan = plan_run(spec, student, **shape, sequences=windows, resident_bytes=sum(held.values()))
    taught = windows if options.trains_on_dense else options.held_out
    flops = product_flops(spec, sizes, options, trained, taught * seq_len)
    parts = {**held, "activations_bytes": plan.activations_bytes}
    states = hidden_bytes(taught, seq_len, spec.hidden_size, dtype)
    return {
        "tokens": options.tokens,
        "lora": options.lora,
        "trained_params": trained,
        **parts,
        "total_bytes": sum(parts.values()),
        "free_bytes": plan.free_bytes,
        "hidden_states_bytes": 0 if options.teacher == "resident" else states,
        "checkpoints_bytes": checkpoints_bytes(held["trained_bytes"]),
        "flops": flops,
    }


def held_bytes(
    config: Any, spec: ModelSpec, sizes: tuple[Any, Any], options: RecoveryOptions,
    dtype: torch.dtype, dense_params: int,
) -> tuple[int, dict[str, int]]:  # fmt: skip
    """Return how many numbers are trained, and the bytes in memory as long as a recovery trains.

    They are of the frozen weights, the dense model's head among them, or all of it where it is
    resident, and of the trained ones with their gradients and Adam's moments. The arguments are
    those of `estimate`, and the dense model's parameters.
    """
    trained, params = _trained(config, spec, sizes, options), spec.params_at(*sizes)
    # Without adapters the student is in float32 at least, with what is frozen in it.
    wide = torch.promote_types(dtype, torch.float32).itemsize
    student = params * dtype.itemsize if options.lora else (params - trained) * wide
    of_dense = spec.vocab_size * spec.hidden_size
    if options.teacher == "resident":
        of_dense = dense_params
    frozen = student + of_dense * dtype.itemsize
    return trained, {"weights_bytes": frozen, "trained_bytes": trained * _TRAINED_COPIES * wide}


def product_flops(
    spec: ModelSpec, sizes: tuple[Any, Any], options: RecoveryOptions, trained: int, states: int
) -> int:
    """Return what a recovery multiplies, without the products of attention.

    Args:
        spec: of the dense model.
        sizes: of the pruned one, as in `estimate`.
        trained: how many numbers are.
        states: tokens that the dense model runs over.
    """
    linear, head = spec.linear_params_at(*sizes), spec.vocab_size * spec.hidden_size
    # Forward, activations' gradients and the teacher's logits; gradients of weights.
    each = 4 * linear + 2 * head + (6 if options.lora else 2) * trained
    return 2 * spec.linear_params * states + options.tokens * each


def checkpoints_bytes(trained_bytes: int) -> int:
    """Return what a run's checkpoints take on disk, from what is trained in memory."""
    return _CHECKPOINTS * trained_bytes // _TRAINED_COPIES * (_TRAINED_COPIES - 1)


def text(found: dict[str, Any]) -> str:
    """Return an estimate as human-readable text, without the time it takes."""
    what = f"by LoRA of rank {found['lora']}" if found["lora"] else "of the weights themselves"
    return (
        f"recover, {found['tokens']:,} tokens {what}, {found['trained_params']:,} trained: about "
        f"{human_bytes(found['total_bytes'])} of {human_bytes(found['free_bytes'])}: weights "
        f"{human_bytes(found['weights_bytes'])}, trained ones with optimizer "
        f"{human_bytes(found['trained_bytes'])}, activations "
        f"{human_bytes(found['activations_bytes'])}; on disk, while it runs, hidden states of the "
        f"dense model {human_bytes(found['hidden_states_bytes'])}, checkpoints "
        f"{human_bytes(found['checkpoints_bytes'])}"
    )


def _trained(config: Any, spec: ModelSpec, sizes: tuple[Any, Any], options: RecoveryOptions) -> int:
    """Return how many numbers are trained."""
    widths, experts = sizes
    each = [widths] * spec.num_layers if isinstance(widths, int) else list(widths)
    model = skeleton(config)
    parts = parts_of(model)
    count, width = experts or (spec.num_experts, spec.expert_width)
    mixtures = len(parts.with_experts) * count
    if not options.lora and options.train == "all":
        return spec.params_at(*sizes)
    if not options.lora:
        return sum(each) * spec.params_per_neuron + mixtures * width * spec.expert_params_per_neuron
    rank, hidden = options.lora, spec.hidden_size
    # gate, up and down: (width + hidden) · rank each; one tensor of gate and up has 2 · width rows.
    total = mixtures * rank * (3 * width + 2 * hidden)
    for layer, mlp in parts.own_mlps.items():
        total += rank * (3 * each[layer] + (2 if mlp.fused else 3) * hidden)
    if options.train == "all":
        modules = dict(model.named_modules())
        _, others = linears(model, parts)
        for path in others:
            module = modules[path]
            assert isinstance(module, nn.Linear)
            total += rank * (module.in_features + module.out_features)
    return total
