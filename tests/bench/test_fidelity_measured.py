"""Widths by measured KL: what cutting one layer alone costs, of models that are cut by hand."""

import copy

import fidelity_measured
import pytest
import torch
from refit_truth import plain_fit
from truth import tiny_model

import hfprune_fast as hf
from hfprune_fast.data.batches import MicroBatch, numbered
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.mlp_hooks import inputs_of


def test_each_layer_cut_alone() -> None:
    model = tiny_model("llama")
    ids = torch.randint(127, (8, 20), generator=torch.Generator().manual_seed(3))
    batches = list(numbered(MicroBatch(part, (20,) * 2) for part in ids.split(2)))
    costs = torch.rand(3, 96, generator=torch.Generator().manual_seed(4)).double()
    keep = {layer: costs[layer].topk(60).indices.sort().values for layer in range(3)}
    with ResidentModel(model) as entered:
        found = fidelity_measured.factors(entered, batches[:3], batches[3:], costs, keep)
    for layer, kept in keep.items():
        down = model.model.layers[layer].mlp.down_proj
        with inputs_of(down) as acts:
            model(ids[:6])
        act, weight = acts[0].flatten(0, 1), down.weight.detach()
        fitted = plain_fit(act[:, kept], act @ weight.t(), weight[:, kept], 0)
        cut = copy.deepcopy(model)
        with torch.no_grad():
            cut.model.layers[layer].mlp.down_proj.weight.zero_()[:, kept] = fitted
        kl = hf.evaluate(model, cut, [ids[6:]]).kl_nats
        removed = float(costs[layer].sum() - costs[layer, kept].sum())
        assert float(found[layer]) == pytest.approx(kl / removed, rel=1e-6)
