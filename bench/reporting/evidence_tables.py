"""The tables of docs/evidence.md and README.md: what `fidelity.py` and `samples.py` measured.

Words are written by hand, tables are put under their headings, and README's under a row that begins
as it does here. A number with a decimal point in the claims must be in a table of the page.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import mean

import ablation_tables
import samples_tables
from fidelity_tables import SHOWN_RATIOS as RATIOS
from fidelity_tables import Measured, named, span
from fidelity_variants import (
    BASELINES,
    DEFAULT,
    FLAP,
    FLAP_GRAIL,
    LLM_PRUNER,
    MEASURED,
    PAPER,
    PUBLISHED,
    ROUNDED,
    SDMPRUNE,
    UNIFORM,
    WANDA_GRAIL,
    WANDA_SP,
    Variant,
)
from report_text import number, table, under

Link = Callable[[Path], str]
CLAIMS, OTHERS, ELSEWHERE, SMALL, PARTS, CRITERIA, WINDOWS = (
    f"## {title}\n\n"
    for title in (
        "Claims", "Against other methods", "On other texts, and in generation", "On small models",
        "What each part gives", "Which criterion", "How many calibration windows",
    )
)  # fmt: skip
REAL, MIXED = "smollm2-135m", "smollm2-135m-mixed"  # the same, calibrated on several kinds of text
README_ROW = "20% of the neurons removed by"
_IN_README = (
    PAPER,
    DEFAULT,
    UNIFORM,
    WANDA_SP,
    FLAP,
    WANDA_GRAIL,
    FLAP_GRAIL,
    LLM_PRUNER,
    SDMPRUNE,
)
_OURS = {
    DEFAULT: "**ours**",
    UNIFORM: "**ours, uniform widths**",
    MEASURED: "ours, allocation measured",
    ROUNDED: "ours, widths rounded for quantisers",
}
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
    real, mixed = ([m for m in models if m.header["model"] == each] for each in (REAL, MIXED))
    small = [model for model in models if model not in real + mixed]
    tables = {
        OTHERS: [line for model in real for line in others(model, link)],
        ELSEWHERE: [line for model in real + mixed for line in elsewhere(model)],
        SMALL: list(small_models(small, link)),
        PARTS: list(ablation_tables.parts(small + real)),
        CRITERIA: list(ablation_tables.criteria(small + real)),
        WINDOWS: samples_tables.section(samples) if samples else [],
    }
    for heading, lines in tables.items():
        if heading in text:  # else `lost_headings` says so
            text = under(text, heading, ("\n".join(lines) or "Nothing yet.").rstrip() + "\n")
    return text


def name(variant: Variant) -> str:
    """Return what a method is called in words."""
    if variant == PAPER:
        return "HFPrune, the paper's recipe"
    if variant in _OURS:
        return _OURS[variant]
    even = ", even widths" if variant.criterion == "flap" and variant.allocation != "global" else ""
    return _NAMES[variant.criterion] + _CORRECTIONS.get(variant.correction, "") + even


def others(model: Measured, link: Link) -> list[str]:
    """Return all methods on a model, at each ratio a table, the closest to the dense model last."""
    lines = [_caption(model, link)]
    columns = ["method", "seeds", "KL, nats", "× the paper's", "perplexity", "top-1", "top-5"]
    for ratio in model.ratios:
        cells = [columns]
        for variant in _ranked(model, ratio):
            seeds = str(len(model.of(variant, ratio)))
            against = span(model.against_paper(variant, ratio), "{:.2f}".format)
            nats, *others = _cells(model, variant, ratio)
            cells.append([name(variant), seeds, nats, against, *others])
        lines += ["", f"{_removed(model, ratio)}:", "", *table(cells)]
    return lines


def elsewhere(model: Measured) -> Iterator[str]:
    """Yield what was measured on further texts too, and by greedy continuations."""
    texts = {"": model.header["texts"][1], **model.also}
    generated = next((row["generated"] for row in model.rows if "generated" in row), None)
    cells = [["removed", "method", *texts.values()]]
    if generated:
        cells[0] += ["common prefix", "equal tokens"]
    for ratio in (r for r in RATIOS if r in model.ratios):
        for variant in _ranked(model, ratio):
            if any(model.nats(variant, ratio, text) for text in model.also):
                seeds = set.intersection(*(set(model.nats(variant, ratio, t)) for t in model.also))
                on_all = model.with_seeds(seeds)
                shown = (_with_ratio(on_all, variant, ratio, text) for text in texts)
                cells.append([f"{ratio:.0%}", name(variant), *shown])
                if generated:
                    of = [r["generated"] for r in model.of(variant, ratio) if "generated" in r]
                    cells[-1] += [
                        span((g["common_prefix"] for g in of), "{:.1f}".format),
                        span((g["equal_tokens"] for g in of), "{:.1%}".format),
                    ]
    if not cells[1:]:
        return
    caption = (
        "KL(dense ‖ pruned) in nats on each text, and times that of the paper's recipe there with "
        f"the same seed; all are calibrated on {model.header['texts'][0]}."
    )
    if generated:
        caption += (
            " Greedy continuations of {prompts} prompts of {prompt_tokens} tokens, {new_tokens} "
            "tokens each: how many come before the first that is not the dense model's, and the "
            "share that is equal at the same place.".format(**generated)
        )
    yield from (caption, "", *table(cells, 2), "")


def _with_ratio(model: Measured, variant: Variant, ratio: float, text: str) -> str:
    """Return the cell of KL on a text, and of its ratio to the paper's with the same seed."""
    against = model.against_paper(variant, ratio, text)
    times = f" ({mean(against):.2f} ×)" if against else ""
    return span(model.nats(variant, ratio, text).values(), number) + times


def readme(text: str, models: Iterable[Measured]) -> str:
    """Return README.md with the table of the first ratio of the real model."""
    for model in (model for model in models if model.header["model"] == REAL):
        before, heading, rest = text.partition(f"| {README_ROW}")
        if heading:
            columns = [README_ROW, "KL, nats", "perplexity", "top-1", "top-5"]
            dense = [
                "nothing: the dense model",
                "0",
                f"{model.rows[0]['ppl_dense']:.2f}",
                "100%",
                "100%",
            ]
            ranked = [v for v in _ranked(model, RATIOS[0]) if v in _IN_README]
            # All methods on the same calibration tokens.
            common = set.intersection(*(set(model.nats(v, RATIOS[0])) for v in ranked))
            model = model.with_seeds(common)
            cells = [[name(v), *_cells(model, v, RATIOS[0])] for v in reversed(ranked)]
            after = rest[rest.index("\n\n") :]
            text = before + "\n".join(table([columns, dense, *cells])) + after
    return text


def _ranked(model: Measured, ratio: float) -> list[Variant]:
    """Return what was measured at a ratio, the closest to the dense model last."""
    measured = [v for v in BASELINES if model.of(v, ratio)]
    return sorted(measured, key=lambda v: -mean(row["kl_nats"] for row in model.of(v, ratio)))


def _cells(model: Measured, variant: Variant, ratio: float) -> list[str]:
    rows = model.of(variant, ratio)
    return [
        span((row["kl_nats"] for row in rows), number),
        span((row["ppl_pruned"] for row in rows), lambda p: f"{p:.2f}" if p < 1000 else number(p)),
        span((row["top1_agreement"] for row in rows), "{:.1%}".format),
        # Older files have no top-5 agreement.
        span((r["top5_agreement"] for r in rows if "top5_agreement" in r), "{:.1%}".format),
    ]


def _removed(model: Measured, ratio: float) -> str:
    return (
        f"{ratio:.0%} of the neurons removed, {model.removed(ratio):.1%} of all weights; the dense "
        f"perplexity is {model.rows[0]['ppl_dense']:.2f}"
    )


def _caption(model: Measured, link: Link) -> str:
    header, first = model.header, model.rows[0]
    calibration, (text, held_out) = header["calibration"], header["texts"]
    tokens = calibration["samples"] * calibration["seq_len"]
    return (
        f"{named(model)}: {calibration['samples']} calibration windows of {calibration['seq_len']} "
        f"tokens of {text}, {tokens:,} in all, drawn with seeds {model.seeds}; a column has how "
        f"many of them a row has. Measured on {first['tokens']:,} tokens of {held_out}. Mean over "
        f"the seeds (lowest–highest). {model.runs}. "
        f"[All rows]({link(model.path.with_suffix('.md'))})."
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
            against = {v: model.against_paper(v, ratio) for v in (DEFAULT, UNIFORM, *PUBLISHED)}
            rivals = [v for v in PUBLISHED if against[v]]
            best = min(rivals, key=lambda v: sum(against[v]) / len(against[v]), default=None)
            cells.append([
                f"[{named(model)}]({link(model.path.with_suffix('.md'))})", f"{ratio:.0%}",
                *(span(against[v], "{:.2f}".format) for v in (DEFAULT, UNIFORM)),
                *((span(against[best], "{:.2f}".format), name(best)) if best else ("", "")),
            ])  # fmt: skip
    yield from table(cells, 2)


def unsupported_claims(text: str) -> list[str]:
    """Return the numbers with a decimal point in the claims that no table of the page has."""
    claims = text.partition(CLAIMS)[2].partition("\n## ")[0]
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    known = set(re.findall(r"\d+\.\d+", tables))
    return [found for found in re.findall(r"\d+\.\d+", claims) if found not in known]


def lost_headings(evidence: str | None, readme: str | None) -> Iterator[str]:
    """Yield a line for each place of a table or of the claims that is not in the text any more.

    Nothing would be compared there.
    """
    headings = (CLAIMS, OTHERS, ELSEWHERE, SMALL, PARTS, CRITERIA, WINDOWS)
    for file, text, places in (
        ("docs/evidence.md", evidence, headings),
        ("README.md", readme, (f"| {README_ROW}",)),
    ):
        for place in places:
            if text is not None and place not in text:
                yield f"{file}: nothing begins with {place.strip()!r}, so that it is not compared"
