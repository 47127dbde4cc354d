"""Under Trainer's autocast only the student's decoder runs in it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfprune_fast.engine.layerwise import Head
from hfprune_fast.models.sites import Logits
from hfprune_fast.recovery.loss import RecoveryLoss
from hfprune_fast.recovery.student import Student


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(40, 16), nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        return (self.linear(self.table(input_ids)),)


@pytest.mark.parametrize("resident", [False, True])
def test_loss_and_teacher_are_outside_of_autocast(
    resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_loss, within = RecoveryLoss.kl, list[bool]()

    def noted(*args: Any, **options: Any) -> Tensor:
        within.append(torch.is_autocast_enabled("cpu"))
        return of_loss(*args, **options)

    monkeypatch.setattr(RecoveryLoss, "kl", noted)
    torch.manual_seed(0)
    teacher, decoder = Decoder(), Decoder()
    weight = torch.randn(2, 40, 16)
    parts: Any = SimpleNamespace(
        decoder=decoder, head=SimpleNamespace(weight=weight[0], bias=None), logits=Logits()
    )
    loss = RecoveryLoss("kl", Head(weight[1], None, Logits()))
    student = Student(decoder, parts, loss, resident=lambda ids: teacher(ids)[0])
    ids = torch.arange(24).reshape(2, 12)
    states = teacher(ids)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = decoder(ids)[0]
        given = () if resident else (states,)
        found = student(ids, *given)["loss"], *student.held_out(ids, *given)
    assert within == [False, False]
    assert hidden.dtype == torch.bfloat16
    log_p = (states @ weight[1].t()).log_softmax(-1)
    log_q = (hidden.float() @ weight[0].t()).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    for kl in found:
        torch.testing.assert_close(kl, expected, rtol=1e-5, atol=0)
