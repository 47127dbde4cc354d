"""The result files that are committed, and which of them count."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from records import Result, ResultError, Row, read


@dataclass(frozen=True)
class Source:
    """A result file."""

    path: Path
    result: Result
    suffix: str

    @property
    def machine(self) -> str:
        return str(self.result["machine"]["name"])

    @property
    def device(self) -> str:
        return str(self.result["machine"]["device"])

    @property
    def rows(self) -> list[Row]:
        return list(self.result["rows"])


def sources(root: Path) -> list[Source]:
    """All files of bench/results, of folders in it none; the names must be those of `write`."""
    found = []
    for path in sorted((root / "bench" / "results").glob("*.json")):
        result = read(path)
        start = re.escape(f"{result['machine']['name']}-{result['date'][:10]}")
        named = re.fullmatch(rf"{start}(-.+)?", path.stem)
        if not named:
            raise ResultError(
                f"{path}: is of {result['machine']['name']} on {result['date'][:10]}, "
                "which its name must begin with"
            )
        found.append(Source(path, result, named[1] or ""))
    return found


def newest(found: list[Source]) -> list[Source]:
    """The last of each machine and suffix, CPUs first."""
    last: dict[tuple[bool, str, str], Source] = {}
    for source in sorted(found, key=lambda source: str(source.result["date"])):
        last[source.device != "cpu", source.machine, source.suffix] = source
    return [last[key] for key in sorted(last)]
