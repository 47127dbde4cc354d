"""The activation functions of gated MLPs with their derivatives, in Triton and in plain torch.

silu       z σ(z)
gelu       z Φ(z), Φ the normal distribution's
gelu_tanh  0.5 z (1 + tanh(k)) = z σ(2k), k = √(2/π) (z + 0.044715 z³)
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.kernels._triton import jit, tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def activate(activation: str, gate: Tensor) -> Tensor:
    """act_fn(gate) by torch's own operation."""
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(gate, approximate=approximate)


@jit
def value_and_slope_kernel(z, ACTIVATION: tl.constexpr):
    """act_fn(z) and its derivative, fp32."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(z)
        return z * s, s * (1 + z * (1 - s))
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865475))
        return z * cdf, cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    two_k = z * (1.5957691216057308 + 0.07135481627260025 * z * z)
    s = tl.sigmoid(two_k)
    slope = 1.5957691216057308 + 0.21406444881780076 * z * z
    return z * s, s + z * s * (1 - s) * slope


def value_and_slope(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act_fn(z) and its derivative."""
    if activation == "gelu":
        cdf = torch.special.ndtr(z)
        return z * cdf, cdf + z * torch.exp(-0.5 * z * z) * 0.3989422804014327
    if activation == "silu":
        s = torch.sigmoid(z)
        return z * s, s * (1 + z * (1 - s))
    s = torch.sigmoid(z * (1.5957691216057308 + 0.07135481627260025 * z * z))
    return z * s, s + z * s * (1 - s) * (1.5957691216057308 + 0.21406444881780076 * z * z)
