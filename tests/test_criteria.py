"""Criteria beside the entropy: against float64, together in one run, and what they do not need."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import make_float64_exact
from tolerances import relative_error
from torch import Tensor
from transformers import PreTrainedModel
from truth import scores as true_scores
from truth import tiny_model

import hfprune_fast as hf
from hfprune_fast import scoring
from hfprune_fast.errors import ArgumentError
from hfprune_fast.forward import MicroBatch, ResidentModel, numbered
from hfprune_fast.kernels._philox import uniform
from hfprune_fast.scoring import How, no_totals, score_batches

ALL = ("entropy", "cross_entropy", "fisher")
SEED = 5


def ids_of(model: PreTrainedModel, samples: int = 5, seq_len: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(model.config.vocab_size, (samples, seq_len), generator=generator)


def next_token(logits: Tensor, ids: Tensor, number: int) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -log_p[:-1].gather(1, ids[1:, None]).mean()


def drawn(logits: Tensor, number: int) -> Tensor:
    """The token at each position whose share of the distribution the row's number falls into."""
    rows = (number << 24) + torch.arange(len(logits))
    above = logits.softmax(-1).cumsum(-1) > uniform(rows, SEED, torch.float64)[:, None]
    return above.int().argmax(-1)


def drawn_token(logits: Tensor, ids: Tensor, number: int) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -log_p.gather(1, drawn(logits.detach(), number)[:, None]).mean()


TRUTHS: dict[str, Any] = {"cross_entropy": next_token, "fisher": drawn_token}
NAMES = {"cross_entropy": "cross_entropy_nats", "fisher": "sampled_cross_entropy_nats"}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("criterion", ["cross_entropy", "fisher"])
def test_float64_is_the_truth(criterion: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    make_float64_exact(model, monkeypatch)
    ids = ids_of(model)
    truth = true_scores(model.state_dict(), model.config, ids, TRUTHS[criterion])
    table = hf.score(model, ids.split(2), criterion=criterion, seed=SEED)
    for statistic in ("l1", "l2", "mask"):
        error = relative_error(table.importance(statistic, criterion), truth[statistic]).max()
        assert error < 1e-12, f"{statistic}: {error:.1e}"
    assert table.provenance[NAMES[criterion]] == pytest.approx(
        float(truth["loss"].mean()), rel=1e-12
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_several_in_one_run_are_each_alone(recompute: bool) -> None:
    """The first and the last have its very bits, since what they read and write is the same."""
    model = tiny_model("llama", dtype=torch.float32)
    batches = numbered(MicroBatch(part, (24,) * len(part)) for part in ids_of(model).split(2))
    with ResidentModel(model) as entered:
        together = score_batches(entered, batches, How(criteria=ALL, recompute=recompute))
        for c, criterion in enumerate(ALL):
            alone = score_batches(entered, batches, How(criteria=(criterion,), recompute=recompute))
            assert torch.equal(together.statistics[c], alone.statistics[0]), criterion
            assert together.loss_nats[c] == alone.loss_nats[0]


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_batches() -> None:
    model = tiny_model("qwen3")
    ids = ids_of(model)
    tables = [
        hf.score(model, ids.split(size), criterion="fisher", seed=seed)
        for size, seed in ((1, 0), (3, 0), (5, 0), (5, 1))
    ]
    for other in tables[1:3]:
        assert torch.allclose(other.l1, tables[0].l1, rtol=1e-12)
    assert not torch.allclose(tables[3].l1, tables[0].l1, rtol=1e-2)


@pytest.mark.parametrize("criterion", ["cross_entropy", "fisher"])
def test_padding_counts_for_nothing(criterion: str) -> None:
    model = tiny_model("llama")
    ids = ids_of(model, samples=3)
    lengths = (24, 1, 9)
    mask = torch.arange(24) < torch.tensor(lengths)[:, None]
    padded = hf.score(model, [{"input_ids": ids, "attention_mask": mask}], criterion=criterion)
    apart = hf.score(
        model, [row[None, :n] for row, n in zip(ids, lengths, strict=True)], criterion=criterion
    )
    for statistic in ("l1", "l2", "mask"):
        ours, theirs = (t.importance(statistic) for t in (padded, apart))
        assert torch.allclose(ours, theirs, rtol=1e-10)  # norms are in fp32, of the same values


def test_activation_alone_runs_forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids = ids_of(model)
    both = hf.score(model, ids.split(2), criterion=["entropy", "activation"])
    for name in ("linear_entropy", "linear_cross_entropy", "linear_fisher"):
        monkeypatch.setattr(scoring, name, None)
    alone = hf.score(model, ids.split(2), criterion="activation")
    assert torch.allclose(alone.act, both.act, rtol=1e-14)
    assert torch.equal(alone.down_norm, both.down_norm)
    assert set(alone.statistics) == {"act", "down_norm"}
    assert torch.equal(alone.importance(), alone.act.sqrt() * alone.down_norm)
    assert torch.equal(both.importance(criterion="activation"), both.importance("act"))


@pytest.mark.parametrize("recompute", [False, True])
def test_covariance_of_the_gradients_at_the_outputs(recompute: bool) -> None:
    model = tiny_model("llama")
    ids, lengths = ids_of(model, samples=3), (24, 9, 17)
    batches = numbered([MicroBatch(ids[:2], lengths[:2]), MicroBatch(ids[2:, :17], lengths[2:])])
    how = How(criteria=("entropy", "fisher"), seed=SEED, recompute=recompute)
    with ResidentModel(model) as entered:
        got = score_batches(entered, batches, how, no_totals(entered, how, True)).output_fisher
    assert got is not None
    expected = torch.zeros_like(got, dtype=torch.float64)
    for number, (row, length) in enumerate(zip(ids, lengths, strict=True)):
        for layer, grads in enumerate(output_gradients(model, row[:length], number)):
            expected[layer] += grads.t() @ grads
    for layer in range(len(got)):
        error = (got[layer] - expected[layer]).norm() / expected[layer].norm()
        assert error < 2**-22, f"layer {layer}: {error:.1e}"  # kept in fp32


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


def test_removal_costs_rank_and_are_the_same_streamed(llama_dir: Path, text_file: Path) -> None:
    running: dict[str, Any] = {"samples": 4, "seq_len": 32, "device": "cpu"}
    resident = hf.score(llama_dir, text_file, criterion=["fisher", "entropy"], obs=True, **running)
    assert bool((resident.obs > 0).all())
    for offload in ("disk", "cpu"):
        streamed = hf.score(
            llama_dir, text_file, criterion=["fisher", "entropy"], obs=True, offload=offload,
            batch_size=resident.provenance["batch_size"], **running,
        )  # fmt: skip
        for name, tensor in resident.statistics.items():
            assert torch.equal(streamed.statistics[name], tensor), name


def test_state_keeps_all_criteria(
    llama_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: dict[str, Any] = {
        "samples": 4, "seq_len": 32, "batch_size": 1, "criterion": ["entropy", "fisher"],
        "obs": True,
    }  # fmt: skip
    whole = hf.score(llama_dir, text_file, **running)
    run = scoring._Pass.add_to
    monkeypatch.setattr(scoring._Pass, "add_to", failing_at(2, run))
    state: dict[str, Any] = {"state_file": tmp_path / "state", "save_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        hf.score(llama_dir, text_file, **running, **state)
    monkeypatch.setattr(scoring._Pass, "add_to", run)
    with pytest.raises(hf.HFPruneError, match="criteria"):
        hf.score(llama_dir, text_file, **{**running, "criterion": ["fisher"]}, **state, resume=True)
    resumed = hf.score(llama_dir, text_file, **running, **state, resume=True)
    for name, tensor in whole.statistics.items():
        assert torch.equal(resumed.statistics[name], tensor), name


def failing_at(call: int, run: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(call))

    def add_to(*args: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return run(*args)

    return add_to


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"criterion": "entropi"}, "criterion must be one of entropy, .*got entropi"),
        ({"criterion": []}, "got none"),
        ({"criterion": ["fisher", "fisher"]}, "got fisher, fisher"),
        ({"obs": True}, "obs needs criterion fisher, got entropy"),
        ({"criterion": "fisher", "parity": True}, "parity .* criterion entropy alone, got fisher"),
    ],
)
def test_what_cannot_be_asked_for(asked: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ArgumentError, match=message):
        hf.score(model, ids_of(model), **asked)


def test_a_table_names_what_it_lacks() -> None:
    model = tiny_model("llama")
    table = hf.score(model, ids_of(model), criterion=["fisher", "activation"])
    assert table.criteria == ("fisher", "activation")
    assert torch.equal(table.l1, table.importance("l1", "fisher"))
    with pytest.raises(ArgumentError, match="by fisher, activation, not by entropy; score again"):
        table.importance("l1", "entropy")
    with pytest.raises(ArgumentError, match=r"one of l1, l2, mask, act .*got 'obs'"):
        table.importance("obs")
    with pytest.raises(AttributeError, match="these scores have no obs"):
        _ = table.obs
