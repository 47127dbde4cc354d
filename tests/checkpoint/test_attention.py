"""Attention is what the user chooses, never what a model's folder asks for; no hub is asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interruption import score_args
from refusals import assert_refused
from safetensors import safe_open
from transformers import modeling_utils

import hfprune_fast as hf
from hfprune_fast.checkpoint.loading import blueprint
from hfprune_fast.errors import ArgumentError

Hfprune = Callable[..., Any]
ASKED = {
    "attn_implementation": "kernels-community/flash-attn2",
    "_attn_implementation": "flash_attention_2",
    "_attn_implementation_internal": "org/kernel",
    "experts_implementation": "org/experts",
    "text_config": {"attn_implementation": "org/kernel"},
    "output_attentions": True,
}


@pytest.fixture
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the package `kernels`, which would fetch and run one."""

    def fetch(*_: Any, **__: Any) -> None:
        pytest.fail("a kernel is fetched")

    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda *_, **__: True)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", fetch)


@pytest.mark.usefixtures("_no_hub")
@pytest.mark.parametrize("key", ASKED)
def test_what_a_config_asks_for_is_ignored(llama_dir: Path, hfprune: Hfprune, key: str) -> None:
    path = llama_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: ASKED[key]}))
    assert hfprune("plan", llama_dir, "--prune-ratio", 0.2).code == 0
    assert blueprint(llama_dir, device="cpu").model.config._attn_implementation == "sdpa"
    table = hf.score(llama_dir, torch.arange(64).view(2, 32), device="cpu")
    assert "attention" not in table.provenance


@pytest.mark.usefixtures("_no_hub")
def test_flash_attention_that_is_not_installed(llama_dir: Path, hfprune: Hfprune) -> None:
    for command in (
        ["score", llama_dir, "--calibration"],
        ["evaluate", llama_dir, llama_dir, "--text"],
    ):
        run = hfprune(
            *command, "demo", "--seq-len", 32, "--samples", 2, "--attention", "flash_attention_2",
            *(["--out", "scores"] if command[0] == "score" else []),
        )  # fmt: skip
        assert_refused(run, "attention flash_attention_2 needs the package flash_attn")


@pytest.mark.usefixtures("small_inputs")
def test_an_attention_that_is_chosen_is_recorded(hfprune: Hfprune, interrupted: Hfprune) -> None:
    scores = {}
    for attention in ("auto", "sdpa", "eager"):
        assert hfprune(*score_args("--attention", attention, out=attention)).code == 0
        with safe_open(attention, framework="pt") as opened:
            provenance = json.loads(opened.metadata()["hfprune_scores"])["provenance"]
        assert provenance.get("attention", "auto") == attention
        scores[attention] = hf.ImportanceTable.load(attention).l1
    assert torch.equal(scores["auto"], scores["sdpa"])
    assert torch.allclose(scores["auto"], scores["eager"], rtol=1e-3)
    interrupted(*score_args())
    refused = hfprune(*score_args("--resume", "--attention", "eager"))
    assert_refused(refused, "is of another run: attention None, not eager")


def test_a_loaded_model_has_its_attention(llama_dir: Path) -> None:
    model = blueprint(llama_dir, device="cpu", attention="eager").model
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ArgumentError, match="device, dtype and attention are those"):
        hf.score(model, torch.zeros(1, 4, dtype=torch.int64), attention="eager")
