"""How results are written: numbers, shapes, machines, and Markdown tables that are readable as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from records import Result, Row

CROSS_ENTROPY = "cross entropy"
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
FLOORS = {
    "copy": "a copy of the bytes that must be moved",
    "products": "the matrix products alone",
    "memcpy": "a memcpy of the kept bytes",
    "cp": "cp of the files that are written",
}


def table(rows: list[list[str]], names: int = 1) -> list[str]:
    """Return a Markdown table, its first row the header; the first `names` columns are left-aligned."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w + 2) if i < names else "-" * (w + 1) + ":" for i, w in enumerate(widths)]
    return [line(rows[0]), f"|{'|'.join(rule)}|", *map(line, rows[1:])]


def columns_table(
    rows: Iterable[Row], columns: dict[str, Callable[[Row], str]], names: int
) -> list[str]:
    """Return a table with a cell of each column for each row; columns that are empty are left out."""
    rows = list(rows)
    made = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    made = {name: cells for name, cells in made.items() if any(cells)}
    return table([list(made), *map(list, zip(*made.values(), strict=True))], names)


def number(value: float | None) -> str:
    """Write three digits, without an exponent: 0.0123, 1.20, 123, 12,300."""
    if not value:
        return "" if value is None else "0"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.{max(0, 2 - int(f'{rounded:e}'.split('e')[1]))}f}"


def duration(ms: float) -> str:
    return f"{number(ms / 1e3)} s" if ms >= 1e3 else f"{number(ms)} ms"


def size(number_of_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number_of_bytes >= 0.9995 * scale:
            return f"{number(number_of_bytes / scale)} {unit}"
    return f"{number_of_bytes:.0f} B"


def times(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{number(ratio) if ratio < 0.1 else f'{ratio:,.{max(0, 3 - len(str(int(ratio))))}f}'} ×"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} %"


def megabytes(number_of_bytes: float | None) -> str:
    return "" if number_of_bytes is None else number(number_of_bytes / 1e6)


def count(value: float) -> str:
    """Write a number of parameters: 1.24 B, 494 M."""
    for unit, scale in (("B", 1e9), ("M", 1e6)):
        if value >= 0.9995 * scale:
            return f"{number(value / scale)} {unit}"
    return number(value)


def shape(row: Row) -> str:
    """Write Llama-3.1-8B, T 256; without a model the sizes."""
    sizes = [f"{name} {value}" for name, value in row["sizes"].items() if name != "params"]
    if row["model"]:
        tokens = row["sizes"].get("T")
        return row["model"] + (f", T {tokens}" if tokens else "")
    if "params" in row["sizes"]:
        sizes.insert(0, f"{count(row['sizes']['params'])} parameters")
    return ", ".join(sizes)


def short_shape(row: Row) -> str:
    """Write the shape and dtype; of a model without a name only its size and the tokens."""
    sizes = row["sizes"]
    text = shape(row)
    if "params" in sizes and not row["model"]:
        text = f"{count(sizes['params'])} parameters, T {sizes['T']}"
    return f"{text}, {DTYPES.get(row['dtype'], row['dtype'])}"


def own_provider(device: str) -> str:
    """Return which of ours runs on a device by default."""
    return "ours, triton" if device == "cuda" else "ours, torch"


def provider(row: Row) -> str:
    """Return the name, with what it computes if that is not what the operation does."""
    marked = row.get("computes") == CROSS_ENTROPY
    return row["provider"] + (f" ({CROSS_ENTROPY})" if marked else "")


def escaped(text: str) -> str:
    """Return foreign text, such as a reason, as Markdown in one line without mark-up."""
    return re.sub(r"([|<*])", r"\\\1", " ".join(text.split()))


def hardware(result: Result) -> str:
    machine = result["machine"]
    text = str(machine["processor"])
    if machine.get("cores"):
        text += f", {machine['cores']} cores"
    if machine.get("memory_bytes"):
        text += f", {machine['memory_bytes'] / 1e9:.0f} GB of memory"
    return text


def software(result: Result, names: tuple[str, ...] = ()) -> str:
    """Return the versions, all or those of names, and the threads of a CPU."""
    versions = result["versions"].items()
    found = [f"{name} {version}" for name, version in versions if not names or name in names]
    if result["machine"]["device"] == "cpu" and result.get("threads"):
        found.append(f"{result['threads']} threads")
    if result["machine"].get("driver"):
        found.append(f"driver {result['machine']['driver']}")
    return ", ".join(found)


def commit(result: Result) -> str:
    if not result.get("commit"):
        return "commit unknown"
    changed = " with uncommitted changes" if result.get("uncommitted_changes") else ""
    return f"commit {result['commit'][:10]}{changed}"


def grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Return the rows of each key, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def floors(rows: Iterable[Row]) -> str:
    """Say what the floors of some rows are, first that of most operations."""
    of = grouped((row for row in rows if row.get("floor")), lambda row: str(row["floor"]))
    ops = {floor: [f"`{op}`" for op in grouped(its, _op)] for floor, its in of.items()}
    (first, _), *others = sorted(ops.items(), key=lambda item: -len(item[1])) or [("", [])]
    told = [f"for {', '.join(names)} {FLOORS.get(floor, floor)}" for floor, names in others]
    return f"Floor: {'; '.join([FLOORS.get(first, first), *told])}." if first else ""


def _op(row: Row) -> str:
    return str(row["op"])
