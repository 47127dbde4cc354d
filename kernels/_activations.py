"""The activation functions of gated MLPs with their derivatives, in Triton and in plain torch.

silu       z σ(z)
gelu       z Φ(z), Φ the normal distribution's
gelu_tanh  0.5 z (1 + tanh(k)) = z σ(2k), k = √(2/π) (z + 0.044715 z³)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hfprune_fast.kernels._triton import jit, tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class Gated(NamedTuple):
    """act = act_fn(gate) · up by its factors, and the tensors for their gradients; all (B, S, F).

    The gradients may be written over gate and up.
    """

    gate: Tensor
    up: Tensor
    d_gate: Tensor
    d_up: Tensor
    activation: str


def check_activation(activation: str) -> None:
    """Raise ValueError for a name that is not in ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def activate(z: Tensor, activation: str) -> Tensor:
    """Return act_fn(z) by torch's own operation."""
    if activation == "silu":
        return torch.nn.functional.silu(z)
    return torch.nn.functional.gelu(z, approximate=_approximate(activation))


def eager_gated(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (act, d_gate, d_up), rounded as by transformers' own modules and autograd.

    Calls the operations that autograd would: it does not record inside a custom operation.
    """
    value, d_value = activate(gate, activation), grad * up
    if activation == "silu":
        d_gate = torch.ops.aten.silu_backward(d_value, gate)
    else:
        approximate = _approximate(activation)
        d_gate = torch.ops.aten.gelu_backward(d_value, gate, approximate=approximate)
    return value * up, d_gate, grad * value


def _approximate(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"


# The numbers below are 1/√2, 1/√(2π), c = 2√(2/π), 0.044715 c and 3 · 0.044715 c; a kernel cannot
# read a module's constants.


@jit
def value_and_slope_triton(z, ACTIVATION: tl.constexpr):
    """Return act_fn(z) and its derivative, fp32."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(z)
        return z * s, s * (1 + z * (1 - s))
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865475))
        return z * cdf, cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    s = tl.sigmoid(z * (1.5957691216057308 + 0.07135481627260025 * z * z))
    return z * s, s + z * s * (1 - s) * (1.5957691216057308 + 0.21406444881780076 * z * z)


def value_and_slope(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return act_fn(z) and its derivative, in the dtype of z."""
    if activation == "silu":
        s = torch.sigmoid(z)
        return z * s, s * (1 + z * (1 - s))
    if activation == "gelu":
        cdf = torch.special.ndtr(z)
        return z * cdf, cdf + z * torch.exp(-0.5 * z * z) * 0.3989422804014327
    s = torch.sigmoid(z * (1.5957691216057308 + 0.07135481627260025 * z * z))
    return z * s, s + z * s * (1 - s) * (1.5957691216057308 + 0.21406444881780076 * z * z)
