"""The cost of removing neurons from one MLP when the others are refitted, in closed form.

The MLP's output is y = W a, W its down_proj (D, F) and a its act. For refitted weights V, in which
the columns of removed neurons are zero, the error is

    E(V) = tr((V - W) A (V - W)ᵀ C)      A = mean(a aᵀ) + λ·mean(diag)·I      C (D, D)

with C the metric in which outputs are compared: the identity, or the covariance of the gradient of
log p(y) there, y drawn from the model (K-FAC's output factor), which makes ½E the second-order
estimate of KL(dense || pruned) a token. This is the optimal brain surgeon's problem (Hassibi and
Stork, 1993) for whole columns. Of the remaining neurons, removing j adds

    ‖C^½ v_j‖² / [H]_jj                  H = A⁻¹ of those remaining, v_j column j as refitted so far

and leaves v_k ← v_k - v_j r_k and H ← H - h_j h_jᵀ / H_jj, where h_j = H e_j and r = h_j / H_jj.
Only inner products of columns, M = Vᵀ C V, are needed: M ← M - r qᵀ - q rᵀ, where
q = M e_j - ½ M_jj r. The updates of a block of removals are applied to the F × F matrices as one
product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.checkpoint import native
from hfprune_fast.errors import NumericsError

_COMPACT_BELOW = 0.8  # of the rows; compacting the matrices after each block costs more


def greedy_removal_costs(
    gram: Tensor,
    weight: Tensor,
    metric: Tensor | None = None,
    *,
    ridge: float = 0.01,
    block: int = 128,
) -> Tensor:
    """Return ½ of what each neuron's removal adds to E, always removing the lowest cost first.

    Args:
        gram: (F, F) float64, mean of a aᵀ over the tokens; overwritten.
        weight: (D, F), down_proj's.
        metric: (D, D) C, symmetric and positive semidefinite; None is the identity.
        ridge: λ.
        block: removals between two updates of the F × F matrices; changes only rounding.

    Returns:
        (F,) float64, never decreasing in the order of removal: a removal that costs less than an
        earlier one gets the earlier one's cost. The last neuron has a cost too.

    Raises:
        NumericsError: gram, with the ridge, contains NaN or is not positive definite.

    O(F³) operations, almost all in matrix products; 4 matrices of F × F float64 at a time.
    """
    # Written over gram, to need no further matrix.
    mean = gram.diagonal().mean()
    shift = ridge * torch.where(mean > 0, mean, 1)
    inverse = torch.cholesky_inverse(cholesky(gram, shift), out=gram)
    wide = weight.to(gram.dtype)
    through = wide if metric is None else metric.to(gram.dtype) @ wide
    products = wide.t() @ through
    costs = torch.zeros(len(gram), dtype=gram.dtype, device=gram.device)
    remaining = torch.arange(len(gram), device=gram.device)
    removed = torch.zeros_like(remaining, dtype=torch.bool)
    highest, count = costs.new_zeros(()), len(gram)
    while count:
        removals = min(block, count)
        order, added = _remove(inverse, products, removed, removals)
        added[0] = torch.maximum(added[0], highest)
        added = added.cummax(0).values
        highest = added[-1]
        costs[remaining[order]] = added / 2
        removed[order] = True
        count -= removals
        if count < _COMPACT_BELOW * len(remaining):
            stay = (~removed).nonzero().squeeze(1)
            inverse, products = (
                native.compact_columns(matrix[stay], stay) for matrix in (inverse, products)
            )
            remaining, removed = remaining[stay], removed[stay]
    return costs


def _remove(
    inverse: Tensor, products: Tensor, removed: Tensor, removals: int
) -> tuple[Tensor, Tensor]:
    """Remove a block of neurons from H and M, in place; return which, in order, and their costs."""
    size = len(inverse)
    rows = inverse.new_zeros(3, removals, size)
    rows_h, rows_r, rows_q = rows
    # A removed neuron must not be chosen again; the others' diagonal stays above 1 / max(A).
    diagonal = inverse.diagonal().masked_fill(removed, 1)
    norms = products.diagonal().masked_fill(removed, torch.inf)
    order = torch.zeros(removals, dtype=torch.int64, device=inverse.device)
    added = inverse.new_zeros(removals)
    for i in range(removals):
        # j is not read: on a GPU that would wait for it, twelve times a removal.
        j, (h_i, r, q_i) = order[i : i + 1], rows[:, i : i + 1]
        ratios = norms / diagonal
        torch.argmin(ratios, 0, keepdim=True, out=j)
        torch.index_select(ratios, 0, j, out=added[i : i + 1])
        at_j = rows[:, :i].index_select(2, j).transpose(1, 2)  # (3, 1, i)
        h = torch.addmm(inverse.index_select(0, j), at_j[0], rows_h[:i], alpha=-1)
        q = torch.addmm(products.index_select(0, j), at_j[1], rows_q[:i], alpha=-1)
        q.addmm_(at_j[2], rows_r[:i], alpha=-1)
        h_jj = h.index_select(1, j)
        torch.div(h, h_jj, out=r)
        torch.div(h, h_jj.sqrt_(), out=h_i)
        torch.addcmul(q, q.index_select(1, j), r, value=-0.5, out=q_i)
        diagonal.addcmul_(h_i[0], h_i[0], value=-1).index_fill_(0, j, 1)
        norms.addcmul_(r[0], q_i[0], value=-2).index_fill_(0, j, torch.inf)
    inverse.addmm_(rows_h.t(), rows_h, alpha=-1)
    products.addmm_(rows_r.t(), rows_q, alpha=-1)
    products.addmm_(rows_q.t(), rows_r, alpha=-1)
    return order, added


def cholesky(gram: Tensor, shift: Tensor) -> Tensor:
    """Add shift, () or (F,), to the diagonal of gram (F, F), and return its Cholesky factor.

    Raises:
        NumericsError: gram, with the shift, contains NaN or is not positive definite.
    """
    gram.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:
        raise NumericsError("the activations' second moments are not positive; try float32")
    return torch.as_tensor(factor)
