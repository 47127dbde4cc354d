"""tools/mixed_text.py: of what is measured on, nothing is in the mixture."""

import json
from collections import defaultdict
from pathlib import Path

import mixed_text
import pytest
import torch
from texts import write

from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import TINY_MODEL, CalibrationOptions
from hfprune_fast.data.calibration import calibrate

ARTICLES = 30
WINDOWS = ["--eval-samples", "8", "--seq-len", "64"]


def text(kind: str, index: int, words: int) -> str:
    return " ".join(f"{kind}{index}x{i}" for i in range(words))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Code and chats of 60 documents each, of which the words say where they are from."""
    write(tmp_path / "code.jsonl", [{"text": text("code", i, 20)} for i in range(60)])
    write(
        tmp_path / "chat.jsonl",
        [
            {"messages": [
                {"role": "user", "content": text("chat", i, 3)},
                {"role": "assistant", "content": text("chat", i, 5 + 12 * (i % 2))},
            ]}
            for i in range(60)
        ],
    )  # fmt: skip
    valid = "".join(f"\n = {i} = \n\n {text('article', i, 80)} \n" for i in range(ARTICLES))
    (tmp_path / "valid.txt").write_text(valid)
    return tmp_path


def mixture(texts: Path) -> list[str]:
    out = texts / "mixed.jsonl"
    arguments = ["--text", texts / "valid.txt", "--texts", texts, "--out", out, *WINDOWS]
    mixed_text.main([str(TINY_MODEL), *map(str, arguments)])
    return [json.loads(line)["text"] for line in out.read_text().splitlines()]


def test_no_document_of_a_held_out_window_is_in_the_mixture(texts: Path) -> None:
    documents = defaultdict[str, set[str]](set)
    for word in (word for document in mixture(texts) for word in document.split()):
        documents[word.partition("x")[0]].add(word)
    source = open_source(TINY_MODEL)
    for kind in ("code", "chat"):
        windows = calibrate(texts / f"{kind}.jsonl", source, CalibrationOptions(8, 64))
        ids = torch.cat([batch.ids for batch in windows.batches])
        held_out = [set(source.tokenizer.decode(each).split()) for each in ids]
        of_kind = [words for name, words in documents.items() if name.startswith(kind)]
        assert 20 < len(of_kind) < 56
        for words in of_kind:
            shared = max(len(words & window) for window in held_out)
            assert shared < min(mixed_text.RUN_WORDS, len(words))


def test_as_much_of_each_kind(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mixture(texts)
    assert sum(document.count("article") for document in whole) == ARTICLES * 80
    monkeypatch.setattr(mixed_text, "MAX_CHARS_OF_A_KIND", 1200)
    found = mixture(texts)
    assert found == mixture(texts)
    for kind in ("code", "chat", "article"):
        chars = sum(len(document) for document in found if kind in document)
        assert 1200 <= chars < 1200 + max(map(len, found)), kind


def test_what_is_missing_or_read_is_an_error_and_stays(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(valid: str, out: str) -> str:
        arguments = ["--text", texts / valid, "--texts", texts, "--out", texts / out, *WINDOWS]
        with pytest.raises(SystemExit) as raised:
            mixed_text.main([str(TINY_MODEL), *map(str, arguments)])
        assert raised.value.code == 2
        return capsys.readouterr().err

    (texts / "empty.txt").touch()
    code = (texts / "code.jsonl").read_text()
    assert "empty.txt has no document for the mixture" in refused("empty.txt", "mixed.jsonl")
    assert "No such file" in refused("gone.txt", "mixed.jsonl")
    assert "is read; give it another name" in refused("valid.txt", "code.jsonl")
    assert (texts / "code.jsonl").read_text() == code
    (texts / "chat.jsonl").unlink()
    assert "no file or folder" in refused("valid.txt", "mixed.jsonl")
    assert not (texts / "mixed.jsonl").exists()
