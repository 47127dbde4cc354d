"""Experts in files: each apart, or all in one tensor; opened, loaded and streamed alike."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_mixtures import MIXTURES, merge_files, tiny_mixture
from torch import Tensor
from transformers import AutoModelForCausalLM

from hfprune_fast.checkpoint.loading import blueprint, load_model
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.data.batches import micro_batch
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.errors import NumericsError

BATCHES = [micro_batch(torch.arange(n * 9).view(n, 9), 127) for n in (2, 1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", MIXTURES)
def test_the_loaded_model_is_that_of_transformers(
    save_checkpoint: Callable[..., Path], family: str, dtype: str
) -> None:
    folder = save_checkpoint(tiny_mixture(family))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    ours = load_model(folder, dtype=dtype, device="cpu").state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_merged_files_are_the_same_model(save_checkpoint: Callable[..., Path], family: str) -> None:
    model = tiny_mixture(family)
    apart, folder = save_checkpoint(model), save_checkpoint(model, "merged")
    merged = merge_files(folder, model)
    assert len(open_source(merged).tensors) < len(open_source(apart).tensors)
    assert open_source(merged).fingerprint == open_source(apart).fingerprint
    expected = load_model(apart, device="cpu").state_dict()
    for name, tensor in load_model(merged, device="cpu").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_changed_expert_changes_the_fingerprint(save_checkpoint: Callable[..., Path]) -> None:
    folder = save_checkpoint(tiny_mixture("mixtral"))
    before = open_source(folder).fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"][-1] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert open_source(folder).fingerprint != before


def test_the_mlp_that_all_tokens_see_has_a_name(save_checkpoint: Callable[..., Path]) -> None:
    source = open_source(save_checkpoint(tiny_mixture("deepseek_v3")))
    assert [source.down_proj(layer) for layer in (0, 1)] == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.shared_experts.down_proj.weight",
    ]


def hidden(folder: Path, offload: str, dtype: str) -> list[Tensor]:
    with open_model(blueprint(folder, dtype=dtype, device="cpu"), offload) as model:
        return [tensor.clone() for tensor in model.final_hidden(BATCHES)]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_streamed_experts_compute_what_resident_ones_do(
    save_checkpoint: Callable[..., Path], family: str, dtype: str
) -> None:
    folder = save_checkpoint(tiny_mixture(family))
    expected = hidden(folder, "none", dtype)
    for offload in ("disk", "cpu"):
        assert all(map(torch.equal, hidden(folder, offload, dtype), expected)), offload


@pytest.mark.parametrize("offload", ["disk", "cpu"])
def test_a_nan_in_an_expert_is_found_when_it_is_streamed(
    save_checkpoint: Callable[..., Path], offload: str
) -> None:
    folder = save_checkpoint(tiny_mixture("mixtral"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors[name][3, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match=name):
        hidden(folder, offload, "float32")


def test_a_nan_in_what_stays_in_float32_is_found(save_checkpoint: Callable[..., Path]) -> None:
    folder = save_checkpoint(tiny_mixture("deepseek_v3"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match=name):
        hidden(folder, "disk", "bfloat16")
