"""Draws rows of a result: kernels beside what bounds them, and series of sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from records import Row
from report_text import DTYPES, count, number, provider
from svg import FAINT, GREY, INK, Canvas, Scale, text_width

WIDTH, MARGIN = 860, 14
# Okabe and Ito's colours, which the colour-blind can tell apart, and a form for each besides.
OURS, OTHER = ("#0072b2", "circle"), ("#8c8c8c", "circle")
LOOKS = {
    "HFPrune's arithmetic": ("#d55e00", "square"),
    "eager": ("#4d4d4d", "up"),
    "torch.compile": ("#e69f00", "down"),
    "Liger": ("#009e73", "diamond"),
    "Cut Cross Entropy": ("#cc79a7", "plus"),
    "torch linear_cross_entropy": ("#56b4e9", "cross"),
}
DOT_ROW, LABELS, HEAD_HEIGHT = 19, 150, 300
UNITS = {
    "ms": [("time, ms", 1.0), ("time, s", 1e3)],
    "peak_bytes": [("peak memory, MB", 1e6), ("peak memory, GB", 1e9)],
}


@dataclass(frozen=True)
class Series:
    """Rows that differ in one size, and a title that says what they have in common."""

    varied: str  # of `sizes`: "T", "V" or "params"
    title: str
    rows: list[Row]


def kernels(where: str, dots: list[list[Row]], head: list[Row], ceilings: list[Row]) -> str:
    """A panel for each kernel bound by memory, two side by side, and a roofline below."""
    pairs = [dots[i : i + 2] for i in range(0, len(dots), 2)]
    heights = [72 + DOT_ROW * max(len(_by_provider(rows)) for rows in pair) for pair in pairs]
    top = 62
    canvas = Canvas(WIDTH, top + sum(heights) + (HEAD_HEIGHT + 70 if head else 0))
    _heading(canvas, where)
    canvas.text(MARGIN, 42, "A point is one model's shape: filled bf16, hollow fp32.")
    for pair, height in zip(pairs, heights, strict=True):
        for side, rows in enumerate(pair):
            _dots(canvas, rows, MARGIN + side * (WIDTH / 2 - MARGIN / 2), top)
        top += height
    if head:
        _roofline(canvas, head, ceilings, top)
    return str(canvas)


def _dots(canvas: Canvas, rows: list[Row], left: float, top: float) -> None:
    of = _by_provider(rows)
    first, bottom = top + 26, top + 26 + DOT_ROW * len(of)
    most = max(115, 1.05 * max(row["percent_of_floor"] for row in rows))
    x = Scale(0, most, left + LABELS, left + WIDTH / 2 - 2.5 * MARGIN, log=False)
    canvas.text(x.start, top + 12, rows[0]["op"], bold=True)
    step = 25 if most < 160 else 50 if most < 320 else 100 * math.ceil(most / 800)
    for tick in range(0, int(most) + 1, step):
        canvas.line([(x(tick), first), (x(tick), bottom)], FAINT)
        canvas.text(x(tick), bottom + 14, str(tick), "middle")
    canvas.line([(x(100), first - 4), (x(100), bottom)], INK, 1.2, "5 3")
    canvas.line([(x.start, first), (x.start, bottom)], GREY)
    for i, (name, found) in enumerate(of.items()):
        y = first + DOT_ROW * (i + 0.5)
        canvas.text(x.start - 8, y + 4, name, "end", bold=_ours(name))
        colour, form = _look(name)
        for row in found:
            canvas.marker(
                form, x(row["percent_of_floor"]), y, colour, 4.5, hollow=row["dtype"] == "float32"
            )
    floor = f"% of the speed of a {rows[0]['floor']} of the same bytes"
    canvas.text((x.start + x.end) / 2, bottom + 30, floor, "middle")


def _roofline(canvas: Canvas, rows: list[Row], ceilings: list[Row], top: float) -> None:
    at = [(row["flops"] / row["bytes"], row["gflop_per_s"]) for row in rows]
    ridges = [c["product_gflop_per_s"] / c["copy_gb_per_s"] for c in ceilings]
    names = list(_by_provider(rows))
    key = max(text_width(_key(name, rows)) for name in names) + 40
    scale, unit = (1e3, "TFLOP/s") if max(g for _, g in at) > 1e4 else (1.0, "GFLOP/s")
    at = [(i, g / scale) for i, g in at]
    x = Scale(
        min([i for i, _ in at] + ridges) / 3, max([i for i, _ in at] + ridges) * 2,
        MARGIN + 60, WIDTH - key - MARGIN,
    )  # fmt: skip
    roofs = {
        ceiling["dtype"]: [
            (i, min(ceiling["product_gflop_per_s"], ceiling["copy_gb_per_s"] * i) / scale)
            for i in (x.low, ridge, x.high)
        ]
        for ceiling, ridge in zip(ceilings, ridges, strict=True)
    }
    speeds = [g for _, g in at] + [g for roof in roofs.values() for _, g in roof]
    y = Scale(min(speeds) / 1.4, max(speeds) * 1.7, top + 24 + HEAD_HEIGHT, top + 24)
    canvas.text(x.start, top + 12, f"{rows[0]['op']}: roofline", bold=True)
    for tick in x.ticks():
        canvas.line([(x(tick), y.start), (x(tick), y.end)], FAINT)
        canvas.text(x(tick), y.start + 14, number(tick, zeros=False), "middle")
    _vertical(canvas, x, y, unit)
    canvas.text((x.start + x.end) / 2, y.start + 32, "FLOP / byte that must be moved", "middle")
    for dtype, roof in roofs.items():
        dashes = "2 3" if dtype == "float32" else "6 3"
        canvas.line([(x(i), y(g)) for i, g in roof], INK, 1.3, dashes)
        told = f"{DTYPES.get(dtype, dtype)} products, {number(roof[-1][1])} {unit}"
        canvas.text(x.end + 8, y(roof[-1][1]) + 4, told, size=10)
    if ceilings:
        speed = ceilings[0]["copy_gb_per_s"]
        middle = math.sqrt(x.low * ridges[0])
        told = f"copy, {number(speed)} GB/s"
        canvas.text(x(middle) + 8, y(speed * middle / scale) + 12, told, size=10)
    for name in sorted(names, key=_ours):  # ours last, and so on top
        colour, form = _look(name)
        for row, (i, g) in zip(rows, at, strict=True):
            if row["provider"] == name:
                hollow = row["dtype"] == "float32"
                canvas.marker(form, x(i), y(g), colour, _radius(name), hollow=hollow)
    lowest = max((y(roof[-1][1]) for roof in roofs.values()), default=y.end)
    for i, name in enumerate(names):
        row_y = lowest + 36 + 20 * i
        colour, form = _look(name)
        canvas.marker(form, x.end + 22, row_y - 4, colour, _radius(name))
        canvas.text(x.end + 34, row_y, _key(name, rows), bold=_ours(name))


def scaling(where: str, columns: list[Series]) -> str:
    """Time above, peak memory below, a column for each size that is varied."""
    width = (WIDTH - MARGIN) / max(2, len(columns))
    plot, top = 200, 66
    rows = [row for column in columns for row in column.rows]
    # All of ours look the same, and are called so.
    names = {_key(row["provider"], rows): row["provider"] for row in sorted(rows, key=_theirs)}
    names = {("ours" if _ours(name) else key): name for key, name in names.items()}
    notes = max(len(_failures(column)) for column in columns)
    below = top + 2 * (plot + 24) + 40 + 14 * notes
    longest = max(text_width(name, 10) for name in names)
    per_line = int((WIDTH - MARGIN) / (longest + 44))
    canvas = Canvas(WIDTH, below + 20 * math.ceil(len(names) / per_line))
    _heading(canvas, where)
    for i, column in enumerate(columns):
        left = MARGIN + i * width
        canvas.text(left + 56, top - 24, column.title.split(", ")[0], bold=True)
        canvas.text(left + 56, top - 10, ", ".join(column.title.split(", ")[1:]), size=10)
        for j, measure in enumerate(UNITS):
            y_top = top + j * (plot + 24)
            _lines(canvas, column, measure, (left + 56, left + width - 16), y_top, plot)
        canvas.text(
            left + 56 + (width - 72) / 2, top + 2 * plot + 24 + 32,
            {"params": "parameters"}.get(column.varied, column.varied), "middle",
        )  # fmt: skip
        for j, text in enumerate(_failures(column)):
            canvas.text(left + 30, top + 2 * plot + 24 + 48 + 14 * j, text, size=10)
    for i, (key, name) in enumerate(names.items()):
        x = MARGIN + i % per_line * (WIDTH - MARGIN) / per_line
        y = below + 20 * (i // per_line)
        colour, form = _look(name)
        canvas.line([(x, y - 4), (x + 26, y - 4)], colour, _stroke(name), _dashes(name, rows))
        canvas.marker(form, x + 13, y - 4, colour, _radius(name))
        canvas.text(x + 32, y, key, bold=_ours(name), size=10)
    return str(canvas)


def _lines(
    canvas: Canvas, column: Series, measure: str, sides: tuple[float, float], top: float,
    height: float,
) -> None:  # fmt: skip
    # A logarithm has no place for none at all.
    rows = [row for row in column.rows if row.get(measure)]
    sizes = sorted({row["sizes"][column.varied] for row in column.rows if "ms" in row})
    x = Scale(sizes[0] / 1.12, sizes[-1] * 1.12, *sides)
    for tick in sizes:
        canvas.line([(x(tick), top), (x(tick), top + height)], FAINT)
    for tick in _apart(sizes, x) if measure == "peak_bytes" else []:
        canvas.text(x(tick), top + height + 15, _size(tick, column.varied), "middle")
    if not rows:
        return
    least = min(row[measure] for row in rows)
    label, scale = next((u for u in reversed(UNITS[measure]) if least >= u[1]), UNITS[measure][0])
    values = [row[measure] / scale for row in rows]
    y = Scale(min(values) / 1.3, max(values) * 1.3, top + height, top)
    _vertical(canvas, x, y, label)
    of = _by_provider(rows)
    for name in sorted(of, key=_ours):
        colour, form = _look(name)
        found = sorted(of[name], key=lambda row: row["sizes"][column.varied])
        places = [(x(row["sizes"][column.varied]), y(row[measure] / scale)) for row in found]
        canvas.line(places, colour, _stroke(name), _dashes(name, found))
        for row, place in zip(found, places, strict=True):
            if measure == "ms":
                ends = (row["ms_low"] / scale, row["ms_high"] / scale)
                canvas.line([(place[0], y(min(max(v, y.low), y.high))) for v in ends], colour, 1.2)
            canvas.marker(form, *place, colour, _radius(name))


def _vertical(canvas: Canvas, x: Scale, y: Scale, label: str) -> None:
    for tick in y.ticks():
        canvas.line([(x.start, y(tick)), (x.end, y(tick))], FAINT)
        canvas.text(x.start - 6, y(tick) + 4, number(tick, zeros=False), "end", size=10)
    canvas.line([(x.start, y.end), (x.start, y.start), (x.end, y.start)], GREY)
    canvas.text(x.start - 46, (y.start + y.end) / 2, label, "middle", turned=True)


def _heading(canvas: Canvas, where: str) -> None:
    canvas.text(MARGIN, 22, where, size=12)


def _by_provider(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["provider"], []).append(row)
    return found


def _failures(column: Series) -> list[str]:
    of: dict[str, list[str]] = {}
    for row in column.rows:
        if "failed" in row:
            size = _size(row["sizes"][column.varied], column.varied)
            of.setdefault(row["provider"], []).append(size)
    return [f"{name} failed at {', '.join(sizes)}" for name, sizes in of.items()]


def _apart(sizes: list[float], x: Scale) -> list[float]:
    """Those whose labels have room beside one another."""
    shown: list[float] = []
    for size in sizes:
        if not shown or x(size) - x(shown[-1]) >= 46:
            shown.append(size)
    return shown


def _size(value: float, varied: str) -> str:
    """512, 32k, 128k; of parameters 1.24 B."""
    if varied == "params":
        return count(value)
    return f"{value / 1000:.0f}k" if value >= 10_000 else f"{value:.0f}"


def _key(name: str, rows: list[Row]) -> str:
    return provider(next(row for row in rows if row["provider"] == name))


def _dashes(name: str, rows: list[Row]) -> str:
    return "5 3" if _key(name, rows) != name else ""


def _ours(name: str) -> bool:
    return name.startswith("ours")


def _theirs(row: Row) -> bool:
    return not _ours(row["provider"])


def _look(name: str) -> tuple[str, str]:
    return OURS if _ours(name) else LOOKS.get(name, OTHER)


def _radius(name: str) -> float:
    return 5 if _ours(name) else 4


def _stroke(name: str) -> float:
    return 2.6 if _ours(name) else 1.4
