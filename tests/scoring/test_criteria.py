"""Criteria beside the entropy: against float64, together in one run, and what they do not need."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import make_float64_exact
from interruption import interrupt
from tolerances import relative_error
from torch import Tensor
from transformers import PreTrainedModel
from truth import forward, tiny_model
from truth import scores as true_scores

import hfprune_fast as hf
from hfprune_fast.data.batches import MicroBatch, numbered
from hfprune_fast.engine import mlp_hooks, planner
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.errors import ArgumentError, ResumeError
from hfprune_fast.kernels._philox import uniform
from hfprune_fast.scoring import job, obs, passes
from hfprune_fast.scoring.passes import PassOptions
from hfprune_fast.scoring.run import score_batches

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


def mean_entropy(logits: Tensor, ids: Tensor, number: int) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


TRUTHS: dict[str, Any] = {
    "entropy": mean_entropy,
    "cross_entropy": next_token,
    "fisher": drawn_token,
}
NAMES = {
    "entropy": "entropy_nats",
    "cross_entropy": "cross_entropy_nats",
    "fisher": "sampled_cross_entropy_nats",
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("criteria", [("cross_entropy",), ("fisher",), ("fisher", *ALL[:2]), ALL])
def test_float64_is_the_truth(
    criteria: tuple[str, ...], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    make_float64_exact(model, monkeypatch)
    ids = ids_of(model)
    table = hf.score(model, ids.split(2), criterion=criteria, seed=SEED)
    assert table.provenance.get("seed") == (SEED if "fisher" in criteria else None)
    for criterion in criteria:
        truth = true_scores(model.state_dict(), model.config, ids, TRUTHS[criterion])
        for statistic in ("l1", "l2", "fisher_mask", "act"):
            got = table.act if statistic == "act" else table.importance(statistic, criterion)
            error = relative_error(got, truth[statistic]).max()
            assert error < 1e-12, f"{criterion} {statistic}: {error:.1e}"
        assert table.provenance[NAMES[criterion]] == pytest.approx(
            float(truth["loss"].mean()), rel=1e-12
        )


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"pass_tokens": 40}])
@pytest.mark.parametrize("at_once", [1, 3])
def test_no_way_of_running_leaves_the_truth(
    at_once: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sequences of their own lengths, padded to the longest beside them."""
    model = tiny_model("llama")
    make_float64_exact(model, monkeypatch)
    ids, lengths = ids_of(model), (24, 2, 17, 9, 24)
    batches = numbered(
        MicroBatch(ids[i : i + at_once], lengths[i : i + at_once]) for i in range(0, 5, at_once)
    )
    with ResidentModel(model) as entered:
        totals = score_batches(entered, batches, PassOptions(criteria=ALL, seed=SEED, **options))
    for c, criterion in enumerate(ALL):
        truths = [
            true_scores(
                model.state_dict(), model.config, ids[n : n + 1, :length], numbered_as(n, criterion)
            )
            for n, length in enumerate(lengths)
        ]
        for row, statistic in zip(
            totals.statistics[c], ("l1", "l2", "fisher_mask", "act"), strict=True
        ):
            truth = torch.stack([t[statistic] for t in truths]).sum(0)
            error = relative_error(row, truth).max()
            assert error < 1e-12, f"{criterion} {statistic}: {error:.1e}"
        loss = sum(float(truth["loss"].sum()) for truth in truths)
        assert totals.loss_nats[c] == pytest.approx(loss, rel=1e-12)


def numbered_as(number: int, criterion: str) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The loss of the sequence that has this number among all."""
    return lambda logits, ids, _: TRUTHS[criterion](logits, ids, number)


def test_what_is_drawn_stays_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a backward, so that micro-batches are halved: each sequence counts once."""
    model = tiny_model("llama")
    batches = numbered(MicroBatch(part, (24,) * len(part)) for part in ids_of(model, 7).split(4))
    how = PassOptions(criteria=("entropy", "fisher"), output_fisher=True, seed=SEED)
    gated_taylor = mlp_hooks.gated_taylor

    def short(grad: Tensor, *rest: Any, **options: Any) -> Any:
        if len(grad) > 1:
            raise MemoryError
        return gated_taylor(grad, *rest, **options)

    with ResidentModel(model) as entered:
        whole = score_batches(entered, batches, how)
        monkeypatch.setattr(mlp_hooks, "gated_taylor", short)
        halved = score_batches(entered, batches, how)
    assert halved.samples == 7
    assert torch.allclose(halved.statistics, whole.statistics, rtol=1e-12)
    assert halved.loss_nats == pytest.approx(whole.loss_nats, rel=1e-12)
    assert halved.output_fisher is not None
    assert whole.output_fisher is not None
    error = (halved.output_fisher - whole.output_fisher).norm() / whole.output_fisher.norm()
    assert error < 2**-22  # kept in fp32


def test_a_gradient_scale_is_taken_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a power of two, so to the last bit."""
    model = tiny_model("llama")
    batches = numbered(MicroBatch(part, (24,) * len(part)) for part in ids_of(model).split(2))
    how = PassOptions(criteria=ALL, output_fisher=True, seed=SEED)
    with ResidentModel(model) as entered:
        plain = score_batches(entered, batches, how)
        monkeypatch.setattr(passes, "gradient_scale", lambda *_: 2.0**9)
        scaled = score_batches(entered, batches, how)
    assert torch.equal(scaled.statistics, plain.statistics)
    assert scaled.loss_nats == plain.loss_nats
    assert plain.output_fisher is not None
    assert scaled.output_fisher is not None
    assert torch.equal(scaled.output_fisher, plain.output_fisher)


@pytest.mark.parametrize("recompute", [False, True])
def test_several_in_one_run_are_each_alone(recompute: bool) -> None:
    """The first and the last have its very bits, since what they read and write is the same."""
    model = tiny_model("llama", dtype=torch.float32)
    batches = numbered(MicroBatch(part, (24,) * len(part)) for part in ids_of(model).split(2))
    with ResidentModel(model) as entered:
        together = score_batches(entered, batches, PassOptions(criteria=ALL, recompute=recompute))
        for c, criterion in enumerate(ALL):
            alone = score_batches(
                entered, batches, PassOptions(criteria=(criterion,), recompute=recompute)
            )
            assert torch.equal(together.statistics[c], alone.statistics[0]), criterion
            assert together.loss_nats[c] == alone.loss_nats[0]


@pytest.mark.parametrize("criteria", [(), ("fisher",), ALL])
def test_the_bar_ends_at_the_tokens_there_are(criteria: tuple[str, ...]) -> None:
    model = tiny_model("llama")
    batches = numbered(MicroBatch(part, (24,) * len(part)) for part in ids_of(model).split(2))
    worked: list[float] = []
    with ResidentModel(model) as entered:
        score_batches(entered, batches, PassOptions(criteria=criteria), on_progress=worked.append)
    assert sum(worked) == pytest.approx(5 * 24)


def test_activation_alone_runs_forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids = ids_of(model)
    both = hf.score(model, ids.split(2), criterion=["entropy", "activation"])
    for name in ("linear_entropy", "linear_cross_entropy", "linear_fisher"):
        monkeypatch.setattr(f"hfprune_fast.scoring.criteria.{name}", None)
    alone = hf.score(model, ids.split(2), criterion="activation")
    assert torch.allclose(alone.act, both.act, rtol=1e-14)
    assert torch.equal(alone.down_norm, both.down_norm)
    lengths = torch.tensor([24, 3, 9, 1, 24])
    mask = torch.arange(24) < lengths[:, None]
    padded = hf.score(model, [{"input_ids": ids, "attention_mask": mask}], criterion="activation")
    apart = hf.score(
        model, [row[None, :n] for row, n in zip(ids, lengths, strict=True)], criterion="activation"
    )
    assert torch.allclose(padded.act, apart.act, rtol=1e-10)
    assert set(alone.statistics) == {"act", "down_norm"}
    assert torch.equal(alone.importance(), alone.act.sqrt() * alone.down_norm)
    assert torch.equal(both.importance(criterion="activation"), both.importance("act"))


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
    for layer in range(len(got)):
        error = (got[layer] - expected[layer]).norm() / expected[layer].norm()
        assert error < 2**-22, f"layer {layer}: {error:.1e}"  # kept in fp32


def test_covariance_in_bfloat16_is_of_float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    ids = ids_of(model, samples=4)
    batches = numbered(MicroBatch(part, (24,) * len(part)) for part in ids.split(1))
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


def test_streamed_weights_give_the_same_bits(llama_dir: Path, text_file: Path) -> None:
    running: dict[str, Any] = {"samples": 4, "seq_len": 32, "device": "cpu"}
    for criteria, costs in ((("fisher", "entropy", "cross_entropy"), True), ("activation", False)):
        asked: dict[str, Any] = {**running, "criterion": criteria, "obs": costs, "batch_size": 2}
        resident = hf.score(llama_dir, text_file, **asked)
        assert not costs or bool((resident.obs > 0).all())
        for offload in ("disk", "cpu"):
            streamed = hf.score(llama_dir, text_file, offload=offload, **asked)
            assert streamed.statistics.keys() == resident.statistics.keys()
            for name, tensor in resident.statistics.items():
                assert torch.equal(streamed.statistics[name], tensor), name


def test_state_keeps_all_criteria(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(2048, (4, 32), generator=torch.Generator().manual_seed(0))
    running: dict[str, Any] = {"batch_size": 1, "criterion": ["entropy", "fisher"], "obs": True}
    whole = hf.score(llama_dir, ids, **running)
    state: dict[str, Any] = {"state_file": tmp_path / "state", "save_seconds": 0}
    with monkeypatch.context() as patch:
        interrupt(patch, at_pass=2)
        with pytest.raises(KeyboardInterrupt):
            hf.score(llama_dir, ids, **running, **state)
    for other, said in (
        ({"criterion": ["fisher"]}, "criteria"),
        ({"criterion": ["fisher", "entropy"]}, "criteria"),
        ({"obs": False}, "obs True, not False"),
        ({"seed": 1}, "seed 0, not 1"),
    ):
        with pytest.raises(ResumeError, match=f"of another run: .*{said}"):
            hf.score(llama_dir, ids, **{**running, **other}, **state, resume=True)
    resumed = hf.score(llama_dir, ids, **running, **state, resume=True)
    for name, tensor in whole.statistics.items():
        assert torch.equal(resumed.statistics[name], tensor), name


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"criterion": "entropi"}, "criterion must be one of entropy, .*got entropi"),
        ({"criterion": []}, "got none"),
        ({"criterion": ["fisher", "fisher"]}, "got fisher, fisher"),
        ({"obs": True}, "obs needs criterion fisher, got entropy"),
        ({"criterion": "fisher", "parity": True}, "parity .* criterion entropy alone, got fisher"),
        (
            {"criterion": ["entropy", "activation"], "parity": True},
            "alone, got entropy, activation",
        ),
    ],
)
def test_what_cannot_be_asked_for(asked: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ArgumentError, match=message):
        hf.score(model, ids_of(model), **asked)


def test_the_plan_knows_what_is_scored_by(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    asked: list[tuple[int, bool]] = []
    plan_run = job.plan_run

    def note(*args: Any, criteria: int, refit: bool, **options: Any) -> planner.Plan:
        asked.append((criteria, refit))
        return plan_run(*args, criteria=criteria, refit=refit, **options)

    monkeypatch.setattr(job, "plan_run", note)
    hf.score(model, ids_of(model), criterion=["activation", "entropy", "fisher"], obs=True)
    hf.score(model, ids_of(model), criterion="activation")
    assert asked == [(2, True), (1, False)]


@pytest.mark.parametrize(
    ("criterion", "statistic"), [("entropy", "l1"), ("cross_entropy", "l2"), ("fisher", "l2")]
)
def test_each_criterion_ranks_by_its_own_statistic(criterion: str, statistic: str) -> None:
    model = tiny_model("llama")
    table = hf.score(model, ids_of(model), criterion=criterion)
    assert torch.equal(table.importance(), table.statistics[f"{criterion}.{statistic}"])


def test_a_table_names_what_it_lacks() -> None:
    model = tiny_model("llama")
    table = hf.score(model, ids_of(model), criterion=["fisher", "activation"])
    assert table.criteria == ("fisher", "activation")
    assert torch.equal(table.l1, table.importance("l1", "fisher"))
    with pytest.raises(ArgumentError, match="by fisher, activation, not by entropy; score again"):
        table.importance("l1", "entropy")
    with pytest.raises(ArgumentError, match=r"one of l1, l2, fisher_mask, act .*got 'obs'"):
        table.importance("obs")
    with pytest.raises(AttributeError, match="these scores have no obs"):
        _ = table.obs
