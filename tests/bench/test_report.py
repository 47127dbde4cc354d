"""bench/reporting/report.py: what is in result files is what tables, pictures and docs/ say."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import records
import report
from invented_results import PAGES, cells, invented, write_pages
from report_text import count, duration, escaped, number, size, table, times

ROOT = Path(__file__).parents[2]
CPU, GPU = "inventa-9-2core", "inventa-g1"
PICTURES = [f"{machine}-kernels.svg" for machine in (CPU, GPU)]
Said = Callable[..., tuple[int, str]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with the results of two machines and their tables, without pictures' contents."""
    results = tmp_path / "bench" / "results"
    for device in ("cpu", "cuda"):
        records.write(invented(device), results)
    for name in PICTURES:
        (results / name).write_text("<svg/>")
    write_pages(tmp_path)
    report.write(tmp_path)
    return tmp_path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """The exit status of report.py, and what it printed."""

    def run(root: Path, *arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = report.main(list(arguments), root)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def page(root: Path) -> str:
    return (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def rows_of(root: Path, name: str) -> str:
    return (root / "bench/results" / f"{name}-2030-01-02.md").read_text(encoding="utf-8")


def measured(result: records.Result, **wanted: Any) -> records.Row:
    (found,) = [r for r in result["rows"] if all(r.get(k) == v for k, v in wanted.items())]
    return found


def test_the_repository_agrees(said: Said) -> None:
    code, output = said(ROOT, "--check")
    assert code == 0, output


def test_only_python_is_needed(root: Path) -> None:
    """Neither torch nor anything else that is installed: -S leaves out site-packages."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'bench/reporting')!r})\n"
        f"import report, compare\n"
        f"from pathlib import Path\n"
        f"sys.exit(report.main(['--check'], Path({str(root)!r})))"
    )
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_has_the_numbers_of_the_rows(root: Path) -> None:
    result = invented()
    of = {"op": "softmax_entropy_grad", "model": "Llama-3.1-8B", "dtype": "bfloat16"}
    # The others are beside what runs by default on a CPU.
    ours, eager = (measured(result, **of, provider=name) for name in ("ours, cpp", "eager"))
    start = "`softmax_entropy_grad`", "Llama-3.1-8B, T 256, bf16"
    floor = f"{ours['percent_of_floor']:.0f} %"
    found = cells(page(root), *start, "ours, cpp")
    assert found[:3] == [duration(ours["ms"]), floor, size(ours["peak_bytes"])]
    ratios = [times(eager[name] / ours[name]) for name in ("ms", "peak_bytes")]
    caption = "Inventa G1, 80 GB of memory, torch 2.13.0, triton 3.7.1, driver 999.1, 2030-01-02, "
    assert f"\n{caption}commit 0123456789." in page(root)
    found = cells(page(root), *start, "eager")
    assert found[0] == f"{duration(eager['ms'])} ({ratios[0]})"
    assert found[2] == f"{size(eager['peak_bytes'])} ({ratios[1]})"


def test_cross_entropy_skipped_and_failed_are_called_so(root: Path) -> None:
    for text in (page(root), rows_of(root, GPU)):
        assert "| Liger (cross entropy) " in text
        assert "| Liger " not in text.replace("| Liger (cross entropy) ", "")
    skipped = rows_of(root, CPU).split("## Skipped")[1]
    assert "- Liger (cross entropy): needs a GPU (`linear_entropy`; " in skipped
    failed = rows_of(root, GPU).split("## Failed")[1]
    assert re.search(r"HFPrune's arithmetic: out of memory \(.*Qwen2.5-7B, T 8192, bf16", failed)


def test_every_row_is_in_the_table(root: Path) -> None:
    rows = [row for row in invented("cuda")["rows"] if "ms" in row]
    lines = rows_of(root, GPU).splitlines()
    shown = [line for line in lines if line.endswith(" 1.2e-03 (3.1e-03) |")]
    assert len(shown) == len(rows) > 100


@pytest.mark.parametrize("name", [f"bench/results/{GPU}-2030-01-02.md", "docs/benchmarks.md"])
def test_what_is_missing_or_edited_is_found(root: Path, name: str, said: Said) -> None:
    assert said(root, "--check") == (0, "")
    path = root / name
    text = path.read_text(encoding="utf-8")
    path.unlink()
    assert said(root, "--check") == (1, f"{name}: missing\n{report.HINT}\n")
    path.write_text(text.replace("2030", "2031", 1), encoding="utf-8")
    code, output = said(root, "--check")
    assert code == 1
    assert re.match(rf"{name}: line \d+ has '.*2031.*', the results give '.*2030", output)
    path.write_text(text.rstrip("\n"), encoding="utf-8")
    assert re.match(
        rf"{name}: line \d+ has 'nothing', the results give ''", said(root, "--check")[1]
    )
    report.write(root)
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", PAGES)
def test_a_missing_page_whose_words_are_written_by_hand_is_found(
    root: Path, name: str, said: Said
) -> None:
    assert said(root, "--check") == (0, "")
    (root / name).unlink()
    assert said(root, "--check") == (1, f"{name}: missing\n{report.HINT}\n")


def test_pictures_are_drawn(root: Path, said: Said) -> None:
    pytest.importorskip("matplotlib")
    (root / "bench/results" / PICTURES[0]).unlink()
    (root / "bench/results/gone-kernels.svg").write_text("<svg/>")
    assert said(root, "--check")[1].splitlines()[:2] == [
        f"bench/results/{PICTURES[0]}: missing",
        "bench/results/gone-kernels.svg: of no result file that counts; delete it",
    ]
    (root / "bench/results/gone-kernels.svg").unlink()
    assert said(root) == (0, "")
    drawn = {n: (root / "bench/results" / n).read_text(encoding="utf-8") for n in PICTURES}
    for name, text in drawn.items():
        assert ElementTree.fromstring(text).tag.endswith("svg")
        assert ("compact_columns" in text) == name.startswith(CPU)
    assert "Cut Cross Entropy (cross entropy)" in drawn[f"{GPU}-kernels.svg"]


def test_the_newest_file_of_each_suffix_counts(root: Path, said: Said) -> None:
    results = root / "bench" / "results"
    newer, large = invented(date="2030-02-03"), invented(date="2030-01-05")
    newer["rows"] = [row for row in newer["rows"] if row["op"] != "score"]
    large["rows"] = [row for row in large["rows"] if row["op"] == "score"]
    records.write(newer, results)
    records.write(large, results, suffix="-large")
    assert said(root, "--check")[0] == 1
    report.write(root)
    assert f"{CPU}-2030-01-02.md" not in page(root)
    assert f"{CPU}-2030-02-03.md" in page(root)
    assert f"{CPU}-2030-01-05-large.md" in page(root)


def test_what_has_not_been_measured_is_said(tmp_path: Path) -> None:
    report.write(tmp_path)
    assert page(tmp_path).count("Not measured on a GPU yet.") == 2  # compaction is a CPU's
    assert page(tmp_path).count("Not measured on a CPU yet.") == 3
    records.write(invented(), tmp_path / "bench" / "results")
    report.write(tmp_path)
    assert page(tmp_path).count("Not measured on a GPU yet.") == 2
    assert "on a CPU yet" not in page(tmp_path)


def test_a_file_of_ones_own(tmp_path: Path, said: Said) -> None:
    path = records.write(invented(), tmp_path)
    assert said(ROOT, str(path)) == (0, f"{path.with_suffix('.md')}\n")
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text == report.markdown(json.loads(path.read_text()))
    assert text.startswith("# Inventa 9, 2 cores, 16 GB of memory\n")


FIRST = invented()["rows"][0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not a result file: "),
        ("[]", "not a result file: "),
        (json.dumps(invented() | {"rows": [{"op": "score"}]}), "'model' cannot be"),
        (json.dumps(invented() | {"rows": [FIRST | {"ms": 0.0}]}), "'ms' cannot be"),
        (json.dumps(invented() | {"rows": [FIRST | {"skipped": "why"}]}), "row 1 has not one of"),
    ],
)
def test_no_result_file(tmp_path: Path, text: str, reason: str, said: Said) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    code, output = said(ROOT, str(path))
    assert (code, output.count("\n")) == (2, 1)
    assert output.startswith(f"report.py: {path}: ")
    assert reason in output


def test_numbers_and_tables() -> None:
    assert [number(float(v)) for v in ("nan", "inf")] == ["nan", "inf"]
    values = [0.01234, 0.999, 0.9996, 1.234, 12.34, 123.4, 999.9, 1234, 1_234_567, 0, None]
    assert [number(value) for value in values] == [
        "0.0123", "0.999", "1.00", "1.23", "12.3", "123", "1,000", "1,230", "1,230,000", "0", "",
    ]  # fmt: skip
    assert (duration(999), duration(1500)) == ("999 ms", "1.50 s")
    sizes = ["12 B", "1.50 KB", "1.00 MB", "3.20 GB"]
    assert [size(v) for v in (12, 1500, 999_999, 3.2e9)] == sizes
    assert [count(v) for v in (1_049_728, 2.47e9)] == ["1.05 M", "2.47 B"]
    assert escaped("a|b\n  c") == "a\\|b c"
    assert table([["a", "ms"], ["long name", "1.5"], ["b", "12.5"]]) == [
        "| a         |   ms |",
        "|-----------|-----:|",
        "| long name |  1.5 |",
        "| b         | 12.5 |",
    ]
