import gzip
import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hfprune_fast.checkpoint.pretrained import load_tokenizer
from hfprune_fast.config import TINY_MODEL
from hfprune_fast.data import calibration
from hfprune_fast.data.calibration import token_windows
from hfprune_fast.data.sources import _DOCUMENT_CHARS
from hfprune_fast.errors import ArgumentError, CalibrationError

WORDS = ["the", "module", "returns", "a", "string", "and", "raises", "when", "value", "is", "not"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9084449\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY_MODEL)


def words(count: int, offset: int = 0) -> str:
    return " ".join(WORDS[(i * 7 + offset) % len(WORDS)] for i in range(count))


def windows(source: Path | str, tokenizer: Any, **changes: Any) -> torch.Tensor:
    arguments = {"seq_len": 16, "samples": 4, "vocab_size": 1 << 20, **changes}
    return token_windows(source, tokenizer, **arguments)


def test_short_documents_are_packed_between_bos_and_eos(tmp_path: Path, tokenizer: Any) -> None:
    documents = [words(5, i) for i in range(6)]
    path = tmp_path / "short.jsonl"
    path.write_text("\n".join(json.dumps({"text": d}) for d in documents))
    ids = windows(path, tokenizer, samples=None)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream = [
        token
        for document in documents
        for token in [bos, *tokenizer(document, add_special_tokens=False)["input_ids"], eos]
    ]
    whole = len(stream) // 16
    assert whole >= 1
    assert ids.flatten().tolist() == stream[: whole * 16]


def test_same_seed_same_windows_on_every_machine(tmp_path: Path) -> None:
    """The draw depends on sha256 alone, so its result can be written down."""
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(60).reshape(10, 6))
    drawn = token_windows(path, None, seq_len=None, samples=4, seed=3, vocab_size=60)
    assert drawn[:, 0].tolist() == [30, 24, 48, 6]
    other = token_windows(path, None, seq_len=None, samples=4, seed=4, vocab_size=60)
    assert other.tolist() != drawn.tolist()


def test_seed_zero_counts(text_file: Path, tokenizer: Any) -> None:
    zero, again, one = (windows(text_file, tokenizer, seed=s) for s in (0, 0, 1))
    assert torch.equal(zero, again)
    assert not torch.equal(zero, one)


def test_fewer_windows_than_requested(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text(words(40))
    ids = windows(path, tokenizer, samples=10_000)
    assert 1 <= len(ids) < 10_000


def test_folder_reads_every_kind_of_file_in_order(tmp_path: Path, tokenizer: Any) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text(words(30, 1))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": words(30, 2)}) + "\n\n")
    parquet.write_table(pyarrow.table({"text": [words(30, 3)]}), tmp_path / "sub" / "c.parquet")
    (tmp_path / "ignored.md").write_text("not read")
    ids = windows(tmp_path, tokenizer, samples=None)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream: list[int] = []
    for offset in (1, 2, 3):
        text = words(30, offset)
        stream += [bos, *tokenizer(text, add_special_tokens=False)["input_ids"], eos]
    assert ids.flatten().tolist() == stream[: ids.numel()]


def test_a_long_file_gives_windows_from_all_over_it(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "long.txt"
    lines = [f"line {i} {words(8, i)}\n" for i in range(60_000)]
    path.write_text("".join(lines))
    assert path.stat().st_size > 2 * _DOCUMENT_CHARS
    ids = windows(path, tokenizer, seq_len=32, samples=24)
    text = " ".join(tokenizer.batch_decode(ids))
    numbers = [int(n) for n in re.findall(r"line (\d{4,5}) ", text)]
    assert len(numbers) > 5
    assert max(numbers) - min(numbers) > 5_000


def test_jsonl_lines_end_at_line_feeds_alone(tmp_path: Path, tokenizer: Any) -> None:
    """U+2028 and U+0085 end lines for str.splitlines, not in JSON; BOM and CRLF are common."""
    text = "one\u2028two\u0085three\x0bfour " + words(20)
    path = tmp_path / "a.JSONL"
    line = json.dumps({"text": text}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n" + line.encode() + b"\n")
    got = windows(path, tokenizer, samples=None)
    once = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    stream = 2 * [*once, tokenizer.eos_token_id]
    assert got.flatten().tolist() == stream[: got.numel()]


def test_tokenizer_without_bos_and_eos(tmp_path: Path, tokenizer: Any) -> None:
    class Plain:
        bos_token_id = None
        eos_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    path = tmp_path / "a.txt"
    path.write_text(words(60))
    got = windows(path, Plain(), samples=None)
    assert got.flatten().tolist() == Plain()(words(60))["input_ids"][: got.numel()]


def test_a_large_source_takes_no_more_memory_and_is_drawn_as_a_small_one(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        for i in range(600):
            file.write(json.dumps({"text": f"number {i} {words(30 + i % 7)}" * 200}) + "\n")
    whole = windows(path, tokenizer)  # which keeps all 24 MB
    monkeypatch.setattr(calibration, "_MIN_KEPT_CHARS", 1 << 18)
    tracemalloc.start()
    kept = windows(path, tokenizer)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert torch.equal(kept, whole)
    assert peak_bytes < 6_000_000


def test_documents_are_drawn_from_the_whole_source(tmp_path: Path, tokenizer: Any) -> None:
    """Tokenising stops early in a large source; what it read is not simply its beginning."""
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i} " * 40}) for i in range(400)))
    text = " ".join(tokenizer.batch_decode(windows(path, tokenizer, samples=4)))
    numbers = {int(n) for n in re.findall(r"\b\d+\b", text)}
    assert max(numbers) > 200


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    loaded: list[Any] = []

    def load_dataset(path: str, name: str | None, split: str, streaming: bool) -> Any:
        loaded.append((path, name, split))
        return datasets.Dataset.from_dict({"text": [words(50), words(50, 3)]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert windows("org/corpus:en", tokenizer).shape == (4, 16)
    assert loaded == [("org/corpus", "en", "train")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\t\n", "holds no text"),
        ("short.txt", b"too short", r"holds \d+ tokens, but one sample takes 16; give more text"),
        ("bad.txt", b"\xff\xfe\xfa", "cannot be read"),
        ("bad.jsonl", b'{"text": "a"', "bad.jsonl:1 is not JSON"),
        ("deep.jsonl", b'{"text": ' + b"[" * 200_000, "deep.jsonl:1 is not JSON"),
        ("cut.json", b'[{"text": "a"},\n\n{"text": "b', "cut.json:3 is not JSON: Unterminated"),
        ("zeros.jsonl", b"\0" * 20_000, "zeros.jsonl:1 is not JSON: Expecting value"),
        ("digits.jsonl", b'{"text": ' + b"9" * 6000 + b"}", "digits.jsonl:1 is not JSON"),
        ("half.jsonl", b'{"text": "\\ud800"}', "half.jsonl:1 has half a surrogate pair"),
        ("archive.npy", b"PK\x03\x04", "not a .npy file"),
        ("header.npy", b"\x93NUMPY\x01\x00\x10\x00{'shape': (-1,)}\n", "not a .npy file"),
        ("null.jsonl", b'{"text": null}\n', "holds no text"),
        ("plain.jsonl.gz", b'{"text": "a"}\n', "cannot be read: Not a gzipped file"),
        (
            "cut.txt.gz",
            gzip.compress(b"words " * 99, mtime=0)[:-9],
            "cannot be read: Compressed file ended",
        ),
        ("bits.txt.gz", gzip.compress(b"words " * 99, mtime=0)[:12] + b"words", "cannot be read"),
        ("lfs.txt", POINTER, "lfs.txt is a Git LFS pointer"),
        ("lfs.npy", POINTER, "lfs.npy is a Git LFS pointer"),
        ("text.md", b"words", "is not a calibration source"),
        ("bad.parquet", b"PAR1 not really", "is not readable as .parquet"),
        ("bad.npy", b"not numpy", "not a .npy file"),
    ],
)
def test_bad_files(tmp_path: Path, tokenizer: Any, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        windows(path, tokenizer)


@pytest.mark.parametrize("kind", ["pipe", "device", "ring", "broken link"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl.gz", ".npy", ""])
def test_what_may_never_end_is_no_source(
    tmp_path: Path, tokenizer: Any, kind: str, suffix: str
) -> None:
    path = tmp_path / f"text{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "ring": str(path)}.get(kind, "nowhere"))
    with pytest.raises(CalibrationError, match="is no regular file"):
        windows(path, tokenizer)


@pytest.mark.parametrize("source", ["", "  "])
def test_empty_name(tokenizer: Any, source: str) -> None:
    with pytest.raises(CalibrationError, match="is empty"):
        windows(source, tokenizer)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "nowhere.txt", "nowhere.npy"])
def test_missing_source(tokenizer: Any, source: str) -> None:
    with pytest.raises(CalibrationError, match="no file"):
        windows(source, tokenizer)


def test_missing_hub_data_set(tokenizer: Any) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    with pytest.raises(CalibrationError, match="no file or folder no-such-data, and the hub says"):
        windows("no-such-data", tokenizer)


def test_empty_folder(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=r"holds no .txt, .*, .parquet file"):
        windows(tmp_path, tokenizer)


@pytest.mark.parametrize("change", [{"samples": 0}, {"seq_len": 0}, {"seq_len": -4}])
def test_counts_below_one(text_file: Path, tokenizer: Any, change: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match="at least 1"):
        windows(text_file, tokenizer, **change)


def test_tokenizer_of_another_model(text_file: Path, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="another model's tokenizer"):
        windows(text_file, tokenizer, vocab_size=10)
