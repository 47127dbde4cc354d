"""The statistics of taylor.py, and a gated activation's gradients, in plain float64 or integers.

The bounds on rounding follow the equations of kernels/; u is half of eps of the dtype computed in,
tiny its smallest normal number, which bounds what an underflow loses.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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


def sums_bound(x: Tensor, x_error: Tensor, a: Tensor, a_error: Tensor, backend: str) -> Tensor:
    """(4, F): how far errors of x and a, and then the sums, may move the statistics."""
    x, a = x.abs(), a.abs()
    squares, a_squares = 2 * x * x_error + x_error**2, 2 * a * a_error + a_error**2
    # torch: all in fp64. triton: squares in fp32, and sums over 128 tokens: tiles of 4 to 32 tokens
    # one after the other, and then the tokens of a tile, make 38 sums at most.
    u, tiny = (2.0**-24, 2.0**-126) if backend == "triton" else (2.0**-53, 0.0)
    rounding = u * (40 if backend == "triton" else x.shape[0] * x.shape[1])
    per_sequence = (x_error + rounding * (x + x_error)).sum(1)
    return 1.01 * torch.stack(
        [
            per_sequence.sum(0),
            (squares + (rounding + u) * x**2 + tiny).sum((0, 1)),
            (2 * x.sum(1) * per_sequence + per_sequence**2).sum(0),
            (a_squares + (rounding + u) * a**2 + tiny).sum((0, 1)),
        ]
    )


def statistics_bound(grad: Tensor, act: Tensor, backend: str) -> Tensor:
    """(4, F): how far rounding may move the statistics of grad and act, both (B, S, F)."""
    a, x = act.double(), grad.double() * act.double()
    u = 2.0**-24 if backend == "triton" else 2.0**-53
    return sums_bound(x, u * x.abs(), a, torch.zeros_like(a), backend)


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


def activation_bound(z: Tensor, activation: str, u: float, tiny: float) -> tuple[Tensor, Tensor]:
    """Bounds on the errors of act_fn(z) and its derivative; exp is right to 3 ulp = 6 u."""
    z = z.double()
    if activation == "gelu":
        # Φ(z) to 4 u whatever its size; z φ(z), with z² / 2 rounded twice inside exp, to 3 u.
        return 6 * u * z.abs(), torch.full_like(z, 10 * u)
    if activation == "silu":
        # σ to 8 u of itself; 1 - σ to 8 u σ and a rounding, times z.
        sigma = torch.sigmoid(z)
        return z.abs() * (9 * u * sigma + tiny), (20 * u * sigma + tiny) * (1 + z.abs())
    # σ(2k) with 2k to 6 u of itself; 1 - σ is off by as much, but exact 0 where σ rounds to 1.
    two_k = math.sqrt(8 / math.pi) * (z + 0.044715 * z**3)
    d_two_k = math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * z**2)
    sigma, rest = torch.sigmoid(two_k), torch.sigmoid(-two_k)
    sigma_error = u * sigma * (8 + 6 * rest * two_k.abs()) + tiny
    rest_error = torch.where(rest < u / 4, rest, sigma_error + u)
    product_error = sigma_error * rest + sigma * rest_error + 6 * u * sigma * rest
    slope = sigma + z.abs() * sigma * rest * d_two_k
    return (
        z.abs() * (sigma_error + u * sigma),
        1.01 * (sigma_error + z.abs() * d_two_k * product_error + u * slope),
    )


@dataclass(frozen=True)
class Gated:
    """Truth and the bounds on the error of each, before a gradient is rounded to be stored."""

    sums: Tensor
    sums_bound: Tensor
    d_gate: Tensor
    d_gate_bound: Tensor
    d_up: Tensor
    d_up_bound: Tensor


def gated_truth(grad: Tensor, gate: Tensor, up: Tensor, activation: str, backend: str) -> Gated:
    info = torch.finfo(torch.promote_types(gate.dtype, torch.float32))
    u, tiny = info.eps / 2, info.smallest_normal
    value, slope = activation_truth(gate, activation)
    value_error, slope_error = activation_bound(gate, activation, u, tiny)
    g, up = grad.double(), up.double()
    d_gate, d_up, a = g * up * slope, g * value, value * up
    a_error = up.abs() * value_error + u * a.abs() + tiny
    x_error = g.abs() * a_error + u * (g * a).abs() + tiny
    return Gated(
        sums(g * a, a),
        sums_bound(g * a, x_error, a, a_error, backend),
        d_gate,
        (g * up).abs() * slope_error + 3 * u * d_gate.abs() + 2 * tiny,
        d_up,
        g.abs() * value_error + u * d_up.abs() + tiny,
    )
