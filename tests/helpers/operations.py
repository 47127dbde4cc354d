"""Every operation on small fixed inputs, and what each refuses."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kernel_inputs import random
from torch import Tensor

from hfprune_fast.kernels import (
    gated_taylor,
    linear_cross_entropy,
    linear_entropy,
    linear_fisher,
    linear_kl,
    linear_kl_loss,
    linear_self_distillation,
    rms_norm,
    rotary,
    softmax_entropy,
    softmax_entropy_grad_,
    softmax_kl_grad_,
    taylor_statistics,
)


@dataclass(frozen=True)
class Inputs:
    logits: Tensor  # (T, V)
    scale: Tensor  # (T,)
    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    keys: Tensor  # (T,) labels of hidden's rows, or their ids
    grad: Tensor  # (B, S, F), as are gate and up
    gate: Tensor
    up: Tensor

    def to(self, device: str) -> "Inputs":
        return Inputs(*(tensor.to(device) for tensor in vars(self).values()))


SMALL = Inputs(
    # Rows of more than one step of the kernel, with a rest.
    random(2, 8200), torch.tensor([0.5, 2.0]),
    random(3, 4), random(33, 4, seed=1), torch.tensor([2, 0, 32]),
    *(random(2, 9, 5, seed=i) for i in range(3)),
)  # fmt: skip


def _overwrite_logits(x: Inputs, **options: Any) -> list[Tensor]:
    logits = x.logits.clone()
    return [softmax_entropy_grad_(logits, x.scale, **options), logits]


def _overwrite_student(x: Inputs, **options: Any) -> list[Tensor]:
    logits = x.logits.clone()
    return [softmax_kl_grad_(logits, x.logits.flip(0), x.scale, **options), logits]


def _gated(x: Inputs, mode: str, **options: Any) -> list[Tensor]:
    gate, up = x.gate.clone(), x.up.clone()
    if mode == "overwrite":
        options["overwrite"] = True
    elif mode == "out":
        options["out"] = torch.empty_like(gate), torch.empty_like(up)
    sums, d_gate, d_up = gated_taylor(x.grad, gate, up, **options)
    return [*sums, d_gate, d_up]


def _angles(x: Inputs) -> tuple[Tensor, Tensor]:
    """cos and sin of a position each row, (1, T, D)."""
    return x.hidden.cos()[None], x.hidden.sin()[None]


# By name: a call that returns what the operation makes, in new tensors.
OPERATIONS: dict[str, Callable[..., list[Tensor]]] = {
    "softmax_entropy": lambda x=SMALL, **kw: [softmax_entropy(x.logits, **kw)],
    "softmax_entropy_grad_": lambda x=SMALL, **kw: _overwrite_logits(x, **kw),
    "softmax_kl_grad_": lambda x=SMALL, **kw: _overwrite_student(x, **kw),
    "linear_entropy": lambda x=SMALL, **kw: [*linear_entropy(x.hidden, x.weight, **kw)],
    "linear_cross_entropy": lambda x=SMALL, **kw: [
        *linear_cross_entropy(x.hidden, x.weight, x.keys, **kw)
    ],
    "linear_fisher": lambda x=SMALL, **kw: [
        *linear_fisher(x.hidden, x.weight, x.keys, seed=2, fp32_logits=True, **kw)
    ],
    "linear_self_distillation": lambda x=SMALL, **kw: [
        *linear_self_distillation(x.hidden, x.weight, x.keys, **kw)
    ],
    "linear_kl": lambda x=SMALL, **kw: [
        *linear_kl(x.hidden, x.weight, x.hidden.flip(0), x.weight, temperature=2.0, **kw)
    ],
    "taylor_statistics": lambda x=SMALL, **kw: [*taylor_statistics(x.grad, x.up, **kw)],
    "gated_taylor": lambda x=SMALL, **kw: _gated(x, "new", **kw),
    "gated_taylor out": lambda x=SMALL, **kw: _gated(x, "out", **kw),
    "gated_taylor overwrite": lambda x=SMALL, **kw: _gated(x, "overwrite", **kw),
    "rms_norm": lambda x=SMALL, **kw: [rms_norm(x.hidden, x.weight[0], eps=1e-5, **kw)],
    "rotary": lambda x=SMALL, **kw: [
        *rotary(x.hidden[None, None], x.hidden[None, None], *_angles(x), **kw)
    ],
}


def registrations(x: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Each operation as torch knows it, and its arguments but the backend."""
    ops = torch.ops.hfprune_fast
    mask = torch.arange(9, device=x.up.device) < torch.tensor([[9], [3]], device=x.up.device)
    head = x.hidden, x.weight, torch.ones_like(x.hidden[:, 0]), x.weight[:, 0].clone()
    mlp, capped = (x.grad, x.gate, x.up), (8.0, 0.5, True, 2.0, 100, True)
    low, plain = [tensor.bfloat16() for tensor in mlp], (0, 0.0, 1.0)
    teacher = x.hidden, x.weight, x.hidden.flip(0), x.weight
    return [
        (ops.softmax_entropy, (x.logits.clone().requires_grad_(), 30.0, 1.0)),
        (ops.softmax_entropy_backward, (x.logits, x.scale, None, 1.0)),
        (ops.softmax_entropy_grad_, (x.logits, x.scale, None, 1.0)),
        (ops.softmax_kl_grad_, (x.logits, x.logits.flip(0), x.scale, None, 9.0, 1.0, 2.0)),
        (ops.linear_criterion, (*head, "entropy", None, *plain, None, 1.0, False, 1.0, 9, False)),
        (ops.linear_criterion, (*head, "cross_entropy", x.keys, *plain, *capped)),
        (ops.linear_criterion, (*head, "fisher", x.keys, 9, *plain[1:], *capped)),
        (ops.linear_criterion, (*head, "self_distillation", x.keys, 0, 0.4, 0.5, *capped)),
        (ops.linear_kl, (*teacher, *head[2:], None, None, None, 1.0, 1.0, 2.0, *capped[2:])),
        (ops.taylor_statistics, (x.grad, x.up, mask, False, 2.0)),
        (ops.gated_taylor_, (*mlp, "silu", mask, False, 2.0)),
        (ops.gated_taylor_out, (*mlp, x.gate + 1, x.up + 1, "gelu", mask, False, 2.0)),
        *((ops.rms_norm, (x.hidden.clone().requires_grad_(), x.weight[0].clone(), 1e-5, form))
          for form in ("llama", "gemma", "olmo2")),
        (ops.rms_norm_backward, (x.hidden.flip(0), x.hidden, x.weight[0].clone(),
                                 torch.ones_like(x.hidden[:, 0]), "gemma")),
        (ops.rotary, (x.hidden[None, None].clone().requires_grad_(), *_angles(x), False)),
        (ops.taylor_statistics, (*low[:2], None, True, 1.0)),  # parity
        (ops.gated_taylor_, (*low, "gelu", None, True, 1.0)),
    ]  # fmt: skip


NAN = float("nan")
_LOGITS = {"logits": torch.zeros(3, 2)}
_FOUR = torch.zeros(4, 2)
_TEACHER = {"teacher_logits": torch.zeros(3, 2), "row_scale": torch.ones(3)}
_HEAD = {"hidden": torch.zeros(3, 5), "weight": torch.zeros(7, 5)}
_THREE = torch.zeros(2, 3, 4)
_MASK = torch.ones(2, 3, dtype=torch.bool)
_BAD_LOGITS: list[tuple[dict[str, Any], str]] = [
    ({"logits": torch.zeros(3)}, r"logits must be a \(T, V\)"),
    ({"logits": torch.zeros(3, 2, dtype=torch.int64)}, "logits must be .* float"),
    ({"logits": torch.zeros(3, 4)[:, ::2]}, r"unit stride along V, got .*\(4, 2\)"),
    ({"softcap": 0.0}, "softcap must be .* got 0.0"),
    ({"softcap": NAN}, "softcap must be"),
    ({"logit_scale": -1.0}, "logit_scale must be"),
]
# (operation, its good arguments, what is changed and the message)
_REFUSED: list[tuple[Callable[..., Any], dict[str, Any], list[tuple[dict[str, Any], str]]]] = [
    (softmax_entropy, _LOGITS, _BAD_LOGITS),
    (softmax_entropy_grad_, _LOGITS | {"row_scale": torch.zeros(3)}, [
        *_BAD_LOGITS,
        ({"row_scale": torch.zeros(2)}, r"row_scale must be \(3,\)"),
        ({"logits": torch.zeros(2).expand(3, 2)}, "rows of logits must not overlap"),
        ({"logits": _FOUR[:3], "row_scale": _FOUR.flatten()[5:8]}, "row_scale must be in memory"),
    ]),
    (softmax_kl_grad_, _LOGITS | _TEACHER, [
        *_BAD_LOGITS,
        ({"row_scale": torch.zeros(2)}, r"row_scale must be \(3,\)"),
        ({"logits": torch.zeros(2).expand(3, 2)}, "rows of logits must not overlap"),
        ({"logits": _FOUR[:3], "row_scale": _FOUR.flatten()[5:8]}, "row_scale must be in memory"),
        ({"teacher_logits": torch.zeros(3)}, r"teacher_logits must be a \(T, V\)"),
        ({"teacher_logits": torch.zeros(3, 4)}, r"teacher_logits must be \(3, 2\) .*got \(3, 4\)"),
        ({"teacher_logits": torch.zeros(3, 4)[:, ::2]}, "teacher_logits must have unit stride"),
        ({"teacher_logits": torch.zeros(3, 2).double()}, "both be float64 or neither"),
        ({"teacher_logits": _LOGITS["logits"]}, "teacher_logits must be in memory of its own"),
        ({"logits": _FOUR[:3], "teacher_logits": _FOUR[1:]}, "in memory of its own"),
        ({"teacher_softcap": 0.0}, "^teacher_softcap must be"),
    ]),
    (linear_entropy, _HEAD, [
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
    ]),
    (linear_cross_entropy, _HEAD | {"labels": torch.arange(3)}, [
        ({"labels": torch.arange(2)}, r"labels must be \(3,\) torch.int64, got \(2,\)"),
        ({"labels": torch.arange(3).int()}, r"labels must be .* got \(3,\) torch.int32"),
        ({"labels": torch.arange(3) + 5}, r"labels must be -100 or in 0 \.\. 6, got 7"),
        ({"labels": torch.arange(3) - 1}, r"labels must be -100 or in 0 \.\. 6, got -1"),
    ]),
    (linear_fisher, _HEAD | {"row_id": torch.arange(3)}, [
        ({"row_id": torch.zeros(3).double()}, r"row_id must be \(3,\) torch.int64, .*float64"),
        ({"seed": -1}, r"seed must be in 0 \.\. 2\^63 - 1, got -1"),
        ({"softcap": 0.0}, "softcap must be"),
    ]),
    (linear_self_distillation, _HEAD | {"labels": torch.arange(3)}, [
        ({"labels": torch.arange(3) + 5}, r"labels must be -100 or in 0 \.\. 6, got 7"),
        ({"alpha": -0.1}, "alpha must be at least 0 and below 1, got -0.1"),
        ({"alpha": 1.0}, "alpha must be at least 0 and below 1, got 1.0"),
        ({"temperature": 0.0}, "temperature must be a positive number .*, got 0.0"),
    ]),
    *((operation, _HEAD | {f"teacher_{name}": tensor for name, tensor in _HEAD.items()}, [
        ({"hidden": torch.zeros(3, 4)}, r"^hidden must be \(T, D\).*got \(3, 4\) and \(7, 5\)"),
        ({"teacher_weight": torch.zeros(5)}, r"teacher_hidden must be \(T, D\).*and \(5,\)"),
        ({"teacher_hidden": torch.zeros(4, 5)}, "the 3 rows of hidden, got 4"),
        ({"teacher_weight": torch.zeros(8, 5)}, "the 7 entries of weight, got 8: both models"),
        ({"teacher_hidden": torch.zeros(3, 5).half()}, "teacher_weight must share"),
        (
            {"teacher_hidden": torch.zeros(3, 5).double(),
             "teacher_weight": torch.zeros(7, 5).double()},
            "both be float64 or neither, got torch.float32 and torch.float64",
        ),
        ({"teacher_bias": torch.zeros(5)}, r"teacher_bias must be \(7,\)"),
        ({"row_weight": torch.zeros(4)}, r"row_weight must be \(3,\), got \(4,\)"),
        ({"softcap": 0.0}, "^softcap must be"),
        ({"teacher_softcap": 0.0}, "^teacher_softcap must be"),
        ({"teacher_logit_scale": -1.0}, "^teacher_logit_scale must be"),
        ({"temperature": 0.0}, "temperature must be a positive number .*, got 0.0"),
        ({"temperature": NAN}, "temperature must be"),
        ({"grad_scale": 3.0}, "grad_scale must be a power of two in .*, got 3.0"),
        ({"logits_budget_bytes": 0}, "logits_budget_bytes must be at least 1, got 0"),
    ]) for operation in (linear_kl, linear_kl_loss)),
    (taylor_statistics, {"grad": _THREE, "act": _THREE}, [
        ({"act": torch.zeros(2, 3, 5)}, r"act must be \(2, 3, 4\) .*got \(2, 3, 5\)"),
        ({"grad": torch.zeros(3, 4), "act": torch.zeros(3, 4)}, r"\(B, S, F\)"),
        ({"act": _THREE.double()}, "act must be .*float32 .*got .*float64"),
        ({"grad": _THREE.long()}, "grad must be .*float tensor"),
        ({"token_mask": torch.ones(2, 3)}, r"token_mask must be \(2, 3\) bool, got .*float32"),
        ({"token_mask": _MASK.T}, r"token_mask must be \(2, 3\) bool"),
        ({"grad_scale": 0.0}, "grad_scale must be a power of two in .*, got 0.0"),
        ({"parity": True, "grad_scale": 2.0}, "no other backend, token_mask"),
        ({"parity": True, "token_mask": _MASK}, "no other backend, token_mask"),
        *(
            ({"parity": True, "backend": name}, "parity=True is plain torch")
            for name in ("triton", "cpp")
        ),
        ({"parity": True, "backend": "cuda"}, "backend must be one of torch, triton"),
    ]),
    (gated_taylor, dict.fromkeys(("grad", "gate"), _THREE) | {"up": torch.zeros(2, 3, 4)}, [
        ({"gate": torch.zeros(2, 3, 5)}, r"gate must be \(2, 3, 4\) .*got \(2, 3, 5\)"),
        ({"up": _THREE.double()}, "up must be .*float32 .*got .*float64"),
        ({"out": (torch.zeros(2, 3, 4), torch.zeros(3, 4))}, "d_up must be"),
        ({"out": (_THREE, _THREE), "overwrite": True}, "exclude each other"),
        ({"activation": "relu"}, "activation must be one of silu, gelu, gelu_tanh, got 'relu'"),
        *(
            ({"parity": True, "backend": name}, "parity=True is plain torch")
            for name in ("triton", "cpp")
        ),
        ({"up": _THREE, "overwrite": True}, "the same tensor"),
        ({"out": (_THREE, _THREE)}, "the same tensor"),
        ({"gate": torch.zeros(4).expand(2, 3, 4), "overwrite": True}, "one stride over B and S"),
        (
            {"gate": torch.zeros(20).as_strided((2, 3, 4), (6, 2, 1)), "overwrite": True},
            "one stride over B and S",
        ),
    ]),
    (partial(rms_norm, eps=1e-5), {"x": _THREE, "weight": torch.ones(4)}, [
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, r"x must be a \(\.\.\., D\) float tensor"),
        ({"weight": torch.ones(3)}, r"weight must be \(4,\) torch.float32 as x is, got \(3,\)"),
        ({"weight": torch.ones(4).double()}, "weight must be .*float32 .*got .*float64"),
        ({"weight": torch.ones(4, requires_grad=True)}, "weight must be frozen"),
        ({"eps": -1.0}, r"eps must be a number in 0 \.\. 1, got -1.0"),
        ({"eps": NAN}, "eps must be"),
        ({"form": "t5"}, "form must be one of llama, gemma, olmo2, got 't5'"),
    ]),
    (rotary, dict.fromkeys(("q", "k"), torch.zeros(2, 1, 3, 4)) | {"cos": _THREE, "sin": _THREE}, [
        ({"q": torch.zeros(2, 3, 4)}, r"q must be a \(B, H, T, Dh\) float tensor, .*\(2, 3, 4\)"),
        ({"q": torch.zeros(2, 1, 3, 5)}, "Dh even"),
        ({"k": torch.zeros(2, 1, 4, 4)}, r"k must be \(2, K, 3, 4\) .*got \(2, 1, 4, 4\)"),
        ({"k": torch.zeros(2, 1, 3, 4).half()}, "k must be .*float32 .*got .*float16"),
        ({"cos": torch.zeros(2, 3, 2)}, r"cos must be \(2 or 1, 3, 4\) .*got \(2, 3, 2\)"),
        ({"sin": _THREE.double()}, "sin must be .*float32, got .*float64"),
        ({"sin": torch.zeros(1, 3, 4, requires_grad=True)}, "sin gets no gradient"),
    ]),
]  # fmt: skip
REFUSED = [
    (operation, good | change, message)
    for operation, good, cases in _REFUSED
    for change, message in cases
]
# And each argument by turns on another device than the others.
REFUSED += [
    (operation, good | {name: tensor.to("meta")}, "must be .*on (cpu|meta)")
    for operation, good, _ in _REFUSED
    if len(good) > 1
    for name, tensor in good.items()
]
