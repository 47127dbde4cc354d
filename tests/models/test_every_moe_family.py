"""Scores of every family's experts and of their neurons are a truth that runs all on all tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from criteria_truth import SEED, drawn_token, mean_entropy
from experts_costs_truth import experts_removal_costs
from experts_truth import Seen, all_experts, experts_scores, masked_logits, unchanged
from family_case import largest_error
from family_models import sequences
from family_truth import Float64, own_logits
from mixture_case import (
    SOME_MIXTURES,
    MixtureCase,
    expert_errors,
    mixtures_in_turn,
)
from padding import padded

import hfprune_fast as hf
from hfprune_fast.checkpoint.loading import blueprint
from hfprune_fast.data.batches import micro_batch
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.scoring import job
from hfprune_fast.scoring.passes import PassOptions

# Sums of some 1e4 float64 products; what is forgotten is off by 1e-2 and more.
SCORES, LOGITS = 1e-9, 1e-12
# The covariance of gradients is summed in fp32.
COSTS = 10 * torch.finfo(torch.float32).eps
# Beside twice the error of autograd in fp32. A scale rounded to bfloat16 would be off by 1e-3.
FLOAT32 = 100 * torch.finfo(torch.float32).eps
BOTH = ("entropy", "fisher")


def test_the_truth_is_the_models_own_forward(mixture: MixtureCase) -> None:
    """With the truth's experts, and with its routers too."""
    with Float64(), torch.no_grad(), all_experts(mixture.tiny, mixture.model, unchanged, Seen()):
        logits = [own_logits(mixture.model, ids) for ids in mixture.ids]
    assert largest_error(logits, mixture.logits) < LOGITS
    assert largest_error(mixture.masked(mixture.keep_all()), mixture.logits) < LOGITS


def test_the_outputs_are_peaked_and_depend_on_every_layers_acts(mixture: MixtureCase) -> None:
    """A model near the uniform output, or deaf to its acts, would pass almost any test."""
    assert mixture.experts_truth["entropy"]["loss"].mean() < 0.85 * torch.tensor(127.0).log()
    dense = mixture.logits[0].log_softmax(-1)
    mlps = {site if isinstance(site, int) else site[:1] for site in mixture.widths}
    for mlp in mlps:  # a layer's own MLP, or all its experts
        keep = mixture.keep_all()
        for site in keep:
            if mlp in (site, site if isinstance(site, int) else site[:1]):
                keep[site] = torch.arange(0)
        with Float64():
            z = masked_logits(mixture.tiny, mixture.model, keep, mixture.ids[0])
        pruned = z.log_softmax(-1)
        assert (dense.exp() * (dense - pruned)).sum(-1).mean() > 0.03
    stored = mixture.model.state_dict().items()
    assert [name for name, t in stored if t.numel() > 1 and (t == t.flatten()[0]).all()] == []


def test_every_expert_is_chosen_and_routing_is_decided(mixture: MixtureCase) -> None:
    """The margins are so large that float32 chooses the same."""
    assert mixture.experts_truth["experts"]["expert_count"].min() > 0
    narrow = mixture.load(mixture.folder, dtype=torch.float32)
    for ids in mixture.ids:
        wide, seen = Seen(), Seen()
        with torch.no_grad():
            with Float64(), all_experts(mixture.tiny, mixture.model, unchanged, wide):
                own_logits(mixture.model, ids)
            with all_experts(mixture.tiny, narrow, unchanged, seen):
                own_logits(narrow, ids)
        for layer, chosen in wide.chosen.items():
            assert torch.equal(chosen, seen.chosen[layer].double())


@pytest.mark.parametrize(
    ("mixture", "way"),
    mixtures_in_turn(["resident", "disk", "recomputed", "cpu"], slow_ways=("recomputed", "cpu")),
    indirect=["mixture"],
)
def test_scores_are_the_truth(
    mixture: MixtureCase, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "recomputed":
        monkeypatch.setattr(job, "PassOptions", recomputing)
    offload = way if way in ("cpu", "disk") else "none"
    with Float64():
        table = hf.score(
            mixture.folder, mixture.batches, criterion=BOTH, seed=SEED, offload=offload
        )
    note(mixture, f"scores {way}", expert_errors(table, mixture.experts_truth))


def recomputing(**options: Any) -> PassOptions:
    return PassOptions(**options | {"recompute": True})


def note(mixture: MixtureCase, what: str, errors: dict[str, float]) -> None:
    """Write down the largest error of neurons' statistics, and of experts'; say which is which."""
    of_experts = {name: error for name, error in errors.items() if "expert_" in name}
    of_neurons = {name: error for name, error in errors.items() if name not in of_experts}
    above = {name: f"{error:.1e}" for name, error in errors.items() if not error <= SCORES}
    assert not above, f"{mixture.family}, {what}: {above}"
    mixture.note(what, max(of_neurons.values()), SCORES)
    mixture.note(f"experts' {what}", max(of_experts.values()), SCORES)


def test_scores_of_a_loaded_model_are_the_truth(mixture: MixtureCase) -> None:
    before = {name: tensor.clone() for name, tensor in mixture.model.state_dict().items()}
    with Float64():
        table = hf.score(mixture.model, mixture.batches, criterion=BOTH, seed=SEED)
    note(mixture, "scores loaded", expert_errors(table, mixture.experts_truth))
    after = mixture.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with Float64(), torch.no_grad():
        logits = own_logits(mixture.model, mixture.ids[0])
    assert torch.equal(logits, mixture.logits[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixture", "offload"), mixtures_in_turn(["none", "disk"]), indirect=["mixture"]
)
def test_logits_are_the_models_own(mixture: MixtureCase, offload: str) -> None:
    batches = [micro_batch(batch, 127) for batch in mixture.batches]
    with Float64(), open_model(blueprint(mixture.folder, device="cpu"), offload) as model:
        hidden = [
            h[row, :length]
            for h, batch in zip(model.final_hidden(batches), batches, strict=True)
            for row, length in enumerate(batch.lengths)
        ]
        logits = [model.head()(h) for h in hidden]
    mixture.note(f"logits {offload}", largest_error(logits, mixture.logits), LOGITS)


@pytest.mark.parametrize("family", SOME_MIXTURES)
def test_bfloat16_in_float32(family: str, tmp_path: Path) -> None:
    case = MixtureCase.save(family, tmp_path, dtype=torch.bfloat16)
    tables = [
        hf.score(case.folder, case.batches, dtype="float32", offload=offload)
        for offload in ("none", "disk")
    ]
    with Float64():
        wide = case.load(tmp_path, dtype=torch.float64)
        truth = experts_scores(case.tiny, wide, case.ids, {"entropy": mean_entropy})
    narrow = case.load(tmp_path, dtype=torch.float32)
    eager = experts_scores(case.tiny, narrow, case.ids, {"entropy": mean_entropy})
    of_eager = [
        largest_error(list(eager["entropy"][s].values()), list(truth["entropy"][s].values()))
        for s in ("l1", "l2", "fisher_mask", "act")
    ]
    error = max(expert_errors(tables[0], truth).values())
    case.note("bfloat16 in float32", error, 2 * max(of_eager) + FLOAT32)
    for name, tensor in tables[0].statistics.items():
        assert torch.equal(tensor, tables[1].statistics[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("mixture", SOME_MIXTURES, indirect=True)
def test_removal_costs_are_the_truth(mixture: MixtureCase) -> None:
    """Of experts that tokens enough chose; there are some without."""
    ids = sequences((96,) * 10, seed=6)
    with Float64():
        batches = torch.stack(ids).split(5)
        table = hf.score(mixture.model, batches, criterion=BOTH, obs=True, seed=SEED)
        truth = experts_removal_costs(mixture.tiny, mixture.model, ids, drawn_token)
    of_experts = [bool(truth[site].any()) for site in truth if not isinstance(site, int)]
    assert 0 < sum(of_experts) < len(of_experts)
    for site, costs in truth.items():
        if not costs.any():
            assert not table.of("obs", site).any()
    some = {site: costs for site, costs in truth.items() if costs.any()}
    error = largest_error([table.of("obs", site) for site in some], list(some.values()))
    mixture.note("removal costs", error, COSTS)


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_experts_that_no_token_chooses_have_no_importance(offload: str, tmp_path: Path) -> None:
    case = MixtureCase.save("gpt_oss", tmp_path)
    ids = sequences((2, 1), seed=7)
    with Float64():
        table = hf.score(case.folder, [padded(ids, "right")], criterion=BOTH, offload=offload)
        truth = experts_scores(case.tiny, case.model, ids, {"entropy": mean_entropy})
    count = truth["experts"]["expert_count"]
    assert 0 < int((count == 0).sum()) < count.numel()
    assert torch.equal(table.experts("expert_count"), count)
    for name in ("expert_reap", "expert_mass", "entropy.expert_taylor", "fisher.expert_taylor"):
        assert torch.equal(table.experts(name) > 0, count > 0), name
    for layer, expert in zip(*torch.where(count == 0), strict=True):
        site = case.layers_with_experts[int(layer)], int(expert)
        for name in ("entropy.l1", "entropy.l2", "fisher.fisher_mask", "act"):
            assert table.of(name, site).tolist() == [0.0] * 24
