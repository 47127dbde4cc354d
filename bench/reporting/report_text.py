"""How results are written: numbers, shapes, machines, and tables that read as they are too."""

from __future__ import annotations

import re

from records import Result, Row

CROSS_ENTROPY = "cross entropy"
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


def table(rows: list[list[str]], names: int = 1) -> list[str]:
    """A Markdown table, its first row the header; the first `names` columns are left-aligned."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width + 2) if i < names else "-" * (width + 1) + ":"
        for i, width in enumerate(widths)
    ]
    return [line(rows[0]), f"|{'|'.join(rule)}|", *map(line, rows[1:])]


def number(value: float | None, *, zeros: bool = True) -> str:
    """Three digits, without an exponent: 0.0123, 1.20 (or 1.2), 123, 12,300."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    decimals = max(0, 2 - int(f"{rounded:e}".split("e")[1]))
    text = f"{rounded:,.{decimals}f}"
    return text if zeros or not decimals else text.rstrip("0").rstrip(".")


def duration(ms: float) -> str:
    return f"{number(ms / 1e3)} s" if ms >= 1e3 else f"{number(ms)} ms"


def size(number_of_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number_of_bytes >= 0.9995 * scale:
            return f"{number(number_of_bytes / scale)} {unit}"
    return f"{number_of_bytes:.0f} B"


def times(ratio: float) -> str:
    return f"{ratio:,.{2 if ratio < 10 else 1 if ratio < 100 else 0}f} ×"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} %"


def count(value: float) -> str:
    """Of parameters: 1.24 B, 494 M."""
    for unit, scale in (("B", 1e9), ("M", 1e6)):
        if value >= 0.9995 * scale:
            return f"{number(value / scale)} {unit}"
    return number(value)


def shape(row: Row) -> str:
    """Llama-3.1-8B, T 256; the sizes alone where they are nobody's."""
    sizes = [f"{name} {value}" for name, value in row["sizes"].items() if name != "params"]
    if row["model"]:
        tokens = row["sizes"].get("T")
        return row["model"] + (f", T {tokens}" if tokens else "")
    if "params" in row["sizes"]:
        sizes.insert(0, f"{count(row['sizes']['params'])} parameters")
    return ", ".join(sizes)


def own_provider(device: str) -> str:
    """Which of ours runs on a device if nobody asks for another."""
    return "ours, triton" if device == "cuda" else "ours, torch"


def provider(row: Row) -> str:
    """The name, with what it computes if that is not what the operation does."""
    computes = row.get("computes")
    return row["provider"] + (f" ({CROSS_ENTROPY})" if computes == CROSS_ENTROPY else "")


def cell(text: str) -> str:
    """Text of others, such as a reason, in Markdown: one line, nothing marked up."""
    return re.sub(r"([|<*])", r"\\\1", " ".join(text.split()))


def hardware(result: Result) -> str:
    machine = result["machine"]
    text = machine["processor"]
    if machine.get("cores"):
        text += f", {machine['cores']} cores"
    if machine.get("memory_bytes"):
        text += f", {machine['memory_bytes'] / 1e9:.0f} GB of memory"
    return text


def software(result: Result, names: tuple[str, ...] = ()) -> str:
    """torch 2.13.0, ...: all versions, or those of names; and the threads of a CPU."""
    found = [
        f"{name} {version}"
        for name, version in result["versions"].items()
        if not names or name in names
    ]
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


def of_op(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each operation, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["op"], []).append(row)
    return found


def floors(rows: list[Row]) -> str:
    """Floor: a copy of the bytes that must be moved; for `op` ... Nothing where there is none."""
    words = {
        "copy": "a copy of the bytes that must be moved",
        "products": "the matrix products alone",
        "memcpy": "a memcpy of the bytes kept",
        "cp": "cp of the files that are written",
    }
    ops: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.get("floor"):
            ops.setdefault(row["floor"], {})[f"`{row['op']}`"] = None
    if not ops:
        return ""
    (most, _), *others = sorted(ops.items(), key=lambda item: -len(item[1]))
    told = [f"for {', '.join(of)} {words.get(floor, floor)}" for floor, of in others]
    return f"Floor: {'; '.join([words.get(most, most), *told])}."
