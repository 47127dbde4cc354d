"""The pictures of a machine, from the newest of its result files, and that of fidelity.

<machine>-kernels.svg     the percentage of its floor's speed that each provider of a kernel reaches
fidelity/fidelity.svg     KL against the parameters removed, a panel a model and text
recovery/recovery.svg     KL of each way to a model, a panel a model
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import fidelity_tables
import recovery_tables
from fidelity_variants import (
    DEFAULT,
    FLAP_GRAIL,
    MAGNITUDE,
    PAPER,
    RANDOM,
    UNIFORM,
    WANDA_GRAIL,
    Variant,
)
from records import Row
from report_text import FLOORS, OURS, grouped, hardware, own_provider, provider

if TYPE_CHECKING:
    from page import Source

PANELS = (
    "softmax_entropy", "softmax_entropy_grad", "gated_taylor", "taylor_statistics",
    "compact_rows", "compact_columns", "linear_entropy",
)  # fmt: skip
# In the tables alone: a line each would hide the others.
VARIANTS = ("ours, triton, fp32 logits", "Cut Cross Entropy, unfiltered")
# Okabe and Ito's colours, which the colour-blind can tell apart, and a form for each besides.
LINES: dict[str, tuple[Variant, str, str]] = {
    "random": (RANDOM, "#8c8c8c", "X"),
    "magnitude": (MAGNITUDE, "#e69f00", "v"),
    "the paper's: entropy, l1, uniform": (PAPER, "#d55e00", "s"),
    "fisher, l2, uniform": (Variant("fisher", "l2"), "#009e73", "D"),
    "Wanda-SP with GRAIL": (WANDA_GRAIL, "#cc79a7", "P"),
    "FLAP with GRAIL": (FLAP_GRAIL, "#000000", "*"),
    "default, uniform widths": (UNIFORM, "#56b4e9", "^"),
    "default": (DEFAULT, "#0072b2", "o"),
}
RECOVERY = {
    "pruned": ("#8c8c8c", "s"), "reconstructed": ("#56b4e9", "^"), "kl": ("#0072b2", "o"),
    "ce": ("#d55e00", "X"),
}  # fmt: skip
STYLE = {
    "font.size": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e4e4e4", "axes.axisbelow": True, "legend.frameon": False,
    "legend.fontsize": 8, "lines.markersize": 5, "svg.fonttype": "none", "svg.hashsalt": "bench",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    alt: str
    draw: Callable[[], Any]


def planned(
    root: Path,
    current: list[Source],
    models: list[fidelity_tables.Measured],
    recovered: dict[str, list[recovery_tables.RecoveryRow]],
) -> dict[Path, Picture]:
    """Return what is to be drawn, and where; matplotlib is not needed before it is."""
    found = {}
    for machine in dict.fromkeys(source.machine for source in current):
        its = [source for source in current if source.machine == machine]
        last = max((source.result for source in its), key=lambda result: str(result["date"]))
        where = f"{hardware(last)}, {last['date'][:10]}"
        measured = [row for source in its for row in source.result["rows"]]
        hidden = {*OURS, *VARIANTS} - {own_provider(measured)}  # of ours, the default is shown
        rows = [row for row in measured if row["provider"] not in hidden]
        bound = [row for row in rows if "percent_of_floor" in row and row["model"]]
        if panels := [of for op in PANELS if (of := [r for r in bound if r["op"] == op])]:
            alt = f"Kernels and their peers beside what bounds them, {where}"
            path = its[0].path.with_name(f"{machine}-kernels.svg")
            found[path] = Picture(alt, partial(kernels, panels, where))
    if models:
        alt = "KL against the parameters removed, a panel a model"
        found[fidelity_tables.picture_path(root)] = Picture(alt, partial(fidelity, models))
    if recovered:
        alt = "KL of pruned, reconstructed and recovered models, a panel a model"
        found[recovery_tables.picture_path(root)] = Picture(alt, partial(recovery, recovered))
    return found


def save(picture: Picture, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = picture.draw()
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.1)


def _figure(*grid: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(*grid, figsize=size, layout="constrained", squeeze=False)


def kernels(panels: list[list[Row]], where: str) -> Any:
    """Draw a panel for each kernel: a point is a row, a line a provider."""
    down = (len(panels) + 1) // 2
    figure, axes = _figure(down, 2, size=(9, 2 * down + 0.3))
    figure.suptitle(f"{where}. A point is one model's shape: filled bf16, hollow fp32.", size=9)
    for axis, rows in zip(axes.flat, panels, strict=False):
        names = list(dict.fromkeys(map(provider, reversed(rows))))
        for row in rows:
            fill = "none" if row["dtype"] == "float32" else "full"
            at = row["percent_of_floor"], names.index(provider(row))
            color = "#0072b2" if row["provider"].startswith("ours") else "#8c8c8c"
            axis.plot(*at, linestyle="", fillstyle=fill, color=color, marker="o")
        axis.axvline(100, color="black", linestyle="--", linewidth=1)
        axis.set(title=rows[0]["op"], xlabel=f"% of the speed of {FLOORS[rows[0]['floor']]}")
        axis.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, len(names) - 0.4))
        axis.set_xlim(0, max(115, 1.05 * max(row["percent_of_floor"] for row in rows)))
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    return figure


def fidelity(models: list[fidelity_tables.Measured]) -> Any:
    """Draw KL against parameters removed, a panel a model and text, the same scale in all."""
    panels = [(model, name) for model in models for name in ("", *model.also)]
    down = -(-len(panels) // 3)
    figure, axes = _figure(down, min(3, len(panels)), size=(9, 3 * down + 0.6))
    figure.suptitle("KL(dense ‖ pruned) without training, held-out text, nats", size=9)
    for axis, (model, name) in zip(axes.flat, panels, strict=False):
        axis.sharey(axes[0, 0])
        for label, (variant, color, marker) in LINES.items():
            rows = [row for ratio in model.ratios for row in model.of(variant, ratio)]
            rows = [row for row in rows if not name or name in row.get("also", {})]
            by_ratio = grouped(rows, lambda row: str(row["prune_ratio"])).values()
            x = [100 * mean(row["param_ratio"] for row in its) for its in by_ratio]
            y = [
                mean((row["also"][name] if name else row)["kl_nats"] for row in its)
                for its in by_ratio
            ]
            axis.plot(x, y, color=color, marker=marker, label=label)
        title = fidelity_tables.named(model) if not name else f"{model.header['model']}, {name}"
        axis.set(yscale="log", title=title, xlabel="% of all parameters removed")
        axis.set_xlim(left=0)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def recovery(models: dict[str, list[recovery_tables.RecoveryRow]]) -> Any:
    """Draw KL against the tokens trained on, a panel a model, a line a ratio and way."""
    figure, axes = _figure(1, len(models), size=(9, 3.6))
    figure.suptitle("KL(dense ‖ pruned), held-out text, nats", size=9)
    most_tokens = max(row["tokens"] for rows in models.values() for row in rows)
    for axis, (name, rows) in zip(axes[0], models.items(), strict=True):
        for ratio in sorted({row["ratio"] for row in rows}):
            its = [row for row in rows if row["ratio"] == ratio]
            start = [(row["tokens"], row["kl_nats"]) for row in its if row["way"] == "pruned"]
            for way, (color, marker) in reversed(RECOVERY.items()):  # pruned above the lines
                found = [(row["tokens"], row["kl_nats"]) for row in its if row["way"] == way]
                if found:
                    x, y = zip(*(start + found if way in ("kl", "ce") else found), strict=True)
                    axis.plot([n / 1e6 for n in x], y, color=color, marker=marker)
            if start:
                axis.annotate(f"{ratio:.0%}", start[0], (-4, 4), textcoords="offset points")
        axis.set(yscale="log", title=name, xlabel="million tokens trained on")
        axis.set_xlim(-0.04 * most_tokens / 1e6, 1.04 * most_tokens / 1e6)
        kl = [row["kl_nats"] for row in rows]
        axis.set_ylim(min(*kl, max(kl) / 2) / 1.2, max(kl) * 1.2)  # a few percent look like it
        axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    drawn = {row["way"] for rows in models.values() for row in rows}
    named = {recovery_tables.WAYS[way]: look for way, look in RECOVERY.items() if way in drawn}
    lines = [axes[0, 0].plot([], [], color=c, marker=m)[0] for c, m in named.values()]
    figure.legend(lines, named, loc="outside lower center", ncols=4)
    return figure
