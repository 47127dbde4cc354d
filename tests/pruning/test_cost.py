"""How much the default recipe multiplies, counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from torch.utils.flop_counter import FlopCounterMode

import hfprune_fast as hf
from hfprune_fast.models.spec import spec_of
from hfprune_fast.pruning.recipe import pruning_flops

SAMPLES, SEQ_LEN, F = 32, 64, 256


@pytest.mark.usefixtures("one_thread")
def test_the_default_recipe_multiplies_less_than_seven_forward_passes(
    save_checkpoint: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    measured: Callable[[str], None],
) -> None:
    """Over the same tokens, with attention that the counter sees.

    It is 6.6; of models whose head is a smaller part, on which nothing is fitted, 7.5.
    """
    model = random_llama(intermediate_size=F)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(torch.zeros(SAMPLES, SEQ_LEN, dtype=torch.int64), use_cache=False)
    forward = flops.get_total_flops()
    options: dict[str, Any] = {"samples": SAMPLES, "seq_len": SEQ_LEN, "device": "cpu"}
    with FlopCounterMode(display=False) as flops:
        made = hf.oneshot(
            save_checkpoint(model), text_file, tmp_path / "out", prune_ratio=0.2,
            attention="eager", **options,
        )  # fmt: skip
    assert len(made["allocations_kl_nats"]) == 2
    # Of the greedy removal, which grows with the neurons and not with the tokens, 6 · F³ a layer.
    of_tokens = flops.get_total_flops() - 6 * F**3 * model.config.num_hidden_layers
    measured(f"the default recipe multiplies {of_tokens / forward:.2f} times what a forward does")
    assert of_tokens <= 7 * forward


def test_text_beyond_the_allocations_costs_five_forward_passes() -> None:
    """Two of scoring, one of the costs, two of the refit, and second moments twice."""
    spec, device = spec_of(random_llama(intermediate_size=F)), torch.device("cpu")
    few, many = (pruning_flops(spec, samples, SEQ_LEN, device) for samples in (128, 448))
    tokens = (448 - 128) * SEQ_LEN
    moments = tokens * F**2 * spec.num_layers
    assert many - few == 5 * (spec.flops_per_token // 2) * tokens + 2 * moments
