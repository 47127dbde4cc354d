"""A family's tiny model, saved, with what the tests of every family ask of it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from criteria_truth import TRUTHS, drawn_token, mean_entropy
from family_models import NOTES, down_projections, plain_experts, sequences, tiny_family_model
from family_truth import Float64, masked_logits, own_logits, own_removal_costs, own_scores
from mixture_configs import MODELS
from padding import padded
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import hfprune_fast as hf
from hfprune_fast.config import STATISTICS
from hfprune_fast.scoring.table import ImportanceTable

F = 40  # width of every layer
NARROW = (17, F, 9, 24, 31, 5)  # widths that differ


@dataclass(frozen=True)
class Written:
    """A pruned checkpoint."""

    folder: Path
    keep: dict[int, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")


@dataclass(frozen=True)
class FamilyCase:
    """A tiny model in float64, and the folder it was saved to."""

    family: str
    model: PreTrainedModel
    folder: Path
    _written: dict[str, "Written"] = field(default_factory=dict)

    @classmethod
    def save(cls, family: str, folder: Path, **options: Any) -> Self:
        with Float64():  # rotary frequencies are computed where a model is made
            model = tiny_family_model(family, **options)
        model.save_pretrained(folder)
        return cls(family, model, folder)

    @property
    def downs(self) -> list[nn.Module]:
        return down_projections(self.family, self.model)

    @property
    def ids(self) -> list[Tensor]:
        return sequences()

    @property
    def batches(self) -> list[dict[str, Tensor]]:
        """The sequences, two at a time, padded on either side; two batches are of one shape."""
        ids = self.ids
        return [padded(ids[:2], "right"), padded(ids[2:4], "left"), padded(ids[4:], "right")]

    @cached_property
    def truth(self) -> dict[str, dict[str, Tensor]]:
        losses = {"entropy": mean_entropy, "fisher": drawn_token}
        with Float64():
            return own_scores(self.model, self.downs, self.ids, losses)

    @cached_property
    def removal_costs(self) -> Tensor:
        with Float64():
            return own_removal_costs(self.model, self.downs, self.ids, drawn_token)

    @cached_property
    def logits(self) -> list[Tensor]:
        with Float64(), torch.no_grad():
            return [own_logits(self.model, ids) for ids in self.ids]

    def load(self, folder: Path, **options: Any) -> PreTrainedModel:
        """Load a folder by the class that transformers has for its config."""
        auto = AutoModelForImageTextToText if MODELS[self.family].vision else AutoModelForCausalLM
        with Float64():
            options = plain_experts(self.family) | options
            model: PreTrainedModel = auto.from_pretrained(folder, **options)
        return model.eval().requires_grad_(False)

    def is_of_an_mlp(self, name: str) -> bool:
        """Whether a stored tensor is of an MLP of the text, by its name."""
        module = re.escape(MODELS[self.family].down.rpartition(".")[0])
        return re.search(rf"layers\.\d+\.{module}\.", name) is not None and "vi" not in name

    def text_params(self) -> int:
        """Parameters of the text: of all, less those of a wrapper's vision and projector."""
        inside = self.model.get_submodule(MODELS[self.family].layers.rpartition(".")[0])
        head = self.model.get_output_embeddings()
        unique = {id(p): p for part in (inside, head) for p in part.parameters()}
        return sum(p.numel() for p in unique.values())

    def written(self, layout: str) -> "Written":
        """Write a pruned checkpoint in a layout, once."""
        if layout not in self._written:
            layers = len(self.downs)
            keep = self.keep([24] * layers if layout == "uniform" else NARROW[:layers])
            folder = self.folder.parent / layout
            named = "auto" if layout == "uniform" else layout
            hf.prune_checkpoint(self.folder, folder, keep, layout=named, verify=True)
            self._written[layout] = Written(folder, keep)
        return self._written[layout]

    def pruned_error(self, model: PreTrainedModel, keep: dict[int, Tensor]) -> float:
        """Return how far a pruned model's logits are from the masked dense model's."""
        with Float64(), torch.no_grad():
            got = [own_logits(model, ids) for ids in self.ids]
            masked = [masked_logits(self.model, self.downs, keep, ids) for ids in self.ids]
        return largest_error(got, masked)

    def keep(self, widths: Sequence[int]) -> dict[int, Tensor]:
        generator = torch.Generator().manual_seed(3)
        return {
            layer: torch.randperm(F, generator=generator)[:width].sort().values
            for layer, width in enumerate(widths)
        }

    def note(self, what: str, error: float, tolerance: float) -> None:
        """Fail if an error is above the tolerance; write it down if that is wanted."""
        assert error <= tolerance, f"{self.family}, {what}: {error:.1e} > {tolerance:.0e}"
        if NOTES:
            with Path(NOTES).open("a", encoding="utf-8") as file:
                known_as = MODELS[self.family].known_as
                line = {"family": self.family, "known_as": known_as, "what": what, "error": error}
                file.write(json.dumps(line) + "\n")


def largest_error(got: Sequence[Tensor] | Tensor, truth: Sequence[Tensor] | Tensor) -> float:
    """Return the largest max|got - truth| / max|truth| of the pairs; NaN counts as infinite."""
    errors = [
        float((g.double() - t).abs().max() / t.abs().max()) if g.shape == t.shape else torch.inf
        for g, t in zip(got, truth, strict=True)
    ]
    return max(error if error == error else torch.inf for error in errors)


def statistics_error(table: ImportanceTable, truth: dict[str, dict[str, Tensor]]) -> float:
    """Return the largest error of a table's statistics and losses, of each criterion."""
    errors = []
    for criterion, of_criterion in truth.items():
        for statistic in STATISTICS:
            got = table.act if statistic == "act" else table.importance(statistic, criterion)
            errors.append(largest_error(got, of_criterion[statistic]))
        mean = of_criterion["loss"].mean()
        errors.append(abs(table.provenance[TRUTHS[criterion][1]] / float(mean) - 1))
    return max(errors)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in got if got[name].dtype != expected[name].dtype] == []
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


def perplexity(ids_of: Sequence[Tensor], log_p: Sequence[Tensor]) -> Tensor:
    next_tokens = [
        rows[:-1].gather(1, ids[1:, None]) for rows, ids in zip(log_p, ids_of, strict=True)
    ]
    return (-torch.cat(next_tokens).mean()).exp()
