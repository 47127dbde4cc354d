from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shifted import begin_data_at
from torch import Tensor
from transformers import PreTrainedModel
from truth import tiny_model

import hfprune_fast as hf
from hfprune_fast.checkpoint.loading import blueprint, load_model
from hfprune_fast.commands import evaluate
from hfprune_fast.config import STATISTICS
from hfprune_fast.data.batches import MicroBatch, micro_batch
from hfprune_fast.engine import layerwise
from hfprune_fast.engine.streaming import StreamedModel, open_model
from hfprune_fast.errors import NumericsError
from hfprune_fast.evaluation import fidelity
from hfprune_fast.scoring.accumulator import ScoreAccumulator
from hfprune_fast.scoring.run import score_batches
from hfprune_fast.scoring.sums import PassOptions

V = 127
STREAMED = ["disk", "cpu"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with biases": ("llama", {"mlp_bias": True}),
    "llama, tied": ("llama", {"tied": True}),
    "mistral, 5 tokens seen": ("mistral", {"sliding_window": 5}),
    "qwen2, tied": ("qwen2", {"tied": True}),
    "qwen3": ("qwen3", {}),
}
DTYPES = {  # stored, run in
    "float32": (torch.float32, "float32"),
    "bfloat16": (torch.bfloat16, "bfloat16"),
    "float64": (torch.float64, "float64"),
    "bfloat16 in float32": (torch.bfloat16, "float32"),
    "float32 in bfloat16": (torch.float32, "bfloat16"),
}


def some_pairs(dtypes: Iterable[str]) -> list[tuple[str, str]]:
    """Pair every model with one or two of the dtypes, and every dtype with some of the models."""
    return [
        (which, each)
        for i, which in enumerate(MODELS)
        for j, each in enumerate(dtypes)
        if (i - j) % 3 == 0
    ]


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def micro_batches() -> list[MicroBatch]:
    """Padded, two of one shape, and one of a single token: products of one row round apart."""
    mask = torch.arange(16) >= torch.tensor([[0], [9], [15]])
    padded = {"input_ids": random_ids(3, 16), "attention_mask": mask}
    given = [padded, random_ids(1, 1), random_ids(2, 9), random_ids(2, 9, seed=2)]
    return [micro_batch(batch, V) for batch in given]


def score(
    folder: Path,
    offload: str,
    batches: list[MicroBatch] | None = None,
    *,
    dtype: str = "auto",
    recompute: bool = True,
    pass_tokens: int = 0,
    passes: int | None = None,
) -> ScoreAccumulator:
    """Score by path; of a given number of passes, so that a test knows that there were many."""
    committed: list[int] = []
    how = PassOptions(recompute=recompute, pass_tokens=pass_tokens)
    with open_model(blueprint(folder, dtype=dtype, device="cpu"), offload) as model:
        assert isinstance(model, StreamedModel) == (offload != "none")
        totals = score_batches(
            model,
            batches or micro_batches(),
            how,
            on_commit=lambda totals, most: committed.append(totals.samples),
        )
    assert passes in (None, len(committed))
    return totals


def assert_equal(got: ScoreAccumulator, expected: ScoreAccumulator) -> None:
    assert torch.equal(got.statistics, expected.statistics)
    assert torch.equal(got.down_norm, expected.down_norm)
    assert got.loss_nats == expected.loss_nats
    assert (got.samples, got.tokens) == (expected.samples, expected.tokens)
    assert bool(expected.statistics.all())
    assert bool(expected.down_norm.all())


@pytest.fixture
def save_shifted(save_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """Save a model with its data 8 bytes into a cache line, where products may round apart."""

    def save(model: PreTrainedModel, name: str = "model") -> Path:
        folder = save_checkpoint(model, name)
        begin_data_at(folder / "model.safetensors", 8)
        return folder

    return save


@pytest.mark.parametrize(("which", "dtypes"), some_pairs(DTYPES))
def test_streamed_scores_are_the_residents_bit_for_bit(
    save_shifted: Callable[..., Path], which: str, dtypes: str
) -> None:
    (family, overrides), (stored, dtype) = MODELS[which], DTYPES[dtypes]
    folder = save_shifted(tiny_model(family, dtype=stored, **overrides))
    expected = score(folder, "none", dtype=dtype, recompute=False, passes=4)
    assert_equal(score(folder, "none", dtype=dtype, pass_tokens=36, passes=3), expected)
    # From the one place and the other, which change with the dtype.
    places = STREAMED * 2 if list(DTYPES).index(dtypes) % 2 else STREAMED[::-1] * 2
    for offload, (pass_tokens, passes) in zip(places, ((0, 4), (36, 3), (1000, 1)), strict=False):
        got = score(folder, offload, dtype=dtype, pass_tokens=pass_tokens, passes=passes)
        assert_equal(got, expected)


@pytest.mark.parametrize("in_line", [1, 2, 4, 60])
def test_data_at_any_byte_score_the_same(
    save_checkpoint: Callable[..., Path], in_line: int
) -> None:
    folder = save_checkpoint(tiny_model("llama", dtype=torch.float32))
    begin_data_at(folder / "model.safetensors", 0)
    aligned = score(folder, "none")
    begin_data_at(folder / "model.safetensors", in_line)
    resident = score(folder, "none")
    assert torch.allclose(resident.statistics, aligned.statistics, rtol=1e-3)
    if in_line % 4:  # float32 cannot stay there, and is copied to where it was in the other file
        assert_equal(resident, aligned)
    for offload in STREAMED:
        assert_equal(score(folder, offload), resident)


@pytest.mark.parametrize("offload", ["none", *STREAMED])
def test_a_checkpoint_saved_as_base_model_scores_the_same(
    save_checkpoint: Callable[..., Path], offload: str
) -> None:
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    expected = score(save_checkpoint(model, "whole"), "none")
    folder = save_checkpoint(model, "base")
    file = folder / "model.safetensors"
    tensors = {n.removeprefix("model."): t for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    assert_equal(score(folder, offload), expected)


@pytest.mark.parametrize("offload", STREAMED)
def test_more_shapes_than_recorded_calls_are_kept_of(
    save_checkpoint: Callable[..., Path], offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_checkpoint(tiny_model("mistral", dtype=torch.float32, sliding_window=5))
    batches = [micro_batch(random_ids(1, length), V) for length in (7, 9, 8, 7)]
    expected = score(folder, "none", batches)
    monkeypatch.setattr(layerwise, "_CACHED_SHAPES", 2)
    assert_equal(score(folder, offload, batches, pass_tokens=1000, passes=1), expected)


def test_offload_of_score_changes_no_bit(save_shifted: Callable[..., Path]) -> None:
    folder = save_shifted(tiny_model("llama", dtype=torch.float32, rope_parameters=LLAMA3))
    ids = random_ids(5, 1)
    tables = [hf.score(folder, ids, batch_size=1, offload=o) for o in ("none", *STREAMED)]
    for table in tables[1:]:
        for name in (*STATISTICS, "down_norm"):
            assert torch.equal(getattr(table, name), getattr(tables[0], name)), name
        assert table.provenance == tables[0].provenance


@pytest.mark.parametrize("offload", STREAMED)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("where", ["layers.1.mlp.up_proj", "embed_tokens", "norm", "lm_head"])
def test_nan_in_a_weight_is_named(
    save_checkpoint: Callable[..., Path], where: str, tied: bool, offload: str
) -> None:
    model = tiny_model("llama", dtype=torch.float32, tied=tied)
    name = "lm_head" if where == "lm_head" else f"model.{where}"
    weight = model.get_submodule(name).weight
    weight.view(-1)[-1] = torch.nan  # of the embedding and the head, the row of an unused token
    named = "model.embed_tokens" if tied and where == "lm_head" else name
    folder = save_checkpoint(model)
    with pytest.raises(NumericsError, match=rf"tensor {named}\.weight holds NaN") as raised:
        score(folder, offload, [micro_batch(torch.tensor([[1, 2, 3]]), V)])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("offload", ["none", *STREAMED])
def test_source_is_never_written_to(save_checkpoint: Callable[..., Path], offload: str) -> None:
    folder = save_checkpoint(tiny_model("llama", dtype=torch.float32, tied=True))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    score(folder, offload, pass_tokens=36)
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert after == before


@pytest.mark.parametrize(
    ("which", "dtypes"), some_pairs(["float32", "bfloat16", "bfloat16 in float32"])
)
def test_evaluation_by_path_is_that_of_loaded_models(
    save_shifted: Callable[..., Path],
    tmp_path: Path,
    which: str,
    dtypes: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fidelity, "_CHUNK_ELEMENTS", V * 10)  # windows of 11: a row is left over
    (family, overrides), (stored, dtype) = MODELS[which], DTYPES[dtypes]
    # 2 layers, so that the head and another unit take turns in a buffer.
    overrides = {"num_hidden_layers": 2, **overrides}
    dense, pruned = (tiny_model(family, dtype=stored, **overrides) for _ in range(2))
    hf.prune(pruned, {layer: torch.arange(0, 96, 2) for layer in range(2)})
    pruned.lm_head.weight.mul_(0.9)  # each with its own head
    folders = [save_shifted(dense, "dense"), save_shifted(pruned, "pruned")]
    np.save(tmp_path / "ids.npy", random_ids(5, 11).numpy())
    expected = hf.evaluate(
        *(load_model(folder, dtype=dtype, device="cpu") for folder in folders),
        random_ids(5, 11).split(2),
    )
    assert expected.kl_nats > 0.01
    for offload in ("none", *STREAMED):
        got = evaluate.run(
            *folders, tmp_path / "ids.npy", samples=None, batch_size=2, device="cpu", dtype=dtype,
            offload=offload,
        )  # fmt: skip
        assert got == asdict(expected)
