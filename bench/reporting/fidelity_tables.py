"""The tables, the README's part and the picture of what `fidelity.py` measured.

A file NAME.jsonl in bench/results/fidelity is a header and then a row a line: a way to prune, at a
ratio, with a seed. A later run that adds rows adds its header before them. What is told is the mean
over the seeds, with the lowest and highest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from fidelity_ways import DEFAULT, MAGNITUDE, PAPER, RANDOM, UNIFORM, Way, way_of
from records import RESULTS, ROOT, ResultError
from report_text import commit, hardware, number, table
from svg import FAINT, GREY, Canvas, Scale

FOLDER = RESULTS / "fidelity"
# What the README shows, in this order: the paper's recipe, its criterion's rivals by rank alone,
# then what allocation and refit add, one after the other.
SHOWN = (
    RANDOM,
    MAGNITUDE,
    PAPER,
    Way("entropy", "l2"),
    Way("cross_entropy", "l2"),
    Way("activation", "act"),
    Way("fisher", "mask"),
    Way("fisher", "l2"),
    Way("fisher", "obs"),
    Way("entropy", "l1", refit=True),
    Way("fisher", "l2", refit=True),
    UNIFORM,
    Way("entropy", "l1", "global"),
    Way("fisher", "l2", "global"),
    Way("fisher", "l2", "global", refit=True),
    DEFAULT,
)
README_RATIOS = (0.2, 0.3, 0.5)
LINES = (
    ("random", RANDOM, "#8c8c8c", "cross"),
    ("magnitude", MAGNITUDE, "#e69f00", "down"),
    ("the paper's: entropy, l1, uniform", PAPER, "#d55e00", "square"),
    ("fisher, l2, uniform", Way("fisher", "l2"), "#009e73", "diamond"),
    ("default, uniform widths", UNIFORM, "#56b4e9", "up"),
    ("default", DEFAULT, "#0072b2", "circle"),
)
WIDTH, PANEL_HEIGHT, MARGIN = 860, 250, 14
_NEEDED = {
    *("criterion", "statistic", "prune_ratio", "seed", "param_ratio", "tokens"),
    *("kl_nats", "ppl_dense", "ppl_pruned", "top1_agreement"),
}


@dataclass(frozen=True)
class Measured:
    """A model's rows: of a way, at a ratio, with a seed."""

    headers: list[dict[str, Any]]
    rows: list[dict[str, Any]]

    @property
    def header(self) -> dict[str, Any]:
        """Of the first run; later ones have the same settings."""
        return self.headers[0]

    @property
    def ratios(self) -> list[float]:
        return sorted({row["prune_ratio"] for row in self.rows})

    @property
    def ways(self) -> list[Way]:
        return list(dict.fromkeys(map(way_of, self.rows)))

    def of(self, way: Way, ratio: float) -> list[dict[str, Any]]:
        return [r for r in self.rows if way_of(r) == way and r["prune_ratio"] == ratio]

    def against_paper(self, way: Way, ratio: float) -> list[float]:
        """KL as a part of the paper's with the same seed."""
        paper = {row["seed"]: row["kl_nats"] for row in self.of(PAPER, ratio)}
        found = self.of(way, ratio)
        return [row["kl_nats"] / paper[row["seed"]] for row in found if row["seed"] in paper]


def read(file: Path) -> Measured:
    """Return what is in a file; raise ResultError for another's."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        headers = [line for line in lines if "machine" in line]
        rows = [line for line in lines if "machine" not in line]
        if not headers or not {"model", "params", "calibration", "texts"} <= headers[0].keys():
            raise ValueError("no header that says of which model and texts")
        if missing := next((m for row in rows if (m := _NEEDED - row.keys())), None):
            raise ValueError(f"a row has no {', '.join(sorted(missing))}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ResultError(f"{file}: no result of fidelity.py: {error}") from None
    return Measured(headers, rows)


def all_of(root: Path = ROOT) -> list[Measured]:
    """Every model, the smallest first."""
    folder = root / FOLDER.relative_to(ROOT)
    found = [read(file) for file in sorted(folder.glob("*.jsonl"))]
    found = [measured for measured in found if measured.rows]
    return sorted(found, key=lambda measured: int(measured.header["params"]))


def texts(root: Path) -> dict[Path, str]:
    """The table of each model, and the picture of all."""
    found, folder = all_of(root), root / FOLDER.relative_to(ROOT)
    tables = {folder / f"{m.header['model']}.md": markdown(m) for m in found}
    return {**tables, **({folder / "fidelity.svg": picture(found)} if found else {})}


def named(model: Measured) -> str:
    millions = model.header["params"] / 1e6
    return f"{model.header['model']} ({model.header['model_type']}, {millions:.1f} M)"


def way_cells(way: Way) -> list[str]:
    allocation = way.allocation + (f", {way.steps} steps" if way.steps > 1 else "")
    return [way.criterion, way.statistic, allocation, "yes" if way.refit else ""]


def span(values: Iterable[float], told: Callable[[float], str] = "{:.3f}".format) -> str:
    """Mean, with the lowest and highest."""
    values = list(values)
    if not values:
        return ""
    low, high = told(min(values)), told(max(values))
    return told(mean(values)) + (f" ({low}–{high})" if low != high else "")


def _runs(model: Measured) -> str:
    """When, and by which code: 2026-11-24, commit 0123456789; then the next run's."""
    told = (f"{header['date'][:10]}, {commit(header)}" for header in model.headers)
    return "; ".join(dict.fromkeys(told))


def markdown(model: Measured) -> str:
    """All of a model: KL against the paper's, KL, perplexity and agreement of each way."""
    header = model.header
    dense = model.rows[0]["ppl_dense"]
    seeds = sorted({row["seed"] for row in model.rows})
    calibration = header["calibration"]
    lines = [
        f"# {named(model)}",
        "",
        f"{hardware(header)}, {_runs(model)}. Calibration: "
        f"{calibration['samples']} windows of {calibration['seq_len']} tokens of "
        f"{header['texts'][0]}, drawn with seeds {', '.join(map(str, seeds))}; measured on "
        f"{model.rows[0]['tokens']} tokens of {header['texts'][1]}, where the dense model's "
        f"perplexity is {dense:.2f}. fp32. Mean over the seeds (lowest–highest).",
    ]
    for title, value, told in (
        ("KL(dense ‖ pruned), times that of the paper's recipe with the same seed", None, ".3f"),
        ("KL(dense ‖ pruned), nats", "kl_nats", ""),
        ("Perplexity", "ppl_pruned", ".2f"),
        ("Top-1 agreement", "top1_agreement", ".3f"),
    ):
        cells = [["criterion", "statistic", "allocation", "refit"]]
        cells[0] += [f"{ratio:.0%} of neurons" for ratio in model.ratios]
        for way in model.ways:
            values = [
                span(
                    model.against_paper(way, ratio)
                    if value is None
                    else (row[value] for row in model.of(way, ratio)),
                    f"{{:{told}}}".format if told else number,
                )
                for ratio in model.ratios
            ]
            cells.append(way_cells(way) + values)
        lines += ["", f"## {title}", "", *table(cells, 4)]
    of_all = {row["prune_ratio"]: row["param_ratio"] for row in model.rows}
    removed = [f"{ratio:.0%}: {of_all[ratio]:.2%}" for ratio in model.ratios]
    lines += ["", f"Of all parameters are removed, at {'; '.join(removed)}."]
    return "\n".join(lines) + "\n"


def readme(_: object, root: Path) -> list[str]:
    """A row a way, the mean KL against the paper's of each model and ratio."""
    found = all_of(root)
    if not found:
        return ["Not measured yet."]
    header = ["criterion", "statistic", "allocation", "refit"]
    header += [f"{m.header['model']}, {ratio:.0%}" for m in found for ratio in README_RATIOS]
    cells = [header]
    for way in SHOWN:
        means = [m.against_paper(way, ratio) for m in found for ratio in README_RATIOS]
        row = way_cells(way) + [f"{mean(v):.2f}" if v else "" for v in means]
        cells.append(
            [f"**{cell}**" if cell and way in (UNIFORM, DEFAULT) else cell for cell in row]
        )
    links = ", ".join(
        f"[{named(m)}]({(FOLDER.relative_to(ROOT) / m.header['model']).as_posix()}.md)"
        for m in found
    )
    seeds = sorted({len({row["seed"] for row in measured.rows}) for measured in found})
    told = (
        f"KL(dense ‖ pruned) on held-out text, times that of the paper's recipe at the same number "
        f"of neurons removed; mean over {' or '.join(map(str, seeds))} calibration seeds, "
        f"{hardware(found[0].header)}, {found[0].header['date'][:10]}. All rows, with the spread, "
        f"KL in nats, perplexity and agreement: {links}."
    )
    image = (FOLDER.relative_to(ROOT) / "fidelity.svg").as_posix()
    alt = "KL against the parameters removed, a panel a model"
    return [told, "", *table(cells, 4), "", f"![{alt}]({image})"]


def picture(found: list[Measured]) -> str:
    """KL against parameters removed, a panel a model, the same scale in all."""
    canvas = Canvas(WIDTH, PANEL_HEIGHT + 152)
    canvas.text(MARGIN, 22, "KL(dense ‖ pruned) without training, held-out text, nats", bold=True)
    shown = [way for _, way, _, _ in LINES]
    values = [row["kl_nats"] for m in found for row in m.rows if way_of(row) in shown]
    low, high = min(values) / 1.3, max(values) * 1.3
    room = (WIDTH - 2 * MARGIN) / len(found)
    top, bottom = 62, 62 + PANEL_HEIGHT
    for i, model in enumerate(found):
        left = MARGIN + i * room
        most = max(row["param_ratio"] for row in model.rows)
        x = Scale(0, 1.08 * most, left + 40, left + room - 12, log=False)
        y = Scale(low, high, bottom, top)
        canvas.text(x.start, top - 12, named(model))
        for tick in y.ticks():
            canvas.line([(x.start, y(tick)), (x.end, y(tick))], FAINT)
            canvas.text(x.start - 6, y(tick) + 4, f"{tick:g}", "end")
        canvas.line([(x.start, top), (x.start, bottom), (x.end, bottom)], GREY)
        step = 0.1 if most > 0.25 else 0.05
        for count in range(int(1.08 * most / step) + 1):
            canvas.text(x(count * step), bottom + 15, f"{count * step:.0%}", "middle")
        canvas.text((x.start + x.end) / 2, bottom + 32, "of all parameters removed", "middle")
        for _, way, colour, form in LINES:
            points = []
            for ratio in model.ratios:
                rows = model.of(way, ratio)
                if rows:
                    across = x(mean(row["param_ratio"] for row in rows))
                    points.append((across, y(mean(row["kl_nats"] for row in rows))))
            canvas.line(points, colour, 1.6)
            for point in points:
                canvas.marker(form, *point, colour, 3.5)
    for i, (label, _, colour, form) in enumerate(LINES):
        across, down = MARGIN + 10 + (i % 3) * 280, bottom + 56 + (i // 3) * 18
        canvas.marker(form, across, down - 4, colour, 4)
        canvas.text(across + 12, down, label)
    return str(canvas)
