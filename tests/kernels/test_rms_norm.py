from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from interpreted import rounding_as_a_gpu
from kernel_inputs import integers, random
from paths import PATHS
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from hfprune_fast.kernels import rms_norm, rms_norm_reference
from hfprune_fast.kernels.rms_norm import FORMS

EPS = 1e-5
MODULES: dict[type[nn.Module], str] = {
    LlamaRMSNorm: "llama",
    Qwen3RMSNorm: "llama",
    Gemma2RMSNorm: "gemma",
    Gemma3RMSNorm: "gemma",
    Olmo2RMSNorm: "olmo2",
}
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
each_path = pytest.mark.parametrize(("backend", "dtype"), PATHS)
each_kernel_path = pytest.mark.parametrize(
    ("backend", "dtype"), [path for path in PATHS if path.values[1] != torch.float64]
)


@pytest.fixture(autouse=True)
def _rounding() -> Iterator[None]:
    with rounding_as_a_gpu():
        yield


def with_gradient(
    norm: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = norm(x)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


def module_of(module: type[nn.Module], weight: Tensor) -> Any:
    made = module(len(weight), eps=EPS).to(weight.dtype)
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


@each_path
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "width"), [(3, 1), (5, 2), (70, 100), (2, 3000), (1, 16_500)])
def test_against_float64(
    rows: int, width: int, form: str, backend: str, dtype: torch.dtype
) -> None:
    """Twice eager torch's error, and a floor of roundings.

    The gradient is a difference of two vectors no longer than r·h, each with a rounding for every
    doubling of the sum and a few more, and is rounded once to the dtype, as y is once or twice.
    """
    x, weight = random(rows, width, dtype=dtype, scale=3), random(width, dtype=dtype, seed=1)
    grad = random(rows, width, dtype=dtype, seed=2)

    def truth(x: Tensor) -> Tensor:
        w = weight.double() + (form == "gemma")
        return w * x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS)

    options: dict[str, Any] = {"eps": EPS, "form": form}
    ours = with_gradient(lambda x: rms_norm(x, weight, backend=backend, **options), x, grad)
    eager = with_gradient(lambda x: rms_norm_reference(x, weight, **options), x, grad)
    y, d_x = with_gradient(truth, x.double(), grad.double())
    maths_eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    eps, roundings = torch.finfo(dtype).eps, 8 + width.bit_length()
    h = grad.double() * (weight.double() + (form == "gemma"))
    r = torch.rsqrt(x.double().square().mean(-1) + EPS)
    for true, got, theirs, size in (
        (y, ours[0], eager[0], y.norm(dim=-1)), (d_x, ours[1], eager[1], r * h.norm(dim=-1)),
    ):  # fmt: skip
        assert got.dtype == dtype
        floor = roundings * maths_eps * size + eps * true.norm(dim=-1)
        floor += torch.finfo(dtype).smallest_normal  # below it a GPU may flush to 0
        error, allowed = ((each.double() - true).norm(dim=-1) for each in (got, theirs))
        assert (error <= 2 * allowed + floor).all()


@each_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 5, 96), (2, 3, 4, 128)])
def test_plain_torch_is_transformers_own_to_the_bit(
    module: type[nn.Module], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, grad = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight = random(shape[-1], dtype=dtype, seed=2)
    theirs = with_gradient(module_of(module, weight), x, grad)
    ours = with_gradient(
        lambda x: rms_norm(x, weight, eps=EPS, form=MODULES[module], backend="torch"), x, grad
    )
    assert all(map(torch.equal, ours, theirs))


@each_module
@each_kernel_path
@pytest.mark.parametrize("shape", [(2, 5, 96), (2, 3, 4, 128), (1, 4096)])
def test_forward_is_transformers_own_to_the_bit_where_the_sum_is_exact(
    module: type[nn.Module], backend: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Whole numbers: their squares' sum has one value in any order, so only roundings are left."""
    x, weight = integers(*shape, dtype=dtype), random(shape[-1], dtype=dtype)
    theirs = module_of(module, weight)(x)
    ours = rms_norm(x, weight, eps=EPS, form=MODULES[module], backend=backend)
    assert torch.equal(ours, theirs)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice of columns": lambda t: torch.cat((t, t), dim=-1)[..., t.shape[-1] :],
    "every second column": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "heads first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "columns first": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_same_bits(layout: str, backend: str) -> None:
    x, weight, grad = random(2, 3, 40), random(40, seed=1), random(2, 3, 40, seed=2)
    results = [
        with_gradient(lambda x: rms_norm(x, weight, eps=EPS, backend=backend), *inputs)
        for inputs in ((x, grad), map(LAYOUTS[layout], (x, grad)))
    ]
    assert all(map(torch.equal, *results))


def test_no_rows_one_gradient_for_all_and_a_row_of_zeros(backend: str) -> None:
    weight = random(4)
    for shape in ((0, 4), (2, 0, 4)):
        x = torch.zeros(shape, requires_grad=True)
        y = rms_norm(x, weight, eps=EPS, backend=backend)
        assert y.shape == torch.autograd.grad(y.sum(), x)[0].shape == shape
    x = torch.zeros(2, 4, requires_grad=True)
    y = rms_norm(x, weight, eps=EPS, backend=backend)
    assert torch.equal(y, torch.zeros(2, 4))
    (d_x,) = torch.autograd.grad(y.sum(), x)  # a gradient of stride 0
    assert torch.allclose(d_x, weight.expand(2, 4) / EPS**0.5)


def test_a_second_derivative_is_an_error(backend: str) -> None:
    x = random(2, 4).requires_grad_()
    y = rms_norm(x, random(4), eps=EPS, backend=backend)
    (d_x,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm_backward"):
        d_x.sum().backward()
