"""The refit against plain float64 least squares, and what it leaves of the model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from refit_truth import keep_of, plain_refit
from torch import Tensor
from transformers import PreTrainedModel
from truth import tiny_model
from watch import Watch

import hfprune_fast as hf
from hfprune_fast.checkpoint import loading
from hfprune_fast.data.batches import MicroBatch, numbered
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.errors import ArgumentError, CalibrationError, NumericsError
from hfprune_fast.pruning.normal_equations import least_squares
from hfprune_fast.pruning.refit import refit
from hfprune_fast.scoring.costs import removal_costs

LENGTHS = (40, 23, 40, 31)
# transformers' norms and rotary tables are fp32 in a float64 model as well.
FP32_NORMS = 1e-5


def batches_of(model: PreTrainedModel, lengths: tuple[int, ...] = LENGTHS) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(model.config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = 0
    return numbered(
        MicroBatch(ids[i : i + 2, : max(lengths[i : i + 2])], lengths[i : i + 2])
        for i in range(0, len(ids), 2)
    )


@pytest.mark.parametrize("times", [1, 5])  # of four sequences, in which none chooses a ridge
@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), ("llama", {"mlp_bias": True}), ("qwen3", {})]
)
def test_each_layer_is_plain_least_squares(
    family: str, options: dict[str, Any], times: int
) -> None:
    model = tiny_model(family, **options)
    batches, keep = batches_of(model, times * LENGTHS), keep_of(model)
    with ResidentModel(model) as entered:
        (result,), _ = refit(entered, batches, [keep])
    for layer, expected in enumerate(plain_refit(model, batches, keep)):
        error = (result.weights[layer] - expected).norm() / expected.norm()
        assert error < FP32_NORMS, f"layer {layer}: {error:.1e}"


def test_the_streams_are_those_of_a_model_that_is_really_cut() -> None:
    model = tiny_model("llama")
    batches, keep = batches_of(model), keep_of(model)
    with ResidentModel(model) as entered:
        results, dense = refit(entered, batches, [keep, keep_of(model, (96, 5, 40))], held_out=1)
        expected_dense = list(entered.final_hidden(batches[1:]))
    assert [torch.equal(a, b) for a, b in zip(dense, expected_dense, strict=True)] == [True]
    cut = copy.deepcopy(model)
    hf.prune(cut, keep)
    for layer, weight in results[0].weights.items():
        cut.model.layers[layer].mlp.down_proj.weight.copy_(weight)
    with ResidentModel(cut) as entered:
        (expected,) = entered.final_hidden(batches[1:])
    for row, length in zip((results[0].hidden[0] - expected).abs(), LENGTHS[2:], strict=True):
        assert float(row[:length].max()) < 1e-12 * float(expected.abs().max())


def test_a_loaded_model_is_refitted_and_cut_in_three_lines() -> None:
    model = tiny_model("qwen3", dtype=torch.float32)
    batches = [batch.ids for batch in batches_of(model, (40,) * 6)]
    dense = copy.deepcopy(model)
    table = hf.score(model, batches, criterion="fisher", obs=True)
    keep = hf.select(table, prune_ratio=0.3, statistic="obs", allocation="global")
    weights = hf.refit_down_proj(model, batches, keep)
    plain = copy.deepcopy(model)
    hf.prune(plain, keep)
    with pytest.raises(ArgumentError, match=r"down_proj\[0\] must be \(64, \d+\), got \(64, 3\)"):
        hf.prune(model, keep, down_proj={0: weights[0][:, :3]})
    assert model.config.intermediate_size == 96
    hf.prune(model, keep, down_proj=weights)
    for layer, weight in weights.items():
        assert torch.equal(model.model.layers[layer].mlp.down_proj.weight, weight)
    kl = [hf.evaluate(dense, cut, batches).kl_nats for cut in (model, plain)]
    assert kl[0] < 0.7 * kl[1]
    with pytest.raises(CalibrationError, match="no token batches; expected"):
        hf.refit_down_proj(dense, [], keep)
    with pytest.raises(ArgumentError, match=r"keep must have an entry for each layer 0\.\.2"):
        hf.refit_down_proj(dense, batches, {0: keep[0]})


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_weight_of_no_layer_is_refused(layer: int) -> None:
    model = tiny_model("llama")
    keep = keep_of(model)
    with pytest.raises(ArgumentError, match=rf"down_proj has layer {layer}; the model has 0\.\.2"):
        hf.prune(model, keep, down_proj={layer: torch.zeros(64, 77)})
    assert model.config.intermediate_size == 96


def test_several_models_are_each_fitted_alone_and_not_to_what_is_held_out() -> None:
    model = tiny_model("llama")
    batches = batches_of(model)
    keeps = [keep_of(model), keep_of(model, (96, 5, 40)), keep_of(model, (3, 60, 20))]
    with ResidentModel(model) as entered:
        together, _ = refit(entered, batches, keeps, held_out=1)
        for keep, result in zip(keeps, together, strict=True):
            (alone,), _ = refit(entered, batches, [keep], held_out=1)
            (without,), _ = refit(entered, batches[:-1], [keep])
            for layer in keep:
                assert torch.equal(result.weights[layer], alone.weights[layer])
                assert torch.equal(result.weights[layer], without.weights[layer])
            assert torch.equal(result.hidden[0], alone.hidden[0])


@pytest.mark.parametrize(("models", "held_out"), [(1, 0), (3, 1)])
def test_the_bar_ends_at_the_tokens_there_are(models: int, held_out: int) -> None:
    model = tiny_model("llama")
    batches = batches_of(model)
    fitted: list[float] = []
    costed: list[float] = []
    with ResidentModel(model) as entered:
        refit(
            entered,
            batches,
            [keep_of(model)] * models,
            held_out=held_out,
            on_progress=fitted.append,
        )
        removal_costs(entered, batches, on_progress=costed.append)
    assert sum(fitted) == pytest.approx(sum(LENGTHS))
    assert sum(costed) == pytest.approx(sum(LENGTHS))
    assert min(fitted + costed) > 0


def test_moments_of_bfloat16_acts_are_of_float32_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the first layer, whose acts and streams are the dense model's to the last bit."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    batches, keep = batches_of(model, (40,) * 7), keep_of(model)
    mlp, norm = model.model.layers[0].mlp, model.model.layers[0].post_attention_layernorm
    seen: dict[str, list[Tensor]] = {"act": [], "before": [], "behind": []}
    handles = [
        mlp.down_proj.register_forward_pre_hook(lambda _, args: seen["act"].append(args[0])),
        norm.register_forward_pre_hook(lambda _, args: seen["before"].append(args[0])),
        model.model.layers[0].register_forward_hook(lambda *args: seen["behind"].append(args[2])),
    ]
    for batch in batches:
        model(batch.ids, use_cache=False)
    for handle in handles:
        handle.remove()
    act, before, behind = (torch.cat(seen[name]).flatten(0, 1).double() for name in seen)
    noted: list[Tensor] = []

    def note(gram: Tensor, *rest: Any, **options: Any) -> Tensor:
        noted.extend([gram.clone(), *rest])
        return least_squares(gram, *rest, **options)

    def note_costs(gram: Tensor, *_: Any) -> Tensor:
        noted.append(gram.clone())
        return gram.diagonal()

    monkeypatch.setattr("hfprune_fast.pruning.normal_equations.least_squares", note)
    monkeypatch.setattr("hfprune_fast.scoring.costs.greedy_removal_costs", note_costs)
    with ResidentModel(model) as entered:
        refit(entered, batches, [keep])
        gram, cross = noted[:2]
        noted.clear()
        removal_costs(entered, batches)
    kept, missing = act[:, keep[0]], behind - before
    for got, left, right in ((gram, kept, kept), (cross, missing, kept), (noted[0], act, act)):
        # Each product and sum of a batch rounds once, as does the difference of the streams.
        most = 82 * torch.finfo(torch.float32).eps * (left.abs().t() @ right.abs()) / 280
        assert bool(((got - left.t() @ right / 280).abs() <= most).all())


@pytest.mark.slow
@pytest.mark.parametrize(("sequences", "matrices"), [(2, 2.5), (8, 4.5)])
def test_moments_are_in_memory_a_layer_at_a_time(sequences: int, matrices: float) -> None:
    model = tiny_model("llama", intermediate_size=320, hidden_size=8)
    batches, keep = batches_of(model, (9,) * sequences), keep_of(model, (310,) * 3)
    matrix = 320**2 * 8  # beside which all else is small, but for the rows of a block of removals
    with ResidentModel(model) as entered:
        with Watch(*model.parameters()) as costing:
            removal_costs(entered, batches)
        with Watch(*model.parameters()) as fitting:
            refit(entered, batches, [keep])
    assert costing.peak < 4 * matrix
    assert fitting.peak < matrices * matrix


def test_layers_of_different_widths_have_costs_of_their_own() -> None:
    """Rows of a table are as long as the widest layer's, the others end in zeros."""
    model = tiny_model("llama")
    hf.prune(model, keep_of(model))
    batches = [batch.ids for batch in batches_of(model, (40,) * 4)]
    table = hf.score(model, batches, criterion="fisher", obs=True)
    assert table.obs.shape == (3, 77)
    for costs, width in zip(table.obs, (50, 20, 77), strict=True):
        assert bool((costs[:width] > 0).all())
        assert bool((costs[width:] == 0).all())


def test_keeping_every_neuron_leaves_the_model_unchanged() -> None:
    model = tiny_model("qwen3")
    everything = {layer: torch.arange(96) for layer in range(3)}
    with ResidentModel(model) as entered:
        (result,), _ = refit(entered, batches_of(model), [everything])
    for layer, weight in result.weights.items():
        dense = model.model.layers[layer].mlp.down_proj.weight
        assert torch.allclose(weight, dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("offload", ["disk", "cpu"])
def test_streamed_weights_give_the_same_bits(offload: str, llama_dir: Path) -> None:
    found = []
    for how in ("none", offload):
        blueprint = loading.blueprint(llama_dir, dtype="float32", device="cpu")
        with open_model(blueprint, how) as model:
            batches, keep = batches_of(blueprint.model), keep_of(blueprint.model)
            (result,), _ = refit(model, batches, [keep])
            found.append((result.weights, removal_costs(model, batches)))
    for layer in range(3):
        assert torch.equal(found[0][0][layer], found[1][0][layer])
    assert torch.equal(found[0][1], found[1][1])


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ResidentModel(model) as entered:
        refit(entered, batches_of(model), [keep_of(model)])
        removal_costs(entered, batches_of(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for module in model.modules():
        assert module.training
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_acts_without_numbers_are_named() -> None:
    model = tiny_model("llama", dtype=torch.float16)
    model.model.layers[1].mlp.up_proj.weight.mul_(3e4)  # finite, but not its products
    batches = batches_of(model)
    with ResidentModel(model) as entered:
        with pytest.raises(NumericsError, match="activations of layer 1"):
            removal_costs(entered, batches)
        with pytest.raises(NumericsError, match="activations of layer 1"):
            refit(entered, batches, [keep_of(model)])
