"""Every family's scores and logits are those of transformers' own model, however it is run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from criteria_truth import SEED, TRUTHS
from family_case import FamilyCase, largest_error
from family_models import TINY
from family_truth import Float64, masked_logits
from torch import Tensor

import hfprune_fast as hf
from hfprune_fast.checkpoint.loading import blueprint
from hfprune_fast.config import STATISTICS
from hfprune_fast.data.batches import micro_batch
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.models.families import FAMILIES
from hfprune_fast.scoring import job
from hfprune_fast.scoring.passes import PassOptions
from hfprune_fast.scoring.table import ImportanceTable

# Sums of some 1e4 float64 products; what is forgotten is off by 1e-2 and more.
SCORES, LOGITS = 1e-9, 1e-12
WAYS = ("resident", "recomputed", "cpu", "disk", "loaded")


def test_every_family_of_the_package_is_tried() -> None:
    assert set(TINY) == set(FAMILIES)


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


@pytest.mark.parametrize("way", WAYS)
def test_scores_are_the_truth(case: FamilyCase, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, options = case.folder, {"offload": way if way in ("cpu", "disk") else "none"}
    if way == "recomputed":
        monkeypatch.setattr(job, "PassOptions", recomputing)
    if way == "loaded":
        subject, options = case.model, {}
    with Float64():
        table = hf.score(
            subject, case.batches, criterion=("entropy", "fisher"), seed=SEED, **options
        )
    for criterion, truth in case.truth.items():
        for statistic in STATISTICS:
            got = of(table, criterion, statistic)
            case.note(f"scores {way}", largest_error(got, truth[statistic]), SCORES)
        loss = table.provenance[TRUTHS[criterion][1]]
        assert loss == pytest.approx(float(truth["loss"].mean()), rel=SCORES)


def recomputing(**options: Any) -> PassOptions:
    return PassOptions(**options | {"recompute": True})


def of(table: ImportanceTable, criterion: str, statistic: str) -> Tensor:
    return table.act if statistic == "act" else table.importance(statistic, criterion)


@pytest.mark.parametrize("offload", ["none", "disk"])
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


@pytest.mark.parametrize("family", TINY)
def test_bfloat16_run_in_float32_is_the_same_streamed(family: str, tmp_path: Path) -> None:
    case = FamilyCase.save(family, tmp_path, dtype=torch.bfloat16)
    tables = [
        hf.score(case.folder, case.batches, dtype="float32", offload=offload)
        for offload in ("none", "disk", "cpu")
    ]
    for table in tables[1:]:
        for statistic in STATISTICS:
            assert torch.equal(getattr(table, statistic), getattr(tables[0], statistic))
