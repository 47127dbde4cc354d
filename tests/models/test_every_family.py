"""Every family's scores and logits are those of transformers' own model, however it is run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from criteria_truth import SEED, mean_entropy
from family_case import FamilyCase, largest_error, statistics_error
from family_models import down_projections, every_other, in_turn, tiny_config
from family_truth import Float64, masked_logits, own_scores
from mixture_configs import MODELS, model_type

import hfprune_fast as hf
from hfprune_fast.checkpoint.loading import blueprint
from hfprune_fast.config import STATISTICS
from hfprune_fast.data.batches import micro_batch
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.models.families import FAMILIES
from hfprune_fast.scoring import job
from hfprune_fast.scoring.sums import PassOptions

# Sums of some 1e4 float64 products; what is forgotten is off by 1e-2 and more.
SCORES, LOGITS = 1e-9, 1e-12
# The covariance of gradients is summed in fp32.
COSTS = 10 * torch.finfo(torch.float32).eps
# Beside twice the error of autograd in fp32. A scale rounded to bfloat16 would be off by 1e-3.
FLOAT32 = 100 * torch.finfo(torch.float32).eps
BOTH = ("entropy", "fisher")


def test_every_family_of_the_package_is_tried() -> None:
    assert set(map(model_type, MODELS)) == set(FAMILIES)


def test_the_outputs_are_peaked_and_depend_on_every_layers_acts(case: FamilyCase) -> None:
    """A model near the uniform output, or deaf to its acts, would pass almost any test."""
    losses = case.truth["entropy"]["loss"]
    assert losses.mean() < 0.85 * torch.tensor(127.0).log()
    dense, widths = case.logits[0].log_softmax(-1), [40] * len(case.downs)
    for layer in range(len(widths)):
        keep = case.keep([0 if i == layer else width for i, width in enumerate(widths)])
        pruned = masked_logits(case.model, case.downs, keep, case.ids[0]).log_softmax(-1)
        assert (dense.exp() * (dense - pruned)).sum(-1).mean() > 0.05
    stored = case.model.state_dict().items()
    assert [name for name, t in stored if t.numel() > 1 and (t == t.flatten()[0]).all()] == []


@pytest.mark.parametrize(
    ("case", "way"),
    in_turn(["resident", "disk", "recomputed", "cpu"], slow_ways=("recomputed", "cpu")),
    indirect=["case"],
)
def test_scores_are_the_truth(case: FamilyCase, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "recomputed":
        monkeypatch.setattr(job, "PassOptions", recomputing)
    offload = way if way in ("cpu", "disk") else "none"
    with Float64():
        table = hf.score(case.folder, case.batches, criterion=BOTH, seed=SEED, offload=offload)
    case.note(f"scores {way}", statistics_error(table, case.truth), SCORES)


def recomputing(**options: Any) -> PassOptions:
    return PassOptions(**options | {"recompute": True})


@pytest.mark.parametrize("case", every_other(), indirect=True)
def test_scores_of_a_loaded_model_are_the_truth(case: FamilyCase) -> None:
    with Float64():
        table = hf.score(case.model, case.batches, criterion=BOTH, obs=True, seed=SEED)
    case.note("scores loaded", statistics_error(table, case.truth), SCORES)
    case.note("removal costs", largest_error(table.obs, case.removal_costs), COSTS)


@pytest.mark.parametrize(("case", "offload"), in_turn(["none", "disk"]), indirect=["case"])
def test_logits_are_the_models_own(case: FamilyCase, offload: str) -> None:
    batches = [micro_batch(batch, 127) for batch in case.batches]
    with Float64(), open_model(blueprint(case.folder, device="cpu"), offload) as model:
        hidden = [
            h[row, :length]
            for h, batch in zip(model.final_hidden(batches), batches, strict=True)
            for row, length in enumerate(batch.lengths)
        ]
        logits = [model.head()(h) for h in hidden]
    case.note(f"logits {offload}", largest_error(logits, case.logits), LOGITS)


@pytest.mark.parametrize("family", every_other())
def test_bfloat16_tied_the_other_way_in_float32(family: str, tmp_path: Path) -> None:
    """Embedding and head one tensor where the tiny model has two, or two: files have both kinds."""
    tied = tiny_config(family).tie_word_embeddings
    case = FamilyCase.save(family, tmp_path, dtype=torch.bfloat16, tie_word_embeddings=not tied)
    tables = [
        hf.score(case.folder, case.batches, dtype="float32", offload=offload)
        for offload in ("none", "disk")
    ]
    truth, eager = (
        own_scores(model, down_projections(family, model), case.ids, {"entropy": mean_entropy})
        for model in (case.load(tmp_path, dtype=d) for d in (torch.float64, torch.float32))
    )
    errors = [largest_error(eager["entropy"][s], truth["entropy"][s]) for s in STATISTICS]
    error = statistics_error(tables[0], truth)
    case.note("bfloat16 in float32", error, 2 * max(errors) + FLOAT32)
    for statistic in STATISTICS:
        assert torch.equal(*(getattr(table, statistic) for table in tables))
