"""What holds for every operation alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operations import GATE, GRAD, HIDDEN, KEYS, LOGITS, OPERATIONS, REFUSED, SCALE, UP, WEIGHT
from torch import Tensor

from hfprune_fast import kernels
from hfprune_fast.kernels import TRITON_VERSION

OPS = torch.ops.hfprune_fast
MASK = torch.arange(9) < torch.tensor([[9], [3]])
HEAD = HIDDEN, WEIGHT, torch.ones(3), WEIGHT[:, 0].clone()
each_operation = pytest.mark.parametrize("operation", OPERATIONS)


@each_operation
def test_repeats_bit_for_bit(operation: str, backend: str) -> None:
    first, second = (OPERATIONS[operation](backend=backend) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(tensor.isfinite().all() for tensor in first)


@each_operation
def test_compiles_whole(operation: str, backend: str) -> None:
    torch._dynamo.reset()  # each operation compiles the same function anew
    call = OPERATIONS[operation]

    def run(offset: Tensor) -> list[Tensor]:
        return [tensor + offset for tensor in call(backend=backend)]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(torch.ones(())), run(torch.ones(()))))


@each_operation
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(operation: str, low: torch.dtype, backend: str) -> None:
    expected = OPERATIONS[operation](backend=backend)
    with torch.autocast("cpu", dtype=low):
        got = OPERATIONS[operation](backend=backend)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        (OPS.softmax_entropy, (LOGITS.clone().requires_grad_(), 30.0, 1.0)),
        (OPS.softmax_entropy_backward, (LOGITS, SCALE, None, 1.0)),
        (OPS.softmax_entropy_grad_, (LOGITS, SCALE, None, 1.0)),
        (OPS.linear_criterion, (*HEAD, "entropy", None, 0, None, 1.0, False, 1.0, None)),
        (OPS.linear_criterion, (*HEAD, "cross_entropy", KEYS, 0, 8.0, 0.5, True, 2.0, 100)),
        (OPS.linear_criterion, (*HEAD, "fisher", KEYS, 9, 8.0, 0.5, True, 2.0, 100)),
        (OPS.taylor_statistics, (GRAD, UP, MASK, False, 2.0)),
        (OPS.gated_taylor_, (GRAD, GATE, UP, "silu", MASK, False, 2.0)),
        (OPS.gated_taylor_out, (GRAD, GATE, UP, GATE + 1, UP + 1, "gelu", MASK, False, 2.0)),
    ],
)
def test_registration_passes_opcheck(
    operation: Any, arguments: tuple[Any, ...], backend: str
) -> None:
    copies = (a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
              for a in arguments)  # fmt: skip
    results = torch.library.opcheck(operation.default, (*copies, backend))
    assert set(results.values()) == {"SUCCESS"}


def test_registration_of_parity_passes_opcheck() -> None:
    grad, gate, up = (tensor.bfloat16() for tensor in (GRAD, GATE, UP))
    torch.library.opcheck(OPS.taylor_statistics.default, (grad, up, None, True, 1.0, None))
    torch.library.opcheck(
        OPS.gated_taylor_.default, (grad, gate, up, "gelu", None, True, 1.0, None)
    )


@pytest.mark.parametrize(("operation", "arguments", "change", "message"), REFUSED)
def test_bad_arguments_are_refused(
    operation: Callable[..., Any], arguments: dict[str, Tensor], change: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        operation(**(arguments | change))
    if TRITON_VERSION is not None and "backend" not in change and "parity" not in change:
        with pytest.raises(ValueError, match=message):
            operation(**(arguments | change), backend="triton")


def test_the_alias_is_the_same_function() -> None:
    assert kernels.linear_sampled_cross_entropy is kernels.linear_fisher
