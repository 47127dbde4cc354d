"""Text or token ids -> (N, T) token windows, the same on every machine for the same seed.

Documents go one after another into a stream of tokens, each between the tokenizer's BOS and EOS
where it has them, and the stream is cut into windows of T tokens: short documents share a window,
long ones fill several. (Texts beyond a million characters count as several documents.) Orders are
drawn by sorting on sha256(seed, index), which no library's random generator can change. Sources
are read once, as streams; the documents that come first in that order are kept, as many as the
windows need, so memory does not grow with the source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush, nsmallest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hfprune_fast.config import DEFAULT_SEQ_LEN, CalibrationOptions
from hfprune_fast.console import display_name, library_hidden, say
from hfprune_fast.data.batches import TokenData, token_data
from hfprune_fast.data.records import Document
from hfprune_fast.data.sources import check_regular, documents_of
from hfprune_fast.errors import ArgumentError, CalibrationError, one_line_errors, refuse_pointer
from hfprune_fast.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Windows to draw from, for each window requested.
_CANDIDATES = 8
# Of drawn documents, what is kept: characters, and more for each document's own memory, for each
# token that the windows to draw from take (4 or 5 characters are usual), and at least.
_CHARS_A_TOKEN = 32
_DOCUMENT_CHARS = 256
_MIN_KEPT_CHARS = 1 << 24
# Of more rows of ids, evenly spaced ones are drawn from: an order of all would take minutes.
_MAX_ORDERED = 1 << 20


class TextModel(Protocol):
    """The part of `checkpoint.source.ModelSource` that reading text needs."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def transformers_config(self) -> Any: ...
    @property
    def spec(self) -> ModelSpec: ...


def calibrate(
    text: str | Path, source: TextModel, options: CalibrationOptions, *, evaluation: bool = False
) -> TokenData:
    """Return token windows of a text for a model, as `token_windows` makes them.

    Prints a line on stderr when the text holds fewer samples than requested.
    """
    data = windows_of(text, source, options, evaluation=evaluation)
    if options.samples is not None and data.sequences < options.samples:
        say(
            f"{text} holds {data.sequences} samples of {data.longest} tokens, "
            f"fewer than {options.samples}"
        )
    return data


def windows_of(
    text: str | Path, source: TextModel, options: CalibrationOptions, *, evaluation: bool = False
) -> TokenData:
    """Return token windows as `calibrate` does, and say nothing where they are few."""
    longest, seq_len = _longest(source), options.seq_len
    is_ids = str(text).endswith(".npy")
    if seq_len is not None:
        _check_length(seq_len, longest)
    elif not is_ids:
        seq_len = min(DEFAULT_SEQ_LEN, longest)
    ids = token_windows(
        text,
        None if is_ids else source.tokenizer,
        seq_len=seq_len,
        samples=options.samples,
        seed=options.seed,
        vocab_size=source.spec.vocab_size,
        longest=longest,
        text_field=options.text_field,
        chat_template=options.chat_template,
        evaluation=evaluation,
    )
    description = {"source": display_name(text), "seed": options.seed, "seq_len": ids.shape[1]}
    given = {"text_field": options.text_field, "chat_template": options.chat_template}
    description |= {name: value for name, value in given.items() if value}
    return token_data(ids, source.spec.vocab_size, description)


def window_tokens(text: str | Path, source: TextModel, options: CalibrationOptions) -> int:
    """Return the tokens of a window of a text, before it is read."""
    if str(text).endswith(".npy"):
        return int(_map_ids(Path(text), options.seq_len).shape[1])
    return options.seq_len or min(DEFAULT_SEQ_LEN, _longest(source))


def _longest(source: TextModel) -> int:
    """Return the longest window that a model takes; the default where its config does not say."""
    longest = getattr(source.transformers_config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) else DEFAULT_SEQ_LEN


def token_windows(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seq_len: int | None,
    samples: int | None,
    seed: int = 0,
    vocab_size: int,
    longest: int | None = None,
    text_field: str | None = None,
    chat_template: bool = False,
    evaluation: bool = False,
) -> Tensor:
    """Return token windows, (N, T) int64, from a source of text or ids.

    Args:
        source: a .txt, .jsonl, .json (either .gz or not) or .parquet file, a folder of them or of
            `datasets`' save_to_disk, `demo` (the text that ships with this package), a hub data set
            (NAME or NAME:CONFIG, the first 100,000 rows of split train), `-` for stdin, or a .npy
            file of (N, T) int ids.
        tokenizer: needed for every source but .npy.
        seq_len: T; for .npy the file decides, and a seq_len that differs is an error.
        samples: N, drawn by seed; None takes every window, in order.
        seed: which documents and windows are drawn.
        vocab_size: ids must be below it.
        longest: T must not be above it.
        text_field: the field of records that holds text or a chat; None is the first there is of
            `records.FIELDS`.
        chat_template: render chats by the tokenizer's template, with no BOS and EOS but its own.
        evaluation: read all of a folder, also what is named as text for evaluation.

    Raises:
        CalibrationError: no such source, too little text, or bad ids.
        ArgumentError: seq_len or samples below 1, or a template that is not there.

    Fewer than `samples` windows come back when the text holds fewer; the caller reports it.
    """
    for name, value in (("seq_len", seq_len), ("samples", samples)):
        if value is not None and value < 1:
            raise ArgumentError(f"{name} must be at least 1, got {value}")
    if str(source).endswith(".npy"):
        rows = _map_ids(Path(source), seq_len)
        _check_length(rows.shape[1], longest)
        drawn = rows[np.asarray(_drawn(len(rows), samples, seed))]
        low, high = int(drawn.min()), int(drawn.max())
        if low < 0 or high >= vocab_size:
            raise CalibrationError(
                f"{source} holds token id {low if low < 0 else high}; "
                f"expected 0..{vocab_size - 1}, the model's vocabulary"
            )
        return torch.from_numpy(np.ascontiguousarray(drawn, dtype="<i8"))
    if tokenizer is None or seq_len is None:
        raise ArgumentError("text needs a tokenizer and a seq_len; only .npy goes without")
    if chat_template and not tokenizer.chat_template:
        raise ArgumentError("the model's tokenizer has no chat template; leave out --chat-template")
    documents: Iterable[Document] = documents_of(
        source, text_field, keep_chats=chat_template, evaluation=evaluation
    )
    limit = None if samples is None else samples * _CANDIDATES
    if limit is not None:
        kept_chars = max(_MIN_KEPT_CHARS, limit * seq_len * _CHARS_A_TOKEN)
        documents = _first_in_order(documents, seed, kept_chars)
    candidates = _pack(documents, tokenizer, seq_len, limit, str(source))
    chosen = [candidates[i] for i in _drawn(len(candidates), samples, seed)]
    array = np.ascontiguousarray(np.stack(chosen), dtype="<i8")
    if int(array.max()) >= vocab_size:
        raise CalibrationError(
            f"the tokenizer makes id {int(array.max())}, but the model's vocabulary is "
            f"{vocab_size}; it is another model's tokenizer"
        )
    return torch.from_numpy(array)


def _check_length(tokens: int, longest: int | None) -> None:
    if longest is not None and tokens > longest:
        raise ArgumentError(
            f"seq_len must be at most {longest}, the model's longest position; got {tokens}"
        )


def _key(seed: int, index: int) -> bytes:
    """Return what an order is drawn by."""
    return hashlib.sha256(f"{seed}:{index}".encode()).digest()


def _drawn(count: int, samples: int | None, seed: int) -> Sequence[int]:
    """Return which of `count` windows are drawn: all, in order, if no more are requested."""
    if samples is None or samples >= count:
        return range(count)
    step = max(1, count // max(_MAX_ORDERED, samples))
    first = int.from_bytes(_key(seed, -1)) % step
    return nsmallest(samples, range(first, count, step), key=lambda index: _key(seed, index))


def _first_in_order(documents: Iterable[Document], seed: int, kept_chars: int) -> list[Document]:
    """Return documents in the order drawn by seed: the first, of `kept_chars` characters or more.

    At no time are more of those read so far in memory (a reservoir).
    """
    heap: list[tuple[int, int, Document]] = []  # the last in order on top
    chars = 0

    def size(document: Document) -> int:
        return len(document.text) + _DOCUMENT_CHARS

    for index, document in enumerate(documents):
        place = -int.from_bytes(_key(seed, index))
        if chars < kept_chars or place > heap[0][0]:
            heappush(heap, (place, index, document))
            chars += size(document)
            while chars - size(heap[0][2]) >= kept_chars:
                chars -= size(heappop(heap)[2])
    return [document for _, _, document in sorted(heap, key=lambda entry: -entry[0])]


def _pack(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    limit: int | None,
    source: str,
) -> list[np.ndarray[Any, Any]]:
    """Cut the stream of documents into windows, until there are `limit`; a last part is dropped."""
    windows: list[np.ndarray[Any, Any]] = []
    stream = np.empty(0, dtype=np.int64)
    text_tokens, document = 0, None
    for document in documents:
        before, encoded, after = _encode(document, tokenizer, source)
        text_tokens += len(encoded)
        stream = np.concatenate([stream, before, encoded, after])
        whole = len(stream) // seq_len
        windows += list(stream[: whole * seq_len].reshape(whole, seq_len))
        stream = stream[whole * seq_len :]
        if limit is not None and len(windows) >= limit:
            break
    if document is None:
        raise CalibrationError(f"{source} holds no text")
    if text_tokens == 0:
        raise CalibrationError(f"the model's tokenizer makes no tokens of the text of {source}")
    if not windows:
        raise CalibrationError(
            f"{source} holds {text_tokens} tokens, but one sample takes {seq_len}; "
            "give more text or a smaller --seq-len"
        )
    return windows


def _encode(
    document: Document, tokenizer: PreTrainedTokenizerBase, source: str
) -> tuple[np.ndarray[Any, Any], ...]:
    """Return the ids before a document, its own and those after it."""
    text, ends = document.text, True
    if document.chat is not None:
        with one_line_errors(
            f"the chat template cannot render a chat of {source}", CalibrationError
        ):
            text = str(tokenizer.apply_chat_template(document.chat, tokenize=False))
            ends = False
    what = f"the model's tokenizer cannot encode {source}"
    with one_line_errors(what, CalibrationError), library_hidden():
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        marks = [tokenizer.bos_token_id, tokenizer.eos_token_id] if ends else [None, None]
        before, after = ([] if mark is None else [mark] for mark in marks)
        return tuple(np.asarray(part, dtype=np.int64) for part in (before, ids, after))


def _map_ids(path: Path, seq_len: int | None) -> np.ndarray[Any, Any]:
    """Return the rows of a .npy file of token ids, not read yet."""
    check_regular(path)
    refuse_pointer(path, CalibrationError)
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
    if seq_len is not None and seq_len != ids.shape[1]:
        raise CalibrationError(
            f"{path} holds sequences of {ids.shape[1]} tokens, but --seq-len is {seq_len}; "
            "leave --seq-len out"
        )
    return ids
