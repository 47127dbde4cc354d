"""Score micro-batches in passes, and go on in smaller ones when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hfprune_fast.console import say
from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.errors import ArgumentError, MemoryShortageError, one_line
from hfprune_fast.kernels import (
    resolve_backend,
)
from hfprune_fast.scoring.passes import How, _Pass, no_totals
from hfprune_fast.scoring.resume import Totals


def score_batches(
    model: ResidentModel,
    batches: Sequence[MicroBatch],
    how: How,
    totals: Totals | None = None,
    *,
    most: int | None = None,
    committed: Callable[[Totals, int], object] = lambda totals, most: None,
    done: Callable[[float], object] = lambda tokens: None,
) -> Totals:
    """Score every MLP neuron over micro-batches, in their order.

    Out of memory, micro-batches and passes are halved, then layers recomputed, and the pass is run
    again.

    Args:
        model: entered, so in evaluation mode.
        batches: micro-batches, also those that are done.
        how: ways and means.
        totals: those of the first sequences, which are done; by default of none.
        most: how many sequences a micro-batch may have, if by now less than they have.
        committed: called after each pass with the new totals and the most sequences that a
            micro-batch now has.
        done: called with the tokens that were worked on, a layer at a time; in all, as many as
            there were to do.

    Raises:
        MemoryShortageError: not even one sequence fits, with recomputing.
        NumericsError: NaN or inf in a weight or a layer's activations or gradients, named.
    """
    totals = totals or no_totals(model, how)
    most = most or max((len(batch.ids) for batch in batches), default=0)
    todo = _left(batches, totals.samples, most)
    while todo:
        a_pass = _next_pass(todo, how.pass_tokens)
        run = _Pass(model, a_pass, how, done)
        try:
            totals = run.add_to(totals)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            why = one_line(error)
            error.__traceback__ = None  # which holds the tensors of the pass
        else:
            todo = todo[len(a_pass) :]
            committed(totals, most)
            continue
        done(-run.counted)
        run.clear()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        largest = max(len(batch.ids) for batch in a_pass)
        passes = ""
        if len(a_pass) > 1:  # whose layers' inputs may be what did not fit
            how = replace(how, pass_tokens=sum(batch.ids.numel() for batch in a_pass) // 2)
            passes = f", at most {how.pass_tokens} tokens a pass"
        if largest > 1 or passes:
            most = (largest + 1) // 2
            todo = _left(batches, totals.samples, most)
            say(f"out of memory; going on with micro-batches of {most}{passes}")
        elif not how.recompute:
            how = replace(how, recompute=True)
            say("out of memory; going on with layers recomputed in the backward")
        else:
            raise MemoryShortageError(
                "out of memory with one sequence at a time; try a smaller --seq-len, "
                f"--dtype bfloat16 or --offload disk ({why})"
            )
    return totals


def backend_for(tensor: Tensor, backend: str | None, parity: bool) -> str:
    """Return the backend that will score a model whose weights are like tensor."""
    try:
        chosen = resolve_backend(backend or ("torch" if parity else None), tensor)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    if parity and chosen == "triton":
        raise ArgumentError("parity rounds as plain torch does; backend must be torch, got triton")
    return chosen


def _left(batches: Sequence[MicroBatch], samples: int, most: int) -> list[MicroBatch]:
    """Return what is left when so many sequences are done, in micro-batches of at most `most`.

    Of nothing else, so that a run that is resumed goes on with the same ones.
    """
    left: list[MicroBatch] = []
    for batch in batches:
        done = min(samples, len(batch.ids))
        samples -= done
        if done < len(batch.ids):
            rest = MicroBatch(batch.ids[done:], batch.lengths[done:], batch.first + done)
            left += rest.split(most)
    return left


def _next_pass(todo: list[MicroBatch], tokens: int) -> list[MicroBatch]:
    """Return the first micro-batches, as many as hold so many tokens, padding too; at least 1."""
    a_pass = todo[:1]
    held = todo[0].ids.numel()
    for batch in todo[1:]:
        held += batch.ids.numel()
        if held > tokens:
            break
        a_pass.append(batch)
    return a_pass


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so: CUDA's class, Python's, or what torch's CPU allocator raises."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        any(text in str(error) for text in ("allocate memory", "enough memory", "out of memory"))
    )
