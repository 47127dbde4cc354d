from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from eager import eager_scores
from exact import make_float64_exact
from interpreted import rounding_as_a_gpu
from tolerances import (
    assert_no_worse,
    assert_no_worse_together,
    keep_differences_inside_band,
    relative_error,
)
from transformers import PreTrainedModel
from truth import scores as true_scores
from truth import tiny_model

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.loading import load_model
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import STATISTICS, CalibrationOptions
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.errors import NumericsError
from hfprune_fast.kernels import TaylorStatistics, linear_entropy, taylor_statistics
from hfprune_fast.pruning.widths import most_important

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def random_ids(model: PreTrainedModel, samples: int = 4, seq_len: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (samples, seq_len), generator=generator)


def models_and_ids(family: str, dtype: torch.dtype) -> tuple[PreTrainedModel, torch.Tensor]:
    if family == "shipped":
        name = str(dtype).removeprefix("torch.")
        text = TINY_MODEL / "calibration.txt"
        data = calibrate(text, open_source(TINY_MODEL), CalibrationOptions(6, 64))
        (ids,) = (batch.ids for batch in data.batches)
        return load_model(TINY_MODEL, dtype=name, device="cpu"), ids
    model = tiny_model(family, dtype=dtype, tied=family == "qwen3")
    return model, random_ids(model)


def true_state(family: str, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights before they were rounded to the dtype under test."""
    exact = model if family == "shipped" else tiny_model(family, tied=family == "qwen3")
    return dict(exact.state_dict())


@pytest.mark.parametrize("family", [*FAMILIES, "shipped"])
def test_float64_is_the_truth(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With float64 norms and rotary tables only the order of float64 roundings is left."""
    model, ids = models_and_ids(family, torch.float64)
    make_float64_exact(model, monkeypatch)
    truth = true_scores(true_state(family, model), model.config, ids)
    table = hf.score(model, ids.split(2))
    for name in STATISTICS:
        assert relative_error(getattr(table, name), truth[name]).max() < 1e-12, name
    record = table.provenance
    assert record["entropy_nats"] == pytest.approx(float(truth["loss"].mean()), rel=1e-12)
    assert (record["samples"], record["tokens"]) == (len(ids), ids.numel())
    for statistic in STATISTICS:
        importance = truth[statistic]
        if statistic == "act":
            importance = importance.sqrt() * table.down_norm  # whose own truth is tested below
        for ratio in (0.1, 0.2, 0.5):
            keep = hf.select(table, prune_ratio=ratio, statistic=statistic)
            for layer, kept in keep.items():
                assert torch.equal(kept, most_important(importance[layer], len(keep[0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_down_norm_is_the_norm_of_each_column(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype, hidden_size=520, num_hidden_layers=2)
    table = hf.score(model, torch.zeros(1, 4, dtype=torch.int64))
    for layer, norms in enumerate(table.down_norm):
        weight = model.model.layers[layer].mlp.down_proj.weight.double()
        torch.testing.assert_close(norms, weight.norm(dim=0), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, "shipped"])
def test_error_is_at_most_twice_eager_torch(
    family: str, dtype: torch.dtype, measured: Callable[[str], None]
) -> None:
    model, ids = models_and_ids(family, dtype)
    truth = true_scores(true_state(family, model), model.config, ids)
    eager = eager_scores(model, ids)
    table = hf.score(model, ids)
    differing = {}
    for name in STATISTICS:
        ours = getattr(table, name)
        assert_no_worse(ours, eager[name], truth[name], floor=torch.finfo(dtype).eps / 2)
        width = round(0.8 * ours.shape[1])
        for layer in range(len(ours)):
            kept, expected = (most_important(t[layer], width) for t in (ours, truth[name]))
            differing[name, layer] = keep_differences_inside_band(
                ours[layer], truth[name][layer], kept, expected
            )
    by_statistic = {
        name: sum(n for (statistic, _), n in differing.items() if statistic == name)
        for name in STATISTICS
    }
    measured(f"{family} {dtype}: neurons kept by ours or the truth alone at 80 %: {by_statistic}")


def test_repeatable_bit_for_bit() -> None:
    model = random_llama()
    ids = random_ids(model)
    first, second = hf.score(model, ids), hf.score(model, ids)
    assert all(torch.equal(getattr(first, n), getattr(second, n)) for n in STATISTICS)


def test_nan_in_a_weight_is_named() -> None:
    model = random_llama()
    model.model.layers[2].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(NumericsError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        hf.score(model, random_ids(model))


def too_steep(hidden: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, ...]:
    """An entropy whose gradient is infinite."""
    return torch.ones(()), torch.full_like(hidden, torch.inf)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("model.layers.1.mlp", "MLP activations of layer 1"),
        ("lm_head", "logits"),
        ("gradient", "gradient at the MLP of layer 2"),
    ],
)
def test_an_overflow_is_named(where: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llama()
    if where == "gradient":
        monkeypatch.setattr("hfprune_fast.scoring.criteria.linear_entropy", too_steep)
    else:
        for parameter in model.get_submodule(where).parameters():
            parameter.fill_(3e38)
    with pytest.raises(NumericsError, match=message):
        hf.score(model, random_ids(model))


def test_arrays_and_lists_are_token_batches_too() -> None:
    model = random_llama()
    ids = random_ids(model)
    expected = hf.score(model, ids, batch_size=2)
    parts = ids.split(2)
    for batches in (ids.numpy(), [b.tolist() for b in parts], (b.int() for b in parts)):
        assert torch.equal(hf.score(model, batches, batch_size=2).l1, expected.l1)
    flipped = hf.score(model, ids.flip(0))
    records = [table.provenance["calibration"] for table in (expected, flipped)]
    assert len({record["data_sha256"] for record in records}) == 2


@pytest.mark.parametrize("family", ["llama", "shipped"])
def test_float16_rounds_less_than_bfloat16(family: str) -> None:
    """With 3 more bits, and a gradient scale, an eighth of what bfloat16 loses in eager torch."""
    model, ids = models_and_ids(family, torch.bfloat16)
    truth = true_scores(true_state(family, model), model.config, ids)
    eager = eager_scores(model, ids)
    bf16_error = {name: relative_error(eager[name], truth[name]) for name in STATISTICS}
    model, ids = models_and_ids(family, torch.float16)
    table = hf.score(model, ids)
    for name in STATISTICS:
        error = relative_error(getattr(table, name), truth[name])
        assert (error <= 2 * bf16_error[name] / 8 + torch.finfo(torch.float16).eps).all(), name


def test_a_gradient_scale_that_overflows_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llama().half()
    ids = random_ids(model)
    expected = hf.score(model, ids)
    tried: list[float] = []

    def overflowing(*args: Any, grad_scale: float, **options: Any) -> tuple[torch.Tensor, ...]:
        loss, d_hidden = linear_entropy(*args, grad_scale=grad_scale, **options)
        tried.append(grad_scale)
        return loss, d_hidden if grad_scale < 1024 else d_hidden * torch.inf

    monkeypatch.setattr("hfprune_fast.scoring.criteria.linear_entropy", overflowing)
    table = hf.score(model, ids[:1])
    assert tried == [4096, 256]
    assert table.provenance["samples"] == 1
    table = hf.score(model, ids)
    # A power of two changes no bit but of gradients near underflow: less than one rounding of each.
    assert relative_error(table.l1, expected.l1).max() < torch.finfo(torch.float16).eps / 2
    assert torch.equal(table.act, expected.act)
    monkeypatch.setattr("hfprune_fast.scoring.criteria.linear_entropy", too_steep)
    with pytest.raises(NumericsError, match="gradient at the MLP of layer 2"):
        hf.score(model, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_kernels_score_within_the_error_rule(dtype: torch.dtype) -> None:
    """In Triton's interpreter on a CPU, on the device itself on a GPU; norms and all are fused."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model("llama", dtype=dtype, num_hidden_layers=2)
    ids = random_ids(model, samples=16, seq_len=4)[:, None]
    truth = [true_scores(true_state("llama", model), model.config, each) for each in ids]
    eager = [eager_scores(model, each) for each in ids]
    with rounding_as_a_gpu():
        ours = [hf.score(model.to(device), each, backend="triton") for each in ids]
    assert {table.provenance["backend"] for table in ours} == {"triton"}
    for name in STATISTICS:
        found = [getattr(table, name) for table in ours]
        expected, theirs = ([each[name] for each in of] for of in (truth, eager))
        floor = torch.finfo(dtype).eps / 2
        assert_no_worse_together(
            *(torch.stack(each) for each in (found, theirs, expected)), floor=floor
        )


def test_parity_adds_up_in_bfloat16_as_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """score += (act * grad).abs().sum() for each sequence, all in bfloat16."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(grad: torch.Tensor, act: torch.Tensor, **options: Any) -> TaylorStatistics:
        seen.append((grad.clone(), act.clone()))
        return taylor_statistics(grad, act, **options)

    monkeypatch.setattr("hfprune_fast.engine.mlp_hooks.taylor_statistics", watched)
    model = tiny_model("llama", dtype=torch.bfloat16)
    layers = model.config.num_hidden_layers
    ids = random_ids(model, samples=5)
    table = hf.score(model, ids, batch_size=2, parity=True)
    assert table.provenance["parity"] is True
    score = torch.zeros(layers, model.config.intermediate_size, dtype=torch.bfloat16)
    for call, (grad, act) in enumerate(seen):  # the backward meets the last layer first
        score[layers - 1 - call % layers] += (act * grad).abs().sum(dim=(0, 1))
    assert len(seen) == 5 * layers
    assert torch.equal(table.l1, score.double())
    assert not torch.equal(table.l1, hf.score(model, ids).l1)


def test_score_by_path_records_where_it_came_from(
    save_checkpoint: Callable[..., Path], text_file: Path
) -> None:
    folder = save_checkpoint(random_llama())
    table = hf.score(folder, text_file, samples=3, seq_len=32, seed=7)
    record = table.provenance
    wanted = {"model": "model", "samples": 3, "dtype": "float32"}
    assert record | wanted == record
    calibration = record["calibration"]
    assert (calibration["seq_len"], calibration["seed"]) == (32, 7)
    assert len(record["model_fingerprint"]) == len(calibration["data_sha256"]) == 64
    assert set(record["versions"]) >= {"torch", "transformers", "hfprune_fast", "python", "triton"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    make_float64_exact(model, monkeypatch)
    ids = random_ids(model)
    on_cpu, on_cuda = hf.score(model, ids), hf.score(model.cuda(), ids)
    for name in STATISTICS:
        assert relative_error(getattr(on_cuda, name), getattr(on_cpu, name)).max() < 1e-12
