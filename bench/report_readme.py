"""The README's parts: what a few rows of the newest result files say.

A part stands between `<!-- results: NAME -->` and `<!-- end -->`; whatever else is in the README is
nobody's but its author's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import fidelity_report
import pictures
from records import ResultError, Row
from report_cells import (
    beside,
    caption,
    floor_percent,
    memory,
    milliseconds,
    peak_mb,
    short_shape,
    time,
)
from report_text import CROSS_ENTROPY, duration, floors, own_provider, size, table
from sources import Source

_PART = re.compile(r"(<!-- results: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_BEGIN = "<!-- results:"
# The first two of these that were measured stand for all shapes of an operation.
MODELS = ("Llama-3.1-8B", "Llama-2-7B", "Qwen2.5-7B", "Qwen3-0.6B")
SHOWN_MODELS = 2
KERNELS = (
    "softmax_entropy", "softmax_entropy_grad", "linear_entropy", "gated_taylor",
    "taylor_statistics",
)  # fmt: skip
SCORING_COLUMNS = (
    "", "shape", "provider", "time", "% of floor", "memory", "mapped", "kept alike",
)  # fmt: skip
OTHERS = ("HFPrune's arithmetic", "eager", "torch.compile")
Group = dict[str, Row]


def replaced(text: str, sources: list[Source], root: Path) -> str:
    """The README's text with its parts made anew."""

    def part(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        if name not in PARTS:
            raise ResultError(f"README.md: no part is named {name!r}; there are {', '.join(PARTS)}")
        lines = PARTS[name](sources, root)
        return "\n".join([begin.rstrip("\n"), "", *lines, "", end])

    found = _PART.sub(part, text)
    if text.count(_BEGIN) != len(_PART.findall(text)):
        raise ResultError(f"README.md: a part that begins with {_BEGIN!r} has no '<!-- end -->'")
    return found


def for_each(
    make: Callable[[Source, str], list[str]], words: tuple[str, ...] = ("CPU", "GPU")
) -> Callable[[list[Source], Path], list[str]]:
    """Lines of every source that has some; a device of which there are none is named."""

    def part(sources: list[Source], root: Path) -> list[str]:
        blocks, devices = [], set()
        for source in sources:
            link = source.path.with_suffix(".md").relative_to(root).as_posix()
            if lines := make(source, link):
                blocks.append(lines)
                devices.add(source.device)
        blocks += [
            [f"Not measured on a {word} yet."]
            for device, word in (("cpu", "CPU"), ("cuda", "GPU"))
            if device not in devices and word in words
        ]
        return [line for i, block in enumerate(blocks) for line in ([""] if i else []) + block]

    return part


def kernels(source: Source, link: str) -> list[str]:
    groups = [group for op in KERNELS for group in _shown(source, op)]
    if not groups:
        return []
    own = own_provider(source.device)
    others = [name for name in OTHERS if any(name in group for group in groups)]
    lines = [["", "shape", "ours, ms", "% of floor", "peak MB", *others]]
    for group in groups:
        first, ours = _first(group), group.get(own)
        cells = [f"`{first['op']}`", short_shape(first), milliseconds(ours)]
        cells += [floor_percent(ours), peak_mb(ours)]
        lines.append(cells + [beside(group.get(name), ours) for name in others])
    shown = [row for group in groups for row in group.values()]
    # A peer that was measured nowhere is left to the line of what is missing.
    peers = {
        row["provider"]: None
        for row in shown
        if row.get("computes") == CROSS_ENTROPY and "skipped" not in row
    }
    found = [
        caption(source, link, "Others: ms (times ours), peak MB.", floors(shown)),
        "",
        *table(lines, 2),
    ]
    if peers:
        found += ["", *_peers(groups, own, list(peers))]
    if missing := _missing(shown, [own, *others, *peers]):
        found += ["", missing]
    return found


def _peers(groups: list[Group], own: str, peers: list[str]) -> list[str]:
    lines = [["", "shape", "ours (entropy), ms", "peak MB", *peers]]
    for group in groups:
        first, ours = _first(group), group.get(own)
        if any(name in group for name in peers):
            lines.append(
                [f"`{first['op']}`", short_shape(first), milliseconds(ours), peak_mb(ours)]
                + [beside(group.get(name), ours) for name in peers]
            )
    return [
        "The same beside what computes the cross entropy of given labels, on the same shapes; it "
        "does not compute entropy:",
        "",
        *table(lines, 2),
    ]


def _missing(rows: list[Row], columns: list[str]) -> str:
    """What has no number in the table though it was asked for, and why."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        ours = row["provider"].startswith("ours") and row["provider"] not in columns
        if "skipped" in row and not ours:
            reasons.setdefault(row["skipped"], {})[row["provider"]] = None
    told = [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]
    return f"Skipped: {'; '.join(told)}." if told else ""


def scoring(source: Source, link: str) -> list[str]:
    groups = [group for op in ("score", "whole_job") for group in _jobs(source, op)]
    columns: dict[str, list[str]] = {name: [] for name in SCORING_COLUMNS}
    for group in groups:
        rows = [row for row in group.values() if "skipped" not in row]
        ours = next((row for row in rows if row["provider"].startswith("ours")), None)
        for row in rows:
            first = row is rows[0]
            cells = [
                f"`{row['op']}`" if first else "", short_shape(row) if first else "",
                row["provider"], time(row, ours), floor_percent(row), memory(row, ours),
                size(row["mapped_bytes"]) if row.get("mapped_bytes") else "",
                f"{100 * row['kept_overlap']:.1f} %" if "kept_overlap" in row else "",
            ]  # fmt: skip
            for column, cell in zip(columns.values(), cells, strict=True):
                column.append(cell)
    if not columns[""]:
        return []
    used = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [list(used), *map(list, zip(*used.values(), strict=True))]
    notes = ["Memory is what was taken beside the weights that were there before"]
    if "mapped" in used:
        notes.append("mapped is what of the checkpoint's files was in memory at a time")
    if "kept alike" in used:
        notes.append("kept alike is the part of the kept neurons that both keep")
    rows = [row for group in groups for row in group.values()]
    return [caption(source, link, f"{'; '.join(notes)}.", floors(rows)), "", *table(lines, 3)]


def compaction(source: Source, link: str) -> list[str]:
    lines = []
    for op in ("compact_rows", "compact_columns", "prune_checkpoint"):
        for group in _shown(source, op, models=1) or _groups(source, op):
            rows = [row for row in group.values() if "ms" in row]
            ours = [row for row in rows if row["provider"].startswith("ours")]
            floor = next((row["floor"] for row in rows if row.get("floor")), "")
            others = [row for row in rows if row not in ours]
            others = [row for row in others if row["provider"].split(",")[0] != floor]
            told = [
                f"{row['provider']} {duration(row['ms'])}"
                + (f", {floor_percent(row)} of the floor" if row.get("percent_of_floor") else "")
                for row in ours
            ]
            if others:
                other = min(others, key=lambda row: row["ms"])
                told.append(f"fastest other: {other['provider']} {duration(other['ms'])}")
            if ours:
                lines.append(f"- `{op}`, {short_shape(rows[0])}: {'; '.join(told)}.")
    if not lines:
        return []
    rows = [row for row in source.rows if row["op"].startswith(("compact_", "prune_"))]
    return [caption(source, link, floors(rows)), "", *lines]


def _pictures(sources: list[Source], root: Path) -> list[str]:
    lines = [
        f"![{picture.alt}]({path.relative_to(root).as_posix()})"
        for path, picture in pictures.of(sources).items()
    ]
    return [line for i, text in enumerate(lines) for line in ([""] if i else []) + [text]] or [
        "Nothing was measured yet."
    ]


PARTS = {
    "kernels": for_each(kernels),
    "scoring": for_each(scoring),
    "compaction": for_each(compaction, ("CPU",)),
    "pictures": _pictures,
    "fidelity": fidelity_report.readme,
}


def _groups(source: Source, op: str) -> Iterator[Group]:
    """The providers of each shape of an operation, but for those of a series of sizes."""
    found: dict[str, Group] = {}
    for row in source.rows:
        if row["op"] == op and "sweep" not in row:
            what = f"{row['model']} {row['dtype']} {sorted(row['sizes'].items())}"
            found.setdefault(what, {})[row["provider"]] = row
    yield from found.values()


def _shown(source: Source, op: str, models: int = SHOWN_MODELS) -> list[Group]:
    """The shapes of an operation that the README has, in bfloat16 unless there is none."""
    groups = [
        group
        for group in _groups(source, op)
        if _first(group)["model"] and any("skipped" not in row for row in group.values())
    ]
    dtypes = {row["dtype"] for group in groups for row in group.values()}
    dtype = "bfloat16" if "bfloat16" in dtypes else "float32"
    shown = [group for group in groups if _first(group)["dtype"] == dtype]
    order = {name: i for i, name in enumerate(MODELS)}
    shown.sort(key=lambda group: order.get(_first(group)["model"], len(order)))
    return shown[:models]


def _first(group: Group) -> Row:
    return next(iter(group.values()))


def _jobs(source: Source, op: str) -> Iterator[Group]:
    """The shapes of a job; of a series of models the largest of each dtype."""
    yield from _groups(source, op)
    series = [row for row in source.rows if row["op"] == op and row.get("sweep") == "model"]
    for dtype in {row["dtype"]: None for row in series}:
        rows = [row for row in series if row["dtype"] == dtype]
        largest = max(row["sizes"].get("params", 0) for row in rows)
        yield {row["provider"]: row for row in rows if row["sizes"].get("params", 0) == largest}
