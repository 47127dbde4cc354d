"""Scoring, and the job from folder to pruned folder, beside the paper's arithmetic.

    .venv/bin/pytest bench/jobs/bench_jobs.py --small
    HFPRUNE_LARGE=1 .venv/bin/pytest bench/jobs/bench_jobs.py -k from_disk

Providers work in processes of their own and in turn, so that a ratio compares neighbours in time.
`score_beside_another` is `score` while another process keeps a core busy.
The second command writes a checkpoint of 5 GB (HFPRUNE_LARGE_BYTES) and scores it resident and
streamed, with its files in the page cache. The floor of scoring is the job's products at the rate
that a large one had in the same round.

The whole job removes a fifth of the neurons of a random model of Qwen3-0.6B's widths, its output
synced to the disk. What both providers kept is compared: the scores lie apart by rounding alone
(the reference computes in bf16, or fp32 on a CPU that has no bf16), so neurons near the cut change
sides.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    checked_scores,
    into_page_cache,
    random_ids,
    random_model,
    write_checkpoint,
)
from records import Row, row
from safetensors.torch import load_file, save_file
from shapes import product_dtypes
from torch import Tensor
from workers import Run, started

import hfprune_fast as hf

SEQ_LEN = {"full": 1024, "small": 1024, "tiny": 16}
ROUNDS = {"full": 5, "small": 3, "tiny": 1}
JOB_ROUNDS = {"full": 5, "small": 2, "tiny": 1}
SHAPE, TINY = Shape(512, 1536, 8, 8, 4, 128256), Shape(32, 48, 2, 4, 2, 500)
WARM_UP = Shape(64, 96, 8, 8, 4, 512)
JOB_WARM_UP = Shape(32, 48, 2, 4, 2, 500, tied=True)
JOB_SHAPES = {
    "full": Shape(1024, 3072, 28, 16, 8, 151936, tied=True),
    "small": Shape(1024, 3072, 4, 16, 8, 151936, tied=True),  # 4 of the 28 layers
    "tiny": JOB_WARM_UP,
}
LARGE = Shape(2048, 8192, 0, 32, 8, 128256)
LARGE_BYTES = int(os.environ.get("HFPRUNE_LARGE_BYTES", 5_000_000_000))
SAMPLES, JOB_SAMPLES, LARGE_SAMPLES = 1, 1, 4
PRUNE_RATIO = 0.2
# What the whole job computes in, from a bf16 checkpoint: ours chooses it.
JOB_DTYPE = product_dtypes()[0]


def prune(folder: Path, ids: Tensor, out: Path, prune_ratio: float) -> tuple[Tensor, Tensor]:
    table = hf.score(folder, ids, device="cpu")
    keep = hf.select(table, prune_ratio=prune_ratio, round_to=1)
    hf.prune_checkpoint(folder, out, keep)
    return table.l1, torch.stack([keep[layer] for layer in sorted(keep)])


PROVIDERS = {
    "ours": (lambda model, ids: hf.score(model, ids).l1, prune),
    "HFPrune's arithmetic": (
        hfprune_reference.score,
        partial(hfprune_reference.prune, dtype=getattr(torch, JOB_DTYPE)),
    ),
}


def score_model(provider: str, shape: Shape, dtype: str, seq_len: int, out: Path) -> Any:
    """What a worker runs: the scores of a model in memory, written to out once they are made."""
    score, _ = PROVIDERS[provider]
    model, small = (random_model(each, getattr(torch, dtype)) for each in (shape, WARM_UP))
    score(small, random_ids(1, 64, WARM_UP.vocab))
    ids = random_ids(SAMPLES, seq_len, shape.vocab)
    save_file({"l1": score(model, ids)}, out)
    return partial(score, model, ids)


def score_folder(folder: Path, offload: str, seq_len: int, out: Path) -> Any:
    """The same of a folder, whose weights are in no one's memory before."""
    hf.score(random_model(WARM_UP), random_ids(1, 64, WARM_UP.vocab))
    ids = random_ids(LARGE_SAMPLES, seq_len, LARGE.vocab)
    return lambda: hf.score(folder, ids, batch_size=1, device="cpu", offload=offload).save(out)


def prune_folder(
    provider: str, folder: Path, warm_up: Path, out: Path, seq_len: int, vocab: int
) -> Any:
    """The whole job; it leaves the scores and which neurons were kept beside its output."""

    def run(source: Path, ids: Tensor) -> None:
        scores, keep = PROVIDERS[provider][1](source, ids, out, PRUNE_RATIO)
        save_file({"scores": scores, "keep": keep}, f"{out}.safetensors")
        os.sync()

    run(warm_up, random_ids(JOB_SAMPLES, 16, JOB_WARM_UP.vocab))
    return partial(run, folder, random_ids(JOB_SAMPLES, seq_len, vocab))


def in_turn(
    workers: dict[str, Run], rounds: int, shape: Shape, tokens: int, *, products: bool = True,
    prepare: Callable[[str], None] = lambda _: None, **fields: Any,
) -> list[Row]:  # fmt: skip
    """Run the workers in turn, the first one last; return a row of each.

    `times_first` is how often the first one's time another took, the median over the rounds. Fields
    are those of all rows: `op`, `dtype` and others.
    """
    flops = shape.needed_flops(tokens) if products else 0
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    floors_ms: list[float] = []
    first, *others = workers
    for _ in range(rounds):
        if flops:
            (found,) = ceilings("small" if rounds > 1 else "tiny", (fields["dtype"],))  # just now
            floors_ms.append(flops / float(found["product_gflop_per_s"]) / 1e6)
        for name in (*others, first):
            prepare(name)
            runs[name].append(workers[name]())
    params = shape.layers * shape.layer_params + (1 if shape.tied else 2) * shape.head_params
    sizes = {"T": tokens, **shape.sizes, "params": params}
    rows = []
    for name, taken in runs.items():
        identity = {"model": "", "computes": "entropy", "sizes": sizes, "provider": name, **fields}
        most = {key: max(run[key] for run in taken) for key in taken[0] if key != "s"}
        ratios = [run["s"] / ours["s"] for run, ours in zip(taken, runs[first], strict=True)]
        rows.append(row(
            identity, [1e3 * run["s"] for run in taken], floors_ms, floor="products", flops=flops,
            times_first=statistics.median(ratios), **most,
        ))  # fmt: skip
    return rows


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Keep one core busy with another process."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_score(dtype: str, scale: str, report: Callable[..., None], tmp_path: Path) -> None:
    shape, seq_len = TINY if scale == "tiny" else SHAPE, SEQ_LEN[scale]
    if scale == "small" and dtype not in product_dtypes():
        pytest.skip(f"this CPU has no instructions for products in {dtype}")
    files = {name: tmp_path / f"{i}.safetensors" for i, name in enumerate(PROVIDERS)}
    common = {"shape": shape, "dtype": dtype, "seq_len": seq_len}
    arguments = {n: {**common, "provider": n, "out": file} for n, file in files.items()}
    with started("bench_jobs:score_model", arguments) as workers:
        scores = [load_file(file)["l1"] for file in files.values()]
        errors = checked_scores("ours", *scores, shape, SAMPLES, seq_len, dtype)
        measure = partial(in_turn, workers, shape=shape, tokens=SAMPLES * seq_len, dtype=dtype)
        rows = measure(ROUNDS[scale], op="score", **errors)
        with busy_neighbour():
            rows += measure(JOB_ROUNDS[scale], op="score_beside_another", **errors)
    list(map(report, rows))


@pytest.mark.skipif("HFPRUNE_LARGE" not in os.environ, reason="minutes, 5 GB: HFPRUNE_LARGE=1")
@pytest.mark.timeout(7200)
def test_score_from_disk(scale: str, report: Callable[..., None], checkpoint_folder: Path) -> None:
    layers = max(2, (LARGE_BYTES - 4 * LARGE.head_params) // (2 * LARGE.layer_params))
    folder, seq_len = checkpoint_folder / "model", SEQ_LEN[scale]
    write_checkpoint(folder, LARGE, layers)
    tables = {each: checkpoint_folder / f"{each}.safetensors" for each in ("none", "disk")}
    arguments = {
        f"ours, offload={each}": {"folder": folder, "seq_len": seq_len, "offload": each, "out": out}
        for each, out in tables.items()
    }
    with started("bench_jobs:score_folder", arguments) as workers:
        rows = in_turn(
            workers, 2, replace(LARGE, layers=layers), LARGE_SAMPLES * seq_len, op="score",
            dtype="bfloat16", prepare=lambda _: into_page_cache(folder), error=0.0,
            error_allowed=0.0,
        )  # fmt: skip
    resident, streamed = (hf.ImportanceTable.load(file).statistics for file in tables.values())
    assert resident.keys() == streamed.keys()
    assert all(torch.equal(streamed[name], resident[name]) for name in resident)
    list(map(report, rows))


@pytest.mark.timeout(1800)
def test_whole_job(scale: str, report: Callable[..., None], checkpoint_folder: Path) -> None:
    shape, seq_len = JOB_SHAPES[scale], SEQ_LEN[scale]
    folder, warm_up = checkpoint_folder / "model", checkpoint_folder / "small"
    for path, each in ((folder, shape), (warm_up, JOB_WARM_UP)):
        write_checkpoint(path, each, each.layers)
    outs = {name: checkpoint_folder / f"out{i}" for i, name in enumerate(PROVIDERS)}
    common = {"folder": folder, "warm_up": warm_up, "seq_len": seq_len, "vocab": shape.vocab}
    arguments = {name: {**common, "provider": name, "out": out} for name, out in outs.items()}

    def prepare(name: str) -> None:
        shutil.rmtree(outs[name], ignore_errors=True)
        into_page_cache(folder)
        os.sync()

    with started("bench_jobs:prune_folder", arguments) as workers:
        rows = in_turn(
            workers, JOB_ROUNDS[scale], shape, JOB_SAMPLES * seq_len, op="whole_job",
            dtype="bfloat16", products=False, prepare=prepare,
        )  # fmt: skip
    found = [load_file(f"{out}.safetensors") for out in outs.values()]
    scores, kept = ([each[what] for each in found] for what in ("scores", "keep"))
    errors = checked_scores("ours", *scores, shape, JOB_SAMPLES, seq_len, JOB_DTYPE)
    sizes = [sum(f.stat().st_size for f in out.glob("*.safetensors")) for out in outs.values()]
    assert abs(sizes[0] / sizes[1] - 1) < 0.01, "the pruned checkpoints differ in size"
    common_neurons = torch.stack([torch.isin(a, b) for a, b in zip(*kept, strict=True)])
    errors["kept_overlap"] = float(common_neurons.double().mean())
    for each in rows:
        report({**each, **errors})
