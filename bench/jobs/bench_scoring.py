"""Scoring of whole models beside the reference implementation's arithmetic: time and memory.

    .venv/bin/pytest bench/jobs/bench_scoring.py --small
    HFPRUNE_LARGE=1 .venv/bin/pytest bench/jobs/bench_scoring.py -k from_disk

Providers work in processes of their own and in turn, so that a ratio compares neighbours in time. A
round waits up to 15 seconds for the machine to be quiet. The second command writes a checkpoint of
5 GB (HFPRUNE_LARGE_BYTES) and scores it resident and streamed, with its files in the page cache.
The floor is the job's products at the rate that a large one had in the same round.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hfprune_reference
import pytest
import torch
from meter import ceilings
from models import (
    Shape,
    into_page_cache,
    random_ids,
    random_model,
    score_band,
    write_checkpoint,
)
from process_meters import wait_for_quiet
from records import Row, row
from safetensors.torch import load_file, save_file
from torch import Tensor
from workers import Worker, started

import hfprune_fast as hf

SEQ_LEN = {"full": 1024, "small": 1024, "tiny": 16}
ROUNDS = {"full": 5, "small": 3, "tiny": 1}
SHAPES = {
    "full": [Shape(512, 1536, 8, 8, 4, 128256)],
    "small": [
        Shape(512, 1536, 8, 8, 4, 128256),
        Shape(256, 768, 4, 4, 2, 128256),
        Shape(768, 2304, 8, 12, 4, 128256),
    ],
    "tiny": [Shape(32, 48, 2, 4, 2, 500)],
}
LARGE = Shape(2048, 8192, 0, 32, 8, 128256)
LARGE_BYTES = int(os.environ.get("HFPRUNE_LARGE_BYTES", 5_000_000_000))
SAMPLES, LARGE_SAMPLES = 1, 4
WARM_UP = Shape(64, 96, 8, 8, 4, 512)
PROVIDERS = {
    "ours": lambda model, ids: hf.score(model, ids).l1,
    "HFPrune's arithmetic": hfprune_reference.score,
}


def score_model(provider: str, shape: dict[str, int], dtype: str, seq_len: int, out: str) -> Any:
    """What a worker runs: the scores of a model in memory, written to out once they are made."""
    score = PROVIDERS[provider]
    made = [Shape(**shape), WARM_UP]
    torch.manual_seed(0)
    model, small = (random_model(each, getattr(torch, dtype)) for each in made)
    score(small, random_ids(1, 64, WARM_UP.vocab))
    ids = random_ids(SAMPLES, seq_len, made[0].vocab)
    save_file({"l1": score(model, ids)}, out)
    return partial(score, model, ids)


def score_folder(folder: str, offload: str, seq_len: int, out: str) -> Any:
    """The same of a folder, whose weights are in no one's memory before."""
    hf.score(random_model(WARM_UP), random_ids(1, 64, WARM_UP.vocab))
    ids = random_ids(LARGE_SAMPLES, seq_len, LARGE.vocab)

    def run() -> None:
        hf.score(folder, ids, batch_size=1, device="cpu", offload=offload).save(out)

    return run


def check(
    ours: Tensor, reference: Tensor, dtype: str, shape: Shape, ids_shape: tuple[int, int]
) -> dict[str, float]:
    """Compare each layer's scores, by the norm of the difference, with what rounding explains."""
    error = torch.linalg.vector_norm(ours - reference.double(), dim=1) / ours.norm(dim=1)
    band = score_band(dtype, shape, *ids_shape)
    assert bool((error < band).all()), f"errors {error.tolist()}, allowed {band}"
    return {"error": float(error.max()), "error_allowed": band}


def in_turn(
    benchmark: Any, workers: dict[str, Worker], rounds: int, *, flops: int = 0,
    dtype: str = "bfloat16", prepare: Callable[[str], None] = lambda _: None,
) -> dict[str, Row]:  # fmt: skip
    """Run the workers in turn, the fixture timing the first; return what was measured of each.

    `times_first` is how often the first one's time another took, the median over the rounds.
    """
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    floors_ms: list[float] = []
    first, *others = workers

    def go(name: str) -> None:
        prepare(name)
        runs[name].append(workers[name].run())

    def setup() -> None:
        if rounds > 1:  # one is a rehearsal
            wait_for_quiet(limit_s=15)
        if flops:
            (found,) = ceilings("small" if rounds > 1 else "tiny", (dtype,))  # just now
            floors_ms.append(flops / float(found["product_gflop_per_s"]) / 1e6)
        for name in others:
            go(name)

    benchmark.pedantic(partial(go, first), setup=setup, rounds=rounds)
    found = {}
    for name, taken in runs.items():
        most = {key: max(run[key] for run in taken) for key in taken[0] if key != "s"}
        ratios = [run["s"] / ours["s"] for run, ours in zip(taken, runs[first], strict=True)]
        found[name] = row(
            {"provider": name}, [1e3 * run["s"] for run in taken], floors_ms, floor="products",
            flops=flops, times_first=statistics.median(ratios), **most,
        )  # fmt: skip
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The first shape in both dtypes, and the others, of which only the growth matters, in bf16."""
    if "shape" in metafunc.fixturenames:
        first, *others = SHAPES[metafunc.config.getoption("scale")]
        pairs = [(first, "float32"), *((shape, "bfloat16") for shape in (first, *others))]
        ids = [f"D{shape.hidden} L{shape.layers} {dtype}" for shape, dtype in pairs]
        metafunc.parametrize(("shape", "dtype"), pairs, ids=ids)


def reported(
    report: Callable[..., None], op: str, shape: Shape, tokens: int, rows: dict[str, Row],
    *, tables: int = 2, **fields: Any,
) -> None:  # fmt: skip
    """Put the rows of a job into the result file; tables is how many of (V, D) the model has."""
    params = shape.layers * shape.layer_params + tables * shape.head_params
    identity = {
        "op": op, "model": "", "dtype": "bfloat16", "computes": "entropy",
        "sizes": {"T": tokens, **shape.sizes, "params": params},
    }  # fmt: skip
    for found in rows.values():
        report({**identity, **found, **fields})


@pytest.mark.timeout(1800)
def test_score(
    shape: Shape, dtype: str, benchmark: Any, scale: str, report: Callable[..., None],
    tmp_path: Path,
) -> None:  # fmt: skip
    seq_len = SEQ_LEN[scale]
    files = {name: tmp_path / f"{i}.safetensors" for i, name in enumerate(PROVIDERS)}
    arguments = {
        name: {"provider": name, "shape": vars(shape), "dtype": dtype, "seq_len": seq_len,
               "out": str(file)}
        for name, file in files.items()
    }  # fmt: skip
    tokens = SAMPLES * seq_len
    with started("bench_scoring", "score_model", arguments) as workers:
        ours, reference = (load_file(file)["l1"] for file in files.values())
        errors = check(ours, reference, dtype, shape, (SAMPLES, seq_len))
        flops = shape.needed_flops(tokens)
        rows = in_turn(benchmark, workers, ROUNDS[scale], flops=flops, dtype=dtype)
    fields = {"dtype": dtype, **errors}
    fields |= {"sweep": "model"} if dtype == "bfloat16" else {}
    reported(report, "score", shape, tokens, rows, **fields)


@pytest.mark.skipif("HFPRUNE_LARGE" not in os.environ, reason="minutes, 5 GB: HFPRUNE_LARGE=1")
@pytest.mark.timeout(7200)
def test_score_from_disk(
    benchmark: Any, scale: str, report: Callable[..., None], checkpoint_folder: Path
) -> None:
    layers = max(2, (LARGE_BYTES - 4 * LARGE.head_params) // (2 * LARGE.layer_params))
    folder, seq_len = checkpoint_folder / "model", SEQ_LEN[scale]
    folder.mkdir()
    write_checkpoint(folder, LARGE, most_layers=layers)
    tables = {each: checkpoint_folder / f"{each}.safetensors" for each in ("none", "disk")}
    arguments = {
        f"ours, offload={each}": {"folder": str(folder), "offload": each, "seq_len": seq_len,
                                  "out": str(file)}
        for each, file in tables.items()
    }  # fmt: skip
    shape, tokens = replace(LARGE, layers=layers), LARGE_SAMPLES * seq_len
    with started("bench_scoring", "score_folder", arguments) as workers:
        rows = in_turn(
            benchmark, workers, 2, flops=shape.needed_flops(tokens),
            prepare=lambda _: into_page_cache(folder),
        )  # fmt: skip
    resident, streamed = (hf.ImportanceTable.load(file) for file in tables.values())
    for name in ("l1", "l2", "mask", "act", "down_norm"):
        assert torch.equal(getattr(streamed, name), getattr(resident, name)), name
    reported(report, "score", shape, tokens, rows, error=0.0, error_allowed=0.0)
