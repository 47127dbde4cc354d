"""Documents from files, folders, hub data sets and stdin, read as streams."""

from __future__ import annotations

import gzip
import io
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from hfprune_fast.config import TINY_MODEL
from hfprune_fast.console import say
from hfprune_fast.data.json_values import json_values
from hfprune_fast.data.records import FIELDS, Document, document_of
from hfprune_fast.errors import CalibrationError, one_line, refuse_pointer

DEMO_TEXT = TINY_MODEL / "calibration.txt"
STDIN = "-"
# A longer text is read as several documents of about this size, cut at line ends, so that samples
# of a huge file come from all over it without tokenising it whole.
_DOCUMENT_CHARS = 1 << 20
_HUB_ROWS = 100_000
_TEXT = (".txt", ".txt.gz")
_JSON = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_SUFFIXES = (*_TEXT, *_JSON, ".parquet")
# Files of what save_to_disk wrote, of several splits or of one data set.
_SAVED = (("dataset_dict.json",), ("state.json", "dataset_info.json"))
# Files and splits that are kept for evaluation by those who name them so.
_HELD_OUT = re.compile(
    r"(?<![a-z])(test|testing|valid|validation|val|dev|eval|evaluation|heldout)(?![a-z])"
)
_STARTS_JSON = re.compile(r"\s*(\[\s*)?\{\s*\"")

_UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError)

Values = Iterator[tuple[str, Any]]  # where it is, for messages, and a text or a record


def documents_of(
    source: str | Path,
    text_field: str | None = None,
    *,
    keep_chats: bool = False,
    evaluation: bool = False,
) -> Iterator[Document]:
    """Yield the texts of a source one by one, long ones cut.

    Prints one line of what was left out, and one of how chats are read.

    Args:
        source: as of `calibration.token_windows`, but for .npy files.
        text_field: the field of records to read; None is the first there is of `FIELDS`.
        keep_chats: yield chats as they are, neither as plain text alone nor cut.
        evaluation: leave out no files and splits that are named as text for evaluation.
    """
    fields = FIELDS if text_field is None else (text_field,)
    left_out = Counter[str]()
    chats = 0
    for where, value in _values(source, fields, left_out, evaluation):
        document = document_of(value, where, fields)
        if document is None:
            left_out["empty or null entries"] += 1
            continue
        chats += document.chat is not None
        if document.chat is not None and keep_chats:
            yield document
            continue
        for piece in _pieces(io.StringIO(document.text)):
            if piece.strip():
                yield Document(piece)
    if left_out:
        parts = ", ".join(f"{count} {what}" for what, count in left_out.items())
        say(f"left out of {source}: {parts}")
    if chats and not keep_chats:
        say(
            f"{chats} chats are read as plain text, `role: content`; --chat-template uses the "
            "tokenizer's chat template"
        )
    if keep_chats and not chats:
        say(f"{source} holds no chats; --chat-template has no effect")


def check_regular(path: Path) -> None:
    """Refuse what is not there, or is there and may never end: pipes, devices, links in a ring."""
    if not os.path.lexists(path):
        raise CalibrationError(f"no file or folder {path}")
    if not os.path.isfile(path):
        raise CalibrationError(
            f"{path} is no regular file but a pipe, a device, a folder or a broken link; "
            "give a file, or pipe the text in and give -"
        )


def _values(
    source: str | Path, fields: Sequence[str], left_out: Counter[str], evaluation: bool
) -> Values:
    path = Path(source)
    if str(source) == "demo" and not path.exists():
        path = DEMO_TEXT
    if str(source) == STDIN:
        yield from _read_stdin()
    elif not str(source).strip():
        raise CalibrationError("the name of the calibration source is empty")
    elif os.path.isdir(path):
        if any(all(os.path.isfile(path / name) for name in names) for names in _SAVED):
            yield from _read_saved(path, fields, left_out, evaluation)
        else:
            for file in _files_in(path, left_out, evaluation):
                yield from _read_file(file, fields)
    elif os.path.lexists(path) or path.is_absolute() or str(source).startswith("."):
        yield from _read_file(path, fields)
    elif path.name.lower().endswith(_SUFFIXES):
        raise CalibrationError(f"no file or folder {path}")
    else:
        yield from _read_hub(str(source))


def _files_in(folder: Path, left_out: Counter[str], evaluation: bool) -> list[Path]:
    """Return the files of a folder that are calibration text, sorted."""
    files = sorted(p for p in folder.rglob("*") if p.name.lower().endswith(_SUFFIXES))
    files = [path for path in files if path.is_file()]
    if not files:
        raise CalibrationError(f"folder {folder} holds no {', '.join(_SUFFIXES)} file")
    named = {path.relative_to(folder).as_posix(): path for path in files}
    # What macOS leaves beside each file on other disks is no text.
    texts = [name for name in named if not named[name].name.startswith("._")]
    _count(left_out, set(named) - set(texts), "._ files")
    rows = [name for name in texts if not name.lower().endswith(".json")]
    if rows:  # .json files beside others describe them
        _count(left_out, set(texts) - set(rows), ".json files beside texts in other formats")
    return [named[name] for name in _used(rows or texts, left_out, evaluation)]


def _used(names: Sequence[str], left_out: Counter[str], evaluation: bool) -> list[str]:
    """Return the names, without those of text for evaluation unless there are no others."""
    kept = [name for name in names if evaluation or not _HELD_OUT.search(name.lower())]
    if kept:
        _count(left_out, set(names) - set(kept), "files or splits for evaluation by name")
    return kept or list(names)


def _count(left_out: Counter[str], names: set[str], what: str) -> None:
    if names:
        left_out[f"{what} ({min(names)}{', ...' if len(names) > 1 else ''})"] += len(names)


def _read_file(path: Path, fields: Sequence[str]) -> Values:
    check_regular(path)
    name = path.name.lower()
    if not name.endswith(_SUFFIXES):
        raise CalibrationError(
            f"{path} is not a calibration source; expected {', '.join(_SUFFIXES)} or .npy"
        )
    try:
        refuse_pointer(path, CalibrationError)
        if name.endswith(".parquet"):
            yield from _read_parquet(path, fields)
            return
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8-sig") as file:
            yield from _read_text(file, str(path), is_json=name.endswith(_JSON))
    except _UNREADABLE as error:
        raise _unreadable(str(path), error) from None


def _unreadable(name: str, error: Exception) -> CalibrationError:
    expected = "; expected UTF-8" if isinstance(error, UnicodeDecodeError) else ""
    return CalibrationError(f"{name} cannot be read: {one_line(error)}{expected}")


def _read_stdin() -> Values:
    """Read text, or JSON if it begins like objects or an array of them."""
    stdin = getattr(sys.stdin, "buffer", None)
    if stdin is None:
        raise CalibrationError("stdin, which - stands for, is closed or has no bytes")
    file = io.TextIOWrapper(stdin, encoding="utf-8-sig")
    try:
        begin = file.read(1024)
        yield from _read_text(
            file, "stdin", is_json=_STARTS_JSON.match(begin) is not None, begin=begin
        )
    except _UNREADABLE as error:
        raise _unreadable("stdin", error) from None
    finally:
        file.detach()  # which keeps stdin open


def _read_text(file: TextIO, name: str, *, is_json: bool, begin: str = "") -> Values:
    if is_json:
        yield from json_values(file, name, begin)
    else:
        yield from ((name, piece) for piece in _pieces(file, begin) if piece.strip())


def _pieces(file: TextIO, begin: str = "") -> Iterator[str]:
    """Cut a text, which starts with `begin`, at line ends, a piece in memory at a time."""
    text = begin + file.read(_DOCUMENT_CHARS + 1 - len(begin))
    while len(text) > _DOCUMENT_CHARS:
        end = text.rfind("\n", 0, _DOCUMENT_CHARS) + 1 or _DOCUMENT_CHARS
        yield text[:end]
        text = text[end:] + file.read(end)
    yield text


def _rows(name: str, columns: Sequence[str], fields: Sequence[str], rows: Any) -> Values:
    """Yield the rows of a table; rows(names) reads those columns."""
    wanted = [field for field in fields if field in columns]
    if not wanted:
        yield name, dict.fromkeys(columns)  # which is refused, with the names that there are
    for i, row in enumerate(rows(wanted)):
        yield f"{name} row {i}", row


def _read_parquet(path: Path, fields: Sequence[str]) -> Values:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise CalibrationError(
            f"{path} needs pyarrow: pip install 'hfprune_fast[datasets]'"
        ) from None
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:

            def rows(columns: list[str]) -> Iterable[Any]:
                for batch in file.iter_batches(batch_size=256, columns=columns):
                    yield from batch.to_pylist()

            yield from _rows(str(path), file.schema_arrow.names, fields, rows)
    except (ArrowException, KeyError) as error:
        raise CalibrationError(f"{path} is not readable as .parquet: {one_line(error)}") from None


def _read_saved(
    path: Path, fields: Sequence[str], left_out: Counter[str], evaluation: bool
) -> Values:
    """Read what the `datasets` package has written with save_to_disk."""
    try:
        from datasets import load_from_disk
    except ImportError:
        raise CalibrationError(
            f"{path} is a saved data set, which needs: pip install 'hfprune_fast[datasets]'"
        ) from None
    try:
        saved = load_from_disk(str(path))
        splits = saved if isinstance(saved, dict) else {"": saved}
        for name in _used(list(splits), left_out, evaluation):
            split = splits[name].with_format(None)
            where = f"{path}/{name}".rstrip("/")
            yield from _rows(where, split.column_names, fields, split.select_columns)
    except CalibrationError:
        raise
    except Exception as error:  # datasets raises its own and pyarrow's errors
        raise CalibrationError(f"{path} is not a saved data set: {one_line(error)}") from None


def _read_hub(name: str) -> Values:
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
        for i, row in enumerate(islice(dataset, _HUB_ROWS)):
            yield f"{name} row {i}", row
    except Exception as error:  # datasets raises its own, the hub's and the network's errors
        raise CalibrationError(
            f"no file or folder {name}, and the hub says: {one_line(error)}"
        ) from None
