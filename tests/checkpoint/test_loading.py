from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from shifted import begin_data_at
from transformers import AutoModelForCausalLM, PreTrainedModel
from truth import tiny_model

import hfprune_fast as hf
from hfprune_fast.checkpoint import native
from hfprune_fast.checkpoint.loading import blueprint, load_model
from hfprune_fast.errors import CheckpointError

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
IDS = torch.arange(60).view(2, 30)


def theirs(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model


def assert_same(ours: PreTrainedModel, other: PreTrainedModel) -> None:
    """Parameters, buffers and logits, bit for bit."""
    for kind in ("named_parameters", "named_buffers"):
        got, expected = (dict(getattr(model, kind)()) for model in (ours, other))
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert got[name].dtype == tensor.dtype, name
            assert torch.equal(got[name], tensor), name
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, other(IDS).logits)


STORED_AND_RUN = [
    (torch.float32, "float32"),
    (torch.bfloat16, "bfloat16"),
    (torch.bfloat16, "float32"),
    (torch.float32, "bfloat16"),
    (torch.float64, "float64"),
]


@pytest.mark.parametrize(
    ("family", "stored", "run_in", "tied"),
    [
        (family, *dtypes, bool((i + j) % 2))
        for i, family in enumerate(FAMILIES)
        for j, dtypes in enumerate(STORED_AND_RUN)
    ],
)
def test_loads_what_transformers_loads(
    save_checkpoint: Callable[..., Path],
    family: str,
    stored: torch.dtype,
    run_in: str,
    tied: bool,
) -> None:
    folder = save_checkpoint(tiny_model(family, dtype=stored, tied=tied))
    ours = load_model(folder, dtype=run_in, device="cpu")
    other = theirs(folder, getattr(torch, run_in))
    assert_same(ours, other)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.bfloat16) for family in FAMILIES), ("llama", torch.float32)],
)
@pytest.mark.parametrize("rope", ROPES)
def test_rotary_tables_are_computed_as_transformers_does(
    save_checkpoint: Callable[..., Path], rope: str, family: str, dtype: torch.dtype
) -> None:
    parameters = {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
    folder = save_checkpoint(tiny_model(family, dtype=dtype, rope_parameters=parameters))
    stored = str(dtype).removeprefix("torch.")
    plan = blueprint(folder, dtype=stored, device="cpu")
    assert all(parameter.is_meta for parameter in plan.model.parameters())
    buffers = dict(plan.model.named_buffers())
    assert "model.rotary_emb.inv_freq" in buffers
    assert not any(buffer.is_meta for buffer in buffers.values())
    other = theirs(folder, dtype)
    for name, buffer in other.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    ours, expected = plan.model.model.rotary_emb, other.model.rotary_emb
    assert ours.attention_scaling == expected.attention_scaling
    assert_same(load_model(folder, dtype=stored, device="cpu"), other)


def test_threads_load_and_score_at_once(
    llama_dir: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Of different dtypes: what one thread sets for its own model must not reach the other's."""

    def refuse(dtype: torch.dtype) -> None:
        raise AssertionError(f"the default dtype of all threads was set to {dtype}")

    def scores(dtype: str) -> torch.Tensor:
        return hf.score(llama_dir, IDS, device="cpu", dtype=dtype).l1

    dtypes = ["float32", "bfloat16"]
    alone = {dtype: scores(dtype) for dtype in dtypes}
    members = dict(vars(torch.nn.Module))
    monkeypatch.setattr(torch, "set_default_dtype", refuse)
    with ThreadPoolExecutor(2) as threads:
        for dtype, together in zip(dtypes * 4, threads.map(scores, dtypes * 4), strict=True):
            assert torch.equal(together, alone[dtype]), dtype
    assert dict(vars(torch.nn.Module)) == members
    assert torch.empty(0).device.type == "cpu"


@pytest.mark.parametrize("tied", [False, True])
def test_writing_to_a_loaded_parameter_never_changes_the_file(
    save_checkpoint: Callable[..., Path], tied: bool
) -> None:
    model = tiny_model("llama", dtype=torch.float32, tied=tied)
    folder = save_checkpoint(model, max_shard_size="50KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    before = [file.read_bytes() for file in files]
    loaded = load_model(folder, device="cpu")
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.fill_(7)
    assert [file.read_bytes() for file in files] == before
    assert_same(load_model(folder, device="cpu"), model)
    assert all((parameter == 7).all() for parameter in loaded.parameters())


@pytest.mark.parametrize("reader", ["extension", "plain"])
@pytest.mark.parametrize("in_line", [1, 2, 4, 8, 63])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_data_may_begin_at_any_byte(
    save_checkpoint: Callable[..., Path],
    dtype: torch.dtype,
    in_line: int,
    reader: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if reader == "plain":
        monkeypatch.setattr(native, "_C", None)
    model = tiny_model("llama", dtype=dtype)
    folder = save_checkpoint(model)
    begin_data_at(folder / "model.safetensors", in_line)
    plan = blueprint(folder, device="cpu")
    begins = [b % 64 for _, _, b, _ in plan.source.shards["model.safetensors"].tensors.values()]
    assert set(begins) == {in_line}
    loaded = load_model(folder, device="cpu")
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def rename(folder: Path, old: str, new: str) -> None:
    """In the header, to a name of the same length."""
    assert len(old) == len(new)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    assert old.encode() in content
    file.write_bytes(content.replace(old.encode(), new.encode()))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        # Every layer alike, so only the model that transformers makes can tell.
        ("self_attn.q_proj", "attention.wq_pr", r"model\.layers\.0\.self_attn\.q_proj\.weight"),
        ("mlp.gate_proj", "mlp.w1_linear", r"model\.layers\.0\.mlp\.gate_proj\.weight"),
        ("model.norm", "model.ln_f", r"model\.norm\.weight"),
        ("model.embed_tokens", "model.wte_tokens.t", r"model\.embed_tokens\.weight"),
        ("lm_head", "lm.head", r"lm_head\.weight"),
    ],
)
def test_names_that_are_not_transformers_own_are_refused(
    save_checkpoint: Callable[..., Path], old: str, new: str, named: str
) -> None:
    folder = save_checkpoint(random_llama())
    new = new.ljust(len(old), "_")
    rename(folder, old, new)
    for run in (blueprint, load_model):
        with pytest.raises(CheckpointError, match=f"lacks the tensor {named}") as raised:
            run(folder, device="cpu")
        assert "\n" not in str(raised.value)
