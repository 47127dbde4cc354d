"""Tasks of lm-evaluation-harness over documents of a test's own."""

import json
from pathlib import Path
from typing import Any

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""
Docs = list[dict[str, Any]]


def write_task(folder: Path, name: str, template: str, docs: Docs) -> None:
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(template.format(name=name, data=data), encoding="utf-8")


def one_line(run: Any) -> str:
    assert run.code == 2, run.err
    (line,) = [line for line in run.err.splitlines() if "error" in line]
    assert line.startswith("hfprune: error: ")
    assert run.out == ""
    return str(line)
