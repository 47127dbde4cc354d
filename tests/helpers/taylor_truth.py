"""The statistics of taylor.py, and a gated activation's gradients, in plain float64 or integers.

u is half of eps of the dtype computed in, tiny its smallest normal number, which bounds what an
underflow loses.
"""

import math

import torch
from rows_truth import stored
from tolerances import assert_no_worse
from torch import Tensor

from hfprune_fast.kernels import gated_taylor_reference

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

# Gates at which the three functions and their slopes are exact in every dtype: (value, slope).
EXACT_GATES = {-1024.0: (0.0, 0.0), 0.0: (0.0, 0.5), 64.0: (64.0, 1.0)}


def sums(x: Tensor, a: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """(4, F) float64 of the terms x = g a and a, both (B, S, F), over the tokens that count."""
    if token_mask is not None:
        x = torch.where(token_mask[:, :, None], x, 0)
        a = torch.where(token_mask[:, :, None], a, 0)
    x, a = x.double(), a.double()
    return torch.stack(
        [x.abs().sum((0, 1)), x.pow(2).sum((0, 1)), x.sum(1).pow(2).sum(0), a.pow(2).sum((0, 1))]
    )


def eager_sums(grad: Tensor, act: Tensor) -> Tensor:
    """(4, F): the reference implementation's arithmetic, all in the dtype of the model."""
    total = torch.zeros(4, grad.shape[2], dtype=grad.dtype, device=grad.device)
    for b in range(len(grad)):
        a = act[b : b + 1]
        x = a * grad[b : b + 1]
        total[0] += x.abs().sum((0, 1))
        total[1] += x.pow(2).sum((0, 1))
        total[2] += x.sum((0, 1)).pow(2)
        total[3] += a.pow(2).sum((0, 1))
    return total


def statistics_bound(grad: Tensor, act: Tensor, backend: str) -> Tensor:
    """(4, F): how far rounding may move the statistics of grad and act, both (B, S, F)."""
    a = act.double().abs()
    x = grad.double().abs() * a
    # torch: all in fp64. The others: squares in fp32, and some sums. triton, over 128 tokens: tiles
    # of 4 to 32 tokens one after the other, and then the tokens of a tile, 38 sums at most. cpp,
    # over 64 tokens: 4 at a time, and these 16 and up to 3 that are left one after the other.
    u, tiny = (2.0**-53, 0.0) if backend == "torch" else (2.0**-24, 2.0**-126)
    roundings = {"torch": x.shape[0] * x.shape[1], "triton": 40, "cpp": 24}
    rounding = u * roundings[backend]
    per_sequence = ((rounding + 1.01 * u) * x).sum(1)
    return 1.01 * torch.stack(
        [
            per_sequence.sum(0),
            ((rounding + 3 * u) * x**2 + tiny).sum((0, 1)),
            (2 * x.sum(1) * per_sequence + per_sequence**2).sum(0),
            ((rounding + u) * a**2 + tiny).sum((0, 1)),
        ]
    )


def activation_truth(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act_fn(z) and its derivative in float64."""
    z = z.detach().double().requires_grad_()
    with torch.enable_grad():
        if activation == "silu":
            value = z * torch.sigmoid(z)
        elif activation == "gelu":
            value = 0.5 * z * torch.special.erfc(-z / math.sqrt(2))
        else:
            # z (1 + tanh(k)) / 2, which would cancel where k is far below 0
            value = z * torch.sigmoid(math.sqrt(8 / math.pi) * (z + 0.044715 * z**3))
        (slope,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), slope


def assert_gated(
    got: tuple[tuple[Tensor, ...], Tensor, Tensor], inputs: tuple[Tensor, Tensor, Tensor],
    activation: str, token_mask: Tensor | None = None, *, backend: str = "torch",
) -> None:  # fmt: skip
    """Gradients entry by entry, and the sums norm-wise, are as right as fp32 maths can be.

    Error <= 2 x that of plain torch in fp32 + a floor. Of a sum: act is right to 10 u, squares
    double that and a product's u, and 16 terms in a row and 8 in a tree are added: 24 eps.
    """
    dtype = inputs[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    eps, tiny = torch.finfo(wide).eps, torch.finfo(torch.float32).smallest_normal
    true_sums, plain_sums = torch.zeros(2, 4, inputs[0].shape[2], dtype=torch.float64)
    for b in range(len(inputs[0])):
        sequence = [tensor[b : b + 1] for tensor in inputs]
        if token_mask is not None:
            sequence = [t.masked_fill(~token_mask[b][:, None], 0) for t in sequence]
        grad, gate, up = (t.double() for t in sequence)
        value, slope = activation_truth(gate, activation)
        true_sums += sums(grad * value * up, value * up).cpu()
        plain = gated_taylor_reference(*(t.to(wide) for t in sequence), activation=activation)
        plain_sums += torch.stack(plain[0]).cpu()
        # The derivatives have zeros where their terms of size up to 1 + |gate| cancel.
        size = (16 * eps * grad * (1 + gate.abs())).abs()
        for ours, theirs, exact, terms in (
            (got[1], plain[1], grad * up * slope, size * up.abs()),
            (got[2], plain[2], grad * value, size),
        ):
            allowed = 2 * (theirs.double() - exact).abs() + terms + tiny
            allowed = allowed + stored(exact.abs() + allowed, dtype, backend)
            assert ((ours[b : b + 1].double() - exact).abs() <= allowed).all(), f"sequence {b}"
    assert_no_worse(torch.stack(got[0]).cpu(), plain_sums, true_sums, floor=24 * eps)
