"""Covariances of gradients and removal costs, made of acts and gradients in float64."""

from itertools import count
from typing import Any

import pytest
import torch
from criteria_truth import SEED, drawn, ids_of, in_batches
from exact import make_float64_exact
from tolerances import relative_error
from torch import Tensor
from transformers import PreTrainedModel
from truth import forward, tiny_model

import hfprune_fast as hf
from hfprune_fast.data.batches import MicroBatch, numbered
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.scoring import obs, passes
from hfprune_fast.scoring.run import score_batches
from hfprune_fast.scoring.sums import PassOptions


@pytest.mark.parametrize("recompute", [False, True])
def test_covariance_of_the_gradients_at_the_outputs(recompute: bool) -> None:
    model = tiny_model("llama")
    ids, lengths = ids_of(model, samples=3), (24, 9, 17)
    batches = numbered([MicroBatch(ids[:2], lengths[:2]), MicroBatch(ids[2:, :17], lengths[2:])])
    how = PassOptions(
        criteria=("entropy", "fisher"), output_fisher=True, seed=SEED, recompute=recompute
    )
    with ResidentModel(model) as entered:
        got = score_batches(entered, batches, how).output_fisher
    assert got is not None
    expected = torch.zeros_like(got, dtype=torch.float64)
    for number, (row, length) in enumerate(zip(ids, lengths, strict=True)):
        for layer, grads in enumerate(output_gradients(model, row[:length], number)):
            expected[layer] += grads.t() @ grads
    assert relative_error(got.flatten(1), expected.flatten(1)).max() < 2**-22  # kept in fp32


def test_covariance_in_bfloat16_is_of_float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    batches = in_batches(ids_of(model, samples=4), 1)
    grads: list[list[Tensor]] = [[], [], []]
    backward, calls = passes.ScoredGraph.backward, count()

    def noting(self: Any, d_output: Tensor, *rest: Any, **options: Any) -> Any:
        grads[2 - next(calls) % 3].append(24 * d_output[0].double())
        return backward(self, d_output, *rest, **options)

    monkeypatch.setattr(passes.ScoredGraph, "backward", noting)
    how = PassOptions(criteria=("fisher",), output_fisher=True, seed=SEED)
    with ResidentModel(model) as entered:
        got = score_batches(entered, batches, how).output_fisher
    assert got is not None
    for layer, rows in enumerate(map(torch.cat, grads)):
        # A rounding each of a row and its length, and of each of 96 products and sums.
        most = 100 * torch.finfo(torch.float32).eps * (rows.abs().t() @ rows.abs())
        assert bool(((got[layer] - rows.t() @ rows).abs() <= most).all())


def output_gradients(model: PreTrainedModel, ids: Tensor, number: int) -> list[Tensor]:
    """Gradient of Σ log p(y) at each MLP's output, (S, D), y as drawn."""
    outputs: list[Tensor] = []

    def note(_: Any, args: Any, output: Tensor) -> Tensor:
        output = output.detach().requires_grad_() if not outputs else output
        outputs.append(output)
        return output

    handles = [layer.mlp.register_forward_hook(note) for layer in model.model.layers]
    with torch.enable_grad():
        logits = model(ids[None], use_cache=False).logits[0]
        chosen = logits.log_softmax(-1).gather(1, drawn(logits.detach(), number)[:, None])
        grads = torch.autograd.grad(chosen.sum(), outputs)
    for handle in handles:
        handle.remove()
    return [grad[0] for grad in grads]


def test_removal_costs_are_made_of_acts_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's of its own: plain moments of both, without padding."""
    model = tiny_model("llama")
    make_float64_exact(model, monkeypatch)
    ids, lengths = ids_of(model, samples=4), (24, 9, 17, 24)
    mask = torch.arange(24) < torch.tensor(lengths)[:, None]
    batch = {"input_ids": ids, "attention_mask": mask}
    table = hf.score(model, [batch], criterion="fisher", obs=True, seed=SEED)
    acts: list[list[Tensor]] = [[], [], []]
    grads: list[list[Tensor]] = [[], [], []]
    for number, (row, length) in enumerate(zip(ids, lengths, strict=True)):
        for layer, act in enumerate(forward(model.state_dict(), model.config, row[:length]).acts):
            acts[layer].append(act.detach())
        for layer, grad in enumerate(output_gradients(model, row[:length], number)):
            grads[layer].append(grad)
    for layer in range(3):
        act, grad = torch.cat(acts[layer]), torch.cat(grads[layer])
        moments, metric = act.t() @ act / sum(lengths), grad.t() @ grad / sum(lengths)
        weight = model.model.layers[layer].mlp.down_proj.weight
        error = relative_error(table.obs[layer], obs.greedy_removal_costs(moments, weight, metric))
        assert error < 1e-5, f"layer {layer}: {error:.1e}"  # the metric is kept in fp32
