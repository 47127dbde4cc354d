"""Scoring of whole models beside the reference implementation's arithmetic: time and memory.

    .venv/bin/pytest bench/jobs/bench_scoring.py --small
    HFPRUNE_LARGE=1 .venv/bin/pytest bench/jobs/bench_scoring.py -k from_disk

Providers work in processes of their own and in turn, so that a ratio compares neighbours in time.
The second command writes a checkpoint of 5 GB (HFPRUNE_LARGE_BYTES) and scores it resident and
streamed, with its files in the page cache. The floor is the job's products at the rate that a large
one had in the same round.
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
from models import Shape, into_page_cache, random_ids, random_model, score_band, write_checkpoint
from records import Row, row
from safetensors.torch import load_file, save_file
from torch import Tensor
from workers import Worker, started

import hfprune_fast as hf

SEQ_LEN = {"full": 1024, "small": 1024, "tiny": 16}
ROUNDS = {"full": 5, "small": 3, "tiny": 1}
SHAPE, TINY = Shape(512, 1536, 8, 8, 4, 128256), Shape(32, 48, 2, 4, 2, 500)
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
    model, small = (random_model(each, getattr(torch, dtype)) for each in made)
    score(small, random_ids(1, 64, WARM_UP.vocab))
    ids = random_ids(SAMPLES, seq_len, made[0].vocab)
    save_file({"l1": score(model, ids)}, out)
    return partial(score, model, ids)


def score_folder(folder: str, offload: str, seq_len: int, out: str) -> Any:
    """The same of a folder, whose weights are in no one's memory before."""
    hf.score(random_model(WARM_UP), random_ids(1, 64, WARM_UP.vocab))
    ids = random_ids(LARGE_SAMPLES, seq_len, LARGE.vocab)
    return lambda: hf.score(folder, ids, batch_size=1, device="cpu", offload=offload).save(out)


def check(
    ours: Tensor, reference: Tensor, dtype: str, shape: Shape, ids_shape: tuple[int, int]
) -> dict[str, float]:
    """Compare each layer's scores, by the norm of the difference, with what rounding explains."""
    error = torch.linalg.vector_norm(ours - reference.double(), dim=1) / ours.norm(dim=1)
    band = score_band(dtype, shape, *ids_shape)
    assert bool((error < band).all()), f"errors {error.tolist()}, allowed {band}"
    return {"error": float(error.max()), "error_allowed": band}


def in_turn(
    benchmark: Any, workers: dict[str, Worker], rounds: int, shape: Shape, tokens: int, *,
    products: bool = True, prepare: Callable[[str], None] = lambda _: None, **fields: Any,
) -> list[Row]:  # fmt: skip
    """Run the workers in turn, the fixture timing the first; return a row of each.

    `times_first` is how often the first one's time another took, the median over the rounds. Fields
    are those of all rows: `op`, `dtype` and others.
    """
    flops = shape.needed_flops(tokens) if products else 0
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    floors_ms: list[float] = []
    first, *others = workers

    def go(name: str) -> None:
        prepare(name)
        runs[name].append(workers[name].run())

    def setup() -> None:
        if flops:
            (found,) = ceilings("small" if rounds > 1 else "tiny", (fields["dtype"],))  # just now
            floors_ms.append(flops / float(found["product_gflop_per_s"]) / 1e6)
        for name in others:
            go(name)

    benchmark.pedantic(partial(go, first), setup=setup, rounds=rounds)
    params = shape.layers * shape.layer_params + (1 if shape.tied else 2) * shape.head_params
    identity = {"model": "", "computes": "entropy", "sizes": {"T": tokens, **shape.sizes}}
    identity["sizes"] |= {"params": params}
    rows = []
    for name, taken in runs.items():
        most = {key: max(run[key] for run in taken) for key in taken[0] if key != "s"}
        ratios = [run["s"] / ours["s"] for run, ours in zip(taken, runs[first], strict=True)]
        rows.append(row(
            {**identity, "provider": name, **fields}, [1e3 * run["s"] for run in taken], floors_ms,
            floor="products", flops=flops, times_first=statistics.median(ratios), **most,
        ))  # fmt: skip
    return rows


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_score(
    dtype: str, benchmark: Any, scale: str, report: Callable[..., None], tmp_path: Path
) -> None:
    shape, seq_len = TINY if scale == "tiny" else SHAPE, SEQ_LEN[scale]
    files = {name: tmp_path / f"{i}.safetensors" for i, name in enumerate(PROVIDERS)}
    common = {"shape": vars(shape), "dtype": dtype, "seq_len": seq_len}
    arguments = {n: {**common, "provider": n, "out": str(file)} for n, file in files.items()}
    with started("bench_scoring", "score_model", arguments) as workers:
        ours, reference = (load_file(file)["l1"] for file in files.values())
        errors = check(ours, reference, dtype, shape, (SAMPLES, seq_len))
        rows = in_turn(
            benchmark, workers, ROUNDS[scale], shape, SAMPLES * seq_len, op="score", dtype=dtype,
            **errors,
        )  # fmt: skip
    list(map(report, rows))


@pytest.mark.skipif("HFPRUNE_LARGE" not in os.environ, reason="minutes, 5 GB: HFPRUNE_LARGE=1")
@pytest.mark.timeout(7200)
def test_score_from_disk(
    benchmark: Any, scale: str, report: Callable[..., None], checkpoint_folder: Path
) -> None:
    layers = max(2, (LARGE_BYTES - 4 * LARGE.head_params) // (2 * LARGE.layer_params))
    folder, seq_len = checkpoint_folder / "model", SEQ_LEN[scale]
    write_checkpoint(folder, LARGE, layers)
    tables = {each: checkpoint_folder / f"{each}.safetensors" for each in ("none", "disk")}
    common = {"folder": str(folder), "seq_len": seq_len}
    arguments = {
        f"ours, offload={each}": {**common, "offload": each, "out": str(file)}
        for each, file in tables.items()
    }
    with started("bench_scoring", "score_folder", arguments) as workers:
        rows = in_turn(
            benchmark, workers, 2, replace(LARGE, layers=layers), LARGE_SAMPLES * seq_len,
            prepare=lambda _: into_page_cache(folder), op="score", dtype="bfloat16", error=0.0,
            error_allowed=0.0,
        )  # fmt: skip
    resident, streamed = (hf.ImportanceTable.load(file).statistics for file in tables.values())
    assert resident.keys() == streamed.keys()
    assert all(torch.equal(streamed[name], resident[name]) for name in resident)
    list(map(report, rows))
