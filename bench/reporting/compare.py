"""Hold one result file against an earlier one: ratios with their spread, and what got worse.

    python bench/compare.py A.json B.json       A is the earlier

Rows are matched by operation, model, dtype, sizes and provider. For each there are

    time      B's ms / A's
    slower    what is judged. Where both rows have a floor it is A's percentage of the floor / B's:
              the floor is timed side by side, which takes the machine's moods out; else the time
    spread    of slower: from B's lower quartile / A's upper to B's upper / A's lower
    memory    B's peak bytes / A's

A row of a provider whose name begins with "ours" is worse if

    slower is above --threshold, and all of its spread above 1; but not if, on one machine, all of
    the spread of its time is below 1: it was faster, and its floor, which does not bound it, more;
    memory is above --memory-threshold;
    or A measured it and it failed in B.

Peers are printed and not judged, and so is what only one side has. Of two machines the time and the
memory are not judged, % of floor is.

The exit status is 1 if a row got worse, and 2 if a file is no result or no row of ours is in both,
with one line that says so.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # not there with PYTHONSAFEPATH
from records import Result, ResultError, Row, key, read
from report_text import provider, shape, table

HEADER = ["op", "shape", "dtype", "provider", "time", "slower", "spread", "memory", ""]
NAMES = 4


@dataclass(frozen=True)
class Ratio:
    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.2f}–{self.high:.2f}"


@dataclass(frozen=True)
class Limits:
    slower: float
    memory: float
    same_machine: bool


@dataclass(frozen=True)
class Pair:
    """A row of both files."""

    before: Row
    after: Row

    @property
    def time(self) -> Ratio | None:
        if "ms" not in self.before or "ms" not in self.after:
            return None
        return _ratio(self.after, self.before, "ms", "ms_low", "ms_high")

    @property
    def floors(self) -> Ratio | None:
        """How much further from the floor: inverse, as a percentage is a speed."""
        if not (self.before.get("percent_low") and self.after.get("percent_low")):
            return None
        return _ratio(self.before, self.after, "percent_of_floor", "percent_low", "percent_high")

    @property
    def memory(self) -> float | None:
        before, after = self.before.get("peak_bytes"), self.after.get("peak_bytes")
        if before is None or after is None:
            return None
        return after / before if before else math.inf if after else 1.0

    def judged(self, limits: Limits) -> Ratio | None:
        return self.floors or (self.time if limits.same_machine else None)

    def worse(self, limits: Limits) -> list[str]:
        """What got worse, if the row is one of ours."""
        if not self.after["provider"].startswith("ours") or "ms" not in self.before:
            return []
        if "failed" in self.after:
            return [f"failed: {self.after['failed']}"]
        found = []
        slower = self.judged(limits)
        faster = limits.same_machine and self.time is not None and self.time.high < 1
        if slower and slower.middle > limits.slower and slower.low > 1 and not faster:
            found.append("slower")
        if limits.same_machine and self.memory and self.memory > limits.memory:
            found.append("more memory")
        return found

    def cells(self, limits: Limits) -> list[str]:
        slower = self.judged(limits)
        state = next(
            (f"{n}: {self.after[n]}" for n in ("failed", "skipped") if n in self.after), ""
        )
        if not state and "ms" not in self.before:
            state = "measured now"
        worse = ", ".join(self.worse(limits))
        return [
            self.after["op"], shape(self.after), self.after["dtype"], provider(self.after),
            f"{self.time.middle:.2f}" if self.time else "",
            f"{slower.middle:.2f}" if slower else "", str(slower or ""),
            "" if self.memory is None else f"{self.memory:.2f}",
            f"WORSE: {worse}" if worse else state,
        ]  # fmt: skip


def _ratio(over: Row, under: Row, middle: str, low: str, high: str) -> Ratio:
    """A ratio of medians, and from lower to upper quartile over upper to lower."""
    return Ratio(over[middle] / under[middle], over[low] / under[high], over[high] / under[low])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--threshold", type=_ratio_argument, default=1.25, metavar="R", help="of time; 1.25"
    )
    parser.add_argument(
        "--memory-threshold", type=_ratio_argument, default=1.05, metavar="R", help="1.05"
    )
    args = parser.parse_args(arguments)
    try:
        before, after = read(args.before), read(args.after)
        return compare(before, after, args.threshold, args.memory_threshold)
    except ResultError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2


def compare(before: Result, after: Result, threshold: float, memory_threshold: float) -> int:
    rows_before, rows_after = ({key(r): r for r in result["rows"]} for result in (before, after))
    common = [name for name in rows_before if name in rows_after]
    if not any(rows_before[name]["provider"].startswith("ours") for name in common):
        raise ResultError("no row of ours is in both files, so there is nothing to judge")
    names = [result["machine"]["name"] for result in (before, after)]
    limits = Limits(threshold, memory_threshold, names[0] == names[1])
    print(f"A: {_told(before)}\nB: {_told(after)}\n")
    if not limits.same_machine:
        print("WARNING: two machines, so time and memory are not judged; % of floor is\n")
    pairs = [Pair(rows_before[name], rows_after[name]) for name in common]
    shown = [pair for pair in pairs if "ms" in pair.before or "ms" in pair.after]
    print("\n".join(table([HEADER, *(pair.cells(limits) for pair in shown)], NAMES)))
    for side, rows, others in (("A", rows_before, rows_after), ("B", rows_after, rows_before)):
        only = [row for name, row in rows.items() if name not in others and "ms" in row]
        if only:
            print(f"\nonly in {side}:")
        for row in only:
            print(f"- {row['op']}, {shape(row)}, {row['dtype']}, {provider(row)}")
    worse = sum(bool(pair.worse(limits)) for pair in pairs)
    ours = sum(row["provider"].startswith("ours") for row in (pair.before for pair in shown))
    print(f"\n{len(shown)} rows, {ours} of them ours; {worse} got worse")
    return 1 if worse else 0


def _told(result: Result) -> str:
    commit = (result.get("commit") or "unknown")[:10]
    return f"{result['machine']['name']}, {result['date']}, commit {commit}"


def _ratio_argument(text: str) -> float:
    value = float(text)
    if not value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a ratio of 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
