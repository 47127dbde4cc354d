"""Fetching and releasing a streamed model's weights; test_streaming.py tests the results."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import synthetic_checkpoint
from torch import Tensor
from transformers import PreTrainedModel
from truth import tiny_model

from hfprune_fast.checkpoint.loading import blueprint
from hfprune_fast.checkpoint.safetensors import SafetensorsFile
from hfprune_fast.data.batches import micro_batch
from hfprune_fast.engine import weights
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.scoring.run import score_batches
from hfprune_fast.scoring.sums import PassOptions

STREAMED = ["disk", "cpu"]
V = 127
BATCHES = [micro_batch(torch.arange(n * 9).view(n, 9), V) for n in (2, 1)]


@contextmanager
def watched_layers(
    monkeypatch: pytest.MonkeyPatch, seen: Callable[[int], object]
) -> Iterator[None]:
    """Call seen with a llama layer's number before it runs."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    run = LlamaDecoderLayer.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen(self.self_attn.layer_idx)
        return run(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaDecoderLayer, "forward", watched)
        yield


@pytest.mark.parametrize("offload", STREAMED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_layer_that_runs_has_its_weights(
    save_checkpoint: Callable[..., Path],
    offload: str,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = 4
    folder = save_checkpoint(tiny_model("llama", dtype=torch.float32, num_hidden_layers=layers))
    streamed = open_model(blueprint(folder, dtype=dtype, device="cpu"), offload)
    names = [name for name, _ in streamed.model.named_parameters()]
    ran, memory = [], set()

    def look(layer: int) -> None:
        present = {n: p for n, p in streamed.model.named_parameters() if not p.is_meta}
        assert set(present) == {n for n in names if n.startswith(f"model.layers.{layer}.")}
        memory.update(p.untyped_storage().data_ptr() for p in present.values())
        ran.append(layer)

    with watched_layers(monkeypatch, look), streamed:
        score_batches(streamed, BATCHES, PassOptions(recompute=True, pass_tokens=100))
    assert ran == [layer for layer in (0, 1, 2, 3, 3, 2, 1, 0) for _ in range(2)]
    if offload == "cpu":
        assert len(memory) == 2  # buffers, whatever the number of layers
    assert all(p.is_meta for p in streamed.model.parameters())
    assert not any(b.is_meta for b in streamed.model.buffers())


Event = tuple[str, str]


@contextmanager
def watched_file(monkeypatch: pytest.MonkeyPatch, events: list[Event]) -> Iterator[None]:
    """Record what is read ahead, looked at and given back, of every safetensors file."""
    kind = SafetensorsFile
    data, release = kind.data, kind.release

    def watched_data(self: Any, name: str, *, prefetch: bool = True) -> memoryview:
        events.append(("ask" if prefetch else "look", name))
        return data(self, name, prefetch=prefetch)

    def watched_release(self: Any, name: str) -> None:
        events.append(("done", name))
        release(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "data", watched_data)
        patch.setattr(kind, "release", watched_release)
        yield


def unit_of(name: str) -> str:
    """Number of the layer of a tensor, "embedding" or "head" (with the final norm)."""
    if name.startswith("model.layers."):
        return name.split(".")[2]
    return "embedding" if "embed_tokens" in name else "head"


def test_pages_are_prefetched_and_released(
    save_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_checkpoint(tiny_model("llama", dtype=torch.float32, num_hidden_layers=2))
    plan = blueprint(folder, device="cpu")
    events: list[Event] = []
    with (
        watched_file(monkeypatch, events),
        watched_layers(monkeypatch, lambda layer: events.append(("run", f"model.layers.{layer}."))),
        open_model(plan, "disk") as model,
    ):
        score_batches(model, BATCHES[1:], PassOptions(recompute=True))
    # Few of the embedding's rows are needed, so it is not read ahead.
    expected: list[Event] = [("look", "embedding"), ("done", "embedding")]
    for unit, then in (("0", "1"), ("1", "head"), ("head", "1"), ("1", "0"), ("0", "0")):
        expected += [("ask", unit), ("ask", then)][: 1 + (then != unit)]
        expected += [("run", unit)] if unit != "head" else []
        expected += [("done", unit)]
    found = []
    for (what, unit), group in groupby(events, key=lambda e: (e[0], unit_of(e[1]))):
        found.append((what, unit))
        if what != "run":  # all of the unit's tensors, none left out
            whole = {name for name in plan.source.tensors if unit_of(name) == unit}
            assert {name for _, name in group} == whole
    assert found == expected


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(),
    reason="Linux says which pages are in memory",
)
def test_given_back_pages_leave_the_memory(tmp_path: Path) -> None:
    """With layers of 5 MiB, a run leaves less than one of the file's in memory."""
    folder = synthetic_checkpoint(tmp_path / "m", hidden=512, width=1024, layers=4, vocab=V)
    with open_model(blueprint(folder, device="cpu"), "disk") as model:
        score_batches(model, [BATCHES[1]], PassOptions(recompute=True))
        text = Path("/proc/self/smaps").read_text()
    rss = dict.fromkeys((file.name for file in folder.glob("*.safetensors")), 0)
    for block in text.split("VmFlags")[:-1]:
        lines = [line.split() for line in block.splitlines()]
        for file in rss:
            if any(line and line[-1].endswith(file) for line in lines):
                rss[file] += next(int(line[1]) for line in lines if line and line[0] == "Rss:")
    assert len(rss) == 5
    assert sum(rss.values()) < 4 * 1024, rss


def test_offload_cpu_reads_the_file_once(
    save_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a layer is requested before the first tensor is through, and nothing comes again."""
    folder = save_checkpoint(tiny_model("llama", dtype=torch.float32))
    plan = blueprint(folder, device="cpu")
    events: list[Event] = []
    with watched_file(monkeypatch, events), open_model(plan, "cpu") as model:
        score_batches(model, BATCHES, PassOptions(recompute=True))
    for unit in ("0", "1", "2", "head"):
        whole = sorted(name for name in plan.source.tensors if unit_of(name) == unit)
        of_unit = [event for event in events if unit_of(event[1]) == unit]
        through = [name for what, name in of_unit if what == "done"]
        assert sorted(through) == whole
        before_the_first = of_unit[: of_unit.index(("done", through[0]))]
        assert {name for _, name in before_the_first} == set(whole)
        for name in whole:
            assert ("ask", name) not in of_unit[of_unit.index(("done", name)) :]


def test_offload_cpu_fills_a_buffer_while_a_layer_runs(
    save_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer waits here until the first tensor of the next is being read."""
    folder = save_checkpoint(tiny_model("llama", dtype=torch.float32))
    plan = blueprint(folder, device="cpu")
    events: list[Event] = []
    overtaken = []

    def wait(layer: int) -> None:
        then = str(layer + 1) if layer < 2 else "head"
        patience = time.monotonic() + 10
        while not any(unit_of(name) == then for _, name in events) and time.monotonic() < patience:
            time.sleep(0.001)
        overtaken.append(time.monotonic() < patience)

    with (
        watched_file(monkeypatch, events),
        watched_layers(monkeypatch, wait),
        open_model(plan, "cpu") as model,
    ):
        list(model.final_hidden(BATCHES[:1]))
    assert overtaken == [True] * 3


def assert_has_weights(streamed: ResidentModel, layer: int, model: PreTrainedModel) -> None:
    prefix = f"model.layers.{layer}."
    for name, parameter in model.named_parameters():
        if name.startswith(prefix):
            assert torch.equal(streamed.model.get_parameter(name), parameter), name


@contextmanager
def watched_reads(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[str], object]
) -> Iterator[None]:
    """Call before with a tensor's name before it is read."""
    stored = weights.CheckpointTensors.stored

    def watched(self: Any, name: str, **options: Any) -> Tensor:
        before(name)
        return stored(self, name, **options)

    with monkeypatch.context() as patch:
        patch.setattr(weights.CheckpointTensors, "stored", watched)
        yield


Source = tuple[PreTrainedModel, Path]


@pytest.fixture
def source(save_checkpoint: Callable[..., Path]) -> Source:
    """A model of 5 layers and its checkpoint."""
    model = tiny_model("llama", dtype=torch.float32, num_hidden_layers=5)
    return model, save_checkpoint(model)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("offload", STREAMED)
def test_a_layer_that_was_not_announced_is_fetched_all_the_same(
    source: Source, offload: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the one that was announced is still on its way."""
    model, folder = source

    def delay(name: str) -> None:
        if slow and name.endswith("mlp.up_proj.weight"):
            time.sleep(0.02)

    with (
        watched_reads(monkeypatch, delay),
        open_model(blueprint(folder, device="cpu"), offload) as streamed,
    ):
        for layer, then in ((0, 1), (2, 3), (2, 2), (4, 0), (1, 4), (4, 1), (3, 3), (0, 2)):
            with streamed.weights_of(layer, then=then):
                assert_has_weights(streamed, layer, model)


@pytest.mark.parametrize("offload", STREAMED)
def test_a_read_that_fails_is_raised_here_and_all_is_closed(
    source: Source, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = blueprint(source[1], device="cpu")
    with (
        watched_reads(monkeypatch, failing("model.layers.1.mlp.up_proj.weight")),
        pytest.raises(OSError, match="the disk is gone"),
        open_model(plan, offload) as model,
    ):
        score_batches(model, BATCHES, PassOptions(recompute=True))
    assert weight_threads() == []
    assert all(parameter.is_meta for parameter in plan.model.parameters())


@pytest.mark.parametrize("offload", STREAMED)
def test_a_read_that_failed_is_tried_again(
    source: Source, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that failed ahead of its time, of a layer that is not needed, harms nothing."""
    model, folder = source
    with open_model(blueprint(folder, device="cpu"), offload) as streamed:
        with watched_reads(monkeypatch, failing("model.layers.2.")):
            for layer, then in ((0, 2), (1, 2)):
                with streamed.weights_of(layer, then=then):
                    assert_has_weights(streamed, layer, model)
            for _ in range(2):
                with (
                    pytest.raises(OSError, match="the disk is gone"),
                    streamed.weights_of(2, then=3),
                ):
                    pass
        with streamed.weights_of(2, then=3):
            assert_has_weights(streamed, 2, model)
    assert weight_threads() == []


def failing(prefix: str) -> Callable[[str], None]:
    def fail(name: str) -> None:
        if name.startswith(prefix):
            raise OSError("the disk is gone")

    return fail


def weight_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("hfprune-weights")]
