"""Turn result files (their form: `records.py`) into tables, pictures and the README's numbers.

    python bench/report.py FILE.json ...     FILE.md beside each: all of its rows
    python bench/report.py                   bench/results/*.md and *.svg, and the README's parts
    python bench/report.py --check           exit 1, and say which of these are not what the
                                             result files give; nothing is written

The README has its parts between `<!-- results: NAME -->` and `<!-- end -->`; NAME is kernels,
scoring, compaction, pictures or fidelity. They and the pictures are of the newest file of each
machine and suffix: <machine>-<date>.json, <machine>-<date>-large.json; fidelity's of all of
bench/results/fidelity/*.jsonl. Nothing but Python is needed.

The exit status is 2 when a file is no result, with one line that says why.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # not there with PYTHONSAFEPATH
import fidelity_report
import pictures
from records import ROOT, Result, ResultError, Row, read
from report_readme import replaced
from report_text import (
    CROSS_ENTROPY,
    cell,
    commit,
    floors,
    hardware,
    number,
    of_op,
    percent,
    provider,
    shape,
    software,
    table,
    times,
)
from sources import newest, sources

COLUMNS = {
    "provider": provider,
    "shape": shape,
    "dtype": lambda row: row["dtype"],
    "ms": lambda row: number(row["ms"]),
    "quartiles": lambda row: f"{number(row['ms_low'])}–{number(row['ms_high'])}",
    "rounds": lambda row: str(row["rounds"]),
    "floor ms": lambda row: number(row.get("floor_ms")),
    "% of floor": lambda row: percent(row.get("percent_of_floor")),
    "GB/s": lambda row: number(row.get("gb_per_s")),
    "GFLOP/s": lambda row: number(row.get("gflop_per_s")),
    "peak MB": lambda row: _mb(row.get("peak_bytes")),
    "mapped MB": lambda row: _mb(row.get("mapped_bytes")),
    "kept alike": lambda row: f"{100 * row['kept_overlap']:.1f} %" if "kept_overlap" in row else "",
    "times the first's": lambda row: times(row["times_first"]) if "times_first" in row else "",
    "others' cores": lambda row: number(row.get("others_cores")),
    "error (allowed)": lambda row: _error(row) if "error" in row else "",
}
NAMES = 3  # of the columns are names, not numbers


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args(arguments)
    if args.check and args.files:
        parser.error("--check is of all that is committed; give it no files")
    try:
        if args.files:
            for path in args.files:
                path.with_suffix(".md").write_text(markdown(read(path)), encoding="utf-8")
                print(path.with_suffix(".md"))
            return 0
        return check(root) if args.check else write(root)
    except ResultError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2


def check(root: Path) -> int:
    wrong = list(disagreements(root))
    for line in wrong:
        print(line)
    if wrong:
        print("what result files give is written by: python bench/report.py")
    return 1 if wrong else 0


def write(root: Path) -> int:
    """Write what does not agree; return 1 if something is left that no result file gives."""
    for path, text in texts(root).items():
        if _text(path) != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(root))
    return check(root)


def disagreements(root: Path) -> Iterator[str]:
    """A line for each file that is not what the result files give, with its first difference."""
    expected = texts(root)
    for path, text in expected.items():
        if (now := _text(path)) is None:
            yield f"{path.relative_to(root)}: missing"
        elif now != text:
            yield f"{path.relative_to(root)}: {_first_difference(now, text)}"
    results = root / "bench" / "results"
    for path in sorted(
        [
            *results.glob("*.svg"),
            *results.glob("fidelity/*.md"),
            *results.glob("*-20[0-9][0-9]-*.md"),
        ]
    ):
        if path not in expected:
            yield f"{path.relative_to(root)}: of no result file that counts; delete it"


def texts(root: Path) -> dict[Path, str]:
    """What the README, the table of each result file and the pictures should be."""
    readme, found = root / "README.md", sources(root)
    current = newest(found)
    tables = {source.path.with_suffix(".md"): markdown(source.result) for source in found}
    drawn = {path: picture.svg for path, picture in pictures.of(current).items()}
    text = replaced(readme.read_text(encoding="utf-8"), current, root)
    return tables | drawn | fidelity_report.texts(root) | {readme: text}


def markdown(result: Result) -> str:
    """All of a result file."""
    versions = software(result)
    lines = [
        f"# {hardware(result)}",
        "",
        f"{result['date']}, {commit(result)}, {result['machine']['device']}",
        "",
        versions,
        "",
        "Times are medians with their quartiles. % of floor compares neighbours in time, so that "
        "it holds where the machine's speed does not. Peak MB is memory taken beside the inputs; "
        "what is returned counts. An error is relative to the result's norm and was checked "
        "before the timing.",
    ]
    if result.get("ceilings"):
        cells = [
            [c["dtype"], number(c["copy_gb_per_s"]), number(c["product_gflop_per_s"])]
            for c in result["ceilings"]
        ]
        header = ["ceiling", "copy, GB/s read and written", "large product, GFLOP/s"]
        lines += ["", *table([header, *cells])]
    for op, rows in of_op(result["rows"]).items():
        lines += ["", f"## {op}", "", *_operation(rows)]
    lines += _skipped([row for row in result["rows"] if "skipped" in row])
    failed = [row for row in result["rows"] if "failed" in row]
    if failed:
        lines += ["", "## Failed", ""]
        lines += [
            f"- `{row['op']}`, {provider(row)}, {shape(row)}, {row['dtype']}: {cell(row['failed'])}"
            for row in failed
        ]
    return "\n".join(lines) + "\n"


def _operation(rows: list[Row]) -> list[str]:
    measured = [row for row in rows if "ms" in row]
    if not measured:
        return ["Nothing was measured."]
    lines = [told, ""] if (told := floors(measured)) else []
    if any(row.get("computes") == CROSS_ENTROPY for row in measured):
        lines += [
            "Those marked so compute the cross entropy of given labels, not the entropy, on the "
            "same shapes: they have nothing else.",
            "",
        ]
    columns = {name: [make(row) for row in measured] for name, make in COLUMNS.items()}
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    return lines + table([list(columns), *map(list, zip(*columns.values(), strict=True))], NAMES)


def _skipped(rows: list[Row]) -> list[str]:
    """A line for each provider and reason, with the operations it is of."""
    if not rows:
        return []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((provider(row), row["skipped"]), []).append(row)
    lines = [
        f"- {name}: {cell(reason)} ({', '.join(f'`{op}`' for op in of_op(group))}; "
        f"{len(group)} {'row' if len(group) == 1 else 'rows'})"
        for (name, reason), group in groups.items()
    ]
    return ["", "## Skipped", "", *lines]


def _error(row: Row) -> str:
    exact = row["error_allowed"] == 0
    return "exact" if exact else f"{row['error']:.1e} ({row['error_allowed']:.1e})"


def _mb(number_of_bytes: float | None) -> str:
    return "" if number_of_bytes is None else number(number_of_bytes / 1e6)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _first_difference(now: str, expected: str) -> str:
    """Where a text is not as expected, and what is there."""
    found, wanted = now.splitlines(), expected.splitlines()
    matcher = difflib.SequenceMatcher(None, found, wanted, autojunk=False)
    for kind, start, end, wanted_start, wanted_end in matcher.get_opcodes():
        if kind != "equal":
            has = found[start] if end > start else "nothing"
            gives = wanted[wanted_start] if wanted_end > wanted_start else "nothing"
            return f"line {start + 1} has {has!r}, the results give {gives!r}"
    return "its line ends differ"


if __name__ == "__main__":
    sys.exit(main())
