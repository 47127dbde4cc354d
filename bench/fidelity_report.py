"""Reads the files of `fidelity.py`, NAME.jsonl: a header, then a row a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import RESULTS

FOLDER = RESULTS / "fidelity"


@dataclass(frozen=True)
class Measured:
    """A model's rows: of a way, at a ratio, with a seed."""

    header: dict[str, Any]
    rows: list[dict[str, Any]]


def read(file: Path) -> Measured:
    header, *rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return Measured(header, rows)
