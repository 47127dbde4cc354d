"""The pictures of a report, as SVG to put into a page; the same bytes for the same numbers.

They hold numbers and our own words alone: names that others chose stand in the page's text.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hfprune_fast.errors import ArgumentError
from hfprune_fast.evaluation.changes import PositionBin

Result = TypeVar("Result")
# Okabe and Ito's blue and vermilion, which the colour-blind can tell apart; dense is grey.
DENSE, PRUNED, CUT = "#c3c9d2", "#0072b2", "#d55e00"
_INK = "#30363d"
# Above so many layers, a line for each would hide the others, and they are drawn as a map.
MOST_CURVES = 10
_CURVE_POINTS, _MAP_COLUMNS = 120, 100
# 480 pixels wide in a browser: still legible at the width of a phone.
_WIDTH_INCHES = 5.0
_STYLE = {
    "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": _INK, "axes.labelcolor": _INK,
    "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.axisbelow": True,
    "grid.color": "#e4e7eb", "legend.frameon": False, "legend.fontsize": 9,
    "svg.fonttype": "none", "svg.hashsalt": "hfprune", "axes.formatter.use_mathtext": False,
}  # fmt: skip


def check_matplotlib() -> None:
    """Refuse a report where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError(
            "a report needs matplotlib for its pictures; pip install 'hfprune_fast[report]'"
        )


def _styled(draw: Callable[..., Result]) -> Callable[..., Result]:
    """Let a function draw in our style; matplotlib is imported when it is first called."""

    @functools.wraps(draw)
    def call(*args: Any) -> Result:
        from matplotlib import rc_context

        with rc_context(_STYLE):  # type: ignore[arg-type]
            return draw(*args)

    return call


@_styled
def widths(kept: Sequence[int], dense: Sequence[int]) -> str:
    """Draw the neurons that each layer kept in front of those that it had."""
    figure, axis = _figure(2.7)
    layers = range(len(kept))
    axis.bar(layers, dense, width=0.86, color=DENSE, label="dense")
    axis.bar(layers, kept, width=0.86, color=PRUNED, label="kept")
    axis.set(xlabel="layer", ylabel="MLP neurons", xlim=(-0.6, len(kept) - 0.4))
    axis.set_ylim(0, max(dense) * 1.02)
    _whole_numbers(axis.xaxis)
    axis.grid(axis="y")
    _legend(axis)
    return _svg(figure, "widths", "Bars of the neurons that each layer kept, and of the dense ones")


@_styled
def importance(ranked: Tensor, kept: Sequence[int], unit: str) -> str | None:
    """Draw each layer's importance in falling order, and where it was cut; None if all is zero.

    Args:
        ranked: (L, F) importance, sorted in falling order.
        kept: how many of each layer's stay.
    """
    positive = ranked[ranked > 0]
    if len(positive) == 0:
        return None
    # The last thousandth would take most of a logarithmic scale.
    lowest = float(positive.sort().values[len(positive) // 1000])
    ranked = ranked.clamp(min=lowest)
    draw = _curves if len(ranked) <= MOST_CURVES else _map
    return _svg(
        draw(ranked, kept, unit),
        "importance",
        "Importance of each layer's neurons in falling order, and where it was cut",
    )


def _curves(ranked: Tensor, kept: Sequence[int], unit: str) -> Any:
    import matplotlib

    figure, axis = _figure(3.2)
    layers, dense = ranked.shape
    shades = [0.85 * layer / max(1, layers - 1) for layer in range(layers)]  # not the pale end
    colours = matplotlib.colormaps["viridis"](shades)
    at = torch.linspace(0, dense - 1, min(dense, _CURVE_POINTS)).round().long()
    for layer in range(layers):
        y = ranked[layer, at].tolist()
        axis.plot((at + 1).tolist(), y, color=colours[layer], linewidth=1.5, label=str(layer))
    heights = [float(ranked[layer, width - 1]) for layer, width in enumerate(kept)]
    axis.scatter(kept, heights, s=36, color=CUT, edgecolors="white", zorder=3, label="cut")
    axis.set(xlabel="neurons of a layer, most important first", ylabel=f"importance: {unit}")
    axis.set(yscale="log", xlim=(0, dense * 1.02))
    axis.grid(axis="y")
    handles, labels = axis.get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, title="layer", loc="outside right upper", handlelength=1.2
    )
    legend.get_title().set_fontsize(9)
    return figure


def _map(ranked: Tensor, kept: Sequence[int], unit: str) -> Any:
    """Draw a row of colours for each layer, and the cut as a line through them."""
    figure, axis = _figure(4.0)
    layers, dense = ranked.shape
    at = torch.linspace(0, dense - 1, min(dense, _MAP_COLUMNS)).round().long()
    values = ranked[:, at].log10()
    # The few least important ones would take most of the colours.
    image = axis.imshow(
        values.numpy(), vmin=float(values.quantile(0.02)), cmap="cividis",
        aspect="auto", interpolation="nearest", extent=(0, dense, layers - 0.5, -0.5),
    )  # fmt: skip
    edges = [layer - 0.5 for layer in range(layers + 1)]
    for width, colour in ((3.5, "white"), (1.8, CUT)):
        line = {"color": colour, "linewidth": width}
        axis.stairs(kept, edges, orientation="horizontal", baseline=None, **line)
    axis.set(xlabel="neurons of a layer, most important first", ylabel="layer")
    axis.set_title("line: the cut; left of it is kept", fontsize=9, loc="left", color=CUT)
    _whole_numbers(axis.yaxis)
    bar = figure.colorbar(image, ax=axis, location="bottom", aspect=40, pad=0.02)
    bar.set_label(f"log10 of importance: {unit}")
    bar.outline.set_visible(False)
    return figure


@_styled
def allocations(kl_nats: Mapping[str, float], chosen: str) -> str:
    """Draw the KL of each allocation that was tried; the chosen one is in colour."""
    figure, axis = _figure(0.6 + 0.38 * len(kl_nats))
    names, values = list(kl_nats), list(kl_nats.values())
    colours = [PRUNED if name == chosen else DENSE for name in names]
    bars = axis.barh(names, values, height=0.68, color=colours)
    axis.bar_label(bars, [f"{value:.4f}" for value in values], padding=4, fontsize=10)
    axis.set(xlabel="KL(dense ‖ pruned), nats a token", xlim=(0, max(values) * 1.18 or 1))
    axis.locator_params(axis="x", nbins=5)
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    return _svg(figure, "allocations", "Bars of the KL of each allocation that was tried")


@_styled
def kl_by_position(bins: Sequence[PositionBin], mean: float) -> str:
    """Draw the mean KL over the positions of the windows."""
    figure, axis = _figure(2.6)
    edges = [each.first for each in bins] + [bins[-1].last + 1]
    values = [each.kl_nats for each in bins]
    axis.stairs(values, edges, fill=True, color=PRUNED, alpha=0.25)
    axis.stairs(values, edges, color=PRUNED, linewidth=1.8, baseline=None)
    axis.axhline(mean, color=CUT, linewidth=1.5, linestyle="--", label=f"mean {mean:.4f}")
    axis.set(xlabel="position in the window, tokens", ylabel="KL, nats a token")
    axis.set(xlim=(edges[0], edges[-1]), ylim=(0, max(*values, mean) * 1.08 or 1))
    axis.grid(axis="y")
    _legend(axis)
    return _svg(figure, "positions", "Mean KL by the position in the window")


def _figure(height_inches: float) -> tuple[Any, Any]:
    # Not pyplot, which keeps figures and looks for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    return figure, figure.subplots()


def _legend(axis: Any) -> None:
    axis.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1, handlelength=1.4
    )


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))


def _svg(figure: Any, name: str, title: str) -> str:
    """Return a figure as an element of HTML, with ids that no other picture of the page has."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
