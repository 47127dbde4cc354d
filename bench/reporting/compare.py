"""Compare a result file with an earlier one: ratios with their spread, and what got worse.

    python bench/reporting/compare.py A.json B.json       A is the earlier

Rows are matched by operation, model, dtype, sizes and provider. For each there are

    time      B's ms / A's
    slower    what is judged. Where both rows have a floor it is A's percentage of the floor / B's:
              the floor is timed side by side, which cancels the machine's variations; else the time
    spread    of slower: from B's lower quartile / A's upper to B's upper / A's lower
    memory    B's peak bytes / A's

A row of a provider whose name begins with "ours" is worse if

    slower is above --threshold, and all of its spread above 1; but not if, on one machine, all of
    the spread of its time is below 1: it was faster, and its floor, which does not bound it, more;
    memory is above --memory-threshold;
    or A measured it and it failed in B.

Peers are printed and not judged, and so is what only one side has. Of two machines the time and the
memory are not judged, % of floor is. The exit status is 1 if a row got worse, and 2 if a file is no
result or no row of ours is in both, with one line that says so.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = map(str, Path(__file__).parents[1].glob("*/"))
from records import Result, ResultError, Row, key, read
from report_text import commit, provider, shape, table

HEADER = ["op", "shape", "dtype", "provider", "time", "slower", "spread", "memory", ""]
FLOOR = "percent_of_floor", "percent_low", "percent_high"


class Ratio(NamedTuple):
    middle: float
    low: float
    high: float


class Limits(NamedTuple):
    slower: float
    memory: float
    same_machine: bool


def ratio(over: Row, under: Row, middle: str, low: str, high: str) -> Ratio | None:
    """Divide medians, and lower by upper quartiles and the reverse."""
    if not all(row.get(name) for row in (over, under) for name in (middle, low, high)):
        return None
    return Ratio(over[middle] / under[middle], over[low] / under[high], over[high] / under[low])


class Pair(NamedTuple):
    """A row of both files."""

    before: Row
    after: Row

    @property
    def time(self) -> Ratio | None:
        return ratio(self.after, self.before, "ms", "ms_low", "ms_high")

    @property
    def memory(self) -> float | None:
        before, after = self.before.get("peak_bytes"), self.after.get("peak_bytes")
        if before is None or after is None:
            return None
        return float(after / before) if before else math.inf if after else 1.0

    def slower(self, limits: Limits) -> Ratio | None:
        # Inverse, as a percentage is a speed.
        floors = ratio(self.before, self.after, *FLOOR)
        return floors or (self.time if limits.same_machine else None)

    def worse(self, limits: Limits) -> list[str]:
        """Say what got worse, if the row is one of ours."""
        if not self.after["provider"].startswith("ours") or "ms" not in self.before:
            return []
        if "failed" in self.after:
            return [f"failed: {self.after['failed']}"]
        found, slower = [], self.slower(limits)
        faster = limits.same_machine and self.time is not None and self.time.high < 1
        if slower and slower.middle > limits.slower and slower.low > 1 and not faster:
            found.append("slower")
        if limits.same_machine and self.memory and self.memory > limits.memory:
            found.append("more memory")
        return found

    def cells(self, limits: Limits) -> list[str]:
        slower, worse = self.slower(limits), ", ".join(self.worse(limits))
        states = [f"{n}: {self.after[n]}" for n in ("failed", "skipped") if n in self.after]
        states += ["measured now"] if "ms" not in self.before else []
        return [
            *names(self.after), f"{self.time.middle:.2f}" if self.time else "",
            f"{slower.middle:.2f}" if slower else "",
            f"{slower.low:.2f}–{slower.high:.2f}" if slower else "",
            "" if self.memory is None else f"{self.memory:.2f}",
            f"WORSE: {worse}" if worse else "".join(states[:1]),
        ]  # fmt: skip


def names(row: Row) -> list[str]:
    return [row["op"], shape(row), row["dtype"], provider(row)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--threshold", type=_at_least_1, default=1.25, help="of time; 1.25")
    parser.add_argument("--memory-threshold", type=_at_least_1, default=1.05, help="1.05")
    args = parser.parse_args(arguments)
    try:
        before, after = read(args.before), read(args.after)
        return compare(before, after, args.threshold, args.memory_threshold)
    except ResultError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2


def compare(before: Result, after: Result, threshold: float, memory_threshold: float) -> int:
    rows_before, rows_after = ({key(r): r for r in result["rows"]} for result in (before, after))
    pairs = [Pair(row, rows_after[k]) for k, row in rows_before.items() if k in rows_after]
    if not any(pair.before["provider"].startswith("ours") for pair in pairs):
        raise ResultError("no row of ours is in both files, so there is nothing to judge")
    for side, result in zip("AB", (before, after), strict=True):
        print(f"{side}: {result['machine']['name']}, {result['date']}, {commit(result)}")
    same = before["machine"]["name"] == after["machine"]["name"]
    limits = Limits(threshold, memory_threshold, same)
    if not same:
        print("\nWARNING: two machines, so time and memory are not judged; % of floor is")
    shown = [pair for pair in pairs if "ms" in pair.before or "ms" in pair.after]
    print("", *table([HEADER, *(pair.cells(limits) for pair in shown)], 4), sep="\n")
    for side, rows, others in (("A", rows_before, rows_after), ("B", rows_after, rows_before)):
        only = [row for name, row in rows.items() if name not in others and "ms" in row]
        print(f"\nonly in {side}:" if only else "", end="\n" if only else "")
        print("".join(f"- {', '.join(names(row))}\n" for row in only), end="")
    worse = sum(bool(pair.worse(limits)) for pair in pairs)
    ours = sum(pair.before["provider"].startswith("ours") for pair in shown)
    print(f"\n{len(shown)} rows, {ours} of them ours; {worse} got worse")
    return 1 if worse else 0


def _at_least_1(text: str) -> float:
    value = float(text)
    if not value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a ratio of 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
