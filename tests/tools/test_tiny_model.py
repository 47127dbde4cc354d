"""tools/tiny_model.py: its recipes, each trained for a few steps."""

import json
from pathlib import Path

import pytest
import torch
from tiny_model import (
    RECIPES,
    VOCAB,
    new_model,
    next_token_loss,
    parse_arguments,
    train,
    training_loss,
)
from transformers import AutoConfig

from hfprune_fast.checkpoint.folder import TINY_MODEL


def test_the_default_recipe_is_that_of_the_model_that_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["tiny_model.py", "--out", str(tmp_path / "new")])
    args = parse_arguments()
    recipe = RECIPES[args.family]
    record = json.loads((TINY_MODEL / "training.json").read_text())
    for name in ("steps", "batch", "learning_rate", "weight_decay", "seed"):
        assert getattr(args, name) == record[name]
    assert list(recipe.heldout_range_nats) == record["heldout_range_nats"]
    model = new_model(recipe, bos=0, eos=1)
    assert model.num_parameters() == record["parameters"]
    shipped, config = AutoConfig.from_pretrained(TINY_MODEL).to_dict(), model.config.to_dict()
    of_the_file = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    for name in (shipped.keys() | config.keys()) - of_the_file:
        assert config.get(name) == shipped.get(name), name


def test_qwen3_has_another_shape_an_untied_head_and_norms() -> None:
    model = new_model(RECIPES["qwen3"], bos=0, eos=1)
    names = dict(model.named_parameters())
    assert names["lm_head.weight"] is not names["model.embed_tokens.weight"]
    assert names["model.layers.5.self_attn.q_norm.weight"].shape == (32,)
    D, F, L, V = 192, 576, 6, VOCAB
    attention = 2 * 6 * 32 * D + 2 * 2 * 32 * D + 2 * 32
    assert model.num_parameters() == 2 * V * D + L * (attention + 3 * D * F + 2 * D) + D
    assert not RECIPES["qwen3"].shape.items() & RECIPES["llama"].shape.items() - {
        ("num_key_value_heads", 2)
    }


def test_a_mixture_is_trained_to_choose_all_of_its_experts() -> None:
    torch.manual_seed(0)
    mixture = new_model(RECIPES["qwen2_moe"], bos=0, eos=1)
    E, D, F, L, V = 8, 128, 128, 4, VOCAB
    attention = 2 * D * D + 2 * D * D // 2 + 2 * D  # with biases of q, k and v
    mlps = (E + 1) * 3 * D * F + E * D + D  # a shared one, its gate, and the router
    assert mixture.num_parameters() == V * D + L * (attention + mlps + 2 * D) + D
    windows = torch.arange(514).view(2, 257)
    added = training_loss(mixture, windows) - next_token_loss(mixture, windows)
    # 2 if the 2 chosen are chosen evenly, times the coefficient.
    assert 0.019 < added.item() < 0.04
    dense = new_model(RECIPES["llama"], bos=0, eos=1)
    assert training_loss(dense, windows) == next_token_loss(dense, windows)


@pytest.mark.slow
@pytest.mark.parametrize("family", RECIPES)
def test_a_few_steps_lower_the_loss(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["tiny_model.py", "--family", family, "--steps", "4"]
    monkeypatch.setattr("sys.argv", [*argv, "--out", str(tmp_path / "new")])
    torch.manual_seed(0)
    model = new_model(RECIPES[family], bos=0, eos=1)
    stream = torch.arange(4_000) % 16
    window = stream[None, :257]
    before = next_token_loss(model, window).item()
    train(model, stream, parse_arguments())
    assert next_token_loss(model, window).item() < before
