"""A recovered checkpoint of a family is the model whose KL was measured while it trained."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_case import FamilyCase
from family_models import every_other, in_turn, sequences
from family_truth import Float64, own_logits
from mixture_case import SOME_MIXTURES, MixtureCase
from mixture_configs import MODELS
from safetensors.torch import load_file
from torch import Tensor

import hfprune_fast as hf

pytestmark = pytest.mark.slow  # some of them are in tests/recovery
# The run's logits and losses are in float32, and so are norms and recurrences of some families.
KL = 1000 * torch.finfo(torch.float32).eps


def recover(folder: Path, pruned: Path, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    """Recover on copies of one window, so that it is the one held out; return it and the result."""
    (ids,) = sequences((24,), seed=7)
    np.save(folder / "ids.npy", ids.repeat(12, 1).numpy())
    options = {"tokens": 24 * 12, "batch_tokens": 48, "lora": 4, "dtype": "float64"} | options
    result = hf.recover(folder / "dense", pruned, folder / "ids.npy", folder / "out", **options)
    return ids, result


def own_kl(case: FamilyCase, folder: Path, ids: Tensor) -> float:
    with Float64(), torch.no_grad():
        p, q = (own_logits(m, ids).log_softmax(-1) for m in (case.model, case.load(folder)))
    return float((p.exp() * (p - q)).sum(-1).mean())


WAYS: dict[str, dict[str, Any]] = {"custom": {}, "uniform": {"lora": 0, "teacher": "resident"}}
SOME = [family.values[0] for family in every_other()]


@pytest.mark.parametrize(
    ("case", "layout"), in_turn(list(WAYS), families=SOME, fast=()), indirect=["case"]
)
def test_what_is_written_has_the_measured_kl(case: FamilyCase, layout: str) -> None:
    options = WAYS[layout]
    pruned = case.written(layout).folder
    ids, result = recover(case.folder.parent, pruned, force=True, **options)
    assert result["kl_before"] == pytest.approx(own_kl(case, pruned, ids), rel=KL)
    assert result["kl_after"] < 0.99 * result["kl_before"]
    after = own_kl(case, case.folder.parent / "out", ids)
    dense, recovered = (
        load_file(Path(folder) / "model.safetensors") for folder in (pruned, result["out"])
    )
    of_mlps = [n for n in dense if case.is_of_an_mlp(n) and n.endswith("weight")]
    assert of_mlps
    assert not [n for n in of_mlps if torch.equal(dense[n], recovered[n])]
    if MODELS[case.family].vision:
        with pytest.raises(hf.HFPruneError, match="has its text model within another"):
            recover(case.folder.parent, pruned, force=True, adapter=True)
    case.note(f"recovered {layout}", abs(after / result["kl_after"] - 1), KL)


@pytest.mark.parametrize("mixture", SOME_MIXTURES, indirect=True)
def test_experts_are_recovered(mixture: MixtureCase) -> None:
    pruned = mixture.written("narrowed").folder
    ids, result = recover(mixture.folder.parent, pruned)
    assert result["kl_after"] < 0.99 * result["kl_before"]
    after = own_kl(mixture, mixture.folder.parent / "out", ids)
    mixture.note("recovered", abs(after / result["kl_after"] - 1), KL)
