"""What lm-evaluation-harness counts over the held-out text that ships."""

import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from own_tasks import ROLLING, Docs, one_line, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hfprune_fast as hf
from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.errors import ArgumentError
from hfprune_fast.evaluation import harness


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
        assert rows[metric]["pruned"] != pytest.approx(rows[metric]["dense"], rel=1e-9)


def test_a_model_beside_itself_and_what_limits_it(tasks: Path, docs: tuple[Docs, Docs]) -> None:
    write_task(tasks, "own_two", ROLLING, docs[1][:2])
    options = {"tasks": "own_*", "include_path": tasks, "device": "cpu"}
    all_docs = hf.evaluate_tasks("demo", "demo", **options, limit=8)
    assert [row.difference for row in all_docs] == 6 * [0.0]
    assert all_docs[0].difference_stderr == 0.0
    few = hf.evaluate_tasks("demo", "demo", limit=2, num_fewshot=2, **options)
    assert few[2].dense == few[4].dense == all_docs[4].dense != all_docs[2].dense
    assert [row.difference for row in few] == 6 * [0.0]  # the same examples for both
    with pytest.raises(ArgumentError, match="tasks with seq_len 2: "):  # no answer fits
        hf.evaluate_tasks("demo", "demo", seq_len=2, **options)
    short = hf.evaluate_tasks("demo", "demo", seq_len=16, **{**options, "tasks": "own_text"})
    assert short[0].dense > all_docs[2].dense  # windows with less before them


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


@pytest.mark.parametrize("short_of_memory", ["loglikelihood", "loglikelihood_rolling"])
def test_smaller_batches_when_memory_runs_out(
    short_of_memory: str, tasks: Path, hfprune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    kinds: list[str] = []
    run_model = HFLM._model_call

    def recorded(kind: str) -> Callable[..., Any]:
        answer = getattr(HFLM, kind)

        def method(*args: Any, **kwargs: Any) -> Any:
            kinds.append(kind)
            return answer(*args, **kwargs)

        return method

    def with_room_for(rows: int) -> Callable[..., Any]:
        def call(self: Any, inps: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if len(inps) > rows and kinds[-1] == short_of_memory:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return run_model(self, inps, *args, **kwargs)

        return call

    own = ["--tasks", "own_choice,own_text", "--include-path", tasks, "--limit", 4]
    command = ["evaluate", "demo", "demo", *own, "--dtype", "float64", "--device", "cpu", "--json"]
    expected = [row["dense"] for row in hfprune(*command).json()["tasks"]]
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        monkeypatch.setattr(HFLM, kind, recorded(kind))
    monkeypatch.setattr(HFLM, "_model_call", with_room_for(2))
    run = hfprune(*command, "--batch-size", 8)
    # The order of additions: as in the test of the numbers.
    assert [row["pruned"] for row in run.json()["tasks"]] == pytest.approx(expected, rel=1e-9)
    for size in (4, 2):
        assert run.err.count(f"out of memory; continuing with batches of {size}") == 2
    times = {"loglikelihood": 1, "loglikelihood_rolling": 1, short_of_memory: 3}
    assert kinds == 2 * [kind for kind, count in times.items() for _ in range(count)]
    monkeypatch.setattr(HFLM, "_model_call", with_room_for(0))
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
    said = [run.err.index(f"hfprune: tasks on the {name} model") for name in ("dense", "pruned")]
    # Counted where it begins: a full bar is drawn again if the last request took long.
    assert run.err.count("Running loglikelihood requests:   0%", *said) == 1
    assert "Running loglikelihood requests: 100%" in run.err[slice(*said)]


def test_a_text_is_refused_before_tasks_run(
    tasks: Path,
    save_checkpoint: Callable[..., Path],
    hfprune: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(harness, "build")
    wider = save_checkpoint(random_llama(vocab_size=4096))
    own = ["--tasks", "own_choice", "--include-path", tasks]
    for pruned, text, message in (
        ("demo", "nowhere.txt", "nowhere.txt"),
        (wider, "demo", "share a vocabulary"),
    ):
        assert message in one_line(hfprune("evaluate", "demo", pruned, "--text", text, *own))
