"""Scoring says where a CPU has no instructions for the dtype of a run."""

import pytest
import torch
from truth import tiny_model

import hfprune_fast as hf


@pytest.mark.parametrize("fast", [True, False])
def test_a_dtype_that_a_cpu_multiplies_slowly_is_named(
    fast: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    model = tiny_model("llama", dtype=torch.bfloat16)
    ids = torch.randint(model.config.vocab_size, (2, 8))
    hf.score(model, ids, progress=True)
    said = "this CPU multiplies bfloat16 many times slower" in capfd.readouterr().err
    assert said == (not fast)
