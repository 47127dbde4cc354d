"""How far from the truth a result may be (design.md, section 8): derived, never tuned."""

import math

import torch
from torch import Tensor


def relative_error(got: Tensor, truth: Tensor) -> Tensor:
    """||got - truth|| / ||truth|| in the 2-norm of the last axis: one number a layer for (L, F)."""
    difference = torch.linalg.vector_norm(got.double() - truth.double(), dim=-1)
    size = torch.linalg.vector_norm(truth.double(), dim=-1)
    return torch.where(difference == 0, 0.0, difference / size)


def assert_no_worse(ours: Tensor, eager: Tensor, truth: Tensor, *, floor: float) -> None:
    """Raise unless, in every layer, error(ours) <= 2 * error(eager torch, same dtype) + floor.

    The error is relative_error. Norm-wise, because rounding of a sum over all of D or F leaves an
    error in proportion to the vector's norm: a neuron whose terms cancel may keep no correct digit.
    Per layer, because neurons compete within a layer. Twice, because both errors are sums of the
    same roundings in another order, two draws from one distribution. floor covers an eager error
    near 0: state it in units of rounding. One lost neuron is an error of about 1 / sqrt(F), so
    choose F such that this stands well above the bound.
    """
    if not ours.shape == eager.shape == truth.shape:
        shapes = [tuple(tensor.shape) for tensor in (ours, eager, truth)]
        raise AssertionError(f"shapes differ: ours, eager and truth are {shapes}")
    ours_error, eager_error = relative_error(ours, truth), relative_error(eager, truth)
    bound = 2 * eager_error + floor
    # Comparisons with NaN are false, so a NaN anywhere fails; an infinite bound would pass all.
    held = (ours_error <= bound) & (bound < torch.inf)
    if not held.all():
        row = int((~held).flatten().nonzero()[0])
        mine, theirs = ours_error.flatten()[row], eager_error.flatten()[row]
        raise AssertionError(
            f"layer {row}: error {mine:.3e}, allowed 2 * {theirs:.3e} (eager) + {floor:.1e} "
            f"(floor); {int((~held).sum())} of {held.numel()} layers are out"
        )


def assert_no_worse_together(ours: Tensor, eager: Tensor, truth: Tensor, *, floor: float) -> None:
    """Raise unless error(ours) <= 2 * error(eager) + floor of the root mean square over N draws.

    All are (N, ..., F). The rule of `assert_no_worse`, where one draw is of few roundings: a sum of
    squares over few tokens has the error of its largest, one number that twice another of the same
    distribution exceeds in 30 % of the cases (Cauchy: 2 / pi * atan(1 / 2)). Two mean squares of N
    such numbers are in a ratio of the F distribution, above 4 in 1 % of the cases for N = 12 and
    0.4 % for N = 16, if each draw had one independent number only.
    """
    assert ours.shape == eager.shape == truth.shape
    errors = (relative_error(each, truth).square().mean(0).sqrt() for each in (ours, eager))
    mine, theirs = errors
    assert theirs.isfinite().all()
    assert (mine <= 2 * theirs + floor).all(), (mine, theirs)


def keep_differences_inside_band(
    scores_ours: Tensor, scores_truth: Tensor, keep_ours: Tensor, keep_truth: Tensor
) -> int:
    """Return the number of neurons in exactly one keep set; raise unless rounding explains them.

    Scores (F,) of one ranking: a layer, or all layers flattened if they share a cut. keep (K,)
    int64 indices into it. Let i be kept by ours only, j by the truth only, and
    err = |scores_ours - scores_truth|. Each side kept its own best, so for every such pair
        0 <= truth_j - truth_i <= (truth_j - ours_j) + (ours_i - truth_i) <= err_j + err_i,
    that is max_j (truth_j - err_j) <= min_i (truth_i + err_i). This judges the selection; whether
    scores_ours are good enough is for assert_no_worse to say first.
    """
    ours, truth = scores_ours.double(), scores_truth.double()
    if ours.shape != truth.shape or truth.ndim != 1:
        raise AssertionError(f"scores must be (F,): {tuple(ours.shape)}, {tuple(truth.shape)}")
    if not (ours.isfinite().all() and truth.isfinite().all()):
        raise AssertionError("scores are not finite")
    masks = []
    for name, keep in (("keep_ours", keep_ours), ("keep_truth", keep_truth)):
        if ((keep < 0) | (keep >= len(truth))).any() or len(set(keep.tolist())) != len(keep):
            raise AssertionError(f"{name} must hold distinct indices in [0, {len(truth)})")
        masks.append(torch.zeros(len(truth), dtype=torch.bool).index_fill(0, keep, True))
    kept_ours, kept_truth = masks
    if kept_ours.sum() != kept_truth.sum():
        raise AssertionError(f"kept {int(kept_ours.sum())} neurons, not {int(kept_truth.sum())}")
    dropped, kept = truth[~kept_truth].tolist(), truth[kept_truth].tolist()
    if min(kept, default=math.inf) < max(dropped, default=-math.inf):
        raise AssertionError("keep_truth does not hold the best neurons of scores_truth")

    gained, lost = kept_ours & ~kept_truth, kept_truth & ~kept_ours
    if not lost.any():
        return 0
    err = (ours - truth).abs()
    lowest_gained, highest_lost = (truth + err)[gained].min(), (truth - err)[lost].max()
    # The lines above round too; their last bits would matter where err is about the gap.
    slack = 4 * torch.finfo(torch.float64).eps * truth.abs().max()
    if highest_lost > lowest_gained + slack:
        raise AssertionError(
            f"{int(lost.sum())} swaps, not all by rounding: a neuron ours dropped scores, less its "
            f"error, {highest_lost:.6e}; one ours kept scores, plus its error, {lowest_gained:.6e}"
        )
    return int(gained.sum() + lost.sum())
