"""The whole job on the small model that ships with the package, beside what it is held against.

Scores the model, removes a fraction of its neurons by the default recipe, saves, reloads, and
measures fidelity on held-out text; then does the same with one width for all layers, and with
neurons chosen as in the paper, by weight magnitude and at random.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from hfprune_fast import console
from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint import source as checkpoints
from hfprune_fast.commands import pipeline
from hfprune_fast.config import Recipe
from hfprune_fast.data.calibration import windows_for
from hfprune_fast.evaluation import fidelity
from hfprune_fast.pruning import in_memory, selection

SEQ_LEN = 256
RANDOM_SEEDS = 5
_BATCH_SIZE = 8


def run(
    out: Path | None = None, *, prune_ratio: float = 0.2, force: bool = False
) -> dict[str, Any]:
    """Run the demo; the pruned checkpoint stays in `out`, or nowhere."""
    source = checkpoints.TINY_MODEL
    text = source / "calibration.txt"
    how: dict[str, Any] = {
        "seq_len": SEQ_LEN,
        "samples": 64,
        "batch_size": _BATCH_SIZE,
        "device": "cpu",
    }
    pruned = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch) / "pruned"
        pipeline.check_prune(source, folder, prune_ratio=prune_ratio, force=force)
        table = pipeline.score(
            source, text, criterion=["fisher", "entropy"], obs=True, progress=True, **how
        )

        def prune(folder: Path, recipe: Recipe, force: bool) -> dict[str, Any]:
            return pipeline.prune_to(
                source, folder, table, recipe=recipe, calibration=text, fitting=how, force=force,
                prune_ratio=prune_ratio,
            )  # fmt: skip

        achieved = prune(folder, Recipe(), force)
        pruned["default"] = loading.load_model(folder, device="cpu")
        uniform = Path(scratch) / "uniform"
        width = prune(uniform, Recipe(allocation="uniform"), False)["intermediate_size"]
        pruned["uniform"] = loading.load_model(uniform, device="cpu")
    dense = loading.load_model(source, device="cpu")
    held_out = windows_for(source, source / "heldout.txt", SEQ_LEN, None, 0)
    batches = held_out.split(_BATCH_SIZE)

    def measure(model: Any) -> dict[str, Any]:
        return asdict(fidelity.evaluate(dense, model, batches))

    def measure_kept(importance: torch.Tensor) -> dict[str, Any]:
        model = copy.deepcopy(dense)
        in_memory.prune(model, selection.keep_top(importance, width))
        return measure(model)

    rows = {"dense": measure(dense), **{name: measure(model) for name, model in pruned.items()}}
    rows["entropy"] = measure_kept(table.importance("l1", "entropy"))
    rows["magnitude"] = measure_kept(pipeline.weights_table(source, "magnitude").importance())
    console.say(f"measuring {RANDOM_SEEDS} random choices")
    at_random = []
    for seed in range(RANDOM_SEEDS):
        generator = torch.Generator().manual_seed(seed)
        at_random.append(measure_kept(torch.rand(table.obs.shape, generator=generator)))
    rows["random"] = {key: mean(row[key] for row in at_random) for key in at_random[0]}
    for name, row in rows.items():
        row["params"] = achieved["dense_params" if name == "dense" else "params"]
    return {**achieved, "out": None if out is None else str(out), "fidelity": rows}


def table(result: dict[str, Any]) -> str:
    """Format the result of `run` as one table."""
    names = {
        "dense": "dense",
        "default": "pruned by hfprune",
        "uniform": "pruned by hfprune, uniform widths",
        "entropy": "pruned by entropy, as in the paper",
        "magnitude": "pruned by weight magnitude",
        "random": f"pruned at random (mean of {RANDOM_SEEDS})",
    }
    rows = [
        (
            names[name],
            f"{row['params']:,}",
            f"{row['kl_nats']:.4f}",
            f"{row['ppl_dense' if name == 'dense' else 'ppl_pruned']:.2f}",
            f"{row['top1_agreement']:.1%}",
        )
        for name, row in result["fidelity"].items()
    ]
    header = ("", "parameters", "KL nats", "perplexity", "top-1 agreement")
    title = (
        f"{result['prune_ratio']:.1%} of the MLP neurons removed, measured on "
        f"{result['fidelity']['dense']['tokens']} held-out tokens"
    )
    return f"{title}\n\n{console.text_table(header, rows)}"
