"""What holds for every operation alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operations import OPERATIONS, REFUSED, SMALL, registrations
from paths import slow_in_triton
from torch import Tensor
from torch.autograd import forward_ad

from hfprune_fast import kernels
from hfprune_fast.kernels import TRITON_VERSION

each_operation = pytest.mark.parametrize("operation", OPERATIONS)


@each_operation
def test_repeats_bit_for_bit_also_under_autocast(operation: str, backend: str) -> None:
    results = [OPERATIONS[operation](backend=backend) for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results.append(OPERATIONS[operation](backend=backend))
    assert all(tensor.isfinite().all() for tensor in results[0])
    for again in results[1:]:
        assert all(map(torch.equal, again, results[0]))


@slow_in_triton
@each_operation
def test_compiles_whole(operation: str, backend: str) -> None:
    torch._dynamo.reset()  # each operation compiles the same function anew
    call = OPERATIONS[operation]

    def run(offset: Tensor) -> list[Tensor]:
        return [tensor + offset for tensor in call(backend=backend)]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(torch.ones(())), run(torch.ones(()))))


@pytest.mark.parametrize(("operation", "arguments"), registrations(SMALL))
def test_registration_passes_opcheck(operation: Any, arguments: tuple[Any, ...]) -> None:
    copies = (a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
              for a in arguments)  # fmt: skip
    results = torch.library.opcheck(operation.default, (*copies, None))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("operation", "arguments"), registrations(SMALL))
def test_an_operation_alone_refuses_tensors_of_which_some_are_on_meta(
    operation: Any, arguments: tuple[Any, ...]
) -> None:
    tensors = [i for i, argument in enumerate(arguments) if isinstance(argument, Tensor)]
    for i in tensors if len(tensors) > 1 else ():
        others = [*arguments, None]
        others[i] = arguments[i].to("meta")
        with pytest.raises(ValueError, match=r"must be on (cpu, got meta|meta, got cpu)"):
            operation(*others)


def test_torch_compile_refuses_tensors_of_which_some_are_on_meta() -> None:
    compiled = torch.compile(kernels.linear_entropy, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="weight must be on cpu, got meta"):
        compiled(SMALL.hidden, SMALL.weight.to("meta"))


DIFFERENTIATED: dict[str, Callable[[Tensor], Any]] = {
    "softmax_entropy": kernels.softmax_entropy,
    "softmax_entropy_grad_": lambda x: kernels.softmax_entropy_grad_(x.clone(), torch.ones(3)),
    "softmax_kl_grad_": lambda x: kernels.softmax_kl_grad_(x.clone(), x.flip(1), torch.ones(3)),
    "linear_entropy": lambda x: kernels.linear_entropy(x, torch.ones(7, 5)),
    "the head's weight": lambda x: kernels.linear_entropy(torch.ones(2, 5), x),
    "row weights": lambda x: kernels.linear_entropy(torch.ones(3, 5), x, x[:, 0]),
    "linear_cross_entropy": lambda x: kernels.linear_cross_entropy(x, x, torch.arange(3)),
    "linear_fisher": lambda x: kernels.linear_fisher(x, x, torch.arange(3)),
    "linear_self_distillation": lambda x: kernels.linear_self_distillation(x, x, torch.arange(3)),
    "linear_kl": lambda x: kernels.linear_kl(
        x, torch.ones(2, 5), torch.ones(3, 4), torch.ones(2, 4)
    ),
    "its teacher": lambda x: kernels.linear_kl(torch.ones(3, 5), x, x, x),
    "taylor_statistics": lambda x: kernels.taylor_statistics(x[None], torch.ones(1, 3, 5)),
    "gated_taylor": lambda x: kernels.gated_taylor(
        torch.ones(1, 3, 5), torch.ones(1, 3, 5), x[None]
    ),
    "overwriting": lambda x: kernels.gated_taylor(
        torch.ones(1, 3, 5), x.clone()[None], torch.ones(1, 3, 5), overwrite=True
    ),
    "rms_norm": lambda x: kernels.rms_norm(x, torch.ones(5), eps=1e-5),
    "rotary": lambda x: kernels.rotary(
        x[None, None, :, 1:], torch.ones(1, 2, 3, 4), *torch.ones(2, 1, 3, 4)
    ),
}
DIFFERENTIABLE = ("softmax_entropy", "rms_norm", "rotary")


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_forward_mode_is_an_error_and_never_zero(name: str) -> None:
    function = DIFFERENTIATED[name]
    x = torch.linspace(-1, 1, 15).view(3, 5)
    function(x)
    for derive in (
        lambda: torch.func.jvp(function, (x,), (x,)),
        lambda: torch.func.jacfwd(function)(x),
        lambda: torch.func.vmap(lambda v: torch.func.jvp(function, (x,), (v,)))(x[None]),
        lambda: _dual(function, x),
    ):
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            derive()
    if name not in DIFFERENTIABLE:

        def scalar(x: Tensor) -> Tensor:
            result = function(x)
            return (result if isinstance(result, Tensor) else result[0]).sum()

        with pytest.raises(RuntimeError, match="cannot be differentiated by torch"):
            torch.func.grad(scalar)(x)


def _dual(function: Callable[[Tensor], Any], x: Tensor) -> None:
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x, x))


@pytest.mark.parametrize(("operation", "arguments", "message"), REFUSED)
def test_bad_arguments_are_refused(
    operation: Callable[..., Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        operation(**arguments)
    if TRITON_VERSION is not None and "backend" not in arguments and "parity" not in arguments:
        with pytest.raises(ValueError, match=message):
            operation(**arguments, backend="triton")


@pytest.mark.parametrize(("tokens", "vocab"), [(0, 7), (3, 0), (0, 0)])
def test_no_rows_and_no_vocabulary(backend: str, tokens: int, vocab: int) -> None:
    logits = torch.empty(tokens, vocab, requires_grad=True)
    entropy = kernels.softmax_entropy(logits, backend=backend)
    assert torch.equal(entropy, torch.zeros(tokens))
    assert torch.autograd.grad(entropy.sum(), logits)[0].shape == logits.shape
    hidden, weight = torch.zeros(tokens, 4), torch.zeros(vocab, 4)
    keys = torch.full((tokens,), -100)
    options: dict[str, Any] = {"backend": backend}
    for loss, d_hidden in (
        kernels.linear_entropy(hidden, weight, **options),
        kernels.linear_entropy(hidden, weight, fp32_logits=True, **options),
        kernels.linear_cross_entropy(hidden, weight, keys, **options),
        kernels.linear_fisher(hidden, weight, keys, **options),
        kernels.linear_self_distillation(hidden, weight, keys, **options),
        kernels.linear_kl(hidden, weight, hidden[:, :2], weight[:, :2], **options),
    ):
        assert loss == 0
        assert torch.equal(d_hidden, torch.zeros(tokens, 4))
