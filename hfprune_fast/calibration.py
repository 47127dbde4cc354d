"""Text or token ids -> (N, T) token windows, the same on every machine for the same seed.

Documents go one after another into a stream of tokens, each between the tokenizer's BOS and EOS
where it has them, and the stream is cut into windows of T tokens: short documents share a window,
long ones fill several. (Files beyond a million characters count as several documents.) Orders are
drawn by sorting on sha256(seed, index), which no library's
random generator can change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hfprune_fast.checkpoint import TINY_MODEL
from hfprune_fast.errors import ArgumentError, CalibrationError, one_line
from hfprune_fast.loading import build_config, load_tokenizer
from hfprune_fast.report import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SEQ_LEN = 1024
DEMO_TEXT = TINY_MODEL / "calibration.txt"

# A longer file is read as several documents of about this size, cut at line ends, so that samples
# of a huge file come from all over it without tokenising it whole.
_DOCUMENT_CHARS = 1 << 20
# Windows to choose from, per window asked for.
_CANDIDATES = 8
_HUB_ROWS = 100_000
_TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")


def windows_for(
    folder: Path, source: str | Path, seq_len: int | None, samples: int | None, seed: int
) -> Tensor:
    """Make token windows for the model in a folder, saying when the text holds fewer than asked.

    See `token_windows`; seq_len None is 1024, or the model's longest position if that is less.
    """
    config = build_config(folder)
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        longest = DEFAULT_SEQ_LEN

    def check_length(tokens: int) -> None:
        if tokens > longest:
            raise ArgumentError(
                f"seq_len must be at most {longest}, the model's longest position; got {tokens}"
            )

    is_ids = str(source).endswith(".npy")
    if seq_len is not None:
        check_length(seq_len)
    elif not is_ids:
        seq_len = min(DEFAULT_SEQ_LEN, longest)
    ids = token_windows(
        source,
        None if is_ids else load_tokenizer(folder),
        seq_len=seq_len,
        samples=samples,
        seed=seed,
        vocab_size=config.vocab_size,
    )
    check_length(ids.shape[1])
    if samples is not None and len(ids) < samples:
        say(f"{source} holds {len(ids)} samples of {ids.shape[1]} tokens; {samples} were asked for")
    return ids


def token_windows(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seq_len: int | None,
    samples: int | None,
    seed: int = 0,
    vocab_size: int,
) -> Tensor:
    """Return token windows, (N, T) int64, from a source of text or ids.

    Args:
        source: a .txt, .jsonl (objects with a "text") or .parquet (a "text" column) file, a folder
            of them, `demo` (the text that ships with this package), a hub data set (NAME or
            NAME:CONFIG, the "text" of the first 100,000 rows of split train), or a .npy file of
            (N, T) int ids.
        tokenizer: needed for every source but .npy.
        seq_len: T; for .npy the file decides, and a seq_len that differs is an error.
        samples: N, drawn by seed; None takes every window, in order.
        seed: which documents and windows are drawn.
        vocab_size: ids must be below it.

    Raises:
        CalibrationError: no such source, too little text, or bad ids.
        ArgumentError: seq_len or samples below 1.

    Fewer than `samples` windows come back when the text holds fewer; the caller tells the user.
    """
    for name, value in (("seq_len", seq_len), ("samples", samples)):
        if value is not None and value < 1:
            raise ArgumentError(f"{name} must be at least 1, got {value}")
    candidates: list[np.ndarray[Any, Any]]
    if str(source).endswith(".npy"):
        candidates = list(_load_ids(Path(source), seq_len, vocab_size))
    else:
        if tokenizer is None or seq_len is None:
            raise ArgumentError("text needs a tokenizer and a seq_len; only .npy goes without")
        documents = _documents(source)
        if samples is not None:
            documents = [documents[i] for i in _seeded_order(len(documents), seed)]
        limit = None if samples is None else samples * _CANDIDATES
        candidates = _pack(documents, tokenizer, seq_len, limit, str(source))
    if samples is not None and samples < len(candidates):
        candidates = [candidates[i] for i in _seeded_order(len(candidates), seed)[:samples]]
    array = np.ascontiguousarray(np.stack(candidates), dtype="<i8")
    if int(array.max()) >= vocab_size:
        raise CalibrationError(
            f"the tokenizer makes id {int(array.max())}, but the model's vocabulary is "
            f"{vocab_size}; it is another model's tokenizer"
        )
    return torch.from_numpy(array)


def _seeded_order(count: int, seed: int) -> list[int]:
    def key(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:{index}".encode()).digest()

    return sorted(range(count), key=key)


def _pack(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    limit: int | None,
    source: str,
) -> list[np.ndarray[Any, Any]]:
    """Cut the stream of documents into windows, until there are `limit`; a last part is dropped."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    windows: list[np.ndarray[Any, Any]] = []
    stream: list[int] = []
    text_tokens = 0
    for document in documents:
        encoded = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        text_tokens += len(encoded)
        stream += [*before, *encoded, *after]
        whole = len(stream) // seq_len
        windows += [
            np.asarray(stream[i * seq_len : (i + 1) * seq_len], dtype=np.int64)
            for i in range(whole)
        ]
        stream = stream[whole * seq_len :]
        if limit is not None and len(windows) >= limit:
            break
    if text_tokens == 0:
        raise CalibrationError(f"{source} holds no text")
    if not windows:
        raise CalibrationError(
            f"{source} holds {text_tokens} tokens, but one sample takes {seq_len}; "
            "give more text or a smaller --seq-len"
        )
    return windows


def _load_ids(path: Path, seq_len: int | None, vocab_size: int) -> np.ndarray[Any, Any]:
    if not path.is_file():
        raise CalibrationError(f"no file {path}")
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # a damaged header raises almost anything
        ids = None
    if not isinstance(ids, np.ndarray):
        raise CalibrationError(f"{path} is not a .npy file of (N, T) integer token ids")
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.size == 0:
        raise CalibrationError(
            f"{path} must hold (N, T) integer token ids, got shape {ids.shape} of {ids.dtype}"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise CalibrationError(
            f"{path} holds token id {low if low < 0 else high}; "
            f"expected 0..{vocab_size - 1}, the model's vocabulary"
        )
    if seq_len is not None and seq_len != ids.shape[1]:
        raise CalibrationError(
            f"{path} holds sequences of {ids.shape[1]} tokens, but --seq-len is {seq_len}; "
            "leave --seq-len out"
        )
    return ids


def _documents(source: str | Path) -> list[str]:
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
    if path.suffix.lower() not in _TEXT_SUFFIXES:
        raise CalibrationError(
            f"{path} is not a calibration source; expected {', '.join(_TEXT_SUFFIXES)} or .npy"
        )
    try:
        if path.suffix.lower() == ".txt":
            yield path.read_text(encoding="utf-8-sig")
        elif path.suffix.lower() == ".jsonl":
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
            f'{where} has half a surrogate pair in "text"; it is no Unicode text'
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
