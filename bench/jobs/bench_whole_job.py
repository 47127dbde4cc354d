"""From a model on disk to a pruned checkpoint on disk, beside the reference's way: time and memory.

    .venv/bin/pytest bench/jobs/bench_whole_job.py --small

Both take the same windows of token ids and remove a fifth of the neurons of a random model of
Qwen3-0.6B's widths, each in a process of its own, in turn, with the source in the page cache and
the output synced to the disk. What both kept is compared: the scores lie apart by rounding alone
(the reference's products and totals are bf16), so neurons near the cut change sides.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hfprune_job
import pytest
import torch
from bench_scoring import SEQ_LEN, check, in_turn
from models import Shape, into_page_cache, random_ids, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from workers import started

import hfprune_fast as hf

WARM_UP = Shape(32, 48, 2, 4, 2, 500, tied=True)
SHAPES = {
    "full": Shape(1024, 3072, 28, 16, 8, 151936, tied=True),
    "small": Shape(1024, 3072, 8, 16, 8, 151936, tied=True),  # 8 of the 28 layers
    "tiny": WARM_UP,
}
ROUNDS = {"full": 5, "small": 2, "tiny": 1}
SAMPLES, RATIO = 2, 0.2


def ours(folder: Path, ids: Tensor, out: Path, prune_ratio: float) -> Tensor:
    table = hf.score(folder, ids, device="cpu")
    save_file({"scores": table.l1}, f"{out}.scores.safetensors")
    keep = hf.select(table, prune_ratio=prune_ratio)
    hf.prune_checkpoint(folder, out, keep)
    return torch.stack([keep[layer] for layer in sorted(keep)])


PROVIDERS = {"ours": ours, "HFPrune's arithmetic": hfprune_job.prune}


def prune_folder(
    provider: str, folder: str, warm_up: str, out: str, seq_len: int, vocab: int
) -> Callable[[], None]:
    """What a worker runs; it leaves the scores and which neurons were kept beside its output."""

    def run(source: str, ids: Tensor) -> None:
        keep = PROVIDERS[provider](Path(source), ids, Path(out), RATIO)
        save_file({"keep": keep.contiguous()}, f"{out}.keep.safetensors")
        os.sync()

    run(warm_up, random_ids(SAMPLES, 16, WARM_UP.vocab))
    return partial(run, folder, random_ids(SAMPLES, seq_len, vocab))


@pytest.mark.timeout(1800)
def test_whole_job(
    benchmark: object, scale: str, report: Callable[..., None], checkpoint_folder: Path
) -> None:
    shape, seq_len = SHAPES[scale], SEQ_LEN[scale]
    folder, warm_up = checkpoint_folder / "model", checkpoint_folder / "small"
    for path, each in ((folder, shape), (warm_up, WARM_UP)):
        write_checkpoint(path, each, each.layers)
    outs = {name: checkpoint_folder / f"out{i}" for i, name in enumerate(PROVIDERS)}
    arguments = {
        name: {"provider": name, "folder": str(folder), "warm_up": str(warm_up), "out": str(out),
               "seq_len": seq_len, "vocab": shape.vocab}
        for name, out in outs.items()
    }  # fmt: skip

    def prepare(name: str) -> None:
        shutil.rmtree(outs[name], ignore_errors=True)
        into_page_cache(folder)
        os.sync()

    with started("bench_whole_job", "prune_folder", arguments) as workers:
        rows = in_turn(
            benchmark, workers, ROUNDS[scale], shape, SAMPLES * seq_len, products=False,
            prepare=prepare, op="whole_job", dtype="bfloat16",
        )  # fmt: skip
    scores, kept = (
        [load_file(f"{out}.{what}.safetensors")[what] for out in outs.values()]
        for what in ("scores", "keep")
    )
    errors = check(*scores, "bfloat16", shape, (SAMPLES, seq_len))
    sizes = [sum(f.stat().st_size for f in out.glob("*.safetensors")) for out in outs.values()]
    assert abs(sizes[0] / sizes[1] - 1) < 0.01, "the pruned checkpoints differ in size"
    common = torch.stack([torch.isin(a, b) for a, b in zip(*kept, strict=True)])
    errors["kept_overlap"] = float(common.double().mean())
    for row in rows:
        report({**row, **errors})
