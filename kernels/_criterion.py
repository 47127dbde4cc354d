"""The functions of a row of logits that are differentiated, and what each needs beside the logits.

For a row z of V logits, with p = softmax(z), d_i = z_i - max(z), e = exp(d), s = Σ e, u = Σ d e:

    entropy        H = -Σ_i p_i log p_i = log s - u/s      dH/dz_i = -p_i (d_i - u/s)
    cross_entropy  -log p_y = log s - d_y                  its gradient p_i - [i = y]
    fisher         the same for a label y drawn from p: the first y, lane by lane, for which the
                   sum of e up to and including e_y is above t s, where t is the uniform number of
                   the row's id (`_philox.py`). Entry i is in lane (i // 8) mod 512; lanes come in
                   ascending order, and so do the entries of each. A kernel sums by lanes, so it
                   finds y from 512 sums and the logits of one lane
    self_distillation  (1-α) · cross_entropy + α · KL(r ‖ p) with r = softmax(z / τ), the teacher,
                   held fixed; its gradient p_i - (1-α) [i = y] - α r_i. With s', u' the sums of
                   exp(d / τ) and d exp(d / τ), KL(r ‖ p) = log s - log s' + (1/τ - 1) u'/s'

in nats; the entropy is the criterion of HFPrune (arXiv 2603.08083), and self_distillation that of
SDMPrune at the dense model, which is its teacher. The mean of the outer products of the fisher
gradients is the Fisher information. Some families transform the logits first,
z ← softcap · tanh(logit_scale · z / softcap); the gradient is then with respect to the logits
before the transform. A masked entry, z_i = -inf, adds exactly 0 and has no gradient, and never NaN.
If the label itself is masked the value is inf. A row without a label has value and gradient 0, and
so has a row that is -inf throughout, unless it has a label (value inf).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

IGNORED_LABEL = -100  # torch's ignore_index
LANES, LANE_WIDTH = 512, 8  # of a row, as fisher draws


@dataclass(frozen=True)
class Criterion:
    """One of the criteria above; `keys` are row ids for fisher and labels for the other two."""

    name: str = "entropy"
    keys: Tensor | None = None  # (T,) int64
    seed: int = 0  # of fisher
    alpha: float = 0.0  # of self_distillation, as is the temperature
    temperature: float = 1.0


ENTROPY = Criterion()
