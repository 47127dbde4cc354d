import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_llama
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from truth import forward

import hfprune_fast as hf
from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.config_json import read_config
from hfprune_fast.checkpoint.folder import find_model
from hfprune_fast.commands import plan
from hfprune_fast.errors import ArgumentError, CalibrationError, ScoresFileError

RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, output_loading_info=True
)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.arange(32)[None], use_cache=False).logits[0].double(), sys.argv[2])
assert "hfprune_fast" not in sys.modules
assert model.generate(torch.arange(4)[None], max_new_tokens=4, do_sample=False).shape[1] > 4
"""


@pytest.mark.slow
@pytest.mark.parametrize("which", ["demo", "by path"])
def test_pruned_checkpoint_in_another_process(
    which: str, llama_dir: Path, tmp_path: Path, hfprune: Callable[..., object]
) -> None:
    """The whole job, then the logits against float64 with the removed neurons' acts at zero."""
    model = "demo" if which == "demo" else llama_dir
    folder = find_model(model)
    out = tmp_path / "out"
    flags = ["--calibration", "demo", "--samples", 4, "--seq-len", 32, "--preset", "paper"]
    run = hfprune("prune", model, "--prune-ratio", 0.2, "--out", out, *flags)
    assert run.code == 0, run.err  # type: ignore[attr-defined]
    saved = tmp_path / "logits.pt"
    # Not in the project's root: transformers would take kernels/ for the package of that name.
    subprocess.run([sys.executable, "-c", RELOAD, str(out), str(saved)], check=True, cwd=tmp_path)
    record = json.loads((out / "hfprune.json").read_text())
    dense = loading.load_model(folder, dtype="float32", device="cpu")
    alive = torch.zeros(len(record["keep"]), dense.config.intermediate_size, dtype=torch.bool)
    for layer, kept in record["keep"].items():
        alive[int(layer.split(".")[2]), kept] = True
    masked = forward(
        dense.state_dict(), dense.config, torch.arange(32), alive=alive
    ).logits.detach()
    got = torch.load(saved, weights_only=True)
    assert (got - masked).norm() / masked.norm() < 1e-5  # fp32 roundings of a few layers


def test_one_scoring_run_serves_any_budget(
    llama_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    table = hf.score(llama_dir, text_file, samples=2, seq_len=32)
    table.save(tmp_path / "s")
    loaded = hf.ImportanceTable.load(tmp_path / "s")
    for number, budget in enumerate(
        [{"prune_ratio": 0.5}, {"param_ratio": 0.05}, {"intermediate_size": 7}]
    ):
        out = tmp_path / str(number)
        result = hf.oneshot(llama_dir, None, out, scores=loaded, recipe="paper", **budget)
        counted = sum(p.numel() for p in loading.load_model(out, device="cpu").parameters())
        assert counted == result["params"]
        assert abs(result.get(next(iter(budget))) - next(iter(budget.values()))) < 0.01


def test_scores_of_another_model_are_refused(
    save_checkpoint: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = random_llama()
    first = save_checkpoint(model, "first")
    table = hf.score(first, text_file, samples=1, seq_len=16)
    other_shape = save_checkpoint(random_llama(intermediate_size=40), "other")
    with pytest.raises(ScoresFileError, match="of another model"):
        hf.oneshot(
            other_shape, None, tmp_path / "out", scores=table, recipe="paper", prune_ratio=0.1
        )
    sibling = tmp_path / "sibling"
    sibling.mkdir()
    for path in first.iterdir():
        (sibling / path.name).write_bytes(path.read_bytes())
    tensors = load_file(sibling / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][10:50] *= 1.5
    save_file(tensors, sibling / "model.safetensors", {"format": "pt"})
    with pytest.raises(ScoresFileError, match="same shape, other weights"):
        hf.oneshot(sibling, None, tmp_path / "out", scores=table, recipe="paper", prune_ratio=0.1)
    assert not (tmp_path / "out").exists()


def test_scores_of_the_same_weights_with_another_config_are_refused(
    llama_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    table = hf.score(llama_dir, text_file, samples=1, seq_len=16)
    config = json.loads((llama_dir / "config.json").read_text())
    (llama_dir / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(ScoresFileError, match="of another model"):
        hf.oneshot(llama_dir, None, tmp_path / "out", scores=table, recipe="paper", prune_ratio=0.1)


def test_a_loaded_models_table_knows_its_model_by_its_norms(
    save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = random_llama()
    folder = save_checkpoint(model.bfloat16(), "bf16")
    ids = torch.arange(32).view(1, 32)
    in_fp32 = hf.score(random_llama(), ids)
    hf.oneshot(folder, None, tmp_path / "out", scores=in_fp32, recipe="paper", prune_ratio=0.25)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[:, 7] *= 1.1
    sibling = save_checkpoint(model, "sibling")
    with pytest.raises(ScoresFileError, match="same shape, other weights"):
        hf.oneshot(
            sibling, None, tmp_path / "out2", scores=in_fp32, recipe="paper", prune_ratio=0.25
        )


def test_a_loaded_models_table_prunes_its_folder(llama_dir: Path, tmp_path: Path) -> None:
    table = hf.score(random_llama(), torch.arange(64).view(2, 32))
    hf.oneshot(llama_dir, None, tmp_path / "out", scores=table, recipe="paper", prune_ratio=0.25)
    assert read_config(tmp_path / "out")["intermediate_size"] == 72


def test_plan_counts_what_pruning_gives(llama_dir: Path, text_file: Path, tmp_path: Path) -> None:
    budget: dict[str, Any] = {"prune_ratio": 0.3, "round_to": 8}
    planned = plan.run(llama_dir, seq_len=64, **budget)
    table = hf.score(llama_dir, text_file, samples=1, seq_len=16)
    result = hf.oneshot(
        llama_dir, None, tmp_path / "out", scores=table, allocation="global", **budget
    )
    for name in ("params", "dense_params", "prune_ratio", "param_ratio"):
        assert planned[name] == result[name], name
    assert sum(planned["mlp_widths"]) == sum(result["mlp_widths"])
    pruned = loading.load_model(tmp_path / "out", device="cpu")
    assert planned["weights_bytes"] == sum(p.nbytes for p in pruned.parameters())
    pruned.set_attn_implementation("eager")  # the counter does not see the fused one on a CPU
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        pruned(torch.zeros(1, 64, dtype=torch.int64), use_cache=False)
    # Some releases of transformers make the rotary table by a tiny product of their own.
    rotary_flops = 2 * 64 * pruned.config.head_dim // 2
    assert flops.get_total_flops() - planned["flops_per_token"] * 64 in (0, rotary_flops)


def test_seq_len_beyond_the_model(llama_dir: Path, text_file: Path) -> None:
    with pytest.raises(ArgumentError, match="seq_len must be at most 128"):
        hf.score(llama_dir, text_file, seq_len=129)


def test_ids_longer_than_the_model(llama_dir: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.zeros((1, 129), dtype=np.int64))
    with pytest.raises(ArgumentError, match=r"seq_len must be at most 128.*got 129"):
        hf.score(llama_dir, tmp_path / "ids.npy")


@pytest.mark.parametrize("seq_len", [0, -5])
def test_seq_len_zero_is_not_the_default(llama_dir: Path, text_file: Path, seq_len: int) -> None:
    with pytest.raises(ArgumentError, match="seq_len must be at least 1"):
        hf.score(llama_dir, text_file, seq_len=seq_len)
    with pytest.raises(ArgumentError, match="seq_len must be at least 1"):
        plan.run(llama_dir, prune_ratio=0.1, seq_len=seq_len)


def test_text_for_a_loaded_model_is_refused(text_file: Path) -> None:
    with pytest.raises(ArgumentError, match="give the model by path"):
        hf.score(random_llama(), text_file)


def test_text_that_is_too_short_is_refused_before_the_model_is_loaded(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("one two three")
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(CalibrationError, match="give more text"):
        hf.score(llama_dir, tmp_path / "short.txt")
