"""Turn result files (their form: `harness/records.py`) into tables, pictures and docs/benchmarks.md.

    python bench/reporting/report.py FILE.json ...     FILE.md beside each: all of its rows
    python bench/reporting/report.py                   bench/results/*.md, docs/benchmarks.md and,
                                                       where matplotlib is installed, the pictures
    python bench/reporting/report.py --check           exit 1, and say which Markdown disagrees with
                                                       the result files; nothing is written

docs/benchmarks.md and the pictures are of the newest file of each machine and suffix:
<machine>-<date>.json, <machine>-<date>-large.json; fidelity's of all of
bench/results/fidelity/*.jsonl. Only the pictures need more than Python.

The exit status is 2 when a file is no result, with one line that says why.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).parents[1].glob("*/"))
import fidelity_tables
import page
import pictures
from page import Source
from records import ROOT, Result, ResultError, Row, read
from report_text import (
    CROSS_ENTROPY,
    columns_table,
    commit,
    escaped,
    floors,
    grouped,
    hardware,
    megabytes,
    number,
    percent,
    provider,
    shape,
    software,
    table,
    times,
)

COLUMNS = {
    "provider": provider,
    "shape": shape,
    "dtype": lambda row: row["dtype"],
    "ms": lambda row: number(row["ms"]),
    "quartiles": lambda row: f"{number(row['ms_low'])}–{number(row['ms_high'])}",
    "rounds": lambda row: str(row["rounds"]),
    "floor ms": lambda row: number(row.get("floor_ms")),
    "% of floor": lambda row: percent(row.get("percent_of_floor")),
    "% of 6 B": lambda row: percent(row.get("percent_of_6_bytes")),
    "registers": lambda row: "; ".join(
        f"{k['registers']}, {k['programs']} a multiprocessor" for k in row.get("kernels", ())
    ),
    "GB/s": lambda row: number(row.get("gb_per_s")),
    "GFLOP/s": lambda row: number(row.get("gflop_per_s")),
    "peak MB": lambda row: megabytes(row.get("peak_bytes")),
    "mapped MB": lambda row: megabytes(row.get("mapped_bytes")),
    "kept alike": lambda row: f"{100 * row['kept_overlap']:.1f} %" if "kept_overlap" in row else "",
    "times the first's": lambda row: times(row.get("times_first")),
    "others' cores": lambda row: number(row.get("others_cores")),
    "error (allowed)": lambda row: _error(row) if "error" in row else "",
}
NAMES = 3  # of the columns are names, not numbers
HINT = "tables and docs/benchmarks.md are written by: python bench/reporting/report.py"


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
        for path in args.files:
            path.with_suffix(".md").write_text(markdown(read(path)), encoding="utf-8")
            print(path.with_suffix(".md"))
        return 0 if args.files else check(root) if args.check else write(root)
    except ResultError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2


def sources(root: Path) -> list[Source]:
    """Return all files of bench/results, not of its folders; their names must be `write`'s."""
    found = []
    for path in sorted((root / "bench" / "results").glob("*.json")):
        result = read(path)
        start = f"{result['machine']['name']}-{result['date'][:10]}"
        if not (named := re.fullmatch(rf"{re.escape(start)}(-.+)?", path.stem)):
            raise ResultError(f"{path}: its name must begin with {start}, its machine and date")
        found.append(Source(path, result, named[1] or ""))
    return found


def newest(found: list[Source]) -> list[Source]:
    """Return the last of each machine and suffix, CPUs first."""
    last: dict[tuple[bool, str, str], Source] = {}
    for source in sorted(found, key=lambda source: str(source.result["date"])):
        last[source.device != "cpu", source.machine, source.suffix] = source
    return [last[key] for key in sorted(last)]


def texts(root: Path) -> dict[Path, str]:
    """Return what the table of each result file and docs/benchmarks.md should be."""
    found, fidelity = sources(root), fidelity_tables.all_of(root)
    written = {source.path.with_suffix(".md"): markdown(source.result) for source in found}
    for model in fidelity:
        written[model.path.with_suffix(".md")] = fidelity_tables.markdown(model)
    return written | {page.path(root): page.markdown(root, newest(found), fidelity)}


def drawings(root: Path) -> dict[Path, pictures.Picture]:
    return pictures.planned(root, newest(sources(root)), fidelity_tables.all_of(root))


def check(root: Path) -> int:
    wrong = list(disagreements(root))
    print("\n".join([*wrong, HINT]) if wrong else "", end="\n" if wrong else "")
    return 1 if wrong else 0


def write(root: Path) -> int:
    """Write what disagrees, draw the pictures; return 1 if something is left of no result file."""
    for path, text in texts(root).items():
        if _text(path) != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(root))
    try:
        for path, picture in drawings(root).items():
            pictures.save(picture, path)
    except ImportError as error:
        print(f"the pictures are as they were: {error}; pip install '.[bench]'", file=sys.stderr)
    return check(root)


def disagreements(root: Path) -> Iterator[str]:
    """Yield a line for each Markdown file that is not what the result files give, and how.

    Of pictures only which there are: their bytes depend on the version of matplotlib.
    """
    expected, results, drawn = texts(root), root / "bench" / "results", drawings(root)
    for path, text in expected.items():
        if (now := _text(path)) is None:
            yield f"{path.relative_to(root)}: missing"
        elif now != text:
            yield f"{path.relative_to(root)}: {_first_difference(now, text)}"
    yield from (f"{path.relative_to(root)}: missing" for path in drawn if not path.exists())
    patterns = "*.svg", "fidelity/*.svg", "fidelity/*.md", "*-20[0-9][0-9]-*.md"
    for path in sorted(path for pattern in patterns for path in results.glob(pattern)):
        if path not in expected and path not in drawn:
            yield f"{path.relative_to(root)}: of no result file that counts; delete it"


def markdown(result: Result) -> str:
    """Return all of a result file."""
    lines = [
        f"# {hardware(result)}",
        "",
        f"{result['date']}, {commit(result)}, {result['machine']['device']}",
        "",
        software(result),
        "",
        "Times are medians with their quartiles. % of floor compares neighbours in time, so that "
        "it holds where the machine's speed does not. Peak MB is memory taken beside the inputs; "
        "what is returned counts. An error is relative to the result's norm and was checked "
        "before the timing.",
    ]
    if result.get("ceilings"):
        header = ["ceiling", "copy, GB/s read and written", "large product, GFLOP/s"]
        cells = [
            [c["dtype"], number(c["copy_gb_per_s"]), number(c["product_gflop_per_s"])]
            for c in result["ceilings"]
        ]
        lines += ["", *table([header, *cells])]
    for op, rows in grouped(result["rows"], lambda row: row["op"]).items():
        lines += ["", f"## {op}", "", *_operation([row for row in rows if "ms" in row])]
    skipped = grouped(
        (row for row in result["rows"] if "skipped" in row),
        lambda row: f"- {provider(row)}: {escaped(row['skipped'])}",
    )
    failed = [
        f"- `{row['op']}`, {provider(row)}, {shape(row)}, {row['dtype']}: {escaped(row['failed'])}"
        for row in result["rows"]
        if "failed" in row
    ]
    lines += ["", "## Skipped", ""] if skipped else []
    for start, rows in skipped.items():
        ops = ", ".join(f"`{op}`" for op in grouped(rows, lambda row: row["op"]))
        lines.append(f"{start} ({ops}; {len(rows)} {'row' if len(rows) == 1 else 'rows'})")
    return "\n".join(lines + (["", "## Failed", "", *failed] if failed else [])) + "\n"


def _operation(measured: list[Row]) -> list[str]:
    if not measured:
        return ["Nothing was measured."]
    lines = [told, ""] if (told := floors(measured)) else []
    if any(row.get("computes") == CROSS_ENTROPY for row in measured):
        lines += [
            "Those marked so compute the cross entropy of given labels, not the entropy, on the "
            "same shapes: they have nothing else.",
            "",
        ]
    return lines + columns_table(measured, COLUMNS, NAMES)


def _error(row: Row) -> str:
    exact = row["error_allowed"] == 0
    return "exact" if exact else f"{row['error']:.1e} ({row['error_allowed']:.1e})"


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _first_difference(now: str, expected: str) -> str:
    """Say which line is not as expected, and what is there."""
    pairs = zip_longest(now.splitlines(), expected.splitlines(), fillvalue="nothing")
    for i, (has, gives) in enumerate(pairs, 1):
        if has != gives:
            return f"line {i} has {has!r}, the results give {gives!r}"
    return "its line ends differ"


if __name__ == "__main__":
    sys.exit(main())
