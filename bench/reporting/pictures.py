"""The pictures of a machine, from the newest of its result files.

<machine>-kernels.svg   each kernel beside its roof: of those bound by memory the percentage of a
                        copy's speed, of linear_entropy FLOP/s over FLOPs a byte
<machine>-scaling.svg   time and peak memory against T, V and the size of a model
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import drawing
from drawing import Series
from records import Row
from report_text import DTYPES, hardware, own_provider, shape
from sources import Source

MEMORY_BOUND = (
    "softmax_entropy", "softmax_entropy_grad", "gated_taylor", "taylor_statistics",
    "compact_rows", "compact_columns",
)  # fmt: skip
COMPUTE_BOUND = "linear_entropy"
# In the tables alone: a line each would hide the others.
VARIANTS = ("ours, triton, fp32 logits", "Cut Cross Entropy, unfiltered")
SERIES = {"T": "linear_entropy", "V": "linear_entropy", "model": "score"}


@dataclass(frozen=True)
class Picture:
    alt: str
    svg: str


def of(sources: list[Source]) -> dict[Path, Picture]:
    machines: dict[str, list[Source]] = {}
    for source in sources:
        machines.setdefault(source.machine, []).append(source)
    found = {}
    for machine, its in machines.items():
        last = max((source.result for source in its), key=lambda result: str(result["date"]))
        where = f"{hardware(last)}, {last['date'][:10]}"
        rows = [row for source in its for row in source.rows if _shown(row, its[0].device)]
        ceilings = next((c for source in its if (c := source.result.get("ceilings"))), [])
        if svg := _kernels(where, rows, ceilings):
            path = its[0].path.with_name(f"{machine}-kernels.svg")
            found[path] = Picture(f"Kernels and their peers beside what bounds them, {where}", svg)
        if columns := _columns(rows):
            path = its[0].path.with_name(f"{machine}-scaling.svg")
            varied = ", ".join(column.varied for column in columns)
            alt = f"Time and peak memory against {varied.replace('params', 'model size')}; {where}"
            found[path] = Picture(alt, drawing.scaling(where, columns))
    return found


def _shown(row: Row, device: str) -> bool:
    """Of ours, a line is of what runs unless it is asked otherwise."""
    paths = {"ours, torch", "ours, triton"} - {own_provider(device)}
    return row["provider"] not in VARIANTS and not (
        row["op"] == COMPUTE_BOUND and row["provider"] in paths
    )


def _kernels(where: str, rows: list[Row], ceilings: list[Row]) -> str:
    bound = [row for row in rows if "percent_of_floor" in row and "sweep" not in row]
    dots = [[row for row in bound if row["op"] == op] for op in MEMORY_BOUND]
    # A series of V has the same FLOPs a byte as one of its points.
    head = [row for row in rows if row["op"] == COMPUTE_BOUND and row.get("sweep") != "V"]
    head = [row for row in head if row.keys() >= {"ms", "flops", "bytes"}]
    dots = [rows for rows in dots if rows]
    return drawing.kernels(where, dots, head, ceilings) if dots or head else ""


def _columns(rows: list[Row]) -> list[Series]:
    columns = []
    for sweep, op in SERIES.items():
        varied = "params" if sweep == "model" else sweep
        found = [row for row in rows if row["op"] == op and row.get("sweep") == sweep]
        found = [row for row in found if "skipped" not in row]
        dtypes = [row["dtype"] for row in found if "ms" in row]
        if dtypes:
            dtype = "bfloat16" if "bfloat16" in dtypes else dtypes[0]
            found = [row for row in found if row["dtype"] == dtype]
            columns.append(Series(varied, _title(op, dtype, found, varied), found))
    return columns


def _title(op: str, dtype: str, rows: list[Row], varied: str) -> str:
    """The operation, and the sizes that all rows have in common."""
    common = set.intersection(*(set(row["sizes"].items()) for row in rows))
    sizes = {name: v for name, v in rows[0]["sizes"].items() if (name, v) in common - {varied}}
    text = shape({"model": "", "sizes": {k: v for k, v in sizes.items() if k != varied}})
    return ", ".join(filter(None, [op, text, DTYPES.get(dtype, dtype)]))
