"""Two checkpoints compared over a text, one of them in memory at a time."""

from __future__ import annotations

from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.config import RunOptions
from hfprune_fast.console import token_bar
from hfprune_fast.data.batches import TokenData
from hfprune_fast.engine.planner import plan_run
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.evaluation.changes import TokenChanges
from hfprune_fast.evaluation.fidelity import Fidelity, check_vocabularies, check_windows, compare


def compare_checkpoints(
    dense: ModelSource,
    pruned: ModelSource,
    data: TokenData,
    options: RunOptions,
    *,
    changes: TokenChanges | None = None,
    progress: bool = False,
) -> Fidelity:
    """Return the fidelity of a pruned checkpoint over token windows.

    One model is in memory at a time (or a layer of it), with the dense one's final hidden states.

    Args:
        changes: takes the KL of each position too.
        progress: show a bar on stderr.

    Raises:
        ArgumentError: the models have different vocabularies.
        CalibrationError: a window of one token.
    """
    check_windows(data.batches)
    check_vocabularies(dense.spec.vocab_size, pruned.spec.vocab_size)
    first, second = (
        loading.blueprint(
            source, dtype=options.dtype, device=options.device, attention=options.attention
        )
        for source in (dense, pruned)
    )
    plan = plan_run(
        dense.spec,
        options,
        device=first.device,
        dtype=first.dtype,
        seq_len=data.longest,
        sequences=data.sequences,
    )
    batches = data.split(plan.batch_size)
    with token_bar("evaluating", 2 * data.tokens, progress) as on_progress:
        with open_model(first, plan.offload) as model:
            hidden = [h.to("cpu") for h in model.final_hidden(batches, on_progress)]
            head = model.head()
        del model, first
        with open_model(second, plan.offload) as model:
            final = model.final_hidden(batches, on_progress)
            return compare(batches, hidden, final, head, model.head(), changes)
