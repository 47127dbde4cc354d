"""The loss against float64 truth, and in no more memory than its budget."""

import pytest
import torch
from torch import Tensor
from watch import Watch

from hfprune_fast.engine.layerwise import Head
from hfprune_fast.models.sites import Logits
from hfprune_fast.recovery.loss import RecoveryLoss

BUDGET_BYTES = 4 << 20
PATH_BYTES = 12 << 20  # of a block of rows that the torch path has in fp32, of both heads


def inputs(rows: int, vocab: int, width: int = 32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, rows // 2, width), (vocab, width)) * 2
    states = [torch.randn(size, generator=generator) for size in sizes]
    return *states, torch.randint(vocab, (2, rows // 2), generator=generator)


def truth(kind: str, z: Tensor, y: Tensor, ids: Tensor) -> Tensor:
    """KL and cross entropy of whole logits (B, T, V)."""
    log_p, log_q = y.log_softmax(-1), z.log_softmax(-1)
    parts = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        "ce": -log_q[:, :-1].gather(-1, ids[:, 1:, None]).mean(),
    }
    return torch.stack([parts[name] for name in kind.split("+")]).sum()


@pytest.mark.parametrize("kind", ["kl", "ce", "kl+ce"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_the_loss_is_the_truth(kind: str, trained: bool) -> None:
    hidden, weight, states, teacher, ids = inputs(24, 127)
    logits, of_teacher = Logits(0.5, softcap=5.0), Logits(2.0)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    loss = RecoveryLoss(kind, Head(teacher, None, of_teacher))
    found = loss(hidden, Head(weight, None, logits), states, ids)
    found.backward()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    z = logits(wide[0] @ wide[1].t())
    expected = truth(kind, z, of_teacher(states.double() @ teacher.double().t()), ids)
    expected.backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    for got, grad in zip((hidden, weight)[: 1 + trained], wide, strict=False):
        assert got.grad is not None
        assert grad.grad is not None
        error = (got.grad - grad.grad).abs().max() / grad.grad.abs().max()
        assert error < 1e-5
    assert trained or weight.grad is None


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_the_memory_is_the_budget_and_a_few_hidden_states(kind: str) -> None:
    hidden, weight, states, teacher, ids = inputs(1024, 16384)
    hidden.requires_grad_()
    loss = RecoveryLoss(kind, Head(teacher, None, Logits()), BUDGET_BYTES)
    with Watch(hidden, weight, states, teacher, ids) as watch:
        loss(hidden, Head(weight, None, Logits()), states, ids).backward()
    one_matrix = 4 * 1024 * 16384
    allowed = BUDGET_BYTES + PATH_BYTES + 4 * hidden.nbytes
    assert allowed < one_matrix / 3
    assert 0 < watch.peak <= allowed
