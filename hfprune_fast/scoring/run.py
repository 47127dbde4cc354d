"""Score micro-batches in passes, and continue with smaller ones when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, takewhile

import torch
from torch import Tensor

from hfprune_fast.console import say
from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import OnProgress, ResidentModel, no_progress
from hfprune_fast.errors import ArgumentError, MemoryShortageError, is_out_of_memory, one_line
from hfprune_fast.kernels import resolve_backend
from hfprune_fast.scoring.accumulator import ScoreAccumulator
from hfprune_fast.scoring.passes import Pass
from hfprune_fast.scoring.sums import PassOptions, empty_accumulator


def score_batches(
    model: ResidentModel,
    batches: Sequence[MicroBatch],
    options: PassOptions,
    total: ScoreAccumulator | None = None,
    *,
    max_batch_size: int | None = None,
    on_commit: Callable[[ScoreAccumulator, int], object] = lambda *_: None,
    on_progress: OnProgress = no_progress,
) -> ScoreAccumulator:
    """Score every MLP neuron over micro-batches, in their order.

    When memory runs out, micro-batches and passes are halved, then layers recomputed, and the pass
    is run again.

    Args:
        model: the entered model.
        batches: all micro-batches, including those already in `total`.
        total: the sums over the first sequences, if these have been scored; default: of none.
        max_batch_size: sequences in a micro-batch at most, if fewer than the batches have.
        on_commit: called after each pass with the new sums and the current max_batch_size.
        on_progress: called with the tokens processed, a layer at a time.

    Raises:
        MemoryShortageError: not even one sequence fits, with layers recomputed.
        NumericsError: a weight or a layer's activations or gradients, named, hold NaN or inf.
    """
    total = total or empty_accumulator(model, options)
    max_batch_size = max_batch_size or max((len(batch.ids) for batch in batches), default=0)
    remaining = _remaining(batches, total.samples, max_batch_size)
    made, spare = False, None  # whether `total` is of a pass; the sums before it
    while remaining:
        chosen = _next_pass(remaining, options.pass_tokens)
        a_pass = Pass(model, chosen, options, on_progress, spare)
        try:
            new = a_pass.add_to(total)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = one_line(error)
            error.__traceback__ = None  # its frames hold the tensors of the pass
        else:
            spare, total, made = total if made else None, new, True
            remaining = remaining[len(chosen) :]
            on_commit(total, max_batch_size)
            continue
        a_pass.clear()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        largest, limit = max(len(batch.ids) for batch in chosen), ""
        if len(chosen) > 1:  # the inputs of the layers may be what did not fit
            pass_tokens = sum(batch.ids.numel() for batch in chosen) // 2
            options = replace(options, pass_tokens=pass_tokens)
            limit = f", at most {pass_tokens} tokens a pass"
        if largest > 1 or limit:
            max_batch_size = (largest + 1) // 2
            remaining = _remaining(batches, total.samples, max_batch_size)
            say(f"out of memory; continuing with micro-batches of {max_batch_size}{limit}")
        elif not options.recompute:
            options = replace(options, recompute=True)
            say("out of memory; continuing with layers recomputed in the backward")
        else:
            raise MemoryShortageError(
                "out of memory with one sequence at a time; try a smaller --seq-len, "
                f"--dtype bfloat16 or --offload disk ({reason})"
            )
    return total


def backend_for(tensor: Tensor, backend: str | None, parity: bool) -> str:
    """Return the backend that will score a model whose weights are like tensor."""
    try:
        chosen = resolve_backend(backend or ("torch" if parity else None), tensor)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    if parity and chosen != "torch":
        raise ArgumentError(
            f"parity rounds as plain torch does; backend must be torch, got {chosen}"
        )
    return chosen


def _remaining(
    batches: Sequence[MicroBatch], samples: int, max_batch_size: int
) -> list[MicroBatch]:
    """Return the micro-batches that remain after the first `samples` sequences.

    They depend on the arguments alone, so that a resumed run continues with the same ones.
    """
    remaining: list[MicroBatch] = []
    for batch in batches:
        scored = min(samples, len(batch.ids))
        samples -= scored
        if scored < len(batch.ids):
            rest = MicroBatch(batch.ids[scored:], batch.lengths[scored:], batch.first + scored)
            remaining += rest.split(max_batch_size)
    return remaining


def _next_pass(remaining: list[MicroBatch], tokens: int) -> list[MicroBatch]:
    """Return the first micro-batches that hold at most `tokens`, padding included; at least 1."""
    held = accumulate(batch.ids.numel() for batch in remaining)
    return remaining[: max(1, sum(1 for _ in takewhile(lambda n: n <= tokens, held)))]
