"""hfprune evaluate: a pruned checkpoint against its dense one, one model in memory at a time."""

from __future__ import annotations

from pathlib import Path

from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.folder import read_json_object
from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.config import CalibrationOptions, RunOptions
from hfprune_fast.console import say, token_bar
from hfprune_fast.data.batches import TokenData
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.data.sources import STDIN
from hfprune_fast.engine.planner import plan_run
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.errors import CheckpointError
from hfprune_fast.evaluation.fidelity import Fidelity, check_vocabularies, check_windows, compare
from hfprune_fast.options import keyword_options
from hfprune_fast.pruning.on_disk import RECORD


@keyword_options(sampling=CalibrationOptions, options=RunOptions)
def run(
    dense: str | Path,
    pruned: str | Path,
    text_source: str | Path,
    *,
    sampling: CalibrationOptions,
    options: RunOptions,
    progress: bool = False,
) -> Fidelity:
    """Compare two checkpoints over a text; over all of it, in order, if samples is None.

    One model is in memory at a time (or a layer of it), with the dense one's final hidden states.
    """
    sources = [open_source(dense), open_source(pruned)]
    data = calibrate(text_source, sources[0], sampling, evaluation=True)
    check_windows(data.batches)
    check_vocabularies(*(source.spec.vocab_size for source in sources))
    _warn_of_calibration_text(sources[1], data)
    blueprints = [
        loading.blueprint(
            source, dtype=options.dtype, device=options.device, attention=options.attention
        )
        for source in sources
    ]
    plan = plan_run(
        sources[0].spec,
        options,
        device=blueprints[0].device,
        dtype=blueprints[0].dtype,
        seq_len=data.longest,
        sequences=data.sequences,
    )
    batches = data.split(plan.batch_size)
    with token_bar("evaluating", 2 * data.tokens, progress) as on_progress:
        with open_model(blueprints[0], plan.offload) as model:
            hidden = [h.to("cpu") for h in model.final_hidden(batches, on_progress)]
            head = model.head()
        del model, blueprints[0]
        with open_model(blueprints[0], plan.offload) as model:
            return compare(
                batches, hidden, model.final_hidden(batches, on_progress), head, model.head()
            )


def _warn_of_calibration_text(pruned: ModelSource, data: TokenData) -> None:
    """Say if the pruned model was calibrated on this text, by its name or its tokens."""
    name = data.description["source"]
    try:
        known = read_json_object(pruned.folder / RECORD)["provenance"]["calibration"]
        is_same = known["source"] == name != STDIN or known["data_sha256"] == data.sha256
    except (CheckpointError, KeyError, TypeError):
        return  # no record, or one of another kind
    if is_same:
        say(f"{name} calibrated the pruned model, which flatters it; use held-out text")


def text(fidelity: Fidelity) -> str:
    """Return a fidelity as people read it."""
    return (
        f"KL(dense || pruned)  {fidelity.kl_nats:.4f} nats\n"
        f"perplexity           {fidelity.ppl_dense:.3f} dense, {fidelity.ppl_pruned:.3f} pruned\n"
        f"top-1 agreement      {fidelity.top1_agreement:.2%}\n"
        f"over                 {fidelity.tokens} tokens"
    )
