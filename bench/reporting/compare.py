"""Compare a result file with an earlier one: ratios with their spread, and what got worse.

    python bench/reporting/compare.py A.json B.json       A is the earlier

Rows are matched by operation, model, dtype, sizes and provider. For each there are

    time      B's ms / A's
    slower    what is judged. Where both rows have a floor it is A's percentage of the floor / B's:
              the floor is timed side by side, which cancels the machine's variations; else the time
    spread    of slower: from B's lower quartile / A's upper to B's upper / A's lower
    memory    B's peak bytes / A's

A row of a provider whose name begins with "ours" is worse if slower is above --threshold and all of
its spread above 1 (unless, on one machine, all of the spread of its time is below 1: its floor,
which does not bound it, got faster still), if memory is above --memory-threshold, or if it failed
in B alone. Of two machines only % of floor is judged. The exit status is 1 if a row got worse, and
2 if a file is no result or no row of ours is in both, with one line that says so.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).parents[1].glob("*/"))
from records import Result, ResultError, Row, key, read
from report_text import commit, provider, shape, table

HEADER = ["op", "shape", "dtype", "provider", "time", "slower", "spread", "memory", ""]
Ratio = tuple[float, float, float]  # of medians, of lower by upper quartiles and the reverse


def ratio(over: Row, under: Row, *names: str) -> Ratio | None:
    """Divide median, lower and upper quartile, which are called names."""
    if not all(row.get(name) for row in (over, under) for name in names):
        return None
    a, b = ([row[name] for name in names] for row in (over, under))
    return a[0] / b[0], a[1] / b[2], a[2] / b[1]


class Pair:
    """A row of both files."""

    def __init__(self, before: Row, after: Row, limits: tuple[float, float], same: bool) -> None:
        self.before, self.after = before, after
        self.time = ratio(after, before, "ms", "ms_low", "ms_high")
        # Inverse, as a percentage is a speed.
        slower = ratio(before, after, "percent_of_floor", "percent_low", "percent_high")
        self.slower = slower or (self.time if same else None)
        old, new = before.get("peak_bytes"), after.get("peak_bytes")
        self.memory = None if None in (old, new) else new / old if old else math.inf if new else 1.0
        self.is_ours = before["provider"].startswith("ours")
        self.worse: list[str] = []
        if self.is_ours and "ms" in before:
            faster = same and self.time is not None and self.time[2] < 1
            if "failed" in after:
                self.worse.append(f"failed: {after['failed']}")
            if self.slower and self.slower[0] > limits[0] and self.slower[1] > 1 and not faster:
                self.worse.append("slower")
            if same and self.memory and self.memory > limits[1]:
                self.worse.append("more memory")

    @property
    def cells(self) -> list[str]:
        states = [f"{n}: {self.after[n]}" for n in ("failed", "skipped") if n in self.after]
        states += ["measured now"] if "ms" not in self.before else []
        states = [f"WORSE: {', '.join(self.worse)}"] if self.worse else states
        return [
            *names(self.after), f"{self.time[0]:.2f}" if self.time else "",
            f"{self.slower[0]:.2f}" if self.slower else "",
            f"{self.slower[1]:.2f}–{self.slower[2]:.2f}" if self.slower else "",
            "" if self.memory is None else f"{self.memory:.2f}", "".join(states[:1]),
        ]  # fmt: skip


def names(row: Row) -> list[str]:
    return [row["op"], shape(row), row["dtype"], provider(row)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--threshold", type=float, default=1.25, help="of time; 1.25")
    parser.add_argument("--memory-threshold", type=float, default=1.05, help="1.05")
    args = parser.parse_args(arguments)
    try:
        limits = args.threshold, args.memory_threshold
        return compare(read(args.before), read(args.after), limits)
    except ResultError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2


def compare(before: Result, after: Result, limits: tuple[float, float]) -> int:
    a, b = ({key(row): row for row in result["rows"]} for result in (before, after))
    same = before["machine"]["name"] == after["machine"]["name"]
    pairs = [Pair(row, b[k], limits, same) for k, row in a.items() if k in b]
    if not any(pair.is_ours for pair in pairs):
        raise ResultError("no row of ours is in both files, so there is nothing to judge")
    for side, result in zip("AB", (before, after), strict=True):
        print(f"{side}: {result['machine']['name']}, {result['date']}, {commit(result)}")
    if not same:
        print("\nWARNING: two machines, so time and memory are not judged; % of floor is")
    shown = [pair for pair in pairs if "ms" in pair.before or "ms" in pair.after]
    print("", *table([HEADER, *(pair.cells for pair in shown)], 4), sep="\n")
    for side, rows, others in (("A", a, b), ("B", b, a)):
        only = [row for k, row in rows.items() if k not in others and "ms" in row]
        if only:
            print(f"\nonly in {side}:", *(f"- {', '.join(names(row))}" for row in only), sep="\n")
    worse, ours = (sum(bool(getattr(p, n)) for p in shown) for n in ("worse", "is_ours"))
    print(f"\n{len(shown)} rows, {ours} of them ours; {worse} got worse")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
