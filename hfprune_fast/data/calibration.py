"""Text or token ids -> (N, T) token windows, the same on every machine for the same seed.

Documents go one after another into a stream of tokens, each between the tokenizer's BOS and EOS
where it has them, and the stream is cut into windows of T tokens: short documents share a window,
long ones fill several. (Files beyond a million characters count as several documents.) Orders are
drawn by sorting on sha256(seed, index), which no library's random generator can change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hfprune_fast.config import DEFAULT_SEQ_LEN, CalibrationOptions
from hfprune_fast.console import display_name, say
from hfprune_fast.data.batches import TokenData, token_data
from hfprune_fast.data.sources import documents_of
from hfprune_fast.errors import ArgumentError, CalibrationError
from hfprune_fast.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Windows to draw from, for each window requested.
_CANDIDATES = 8


class TextModel(Protocol):
    """The part of `checkpoint.source.ModelSource` that reading text needs."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def transformers_config(self) -> Any: ...
    @property
    def spec(self) -> ModelSpec: ...


def calibrate(text: str | Path, source: TextModel, options: CalibrationOptions) -> TokenData:
    """Return token windows of a text for a model, as `token_windows` makes them.

    Prints a line on stderr when the text holds fewer samples than requested.
    """
    config, seq_len = source.transformers_config, options.seq_len
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        longest = DEFAULT_SEQ_LEN

    def check_length(tokens: int) -> None:
        if tokens > longest:
            raise ArgumentError(
                f"seq_len must be at most {longest}, the model's longest position; got {tokens}"
            )

    is_ids = str(text).endswith(".npy")
    if seq_len is not None:
        check_length(seq_len)
    elif not is_ids:
        seq_len = min(DEFAULT_SEQ_LEN, longest)
    ids = token_windows(
        text,
        None if is_ids else source.tokenizer,
        seq_len=seq_len,
        samples=options.samples,
        seed=options.seed,
        vocab_size=source.spec.vocab_size,
    )
    check_length(ids.shape[1])
    if options.samples is not None and len(ids) < options.samples:
        say(
            f"{text} holds {len(ids)} samples of {ids.shape[1]} tokens; "
            f"{options.samples} were requested"
        )
    description = {"source": display_name(text), "seed": options.seed, "seq_len": ids.shape[1]}
    return token_data(ids, source.spec.vocab_size, description)


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

    Fewer than `samples` windows come back when the text holds fewer; the caller reports it.
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
        documents = documents_of(source)
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
