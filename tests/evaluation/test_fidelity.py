import math

import pytest
import torch
from checkpoints import random_llama
from truth import forward, kl_nats, tiny_model

import hfprune_fast as hf
from hfprune_fast.commands.evaluate import text
from hfprune_fast.errors import (
    ArgumentError,
    CalibrationError,
    NumericsError,
)
from hfprune_fast.evaluation import fidelity


def test_matches_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "_CHUNK_ELEMENTS", 127 * 10)  # several chunks a batch
    dense, pruned = tiny_model("qwen3"), tiny_model("qwen3")
    keep = {layer: torch.arange(0, 96, 2) for layer in range(3)}
    hf.prune(pruned, keep)
    ids = torch.randint(127, (3, 20), generator=torch.Generator().manual_seed(0))
    logits = [
        torch.stack([forward(m.state_dict(), m.config, row).logits for row in ids]).detach()
        for m in (dense, pruned)
    ]
    got = hf.evaluate(dense, pruned, ids.split(2))
    kl = kl_nats(logits[0].flatten(0, 1), logits[1].flatten(0, 1)).mean()
    assert got.kl_nats == pytest.approx(float(kl), rel=1e-5)
    for name, z in (("ppl_dense", logits[0]), ("ppl_pruned", logits[1])):
        log_p = torch.log_softmax(z[:, :-1], dim=-1).gather(2, ids[:, 1:, None])
        assert getattr(got, name) == pytest.approx(math.exp(-float(log_p.mean())), rel=1e-5)
    for name, count in (("top1_agreement", 1), ("top5_agreement", 5)):
        agree = (logits[0].topk(count).indices == logits[1].argmax(-1, keepdim=True)).any(-1)
        assert getattr(got, name) == pytest.approx(float(agree.double().mean()))
    assert got.top1_agreement < got.top5_agreement < 1
    assert got.tokens == 60


def test_a_model_agrees_with_itself() -> None:
    model = random_llama()
    got = hf.evaluate(model, model, [torch.arange(12).view(2, 6)])
    assert (got.kl_nats, got.top1_agreement, got.top5_agreement) == (0.0, 1.0, 1.0)
    assert got.ppl_dense == got.ppl_pruned
    assert "top-1 agreement      100.00%\ntop-5 agreement      100.00%\n" in text(vars(got))


def test_models_are_evaluated_and_left_as_found() -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    got = hf.evaluate(model, model, torch.arange(60).view(3, 20))  # one (N, T) tensor
    assert (got.kl_nats, got.tokens) == (0.0, 60)
    assert all(module.training for module in model.modules())


def test_bad_input() -> None:
    model = tiny_model("llama")
    with pytest.raises(CalibrationError, match="no token batches"):
        hf.evaluate(model, model, [])
    with pytest.raises(CalibrationError, match="2 tokens or more"):
        hf.evaluate(model, model, [torch.zeros(3, 1, dtype=torch.int64)])
    with pytest.raises(ArgumentError, match="share a vocabulary, got 127 and 130"):
        hf.evaluate(model, tiny_model("llama", vocab_size=130), [])
    for batch in (torch.tensor([[0, 127]]), torch.tensor([[0, -1]]), torch.zeros(1, 4)):
        with pytest.raises(CalibrationError, match="must be"):
            hf.evaluate(model, model, [batch])
    with pytest.raises(ArgumentError, match="a loaded causal language model, got a str"):
        hf.evaluate("demo", model, [])  # type: ignore[arg-type]
    ids = torch.zeros(1, 4, dtype=torch.int64)
    broken = tiny_model("llama")
    broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NumericsError, match=r"tensor model\.norm\.weight holds NaN"):
        hf.evaluate(model, broken, ids)
    broken.model.norm.weight.fill_(1e300)
    with pytest.raises(NumericsError, match="in the logits"):
        hf.evaluate(model, broken, ids)
