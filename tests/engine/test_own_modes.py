"""The caller's autocast, inference mode and the like change no result and no model."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from checkpoints import random_llama

import hfprune_fast as hf
from hfprune_fast.errors import ArgumentError, UnsupportedModelError


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", [autocast, torch.inference_mode, torch.no_grad, default_dtype])
def test_the_callers_modes_change_nothing(mode: Any) -> None:
    model, ids = random_llama().train(), torch.arange(64).view(2, 32)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    down = model.model.layers[0].mlp.down_proj
    down.weight.grad = torch.ones_like(down.weight)
    keep = {layer: torch.arange(0, 96, 2) for layer in range(3)}

    def results() -> list[torch.Tensor]:
        table = hf.score(model, [ids.clone()], criterion=("entropy", "fisher"), obs=True)
        by_path = hf.score("demo", [ids.clone()], dtype="float32")
        refitted = hf.refit_down_proj(model, [ids.clone()], keep)
        pruned = copy.deepcopy(model)
        hf.prune(pruned, keep, down_proj=refitted)
        fidelity = hf.evaluate(model, pruned, [ids.clone()])
        return [*table.statistics.values(), by_path.l1, *refitted.values(),
                torch.tensor([fidelity.kl_nats], dtype=torch.float64)]  # fmt: skip

    def state() -> list[Any]:
        return [(m.training, m._forward_hooks, m._forward_pre_hooks) for m in model.modules()] + [
            (p.requires_grad, p.dtype, p._version, p.grad is None) for p in model.parameters()
        ]

    expected, before = results(), state()
    with mode():
        got = results()
        assert torch.is_autocast_enabled("cpu") == (mode is autocast)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert state() == before


def test_a_model_made_in_inference_mode_is_refused_before_it_is_touched() -> None:
    with torch.inference_mode():
        model = random_llama().train()
    with pytest.raises(ArgumentError, match=r"was made in torch\.inference_mode.*outside, or give"):
        hf.score(model, torch.arange(32)[None])
    assert model.training


def test_a_decoder_that_runs_a_layer_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llama()
    decoder = type(model.model)
    usual = decoder.forward

    def twice(self: Any, *args: Any, **options: Any) -> Any:
        layers = self.layers
        self.layers = torch.nn.ModuleList([*layers, layers[0]])
        try:
            return usual(self, *args, **options)
        finally:
            self.layers = layers

    monkeypatch.setattr(decoder, "forward", twice)
    monkeypatch.setattr(model.config, "num_hidden_layers", 4)
    with pytest.raises(UnsupportedModelError, match="does not run its layers one after the other"):
        hf.score(model, torch.arange(32)[None])


def test_a_decoder_that_works_between_its_layers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_llama()

    def between(self: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden + 1)
        return self.norm(hidden)

    monkeypatch.setattr(type(model.model), "forward", between)
    with pytest.raises(UnsupportedModelError, match="does not run its layers one after the other"):
        hf.score(model, torch.arange(32)[None])
