"""bench/baselines: each method against a case worked out apart from it, in float64."""

import copy
from argparse import Namespace
from pathlib import Path
from typing import Any

import activations
import fidelity
import flap
import grail
import pytest
import torch
import weight_taylor
from activations import Moments
from family_models import tiny_family_model
from family_truth import Float64
from fidelity_baselines import Baselines
from fidelity_subject import Pruning, Subject
from fidelity_variants import FLAP, PUBLISHED, SDMPRUNE, Variant
from tiny_mixtures import tiny_mixture
from torch import Tensor
from transformers import PreTrainedModel

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import CalibrationOptions
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.errors import ArgumentError
from hfprune_fast.models.spec import spec_of

# Four tokens, three neurons, two outputs.
ACTS = torch.tensor([[1, 2, 0], [3, 2, 0], [5, 2, 4], [7, 2, 0]], dtype=torch.float64)
DOWN = torch.tensor([[1, 0, 2], [-1, 3, 0]], dtype=torch.float64)
MOMENTS = Moments(4, ACTS.sum(dim=0)[None], ACTS.square().sum(dim=0)[None])
IDS = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(0))


def close(found: Tensor, want: Tensor | list[float], rtol: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.as_tensor(want, dtype=found.dtype), rtol=rtol, atol=0)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_family_model("llama")


def acts_of(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """act_fn(gate(x)) * up(x) of each layer, (tokens, F), from what its MLP is given."""
    seen: list[Tensor] = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        for layer in model.model.layers
    ]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    found = []
    for layer, x in zip(model.model.layers, seen, strict=True):
        gate, up = layer.mlp.gate_proj(x), layer.mlp.up_proj(x)
        found.append(gate * torch.sigmoid(gate) * up)
    return found


def test_acts_are_summed_over_all_tokens(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "BATCH", 1)
    found, grams = activations.moments(model, IDS), activations.grams(model, IDS)
    assert found.tokens == IDS.numel()
    # Norms are fp32 inside, also where sequences run together: a last bit is 1.2e-7.
    for layer, act in enumerate(acts_of(model, IDS)):
        torch.testing.assert_close(found.mean[layer], act.mean(dim=0), rtol=1e-5, atol=1e-6)
        close(found.variance[layer], act.var(dim=0), rtol=1e-5)
        torch.testing.assert_close(grams[layer], act.T @ act, rtol=1e-5, atol=1e-5)


def test_flap_by_hand() -> None:
    # Means 4, 2, 1; squared deviations 9 + 1 + 1 + 9, 0, 1 + 1 + 9 + 1; columns' norms² 2, 9, 4.
    close(flap.fluctuation(MOMENTS, [DOWN])[0], [20 / 3 * 2, 0.0, 12 / 3 * 4])
    mean = (40 / 3 + 16) / 3
    squares = (40 / 3 - mean) ** 2 + mean**2 + (16 - mean) ** 2
    std = (squares / 3) ** 0.5
    close(flap.flap(MOMENTS, [DOWN])[0], [(40 / 3 - mean) / std, -mean / std, (16 - mean) / std])
    # Neuron 0 stays: 2 of neuron 1 times (0, 3), and 1 of neuron 2 times (2, 0).
    close(flap.compensating_bias(MOMENTS, [DOWN], {0: torch.tensor([0])})[0], [2.0, 6.0])


def test_wanda_sp_by_hand() -> None:
    close(flap.wanda_sp(MOMENTS, [DOWN])[0], [2 * 84**0.5, 3 * 4.0, 2 * 4.0])


def test_flap_has_one_threshold_for_all_layers(model: PreTrainedModel) -> None:
    baselines = Baselines(model, spec_of(model), IDS)
    keep = baselines.keep(FLAP, 0.3)
    down = [layer.mlp.down_proj.weight for layer in model.model.layers]
    scores = torch.stack(
        [
            act.var(dim=0) * weight.norm(dim=0) ** 2
            for act, weight in zip(acts_of(model, IDS), down, strict=True)
        ]
    )
    scores = (scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True)
    threshold = scores.flatten().sort().values[-3 * 28]  # of 3 layers of 40 neurons
    for layer, kept in keep.items():
        assert kept.tolist() == (scores[layer] >= threshold).nonzero()[:, 0].tolist()
    assert len({len(kept) for kept in keep.values()}) > 1


def test_grail_by_hand() -> None:
    # G = [[5, 7], [7, 10]]; column 0 stays, and a_1 is 7/5 of a_0 by least squares.
    acts = torch.tensor([[1, 1], [2, 3]], dtype=torch.float64)
    weight, gram = torch.tensor([[1, 5], [-1, 10]], dtype=torch.float64), acts.T @ acts
    kept = torch.tensor([0])
    close(grail.reconstruct(weight, gram, kept, 0.0)[:, 0], [1 + 7.0, -1 + 14.0])
    close(grail.reconstruct(weight, gram, kept, 0.1)[:, 0], [40 / 5.5, 65 / 5.5])
    close(grail.reconstruct(weight, gram, torch.tensor([0, 1]), 0.0), weight, rtol=1e-10)


def test_grail_is_least_squares_with_a_ridge() -> None:
    drawn = torch.Generator().manual_seed(0)
    acts, weight = (torch.randn(n, 7, generator=drawn, dtype=torch.float64) for n in (30, 4))
    kept = torch.tensor([0, 2, 3, 6])
    ridge = (0.02 * acts[:, kept].square().sum(dim=0).mean()).sqrt()
    rows = torch.cat([acts[:, kept], ridge * torch.eye(4, dtype=torch.float64)])
    targets = torch.cat([acts @ weight.T, torch.zeros(4, 4, dtype=torch.float64)])
    want = torch.linalg.lstsq(rows, targets).solution.T
    close(grail.reconstruct(weight, acts.T @ acts, kept, 0.02), want, rtol=1e-9)


def test_grail_in_turn_sees_the_pruned_layers_before(model: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keep = {layer: torch.arange(0, 40, 2) for layer in range(3)}
    found = grail.reconstruct_in_turn(model, IDS, keep)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    for layer in range(3):
        # Earlier layers pruned and compensated, this one and the later ones dense.
        part = copy.deepcopy(model)
        for earlier in range(layer):
            down = part.model.layers[earlier].mlp.down_proj.weight
            down.zero_()[:, keep[earlier]] = found[earlier]
        act, weight = acts_of(part, IDS)[layer], model.model.layers[layer].mlp.down_proj.weight
        # 18 tokens for 20 neurons: the ridge alone makes it solvable, so errors of fp32 norms grow.
        system = act[:, ::2].T @ act[:, ::2]
        system += 1e-3 * system.diagonal().mean() * torch.eye(20, dtype=torch.float64)
        want = weight @ act.T @ act[:, ::2] @ system.inverse()
        torch.testing.assert_close(found[layer], want, rtol=1e-3, atol=1e-3)


def weights_of(model: PreTrainedModel, neuron: int) -> list[Tensor]:
    """The rows of gate and up and the column of down of a neuron of layer 1, as views."""
    mlp = model.model.layers[1].mlp
    width = mlp.down_proj.weight.shape[1]
    if hasattr(mlp, "gate_up_proj"):
        rows = [mlp.gate_up_proj.weight[neuron], mlp.gate_up_proj.weight[width + neuron]]
    else:
        rows = [mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron]]
    return [*rows, mlp.down_proj.weight[:, neuron]]


def losses(model: PreTrainedModel, ids: Tensor, teacher: Tensor | None = None) -> Tensor:
    """Mean cross entropy of each sequence (N,), or SDMPrune's loss at α 0.4 and τ 0.2."""
    log_q = model(input_ids=ids).logits.log_softmax(dim=-1)
    cross_entropy = -log_q[:, :-1].gather(2, ids[:, 1:, None])[..., 0].mean(dim=1)
    if teacher is None:
        return cross_entropy
    log_p = (teacher / 0.2).log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean(dim=1)
    return 0.6 * cross_entropy + 0.4 * kl


def terms_by_differences(
    model: PreTrainedModel, neuron: int, teacher: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A neuron's weights w (W,) and the gradient of each sequence's loss in them, (N, W)."""
    step, weights, gradients = 1e-5, [], []
    for part in weights_of(model, neuron):
        for i, value in enumerate(part.tolist()):
            weights.append(value)
            sides = []
            for moved in (value + step, value - step):
                part[i] = moved
                sides.append(losses(model, IDS, teacher))
            part[i] = value
            gradients.append((sides[0] - sides[1]) / (2 * step))
    return torch.tensor(weights, dtype=torch.float64), torch.stack(gradients, dim=1)


# Differences at a step h err by h² of the third derivative and by a rounding of the loss over h,
# 1e-10 each where these are about 1.
DIFFERENCES = 1e-6


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_llm_pruner_and_sdmprune_by_differences(family: str) -> None:
    with Float64():
        model = tiny_family_model(family, num_hidden_layers=2)
        pruner, light = weight_taylor.importance(model, IDS)
        w, g = terms_by_differences(model, 3)
    close(pruner[1, 3], (w * (g[0] + g[1]) / 2).abs().sum(), DIFFERENCES)
    close(light[1, 3], (w * g[0]).abs().sum() + (w * g[1]).abs().sum(), DIFFERENCES)


def test_self_distillation_by_differences() -> None:
    with Float64():
        dense = tiny_family_model("llama", num_hidden_layers=2)
        once = copy.deepcopy(dense)
        hf.prune(once, {layer: torch.arange(1, 40) for layer in range(2)})
        loss = weight_taylor.self_distillation(dense, 0.4, 0.2)
        found = weight_taylor.importance(once, IDS, loss).of_each
        w, g = terms_by_differences(once, 3, dense(input_ids=IDS).logits)
    close(found[1, 3], (w * g[0]).abs().sum() + (w * g[1]).abs().sum(), DIFFERENCES)
    assert not any(p.requires_grad for m in (dense, once) for p in m.parameters())


def test_sdmprune_cuts_twice() -> None:
    model = tiny_family_model("llama", num_hidden_layers=2, intermediate_size=80)
    baselines = Baselines(model, spec_of(model), IDS)
    first = weight_taylor.importance(model, IDS).of_each
    light = [row.argsort(descending=True)[:78].sort().values for row in first]  # 2.5 % of 80
    once = copy.deepcopy(model)
    hf.prune(once, dict(enumerate(light)))
    for ratio, width, settings in ((0.2, 64, (0.4, 0.2)), (0.5, 40, (0.42, 0.5))):
        loss = weight_taylor.self_distillation(model, *settings)
        second = weight_taylor.importance(once, IDS, loss).of_each
        keep = baselines.keep(SDMPRUNE, ratio)
        for layer, row in enumerate(second):
            left = row.argsort(descending=True)[:width].sort().values
            assert torch.equal(keep[layer], light[layer][left])
    (kept, _) = baselines.keep(SDMPRUNE, 0.0125).values()  # no more than the light cut
    assert torch.equal(kept, first[0].argsort(descending=True)[:79].sort().values)
    published = map(weight_taylor.published_settings, (0.1, 0.3, 0.4, 0.5, 0.6))
    assert list(published) == [(0.4, 0.2)] * 2 + [(0.42, 0.5)] * 2 + [(0.1, 0.2)]


def test_all_remove_as_many_neurons(model: PreTrainedModel) -> None:
    baselines = Baselines(model, spec_of(model), IDS)
    for variant in PUBLISHED:
        keep = baselines.keep(variant, 0.3)
        assert sum(map(len, keep.values())) == 3 * 28
        weights, biases = baselines.correction(variant, keep)
        assert (weights is not None) == variant.correction.startswith("grail"), variant
        assert (biases is not None) == (variant.correction == "bias"), variant


def test_the_bias_is_measured() -> None:
    """As if each removed neuron had its mean activation at every token."""
    held_out, calibration = (
        calibrate(TINY_MODEL / name, open_source("demo"), CalibrationOptions(4, 64))
        for name in ("heldout.txt", "calibration.txt")
    )
    subject = Subject(open_source("demo"), held_out)
    baselines = Baselines(subject.model, subject.source.spec, calibration.batches[0].ids)
    keep = baselines.keep(FLAP, 0.3)
    pruning = Pruning(keep, *baselines.correction(FLAP, keep))
    found = subject.held_out.measure(subject.pruned(pruning))

    constant = copy.deepcopy(subject.model)
    for layer, act in enumerate(acts_of(subject.model, calibration.batches[0].ids)):
        removed = torch.ones(act.shape[1], dtype=torch.bool)
        removed[keep[layer]] = False

        def hook(_: object, args: Any, gone: Tensor = removed, act: Tensor = act) -> Any:
            return (torch.where(gone, act.mean(dim=0), args[0]),)

        constant.model.layers[layer].mlp.down_proj.register_forward_pre_hook(hook)
    want = hf.evaluate(subject.model, constant, held_out.batches[0].ids)
    assert found.kl_nats == pytest.approx(want.kl_nats, rel=1e-3)
    without = subject.held_out.measure(subject.pruned(Pruning(keep)))
    assert without.kl_nats != pytest.approx(want.kl_nats, rel=1e-2)


def test_models_with_experts_have_no_such_rows() -> None:
    asked = Namespace(rows="baselines", ratios=None)
    with pytest.raises(ArgumentError, match="--rows baselines is of models without experts"):
        list(fidelity._requested(asked, spec_of(tiny_mixture("mixtral"))))
    with pytest.raises(ValueError, match="one gated MLP in each layer"):
        activations.gated_mlps(tiny_mixture("mixtral"))


def test_names_of_variants() -> None:
    assert str(FLAP) == "flap fluctuation, bias, global"
    assert str(Variant("wanda_sp", "weight × act", correction="grail")) == (
        "wanda_sp weight × act, grail"
    )
    assert Path(flap.__file__).parent.name == "baselines"
