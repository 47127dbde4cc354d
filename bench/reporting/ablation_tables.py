"""Tables of docs/evidence.md: what each part of the default recipe gives, and each criterion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fidelity_tables import SHOWN_RATIOS as RATIOS
from fidelity_tables import Measured, span
from fidelity_variants import DEFAULT, PAPER, UNIFORM, Variant
from report_text import table

CRITERIA = ("entropy", "fisher", "cross_entropy", "self_distillation")
PARTS = {
    "entropy l1, across layers": replace(PAPER, allocation="global"),
    "entropy l1, refit": replace(PAPER, refit=True),
    "ranked by removal costs": replace(UNIFORM, refit=False),
    "removal costs, refit": UNIFORM,
    "removal costs, refit, widths by KL: ours": DEFAULT,
}


def parts(models: list[Measured]) -> Iterator[str]:
    """Yield a row a model: ranking, refit and allocation, added one after the other."""
    yield (
        "KL(dense ‖ pruned) relative to the paper's recipe with the same seed, "
        f"{RATIOS[0]:.0%} of the neurons removed; widths are uniform unless a column says "
        "otherwise. Mean over the seeds (lowest–highest)."
    )
    yield ""
    cells = [["model", *PARTS]]
    for model in models:
        against = [model.against_paper(variant, RATIOS[0]) for variant in PARTS.values()]
        cells.append([model.header["model"], *(span(each, "{:.2f}".format) for each in against)])
    yield from table(cells)


def criteria(models: list[Measured]) -> Iterator[str]:
    """Yield a row a model, ratio and statistic: KL of each criterion by rank alone."""
    yield (
        "KL(dense ‖ pruned) relative to the paper's recipe (entropy, l1) with the same seed. "
        "Neurons are removed by rank alone: uniform widths, no refit. Mean over the seeds "
        "(lowest–highest). Every criterion takes one forward and one backward pass."
    )
    yield ""
    cells = [["model", "removed", "statistic", *CRITERIA]]
    for model in models:
        for ratio in (r for r in RATIOS if r in model.ratios):
            for statistic in ("l1", "l2"):
                against = [model.against_paper(Variant(c, statistic), ratio) for c in CRITERIA]
                if sum(map(bool, against)) > 1:
                    start = model.header["model"], f"{ratio:.0%}", statistic
                    cells.append([*start, *(span(each, "{:.2f}".format) for each in against)])
    yield from table(cells, 3)
