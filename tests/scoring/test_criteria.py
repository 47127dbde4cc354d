"""Criteria beside the entropy: against float64, together in one run, and what they do not need."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from criteria_truth import SEED, TRUTHS, ids_of, in_batches
from exact import make_float64_exact
from interruption import interrupt
from tolerances import relative_error
from torch import Tensor
from truth import scores as true_scores
from truth import tiny_model

import hfprune_fast as hf
from hfprune_fast.config import STATISTICS
from hfprune_fast.data.batches import MicroBatch, numbered
from hfprune_fast.engine import mlp_hooks
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.plan import Plan
from hfprune_fast.errors import ArgumentError, ResumeError
from hfprune_fast.scoring import job, passes
from hfprune_fast.scoring.run import score_batches
from hfprune_fast.scoring.sums import PassOptions

ALL = ("entropy", "cross_entropy", "fisher", "self_distillation")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("criteria", [*((name,) for name in ALL[1:]), ("fisher", *ALL[:2]), ALL])
def test_float64_is_the_truth(
    criteria: tuple[str, ...], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    make_float64_exact(model, monkeypatch)
    ids = ids_of(model)
    table = hf.score(model, ids.split(2), criterion=criteria, seed=SEED)
    assert table.provenance.get("seed") == (SEED if "fisher" in criteria else None)
    for criterion in criteria:
        loss_of, name = TRUTHS[criterion]
        truth = true_scores(model.state_dict(), model.config, ids, loss_of)
        for statistic in STATISTICS:
            got = table.act if statistic == "act" else table.importance(statistic, criterion)
            error = relative_error(got, truth[statistic]).max()
            assert error < 1e-12, f"{criterion} {statistic}: {error:.1e}"
        loss = float(truth["loss"].mean())
        assert table.provenance[name] == pytest.approx(loss, rel=1e-12)


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
        for row, statistic in zip(totals.statistics[c], STATISTICS, strict=True):
            truth = torch.stack([t[statistic] for t in truths]).sum(0)
            error = relative_error(row, truth).max()
            assert error < 1e-12, f"{criterion} {statistic}: {error:.1e}"
        loss = sum(float(truth["loss"].sum()) for truth in truths)
        assert totals.loss_nats[c] == pytest.approx(loss, rel=1e-12)


def numbered_as(number: int, criterion: str) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The loss of the sequence that has this number among all."""
    return lambda logits, ids, _: TRUTHS[criterion][0](logits, ids, number)


def test_what_is_drawn_stays_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a backward, so that micro-batches are halved: each sequence counts once."""
    model = tiny_model("llama")
    batches = in_batches(ids_of(model, 7), 4)
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
    error = relative_error(halved.output_fisher.flatten(), whole.output_fisher.flatten())
    assert error < 2**-22  # kept in fp32


def test_a_gradient_scale_is_taken_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a power of two, so to the last bit."""
    model = tiny_model("llama")
    batches = in_batches(ids_of(model))
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
    batches = in_batches(ids_of(model))
    with ResidentModel(model) as entered:
        together = score_batches(entered, batches, PassOptions(criteria=ALL, recompute=recompute))
        for c, criterion in enumerate(ALL):
            how = PassOptions(criteria=(criterion,), recompute=recompute)
            alone = score_batches(entered, batches, how)
            assert torch.equal(together.statistics[c], alone.statistics[0]), criterion
            assert together.loss_nats[c] == alone.loss_nats[0]


@pytest.mark.parametrize("criteria", [(), ("fisher",), ALL])
def test_the_bar_ends_at_the_tokens_there_are(criteria: tuple[str, ...]) -> None:
    model = tiny_model("llama")
    batches = in_batches(ids_of(model))
    worked: list[float] = []
    with ResidentModel(model) as entered:
        score_batches(entered, batches, PassOptions(criteria=criteria), on_progress=worked.append)
    assert sum(worked) == pytest.approx(5 * 24)


def test_activation_alone_runs_forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids = ids_of(model)
    both = hf.score(model, ids.split(2), criterion=["entropy", "activation"])
    for name in (f"linear_{criterion}" for criterion in ALL):
        monkeypatch.setattr(f"hfprune_fast.scoring.criteria.{name}", None)
    alone = hf.score(model, ids.split(2), criterion="activation")
    assert torch.allclose(alone.act, both.act, rtol=1e-14)
    assert torch.equal(alone.down_norm, both.down_norm)
    lengths = torch.tensor([24, 3, 9, 1, 24])
    mask = torch.arange(24) < lengths[:, None]
    each = [row[None, :n] for row, n in zip(ids, lengths, strict=True)]
    padded = hf.score(model, [{"input_ids": ids, "attention_mask": mask}], criterion="activation")
    apart = hf.score(model, each, criterion="activation")
    assert torch.allclose(padded.act, apart.act, rtol=1e-10)
    assert set(alone.statistics) == {"act", "down_norm"}
    assert torch.equal(alone.importance(), alone.act.sqrt() * alone.down_norm)
    assert torch.equal(both.importance(criterion="activation"), both.importance("act"))


def test_streamed_weights_give_the_same_bits(llama_dir: Path, text_file: Path) -> None:
    running: dict[str, Any] = {"samples": 4, "seq_len": 32, "device": "cpu"}
    for criteria, costs in ((("fisher", "entropy", "cross_entropy"), True), ("activation", False)):
        options: dict[str, Any] = {**running, "criterion": criteria, "obs": costs, "batch_size": 2}
        resident = hf.score(llama_dir, text_file, **options)
        assert not costs or bool((resident.obs > 0).all())
        for offload in ("disk", "cpu"):
            streamed = hf.score(llama_dir, text_file, offload=offload, **options)
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
    ("requested", "message"),
    [
        ({"criterion": "entropi"}, "criterion must be one of entropy, .*got entropi"),
        ({"criterion": []}, "got none"),
        ({"criterion": ["fisher", "fisher"]}, "got fisher, fisher"),
        ({"obs": True}, "obs needs criterion fisher, got entropy"),
        ({"criterion": "fisher", "parity": True}, "parity .* criterion entropy alone, got fisher"),
        ({"criterion": ["entropy", "activation"], "parity": True}, "got entropy, activation"),
    ],
)
def test_bad_requests(requested: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ArgumentError, match=message):
        hf.score(model, ids_of(model), **requested)


def test_the_plan_knows_what_is_scored_by(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    planned: list[tuple[int, str]] = []
    plan_run = job.plan_run

    def note(*args: Any, criteria: int, refit: str, **options: Any) -> Plan:
        planned.append((criteria, refit))
        return plan_run(*args, criteria=criteria, refit=refit, **options)

    monkeypatch.setattr(job, "plan_run", note)
    hf.score(model, ids_of(model), criterion=["activation", "entropy", "fisher"], obs=True)
    hf.score(model, ids_of(model), criterion="activation")
    assert planned == [(2, "linear"), (1, "none")]


def test_a_table_ranks_by_the_criterions_statistic_and_names_what_it_lacks() -> None:
    model = tiny_model("llama")
    table = hf.score(model, ids_of(model), criterion=ALL)
    for criterion, statistic in zip(ALL, ("l1", "l2", "l2", "l2"), strict=True):
        ranked = table.importance(criterion=criterion)
        assert torch.equal(ranked, table.statistics[f"{criterion}.{statistic}"])
    table = hf.score(model, ids_of(model), criterion=["fisher", "activation"])
    assert table.criteria == ("fisher", "activation")
    assert torch.equal(table.l1, table.importance("l1", "fisher"))
    with pytest.raises(ArgumentError, match="by fisher, activation, not by entropy; score again"):
        table.importance("l1", "entropy")
    with pytest.raises(ArgumentError, match=r"one of l1, l2, fisher_mask, act .*got 'obs'"):
        table.importance("obs")
    with pytest.raises(AttributeError, match="these scores have no obs"):
        _ = table.obs
