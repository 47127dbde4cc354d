"""The least squares of one down_proj: sums over tokens, a ridge chosen on held-out ones, a fit.

The ridge λ pulls the fit towards the dense weight. How much of it is best belongs to the layer and
the text: a layer that few tokens a neuron are fitted to needs more. It is chosen among `RIDGES` by
the mean squared error on sequences that the fit does not see, after which the fit is to all of
them. Errors are compared in `RIDGE_DIRECTIONS` random directions of the output, which order the
ridges as all of them do, at a part of the products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_fast.engine.planner import RIDGE_DIRECTIONS
from hfprune_fast.errors import NumericsError
from hfprune_fast.scoring.moments import add_gram, check_moments, mirror
from hfprune_fast.scoring.obs import cholesky

DEFAULT_RIDGE = 0.1  # where no tokens are held out, or no act of them is other than 0
RIDGES = (0.01, 0.03, DEFAULT_RIDGE, 0.3, 1.0, 3.0)
_LEAST_OF_LARGEST, _LEAST_OF_MEDIAN = 1e-12, 1e-2  # of the mean squares of acts


@dataclass
class _Sums:
    """Over tokens: those of a aᵀ, (K, K), and of y aᵀ, (D, K), fp64, and how many there were."""

    gram: Tensor
    cross: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, weight: Tensor) -> _Sums:
        gram = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
        return cls(gram, gram.new_zeros(weight.shape))

    def add(self, acts: Tensor, targets: Tensor, weights: Tensor | None) -> None:
        if weights is None:
            add_gram(self.gram, acts)
            weighted = acts.to(targets.dtype)
        else:
            acts = acts.to(targets.dtype)
            weighted = acts * weights
            add_gram(self.gram, acts, weighted)
        self.cross += targets.t() @ weighted
        self.tokens += len(acts)

    def complete(self, layer: int) -> None:
        """Fill in the half that `add` leaves out; refuse NaN and inf, naming the layer."""
        check_moments(self.gram, layer)
        mirror(self.gram)


class NormalEquations:
    """What a fit of V to y ≈ V a needs of the tokens.

    Args:
        weight: (D, K), the dense weight of the kept neurons, which the ridge pulls V towards.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._fitted = _Sums.of(weight)
        self._held: _Sums | None = None  # of held-out tokens

    @property
    def tokens(self) -> int:
        return self._fitted.tokens + (0 if self._held is None else self._held.tokens)

    def add(
        self, acts: Tensor, targets: Tensor, weights: Tensor | None = None, *, held_out: int = 0
    ) -> None:
        """Add tokens.

        Args:
            acts: (n, K).
            targets: (n, D), y, in fp32 at least.
            weights: (n, 1), how much each token counts; None counts all alike.
            held_out: so many of the last ones choose the ridge.
        """
        split = len(acts) - held_out
        parts = [(self._fitted, slice(split))] if split else []
        if held_out:
            self._held = self._held or _Sums.of(self.weight)
            parts.append((self._held, slice(split, None)))
        for sums, part in parts:
            sums.add(acts[part], targets[part], None if weights is None else weights[part])

    def solve(self, layer: int) -> Tensor:
        """Return V, (D, K) float64; the sums are gone then.

        Raises:
            NumericsError: the acts or targets hold NaN or inf; it names the layer.
        """
        sums, held, tokens, ridge = self._fitted, self._held, self.tokens, DEFAULT_RIDGE
        del self._fitted, self._held
        sums.complete(layer)
        if held is not None:
            held.complete(layer)
            if _has_acts(sums) and _has_acts(held):
                ridge = _best_ridge(sums, held, self.weight)
            sums.gram += held.gram
            sums.cross += held.cross
        gram, cross = sums.gram.div_(tokens), sums.cross.div_(tokens)
        if not bool(cross.isfinite().all()):
            raise NumericsError(f"NaN or inf in the residual stream of layer {layer}; try float32")
        return least_squares(gram, cross, self.weight, ridge=ridge)


def _has_acts(sums: _Sums) -> bool:
    """Whether there are acts that are not 0: without any, all ridges give one error."""
    return bool(sums.gram.diagonal().any())


def _best_ridge(fitted: _Sums, held: _Sums, weight: Tensor) -> float:
    """Return the ridge whose fit to some tokens has the least squared error on the others."""
    cross, held_cross, wide = fitted.cross, held.cross, weight.to(fitted.cross.dtype)
    if len(weight) > RIDGE_DIRECTIONS:
        drawn = torch.Generator().manual_seed(0)
        mixed = torch.randn(RIDGE_DIRECTIONS, len(weight), dtype=cross.dtype, generator=drawn)
        mixed = mixed.to(cross.device)
        cross, held_cross, wide = (mixed @ each for each in (cross, held_cross, wide))

    def error(ridge: float) -> float:  # less what no ridge changes
        v = least_squares(fitted.gram.clone(), cross, wide, ridge=ridge)
        return float((v @ held.gram).sub_(held_cross, alpha=2).mul_(v).sum())

    return min(RIDGES, key=error)


def least_squares(gram: Tensor, cross: Tensor, weight: Tensor, *, ridge: float) -> Tensor:
    """Return the V that minimises mean‖y - V a‖² + λ Σ_j mean(a_j²)·‖v_j - weight_j‖².

    The pull is in proportion to each act's own mean square, so that nothing changes if an act is
    scaled and its column divided by as much. In proportion to the mean of all it would be far above
    most where a neuron makes massive activations: in layer 11 of SmolLM2-135M 680 times the median.
    A neuron that says next to nothing on this text, though, would be fitted to noise by a column as
    large, and may say something on another: see `_pulls`.

    Args:
        gram: (K, K) float64, mean of a aᵀ; overwritten.
        cross: (D, K) float64, mean of y aᵀ.
        weight: (D, K), what the ridge pulls V towards.
        ridge: λ.

    Returns:
        (D, K) float64.

    Raises:
        NumericsError: gram, with the ridge, contains NaN or is not positive definite.
    """
    wide = weight.to(gram.dtype)
    pulls = _pulls(gram, wide, ridge)
    right = cross + pulls * wide
    solved: Tensor = torch.cholesky_solve(right.t(), cholesky(gram, pulls))
    return solved.t()


def _pulls(gram: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """Return what is added to the diagonal, (K,): λ times it, or times the least that counts.

    That is a hundredth of the median, of the mean squares of the acts or of what they write by
    `weight`, whichever takes the smaller act; and a little where most acts are 0.
    """
    squares, norms = gram.diagonal(), weight.square().sum(0)
    written = (squares * norms).median() / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    least = _LEAST_OF_MEDIAN * torch.minimum(squares.median(), written)
    largest = squares.max()
    least = torch.maximum(least, torch.where(largest > 0, _LEAST_OF_LARGEST * largest, 1))
    return ridge * squares.clamp(min=least)
