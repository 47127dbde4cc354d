"""bench/reporting/compare.py: what got worse between two result files, and what is only noise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare
import pytest
import records
from invented_results import invented
from records import Result, Row

Compare = Callable[..., tuple[int, str]]


@pytest.fixture
def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    """Compare two results: compared(before, after, *options) -> exit status and what was said."""

    def run(before: Result | str, after: Result | str, *options: str) -> tuple[int, str]:
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, result in zip(paths, (before, after), strict=True):
            path.write_text(result if isinstance(result, str) else json.dumps(result))
        capsys.readouterr()
        code = compare.main([*map(str, paths), *options])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def of(result: Result, provider: str, op: str = "gated_taylor") -> Row:
    """Return the first row of a provider of an operation."""
    return next(r for r in result["rows"] if (r["op"], r["provider"]) == (op, provider))


def scaled(factor: float, floors: float | None = None) -> Callable[[Row], None]:
    """Make a row slower by a factor, and its distance from the floor larger by that or another."""

    def change(row: Row) -> None:
        for name in ("ms", "ms_low", "ms_high"):
            row[name] *= factor
        for name in ("percent_of_floor", "percent_low", "percent_high"):
            row[name] /= floors or factor

    return change


def changed(change: Callable[[Row], Any], provider: str = "ours, torch") -> Result:
    result = invented()
    change(of(result, provider))
    return result


def without_floor(result: Result) -> Result:
    for row in result["rows"]:
        for name in ("floor", "floor_ms", "percent_of_floor", "percent_low", "percent_high"):
            row.pop(name, None)
    return result


def noisy(row: Row) -> None:
    scaled(1.4)(row)
    row["percent_high"] *= 1.5  # a quarter of the rounds were as fast as ever


def failed(row: Row) -> None:
    for name in row.keys() - {*records.KEY}:
        del row[name]
    row["failed"] = "wrong: off by 2"


def more_memory(factor: float) -> Callable[[Row], None]:
    return lambda row: row.update(peak_bytes=row["peak_bytes"] * factor)


@pytest.mark.parametrize(
    ("change", "options", "code"),
    [
        (lambda row: None, (), 0),
        (scaled(1.24), (), 0),
        (scaled(1.26), (), 1),
        (scaled(1.24), ("--threshold", "1.2"), 1),
        (scaled(1.26), ("--threshold", "1.3"), 0),
        (noisy, (), 0),
        (scaled(2.0, floors=1), (), 0),
        (scaled(1.0, floors=1.5), (), 1),
        (scaled(0.5, floors=1.5), (), 0),  # its floor got faster still
        (more_memory(1.04), (), 0),
        (more_memory(1.06), (), 1),
        (more_memory(1.04), ("--memory-threshold", "1.03"), 1),
        (more_memory(1.06), ("--memory-threshold", "1.1"), 0),
        (failed, (), 1),
    ],
)
def test_what_is_worse(
    compared: Compare, change: Callable[[Row], Any], options: tuple[str, ...], code: int
) -> None:
    found, output = compared(invented(), changed(change), *options)
    assert found == code
    assert output.count("WORSE") == code
    assert output.splitlines()[-1].endswith(f"; {code} got worse")
    # What is a peer's is not ours to mend.
    assert compared(invented(), changed(change, "eager"), *options)[0] == 0


def test_without_a_floor_the_time_is_judged(compared: Compare) -> None:
    assert compared(without_floor(invented()), without_floor(changed(scaled(1.4))))[0] == 1


def test_a_slower_row_has_its_ratios(compared: Compare) -> None:
    _, output = compared(invented(), changed(scaled(1.4)))
    (line,) = (line for line in output.splitlines() if "WORSE" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["gated_taylor", "Llama-2-7B, T 256", "bfloat16", "ours, torch"]
    # Times are 0.97 to 1.03 of the median in steps of 0.01, so the quartiles are 0.985 and 1.015.
    low, high = (1.4 * 0.985 / 1.015, 1.4 * 1.015 / 0.985)
    assert cells[4:] == ["1.40", "1.40", f"{low:.2f}–{high:.2f}", "1.00", "WORSE: slower"]


def test_a_row_that_failed_before_is_no_worse(compared: Compare) -> None:
    assert "WORSE: failed: wrong: off by 2" in compared(invented(), changed(failed))[1]
    assert compared(changed(failed), changed(failed))[0] == 0
    assert compared(changed(failed), invented())[0] == 0


def test_rows_of_one_side_are_listed(compared: Compare) -> None:
    after = invented()
    after["rows"] = [row for row in after["rows"] if row["op"] != "gated_taylor"]
    code, output = compared(invented(), after)
    assert (code, "only in B" in output) == (0, False)
    assert "- gated_taylor, Llama-2-7B, T 256, bfloat16, ours" in output.split("only in A:")[1]


def test_two_machines(compared: Compare) -> None:
    other = invented()
    other["machine"]["name"] = "another"
    row = of(other, "ours, torch")
    row["peak_bytes"] *= 10
    scaled(10, floors=1)(row)
    code, output = compared(invented(), other)
    assert code == 0
    assert "WARNING: two machines, so time and memory are not judged" in output
    scaled(2)(row)
    assert compared(invented(), other)[0] == 1
    assert compared(without_floor(invented()), without_floor(other))[0] == 0


@pytest.mark.parametrize("text", ["{", "[]", json.dumps(invented() | {"rows": []})])
def test_bad_input(compared: Compare, text: str) -> None:
    for pair in ((text, invented()), (invented(), text)):
        code, output = compared(*pair)
        assert (code, output.count("\n")) == (2, 1)
        assert output.startswith("compare.py: ")
