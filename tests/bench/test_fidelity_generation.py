"""Greedy continuations, against a loop over whole forwards and a case by hand."""

import fidelity_generation
import pytest
import torch
from family_models import tiny_family_model
from family_truth import Float64
from fidelity_generation import Continuations, greedy

PROMPTS = torch.randint(3, 120, (3, 5), generator=torch.Generator().manual_seed(0))


def test_the_most_likely_tokens_past_the_end_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity_generation, "NEW_TOKENS", 6)
    monkeypatch.setattr(fidelity_generation, "BATCH", 2)
    with Float64():
        model = tiny_family_model("llama")
        ids = PROMPTS
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(dim=-1)], dim=1)
        model.generation_config.eos_token_id = int(ids[0, 6])
        model.generation_config.repetition_penalty = 50.0
        assert torch.equal(greedy(model, PROMPTS), ids[:, 5:])


def test_compared_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity_generation, "PROMPT_TOKENS", 4)
    found = {"dense": [[1, 2, 3, 4], [5, 6, 7, 8]], "pruned": [[1, 2, 9, 4], [9, 6, 7, 9]]}
    monkeypatch.setattr(fidelity_generation, "greedy", lambda name, _: torch.tensor(found[name]))
    continuations = Continuations("dense", PROMPTS)  # type: ignore[arg-type]
    assert continuations.compare("pruned") == {  # type: ignore[arg-type]
        "prompts": 3, "prompt_tokens": 4, "new_tokens": 4,
        "common_prefix": (2 + 0) / 2, "equal_tokens": (3 + 2) / 8,
    }  # fmt: skip
    assert continuations.compare("dense")["common_prefix"] == 4  # type: ignore[arg-type]
