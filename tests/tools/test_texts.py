"""tools/texts.py: which files of a library and of the corpus become documents."""

import json
import sys
from pathlib import Path

import pytest
import texts

from hfprune_fast.data.sources import documents_of

CHATS = """\
categories:
- food
conversations:
- - Do you eat?
  - |
    Never.

    I am a program.
- - Hi
  - Hello
  - How are you?
"""


def test_modules_of_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_CHARS", 12)
    for name, text in {
        "b.py": '"""B."""\n', "a/c.py": "x = 1\n" * 9, "empty.py": "\n", "test/test_b.py": "no\n",
        "site-packages/other.py": "no\n", "notes.txt": "no\n",
    }.items():  # fmt: skip
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert [each["text"] for each in texts.modules(tmp_path)] == ["x = 1\nx = 1\n", '"""B."""']


def test_chats_of_the_corpus_are_read_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    english = tmp_path / "site" / texts.PACKAGE / "data/english"
    english.mkdir(parents=True)
    (english.parents[1] / "__init__.py").write_text("raise SystemExit('imported')\n")
    (english / "food.yml").write_text(CHATS)
    library = tmp_path / "library"
    library.mkdir()
    (library / "one.py").write_text("x = 1\n")
    monkeypatch.setattr(texts.sysconfig, "get_paths", lambda: {"stdlib": str(library)})

    texts.main(["--out", str(tmp_path / "without")])
    assert "no chat: pip install --no-deps chatterbot-corpus" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "without").iterdir()] == ["code.jsonl"]

    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    texts.main(["--out", str(tmp_path / "out")])
    found = [document.text for document in documents_of(tmp_path / "out/chat.jsonl")]
    assert found == [
        "user: Do you eat?\n\nassistant: Never.\n\nI am a program.",
        "user: Hi\n\nassistant: Hello\n\nuser: How are you?",
    ]
    (line,) = (tmp_path / "out/code.jsonl").read_text().splitlines()
    assert json.loads(line) == {"text": "x = 1"}
