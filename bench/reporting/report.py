"""Turn result files (`harness/records.py`) into tables, pictures and docs/benchmarks.md.

    python bench/reporting/report.py FILE ...          FILE.md beside each: all rows of a .json, or
                                                       of a .jsonl of fidelity.py or samples.py
    python bench/reporting/report.py                   bench/results/*.md, docs/benchmarks.md and,
                                                       where matplotlib is installed, the pictures
    python bench/reporting/report.py --check           exit 1, and say which Markdown disagrees with
                                                       the result files; nothing is written

docs/benchmarks.md and the pictures are of the newest file of each machine and suffix:
<machine>-<date>.json, <machine>-<date>-large.json; fidelity's of all of
bench/results/fidelity/*.jsonl. docs/evidence.md has tables of these beside its claims,
docs/experts.md of models with experts, docs/recovery.md of recovery; their words are written by
hand. Only the pictures need more than Python.

The exit status is 2 when a file is no result, with one line that says why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).parents[1].glob("*/"))
import evidence_tables
import fidelity_tables
import mixture_tables
import page
import pictures
import recovery_tables
import report_text as text
import samples_tables
from page import Source
from records import ROOT, Result, ResultError, read

NOTE = """\
% of floor compares neighbours in time, so that it holds where the machine's speed does not. \
Memory is what was taken beside the inputs; what is returned counts. An error is relative to the \
result's norm. Providers marked (cross entropy) compute that of given labels, not the entropy."""
HINT = "tables and docs/benchmarks.md are written by: python bench/reporting/report.py"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args(arguments)
    if args.check and args.files:
        parser.error("--check is of all that is committed; give it no files")
    try:
        for path in args.files:
            path.with_suffix(".md").write_text(of_file(path), encoding="utf-8")
            print(path.with_suffix(".md"))
        if not args.files and not args.check:
            write(root)
            try:
                for path, picture in expected(root)[1].items():
                    pictures.save(picture, path)
            except ImportError as error:
                print(f"the pictures are as they were: {error}", file=sys.stderr)
        wrong = [] if args.files else list(disagreements(root))
    except ResultError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    print("".join(f"{line}\n" for line in [*wrong, HINT] if wrong), end="")
    return 1 if wrong else 0


def newest(root: Path) -> tuple[list[Source], list[Source]]:
    """Return all files of bench/results, and the last of each machine and suffix, CPUs first."""
    found, last = [], {}
    for path in (root / "bench" / "results").glob("*.json"):
        result = read(path)
        start = f"{result['machine']['name']}-{result['date'][:10]}"
        if not path.stem.startswith(start):
            raise ResultError(f"{path}: its name must begin with {start}, its machine and date")
        found.append(Source(path, result))
    for source in sorted(found, key=lambda source: str(source.result["date"])):
        last[source.device != "cpu", source.machine, source.suffix] = source
    return found, [last[key] for key in sorted(last)]


def expected(root: Path) -> tuple[dict[Path, str], dict[Path, pictures.Picture]]:
    """Return what each table and docs/benchmarks.md should be, and what is to be drawn."""
    (found, current), fidelity = newest(root), fidelity_tables.all_of(root)
    texts = {source.path.with_suffix(".md"): markdown(source.result) for source in found}
    texts |= {model.path.with_suffix(".md"): fidelity_tables.markdown(model) for model in fidelity}
    mixtures = [model for model in fidelity if model.has_experts]
    fidelity = [model for model in fidelity if not model.has_experts]
    samples = fidelity_tables.all_of(root, samples=True)
    recovered = recovery_tables.all_of(root)
    curves = [model for model in fidelity if len(model.ratios) > 1]  # of others a row alone
    drawn = pictures.planned(root, current, curves, recovered)
    texts[page.path(root)] = page.markdown(root, current, curves, drawn)
    link, at = partial(page.link, root), recovery_tables.picture_path(root)
    image = f"![{drawn[at].alt}]({link(at)})" if at in drawn else ""
    by_hand: dict[Path, Callable[[str], str]] = {
        mixture_tables.path(root): lambda text: mixture_tables.page(text, mixtures, link),
        evidence_tables.path(root): lambda t: evidence_tables.page(t, fidelity, samples, link),
        root / "README.md": lambda text: evidence_tables.readme(text, fidelity),
        recovery_tables.path(root): lambda text: recovery_tables.page(text, recovered, image),
    }
    for path, with_tables in by_hand.items():  # most of each page
        if path.exists():
            texts[path] = with_tables(path.read_text(encoding="utf-8"))
    return texts, drawn


def write(root: Path) -> None:
    for path, new in expected(root)[0].items():
        if not path.exists() or path.read_text(encoding="utf-8") != new:
            path.parent.mkdir(exist_ok=True)
            path.write_text(new, encoding="utf-8")
            print(path.relative_to(root))


def disagreements(root: Path) -> Iterator[str]:
    """Yield a line for each Markdown file that is not what the result files give, and how.

    Of pictures only which there are: their bytes depend on the version of matplotlib.
    """
    texts, drawn = expected(root)
    tables = evidence_tables, mixture_tables, recovery_tables
    by_hand = root / "README.md", *(each.path(root) for each in tables)
    for path, want in {**dict.fromkeys((*by_hand, *drawn), ""), **texts}.items():
        now = path.read_text(encoding="utf-8") if path.exists() else None
        if now is None:
            yield f"{path.relative_to(root)}: missing"
        elif want and now != want:
            lines = zip_longest(now.split("\n"), want.split("\n"), fillvalue="nothing")
            i, (has, gives) = next((i, two) for i, two in enumerate(lines, 1) if two[0] != two[1])
            yield f"{path.relative_to(root)}: line {i} has {has!r}, the results give {gives!r}"
    evidence, readme = texts.get(evidence_tables.path(root)), texts.get(root / "README.md")
    yield from evidence_tables.lost_headings(evidence, readme)
    for number in evidence_tables.unsupported_claims(evidence or ""):
        yield f"docs/evidence.md: a claim says {number}, which no table of the page has"
    patterns = "*.svg", "*/*.svg", "fidelity/*.md", "*-20[0-9][0-9]-*.md"
    for path in sorted(p for each in patterns for p in (root / "bench" / "results").glob(each)):
        if path not in texts and path not in drawn:
            yield f"{path.relative_to(root)}: of no result file that counts; delete it"


def of_file(path: Path) -> str:
    """Return all of a result file in Markdown."""
    if path.suffix != ".jsonl":
        return markdown(read(path))
    measured = fidelity_tables.read(path)
    if fidelity_tables.of_samples(path):
        return "\n".join(samples_tables.section([measured])) + "\n"
    return fidelity_tables.markdown(measured)


def markdown(result: Result) -> str:
    """Return all of a result file."""
    head = f"{result['date']}, {text.commit(result)}, {result['machine']['device']}"
    lines = [f"# {text.hardware(result)}", "", head, "", text.software(result), "", NOTE]
    if result.get("ceilings"):
        cells = [["ceiling", "copy, GB/s read and written", "large product, GFLOP/s"]]
        for each in result["ceilings"]:
            rates = each["copy_gb_per_s"], each["product_gflop_per_s"]
            cells.append([each["dtype"], *map(text.number, rates)])
        lines += ["", *text.table(cells)]
    for op, rows in text.grouped(result["rows"], lambda row: str(row["op"])).items():
        measured = [row for row in rows if "ms" in row]
        lines += ["", f"## {op}", "", text.floors(measured) or "No floor.", ""]
        names = [name for name in text.COLUMNS if name != "op"]
        lines += text.rows_table(measured, names, 2) if measured else ["Nothing was measured."]
    for state in ("skipped", "failed"):
        reasons: dict[str, list[str]] = {}
        for row in (row for row in result["rows"] if state in row):
            reason = f"- {text.provider(row)}: {text.escaped(row[state])}"
            shape = f" {text.COLUMNS['shape'](row)}" if state == "failed" else ""
            reasons.setdefault(reason, []).append(f"`{row['op']}`{shape}")
        lines += ["", f"## {state.title()}", ""] if reasons else []
        for start, of in reasons.items():
            lines.append(f"{start} ({'; '.join(dict.fromkeys(of))}; {len(of)} rows)")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
