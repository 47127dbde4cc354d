"""The tables of what `fidelity.py` measured.

A file NAME.jsonl in bench/results/fidelity is a header and then a row a line: a variant, at a
ratio, with a seed, each once. A later run that adds rows adds its header before them. What is shown
is the mean over the seeds, with the lowest and highest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from fidelity_variants import (
    DEFAULT,
    MAGNITUDE,
    PAPER,
    PUBLISHED,
    RANDOM,
    UNIFORM,
    Variant,
    variant_of,
)
from records import RESULTS, ROOT, ResultError, Row
from report_text import commit, grouped, hardware, number, table

Form = Callable[[float], str]
FOLDER = RESULTS / "fidelity"
# What docs/benchmarks.md shows, in this order: the paper's recipe, its criterion's rivals by rank
# alone, then other authors' methods, then what allocation and refit add, one after the other.
SHOWN = (
    RANDOM, MAGNITUDE, PAPER, Variant("entropy", "l2"), Variant("cross_entropy", "l2"),
    Variant("self_distillation", "l2"), Variant("activation", "act"),
    Variant("fisher", "fisher_mask"), Variant("fisher", "l2"),
    Variant("fisher", "obs"), *PUBLISHED, Variant("entropy", "l1", refit=True),
    Variant("fisher", "l2", refit=True), UNIFORM, Variant("entropy", "l1", "global"),
    Variant("fisher", "l2", "global"), Variant("fisher", "l2", "global", refit=True), DEFAULT,
)  # fmt: skip
SHOWN_RATIOS = (0.2, 0.3, 0.5)
HEADER = ["criterion", "statistic", "allocation", "refit"]
MIXTURE_HEADER = ["experts dropped by", "neurons ranked by", "narrowed", "refit"]
_NUMBERS = dict.fromkeys(
    ("prune_ratio", "param_ratio", "kl_nats", "ppl_dense", "ppl_pruned", "top1_agreement"),
    (int, float),
)
NEEDED = {"criterion": str, "statistic": str, "seed": int, "tokens": int, **_NUMBERS}
_OF_SAMPLES = {  # besides, in a row of `samples.py`
    **{"samples": int, "widths": list},
    **dict.fromkeys(("kept_overlap", "score_regret", "squared_error", "cpu_seconds"), (int, float)),
}
_OF_A_TEXT = dict.fromkeys(("kl_nats", "ppl_dense"), (int, float))
_OF_A_HEADER = {
    **{"model": str, "model_type": str, "params": int, "calibration": dict, "texts": list},
    **{"machine": dict, "date": str},
}
_OPTIONAL = {"also": dict, "seq_len": int}  # fields of a header or row


class Measured:
    """A model's rows: of a variant, at a ratio, with a seed."""

    def __init__(self, path: Path, headers: list[Row], rows: list[Row]) -> None:
        self.path, self.headers, self.rows = path, headers, rows
        self.header = headers[0]  # later runs have the same settings
        # Further texts that rows are measured on, some or all: a name, and the file. A run that was
        # interrupted before its first row has added a header alone.
        on = {name for row in rows for name in row.get("also", {})}
        given = {name: file for h in headers for name, file in h.get("also", {}).items()}
        self.also = {name: file for name, file in given.items() if name in on}
        self.ratios = sorted({row["prune_ratio"] for row in rows})
        self.has_experts = any("experts" in row for row in rows)

    @property
    def seeds(self) -> str:
        return ", ".join(map(str, sorted({row["seed"] for row in self.rows})))

    @property
    def runs(self) -> str:
        """The machines on which rows were measured, each with the dates and commits of its runs."""
        of_machines = grouped(self.headers, hardware)
        return "; ".join(
            ", ".join([machine, *dict.fromkeys(f"{h['date'][:10]} {commit(h)}" for h in headers)])
            for machine, headers in of_machines.items()
        )

    def of(self, variant: Variant, ratio: float) -> list[Row]:
        rows = (row for row in self.rows if row["prune_ratio"] == ratio)
        return [row for row in rows if variant_of(row) == variant]

    def with_seeds(self, seeds: Collection[int]) -> Measured:
        """Return the rows of these seeds alone."""
        return Measured(self.path, self.headers, [r for r in self.rows if r["seed"] in seeds])

    def removed(self, ratio: float) -> float:
        """Return the part of all parameters that is removed; rounded widths differ a little."""
        rows = (row for row in self.rows if row["prune_ratio"] == ratio)
        return min(rows, key=lambda row: row.get("rounded", False))["param_ratio"]

    def nats(self, variant: Variant, ratio: float, text: str = "") -> dict[int, float]:
        """Return KL by seed on a text, "" the main one, of the rows that were measured on it."""
        rows = {row["seed"]: row for row in self.of(variant, ratio)}
        if text:
            rows = {seed: row.get("also", {}).get(text) for seed, row in rows.items()}
        return {seed: row["kl_nats"] for seed, row in rows.items() if row}

    def against_paper(self, variant: Variant, ratio: float, text: str = "") -> list[float]:
        """Return the ratios of KL to the paper's with the same seed, where that is above 0."""
        paper, nats = (self.nats(each, ratio, text) for each in (PAPER, variant))
        return [nats[seed] / paper[seed] for seed in nats if paper.get(seed, 0) > 0]


def read(file: Path) -> Measured:
    """Return what is in a file; raise ResultError for another's."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        headers = [line for line in lines if "machine" in line]
        rows = [line for line in lines if "machine" not in line]
        if not headers:
            raise ValueError("no header that says of which model and texts")
        for header in headers:
            _check_fields("a header", header, _OF_A_HEADER)
            sizes = {"samples": int, "seq_len": int}
            _check_fields("a header's calibration", header["calibration"], sizes)
            _check_fields("a header's machine", header["machine"], {"processor": str})
            if len(header["texts"]) != 2:
                raise ValueError(f"a header has {len(header['texts'])} texts, expected 2")
        needed = NEEDED | (_OF_SAMPLES if of_samples(file) else {})
        for row in rows:
            _check_fields("a row", row, needed)
            for name, of_text in row.get("also", {}).items():
                _check_fields(f"a row's text {name!r}", of_text, _OF_A_TEXT)
        _check_once(lines)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ResultError(f"{file}: no result of fidelity.py: {error}") from None
    return Measured(file, headers, rows)


def of_samples(file: Path) -> bool:
    return file.stem.endswith("-samples")


def _check_fields(what: str, found: Row, kinds: Mapping[str, Any]) -> None:
    """Raise ValueError unless an object has values of these kinds."""
    optional = {name: kind for name, kind in _OPTIONAL.items() if name in found}
    for name, kind in (kinds | optional).items():
        if name not in found:
            raise ValueError(f"{what} has no {name}")
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            raise ValueError(f"{what} has {name} {str(found[name])[:40]!r}")


def _check_once(lines: list[Row]) -> None:
    """Raise ValueError for two rows of one variant, ratio and seed: a mean would count both."""
    first: dict[Any, int] = {}
    usual = next(line["calibration"]["seq_len"] for line in lines if "machine" in line)
    for line, row in enumerate(lines, 1):
        if "machine" not in row:
            # Those of `samples.py` are of a number of windows and their length besides.
            of_windows = row.get("samples"), row.get("seq_len", usual)
            of = variant_of(row), row["prune_ratio"], row["seed"], of_windows
            if (before := first.setdefault(of, line)) != line:
                raise ValueError(
                    f"lines {before} and {line} are both of {of[0]} at {of[1]:.0%}, seed {of[2]}"
                )


def all_of(root: Path, samples: bool = False) -> list[Measured]:
    """Return every model, the smallest first, or what `samples.py` measured of it."""
    files = sorted((root / FOLDER.relative_to(ROOT)).glob("*.jsonl"))
    files = [file for file in files if of_samples(file) == samples]
    found = [measured for file in files if (measured := read(file)).rows]
    return sorted(found, key=lambda measured: int(measured.header["params"]))


def picture_path(root: Path) -> Path:
    return root / FOLDER.relative_to(ROOT) / "fidelity.svg"


def named(model: Measured) -> str:
    millions = model.header["params"] / 1e6
    return f"{model.header['model']} ({model.header['model_type']}, {millions:.1f} M)"


def variant_cells(variant: Variant) -> list[str]:
    refit = "yes" if variant.refit else variant.correction
    allocation = variant.allocation + (", rounded" if variant.rounded else "")
    return [variant.criterion, variant.statistic, allocation, refit]


def mixture_cells(variant: Variant) -> list[str]:
    narrowed = {"": "", "experts": "experts", "uniform": "all MLPs"}[variant.allocation]
    ranking = f"{variant.criterion} {variant.statistic}".strip().removesuffix(" uniform")
    return [variant.dropped_by, ranking, narrowed, "yes" if variant.refit else ""]


def span(values: Iterable[float], show: Callable[[float], str]) -> str:
    """Write the mean, with the lowest and highest."""
    values = list(values)
    if not values:
        return ""
    low, high = show(min(values)), show(max(values))
    return show(mean(values)) + (f" ({low}–{high})" if low != high else "")


def markdown(model: Measured) -> str:
    """Return all of a model: KL against the paper's, then a table of each field."""
    header, first = model.header, model.rows[0]
    calibration, (text, held_out) = header["calibration"], header["texts"]
    caption = (
        f"{model.runs}. Calibration: {calibration['samples']} windows of "
        f"{calibration['seq_len']} tokens of {text}, drawn with seeds {model.seeds}; measured on "
        f"{first['tokens']} tokens of {held_out}, where the dense model's perplexity is "
        f"{first['ppl_dense']:.2f}. fp32. Mean over the seeds that a row has (lowest–highest)."
    )
    lines = [f"# {named(model)}", "", caption]
    head, cells_of, what = HEADER, variant_cells, "neurons"
    if model.has_experts:
        head, cells_of, what = MIXTURE_HEADER, mixture_cells, "experts' neurons"
    columns = [f"{ratio:.0%} of {what}" for ratio in model.ratios]
    variants = list(dict.fromkeys(map(variant_of, model.rows)))
    against = [[model.against_paper(v, ratio) for ratio in model.ratios] for v in variants]
    of_paper = "KL(dense ‖ pruned), times that of the paper's recipe with the same seed"
    tables = [(of_paper, "{:.3f}".format, against)]
    if model.has_experts:  # all are of one size, and nats suffice
        tables = []
    for title, form, get in _fields(model):
        of_field = [
            [list(map(get, model.of(v, ratio))) for ratio in model.ratios] for v in variants
        ]
        tables.append((title, form, of_field))
    for title, form, of_variants in tables:
        cells = [head + columns]
        for variant, of_ratios in zip(variants, of_variants, strict=True):
            spans = [span((v for v in values if v is not None), form) for values in of_ratios]
            if any(spans) or title == of_paper:
                cells.append([*cells_of(variant), *spans])
        if cells[1:]:
            lines += ["", f"## {title}", "", *table(cells, len(head))]
    removed = "; ".join(f"{ratio:.0%}: {model.removed(ratio):.2%}" for ratio in model.ratios)
    return "\n".join([*lines, "", f"Of all parameters are removed, at {removed}."]) + "\n"


def _fields(model: Measured) -> Iterator[tuple[str, Form, Callable[[Row], float | None]]]:
    """Yield the title of each table, how its values are written, and how a row has them."""

    def at(*names: str) -> Callable[[Row], float | None]:
        def get(row: Row) -> float | None:
            value: Any = row
            for name in names:
                value = (value or {}).get(name)
            return None if value is None else float(value)

        return get

    share = "{:.3f}".format
    yield "KL(dense ‖ pruned), nats", number, at("kl_nats")
    yield "Perplexity", "{:.2f}".format, at("ppl_pruned")
    yield "Top-1 agreement", share, at("top1_agreement")
    yield "Top-5 agreement", share, at("top5_agreement")
    for name, file in model.also.items():
        dense = next(r["also"][name]["ppl_dense"] for r in model.rows if name in r.get("also", {}))
        yield f"KL on {file}, nats", number, at("also", name, "kl_nats")
        title = f"Perplexity on {file}, where the dense model's is {dense:.2f}"
        yield title, "{:.2f}".format, at("also", name, "ppl_pruned")
    if generated := next((row["generated"] for row in model.rows if "generated" in row), None):
        prompts = "{prompts} prompts of {prompt_tokens} tokens".format(**generated)
        of = f"of {generated['new_tokens']}, after {prompts}"
        title = f"Greedy continuations: tokens before the first that is not the dense model's, {of}"
        yield title, "{:.1f}".format, at("generated", "common_prefix")
        title = "Greedy continuations: share of tokens that are the dense model's"
        yield title, share, at("generated", "equal_tokens")
    yield "CPU seconds to choose and refit, without scoring", number, at("cpu_seconds")


def section(found: list[Measured], link: Callable[[Path], str]) -> list[str]:
    """Return a row a variant, the mean KL against the paper's of each model and ratio."""
    if not found:
        return ["Not measured yet."]
    pairs = [(model, ratio) for model in found for ratio in SHOWN_RATIOS]
    cells = [HEADER + [f"{model.header['model']}, {ratio:.0%}" for model, ratio in pairs]]
    for variant in SHOWN:
        means = [model.against_paper(variant, ratio) for model, ratio in pairs]
        if not any(means):
            continue
        row = variant_cells(variant) + [f"{mean(values):.2f}" if values else "" for values in means]
        bold = variant in (UNIFORM, DEFAULT)
        cells.append([f"**{cell}**" if cell and bold else cell for cell in row])
    links = ", ".join(f"[{named(m)}]({link(m.path.with_suffix('.md'))})" for m in found)
    seeds = sorted({len(model.of(v, r)) for model, r in pairs for v in SHOWN} - {0})
    caption = (
        f"KL(dense ‖ pruned) on held-out text, times that of the paper's recipe at the same number "
        f"of neurons removed; mean over {' or '.join(map(str, seeds))} calibration seeds, "
        f"{hardware(found[0].header)}, {found[0].header['date'][:10]}. All rows, with the spread, "
        f"KL in nats, perplexity and agreement: {links}."
    )
    return [caption, "", *table(cells, len(HEADER))]
