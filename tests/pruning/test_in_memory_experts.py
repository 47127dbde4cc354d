"""Pruning a loaded model with experts: the same as pruning its checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_mixtures import MIXTURES, tiny_mixture
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hfprune_fast as hf
from hfprune_fast.checkpoint import native
from hfprune_fast.checkpoint.loading import load_model
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.errors import ArgumentError
from hfprune_fast.models.sites import SiteKey

Keep = dict[SiteKey, Tensor]
IDS = torch.arange(40).view(2, 20)


def some_keep(folder: Path) -> Keep:
    """Keep 12 random neurons of each MLP, and all but one expert of each layer and group."""
    spec, generator = open_source(folder).spec, torch.Generator().manual_seed(3)
    in_group = spec.num_experts // spec.expert_groups
    return {
        site: torch.randperm(width, generator=generator)[:12].sort().values
        for site, width in spec.sites.items()
        if isinstance(site, int) or (site[0] + site[1]) % in_group
    }


@pytest.mark.parametrize(
    ("family", "extension"), [*((family, True) for family in MIXTURES), ("gpt_oss", False)]
)
def test_it_becomes_the_checkpoint_that_is_written(
    save_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    extension: bool,
) -> None:
    if not extension:
        monkeypatch.setattr(native, "_C", None)
    model = tiny_mixture(family)
    folder = save_checkpoint(model)
    keep = some_keep(folder)
    hf.prune_checkpoint(folder, tmp_path / "out", keep)
    hf.prune(model, keep)
    expected = load_model(tmp_path / "out", device="cpu")
    tensors = expected.state_dict()
    assert tensors.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
        if "experts" in name or "mlp" in name:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    sizes = ("num_experts", "num_local_experts", "n_shared_experts", "num_group", "moe_inter")
    for mine, theirs in zip(model.modules(), expected.modules(), strict=True):
        for attribute in (*sizes, "intermediate_size", "intermediate_dim", "out_features"):
            assert getattr(mine, attribute, None) == getattr(theirs, attribute, None), attribute
    saved = save_checkpoint(model, "saved")
    assert open_source(saved).spec == open_source(tmp_path / "out").spec
    assert torch.equal(AutoModelForCausalLM.from_pretrained(saved)(IDS).logits, model(IDS).logits)


def test_an_experts_down_projection_is_replaced() -> None:
    model, expected = tiny_mixture("gpt_oss"), tiny_mixture("gpt_oss")
    keep: Keep = {(layer, e): torch.arange(9) for layer in range(3) for e in (0, 1, 3)}
    hf.prune(expected, keep)
    refitted = torch.randn(32, 9)
    hf.prune(model, keep, down_proj={(1, 3): refitted})  # the third of those that stay
    experts: Any = expected.model.layers[1].mlp.experts
    experts.down_proj[2] = refitted.t()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def hooked(model: PreTrainedModel) -> None:
    experts: Any = model.model.layers[1].mlp.experts
    experts.register_forward_hook(lambda *_: None)


def patched(model: PreTrainedModel) -> None:
    experts: Any = model.model.layers[1].mlp.experts
    experts.forward = lambda *_: None


def quantised(model: PreTrainedModel) -> None:
    experts: Any = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hooked, "layers.1.mlp.experts is patched or has hooks"),
        (patched, "layers.1.mlp.experts is patched or has hooks"),
        (quantised, "layers.1.mlp.experts.down_proj is a Parameter, .* torch.int8"),
    ],
)
def test_experts_that_are_not_plain_are_refused(
    change: Callable[[PreTrainedModel], None], message: str
) -> None:
    model = tiny_mixture("qwen2_moe")
    keep: Keep = {(layer, e): torch.arange(9) for layer in (1, 2) for e in (0, 1, 3)}
    keep |= {layer: torch.arange(9) for layer in range(3)}
    change(model)
    before = list(map(id, model.parameters()))
    with pytest.raises(ArgumentError, match=message):
        hf.prune(model, keep)
    assert before == list(map(id, model.parameters()))


@pytest.mark.parametrize(
    ("keep", "down_proj", "message"),
    [
        ({(1, 2): 1}, {}, "each layer the same number of experts"),
        ({}, {(1, 2): torch.zeros(32, 9)}, r"layer \(1, 2\); keep has no such MLP or expert"),
        ({}, {(1, 0): torch.zeros(9, 32)}, r"down_proj\[\(1, 0\)\] must be \(32, 9\), got"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_cut(
    keep: dict[SiteKey, int], down_proj: dict[SiteKey, Tensor], message: str
) -> None:
    model = tiny_mixture("mixtral")
    whole = {(n, e): torch.arange(9) for n in range(3) for e in (0, 1, 3)}
    whole |= {site: torch.arange(9) for site in keep}  # type: ignore[misc]
    before = list(map(id, model.parameters()))
    with pytest.raises(ArgumentError, match=message):
        hf.prune(model, whole, down_proj=down_proj)  # type: ignore[arg-type]
    assert before == list(map(id, model.parameters()))
