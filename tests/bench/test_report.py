"""bench/report.py: what is in result files is what README, tables and pictures say."""

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
from invented_results import invented
from report_text import cell, count, duration, number, size, table

ROOT = Path(__file__).parents[2]
PARTS = ("kernels", "scoring", "compaction", "pictures")
# Each below 60 KB, as they are in the repository.
MOST_BYTES = 60_000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with a README of every part and the results of two machines, written by report."""
    results = tmp_path / "bench" / "results"
    for device in ("cpu", "cuda"):
        records.write(invented(device), results)
    parts = [f"## {part}\n\n<!-- results: {part} -->\n<!-- end -->\n" for part in PARTS]
    text = "\n".join(["# A project", "It is 3.14 ms fast.", *parts])
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert report.main([], tmp_path) == 0
    return tmp_path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The exit status of report.py, and what it printed."""

    def run(root: Path, *arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = report.main(list(arguments), root)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def cells(text: str, op: str, shape: str) -> list[str]:
    """The cells of the first line of a table that is of an operation and a shape."""
    line = next(x for x in text.splitlines() if x.startswith(f"| `{op}`") and shape in x)
    return [part.strip() for part in line.strip("|").split("|")]


def measured(result: records.Result, **wanted: Any) -> records.Row:
    (found,) = [r for r in result["rows"] if all(r.get(k) == v for k, v in wanted.items())]
    return found


def test_the_repository_agrees(said: Callable[..., tuple[int, str]]) -> None:
    code, output = said(ROOT, "--check")
    assert code == 0, output


def test_only_python_is_needed(root: Path) -> None:
    """Neither torch nor anything else that is installed: -S leaves out site-packages."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r}); import report, compare\n"
        f"from pathlib import Path\n"
        f"sys.exit(report.main(['--check'], Path({str(root)!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_written_once_it_agrees(root: Path, said: Callable[..., tuple[int, str]]) -> None:
    assert said(root, "--check") == (0, "")
    assert said(root) == (0, ""), "what agrees is written again"
    assert "It is 3.14 ms fast." in readme(root)


def test_the_readme_has_the_numbers_of_the_rows(root: Path) -> None:
    result = invented()
    of = {"op": "softmax_entropy_grad", "model": "Llama-3.1-8B", "dtype": "bfloat16"}
    ours, eager = (measured(result, **of, provider=name) for name in ("ours, torch", "eager"))
    found = cells(readme(root), "softmax_entropy_grad", "Llama-3.1-8B, T 256, bf16")
    assert found[2:5] == [
        f"{ours['ms']:.1f}", f"{ours['percent_of_floor']:.0f} %", f"{ours['peak_bytes'] / 1e6:.1f}",
    ]  # fmt: skip
    ratio = eager["ms"] / ours["ms"]
    assert found[6] == f"{eager['ms']:.1f} ({ratio:.2f} ×), {eager['peak_bytes'] / 1e6:.0f} MB"


def test_a_caption_has_hardware_versions_and_date(root: Path) -> None:
    for start, rest in (
        ("Inventa 9, 2 cores, 16 GB of memory, torch 2.13.0, 2 threads, 2030-01-02, ", ""),
        ("Inventa G1, 80 GB of memory, torch 2.13.0, triton 3.7.1, driver 999.1, 2030-01-02, ", ""),
    ):
        lines = [line for line in readme(root).splitlines() if line.startswith(start)]
        assert len(lines) >= 2, start + rest
        for line in lines:
            assert "commit 0123456789." in line
            (link,) = re.findall(r"\[All rows\]\((.+?)\)", line)
            assert (root / link).exists()


def test_cross_entropy_is_called_so(root: Path) -> None:
    text = readme(root)
    before, after = text.split("it does not compute entropy:", 1)
    assert "| Liger" not in before
    assert "computes the cross entropy of given labels" in before
    assert "torch linear_cross_entropy" in after.splitlines()[2]
    table_of = (root / "bench/results/inventa-g1-2030-01-02.md").read_text(encoding="utf-8")
    assert "| Liger (cross entropy) " in table_of
    assert "| Liger " not in table_of.replace("| Liger (cross entropy) ", "")
    picture = (root / "bench/results/inventa-g1-kernels.svg").read_text(encoding="utf-8")
    assert ">Cut Cross Entropy (cross entropy)<" in picture


def test_skipped_and_failed_have_their_reasons(root: Path) -> None:
    assert "Skipped: Liger, Cut Cross Entropy (needs a GPU)." in readme(root)
    cpu = (root / "bench/results/inventa-9-2core-2030-01-02.md").read_text(encoding="utf-8")
    assert "- Liger (cross entropy): needs a GPU (`linear_entropy`; " in cpu
    gpu = (root / "bench/results/inventa-g1-2030-01-02.md").read_text(encoding="utf-8")
    _, failed = gpu.split("## Failed")
    assert "HFPrune's arithmetic, T 8192, D 4096, V 513024, bfloat16: out of memory" in failed
    picture = (root / "bench/results/inventa-g1-scaling.svg").read_text(encoding="utf-8")
    assert "failed at 513k" in picture


def test_every_row_is_in_the_table(root: Path) -> None:
    text = (root / "bench/results/inventa-g1-2030-01-02.md").read_text(encoding="utf-8")
    rows = [row for row in invented("cuda")["rows"] if "ms" in row]
    shown = [line for line in text.splitlines() if line.endswith(" 1.2e-03 (3.1e-03) |")]
    assert len(shown) == len(rows) > 100
    assert len({len(line) for line in shown if "gated" in line}) <= 1, "columns are not aligned"


@pytest.mark.parametrize("part", PARTS[:3])
def test_a_tampered_number_is_found(
    root: Path, part: str, said: Callable[..., tuple[int, str]]
) -> None:
    before, after = readme(root).split(f"<!-- results: {part} -->")
    tampered = re.sub(r"(\d\.\d) ms|(\d\.\d+) ×|\| +(\d+) %", "0.1 ms", after, count=1)
    assert tampered != after
    text = f"{before}<!-- results: {part} -->{tampered}"
    (root / "README.md").write_text(text, encoding="utf-8")
    code, output = said(root, "--check")
    assert code == 1
    assert re.match(r"README\.md: line \d+ has '.*0\.1 ms.*', the results give '", output)
    assert said(root)[0] == 0
    assert "0.1 ms" not in readme(root)


def test_text_outside_the_parts_is_nobodys(
    root: Path, said: Callable[..., tuple[int, str]]
) -> None:
    (root / "README.md").write_text(readme(root).replace("3.14 ms", "3.15 ms"), encoding="utf-8")
    assert said(root, "--check")[0] == 0


@pytest.mark.parametrize(
    "name", ["inventa-g1-kernels.svg", "inventa-9-2core-scaling.svg", "inventa-g1-2030-01-02.md"]
)
def test_what_is_missing_or_edited_is_found(
    root: Path, name: str, said: Callable[..., tuple[int, str]]
) -> None:
    path = root / "bench" / "results" / name
    text = path.read_text(encoding="utf-8")
    path.unlink()
    assert said(root, "--check") == (1, f"bench/results/{name}: missing\n{HINT}")
    path.write_text(text.replace("2030", "2031", 1), encoding="utf-8")
    code, output = said(root, "--check")
    assert code == 1
    assert output.startswith(f"bench/results/{name}: line ")
    assert said(root)[0] == 0
    assert path.read_text(encoding="utf-8") == text


HINT = "what result files give is written by: python bench/report.py\n"


def test_a_picture_of_nothing_is_found(root: Path, said: Callable[..., tuple[int, str]]) -> None:
    (root / "bench/results/gone-kernels.svg").write_text("<svg/>")
    code, output = said(root, "--check")
    assert (code, output.splitlines()[0]) == (
        1, "bench/results/gone-kernels.svg: of no result file that counts; delete it",
    )  # fmt: skip
    assert said(root)[0] == 1, "writing does not mend it"


def test_the_newest_file_of_each_suffix_counts(
    root: Path, said: Callable[..., tuple[int, str]]
) -> None:
    results = root / "bench" / "results"
    newer, large = invented(date="2030-02-03"), invented(date="2030-01-05")
    newer["rows"] = [row for row in newer["rows"] if row["op"] != "score"]
    large["rows"] = [row for row in large["rows"] if row["op"] == "score"]
    records.write(newer, results)
    records.write(large, results, suffix="-large")
    assert said(root, "--check")[0] == 1
    assert said(root)[0] == 0
    text = readme(root)
    assert "inventa-9-2core-2030-01-02.md" not in text
    assert "inventa-9-2core-2030-02-03.md" in text
    assert "inventa-9-2core-2030-01-05-large.md" in text
    assert (results / "inventa-9-2core-2030-01-02.md").exists()
    scaling = (results / "inventa-9-2core-scaling.svg").read_text(encoding="utf-8")
    assert "parameters" in scaling, "series of both files are in one picture"


def test_what_has_not_been_measured_is_said(
    tmp_path: Path, said: Callable[..., tuple[int, str]]
) -> None:
    parts = "".join(f"<!-- results: {part} -->\n<!-- end -->\n" for part in PARTS)
    (tmp_path / "README.md").write_text(parts, encoding="utf-8")
    assert said(tmp_path)[0] == 0
    assert readme(tmp_path).count("Not measured on a GPU yet.") == 2  # compaction is a CPU's
    assert readme(tmp_path).count("Not measured on a CPU yet.") == 3
    records.write(invented(), tmp_path / "bench" / "results")
    assert said(tmp_path)[0] == 0
    assert readme(tmp_path).count("Not measured on a GPU yet.") == 2
    assert "on a CPU yet" not in readme(tmp_path)


def test_a_readme_without_parts_is_left_alone(
    tmp_path: Path, said: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "README.md").write_text("# Nothing\n")
    assert said(tmp_path) == (0, "")
    assert readme(tmp_path) == "# Nothing\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<!-- results: speed -->\n<!-- end -->\n", "no part is named 'speed'"),
        ("<!-- results: kernels -->\nno end\n", "has no '<!-- end -->'"),
        ("<!-- results: kernels -->\n<!-- results: scoring -->\n<!-- end -->\n", "has no '<!-- "),
    ],
)
def test_bad_markers(
    tmp_path: Path, text: str, reason: str, said: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "README.md").write_text(text)
    code, output = said(tmp_path)
    assert (code, reason in output, output.count("\n")) == (2, True, 1)
    assert readme(tmp_path) == text


def test_a_file_of_ones_own(tmp_path: Path, said: Callable[..., tuple[int, str]]) -> None:
    path = records.write(invented(), tmp_path)
    code, output = said(ROOT, str(path))
    assert (code, output) == (0, f"{path.with_suffix('.md')}\n")
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text == report.markdown(json.loads(path.read_text()))
    assert text.startswith("# Inventa 9, 2 cores, 16 GB of memory\n")


BAD = [
    ("{", "not JSON: "),
    ("[]", "not a result file: "),
    ('{"machine": {}}', "not a result file: "),
    (json.dumps(invented() | {"rows": [{"op": "score"}]}), "not a result file: 'model' cannot be"),
    (json.dumps(invented() | {"rows": [invented()["rows"][0] | {"ms": 0.0}]}), "'ms' cannot be"),
    (
        json.dumps(invented() | {"rows": [invented()["rows"][0] | {"skipped": "why"}]}),
        "row 1 has not one of",
    ),
]


@pytest.mark.parametrize(("text", "reason"), BAD)
def test_no_result_file(
    tmp_path: Path, text: str, reason: str, said: Callable[..., tuple[int, str]]
) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    code, output = said(ROOT, str(path))
    assert (code, output.count("\n")) == (2, 1)
    assert output.startswith(f"report.py: {path}: ")
    assert reason in output


def test_a_file_by_another_name(root: Path, said: Callable[..., tuple[int, str]]) -> None:
    path = root / "bench/results/inventa-9-2core-2030-01-02.json"
    path.rename(path.with_name("mine.json"))
    code, output = said(root, "--check")
    assert code == 2
    assert "its name must begin with" in output


def test_pictures_are_small_and_within_their_sheet(root: Path) -> None:
    paths = sorted((root / "bench" / "results").glob("*.svg"))
    assert len(paths) == 4
    for path in paths:
        assert path.stat().st_size < MOST_BYTES
        sheet = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        width, height = float(sheet.attrib["width"]), float(sheet.attrib["height"])
        for element in sheet.iter():
            points = element.get("points", "").replace(",", " ").split()
            if "x" in element.attrib:
                points += [element.attrib["x"], element.attrib["y"]]
            if "cx" in element.attrib:
                points += [element.attrib["cx"], element.attrib["cy"]]
            assert all(0 <= float(x) <= width for x in points[::2]), ElementTree.tostring(element)
            assert all(0 <= float(y) <= height for y in points[1::2]), ElementTree.tostring(element)
        assert f"]({path.relative_to(root)})" in readme(root)


def test_a_point_is_where_its_number_is(root: Path) -> None:
    """Of compact_columns, the last panel that has an axis in percent."""
    text = (root / "bench/results/inventa-9-2core-kernels.svg").read_text(encoding="utf-8")
    text = text[text.index(">compact_columns<") : text.index(">linear_entropy: roofline<")]
    ticks = {
        int(found[2]): float(found[1])
        for found in re.finditer(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">(\d+)<', text)
    }
    result = invented()
    names = ("ours, in place", "ours, out=", "index_select", "numpy.take, out=")
    want = [
        ticks[0] + (ticks[100] - ticks[0]) * measured(result, op="compact_columns", provider=name)
        ["percent_of_floor"] / 100
        for name in names
    ]  # fmt: skip
    circles = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', text)]
    assert circles[1:] == pytest.approx(want, abs=0.2), "the first is of memcpy"


def test_numbers() -> None:
    values = [0.01234, 0.999, 0.9996, 1.234, 12.34, 123.4, 999.9, 1234, 1_234_567, 0]
    assert [number(value) for value in values] == [
        "0.0123", "0.999", "1.00", "1.23", "12.3", "123", "1,000", "1,230", "1,230,000", "0",
    ]  # fmt: skip
    assert number(10.0, zeros=False) == "10"
    assert number(0.5, zeros=False) == "0.5"
    assert number(None) == ""
    assert (duration(999), duration(1500)) == ("999 ms", "1.50 s")
    assert [size(v) for v in (12, 1500, 999_999, 3.2e9)] == [
        "12 B",
        "1.50 KB",
        "1.00 MB",
        "3.20 GB",
    ]
    assert [count(v) for v in (1_049_728, 2.47e9)] == ["1.05 M", "2.47 B"]
    assert cell("a|b\n  c") == "a\\|b c"


def test_a_table_is_aligned() -> None:
    assert table([["a", "ms"], ["long name", "1.5"], ["b", "12.5"]]) == [
        "| a         |   ms |",
        "|-----------|-----:|",
        "| long name |  1.5 |",
        "| b         | 12.5 |",
    ]
