"""The tables of docs/evidence.md: what `fidelity.py` and `samples.py` measured, beside its claims.

Words are written by hand, tables are put under these headings. Every number of the claims with a
decimal point, or a percent sign, must be in a table of the page: a test holds that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import samples_tables
from fidelity_tables import Measured, named, span
from fidelity_variants import BASELINES, DEFAULT, PAPER, PUBLISHED, UNIFORM, Variant
from report_text import commit, hardware, number, table

Link = Callable[[Path], str]
CLAIMS, OTHERS, SMALL, WINDOWS = (
    f"## {title}\n\n"
    for title in (
        "Claims", "Against other methods", "On small models", "How many calibration windows",
    )
)  # fmt: skip
REAL = "smollm2-135m"
RATIOS = (0.2, 0.3, 0.5)
_NAMES = {
    "wanda_sp": "Wanda-SP", "flap": "FLAP", "llm_pruner": "LLM-Pruner's Taylor term",
    "sdmprune": "SDMPrune", "magnitude": "magnitude", "random": "at random",
}  # fmt: skip
_CORRECTIONS = {
    "bias": " with its bias",
    "grail": " with GRAIL",
    "grail, in turn": " with GRAIL, layers in turn",
}


def path(root: Path) -> Path:
    return root / "docs" / "evidence.md"


def page(text: str, models: list[Measured], samples: list[Measured], link: Link) -> str:
    """Return docs/evidence.md with the tables under their headings."""
    real = [model for model in models if model.header["model"] == REAL]
    small = [model for model in models if model.header["model"] != REAL]
    tables = {
        OTHERS: [line for model in real for line in others(model, link)],
        SMALL: list(small_models(small, link)),
        WINDOWS: samples_tables.section(samples) if samples else [],
    }
    for heading, lines in tables.items():
        before, _, rest = text.partition(heading)
        after = rest[rest.index("\n## ") :]
        text = before + heading + "\n".join([*(lines or ["Nothing yet."]), ""]) + after
    return text


def name(variant: Variant) -> str:
    """Return what a method is called in words."""
    if variant == PAPER:
        return "HFPrune, the paper's recipe"
    if variant in (UNIFORM, DEFAULT):
        return "**ours**" if variant == DEFAULT else "**ours, uniform widths**"
    even = ", even widths" if variant.criterion == "flap" and variant.allocation != "global" else ""
    return _NAMES[variant.criterion] + _CORRECTIONS.get(variant.correction, "") + even


def others(model: Measured, link: Link) -> list[str]:
    """Return all methods on a model, the closest to the dense model last."""
    header, ratios = model.header, [r for r in RATIOS if r in model.ratios]

    def kl(variant: Variant) -> float:
        rows = model.of(variant, ratios[0])
        return -min((row["kl_nats"] for row in rows), default=0.0)

    measured = sorted((v for v in BASELINES if model.of(v, ratios[0])), key=kl)
    columns = ("KL, nats", "× the paper's", "perplexity", "top-1", "top-5")
    lines = [_told(model, link)]
    for ratio in ratios:
        cells = [["method", *columns]]
        for variant in measured:
            rows = model.of(variant, ratio)
            if rows:
                cells.append([
                    name(variant),
                    span((row["kl_nats"] for row in rows), number),
                    span(model.against_paper(variant, ratio), "{:.2f}".format),
                    span((row["ppl_pruned"] for row in rows), "{:.2f}".format),
                    span((row["top1_agreement"] for row in rows), "{:.1%}".format),
                    span((row["top5_agreement"] for row in rows), "{:.1%}".format),
                ])  # fmt: skip
        removed = f"{ratio:.0%} of the neurons removed, {model.removed(ratio):.1%} of all weights"
        lines += ["", f"{removed}; the dense perplexity is {model.rows[0]['ppl_dense']:.2f}:", ""]
        lines += table(cells)
    assert header
    return lines


def _told(model: Measured, link: Link) -> str:
    header, first = model.header, model.rows[0]
    calibration, (text, held_out) = header["calibration"], header["texts"]
    seeds = ", ".join(map(str, sorted({row["seed"] for row in model.rows})))
    tokens = calibration["samples"] * calibration["seq_len"]
    return (
        f"{named(model)}: {calibration['samples']} calibration windows of {calibration['seq_len']} "
        f"tokens of {text}, {tokens:,} in all, drawn with seed {seeds}; measured on "
        f"{first['tokens']:,} tokens of {held_out}. {hardware(header)}, {header['date'][:10]}, "
        f"{commit(header)}. [All rows]({link(model.path.with_suffix('.md'))})."
    )


def small_models(models: list[Measured], link: Link) -> Iterator[str]:
    """Yield a row a model and ratio: ours and the closest other method, beside the paper's."""
    yield (
        "KL(dense ‖ pruned) on held-out text, times that of the paper's recipe with the same seed; "
        "mean over the seeds (lowest–highest)."
    )
    yield ""
    cells = [["model", "removed", "ours", "ours, uniform widths", "closest other method", ""]]
    for model in models:
        for ratio in (r for r in RATIOS if r in model.ratios):
            told = {v: model.against_paper(v, ratio) for v in (DEFAULT, UNIFORM, *PUBLISHED)}
            rivals = [v for v in PUBLISHED if told[v]]
            best = min(rivals, key=lambda v: sum(told[v]) / len(told[v]), default=None)
            cells.append([
                f"[{named(model)}]({link(model.path.with_suffix('.md'))})", f"{ratio:.0%}",
                *(span(told[v], "{:.2f}".format) for v in (DEFAULT, UNIFORM)),
                *((span(told[best], "{:.2f}".format), name(best)) if best else ("", "")),
            ])  # fmt: skip
    yield from table(cells, 2)


def unsupported_claims(text: str) -> list[str]:
    """Return the numbers of the claims that no table of the page has."""
    claims = text.partition(CLAIMS)[2].partition("\n## ")[0]
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    known = set(re.findall(r"\d[\d,]*(?:\.\d+)?%?", tables))
    said = re.findall(r"\d[\d,]*\.\d+%?|\d+%", claims.replace(" %", "%"))
    return [number for number in said if number not in known]
