"""hfprune plan: what pruning would give and how scoring would run, from config.json alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.config_json import read_config
from hfprune_fast.checkpoint.folder import find_model
from hfprune_fast.checkpoint.skeleton import spec_from_config
from hfprune_fast.config import (
    DEFAULT_SEQ_LEN,
    Budget,
    PruningCalibration,
    RecoveryOptions,
    RunOptions,
)
from hfprune_fast.console import display_name, human_bytes, human_seconds, text_table
from hfprune_fast.engine import machine, planner
from hfprune_fast.engine.plan import Plan
from hfprune_fast.errors import ArgumentError
from hfprune_fast.models.declared import family_of
from hfprune_fast.models.size_text import suits_text, widths_in, widths_text
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.options import keyword_options
from hfprune_fast.pruning.recipe import pruning_flops
from hfprune_fast.pruning.selection import budget_of
from hfprune_fast.recovery import estimate

_BYTES_A_SECOND = 1 << 30  # of a fast disk; what is fetched is in proportion


@keyword_options(
    budget=Budget, sampling=PruningCalibration, options=RunOptions, recovery=RecoveryOptions
)
def run(
    model: str | Path,
    *,
    recover: bool = False,
    budget: Budget,
    sampling: PruningCalibration,
    options: RunOptions,
    recovery: RecoveryOptions,
) -> dict[str, Any]:
    """Return sizes, FLOPs and both plans, of a text tower alone if there is one.

    Weights are not read.

    FLOPs are those of a forward pass over one sequence, per token: 2 for each weight of a linear
    layer, and 4 · seq_len · heads · head_dim a layer for attention's two products. "pruning" is of
    the default recipe, and its seconds are its products' at the speed of one that is timed here.
    With `recover`, "recovery" is of `hf.recover` afterwards.
    """
    given = [n for n, value in asdict(recovery).items() if value != getattr(RecoveryOptions(), n)]
    if given and not recover:
        raise ArgumentError(f"{', '.join(given)} changes nothing without recover")
    folder = find_model(model, config_only=True)
    spec, config = spec_from_config(folder)
    sizes, dense_sizes = budget_of(spec, budget).sizes(spec), (spec.widths, None)
    seq_len = sampling.seq_len or min(DEFAULT_SEQ_LEN, config.max_position_embeddings)
    samples = sampling.drawn(seq_len, spec.intermediate_size)
    stored: torch.dtype = config.dtype
    device = loading.torch_device(options.device)
    dtype = loading.dtype_to_run_in(options.dtype, stored, device)
    shape: dict[str, Any] = {
        "device": device, "dtype": dtype, "seq_len": seq_len, "sequences": samples,
    }  # fmt: skip
    scoring = planner.plan_run(spec, options, **shape)
    pruning = planner.plan_run(spec, options, refit="linear", **shape)
    in_dtype = dtype if scoring.offload == "cpu" else stored
    flops = pruning_flops(spec, samples, seq_len, device)
    speed = machine.product_flops_per_second(device, dtype)
    recovering = {}
    if recover:
        shape = {"device": device, "dtype": dtype, "seq_len": seq_len}
        found = estimate.estimate(config, spec, sizes, recovery, options, **shape)
        output = 0 if recovery.adapter else spec.params_at(*sizes) * stored.itemsize
        recovering["recovery"] = {
            **found, "output_bytes": output, "seconds": found["flops"] / speed,
        }  # fmt: skip
    attention = 4 * seq_len * spec.attention_width * spec.num_layers
    result = spec.pruned_to(*sizes)
    for prefix, of in (("dense_", dense_sizes), ("", sizes)):
        result[f"{prefix}weights_bytes"] = spec.params_at(*of) * stored.itemsize
        result[f"{prefix}flops_per_token"] = 2 * spec.linear_params_at(*of) + attention
    return {
        "model": display_name(model),
        "text_tower": family_of(read_config(folder)).tower is not None,
        **result,
        "widths_suit": suits_text(widths_in(result)),
        "dtype": str(stored).removeprefix("torch."),
        "seq_len": seq_len,
        "scoring": {
            "summary": str(scoring),
            "device": str(device),
            **asdict(scoring),
            **_fetched(scoring, spec, samples * seq_len, in_dtype.itemsize),
        },
        "pruning": {
            "summary": str(pruning),
            "flops": flops,
            "seconds": flops / speed,
            **asdict(pruning),
        },
        **recovering,
    }


def _fetched(plan: Plan, spec: ModelSpec, tokens: int, itemsize: int) -> dict[str, int]:
    """Return how often a streamed run fetches each weight, and the bytes of all of it."""
    # Each pass goes through the layers forward and backward.
    fetches = 2 * math.ceil(tokens / plan.pass_tokens) if plan.pass_tokens else 0
    return {"fetches": fetches, "fetched_bytes": fetches * spec.total_params * itemsize}


def text(result: dict[str, Any]) -> str:
    """Return a plan as human-readable text."""

    def row(name: str, key: str, show: Callable[[Any], str]) -> tuple[str, ...]:
        dense, pruned = result[f"dense_{key}"], result[key]
        return name, show(dense), show(pruned), f"{1 - pruned / dense:.2%}"

    rows: list[tuple[str, ...]] = []
    own, had = (
        [w for w in result.get(f"{prefix}mlp_widths", [result[f"{prefix}intermediate_size"]]) if w]
        for prefix in ("", "dense_")
    )
    if own:
        removed = f"{1 - mean(own) / mean(had):.2%}"
        rows.append(("MLP neurons a layer", widths_text(had), widths_text(own), removed))
    if "experts" in result:
        rows += [
            row("experts a layer", "experts", str),
            row("neurons of an expert", "expert_width", str),
            row("parameters of a token", "active_params", "{:,}".format),
        ]
    rows += [
        row("parameters", "params", "{:,}".format),
        row(f"bytes in {result['dtype']}", "weights_bytes", human_bytes),
        row(
            f"MFLOPs a token at {result['seq_len']}", "flops_per_token", lambda f: f"{f / 1e6:,.1f}"
        ),
    ]
    table = text_table((result["model"], "dense", "pruned", "removed"), rows)
    scoring, pruning = result["scoring"], result["pruning"]
    fetched = scoring["fetched_bytes"]
    fetching = (
        f"scoring fetches all weights {scoring['fetches']} times, {human_bytes(fetched)}: "
        f"{human_seconds(fetched / _BYTES_A_SECOND)} at {human_bytes(_BYTES_A_SECOND)} a second\n"
        if fetched
        else ""
    )
    after = ""
    if "recovery" in result:
        recovery = result["recovery"]
        output, seconds = human_bytes(recovery["output_bytes"]), human_seconds(recovery["seconds"])
        after = f"\n{estimate.text(recovery)}, output {output}; about {seconds} of products"
    beside = "numbers are of the text tower; all else is copied\n" if result["text_tower"] else ""
    return (
        f"{table}\n{beside}{result['widths_suit']}\n\n{fetching}"
        f"scoring on {scoring['device']}: {scoring['summary']}\n"
        f"prune, by the default recipe: {pruning['summary']}; about "
        f"{human_seconds(pruning['seconds'])} of products at this machine's speed{after}"
    )
