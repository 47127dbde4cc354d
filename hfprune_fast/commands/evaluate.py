"""hfprune evaluate: a pruned checkpoint against its dense one, one model in memory at a time."""

from __future__ import annotations

from pathlib import Path

from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import CalibrationOptions, RunOptions
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.evaluation.checkpoints import compare_checkpoints
from hfprune_fast.evaluation.fidelity import Fidelity
from hfprune_fast.options import keyword_options
from hfprune_fast.pruning.measured import warn_of_calibration_text


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
    first, second = open_source(dense), open_source(pruned)
    data = calibrate(text_source, first, sampling, evaluation=True)
    warn_of_calibration_text(second, data)
    return compare_checkpoints(first, second, data, options, progress=progress)


def text(fidelity: Fidelity) -> str:
    """Return a fidelity as people read it."""
    return (
        f"KL(dense || pruned)  {fidelity.kl_nats:.4f} nats\n"
        f"perplexity           {fidelity.ppl_dense:.3f} dense, {fidelity.ppl_pruned:.3f} pruned\n"
        f"top-1 agreement      {fidelity.top1_agreement:.2%}\n"
        f"over                 {fidelity.tokens} tokens"
    )
