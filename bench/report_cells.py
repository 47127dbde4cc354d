"""What the cells of the README's tables say of a row, alone and beside that of ours."""

from __future__ import annotations

from records import Row
from report_text import (
    DTYPES,
    commit,
    count,
    duration,
    hardware,
    number,
    percent,
    shape,
    size,
    software,
    times,
)
from sources import Source


def caption(source: Source, link: str, *notes: str) -> str:
    """What a table is of: hardware, versions, date, commit; notes; and where the rest is."""
    date = str(source.result["date"])[:10]
    names = ("torch",) if source.device == "cpu" else ("torch", "triton")
    of = f"{hardware(source.result)}, {software(source.result, names)}, {date}"
    told = [f"{of}, {commit(source.result)}.", *filter(None, notes), f"[All rows]({link})."]
    return " ".join(told)


def short_shape(row: Row) -> str:
    """In short: of a model that is nobody's only how large it is."""
    sizes = row["sizes"]
    if "params" in sizes and not row["model"]:
        sizes = {f"{count(sizes['params'])} parameters, T": sizes["T"]} if "T" in sizes else sizes
    return f"{shape({**row, 'sizes': sizes})}, {DTYPES.get(row['dtype'], row['dtype'])}"


def _absent(row: Row | None) -> str:
    """What stands in the place of a number: the reason of a failure has its own file."""
    if row is None or "skipped" in row:
        return "–"
    return "out of memory" if "out of memory" in row["failed"] else "failed"


def milliseconds(row: Row | None) -> str:
    return number(row["ms"]) if row and "ms" in row else _absent(row)


def floor_percent(row: Row | None) -> str:
    return percent(row.get("percent_of_floor")) if row else ""


def peak_mb(row: Row | None) -> str:
    return number(row["peak_bytes"] / 1e6) if row and "peak_bytes" in row else ""


def beside(row: Row | None, ours: Row | None) -> str:
    """Another provider in a cell: its ms, how many times ours, and its MB."""
    if row is None or "ms" not in row:
        return _absent(row)
    peak = peak_mb(row)
    return number(row["ms"]) + _ratio(row, ours, "ms") + (f", {peak} MB" if peak else "")


def time(row: Row, ours: Row | None) -> str:
    return duration(row["ms"]) + _ratio(row, ours, "ms") if "ms" in row else _absent(row)


def memory(row: Row, ours: Row | None) -> str:
    if "peak_bytes" not in row:
        return ""
    return size(row["peak_bytes"]) + _ratio(row, ours, "peak_bytes")


def _ratio(row: Row, ours: Row | None, name: str) -> str:
    """How many times ours; of times what was measured side by side where it was."""
    if ours is None or ours is row or not ours.get(name):
        return ""
    found = row[name] / ours[name]
    return f" ({times(row.get('times_first', found) if name == 'ms' else found)})"
