"""What recovery writes, and that it is never worse than what it was given."""

import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from short_recovery import SHORT
from transformers import AutoModelForCausalLM

import hfprune_fast as hf
from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.loading import load_model
from hfprune_fast.checkpoint.pretrained import load_tokenizer
from hfprune_fast.data.calibration import token_windows
from hfprune_fast.engine import streaming
from hfprune_fast.errors import CheckpointError, NumericsError
from hfprune_fast.recovery import teacher
from hfprune_fast.recovery.student import Student

Recover = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = "model.safetensors"


def other_text() -> Any:
    return token_windows(
        TINY_MODEL / "heldout.txt", load_tokenizer(TINY_MODEL), seq_len=64, samples=16,
        vocab_size=4096,
    ).split(8)  # fmt: skip


def kl_of(folder: Path) -> float:
    dense = load_model(TINY_MODEL, dtype="float32", device="cpu")
    pruned = load_model(folder, dtype="float32", device="cpu")
    return hf.evaluate(dense, pruned, other_text()).kl_nats


FULL = {"lora": 0, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("custom", FULL),
        ("padded", {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("uniform", {}),
                ("uniform", FULL),
                ("custom", {}),
                ("padded", FULL),
            )
        ),
    ],
)
def test_a_recovered_checkpoint_is_closer_and_of_the_same_layout(
    recover: Recover, halves: Any, tmp_path: Path, layout: str, options: dict[str, Any]
) -> None:
    result = recover(layout, **options)
    before, after = halves(layout), tmp_path / "out"
    assert result["kl_after"] < 0.9 * result["kl_before"]
    assert kl_of(after) < 0.9 * kl_of(before)  # on text that it has not seen
    assert (after / "config.json").read_text() == (before / "config.json").read_text()
    assert {p.name for p in after.iterdir()} == {p.name for p in before.iterdir()}
    old, new = load_file(before / WEIGHTS), load_file(after / WEIGHTS)
    assert {n: (t.dtype, t.shape) for n, t in old.items()} == {
        n: (t.dtype, t.shape) for n, t in new.items()
    }
    for name, tensor in old.items():  # padding has no weight, and gets none
        assert not bool(new[name][tensor == 0].any()), name
    assert not (tmp_path / "out.recovery").exists()


def test_a_precision_of_accelerates_launcher_is_not_taken(
    recover: Recover, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """dtype says what is computed in; the launcher's configuration sets this for every program."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert recover()["losses"] == whole["losses"]
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_the_record_and_the_card_say_what_was_done(
    recover: Recover, halves: Any, tmp_path: Path, text: Path, hfprune: Callable[..., Any]
) -> None:
    result = recover(loss="kl+ce")
    record = json.loads((tmp_path / "out" / "hfprune.json").read_text())
    before = json.loads((halves("custom") / "hfprune.json").read_text())
    for key in ("base_model", "achieved", "requested", "provenance", "keep"):
        assert record[key] == before[key]
    recovery = record["recovery"]
    assert {key: recovery[key] for key in ("lora", "loss", "tokens", "kl_before", "kl_after")} == {
        "lora": 4, "loss": "kl+ce", "tokens": 32 * 24,
        "kl_before": result["kl_before"], "kl_after": result["kl_after"],
    }  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No training followed" not in card
    trained = "KL from the dense model and cross entropy of the text"
    assert f"It was then trained by {trained}." in card
    assert f"| recovery | LoRA of rank 4, by {trained} |\n| recovery text | {text.name}" in card
    assert f"{result['kl_before']:.4f} to {result['kl_after']:.4f} nats" in card
    assert len(record["files"]) == len(list((tmp_path / "out").iterdir()))
    evaluate = ["evaluate", "demo", tmp_path / "out", "--text", text, "--seq-len", 64]
    export = ["export", tmp_path / "out", "--to", "padded", "--out", tmp_path / "padded"]
    assert hfprune(*export).code == 0
    assert f"It was then trained by {trained}." in (tmp_path / "padded" / "README.md").read_text()
    assert hfprune("report", tmp_path / "padded", "--out", tmp_path / "page.html").code == 0
    assert f"It was then trained by {trained}." in (tmp_path / "page.html").read_text()
    said = hfprune(*evaluate, "--samples", 2).err
    assert f"{text.name} was also the text that it was trained on" in said


def test_adapters_are_loaded_by_peft_onto_the_pruned_model(
    recover: Recover, halves: Any, tmp_path: Path
) -> None:
    from peft import PeftModel

    whole = recover("padded")
    recover("padded", "adapter", adapter=True, tokens=64)  # replaced, as its record lists it
    adapter = recover("padded", "adapter", adapter=True, force=True)
    assert adapter["held_out"] == whole["held_out"]
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "# Adapters for padded\n" in card
    assert "| recovery | LoRA of rank 4, by KL from the dense model |" in card
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(halves("padded"))
    ids = torch.arange(40)[None] * 7
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(halves("padded"), dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        expected, got = merged(ids).logits, adapted(ids).logits
    stored = load_file(tmp_path / "out" / WEIGHTS)["model.layers.0.mlp.up_proj.weight"].dtype
    # What is written is rounded to the checkpoint's dtype, each weight by half a unit at most.
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < 4 * torch.finfo(stored).eps
    down = adapted.merge_and_unload().model.layers[0].mlp.down_proj.weight
    padded = load_file(halves("padded") / WEIGHTS)["model.layers.0.mlp.down_proj.weight"] == 0
    assert not bool(down[padded].any())


@pytest.mark.parametrize("options", [{}, pytest.param({"lora": 0}, marks=pytest.mark.slow)])
def test_what_got_worse_is_not_written(
    recover: Recover, halves: Any, tmp_path: Path, capfd: Any, options: dict[str, Any]
) -> None:
    result = recover(**options | {"learning_rate": 100.0})
    assert result["kl_after"] == result["kl_before"] < result["held_out"][-1][1]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (halves("custom") / WEIGHTS).read_bytes()
    line = "hfprune: no step was better on held-out text; the pruned model is written unchanged"
    assert line in capfd.readouterr().err.splitlines()


def test_fine_tuning_is_judged_by_cross_entropy(tmp_path: Path, text: Path) -> None:
    cut = {"criterion": "magnitude", "select": "statistic", "refit": "none", "device": "cpu"}
    hf.oneshot(TINY_MODEL, None, tmp_path / "pruned", prune_ratio=0.02, round_to=1, **cut)
    tuning = SHORT | {"loss": "ce"}
    result = hf.recover(TINY_MODEL, tmp_path / "pruned", text, tmp_path / "out", **tuning)
    assert result["kl_after"] == dict(result["held_out"])[result["best_step"]] > result["kl_before"]
    windows = token_windows(
        text, load_tokenizer(TINY_MODEL), seq_len=32, samples=64, vocab_size=4096
    )
    pruned, tuned = (
        load_model(tmp_path / name, dtype="float32", device="cpu") for name in ("pruned", "out")
    )
    found = hf.evaluate(pruned, tuned, windows.split(8))
    assert found.ppl_pruned < found.ppl_dense  # which are of the tuned one, and of that before


@pytest.mark.slow
def test_a_single_step_trains(recover: Recover) -> None:
    result = recover(tokens=256, batch_tokens=10**6)
    assert (result["steps"], result["tokens"], result["best_step"]) == (1, 256, 1)
    assert result["kl_after"] < result["kl_before"]


@pytest.mark.slow
def test_a_dense_model_of_other_weights_is_named(
    recover: Recover, tmp_path: Path, capfd: Any
) -> None:
    recover()
    record = json.loads((tmp_path / "out" / "hfprune.json").read_text())
    assert "was pruned from" not in capfd.readouterr().err
    record["provenance"]["model_fingerprint"] = "another's"
    (tmp_path / "out" / "hfprune.json").write_text(json.dumps(record))
    text = TINY_MODEL / "calibration.txt"
    hf.recover(TINY_MODEL, tmp_path / "out", text, tmp_path / "again", **SHORT)
    assert "out was pruned from tiny, whose weights are not those of tiny" in capfd.readouterr().err


def test_a_recovery_that_diverges_stops(recover: Recover, capfd: Any) -> None:
    result = recover(learning_rate=1e30, tokens=31 * 64)
    assert result["kl_after"] == result["kl_before"]
    assert result["held_out"] == []
    assert result["losses"] == []  # none is the mean of those before
    assert (result["steps"], result["tokens"]) == (4, 4 * 64)
    assert "held-out loss is NaN or inf after step 4, and training stops" in capfd.readouterr().err
    json.dumps(result, allow_nan=False)


def test_a_damaged_pruned_model_is_refused_before_the_dense_one_runs(
    recover: Recover, halves: Any, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, name = tmp_path / "damaged", "model.layers.2.mlp.up_proj.weight"
    shutil.copytree(halves("custom"), damaged)
    tensors = load_file(damaged / WEIGHTS)
    tensors[name][3, 5] = torch.inf
    save_file(tensors, damaged / WEIGHTS, {"format": "pt"})
    monkeypatch.setattr(teacher, "open_model", lambda *_: pytest.fail("the dense model runs"))
    with pytest.raises(NumericsError, match=f"tensor {name} holds NaN or inf; the checkpoint is"):
        hf.recover(TINY_MODEL, damaged, text, tmp_path / "out", **SHORT)
    record = json.loads((damaged / "hfprune.json").read_text())
    (damaged / "hfprune.json").write_text(json.dumps(record | {"achieved": {}}))
    with pytest.raises(CheckpointError, match=r"hfprune\.json is damaged, or not written by"):
        hf.recover(TINY_MODEL, damaged, text, tmp_path / "out", **SHORT)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_an_adapter_that_made_it_worse_adds_nothing(recover: Recover, tmp_path: Path) -> None:
    recover(learning_rate=100.0, adapter=True)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)


def test_the_dense_model_is_gone_while_the_pruned_one_trains(
    recover: Recover, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, there = list[Any](), list[int]()
    build, forward = loading.build, Student.forward

    def noted(plan: Any) -> Any:
        built.append(weakref.ref(build(plan)))
        return built[-1]()

    def counted(*args: Any, **options: Any) -> Any:
        there.append(sum(model() is not None for model in built))
        return forward(*args, **options)

    for module in (loading, streaming):
        monkeypatch.setattr(module, "build", noted)
    monkeypatch.setattr(Student, "forward", counted)
    recover(tokens=64)
    assert len(built) == 2
    assert set(there) == {1}


@pytest.mark.slow
def test_a_resident_teacher_gives_the_same_losses(recover: Recover) -> None:
    cached = recover()
    resident = recover(teacher="resident", force=True)
    for key in ("losses", "held_out"):
        assert dict(resident[key]) == pytest.approx(dict(cached[key]), rel=1e-4)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_memory(recover: Recover) -> None:
    plain, checkpointed = recover(), recover(gradient_checkpointing=True, force=True)
    assert dict(checkpointed["losses"]) == pytest.approx(dict(plain["losses"]), rel=1e-4)


@pytest.mark.slow
def test_the_batch_size_changes_nothing_but_memory(recover: Recover) -> None:
    two, one = recover(batch_size=2), recover(batch_size=1, force=True)
    assert dict(one["losses"]) == pytest.approx(dict(two["losses"]), rel=1e-4)


@pytest.mark.slow
def test_mlps_alone_are_trained_on_request(recover: Recover, halves: Any, tmp_path: Path) -> None:
    for options in ({}, FULL):
        recover(train="mlp", force=True, **options)
        old, new = load_file(halves("custom") / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        assert changed == {name for name in old if ".mlp." in name}


def test_cross_entropy_lowers_the_loss_of_the_text(
    recover: Recover, whole: dict[str, Any], tmp_path: Path
) -> None:
    """The dense model runs over the held-out windows alone, of which KL is told all the same."""
    cache = tmp_path / "states"
    found = recover(loss="ce", cache=cache)
    losses = [loss for _, loss in found["losses"]]
    assert losses[-1] < losses[0]
    with safe_open(cache, framework="pt") as opened:
        assert opened.get_slice("hidden").get_shape()[:2] == [SHORT["held_out"], SHORT["seq_len"]]
    assert found["kl_before"] == whole["kl_before"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, FULL])
def test_bfloat16_trains_in_float32(
    recover: Recover, halves: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Its products are rounded; what is trained, and the file of hidden states, are as they are."""
    cache = tmp_path / "states"
    half = recover(dtype="bfloat16", cache=cache, **options)
    full = recover(out="full", **options)
    with safe_open(cache, framework="pt") as opened:
        assert opened.get_tensor("hidden").dtype == torch.bfloat16
    assert half["kl_before"] == pytest.approx(full["kl_before"], rel=0.05)
    assert half["kl_after"] == pytest.approx(full["kl_after"], rel=0.05)
    assert half["kl_after"] < 0.9 * half["kl_before"]
