"""Checks that several operations share; each raises ValueError with the argument's name."""

from __future__ import annotations

import math


def check_transform(softcap: float | None, logit_scale: float) -> None:
    """Refuse a softcap or logit_scale that is not a positive number."""
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value}")


def check_grad_scale(grad_scale: float) -> None:
    """Refuse a scale whose removal would round."""
    if not 0 < grad_scale < math.inf or math.frexp(grad_scale)[0] != 0.5:
        raise ValueError(f"grad_scale must be a power of two, got {grad_scale}")
