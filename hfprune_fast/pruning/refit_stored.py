"""The refit of a run, as the writer of checkpoints takes it, with a bar and what is to be said."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.checkpoint.written import stored_down_projs, stored_rows
from hfprune_fast.console import say, token_bar
from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.pruning.refit import refit
from hfprune_fast.pruning.selection import Keep
from hfprune_fast.scoring.costs import TOKENS_A_NEURON


def refit_stored(
    model: ResidentModel,
    batches: list[MicroBatch],
    source: ModelSource,
    keep: Keep,
    reconstruct: dict[int, Tensor] | None = None,
    progress: bool = False,
) -> tuple[dict[str | tuple[str, int], Tensor], dict[str, Any]]:
    """Return refitted weights as `prune_checkpoint` replaces them, and what is recorded of it.

    The arguments are those of `refit`.
    """
    tokens = sum(batch.tokens for batch in batches)
    name = "refitting" if reconstruct is None else "reconstructing"
    layers, with_experts = len(model.parts.layers), len(model.parts.with_experts)
    if reconstruct == {} and with_experts < layers:
        say(
            "reconstructing by plain squared error; a run that scores by fisher itself and selects "
            "by obs comes closer, as it knows how much each direction of the stream matters"
        )
    with token_bar(name, tokens, progress) as on_progress:
        (result,), _ = refit(
            model, batches, [keep], reconstruct=reconstruct, on_progress=on_progress
        )
    if result.untrained:
        say(
            f"refitted by least squares alone, of {layers} layers: {result.untrained}, with "
            "experts or an MLP whose output is added in a way that is not known here"
        )
    if result.unimproved:
        say(
            f"refitted by least squares alone, of {layers} layers: {result.unimproved}, of which "
            "no step was better on the tokens held out; more --samples may help"
        )
    if result.unfitted:
        say(
            f"{result.unfitted} experts are not refitted: fewer than {TOKENS_A_NEURON} tokens for "
            "each kept neuron chose them; more --samples would reach them"
        )
    replace = stored_down_projs(source, result.weights, keep) | stored_rows(source, result.rows)
    return replace, {} if reconstruct is None else {"reconstructed_layers": len(result.rows)}
