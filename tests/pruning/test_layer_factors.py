"""Widths by measured KL: what cutting one layer alone costs, of models that are cut by hand."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from refit_truth import plain_fit
from torch import Tensor
from truth import tiny_model

import hfprune_fast as hf
from hfprune_fast.checkpoint.loading import blueprint
from hfprune_fast.data.batches import MicroBatch, numbered
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.mlp_hooks import inputs_of
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.errors import NumericsError
from hfprune_fast.pruning import allocation
from hfprune_fast.pruning.layer_factors import layer_factors

IDS = torch.randint(127, (8, 20), generator=torch.Generator().manual_seed(3))
BATCHES = list(numbered(MicroBatch(part, (20, 13)) for part in IDS.split(2)))
COSTS = torch.rand(3, 96, generator=torch.Generator().manual_seed(4)).double()


def kept(whole: int | None = None) -> dict[int, Tensor]:
    numbers = [96 if layer == whole else 60 for layer in range(3)]
    return {
        i: row.topk(n).indices.sort().values
        for i, (row, n) in enumerate(zip(COSTS, numbers, strict=True))
    }


@pytest.mark.parametrize("options", [{}, {"mlp_bias": True}])
def test_each_layer_cut_alone(options: dict[str, Any]) -> None:
    """The second layer is left whole, as a protected one is."""
    model, keep = tiny_model("llama", **options), kept(whole=1)
    done: list[float] = []
    with ResidentModel(model) as entered:
        found = layer_factors(entered, BATCHES[:3], BATCHES[3:], keep, COSTS, done.append)
    assert sum(done) == pytest.approx(sum(batch.tokens for batch in BATCHES))
    windows = [IDS[i : i + 1, : (20, 13)[i % 2]] for i in range(8)]
    both: list[tuple[float, float]] = []
    for layer in (0, 2):
        down = model.model.layers[layer].mlp.down_proj
        with inputs_of(down) as acts:
            for window in windows[:6]:
                model(window)
        act, weight = torch.cat([each[0] for each in acts]), down.weight.detach()
        own = keep[layer]
        fitted = plain_fit(act[:, own], act @ weight.t(), weight[:, own], 0)
        cut = copy.deepcopy(model)
        with torch.no_grad():
            cut.model.layers[layer].mlp.down_proj.weight.zero_()[:, own] = fitted
        kl = hf.evaluate(model, cut, windows[6:]).kl_nats
        both.append((kl, sum(float(COSTS[layer, i]) for i in {*range(96)} - {*own.tolist()})))
    kl_nats, removed = (sum(each) for each in zip(*both, strict=True))
    assert float(found[1]) == pytest.approx(kl_nats / removed, rel=1e-6)
    for layer, (kl, of_layer) in zip((0, 2), both, strict=True):
        factor = (kl + 0.025 * kl_nats) / (of_layer + 0.025 * removed)
        assert float(found[layer]) == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cost", [0.0, 1e-6])
def test_dead_neurons_say_little_of_the_others(dtype: torch.dtype, cost: float) -> None:
    """Whether their costs are 0 or not, and whether their KL is 0 or of rounding."""
    model, costs, keep = tiny_model("llama", dtype=dtype), COSTS.clone(), kept()
    dead = [i for i in range(96) if i not in keep[1]]
    model.model.layers[1].mlp.up_proj.weight[dead] = 0
    costs[1, dead] = cost
    with ResidentModel(model) as entered:
        found = layer_factors(entered, BATCHES[:3], BATCHES[3:], keep, costs)
    assert min(found[0], found[2]) / 2 < found[1] < 2 * max(found[0], found[2])


def test_nothing_is_cut_or_lost() -> None:
    model = tiny_model("llama")
    with ResidentModel(model) as entered:
        whole = {layer: torch.arange(96) for layer in range(3)}
        found = layer_factors(entered, BATCHES[:3], BATCHES[3:], whole, COSTS)
        assert found.tolist() == [1, 1, 1]
        model.lm_head.weight.zero_()
        found = layer_factors(entered, BATCHES[:3], BATCHES[3:], kept(), COSTS)
    assert found.tolist() == [1, 1, 1]


def test_streamed_is_resident(llama_dir: Path) -> None:
    found = []
    for offload in ("none", "disk"):
        with open_model(blueprint(llama_dir, dtype="float32", device="cpu"), offload) as model:
            found.append(layer_factors(model, BATCHES[:3], BATCHES[3:], kept(), COSTS))
    assert torch.equal(*found)
    assert (found[0] > 0).all()


def test_infinite_acts_are_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e200)
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e200)
    with ResidentModel(model) as entered, pytest.raises(NumericsError, match="layer 1"):
        layer_factors(entered, BATCHES[:3], BATCHES[3:], kept(), COSTS)


@pytest.mark.parametrize("tokens", [1, 40, 65, 119])
def test_on_so_many_tokens_of_batches_of_any_size(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "FACTOR_TOKENS", tokens)
    ids = torch.zeros(8, 20, dtype=torch.int64)
    for at_once in (1, 2, 8):
        few = allocation.factor_batches(
            [MicroBatch(each, (20,) * len(each)) for each in ids.split(at_once)]
        )
        assert sum(len(batch.ids) for batch in few) == max(1, tokens // 20)
