"""Tasks over the held-out text that ships."""

import re
from pathlib import Path

import pytest
from own_tasks import CHOICE, ROLLING, Docs, write_task

from hfprune_fast.checkpoint.folder import TINY_MODEL


@pytest.fixture
def docs() -> tuple[Docs, Docs]:
    """Sentences to continue by the half that belongs to them, and pieces of text."""
    text = (TINY_MODEL / "heldout.txt").read_text(encoding="utf-8")
    sentences = [s for s in re.split(r"(?<=[.])\s+", text) if 60 < len(s) < 200][:18]
    halves = [(" ".join(w[: len(w) // 2]), " ".join(w[len(w) // 2 :]))
              for w in map(str.split, sentences)]  # fmt: skip
    choices = [
        {
            "context": context,
            "choices": [
                halves[(i + k) % len(halves)][1] for k in (-i % 3, (1 - i) % 3, (2 - i) % 3)
            ],
            "answer": i % 3,
        }
        for i, (context, _) in enumerate(halves)
    ]
    return choices, [{"text": text[at : at + 300]} for at in range(0, 900, 300)]


@pytest.fixture
def tasks(tmp_path: Path, docs: tuple[Docs, Docs], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the tasks own_choice and own_text."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path / "tasks", "own_choice", CHOICE, docs[0])
    write_task(tmp_path / "tasks", "own_text", ROLLING, docs[1])
    return tmp_path / "tasks"
