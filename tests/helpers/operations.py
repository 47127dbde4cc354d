"""Every operation on small fixed inputs, and what each refuses."""

from collections.abc import Callable
from typing import Any

import torch
from taylor_cases import random
from torch import Tensor

from hfprune_fast.kernels import (
    gated_taylor,
    linear_cross_entropy,
    linear_entropy,
    linear_fisher,
    softmax_entropy,
    softmax_entropy_grad_,
    taylor_statistics,
)

# Rows of more than one step of the kernel, with a rest.
LOGITS, SCALE = random(2, 8200), torch.tensor([0.5, 2.0])
HIDDEN, WEIGHT, KEYS = random(3, 4), random(33, 4, seed=1), torch.tensor([2, 0, 32])
GRAD, GATE, UP = (random(2, 9, 5, seed=i) for i in range(3))
NAN = float("nan")


def overwrite_logits(**options: Any) -> list[Tensor]:
    logits = LOGITS.clone()
    return [softmax_entropy_grad_(logits, SCALE, **options), logits]


def gated(mode: str) -> Callable[..., list[Tensor]]:
    def call(**options: Any) -> list[Tensor]:
        gate, up = GATE.clone(), UP.clone()
        if mode == "overwrite":
            options["overwrite"] = True
        elif mode == "out":
            options["out"] = torch.empty_like(gate), torch.empty_like(up)
        sums, d_gate, d_up = gated_taylor(GRAD, gate, up, **options)
        return [*sums, d_gate, d_up]

    return call


# By name: a call that returns what the operation makes, in new tensors.
OPERATIONS: dict[str, Callable[..., list[Tensor]]] = {
    "softmax_entropy": lambda **kw: [softmax_entropy(LOGITS, **kw)],
    "softmax_entropy_grad_": overwrite_logits,
    "linear_entropy": lambda **kw: [*linear_entropy(HIDDEN, WEIGHT, **kw)],
    "linear_cross_entropy": lambda **kw: [*linear_cross_entropy(HIDDEN, WEIGHT, KEYS, **kw)],
    "linear_fisher": lambda **kw: [*linear_fisher(HIDDEN, WEIGHT, KEYS, seed=2, **kw)],
    "taylor_statistics": lambda **kw: [*taylor_statistics(GRAD, UP, **kw)],
    "gated_taylor": gated("new"),
    "gated_taylor out": gated("out"),
    "gated_taylor overwrite": gated("overwrite"),
}

_ROWS = {"logits": torch.zeros(3, 2), "row_scale": torch.zeros(3)}
_HEAD = {"hidden": torch.zeros(3, 5), "weight": torch.zeros(7, 5)}
_LABELS = _HEAD | {"labels": torch.arange(3)}
_IDS = _HEAD | {"row_id": torch.arange(3)}
_ACT = {"grad": torch.zeros(2, 3, 4), "act": torch.zeros(2, 3, 4)}
_MLP = {name: torch.zeros(2, 3, 4) for name in ("grad", "gate", "up")}
_MASK = torch.ones(2, 3, dtype=torch.bool)

# (operation, its good arguments, what is changed, the message)
REFUSED: list[tuple[Callable[..., Any], dict[str, Tensor], dict[str, Any], str]] = [
    *(
        (softmax_entropy_grad_, _ROWS, change, message)
        for change, message in [
            ({"row_scale": torch.zeros(2)}, r"row_scale must be \(3,\)"),
            ({"logits": torch.zeros(2).expand(3, 2)}, "rows of logits must not overlap"),
        ]
    ),
    *(
        (operation, arguments, change, message)
        for operation, arguments in [
            (softmax_entropy, {"logits": _ROWS["logits"]}), (softmax_entropy_grad_, _ROWS),
        ]
        for change, message in [
            ({"logits": torch.zeros(3)}, r"logits must be a \(T, V\)"),
            ({"logits": torch.zeros(3, 2, dtype=torch.int64)}, "logits must be .* float"),
            ({"logits": torch.zeros(3, 4)[:, ::2]}, r"unit stride along V, got .*\(4, 2\)"),
            ({"softcap": 0.0}, "softcap must be .* got 0.0"),
            ({"softcap": NAN}, "softcap must be"),
            ({"logit_scale": -1.0}, "logit_scale must be"),
        ]
    ),
    *(
        (linear_entropy, _HEAD, change, message)
        for change, message in [
            ({"hidden": torch.zeros(3, 4)}, r"hidden must be \(T, D\).*got \(3, 4\) and \(7, 5\)"),
            ({"weight": torch.zeros(5)}, r"weight \(V, D\), got \(3, 5\) and \(5,\)"),
            ({"hidden": torch.zeros(3, 5).double()}, "dtype, got torch.float64 and torch.float32"),
            ({"hidden": torch.zeros(3, 5).int(), "weight": torch.zeros(7, 5).int()}, "floating"),
            ({"row_weight": torch.zeros(4)}, r"row_weight must be \(3,\), got \(4,\)"),
            ({"bias": torch.zeros(5)}, r"bias must be \(7,\)"),
            ({"bias": torch.zeros(7).double()}, "bias must be .* got .*float64"),
            ({"softcap": -1.0}, "softcap must be"),
            ({"grad_scale": 3.0}, "grad_scale must be a power of two in .*, got 3.0"),
            ({"grad_scale": torch.inf}, "grad_scale must be"),
            ({"logits_budget_bytes": 0}, "logits_budget_bytes must be at least 1, got 0"),
        ]
    ),
    *(
        (linear_cross_entropy, _LABELS, {"labels": labels}, r"labels must be " + message)
        for labels, message in [
            (torch.arange(2), r"\(3,\) torch.int64, got \(2,\)"),
            (torch.arange(3).int(), r".* got \(3,\) torch.int32"),
            (torch.arange(3) + 5, r"-100 or in 0 \.\. 6, got 7"),
            (torch.arange(3) - 1, r"-100 or in 0 \.\. 6, got -1"),
        ]
    ),
    *(
        (linear_fisher, _IDS, change, message)
        for change, message in [
            ({"row_id": torch.zeros(3).double()}, r"row_id must be \(3,\) torch.int64, .*float64"),
            ({"seed": -1}, r"seed must be in 0 \.\. 2\^63 - 1, got -1"),
            ({"softcap": 0.0}, "softcap must be"),
        ]
    ),
    *(
        (taylor_statistics, _ACT, change, message)
        for change, message in [
            ({"act": torch.zeros(2, 3, 5)}, r"act must be \(2, 3, 4\) .*got \(2, 3, 5\)"),
            ({"grad": torch.zeros(3, 4), "act": torch.zeros(3, 4)}, r"\(B, S, F\)"),
            ({"act": torch.zeros(2, 3, 4).double()}, "act must be .*float32 .*got .*float64"),
            ({"grad": torch.ones(2, 3, 4, dtype=torch.int64)}, "grad must be .*float tensor"),
            ({"token_mask": torch.ones(2, 3)}, r"token_mask must be \(2, 3\) bool, got .*float32"),
            ({"token_mask": _MASK.T}, r"token_mask must be \(2, 3\) bool"),
            ({"grad_scale": 0.0}, "grad_scale must be a power of two in .*, got 0.0"),
            ({"parity": True, "grad_scale": 2.0}, "no triton, token_mask or grad_scale"),
            ({"parity": True, "token_mask": _MASK}, "no triton, token_mask or grad_scale"),
            ({"parity": True, "backend": "triton"}, "parity=True is plain torch"),
            ({"parity": True, "backend": "cuda"}, "backend must be one of torch, triton"),
        ]
    ),
    *(
        (gated_taylor, _MLP, change, message)
        for change, message in [
            ({"gate": torch.zeros(2, 3, 5)}, r"gate must be \(2, 3, 4\) .*got \(2, 3, 5\)"),
            ({"up": torch.zeros(2, 3, 4).double()}, "up must be .*float32 .*got .*float64"),
            ({"out": (torch.zeros(2, 3, 4), torch.zeros(3, 4))}, "d_up must be"),
            ({"out": (torch.zeros(2, 3, 4),) * 2, "overwrite": True}, "exclude each other"),
            ({"activation": "relu"}, "activation must be one of silu, gelu, gelu_tanh, got 'relu'"),
            ({"parity": True, "backend": "triton"}, "parity=True is plain torch"),
            ({"up": _MLP["gate"], "overwrite": True}, "the same tensor"),
            ({"out": (torch.zeros(2, 3, 4),) * 2}, "the same tensor"),
        ]
    ),
]  # fmt: skip
