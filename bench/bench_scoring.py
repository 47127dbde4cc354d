"""Time scoring beside the reference implementation, and measure the memory that each takes.

    .venv/bin/pytest bench/bench_scoring.py --benchmark-json=X.json
    HFPRUNE_LARGE=1 .venv/bin/pytest bench/bench_scoring.py -k from_disk --benchmark-json=Y.json
    .venv/bin/python bench/bench_scoring.py X.json Y.json > X.md

Each round times the other provider and then the provider, so that a ratio compares neighbours in
time. A round waits until the machine is quiet, and one in which other processes took a tenth of a
core all the same does not count, unless all are so (column "others" tells; the fixture's own table
counts all). The second command writes a checkpoint of 5 GB and scores it resident and streamed,
with its files in the page cache. HFPRUNE_BENCH_VOCAB and HFPRUNE_BENCH_BYTES are the sizes, for
rehearsals.

Extra memory is measured, not computed: a thread reads RssAnon, the process's anonymous memory that
is in RAM, every 2 ms, in a process of its own for each provider, so that none works in what another
left to the allocator. The baseline is taken when everything is imported, a small model has been
scored by the same provider, so that libraries hold their buffers, and free memory has gone back to
the system; for a loaded model after its weights are there, for a folder before. Weights that are
mapped from a file are not anonymous: RssFile, read by the same thread, shows them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import hfprune_fast as hf
from hfprune_fast import native
from hfprune_fast.importance import STATISTICS

sys.path.insert(0, str(Path(__file__).parent))  # pytest does not, with its importlib mode
from baselines import hfprune_reference
from process_meters import QUIET_CORES, Others, PeakMemory, wait_for_quiet

Call = Callable[[], Any]
THREADS, ROUNDS, LARGE_ROUNDS, SEQ_LEN = 2, 3, 2, 1024
SAMPLES, LARGE_SAMPLES = 2, 4
VOCAB = int(os.environ.get("HFPRUNE_BENCH_VOCAB", 128256))
LARGE_BYTES = int(os.environ.get("HFPRUNE_BENCH_BYTES", 5_000_000_000))
DTYPES = ("float32", "bfloat16")
RESIDENT = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": VOCAB,
}  # fmt: skip
LARGE = {
    "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": VOCAB,
}  # fmt: skip
WARM_UP = RESIDENT | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 512}

torch.set_num_threads(THREADS)

PROVIDERS: dict[str, Callable[[PreTrainedModel, Tensor], Tensor]] = {
    "ours": lambda model, ids: hf.score(model, ids).l1,
    "reference": hfprune_reference.score,
}


def config_of(sizes: dict[str, int]) -> LlamaConfig:
    return LlamaConfig(tie_word_embeddings=False, max_position_embeddings=2 * SEQ_LEN, **sizes)


def fill(name: str, tensor: Tensor) -> Tensor:
    """Random weights: products keep their size, and logits of about 2.5 make some p stand out."""
    if tensor.ndim == 1:
        return tensor.fill_(1)
    gain = 2.5 if "lm_head" in name else 1.2
    return tensor.normal_(std=gain / math.sqrt(tensor.shape[1]))


def random_model(sizes: dict[str, int], dtype: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_of(sizes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        fill(name, parameter)
    return model


def random_ids(samples: int, seq_len: int, vocab: int) -> Tensor:
    return torch.randint(vocab, (samples, seq_len), generator=torch.Generator().manual_seed(1))


def needed_flops(model: PreTrainedModel, tokens: int) -> int:
    """What any provider needs: 2 FLOPs a token for each weight of a linear layer forward, and 2 for
    the gradient at the layer's input where a down_proj lies below it. Attention's two products and
    the reference's weight gradients are not counted.
    """
    linear = {n: m.weight.numel() for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    first = sum(size for n, size in linear.items() if ".layers.0." in n and "down_proj" not in n)
    return tokens * (4 * sum(linear.values()) - 2 * first)


def measure(provider: str, dtype: str, folder: str | None, out: str | None) -> dict[str, float]:
    """Run in a process of its own; provider is one of PROVIDERS or, for a folder, its offload."""
    score = PROVIDERS.get(provider, PROVIDERS["ours"])
    score(random_model(WARM_UP, dtype), random_ids(1, 64, WARM_UP["vocab_size"]))
    if folder is None:
        score = partial(score, random_model(RESIDENT, dtype), random_ids(SAMPLES, SEQ_LEN, VOCAB))
    else:
        ids = random_ids(LARGE_SAMPLES, SEQ_LEN, VOCAB)
        score = partial(hf.score, folder, ids, batch_size=1, device="cpu", offload=provider)
    with Others() as others, PeakMemory() as memory:
        begin = time.perf_counter()
        table = score()
        seconds = time.perf_counter() - begin
    if out is not None:
        table.save(out)
    return {
        "s": seconds, "extra_bytes": memory.anon_bytes, "mapped_bytes": memory.file_bytes,
        "others_cores": others.cores,
    }  # fmt: skip


def in_a_process(*case: str | None) -> dict[str, float]:
    command = [sys.executable, __file__, "measure", json.dumps(case)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


@cache
def memory_of(provider: str, dtype: str) -> dict[str, float]:
    run = in_a_process(provider, dtype, None, None)
    return {key: run[key] for key in ("extra_bytes", "mapped_bytes")}


class Job(NamedTuple):
    """A model, its data, and calls that have been made once and agree."""

    dtype: str
    calls: dict[str, Call]
    flops: int


@pytest.fixture(scope="module", params=DTYPES)
def job(request: pytest.FixtureRequest) -> Job:
    dtype = request.param
    model, ids = random_model(RESIDENT, dtype), random_ids(SAMPLES, SEQ_LEN, VOCAB)
    calls = {name: partial(provider, model, ids) for name, provider in PROVIDERS.items()}
    check(calls["ours"](), calls["reference"](), dtype)
    return Job(dtype, calls, needed_flops(model, ids.numel()))


def check(ours: Tensor, reference: Tensor, dtype: str) -> None:
    """Compare the scores of each layer, by the norm of their difference, to what rounding explains.

    With u half of eps: the reference rounds each product, each sum over the tokens and each of
    SAMPLES totals, which ours does not: SAMPLES + 2. The forward pass is the same. Each gradient
    went through the roundings of some 14 products a layer, of either sign, which the sum over the
    tokens averages: sqrt(14 · 8 / SEQ_LEN) = 0.3 on either side, together less than 1. And both
    compute log p + H, of order 1, in fp32 from two terms of about ln V: 2 ln V of fp32's u each.
    """
    error = torch.linalg.vector_norm(ours - reference.double(), dim=1) / ours.norm(dim=1)
    u, u_fp32 = (torch.finfo(d).eps / 2 for d in (getattr(torch, dtype), torch.float32))
    band = (SAMPLES + 3) * u + 4 * math.log(VOCAB) * u_fp32
    assert bool((error < band).all()), f"errors {error.tolist()}, allowed {band}"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_score(benchmark: Any, job: Job, provider: str) -> None:
    (other,) = PROVIDERS.keys() - {provider}
    rounds: list[dict[str, tuple[float, float]]] = []

    def call(name: str) -> None:
        with Others() as others:
            begin = time.perf_counter()
            job.calls[name]()
            seconds = time.perf_counter() - begin
        rounds[-1][name] = seconds, others.cores

    def setup() -> None:
        wait_for_quiet()
        rounds.append({})
        call(other)

    benchmark.pedantic(partial(call, provider), setup=setup, rounds=ROUNDS)
    taken = [max(cores for _, cores in pair.values()) for pair in rounds]
    quiet = [i for i in range(ROUNDS) if taken[i] < QUIET_CORES] or range(ROUNDS)
    seconds = {name: [rounds[i][name][0] for i in quiet] for name in PROVIDERS}
    memory = {name: memory_of(name, job.dtype) for name in PROVIDERS}
    benchmark.group = f"score {job.dtype}"
    median_s = statistics.median(seconds[provider])
    benchmark.extra_info |= {
        "op": "score", "dtype": job.dtype, "provider": provider,
        **speed(median_s, SAMPLES * SEQ_LEN, job.flops), **memory[provider],
        "ratio_of": "ours to reference", **ratios(seconds["ours"], seconds["reference"]),
        "ratio_bytes": memory["ours"]["extra_bytes"] / memory["reference"]["extra_bytes"],
        "pairs": len(quiet), "others_cores": max(taken[i] for i in quiet), "versions": versions(),
    }  # fmt: skip


def speed(seconds: float, tokens: int, flops: int) -> dict[str, float]:
    per_s = {"tokens_per_s": tokens / seconds, "gflop_per_s": flops / seconds / 1e9}
    return {"s": seconds, "tokens": tokens, "flops": flops, **per_s}


def ratios(ours: list[float], other: list[float]) -> dict[str, float]:
    pairs = [a / b for a, b in zip(ours, other, strict=True)]
    return {
        "ratio": statistics.median(ours) / statistics.median(other),
        "ratio_pairwise": statistics.median(pairs),
        "ratio_least": min(pairs),
        "ratio_most": max(pairs),
    }


def versions() -> str:
    return f"torch {torch.__version__}, {THREADS} threads, {native.description()}"


def write_checkpoint(folder: Path) -> PreTrainedModel:
    """Write a random bf16 Llama of LARGE_BYTES or so, a shard a layer; return its meta model."""
    torch.manual_seed(0)

    def on_meta(layers: int) -> PreTrainedModel:
        config = config_of(LARGE | {"num_hidden_layers": layers})
        config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]

    one, two = (2 * on_meta(layers).num_parameters() for layers in (1, 2))
    model = on_meta(1 + max(0, LARGE_BYTES - one) // (two - one))
    model.config.save_pretrained(folder)
    weight_map = {}
    names = dict(model.named_parameters())
    for part, group in groupby(names, key=lambda name: ".".join(name.split(".")[:3])):
        tensors = {
            name: fill(name, torch.empty(names[name].shape, dtype=torch.bfloat16)) for name in group
        }
        save_file(tensors, folder / f"{part}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{part}.safetensors")
    index = {"metadata": {"total_size": 2 * model.num_parameters()}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


@pytest.mark.skipif("HFPRUNE_LARGE" not in os.environ, reason="minutes, 5 GB: HFPRUNE_LARGE=1")
@pytest.mark.timeout(7200)
def test_score_from_disk(benchmark: Any, tmp_path: Path, request: Any) -> None:
    request.addfinalizer(partial(shutil.rmtree, tmp_path))  # pytest would keep these gigabytes
    folder = tmp_path / "model"
    model = write_checkpoint(folder)
    tables = {offload: tmp_path / f"{offload}.safetensors" for offload in ("none", "disk")}
    runs: dict[str, list[dict[str, float]]] = {offload: [] for offload in tables}

    def score(offload: str) -> None:
        for path in folder.iterdir():
            path.read_bytes()  # into the page cache again
        wait_for_quiet()
        run = in_a_process(offload, "bfloat16", str(folder), str(tables[offload]))
        runs[offload].append(run)

    # The fixture times whole processes; what counts is measured inside them, without the imports.
    benchmark.pedantic(partial(score, "disk"), setup=partial(score, "none"), rounds=LARGE_ROUNDS)
    resident, streamed = (hf.ImportanceTable.load(file) for file in tables.values())
    for name in (*STATISTICS, "down_norm"):
        assert torch.equal(getattr(streamed, name), getattr(resident, name)), name
    seconds = {offload: [run["s"] for run in results] for offload, results in runs.items()}
    most = {
        offload: {key: max(run[key] for run in results) for key in results[0]}
        for offload, results in runs.items()
    }
    tokens, flops = LARGE_SAMPLES * SEQ_LEN, needed_flops(model, LARGE_SAMPLES * SEQ_LEN)
    common = {
        "op": "score a folder", "dtype": "bfloat16", "weights_bytes": 2 * model.num_parameters(),
        "ratio_of": "streamed to resident", **ratios(seconds["disk"], seconds["none"]),
        "ratio_bytes": most["disk"]["extra_bytes"] / most["none"]["extra_bytes"],
        "pairs": LARGE_ROUNDS, "versions": versions(),
    }  # fmt: skip
    benchmark.group = "score a folder"
    benchmark.extra_info["rows"] = [
        {
            **common, "provider": f"ours, offload={offload}", **most[offload],
            **speed(statistics.median(seconds[offload]), tokens, flops),
        }
        for offload in runs
    ]  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """The JSON of some runs as one table in Markdown."""
    benches = [bench["extra_info"] for result in results for bench in result["benchmarks"]]
    infos = [row for info in benches for row in info.get("rows", [info])]
    machine, cpu = results[0]["machine_info"], results[0]["machine_info"]["cpu"]
    lines = [
        f"{results[0]['datetime'][:10]}, {cpu.get('brand_raw', '?')}, {cpu['count']} cores, "
        f"{machine['system']}, Python {machine['python_version']}, {infos[0]['versions']}. "
        "FLOPs are those that the job needs, the same for every provider. Extra MB is the peak of "
        "anonymous memory beside a loaded model, mapped MB that of files; others are the cores "
        "that other processes kept busy.\n",
        "| op | dtype | provider | tokens | s | tokens/s | GFLOP/s | extra MB | mapped MB | "
        "ratio of | time | pairwise | pairs | extra | others |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for info in infos:
        cells = (
            info["op"], info["dtype"], info["provider"], info["tokens"], f"{info['s']:.2f}",
            f"{info['tokens_per_s']:.0f}", f"{info['gflop_per_s']:.0f}",
            f"{info['extra_bytes'] / 1e6:.0f}", f"{info['mapped_bytes'] / 1e6:.0f}",
            info["ratio_of"], f"{info['ratio']:.2f}",
            f"{info['ratio_pairwise']:.2f}",
            f"{info['pairs']}: {info['ratio_least']:.2f}–{info['ratio_most']:.2f}",
            f"{info['ratio_bytes']:.3f}", f"{info['others_cores']:.2f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1] == "measure":
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
    else:
        sys.stdout.write(table([json.loads(Path(file).read_text()) for file in sys.argv[1:]]))
