"""What a config.json says of experts: refused in one line, and completed from its class."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_mixtures import change_config, tiny_mixture

from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.errors import HFPruneError

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a million experts": (
        "mixtral",
        {"num_local_experts": 10**6},
        r"num_local_experts 1000000, expected an integer in 1\.\.4096",
    ),
    "no experts": ("mixtral", {"num_local_experts": 0}, "num_local_experts 0, expected"),
    "experts true": ("mixtral", {"num_local_experts": True}, "num_local_experts True, expected"),
    "two counts": (
        "qwen3_moe",
        {"num_experts": 8, "num_local_experts": 4},
        "num_experts 8 and num_local_experts 4, expected the same",
    ),
    "counts that are equal to Python": (
        "qwen3_moe",
        {"num_experts": 4.0, "num_local_experts": 4},
        "expected the same",
    ),
    "experts without neurons": (
        "qwen3_moe",
        {"moe_intermediate_size": 0},
        "moe_intermediate_size 0, expected",
    ),
    "more than there are": (
        "qwen3_moe",
        {"num_experts_per_tok": 5},
        "num_experts_per_tok 5, expected num_experts 4 at most",
    ),
    "groups that do not divide": (
        "deepseek_v3",
        {"n_group": 3},
        "n_group 3, which does not divide n_routed_experts 8",
    ),
    "more groups than there are": (
        "deepseek_v3",
        {"topk_group": 3},
        "topk_group 3, expected n_group 2 at most",
    ),
    "many shared experts": ("deepseek_v3", {"n_shared_experts": 10**9}, "n_shared_experts 1000"),
    "a shared expert without neurons": (
        "qwen2_moe",
        {"shared_expert_intermediate_size": 0},
        "shared_expert_intermediate_size 0, expected",
    ),
    "a step of zero": ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step 0, expected"),
    "dense layers by name": ("qwen3_moe", {"mlp_only_layers": ["0"]}, "expected a list of layers"),
    "no layer is dense": ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace -1"),
    "widths of layers": (
        "qwen3_moe",
        {"per_layer_config": {"0": {"intermediate_size": 4}}},
        "not supported for models with experts",
    ),
    "a class of layers of different widths": (
        "mixtral",
        {"model_type": "hfprune_mixtral"},
        "not supported for models with experts",
    ),
    "experts that the files do not hold": (
        "mixtral",
        {"num_local_experts": 5},
        r"lacks the tensor model\.layers\.0\.block_sparse_moe\.experts\.4\.w1\.weight and",
    ),
    "experts that the config does not name": (
        "qwen3_moe",
        {"num_local_experts": 3},
        r"does not know: model\.layers\.1\.mlp\.experts\.3\.down_proj\.weight and",
    ),
    "experts of another width": (
        "qwen3_moe",
        {"moe_intermediate_size": 23},
        r"experts\.0\.down_proj\.weight is \(32, 24\), expected \(32, 23\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sizes_of_experts_are_not_trusted(save_checkpoint: Callable[..., Path], case: str) -> None:
    family, changes, message = REFUSED[case]
    folder = change_config(save_checkpoint(tiny_mixture(family)), **changes)
    with pytest.raises(HFPruneError, match=message) as caught:
        open_source(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


def test_the_number_of_experts_has_the_name_that_any_version_writes(
    save_checkpoint: Callable[..., Path],
) -> None:
    folder = save_checkpoint(tiny_mixture("qwen3_moe"))
    assert re.search(r'"num_local_experts": 4', (folder / "config.json").read_text())
    saved = open_source(folder)
    renamed = open_source(change_config(folder, num_local_experts=None, num_experts=4))
    assert renamed.spec == saved.spec
    assert renamed.fingerprint == saved.fingerprint


def test_a_family_that_may_have_experts_is_dense_unless_it_says_so(
    save_checkpoint: Callable[..., Path],
) -> None:
    folder = save_checkpoint(tiny_mixture("gemma4_text", enable_moe_block=False))
    source = open_source(change_config(folder, num_experts=10**9))
    assert (source.family.experts, source.spec.experts) == (None, ())
    assert open_source(save_checkpoint(tiny_mixture("gemma4_text"), "on")).spec.experts == (4, 4, 4)
