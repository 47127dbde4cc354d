"""What `hf.score` refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from torch.nn import DataParallel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.errors import ArgumentError, CalibrationError, UnsupportedModelError


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (random_llama, {"dtype": "float64"}, ArgumentError, "move or cast it first"),
        (random_llama, {"parity": True, "backend": "triton"}, ArgumentError, "must be torch"),
        (
            random_llama,
            {"parity": True, "backend": "cpp"},
            ArgumentError,
            "must be torch|not in use",
        ),
        (lambda: random_llama().double(), {"backend": "triton"}, ArgumentError, "float64"),
        (lambda: torch.nn.Linear(2, 2), {}, UnsupportedModelError, "a causal language model"),
        (lambda: DataParallel(random_llama()), {}, UnsupportedModelError, "a causal language"),
        (gpt2, {}, UnsupportedModelError, r"GPT2LMHeadModel.*have no gate"),
    ],
)
def test_what_is_refused(
    model: Callable[[], Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hf.score(model(), torch.zeros(1, 4, dtype=torch.int64), **options)


def test_no_batches() -> None:
    with pytest.raises(CalibrationError, match="no token batches"):
        hf.score(random_llama(), [])


def test_backend_is_chosen_by_name_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = random_llama(), torch.zeros(1, 4, dtype=torch.int64)
    monkeypatch.setenv("HFPRUNE_BACKEND", "cuda")
    with pytest.raises(ArgumentError, match="HFPRUNE_BACKEND must be one of torch, triton"):
        hf.score(model, ids)
    assert hf.score(model, ids, backend="torch").provenance["backend"] == "torch"
    monkeypatch.setattr("hfprune_fast.checkpoint.loading.blueprint", None)  # is refused before it
    with pytest.raises(ArgumentError, match="HFPRUNE_BACKEND must be one of torch, triton"):
        hf.score("demo", TINY_MODEL / "calibration.txt", samples=1)
