"""Tasks that are unknown, broken, without data or not to be run: one line each."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from own_tasks import one_line

import hfprune_fast as hf
from hfprune_fast.errors import ArgumentError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], r"evaluate needs text \(--text SOURCE\), tasks \(--tasks NAMES\), or both"),
        (["--tasks", " , "], "tasks must be names such as hellaswag,piqa, got none"),
        (["--text", "demo", "--limit", 3], "limit is for tasks, and no tasks are given"),
        (["--text", "demo", "--include-path", "."], "include_path is for tasks, and no tasks"),
        (["--tasks", "own_text", "--limit", 0], "limit must be at least 1, got 0"),
        (["--tasks", "own_text", "--limit", "0.5"], "'0.5' is not a valid integer"),
        (["--tasks", "own_text", "--num-fewshot", -1], "num_fewshot must be at least 0, got -1"),
        (
            ["--tasks", "own_text", "--include-path", "nowhere"],
            "include_path nowhere is not a",
        ),
        (["--tasks", "own_text", "--offload", "disk"], "tasks need the whole model on the device"),
        (["--tasks", "own_text", "--memory-budget", "1GB"], "tasks need the whole model on"),
        (["--tasks", "own_text", "--seq-len", 1], "seq_len must be a whole number from 2 to 512"),
        (["--tasks", "own_text", "--seq-len", 513], "from 2 to 512.*got 513"),
    ],
)
def test_what_cannot_be_is_one_line(
    flags: list[Any], message: str, hfprune: Callable[..., Any]
) -> None:
    assert re.search(message, one_line(hfprune("evaluate", "demo", "demo", *flags)))


BROKEN = {
    "no such file": ("dataset_path: json", "dataset_path: json", "own_choice cannot be loaded"),
    "field": ("doc_to_choice: choices", "doc_to_choice: missing", "own_choice cannot be loaded"),
    "output": ("multiple_choice", "multiple", "cannot be loaded: Got invalid output_type"),
    "code": ("metric_list", "unsafe_code: true\nmetric_list", "runs code that the model writes"),
    "metric": ("metric: acc_norm", "metric: of_the_hub", "metric of_the_hub, which the harness"),
    "hub": ("metric: acc_norm", "hf_evaluate: true, metric: rouge", "metric rouge, which"),
    "image": ("doc_to_choice", "doc_to_image: x\ndoc_to_choice", "needs images or sound"),
    "data": ("dataset_path: json", "dataset_path: some/set", "no data set for own_choice: not in"),
}


@pytest.mark.parametrize("which", BROKEN)
def test_a_task_that_cannot_run_is_one_line(
    which: str, tasks: Path, hfprune: Callable[..., Any]
) -> None:
    before, after, message = BROKEN[which]
    path = tasks / "own_choice.yaml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    if which == "no such file":
        (tasks / "own_choice.jsonl").unlink()
    run = hfprune("evaluate", "demo", "demo", "--tasks", "own_choice", "--include-path", tasks)
    assert message in one_line(run)


def test_no_code_is_fetched_while_tasks_run(tasks: Path, hfprune: Callable[..., Any]) -> None:
    (tasks / "own.py").write_text(
        "import evaluate\ndef results(*_):\n    return {'acc': evaluate.load('rouge')}\n"
    )
    with open(tasks / "own_choice.yaml", "a") as file:
        file.write("process_results: !function own.results\n")
    flags = ["--include-path", tasks, "--limit", 1, "--device", "cpu"]
    run = hfprune("evaluate", "demo", "demo", "--tasks", "own_choice", *flags)
    assert "metric rouge is code on the hub, which is not run" in one_line(run)


def test_a_tokenizer_that_is_missing(
    tasks: Path, llama_dir: Path, hfprune: Callable[..., Any]
) -> None:
    for path in llama_dir.glob("tokenizer*"):
        path.unlink()
    flags = ["--tasks", "own_text", "--include-path", tasks]
    assert "tokenizer" in one_line(hfprune("evaluate", "demo", llama_dir, *flags))


def test_weights_that_are_no_numbers(
    tasks: Path, save_checkpoint: Callable[..., Path], hfprune: Callable[..., Any]
) -> None:
    model = random_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    flags = ["--tasks", "own_text", "--include-path", tasks, "--limit", 1, "--device", "cpu"]
    line = one_line(hfprune("evaluate", "demo", save_checkpoint(model), *flags))
    assert "model.layers.1.mlp.up_proj.weight holds NaN or inf" in line


def test_without_the_harness(
    tasks: Path, hfprune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = one_line(hfprune("evaluate", "demo", "demo", "--tasks", "piqa"))
    assert "tasks need lm-evaluation-harness" in line
    assert "pip install 'hfprune_fast[eval]'" in line
    with pytest.raises(ArgumentError, match="tasks must be names"):
        hf.evaluate_tasks("demo", "demo")


def test_the_hub_is_asked_once_and_only_for_what_is_there(
    tasks: Path, hfprune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network each data set would be tried five times, with waits between."""
    calls = []

    def no_network() -> None:
        calls.append(1)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", no_network)
    flags = ["--include-path", tasks, "--limit", 2, "--device", "cpu"]
    assert hfprune("evaluate", "demo", "demo", "--tasks", "own_choice", *flags).code == 0
    assert calls == []
    for name, data in (("own_choice", "dataset_path: json"), ("own_text", "test: /")):
        path = tasks / f"{name}.yaml"
        elsewhere = {
            "dataset_path: json": "dataset_path: no/such",
            "test: /": "test: hf://no/such/",
        }
        path.write_text(path.read_text().replace(data, elsewhere[data]))
    run = hfprune("evaluate", "demo", "demo", "--tasks", "own_*", *flags)
    assert "no data set for own_choice, own_text: not in the cache" in one_line(run)
    assert "the hub does not answer (Name or service not known); data sets are" in run.err
    assert calls == [1]


@pytest.mark.slow
def test_tasks_of_the_harness(tasks: Path, tmp_path: Path, hfprune: Callable[..., Any]) -> None:
    """Their list is read once, in some seconds: names near an unknown one, and missing data."""

    def said(names: str, *flags: Any) -> str:
        return one_line(hfprune("evaluate", "demo", "demo", "--tasks", names, *flags))

    paper = said("paper")
    named = "hellaswag, piqa, arc_challenge, arc_easy, openbookqa, boolq, winogrande, wikitext"
    assert f"no data set for {named}: not in the cache, and the hub cannot be reached" in paper
    assert "--include-path" in paper
    assert re.search("no task hellaswga; near it: hellaswag", said("hellaswga"))
    assert "lm-eval ls tasks lists them" in said("\x1bqqqqqqqqqqqqqqqqq")
    (tasks / "group.yaml").write_text(
        "group: both\ntask: [own_choice]\naggregate_metric_list: [{metric: acc}]"
    )
    flags = ["--include-path", tasks, "--limit", 4, "--device", "cpu", "--json"]
    rows = hfprune("evaluate", "demo", "demo", "--tasks", "both", *flags).json()["tasks"]
    assert [(row["task"], row["metric"]) for row in rows] == [
        ("own_choice", "acc"), ("own_choice", "acc_norm"), ("both", "acc"),
    ]  # fmt: skip
    (tasks / "group.yaml").unlink()
    (tasks / "broken.yaml").write_text("task: [unclosed")
    assert "broken.yaml is not a valid task file" in said("own_chioce", "--include-path", tasks)
    assert "metric code_eval is code on the hub, which is not run" in said("humaneval")
