"""Time the compaction of weights beside numpy, torch and memcpy, and that of checkpoints beside cp.

    .venv/bin/pytest bench/bench_compaction.py --benchmark-json=X.json
    .venv/bin/python bench/bench_compaction.py X.json > X.md

Each round times the floor (a memcpy of the kept bytes; cp of the pruned files) and then the
provider, each after the same preparation, so that a ratio compares neighbours in time.
HFPRUNE_BENCH_BYTES is the size of the checkpoint.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import hfprune_fast
from hfprune_fast import native

Call = Callable[[], Any]
THREADS, ROUNDS, CHECKPOINT_ROUNDS, KEPT = 2, 15, 5, 0.8
# {operation: (function, axis, shape)}, of Llama-3.1-8B's gate_proj and down_proj.
OPERATIONS = {
    "compact_rows": (native.compact_rows, 0, (14336, 4096)),
    "compact_columns": (native.compact_columns, 1, (4096, 14336)),
}
CHECKPOINT_BYTES = int(os.environ.get("HFPRUNE_BENCH_BYTES", 2_000_000_000))
SHARD_BYTES = 500_000_000
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
    "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 32000, "head_dim": 64,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
D, F, V, KV = 2048, 8192, 32000, 512
LAYER = {
    "self_attn.q_proj": (D, D), "self_attn.k_proj": (KV, D), "self_attn.v_proj": (KV, D),
    "self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F), "input_layernorm": (D,), "post_attention_layernorm": (D,),
}  # fmt: skip
OTHERS = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D)}

torch.set_num_threads(THREADS)
# A thread a core: the scheduler often wakes both on the same one, where they take twice as long.
_pools = [
    ThreadPoolExecutor(1, initializer=os.sched_setaffinity, initargs=(0, {core}))
    for core in sorted(os.sched_getaffinity(0))[:THREADS]
]
_memcpy = ctypes.CDLL(None).memcpy  # a call through ctypes releases the GIL
_memcpy.argtypes, _memcpy.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), None


def memcpy(out: Tensor, source: Tensor, threads: int = THREADS) -> Tensor:
    """Copy contiguous bytes, each thread a part of them."""
    parts = (tensor.view(-1).chunk(threads) for tensor in (out, source))
    copies = [
        pool.submit(_memcpy, to.data_ptr(), part.data_ptr(), part.nbytes)
        for pool, to, part in zip(_pools, *parts, strict=False)
    ]
    assert [copy.result() for copy in copies] == [None] * threads
    return out


def random_keep(size: int, seed: int) -> Tensor:
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order[: int(KEPT * size)].sort().values


def uniform(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-1, 1)


def alternate(benchmark: Any, call: Call, floor: Call, prepare: Call, rounds: int) -> None:
    """Time prepare(), floor(), prepare(), call() for some rounds; all but call() is its setup."""
    floor_s = []

    def setup() -> None:
        prepare()
        begin = time.perf_counter()
        floor()
        floor_s.append(time.perf_counter() - begin)
        prepare()

    benchmark.pedantic(call, setup=setup, rounds=rounds, warmup_rounds=1)
    call_s, info = benchmark.stats.stats.data, benchmark.extra_info
    ratios = [a / b for a, b in zip(call_s, floor_s[1:], strict=True)]
    ms, floor_ms = (1e3 * statistics.median(times) for times in (call_s, floor_s[1:]))
    name, info["op"] = info["floor"], benchmark.group
    info |= {"ms": ms, f"{name}_ms": floor_ms, f"ratio_to_{name}": ms / floor_ms}
    info[f"ratio_to_{name}_pairwise"] = statistics.median(ratios)
    # What any provider must move: each kept byte is read once and written once.
    info["gb_per_s"] = 2 * info["bytes_kept"] / ms / 1e6
    # Minima far below the medians, or a load above 1 or so, tell that others used the machine.
    info |= {f"{name}_min_ms": 1e3 * min(floor_s[1:]), "load": os.getloadavg()[0]}
    versions = f"torch {torch.__version__}, numpy {np.__version__}, {THREADS} threads"
    info["versions"] = f"{versions}, {native.description()}"


class Weight:
    """A weight, what is kept of it, and buffers whose pages have all been touched."""

    def __init__(self, op: str) -> None:
        self.compact, self.axis, shape = OPERATIONS[op]
        self.pristine = uniform(shape)
        self.keep = random_keep(shape[self.axis], seed=0)
        self.want = self.pristine.index_select(self.axis, self.keep)
        self.weight, self.out = self.pristine.clone(), self.want.clone()
        self.weight_np, self.out_np = (t.view(torch.int16).numpy() for t in (self.weight, self.out))
        self.mask_np = np.isin(np.arange(shape[self.axis]), self.keep)
        self.scratch = torch.zeros(1 << 27, dtype=torch.int8)

    def prepare(self) -> None:
        """Undo a call in place, and leave none of it in the caches."""
        self.weight.copy_(self.pristine)
        self.scratch.add_(1)
        time.sleep(0.03)  # torch's threads wait for more by spinning, on a core of the next call


PROVIDERS: dict[str, Callable[[Weight], Any]] = {
    "memcpy, 2 threads": lambda w: memcpy(w.out, w.want),
    "memcpy, 1 thread": lambda w: memcpy(w.out, w.want, threads=1),
    "ours, in place": lambda w: w.compact(w.weight, w.keep),
    "ours, out=": lambda w: w.compact(w.weight, w.keep, out=w.out),
    "index_select": lambda w: torch.index_select(w.weight, w.axis, w.keep),
    "index_select, out=": lambda w: torch.index_select(w.weight, w.axis, w.keep, out=w.out),
    # With its default mode, "raise", take() makes a copy of out.
    "numpy.take, out=": lambda w: np.take(w.weight_np, w.keep, w.axis, w.out_np, mode="clip"),
    "numpy.compress, out=": lambda w: np.compress(w.mask_np, w.weight_np, w.axis, w.out_np),
}


@pytest.fixture(scope="module", params=OPERATIONS)
def weight(request: pytest.FixtureRequest) -> Weight:
    return Weight(request.param)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_compact(benchmark: Any, weight: Weight, provider: str) -> None:
    call, floor = partial(PROVIDERS[provider], weight), partial(memcpy, weight.out, weight.want)
    weight.prepare()
    weight.out.fill_(torch.nan)
    got = torch.as_tensor(call()).view(torch.int16)
    assert torch.equal(got, weight.want.view(torch.int16))
    benchmark.group, kept_bytes = weight.compact.__name__, weight.want.nbytes
    benchmark.extra_info |= {"provider": provider, "floor": "memcpy", "bytes_kept": kept_bytes}
    alternate(benchmark, call, floor, weight.prepare, ROUNDS)


def write_checkpoint(folder: Path) -> int:
    """Write a Llama of about CHECKPOINT_BYTES in shards; returns its number of layers."""
    others, layer = (2 * sum(map(math.prod, shapes.values())) for shapes in (OTHERS, LAYER))
    layers = max(1, (CHECKPOINT_BYTES - others) // layer)
    shards: list[dict[str, tuple[int, ...]]] = [dict(OTHERS)]
    for i in range(layers):
        if i % (SHARD_BYTES // layer) == 0:
            shards.append({})
        shards[-1] |= {f"model.layers.{i}.{name}": shape for name, shape in LAYER.items()}
    folder.mkdir()
    weight_map = {}
    for i, shapes in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {f"{name}.weight": uniform(shape) for name, shape in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": others + layers * layer}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": layers}))
    return layers


def check_pruned(source: Path, pruned: Path, keep: dict[int, Tensor]) -> None:
    """Every tensor is index_select of the source's, byte for byte."""
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as dense, safe_open(pruned / path.name, "pt") as cut:
            assert set(dense.keys()) == set(cut.keys())
            for name in dense.keys():  # noqa: SIM118 - safe_open is no mapping
                want = dense.get_tensor(name)
                if ".mlp." in name:
                    kept = keep[int(name.split(".")[2])]
                    want = want.index_select(int("down_proj" in name), kept)
                assert torch.equal(*(t.view(torch.int16) for t in (cut.get_tensor(name), want)))


@pytest.mark.timeout(1800)
def test_prune_checkpoint(benchmark: Any, tmp_path: Path, request: Any) -> None:
    request.addfinalizer(partial(shutil.rmtree, tmp_path))  # pytest would keep these gigabytes
    source, pruned, out, copy = (tmp_path / name for name in ("source", "pruned", "out", "copy"))
    layers = write_checkpoint(source)
    keep = {layer: random_keep(F, seed=layer) for layer in range(layers)}
    hfprune_fast.prune_checkpoint(source, pruned, keep)
    check_pruned(source, pruned, keep)

    def prepare() -> None:
        for target in (out, copy):
            shutil.rmtree(target, ignore_errors=True)
        for path in (*source.iterdir(), *pruned.iterdir()):
            path.read_bytes()  # into the page cache again
        os.sync()

    def prune() -> None:
        hfprune_fast.prune_checkpoint(source, out, keep)
        os.sync()

    copy_files = ["sh", "-c", 'cp -r "$0" "$1" && sync', pruned, copy]
    floor = partial(subprocess.run, copy_files, check=True)
    benchmark.group = "prune_checkpoint"
    kept_bytes = sum(path.stat().st_size for path in pruned.iterdir())
    benchmark.extra_info |= {"provider": "ours", "floor": "cp", "bytes_kept": kept_bytes}
    alternate(benchmark, prune, floor, prepare, CHECKPOINT_ROUNDS)


def table(result: dict[str, Any]) -> str:
    """A benchmark's JSON as Markdown."""
    machine, cpu = result["machine_info"], result["machine_info"]["cpu"]
    infos = [bench["extra_info"] for bench in result["benchmarks"]]
    lines = [
        f"{result['datetime'][:10]}, {cpu.get('brand_raw', '?')}, {cpu['count']} cores, "
        f"{machine['system']}, Python {machine['python_version']}, {infos[0]['versions']}. "
        "GB/s counts each kept byte as read once and written once.\n",
        "| op | provider | bytes kept | ms | GB/s | floor ms | ratio to floor | pairwise |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for info in infos:
        floor = info["floor"]
        keys = f"ms gb_per_s {floor}_ms ratio_to_{floor} ratio_to_{floor}_pairwise".split()
        cells = " | ".join(f"{info[key]:.2f}" for key in keys)
        lines.append(f"| {info['op']} | {info['provider']} | {info['bytes_kept']} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table(json.loads(Path(sys.argv[1]).read_text())))
