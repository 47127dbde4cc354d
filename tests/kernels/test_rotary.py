from collections.abc import Callable, Iterator

import pytest
import torch
from interpreted import rounding_as_a_gpu
from kernel_inputs import random
from paths import PATHS
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import apply_rotary_pos_emb as gemma3
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

from hfprune_fast.kernels import rotary, rotary_reference

Turn = Callable[..., tuple[Tensor, Tensor]]
# (B, H, K, T, Dh): heads of several steps, one head, halves that are no power of two.
SHAPES = [(2, 3, 1, 5, 16), (1, 40, 8, 3, 128), (2, 2, 2, 4, 80), (1, 1, 1, 1, 2)]
each_path = pytest.mark.parametrize(("backend", "dtype"), PATHS)


@pytest.fixture(autouse=True)
def _rounding() -> Iterator[None]:
    with rounding_as_a_gpu():
        yield


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, tables: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q as a view of a projection, k as it is, and tables whose halves differ."""
    batch, heads, kv_heads, seq_len, width = shape
    q = random(batch, seq_len, heads, width, dtype=dtype).transpose(1, 2)
    k = random(batch, kv_heads, seq_len, width, dtype=dtype, seed=1)
    cos, sin = (random(tables, seq_len, width, dtype=dtype, seed=seed) for seed in (2, 3))
    return q, k, cos, sin


def with_gradients(turn: Turn, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    outputs = turn(q, k, cos, sin)
    grads = [random(*out.shape, dtype=out.dtype, seed=4) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, (q, k), grads)]


@each_path
@pytest.mark.parametrize("shape", SHAPES)
def test_is_transformers_own_to_the_bit(
    shape: tuple[int, ...], backend: str, dtype: torch.dtype
) -> None:
    for tables in {1, shape[0]}:
        given = inputs(shape, dtype, tables)
        ours = with_gradients(lambda *args: rotary(*args, backend=backend), *given)
        for theirs in (llama, gemma3, rotary_reference):
            expected = with_gradients(theirs, *given)
            assert all(map(torch.equal, ours, expected))
            strides = [[each.stride() for each in made[:2]] for made in (ours, expected)]
            assert strides[0] == strides[1]


def test_turns_pairs_by_their_angles_and_its_gradient_turns_back(backend: str) -> None:
    """As complex numbers in float64; two products and a sum are three roundings of 1.2e-7 / 2."""
    angles = random(1, 5, 8, dtype=torch.float64, scale=3)
    cos, sin = (torch.cat((t, t), dim=-1).float() for t in (angles.cos(), angles.sin()))
    q = random(2, 3, 5, 16).requires_grad_()
    turned, _ = rotary(q, q.detach(), cos, sin, backend=backend)
    (back,) = torch.autograd.grad(turned, q, turned.detach())
    pairs = torch.complex(*q.detach().double().chunk(2, dim=-1))
    truth = pairs * torch.polar(torch.ones_like(angles), angles)
    error = torch.complex(*turned.detach().double().chunk(2, dim=-1)) - truth
    assert (error.abs() <= 3 * 2**-23 * pairs.abs()).all()
    assert torch.allclose(back, q.detach(), rtol=0, atol=6 * 2**-23 * float(pairs.abs().max()))


def test_other_strides_and_no_tokens(backend: str) -> None:
    q, k, cos, sin = inputs((2, 3, 1, 5, 16), torch.float32, 2)
    expected = with_gradients(rotary_reference, q, k, cos, sin)
    wide = [t.repeat_interleave(2, dim=-1)[..., ::2] for t in (q, k, cos, sin)]
    columns_first = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (q, k, cos, sin)]
    for given in (wide, columns_first):
        ours = with_gradients(lambda *args: rotary(*args, backend=backend), *given)
        assert all(map(torch.equal, ours, expected))
    empty = [t[..., :0, :] for t in (q, k, cos, sin)]
    assert rotary(*empty, backend=backend)[0].shape == (2, 3, 0, 16)


def test_differentiates_twice() -> None:
    """Its gradient is itself, transposed, so that it has one too; it is linear."""
    q, k, cos, sin = inputs((1, 2, 1, 3, 4), torch.float64, 1)
    q, k = q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, cos, sin), (q, k))
    assert torch.autograd.gradgradcheck(lambda q, k: rotary(q, k, cos, sin), (q, k))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sin": (1, 5, 8)}, "sin must be .2, 5, 8. as cos is, got .1, 5, 8."),
        ({"cos": (1, 5, 8)}, "sin must be .1, 5, 8. as cos is, got .2, 5, 8."),
        ({"cos": (5, 8), "sin": (5, 8)}, "cos must be .2 or 1, 5, 8. .*, got .5, 8."),
        ({"cos": (2, 5, 4), "sin": (2, 5, 4)}, "cos must be .2 or 1, 5, 8. .*, got .2, 5, 4."),
        ({"k": (1, 1, 5, 8)}, "k must be .2, K, 5, 8. torch.float32 as q is, got .1, 1, 5, 8."),
        ({"q": (2, 5, 8)}, "q must be a .B, H, T, Dh. float tensor, Dh even, got .2, 5, 8."),
    ],
)
def test_shapes_that_it_does_not_read_are_refused(
    changes: dict[str, tuple[int, ...]], message: str, backend: str
) -> None:
    shapes = {"q": (2, 3, 5, 8), "k": (2, 1, 5, 8), "cos": (2, 5, 8), "sin": (2, 5, 8)} | changes
    with pytest.raises(ValueError, match=message):
        rotary(**{name: random(*shape) for name, shape in shapes.items()}, backend=backend)
