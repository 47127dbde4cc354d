"""Tasks of lm-evaluation-harness over the held-out text that ships, and what it refuses."""

import json
import math
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hfprune_fast as hf
from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.errors import ArgumentError
from hfprune_fast.evaluation import harness

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


def log_p(model: PreTrainedModel, ids: list[int], first: int) -> float:
    """The log probability of ids[first:] after ids[:first], by transformers alone."""
    with torch.no_grad():
        rows = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(dim=-1)
    return float(sum(rows[i - 1, ids[i]] for i in range(first, len(ids))))


def answers(model: PreTrainedModel, docs: tuple[Docs, Docs]) -> dict[str, list[float]]:
    """What the metrics are made of: a number for each document."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    found: dict[str, list[float]] = {"acc": [], "acc_norm": [], "nats": []}
    for doc in docs[0]:
        start = len(tokenizer(doc["context"]).input_ids)
        sums = [
            log_p(model, tokenizer(f"{doc['context']} {choice}").input_ids, start)
            for choice in doc["choices"]
        ]
        by_length = [s / len(choice) for s, choice in zip(sums, doc["choices"], strict=True)]
        found["acc"].append(float(sums.index(max(sums)) == doc["answer"]))
        found["acc_norm"].append(float(by_length.index(max(by_length)) == doc["answer"]))
    for doc in docs[1]:
        ids = tokenizer(doc["text"]).input_ids
        prefix = tokenizer.bos_token_id
        prefix = tokenizer.eos_token_id if prefix is None else prefix
        found["nats"].append(-log_p(model, [prefix, *ids], 1))
    return found


def mean_error(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def test_numbers_are_those_of_transformers(
    tasks: Path, docs: tuple[Docs, Docs], tmp_path: Path, hfprune: Callable[..., Any]
) -> None:
    """In float64: the removed neurons' columns of down_proj are zero in the model it is held to."""
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float64)
    width, generator = model.config.intermediate_size, torch.Generator().manual_seed(0)
    keep = {
        layer: torch.randperm(width, generator=generator)[: width - 80 * (layer + 1)].sort().values
        for layer in range(model.config.num_hidden_layers)
    }
    hf.prune_checkpoint("demo", tmp_path / "pruned", keep)
    expected = {"dense": answers(model, docs)}
    for layer, kept in keep.items():
        removed = torch.ones(width, dtype=torch.bool)
        removed[kept] = False
        model.model.layers[layer].mlp.down_proj.weight.data[:, removed] = 0
    expected["pruned"] = answers(model, docs)
    run = hfprune(
        "evaluate", "demo", tmp_path / "pruned", "--tasks", "own_choice,own_text",
        "--include-path", tasks, "--dtype", "float64", "--device", "cpu",
        "--batch-size", 3, "--json",
    )  # fmt: skip
    assert run.code == 0, run.err
    rows = {row["metric"]: row for row in run.json()["tasks"]}
    assert [row["task"] for row in rows.values()] == 2 * ["own_choice"] + 2 * ["own_text"]
    for metric in ("acc", "acc_norm"):
        for which, found in expected.items():
            assert rows[metric][which] == pytest.approx(sum(found[metric]) / len(docs[0]))
            assert rows[metric][f"{which}_stderr"] == pytest.approx(mean_error(found[metric]))
        pairs = zip(*(found[metric] for found in expected.values()), strict=True)
        changes = [q - p for p, q in pairs]
        assert rows[metric]["difference"] == pytest.approx(sum(changes) / len(changes))
        assert rows[metric]["difference_stderr"] == pytest.approx(mean_error(changes))
    assert any(rows[metric]["difference"] for metric in ("acc", "acc_norm"))
    words = sum(len(re.split(r"\s+", doc["text"])) for doc in docs[1])
    octets = sum(len(doc["text"].encode()) for doc in docs[1])
    for metric, count in (("word_perplexity", words), ("byte_perplexity", octets)):
        for which, found in expected.items():
            # The harness keeps logits in float64, and its sums in Python's floats; what is left is
            # the order of a thousand additions a logit, 1e-13 of each.
            value = math.exp(sum(found["nats"]) / count)
            assert rows[metric][which] == pytest.approx(value, rel=1e-9)
        assert rows[metric]["dense_stderr"] is None
        assert rows[metric]["pruned"] > 1.001 * rows[metric]["dense"]


def test_a_model_beside_itself_and_what_limits_it(tasks: Path) -> None:
    options = {"tasks": "own_*", "include_path": tasks, "device": "cpu"}
    all_docs = hf.evaluate_tasks("demo", "demo", **options, limit=8)
    assert [row.difference for row in all_docs] == 4 * [0.0]
    assert all_docs[0].difference_stderr == 0.0
    few = hf.evaluate_tasks("demo", "demo", limit=2, num_fewshot=2, **options)
    assert few[0].dense in (0, 0.5, 1)
    assert few[2].dense != all_docs[2].dense
    assert [row.difference for row in few] == 4 * [0.0]  # the same examples for both
    with pytest.raises(ArgumentError, match="tasks with seq_len 2: "):  # no answer fits
        hf.evaluate_tasks("demo", "demo", seq_len=2, **options)
    short = hf.evaluate_tasks("demo", "demo", seq_len=16, **{**options, "tasks": "own_text"})
    assert short[0].dense > 1.1 * all_docs[2].dense  # windows with less before them


def test_every_layout_one_model_at_a_time(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = {layer: torch.arange(384 - 32 * layer) for layer in range(4)}
    alive: list[Any] = []

    def build(plan: Any) -> PreTrainedModel:
        assert all(model() is None for model in alive)
        model = loading.build(plan)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(harness, "build", build)
    options = {"tasks": "own_text", "include_path": tasks, "dtype": "float64", "limit": 2}
    for layout in ("custom", "padded", "decilm"):
        hf.prune_checkpoint("demo", tmp_path / layout, keep, layout=layout)
    pairs = [("demo", tmp_path / "custom"), (tmp_path / "padded", tmp_path / "decilm")]
    first, second = (hf.evaluate_tasks(*pair, device="cpu", **options)[0] for pair in pairs)
    assert len(alive) == 4
    assert first.difference > 0
    # The order of additions: as in the test of the numbers.
    assert second.dense == pytest.approx(first.pruned, rel=1e-9)
    assert second.pruned == pytest.approx(first.pruned, rel=1e-9)


def test_smaller_batches_when_memory_runs_out(
    tasks: Path, hfprune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    run_model = HFLM._model_call

    def with_room_for_two(self: Any, inps: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(inps) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_model(self, inps, *args, **kwargs)

    flags = ["--tasks", "own_choice", "--include-path", tasks, "--limit", 4, "--dtype", "float64"]
    command = ["evaluate", "demo", "demo", *flags, "--device", "cpu", "--json"]
    expected = hfprune(*command).json()
    monkeypatch.setattr(HFLM, "_model_call", with_room_for_two)
    run = hfprune(*command, "--batch-size", 8)
    assert run.json() == expected
    for size in (4, 2):
        assert run.err.count(f"out of memory; continuing with batches of {size}") == 2
    monkeypatch.setattr(HFLM, "_model_call", lambda *_, **__: with_room_for_two(None, range(3)))
    assert "out of memory; try a smaller --batch-size" in one_line(hfprune(*command))


def test_beside_a_text_in_one_table(tasks: Path, hfprune: Callable[..., Any]) -> None:
    flags = ["--text", "demo", "--samples", 2, "--seq-len", 64, "--device", "cpu"]
    own = ["--tasks", "own_choice", "--include-path", tasks, "--limit", 4]
    run = hfprune("evaluate", "demo", "demo", *flags, *own)
    assert run.code == 0, run.err
    assert run.out.startswith("KL(dense || pruned)  0.0000 nats\n")
    table = run.out.split("\n\n")[1].splitlines()
    assert table[0].split() == ["task", "metric", "dense", "pruned", "difference"]
    assert re.fullmatch(
        r"own_choice +acc +(0\.\d{4} ± 0\.\d{4}) +\1 +\+0\.0000 ± 0\.0000", table[2]
    )
    assert "Running loglikelihood requests" not in run.err
    assert "dense, loglikelihood: 100%" in run.err


def one_line(run: Any) -> str:
    assert run.code == 2, run.err
    (line,) = [line for line in run.err.splitlines() if "error" in line]
    assert line.startswith("hfprune: error: ")
    assert run.out == ""
    return str(line)


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
    "no such file": ("dataset_path: json", "dataset_path: json", "own_choice cannot be made"),
    "field": ("doc_to_choice: choices", "doc_to_choice: missing", "own_choice"),
    "output": ("multiple_choice", "multiple", "cannot be made: Got invalid output_type"),
    "code": ("metric_list", "unsafe_code: true\nmetric_list", "runs code that the model writes"),
    "metric": ("metric: acc_norm", "metric: of_the_hub", "metric of_the_hub, which the harness"),
    "hub": ("metric: acc_norm", "hf_evaluate: true, metric: rouge", "metric rouge, which"),
    "image": ("doc_to_choice", "doc_to_image: x\ndoc_to_choice", "task own_choice"),
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
