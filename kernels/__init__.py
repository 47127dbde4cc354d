"""The operations behind the scores, as plain functions of tensors.

They depend on nothing else in the package: any pruning pipeline can call them.
"""

from hfprune_fast.kernels._cpp import CPP_INSTRUCTIONS, CPP_UNUSED_REASON
from hfprune_fast.kernels._dispatch import BACKENDS, resolve_backend
from hfprune_fast.kernels._head import (
    LOGITS_BUDGET_BYTES,
    LOGITS_BUDGET_ROWS,
    slow_on_this_cpu,
)
from hfprune_fast.kernels._triton import TRITON_VERSION
from hfprune_fast.kernels.entropy import (
    softmax_entropy,
    softmax_entropy_grad_,
    softmax_entropy_grad_reference,
)
from hfprune_fast.kernels.gated_taylor import gated_taylor, gated_taylor_reference
from hfprune_fast.kernels.kl import softmax_kl_grad_
from hfprune_fast.kernels.linear_criteria import (
    linear_cross_entropy,
    linear_cross_entropy_loss,
    linear_cross_entropy_reference,
    linear_fisher,
    linear_self_distillation,
)
from hfprune_fast.kernels.linear_entropy import linear_entropy, linear_entropy_reference
from hfprune_fast.kernels.linear_kl import linear_kl, linear_kl_loss, linear_kl_reference
from hfprune_fast.kernels.rms_norm import rms_norm, rms_norm_reference
from hfprune_fast.kernels.rotary import rotary, rotary_reference
from hfprune_fast.kernels.taylor import (
    TaylorStatistics,
    taylor_statistics,
    taylor_statistics_reference,
)

__all__ = [
    "BACKENDS",
    "CPP_INSTRUCTIONS",
    "CPP_UNUSED_REASON",
    "LOGITS_BUDGET_BYTES",
    "LOGITS_BUDGET_ROWS",
    "TRITON_VERSION",
    "TaylorStatistics",
    "gated_taylor",
    "gated_taylor_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_loss",
    "linear_cross_entropy_reference",
    "linear_entropy",
    "linear_entropy_reference",
    "linear_fisher",
    "linear_kl",
    "linear_kl_loss",
    "linear_kl_reference",
    "linear_self_distillation",
    "resolve_backend",
    "rms_norm",
    "rms_norm_reference",
    "rotary",
    "rotary_reference",
    "slow_on_this_cpu",
    "softmax_entropy",
    "softmax_entropy_grad_",
    "softmax_entropy_grad_reference",
    "softmax_kl_grad_",
    "taylor_statistics",
    "taylor_statistics_reference",
]
