"""The default recipe stays as close to a trained model as the paper's, in every kind of family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from trained_family import WRAPPED, trained

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL

FAMILIES = {  # at which ratios: llama at both, the others by turns
    "llama": (0.2, 0.5),
    "phi3": (0.5,),  # gate and up in one tensor
    "granite": (0.2,),  # multipliers
    "gemma2": (0.5,),  # a norm behind the MLP, and logits capped
    "gemma3": (0.5,),  # the text tower of a model that has others
    "lfm2": (0.2,),  # convolutions and attention
    "qwen3_5_text": (0.5,),  # linear attention and attention
}
WINDOWS = {"samples": 16, "seq_len": 256}


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """Calibration and held-out text, of other documents than those of the training."""
    text = (TINY_MODEL / "heldout.txt").read_text(encoding="utf-8")
    files = tmp_path / "calibration.txt", tmp_path / "heldout.txt"
    for file, part in zip(files, (text[: len(text) // 2], text[len(text) // 2 :]), strict=True):
        file.write_text(part, encoding="utf-8")
    return files


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", FAMILIES)
def test_kl_of_the_default_is_not_above_the_papers(
    family: str,
    texts: tuple[Path, Path],
    save_checkpoint: Callable[..., Path],
    tmp_path: Path,
    measured: Callable[[str], None],
) -> None:
    dense = save_checkpoint(trained(family, steps=60))
    calibration, text = texts
    for ratio in FAMILIES[family]:
        size = {"prune_ratio": ratio, "round_to": 1}
        kl = {}
        for recipe in ("paper", "default"):
            out = tmp_path / f"{recipe}-{ratio}"
            done = hf.oneshot(
                dense, calibration, out, recipe=recipe, text=str(text), **size, **WINDOWS
            )
            kl[recipe] = done["fidelity"]["kl_nats"]
        measured(f"{family} {ratio:.0%}: KL {kl['paper']:.4f} paper, {kl['default']:.4f} default")
        assert kl["default"] <= kl["paper"]


@pytest.mark.parametrize("family", WRAPPED)
def test_a_text_tower_is_trained_like_its_own_family_and_the_same_every_time(family: str) -> None:
    tower, wrapper = trained(WRAPPED[family][0], steps=2), trained(family, steps=2)
    ids = torch.arange(40).view(1, 40)
    with torch.no_grad():
        assert torch.equal(wrapper(input_ids=ids).logits, tower(input_ids=ids).logits)
