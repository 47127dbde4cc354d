"""The table of what `fidelity.py` measured of models with experts, for docs/experts.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from fidelity_tables import MIXTURE_HEADER, Measured, mixture_cells, named, span
from fidelity_variants import MIXTURES
from report_text import hardware, number, table, under

_HEADING = "## What was measured\n\n"


def path(root: Path) -> Path:
    return root / "docs" / "experts.md"


def page(text: str, models: list[Measured], link: Callable[[Path], str]) -> str:
    """Return docs/experts.md with the tables under their heading."""
    lines = [line for model in models for line in [*section(model, link), ""]]
    return under(text, _HEADING, "\n".join(lines or ["Nothing yet.", ""]))


def section(model: Measured, link: Callable[[Path], str]) -> list[str]:
    """Return a row a variant: KL, with the lowest and highest, and agreement at each ratio."""
    each = {len(model.of(v, ratio)) for v in MIXTURES for ratio in model.ratios} - {0}
    seeds = " or ".join(map(str, sorted(each)))
    columns = [f"{of}, {ratio:.0%}" for ratio in model.ratios for of in ("KL", "top-1")]
    cells = [MIXTURE_HEADER + columns]
    for variant in MIXTURES:
        row = mixture_cells(variant)
        for ratio in model.ratios:
            rows = model.of(variant, ratio)
            row.append(span([found["kl_nats"] for found in rows], number))
            same = [found["top1_agreement"] for found in rows]
            row.append(f"{mean(same):.3f}" if same else "")
        cells.append(row)
    removed = " and ".join(f"{model.removed(ratio):.1%}" for ratio in model.ratios)
    caption = (
        f"{named(model)}: KL(dense ‖ pruned) in nats on held-out text, mean over {seeds} "
        f"calibration seeds (lowest–highest), and top-1 agreement. All rows of a column are of one "
        f"size: {removed} of all parameters are removed. The dense perplexity is "
        f"{model.rows[0]['ppl_dense']:.2f}. {hardware(model.header)}, {model.header['date'][:10]}; "
        f"perplexities and every spread: [all rows]({link(model.path.with_suffix('.md'))})."
    )
    return [caption, "", *table(cells, len(MIXTURE_HEADER))]
