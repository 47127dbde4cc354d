"""The refit of a run, as the writer of checkpoints takes it, with a bar and what is to be said."""

from __future__ import annotations

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
) -> dict[str | tuple[str, int], Tensor]:
    """Return refitted weights as `prune_checkpoint` replaces them; the args are `refit`'s."""
    tokens = sum(batch.tokens for batch in batches)
    name = "refitting" if reconstruct is None else "reconstructing"
    if reconstruct == {}:
        say(
            "reconstructing by plain squared error; a run that scores by fisher itself, and "
            "selects by obs, knows how much each direction of the stream matters"
        )
    with token_bar(name, tokens, progress) as on_progress:
        (result,), _ = refit(
            model, batches, [keep], reconstruct=reconstruct, on_progress=on_progress
        )
    if result.untrained:
        say(
            f"{result.untrained} layers are refitted by least squares alone: they have experts, or "
            "add their MLP's output in a way that is not known here"
        )
    if result.unfitted:
        say(
            f"{result.unfitted} experts are not refitted: fewer than {TOKENS_A_NEURON} tokens for "
            "each kept neuron chose them; more --samples would reach them"
        )
    return {**stored_down_projs(source, result.weights, keep), **stored_rows(source, result.rows)}
