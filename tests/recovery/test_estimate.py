"""What `hfprune plan --recover` says is what a recovery has."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from family_models import tiny_family_model
from tiny_mixtures import tiny_mixture
from transformers import PreTrainedModel

from hfprune_fast.checkpoint.loading import load_model
from hfprune_fast.commands import plan
from hfprune_fast.config import RecoveryOptions
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.recovery.adapters import add_lora, unfreeze


def parameters(folder: Path, options: RecoveryOptions) -> tuple[int, int, int]:
    """Return how many numbers are trained, and the bytes of what is frozen and of the head."""
    dtype = "bfloat16" if options.lora else "float32"
    with ResidentModel(load_model(folder, dtype=dtype, device="cpu")) as opened:
        model: Any = opened.model
        if options.lora:
            model, _ = add_lora(model, opened.parts, options, 0)
        else:
            unfreeze(model, opened.parts, options)
        frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        head = opened.parts.head.weight.numel() * 2
        return sum(p.numel() for p in model.parameters() if p.requires_grad), frozen, head


@pytest.mark.parametrize(
    "make",
    [lambda: tiny_family_model("phi3"), lambda: tiny_mixture("deepseek_v3")],
    ids=["fused", "experts"],
)
@pytest.mark.parametrize("lora", [0, 5])
@pytest.mark.parametrize("train", ["all", "mlp"])
def test_what_is_trained_and_frozen_is_counted(
    hfprune: Callable[..., Any], tmp_path: Path, make: Callable[[], PreTrainedModel],
    lora: int, train: str,
) -> None:  # fmt: skip
    make().save_pretrained(tmp_path)
    run = hfprune(
        "plan",
        tmp_path,
        "--prune-ratio",
        0,
        "--recover",
        "--lora",
        lora,
        "--train",
        train,
        "--dtype",
        "bfloat16",
        "--json",
    )
    assert run.code == 0, run.err
    expected, frozen, head = parameters(tmp_path, RecoveryOptions(lora=lora, train=train))
    found = run.json()["recovery"]
    assert found["trained_params"] == expected
    assert found["weights_bytes"] == frozen + head  # the dense model's head beside the student
    assert found["trained_bytes"] == expected * 4 * 4


def test_the_file_of_hidden_states_is_as_large(
    hfprune: Callable[..., Any], recover: Callable[..., Any], tmp_path: Path
) -> None:
    cache = tmp_path / "states"
    recover(cache=cache, tokens=320, held_out=1)
    flags = ["--dtype", "float32", "--seq-len", 32, "--device", "cpu", "--json"]
    run = hfprune("plan", "demo", "--prune-ratio", 0.5, "--recover", "--tokens", 320, *flags)
    planned = run.json()["recovery"]["hidden_states_bytes"]
    held_out = 32 * 128 * 4 * (16 - 1)  # windows; the plan has the default, the run has one
    assert 0 <= cache.stat().st_size - (planned - held_out) < 1000


def test_cross_entropy_needs_the_states_of_held_out_windows_alone() -> None:
    options: dict[str, Any] = {"prune_ratio": 0.5, "seq_len": 32, "dtype": "float32"}
    found = plan.run("demo", recover=True, loss="ce", tokens=320, held_out=3, **options)
    assert found["recovery"]["hidden_states_bytes"] == 3 * 32 * 128 * 4


def test_people_read_it(hfprune: Callable[..., Any]) -> None:
    run = hfprune("plan", "demo", "--prune-ratio", 0.5, "--recover", "--tokens", 100000)
    assert run.code == 0, run.err
    line = run.out.splitlines()[-1]
    assert line.startswith("recover, 100,000 tokens by LoRA of rank 16, 118,784 trained: about ")
    assert "hidden states of the dense model " in line
    assert re.search(r"checkpoints \d\S* \w+, output 1\.4 MiB; about", line), line


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--lora", 4], "lora"),
        (["--train", "mlp"], "train"),
        (["--tokens", 9, "--lora", 0], "tokens, lora"),
    ],
)
def test_flags_of_a_recovery_need_one(
    hfprune: Callable[..., Any], flags: list[Any], names: str
) -> None:
    run = hfprune("plan", "demo", "--prune-ratio", 0.5, *flags)
    assert run.code == 2, run.out
    assert run.err == f"hfprune: error: {names} changes nothing without recover\n"
