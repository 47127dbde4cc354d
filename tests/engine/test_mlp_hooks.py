import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from eager import eager_scores
from exact import make_float64_exact
from taylor_truth import sums
from tolerances import assert_no_worse, relative_error
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from truth import tiny_model
from watch import Watch

import hfprune_fast as hf
from hfprune_fast.config import STATISTICS
from hfprune_fast.engine.mlp_hooks import TaylorOptions, known_activation
from hfprune_fast.engine.scored_graph import ScoredGraph
from hfprune_fast.models.sites import GatedMLP, parts_of

B, S, D, F = 2, 17, 32, 48
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_pytorch_tanh": lambda z: nn.functional.gelu(z, approximate="tanh"),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SEEN = torch.arange(S) < torch.tensor([[S], [6]])


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def llama_mlp(dtype: torch.dtype, act: str = "silu", bias: bool = False) -> GatedMLP:
    config = LlamaConfig(hidden_size=D, intermediate_size=F, hidden_act=act, mlp_bias=bias)
    mlp = LlamaMLP(config).to(dtype).requires_grad_(False)
    for seed, parameter in enumerate(mlp.parameters()):
        scale = 1.5 / math.sqrt(parameter.shape[1]) if parameter.ndim == 2 else 0.3
        parameter.copy_(random(*parameter.shape, seed=seed, dtype=torch.float64) * scale)
    return GatedMLP(mlp, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and d_out, whose padding has no gradient."""
    x, d_out = (random(B, S, D, seed=seed, dtype=dtype) for seed in (8, 9))
    return x, d_out.masked_fill(~SEEN[..., None], 0)


class Result(NamedTuple):
    out: Tensor
    statistics: Tensor  # (4, F)
    d_x: Tensor | None


def scored_run(
    mlp: GatedMLP, x: Tensor, d_out: Tensor, *,
    needs_grad: bool = True, only_backward: bool = False, grad_scale: float = 1.0,
) -> Result:  # fmt: skip
    graph = graph_of(mlp, x, needs_grad, only_backward, grad_scale)
    taken: list[Any] = []
    d_x = graph.backward(d_out * grad_scale, taken.append)
    (statistics,) = taken
    return Result(graph.output.detach(), torch.stack(statistics), d_x)


def graph_of(
    mlp: GatedMLP, x: Tensor, needs_grad: bool,
    only_backward: bool = False, grad_scale: float = 1.0,
) -> ScoredGraph:  # fmt: skip
    options = TaylorOptions(SEEN, grad_scale, False, "torch", known_activation(mlp))
    run = mlp.module
    return ScoredGraph(run, x, mlp, options, needs_grad=needs_grad, only_backward=only_backward)


def plain_run(mlp: GatedMLP, x: Tensor, d_out: Tensor, act: str, dtype: torch.dtype) -> Result:
    """The definition by autograd in dtype; the terms of the sums in fp32 at least."""
    weights = {name: p.detach().to(dtype) for name, p in mlp.module.named_parameters()}

    def linear(name: str, h: Tensor) -> Tensor:
        bias = weights.get(f"{name}_proj.bias")
        return nn.functional.linear(h, weights[f"{name}_proj.weight"], bias)

    x = x.detach().to(dtype).requires_grad_()
    a = ACTIVATIONS[act](linear("gate", x)) * linear("up", x)
    out = linear("down", a)
    g, d_x = torch.autograd.grad(out, (a, x), d_out.to(dtype))
    wide = torch.promote_types(dtype, torch.float32)
    a = a.detach().to(wide)
    return Result(out.detach(), sums(g.to(wide) * a, a, SEEN), d_x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_plain_torchs(dtype: torch.dtype, act: str, bias: bool) -> None:
    mlp, (x, d_out) = llama_mlp(dtype, act, bias), inputs(dtype)
    assert known_activation(mlp) is not None
    truth = plain_run(mlp, x, d_out, act, torch.float64)
    eager = plain_run(mlp, x, d_out, act, dtype)
    got = scored_run(mlp, x, d_out)
    first = scored_run(mlp, x, d_out, needs_grad=False)
    floor = 4 * torch.finfo(dtype).eps
    for ours in (got, first):
        assert torch.equal(ours.out, mlp.module(x))  # the model's own forward, bit for bit
        assert_no_worse(ours.statistics, eager.statistics, truth.statistics, floor=floor)
    assert first.d_x is None
    assert got.d_x is not None
    assert eager.d_x is not None
    assert truth.d_x is not None
    d_x = [d.flatten()[None] for d in (got.d_x, eager.d_x, truth.d_x)]
    assert_no_worse(*d_x, floor=floor)
    assert not got.d_x[~SEEN].any()


def test_a_power_of_two_in_the_gradient_is_taken_out_of_the_statistics() -> None:
    mlp, (x, d_out) = llama_mlp(torch.float32), inputs(torch.float32)
    for needs_grad in (True, False):
        expected = scored_run(mlp, x, d_out, needs_grad=needs_grad)
        got = scored_run(mlp, x, d_out, needs_grad=needs_grad, grad_scale=64.0)
        assert torch.equal(got.statistics, expected.statistics)
        if got.d_x is not None:
            assert torch.equal(got.d_x, expected.d_x * 64)


@pytest.mark.parametrize("only_backward", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_gate_and_up_are_kept_and_only_act_in_the_first_layer(
    dtype: torch.dtype, needs_grad: bool, only_backward: bool
) -> None:
    mlp, (x, d_out) = llama_mlp(dtype), inputs(dtype)
    gate, up = mlp.gate(x), mlp.up(x)
    wanted = (gate, up) if needs_grad else (mlp.module.act_fn(gate) * up,)
    with Watch(x, *mlp.module.parameters()) as watch:
        graph = graph_of(mlp, x, needs_grad, only_backward)
    out = graph.output
    saved = out.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert len(saved) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(saved, wanted, strict=True))
    live_bytes = sum(size for ref, size in watch.live if not ref.expired())
    out_bytes = out.untyped_storage().nbytes()
    assert live_bytes - out_bytes == len(wanted) * B * S * F * dtype.itemsize
    if only_backward and needs_grad:
        assert watch.peak == live_bytes  # act is not even made
    for last in (False, True):
        graph.backward(d_out, lambda _: None, last=last)
        if needs_grad:  # after the last one, their gradients are where they were
            same = [torch.equal(a, b) for a, b in zip(saved, wanted, strict=True)]
            assert same == [not last] * 2


@pytest.mark.parametrize("needs_grad", [False, True])
def test_only_backward_poisons_the_output(needs_grad: bool) -> None:
    mlp, (x, d_out) = llama_mlp(torch.float32, bias=True), inputs(torch.float32)
    whole, poisoned = (
        scored_run(mlp, x, d_out, needs_grad=needs_grad, only_backward=only)
        for only in (False, True)
    )
    assert poisoned.out.shape == whole.out.shape
    assert poisoned.out.isnan().all()
    assert torch.equal(poisoned.statistics, whole.statistics)
    assert (whole.d_x is not None) == needs_grad
    if whole.d_x is not None:
        assert torch.equal(poisoned.d_x, whole.d_x)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_each_backward_delivers_its_own_until_the_last(needs_grad: bool, hooked: bool) -> None:
    mlp, (x, d_out) = llama_mlp(torch.float32), inputs(torch.float32)
    if hooked:
        mlp.module.register_forward_hook(lambda *_: None)
    graph = graph_of(mlp, x, needs_grad)
    first, second = [], []
    halved = graph.backward(d_out / 2, first.append, last=False)
    whole = graph.backward(d_out, second.append)
    assert torch.equal(first[0].l1, second[0].l1 / 2)
    assert (len(first), len(second)) == (1, 1)
    assert (halved is None) == (whole is None) == (not needs_grad)
    if halved is not None and whole is not None:
        assert torch.equal(halved, whole / 2)
    with pytest.raises(RuntimeError, match="run the forward again") as raised:
        graph.backward(d_out, first.append)
    assert "\n" not in str(raised.value)
    assert len(first) == 1


class Clamped(nn.Module):
    """Somebody's own MLP."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.down_proj((self.act_fn(self.gate_proj(h)) * self.up_proj(h)).clamp(-1))
        return out


class SiLU(nn.Module):
    """One of that name, but another function."""

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.sigmoid(1.7 * z)


CHANGES: dict[str, Callable[[Any], object]] = {
    "hook on the MLP": lambda mlp: mlp.register_forward_hook(lambda _, args, out: 0.5 * out),
    "hook before the MLP": lambda mlp: mlp.register_forward_pre_hook(
        lambda _, args: (0.5 * args[0],)
    ),
    "hook on up": lambda mlp: mlp.up_proj.register_forward_hook(lambda _, args, z: z.clamp(-1)),
    "hook on the activation": lambda mlp: mlp.act_fn.register_forward_hook(
        lambda _, args, out: out.clamp(max=0.5)
    ),
    "forward of its own": lambda mlp: setattr(mlp, "forward", Clamped(mlp).forward),
    "activation's forward of its own": lambda mlp: setattr(mlp.act_fn, "forward", torch.tanh),
    "activation of a known one's name": lambda mlp: setattr(mlp, "act_fn", SiLU()),
    "relu": lambda mlp: setattr(mlp, "act_fn", nn.ReLU()),
}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("how", [*CHANGES, "class of somebody's own"])
def test_an_mlp_that_is_not_known_is_hooked_and_scored_right(
    how: str, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", num_hidden_layers=2, intermediate_size=F, hidden_size=D)
    make_float64_exact(model, monkeypatch)
    # A model's activations are one object a layer, so a change is to one layer.
    changed = model.model.layers[layer]
    if how in CHANGES:
        CHANGES[how](changed.mlp)
    else:
        changed.mlp = Clamped(changed.mlp)
    mlps = parts_of(model).mlps
    assert [known_activation(mlp) is None for mlp in mlps] == [n == layer for n in range(2)]
    ids = torch.randint(127, (3, 12), generator=torch.Generator().manual_seed(1))
    expected = eager_scores(model, ids)
    table = hf.score(model, ids)
    for name in STATISTICS:  # float64 roundings, see the bound in test_layerwise.py
        assert relative_error(getattr(table, name), expected[name]).max() < 1e-12, name
