"""Documents from files, folders and hub data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from hfprune_fast.config import TINY_MODEL
from hfprune_fast.errors import CalibrationError, one_line

DEMO_TEXT = TINY_MODEL / "calibration.txt"
# A longer file is read as several documents of about this size, cut at line ends, so that samples
# of a huge file come from all over it without tokenising it whole.
_DOCUMENT_CHARS = 1 << 20
_HUB_ROWS = 100_000
_TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")


def documents_of(source: str | Path) -> list[str]:
    """Return the texts of a source, long ones cut."""
    path = Path(source)
    if str(source) == "demo" and not path.exists():
        path = DEMO_TEXT
    if path.is_dir():
        files = sorted(
            p for p in path.rglob("*") if p.suffix.lower() in _TEXT_SUFFIXES and p.is_file()
        )
        if not files:
            raise CalibrationError(
                f"folder {path} holds no {', '.join(_TEXT_SUFFIXES)} file, at any depth"
            )
        texts = [text for file in files for text in _read_file(file)]
    elif path.is_file():
        texts = list(_read_file(path))
    elif path.suffix.lower() in _TEXT_SUFFIXES or path.is_absolute() or str(source).startswith("."):
        raise CalibrationError(f"no file or folder {path}")
    else:
        texts = _read_hub(str(source))
    return [piece for text in texts for piece in _cut(text) if piece.strip()]


def _cut(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _DOCUMENT_CHARS:
        line_end = text.rfind("\n", start, start + _DOCUMENT_CHARS) + 1
        end = line_end if line_end > start else start + _DOCUMENT_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _read_file(path: Path) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix not in _TEXT_SUFFIXES:
        raise CalibrationError(
            f"{path} is not a calibration source; expected {', '.join(_TEXT_SUFFIXES)} or .npy"
        )
    try:
        if suffix == ".txt":
            yield path.read_text(encoding="utf-8-sig")
        elif suffix == ".jsonl":
            yield from _read_jsonl(path)
        else:
            yield from _read_parquet(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from None


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{path}:{number} is not JSON: {one_line(error)}") from None
            yield _text_field(record, f"{path}:{number}")


def _text_field(record: Any, where: str) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise CalibrationError(f'{where} has no string field "text"')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CalibrationError(
            f'{where} has half a surrogate pair in "text"; it is not Unicode text'
        ) from None
    return text


def _read_parquet(path: Path) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise CalibrationError(
            f"{path} needs pyarrow: pip install 'hfprune_fast[datasets]'"
        ) from None
    try:
        table = parquet.read_table(path, columns=["text"])
        texts = table.column("text").to_pylist()
    except (ArrowException, KeyError) as error:
        raise CalibrationError(f'{path} has no readable column "text": {error}') from None
    return [_text_field({"text": text}, f"{path} row {i}") for i, text in enumerate(texts)]


def _read_hub(name: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"no file or folder {name}; if it is a hub data set, "
            "pip install 'hfprune_fast[datasets]'"
        ) from None
    path, _, config = name.partition(":")
    try:
        dataset = load_dataset(path, config or None, split="train", streaming=True)
        return [_text_field(row, name) for row in islice(dataset, _HUB_ROWS)]
    except CalibrationError:
        raise
    except Exception as error:  # datasets raises its own, the hub's and the network's errors
        raise CalibrationError(
            f"no file or folder {name}, and the hub says: {one_line(error)}"
        ) from None
