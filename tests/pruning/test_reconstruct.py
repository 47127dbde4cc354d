"""Reconstruction against plain float64 training, and what it leaves of the model."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import sequences
from family_truth import Float64
from refit_truth import GATE_UP_DOWN, PlainModel, keep_of, plain_fit
from torch import Tensor
from transformers import PreTrainedModel
from truth import tiny_model
from watch import Watch

import hfprune_fast as hf
from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.config import RunOptions
from hfprune_fast.data.batches import MicroBatch, numbered
from hfprune_fast.engine import planner
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.errors import ArgumentError
from hfprune_fast.models.spec import spec_of
from hfprune_fast.pruning import reconstruct
from hfprune_fast.pruning.refit import Refitted, refit

STEPS, ROWS, RATE = 12, 128, 0.001
FLOAT64 = 1e-11  # Adam divides by the size of what it is given, and so enlarges what is small


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "slow" in request.keywords:
        return
    monkeypatch.setattr(reconstruct, "STEPS", STEPS)
    monkeypatch.setattr("hfprune_fast.pruning.refit.STEPS", STEPS)
    monkeypatch.setattr(reconstruct, "_CHECKS", 4)
    for module in (reconstruct, planner):
        monkeypatch.setattr(module, "RECONSTRUCTED_AT_ONCE", ROWS)
    monkeypatch.setattr(reconstruct, "_RATE", RATE)


pytestmark = pytest.mark.usefixtures("short", "one_thread")


def batches_of(lengths: tuple[int, ...] = (40, 23, 60) * 4) -> list[MicroBatch]:
    return numbered(MicroBatch(ids[None], (len(ids),)) for ids in sequences(lengths))


def reconstructed(
    model: PreTrainedModel,
    batches: list[MicroBatch],
    keep: Any,
    metrics: Any = None,
    **options: Any,
) -> Refitted:
    with ResidentModel(model) as entered:
        (result,), _ = refit(entered, batches, [keep], reconstruct=metrics or {}, **options)
    return result


def act(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    z = x @ gate.t()
    return z * torch.sigmoid(z) * (x @ up.t())


def out(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return act(x, gate, up) @ down.t()


def trained(
    weights: list[Tensor], x: Tensor, y: Tensor, u: Tensor, metric: Tensor, layer: int
) -> tuple[list[Tensor], bool]:
    """Adam in its own words, on Σ u eᵀ metric e / Σ u, e = y - out(x); the best of those seen."""
    known = len(x) - len(x) // 8
    drawn = torch.Generator().manual_seed(layer)
    rates = [RATE * float(w.square().mean().sqrt()) for w in weights]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]

    def error(rows: Any, *now: Tensor) -> Tensor:
        e = y[rows] - out(x[rows], *now)
        squares = torch.einsum("ti,ij,tj->t", e, metric, e)
        return (squares * u[rows]).sum() / u[rows].sum()

    held_out = slice(known, None)
    best, lowest, moved = weights, float(error(held_out, *weights)), False
    for step in range(STEPS):
        rows = torch.randint(known, (ROWS,), generator=drawn)
        leaves = [w.clone().requires_grad_() for w in weights]
        error(rows, *leaves).backward()
        decay = (1 + math.cos(math.pi * step / STEPS)) / 2
        after = []
        for w, leaf, (first, second), rate in zip(weights, leaves, moments, rates, strict=True):
            assert leaf.grad is not None
            first.mul_(0.9).add_(0.1 * leaf.grad)
            second.mul_(0.99).add_(0.01 * leaf.grad**2)
            m, v = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.99 ** (step + 1))
            after.append(w - rate * decay * m / (v.sqrt() + 1e-8))
        weights = after
        if (step + 1) % (STEPS // 4) == 0 and float(error(held_out, *weights)) < lowest:
            best, lowest, moved = weights, float(error(held_out, *weights)), True
    return best, moved


@pytest.mark.parametrize(("family", "weighed"), [("llama", (0, 2)), ("qwen3", ())])
def test_each_layer_is_plain_training_of_its_mlp(family: str, weighed: tuple[int, ...]) -> None:
    model = tiny_model(family)
    drawn = torch.Generator().manual_seed(5)
    roots = {k: torch.randn(64, 90, generator=drawn, dtype=torch.float64) for k in weighed}
    covariances = {layer: 1e-6 * root @ root.t() for layer, root in roots.items()}
    batches, keep = batches_of(), keep_of(model)
    rotary = model.model.rotary_emb
    head_dim = 2 * len(rotary.inv_freq)
    theta = model.config.rope_parameters["rope_theta"]
    rotary.inv_freq = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    with Float64():
        result = reconstructed(model, batches, keep, covariances)
    assert result.untrained == 0
    plain = PlainModel(model)
    dense = [plain.weights["model.embed_tokens.weight"][batch.ids[0]] for batch in batches]
    pruned = list(dense)
    moves = 0
    for layer in range(3):
        gate, up, down = plain.mlp(layer)
        dense = [plain.before_mlp(h, layer) for h in dense]
        dense = [h + out(plain.mlp_input(h, layer), gate, up, down) for h in dense]
        pruned = [plain.before_mlp(h, layer) for h in pruned]
        x = torch.cat([plain.mlp_input(h, layer) for h in pruned])
        y = torch.cat([d - h for d, h in zip(dense, pruned, strict=True)])
        u = 1 / torch.cat(dense).square().mean(1)
        start = [gate[keep[layer]], up[keep[layer]], down[:, keep[layer]]]
        choosing = sum(batch.tokens for batch in batches[len(batches) - len(batches) // 8 :])
        start[2] = plain_fit(act(x, *start[:2]), y, start[2], choosing)
        metric = torch.eye(64, dtype=torch.float64)
        if layer in covariances:
            c = covariances[layer]
            metric = c / c.diagonal().mean() + 0.1 * metric
        expected, moved = trained(start, x, y, u, metric / 64, layer)
        assert (layer in result.rows) == moved
        got = [*result.rows.get(layer, start[:2]), result.weights[layer]]
        for name, own, truth in zip(GATE_UP_DOWN, got, expected, strict=True):
            error = (own - truth).norm() / truth.norm()
            assert error < FLOAT64, f"layer {layer}, {name}: {error:.1e}"
        moves += moved
        pruned = [h + out(plain.mlp_input(h, layer), *expected) for h in pruned]
    assert moves > 0


def test_a_model_that_keeps_all_stays_as_it_is() -> None:
    model = tiny_model("qwen3")
    everything = {layer: torch.arange(96) for layer in range(3)}
    result = reconstructed(model, batches_of(), everything)
    for layer, rows in result.rows.items():
        mlp = model.model.layers[layer].mlp
        assert torch.equal(rows[0], mlp.gate_proj.weight)
        assert torch.equal(rows[1], mlp.up_proj.weight)
        assert torch.allclose(result.weights[layer], mlp.down_proj.weight, rtol=1e-9, atol=1e-9)


def test_the_streams_are_those_of_the_model_that_is_written(tmp_path: Path) -> None:
    """Widths differ, and what is held out is not trained on."""
    model = tiny_model("llama", mlp_bias=True)
    batches, keep = batches_of(), keep_of(model)
    result = reconstructed(model, batches, keep, held_out=1)
    without = reconstructed(model, batches[:-1], keep)
    cut = copy.deepcopy(model)
    hf.prune(cut, keep, down_proj=result.weights)
    has_moved = False
    for layer, rows in result.rows.items():
        mlp = cut.model.layers[layer].mlp
        for linear, weight, alone in zip(
            (mlp.gate_proj, mlp.up_proj), rows, without.rows[layer], strict=True
        ):
            has_moved |= not torch.equal(linear.weight, weight)
            assert torch.equal(weight, alone)
            linear.weight.copy_(weight)
    assert has_moved
    with ResidentModel(cut) as entered:
        (expected,) = entered.final_hidden(batches[-1:])
    assert (result.hidden[0] - expected).abs().max() < 1e-12 * expected.abs().max()


def test_the_model_is_left_as_it_was_and_the_bar_ends_at_the_tokens_there_are() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, mlp_bias=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    seen: list[float] = []
    with ResidentModel(model) as entered:
        refit(
            entered, batches_of(), [keep_of(model)], held_out=1, reconstruct={},
            on_progress=seen.append,
        )  # fmt: skip
    after = model.state_dict(keep_vars=True)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor)
        assert not after[name].requires_grad
    assert sum(seen) == pytest.approx(sum(batch.tokens for batch in batches_of()))
    assert min(seen) > 0


@pytest.mark.parametrize("offload", ["disk", "cpu"])
def test_streamed_weights_give_the_same_bits(offload: str, llama_dir: Path) -> None:
    found = []
    for how in ("none", offload):
        blueprint = loading.blueprint(llama_dir, dtype="float32", device="cpu")
        with open_model(blueprint, how) as model:
            keep = keep_of(blueprint.model)
            (result,), _ = refit(model, batches_of(), [keep], reconstruct={})
            found.append(result)
    for layer in range(3):
        assert torch.equal(found[0].weights[layer], found[1].weights[layer])
    assert found[0].rows.keys() == found[1].rows.keys() != set()
    for layer, rows in found[0].rows.items():
        for own, other in zip(rows, found[1].rows[layer], strict=True):
            assert torch.equal(own, other)


def test_a_layer_that_adds_something_else_is_refitted_alone() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[1]
    forward = layer.forward

    def squared(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) ** 2

    layer.forward = squared
    batches, keep = batches_of(), keep_of(model)
    result = reconstructed(model, batches, keep)
    assert result.untrained == 1
    assert sorted(result.rows) == [0, 2]
    assert sorted(result.weights) == [0, 1, 2]


def test_a_layer_that_adds_nothing_is_known() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    assert reconstructed(model, batches_of(), keep_of(model)).untrained == 0


def test_too_few_tokens_to_hold_any_out_train_nothing() -> None:
    model = tiny_model("llama")
    result = reconstructed(model, batches_of((1,)), keep_of(model))
    assert (result.unimproved, result.rows) == (3, {})
    assert sorted(result.weights) == [0, 1, 2]


def test_its_memory_is_planned() -> None:
    sizes = {"intermediate_size": 320, "num_hidden_layers": 2}
    model = tiny_model("llama", dtype=torch.float32, **sizes)
    batches = batches_of((40,) * 32)
    keep = keep_of(model, (320,) * 2)
    planned = [
        planner.plan_run(
            spec_of(model), RunOptions(), device=torch.device("cpu"), dtype=torch.float32,
            seq_len=40, sequences=32, refit=how,
        ).refit_bytes
        for how in ("none", "linear", "reconstruct")
    ]  # fmt: skip
    with ResidentModel(model) as entered:
        peaks = []
        for reconstructs in (None, {}):
            with Watch(*model.parameters()) as watch:
                refit(entered, batches, [keep], reconstruct=reconstructs)
            peaks.append(watch.peak)
    assert planned[0] == 0
    assert peaks[0] < planned[1] < 2 * peaks[0]
    assert peaks[1] < planned[2] < 2 * peaks[1]


def test_a_reconstruction_needs_text(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="refit reconstruct needs --calibration, the text to"):
        hf.oneshot(
            "demo", None, tmp_path / "out", prune_ratio=0.2, refit="reconstruct",
            criterion="magnitude", select="statistic", allocation="uniform",
        )  # fmt: skip


@pytest.mark.slow
def test_a_trained_model_comes_closer_than_by_the_refit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"samples": 32, "seq_len": 128, "dtype": "float32", "device": "cpu"}
    kl, layers = {}, 0
    for how in ("linear", "reconstruct"):
        made = hf.oneshot(
            "demo", "demo", tmp_path / how, prune_ratio=0.3, allocation="uniform", refit=how,
            text=TINY_MODEL / "heldout.txt", **options,
        )  # fmt: skip
        kl[how] = made["fidelity"]["kl_nats"]
        layers = made.get("reconstructed_layers", 0)
    assert kl["reconstruct"] < 0.95 * kl["linear"]
    card = (tmp_path / "reconstruct" / "README.md").read_text(encoding="utf-8")
    assert 0 < layers <= 4
    assert f"| kept neurons | trained in {layers} layers, one at a time, to give" in card
