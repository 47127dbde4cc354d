"""Pruning a model in memory: the kept neurons stay, and peak memory stays low."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama, synthetic_checkpoint
from processes import in_another_process

import hfprune_fast as hf
from hfprune_fast.checkpoint import loading, native
from hfprune_fast.errors import ArgumentError, MemoryShortageError


def test_in_memory_storage_is_exactly_what_is_kept(llama_dir: Path) -> None:
    for extension in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not extension:
                patch.setattr(native, "_C", None)
            model = loading.load_model(llama_dir, device="cpu")
            old = {n: p.detach().clone() for n, p in model.named_parameters()}
            keep = {layer: torch.arange(layer, 95, 3) for layer in range(3)}
            hf.prune(model, keep)
        for name, parameter in model.named_parameters():
            if ".mlp." not in name:
                continue
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
            kept = keep[int(name.split(".")[2])]
            assert torch.equal(parameter, old[name].index_select(int("down_proj" in name), kept))
        assert model(torch.arange(8)[None]).logits.isfinite().all()
        assert model.generate(torch.arange(4)[None], max_new_tokens=3).shape[1] > 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": {0: torch.arange(3)}}, "an entry for each layer 0..2, got .0."),
        ({"keep": {0: "a", 1: "b", 2: "c"}}, "keep must hold tensors of int64 indices"),
        ({"keep": {"0": 1, 1: 2, None: 3}}, "an entry for each layer"),
        ({"down_proj": [torch.zeros(64, 48)]}, "down_proj must be .layer: weight., got a list"),
        ({"down_proj": {2: [1.0]}}, r"down_proj\[2\] must be a floating-point tensor, got a list"),
        ({"down_proj": {2: torch.zeros(64, 48).int()}}, r"down_proj\[2\] must be a floating-point"),
        ({"down_proj": {2: torch.zeros(48, 64)}}, r"down_proj\[2\] must be \(64, 48\), got"),
        (
            {"down_proj": {2: torch.zeros(64, 48, device="meta")}},
            "floating-point tensor, got .*meta",
        ),
        ({"down_proj": {3: torch.zeros(64, 48)}}, "down_proj has layer 3; the model has 0..2"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_cut(
    change: dict[str, Any], message: str
) -> None:
    model = random_llama()
    keep, before = {i: torch.arange(48) for i in range(3)}, list(map(id, model.parameters()))
    with pytest.raises(ArgumentError, match=message):
        hf.prune(model, **{"keep": keep, **change})
    assert list(map(id, model.parameters())) == before


def test_memory_that_runs_out_is_noticed_before_the_first_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, empty = random_llama(), torch.empty
    keep, before = {i: torch.arange(48) for i in range(3)}, list(map(id, model.parameters()))

    def full(*size: Any, **options: Any) -> Any:
        if options.get("dtype") == torch.uint8:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(MemoryShortageError, match="the model, which is unchanged"):
        hf.prune(model, keep)
    assert list(map(id, model.parameters())) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_takes_effect_when_the_model_is_whole(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, compact = random_llama(), native.compact_columns

    def interrupted(*args: Any, **options: Any) -> Any:
        signal.raise_signal(number)
        return compact(*args, **options)

    monkeypatch.setattr(native, "compact_columns", interrupted)
    by_number = {
        signal.SIGTERM: lambda *_: sys.exit(143),
        signal.SIGINT: signal.default_int_handler,  # ignored in a background job
    }
    before = signal.signal(number, by_number[number])
    try:
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
            hf.prune(model, {i: torch.arange(48) for i in range(3)})
    finally:
        signal.signal(number, before)
    assert {mlp.down_proj.weight.shape[1] for mlp in (x.mlp for x in model.model.layers)} == {48}
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_in_inference_mode_the_parameters_stay_usual_ones() -> None:
    model, expected = random_llama(), random_llama()
    keep = {i: torch.arange(i, 96, 2) for i in range(3)}
    hf.prune(expected, keep)
    with torch.inference_mode():
        hf.prune(model, {i: kept.clone() for i, kept in keep.items()})
    for pruned, plain in zip(model.parameters(), expected.parameters(), strict=True):
        assert not pruned.is_inference()
        assert torch.equal(pruned, plain)
        assert pruned.requires_grad == plain.requires_grad


IN_MEMORY = """
import sys, torch
import hfprune_fast as hf
from hfprune_fast.checkpoint import loading
from pathlib import Path
model = loading.load_model(Path(sys.argv[1]), device="cpu")
model(torch.arange(4)[None])

def now():
    with open("/proc/self/status") as status:
        lines = dict(l.split(":", 1) for l in status)
    return int(lines["RssAnon"].split()[0]) * 1024

seen, real = [], torch.nn.Parameter
class Watched(torch.nn.Parameter):
    def __new__(cls, *arguments, **named):
        seen.append(now())
        return real(*arguments, **named)

torch.nn.Parameter = Watched
before = now()
hf.prune(model, {i: torch.arange(0, 4096, 2) for i in range(4)})
mlp = 4 * 3 * 4096 * 1024 * 2
print(before, max(seen), now(), mlp)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_in_memory_takes_one_tensor_more_at_most(
    tmp_path: Path, measured: Callable[[str], None]
) -> None:
    large = synthetic_checkpoint(tmp_path / "model", hidden=1024, width=4096, layers=4, vocab=3000)
    before, peak, after, mlp = map(int, in_another_process(IN_MEMORY, large).split())
    kept = 2048 * 1024 * 2
    measured(
        f"hf.prune in memory, {mlp / 1e6:.0f} MB of MLPs: {(peak - before) / 1e6:+.1f} MB at the "
        f"peak, {(after - before) / 1e6:+.1f} MB at the end of anonymous memory"
    )
    # Weights that were mapped come to be anonymous, the kept half of them; others only shrink.
    mapped = after > before
    most = before + (mlp // 2 if mapped else 0) + kept + 8e6
    assert peak <= most
