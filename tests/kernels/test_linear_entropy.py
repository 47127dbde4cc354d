import pytest
import torch
from tolerances import assert_no_worse
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from truth import entropy

from hfprune_fast.kernels import linear_entropy, linear_entropy_reference


def inputs(tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens + vocab)
    return (
        torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype) / 4,
        torch.rand(tokens, generator=generator, dtype=torch.float64) / tokens,
        torch.randn(vocab, generator=generator, dtype=torch.float64).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (7, 127), (300, 1000)])
def test_matches_float64(dtype: torch.dtype, has_bias: bool, tokens: int, vocab: int) -> None:
    hidden, weight, row_weight, bias = inputs(tokens, 32, vocab, dtype)
    bias_or_none = bias if has_bias else None
    h = hidden.double().requires_grad_()
    z = h @ weight.double().T + (bias.double() if has_bias else 0)
    true_loss = (entropy(z) * row_weight).sum()
    (true_grad,) = torch.autograd.grad(true_loss, h)
    true_loss = true_loss.detach()
    eager_loss, eager_grad = linear_entropy_reference(hidden, weight, row_weight, bias=bias_or_none)
    loss, grad = linear_entropy(
        hidden, weight, row_weight, bias=bias_or_none, logits_budget_bytes=1
    )
    # In float64 eager is the truth itself; a sum of V terms in another order moves V eps at most.
    eps = torch.finfo(dtype).eps
    floor = (vocab if dtype == torch.float64 else 4) * eps
    assert_no_worse(loss[None], eager_loss[None], true_loss[None], floor=floor)
    assert_no_worse(grad.flatten(), eager_grad.flatten(), true_grad.flatten(), floor=floor)


def test_rows_of_weight_zero_do_not_count() -> None:
    hidden, weight, row_weight, _ = inputs(10, 16, 50, torch.float64)
    row_weight[4:] = 0
    hidden[4:] = 1e3
    loss, grad = linear_entropy(hidden, weight, row_weight)
    expected, _ = linear_entropy(hidden[:4], weight, row_weight[:4])
    assert loss == pytest.approx(expected)
    assert (grad[4:] == 0).all()


def test_no_rows() -> None:
    loss, grad = linear_entropy(torch.zeros(0, 4), torch.zeros(7, 4), torch.zeros(0))
    assert loss == 0
    assert grad.shape == (0, 4)


def test_flops_and_largest_tensor() -> None:
    tokens, width, vocab = 1024, 16, 1000
    hidden, weight, row_weight, _ = inputs(tokens, width, vocab, torch.float32)
    budget = 128 * vocab * 4
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    with FlopCounterMode(display=False) as flops, Watch():
        linear_entropy(hidden, weight, row_weight, logits_budget_bytes=budget)
    assert flops.get_total_flops() == 4 * tokens * width * vocab
    assert largest == budget  # the logits buffer; never tokens x vocab


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": torch.zeros(3, 4)},
        {"hidden": torch.zeros(3, 5).double()},
        {"row_weight": torch.zeros(4)},
        {"weight": torch.zeros(5)},
    ],
)
def test_bad_arguments(change: dict[str, Tensor]) -> None:
    arguments = {
        "hidden": torch.zeros(3, 5),
        "weight": torch.zeros(7, 5),
        "row_weight": torch.zeros(3),
    }
    with pytest.raises(ValueError, match="must"):
        linear_entropy(**(arguments | change))
