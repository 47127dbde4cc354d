"""hfprune demo: the whole job on the small model that ships with the package, with baselines.

Scores the model, prunes it by the default recipe, saves, reloads, and measures fidelity on held-out
text; then the same with one width for all layers, and with neurons chosen as in the paper, by
weight magnitude and at random.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from hfprune_fast.checkpoint.loading import load_model
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import TINY_MODEL, Budget, CalibrationOptions, OutputOptions
from hfprune_fast.console import say, text_table
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.evaluation.fidelity import HeldOut
from hfprune_fast.pruning.in_memory import prune
from hfprune_fast.pruning.oneshot import check_output, oneshot
from hfprune_fast.pruning.selection import WidthBudget
from hfprune_fast.scoring.data_free import data_free_table
from hfprune_fast.scoring.score import score

SEQ_LEN = 256
RANDOM_SEEDS = 5
_BATCH_SIZE = 8
_NAMES = {
    "dense": "dense",
    "default": "pruned by hfprune",
    "uniform": "pruned by hfprune, uniform widths",
    "entropy": "pruned by entropy, as in the paper",
    "magnitude": "pruned by weight magnitude",
    "random": f"pruned at random (mean of {RANDOM_SEEDS})",
}


def run(
    out: Path | None = None, *, prune_ratio: float = 0.25, force: bool = False
) -> dict[str, Any]:
    """Run the demo; the pruned checkpoint is kept only if `out` is given."""
    source, text = open_source(TINY_MODEL), TINY_MODEL / "calibration.txt"
    # In float32, so that every CPU gives the same numbers.
    on_cpu: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    options = {"seq_len": SEQ_LEN, "samples": 64, "batch_size": _BATCH_SIZE, **on_cpu}
    widths = WidthBudget.of(source.spec, Budget(prune_ratio=prune_ratio))
    params = source.spec.params_at(*widths.sizes(source.spec))
    pruned = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, uniform = out or Path(scratch) / "pruned", Path(scratch) / "uniform"
        check_output(source, folder, params, OutputOptions(force=force))
        table = score(
            source, text, criterion=["fisher", "entropy"], obs=True, progress=True, **options
        )
        budget: dict[str, Any] = {"scores": table, "prune_ratio": prune_ratio, **options}
        achieved = oneshot(source, text, folder, force=force, **budget)
        pruned["default"] = load_model(folder, **on_cpu)
        oneshot(source, text, uniform, allocation="uniform", **budget)
        pruned["uniform"] = load_model(uniform, **on_cpu)
    dense = load_model(source, **on_cpu)
    windows = calibrate(source.folder / "heldout.txt", source, CalibrationOptions(None, SEQ_LEN))
    held_out = HeldOut(dense, windows.split(_BATCH_SIZE))

    def measure(model: Any) -> dict[str, Any]:
        return asdict(held_out.measure(model))

    def measure_kept(importance: torch.Tensor) -> dict[str, Any]:
        model = copy.deepcopy(dense)
        prune(model, widths.keep(importance, "uniform"))
        return measure(model)

    rows = {"dense": measure(dense), **{name: measure(model) for name, model in pruned.items()}}
    rows["entropy"] = measure_kept(table.importance("l1", "entropy"))
    rows["magnitude"] = measure_kept(data_free_table(source, "magnitude").importance())
    say(f"measuring {RANDOM_SEEDS} random choices")
    at_random = []
    for seed in range(RANDOM_SEEDS):
        generator = torch.Generator().manual_seed(seed)
        at_random.append(measure_kept(torch.rand(table.obs.shape, generator=generator)))
    rows["random"] = {key: mean(row[key] for row in at_random) for key in at_random[0]}
    for name, row in rows.items():
        row["params"] = achieved["dense_params" if name == "dense" else "params"]
    return {**achieved, "out": None if out is None else str(out), "fidelity": rows}


def text(result: dict[str, Any]) -> str:
    """Return what `run` measured as a table."""
    rows = [
        (
            _NAMES[name],
            f"{row['params']:,}",
            f"{row['kl_nats']:.4f}",
            f"{row['ppl_dense' if name == 'dense' else 'ppl_pruned']:.2f}",
            f"{row['top1_agreement']:.1%}",
        )
        for name, row in result["fidelity"].items()
    ]
    title = (
        f"{result['prune_ratio']:.1%} of the MLP neurons removed, measured on "
        f"{result['fidelity']['dense']['tokens']} held-out tokens"
    )
    header = ("", "parameters", "KL nats", "perplexity", "top-1 agreement")
    return f"{title}\n\n{text_table(header, rows)}"
