"""Zero-shot tasks of lm-evaluation-harness made of a text, for machines that reach no data sets.

continuation   a sentence's first half, and which of four second halves is its own
last_word      a passage, and its last word, as in LAMBADA: accuracy and perplexity
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAMES = ("continuation", "last_word")
_CHOICES, _PASSAGE_SENTENCES = 4, 3
_CONTINUATION = """\
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
_LAST_WORD = """\
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + word}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""


def write_tasks(text: str, folder: Path, documents: int, seed: int = 0) -> None:
    """Write the tasks of a text, so many documents each, as `--include-path` takes them."""
    drawn = random.Random(seed)
    paragraphs = [_sentences(line) for line in text.splitlines()]
    sentences = [s for paragraph in paragraphs for s in paragraph if 10 <= s.count(" ") <= 40]
    passages = [p[at : at + _PASSAGE_SENTENCES] for p in paragraphs for at in (0, len(p) // 2)]
    whole = {" ".join(p) for p in passages if len(p) == _PASSAGE_SENTENCES}
    words = (found for p in sorted(whole) if (found := re.fullmatch(r"(.*\w) (\w{3,})\W*", p)))
    questions = [{"context": w[1], "word": w[2]} for w in words]
    if documents < _CHOICES:
        raise SystemExit(f"a task is of {_CHOICES} documents or more, got {documents}")
    if min(len(sentences), len(questions)) < documents:
        found = f"{len(sentences)} sentences and {len(questions)} passages"
        raise SystemExit(f"the text has {found}, not {documents} of each")
    folder.mkdir(parents=True, exist_ok=True)
    halves = [_halves(s) for s in drawn.sample(sentences, documents)]
    _write(folder, "continuation", _CONTINUATION, _choices(halves, drawn))
    _write(folder, "last_word", _LAST_WORD, drawn.sample(questions, documents))


def _sentences(paragraph: str) -> list[str]:
    return [s.strip() for s in re.split(r"(?<=[.!?])\s+", paragraph) if s.strip()]


def _halves(sentence: str) -> tuple[str, str]:
    words = sentence.split()
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def _choices(halves: list[tuple[str, str]], drawn: random.Random) -> Iterable[dict[str, Any]]:
    for i, (context, own) in enumerate(halves):
        others = [second for j, (_, second) in enumerate(halves) if j != i]
        choices = drawn.sample(others, _CHOICES - 1)
        answer = drawn.randrange(_CHOICES)
        choices.insert(answer, own)
        yield {"context": context, "choices": choices, "answer": answer}


def _write(folder: Path, name: str, task: str, documents: Iterable[dict[str, Any]]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in documents), encoding="utf-8")
    head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
    (folder / f"{name}.yaml").write_text(f"{head}test_split: test\n{task}", encoding="utf-8")
