"""How results are written: numbers, shapes, machines, and tables of rows in Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

from records import Result, ResultError, Row

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
OURS = ("ours, triton", "ours, cpp", "ours, torch")  # what runs by default before what does not
FLOORS = {
    "copy": "a copy of the bytes that must be moved",
    "products": "the matrix products alone",
    "memcpy": "a memcpy of the kept bytes",
    "cp": "cp of the files that are written",
}


def number(value: float | None) -> str:
    """Write three digits, without an exponent: 0.0123, 1.20, 123, 12,300."""
    if not value:
        return "" if value is None else "0"
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.{max(0, 2 - int(f'{rounded:e}'.split('e')[1]))}f}"


def duration(ms: float | None) -> str:
    return "" if ms is None else f"{number(ms / 1e3)} s" if ms >= 1e3 else f"{number(ms)} ms"


def size(number_of_bytes: float | None) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number_of_bytes and number_of_bytes >= 0.9995 * scale:
            return f"{number(number_of_bytes / scale)} {unit}"
    return "" if number_of_bytes is None else f"{number_of_bytes:.0f} B"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{number(ratio)} ×"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} %"


def count(value: float) -> str:
    """Write a number of parameters: 1.24 B, 494 M."""
    return f"{number(value / 1e9)} B" if value >= 0.9995e9 else f"{number(value / 1e6)} M"


def shape(row: Row) -> str:
    """Write Llama-3.1-8B, T 256; without a model the sizes."""
    sizes = row["sizes"]
    named = [f"{name} {value}" for name, value in sizes.items() if name != "params"]
    if row["model"]:
        return ", ".join([row["model"], *(part for part in named if part[0] == "T")])
    params = sizes.get("params")
    return ", ".join(([f"{count(params)} parameters"] if params else []) + named)


def own_provider(rows: Iterable[Row]) -> str:
    """Return which of ours runs by default, of those that could run where rows are from."""
    ran = {row["provider"] for row in rows if "ms" in row}
    return next((name for name in OURS if name in ran), OURS[-1])


def provider(row: Row) -> str:
    """Return the name, with what it computes if that is not what the operation does."""
    marked = row.get("computes") == "cross entropy"
    return row["provider"] + (" (cross entropy)" if marked else "")


def escaped(text: str) -> str:
    """Return foreign text, such as a reason, as Markdown in one line without mark-up."""
    return re.sub(r"([|<*])", r"\\\1", " ".join(text.split()))


def _beside(text: str, ratio: float | None) -> str:
    return f"{text} ({times(ratio)})" if ratio else text


def _error(row: Row) -> str:
    if row["error_allowed"] == 0:
        return "exact"
    return f"{row['error']:.1e} ({row['error_allowed']:.1e})"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "op": lambda row: f"`{row['op']}`",
    "shape": lambda row: f"{shape(row)}, {DTYPES.get(row['dtype'], row['dtype'])}",
    "provider": provider,
    "time": lambda row: _beside(duration(row.get("ms")), row.get("times_ours")) or "failed",
    "quartiles": lambda row: f"{duration(row['ms_low'])} – {duration(row['ms_high'])}",
    "rounds": lambda row: str(row["rounds"]),
    "floor": lambda row: duration(row.get("floor_ms")),
    "% of floor": lambda row: percent(row.get("percent_of_floor")),
    "target": lambda row: percent(row.get("target_percent")),
    "% executed": lambda row: percent(row.get("executed_percent")),
    "GB/s": lambda row: number(row.get("gb_per_s")),
    "GFLOP/s": lambda row: number(row.get("gflop_per_s")),
    "memory": lambda row: _beside(size(row.get("peak_bytes")), row.get("memory_ours")),
    "mapped": lambda row: size(row.get("mapped_bytes") or None),
    "planned/measured": lambda row: number(row.get("planned_ratio")),
    "kept alike": lambda row: f"{100 * row['kept_overlap']:.1f} %" if "kept_overlap" in row else "",
    "times the first's": lambda row: times(row.get("times_first")),
    "x reference": lambda row: number(row.get("times_reference")),
    "extrapolated": lambda row: "".join(
        f"{layers} layers: {number(s)} s" for layers, s in row.get("extrapolated_s", {}).items()
    ),
    "error (allowed)": lambda row: _error(row) if "error" in row else "",
    "verdict": lambda row: row.get("verdict", ""),
}
SHORT = ("op", "shape", "provider", "time", "% of floor", "memory", "mapped", "kept alike")


def rows_table(rows: list[Row], names: Iterable[str] = COLUMNS, left: int = 3) -> list[str]:
    """Return a table with a line for each row; columns that are empty are left out."""
    made = {name: [COLUMNS[name](row) for row in rows] for name in names}
    made = {name: cells for name, cells in made.items() if any(cells)}
    return table([list(made), *map(list, zip(*made.values(), strict=True))], left)


def table(rows: list[list[str]], left: int = 1) -> list[str]:
    """Return a Markdown table, its first row the header; the first columns are left-aligned."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if i < left else ">" for i in range(len(widths))]
    lines = [
        " | ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True))
        for row in rows
    ]
    rule = ["-" * (w + 1) + ("-" if s == "<" else ":") for s, w in zip(sides, widths, strict=True)]
    return [f"| {lines[0]} |", f"|{'|'.join(rule)}|", *(f"| {line} |" for line in lines[1:])]


def under(text: str, heading: str, made: str) -> str:
    """Return a page with what stands under a heading, up to the next of its level, replaced."""
    before, found, rest = text.partition(heading)
    if not found:
        raise ResultError(f"no page has {heading.strip()!r}, under which results would be put")
    return before + heading + made + rest[rest.find("\n## ") if "\n## " in rest else len(rest) :]


def hardware(result: Result) -> str:
    machine = result["machine"]
    parts = [machine["processor"], machine.get("instructions", "")]
    parts += [f"{machine['cores']} cores" if machine.get("cores") else ""]
    if memory := machine.get("memory_bytes"):
        parts.append(f"{memory / 1e9:.0f} GB of memory")
    return ", ".join(filter(None, parts))


def when(result: Result, names: tuple[str, ...]) -> str:
    date = result["date"][:10]
    return f"{hardware(result)}, {software(result, names)}, {date}, {commit(result)}"


def software(result: Result, names: tuple[str, ...] = ()) -> str:
    """Return the versions, all or those of names, and the threads of a CPU."""
    versions = result["versions"].items()
    found = [f"{name} {version}" for name, version in versions if not names or name in names]
    if result["machine"]["device"] == "cpu" and result.get("threads"):
        found.append(f"{result['threads']} threads")
    driver = result["machine"].get("driver")
    return ", ".join(found + ([f"driver {driver}"] if driver else []))


def commit(result: Result) -> str:
    changed = " with uncommitted changes" if result.get("uncommitted_changes") else ""
    return f"commit {(result.get('commit') or 'unknown')[:10]}{changed}"


def grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Return the rows of each key, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def floors(rows: Iterable[Row]) -> str:
    """Say what the floors of some rows are."""
    ops: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.get("floor"):
            ops.setdefault(FLOORS[row["floor"]], {})[f"`{row['op']}`"] = None
    if len(ops) < 2:
        return f"Floor: {next(iter(ops))}." if ops else ""
    floors = (f"for {', '.join(names)} {floor}" for floor, names in ops.items())
    return f"Floor: {'; '.join(floors)}."
