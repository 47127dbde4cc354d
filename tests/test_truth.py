"""The truth is itself checked: against transformers, finite differences and cases done by hand."""

import math
from typing import Any

import pytest
import torch
from eager import eager_scores
from exact import make_float64_exact
from tolerances import assert_no_worse, keep_differences_inside_band, relative_error
from torch import Tensor
from truth import entropy, forward, kl_nats, scores, tiny_model

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def random_ids(*shape: int, vocab_size: int = 127, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def top(values: Tensor, n_keep: int) -> Tensor:
    kept: Tensor = values.topk(n_keep).indices.sort().values
    return kept


def assert_logits_match(model: Any, ids: Tensor) -> None:
    """Of a model made exact, in which only the order of float64 roundings differs."""
    expected = model(ids[None], use_cache=False).logits[0]
    state_dict = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state_dict["lm_head.weight"]  # a saved checkpoint has it once
    logits = forward(state_dict, model.config, ids).logits.detach()
    assert logits.dtype == torch.float64
    assert relative_error(logits.flatten(), expected.flatten()) < 1e-13


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_and_eager_torch_once_their_fp32_is_replaced(
    family: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sequences = tiny_model(family, tied=tied), random_ids(2, 32)
    make_float64_exact(model, monkeypatch)
    assert_logits_match(model, sequences[0])
    exact = scores(model.state_dict(), model.config, sequences)
    for statistic, value in eager_scores(model, sequences).items():
        assert relative_error(value, exact[statistic]).max() < 1e-13, statistic


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_theta": 500.0}}),
        ("qwen3", {"attention_bias": True, "head_dim": 8, "num_key_value_heads": 1}),
        ("qwen2", {"rms_norm_eps": 0.5}),
        ("mistral", {"sliding_window": 7}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    ],
)
def test_logits_match_transformers_with_options(
    family: str, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(family, **overrides), random_ids(32)
    make_float64_exact(model, monkeypatch)
    assert_logits_match(model, ids)
    if "sliding_window" in overrides:  # which must be felt
        both = (model, tiny_model(family))
        narrow, wide = (forward(m.state_dict(), m.config, ids).logits.detach() for m in both)
        torch.testing.assert_close(narrow[:7], wide[:7])
        assert relative_error(narrow[7:].flatten(), wide[7:].flatten()) > 0.01


def test_refuses_what_it_does_not_know() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    refused: dict[str, Any] = {"rope": {"rope_parameters": rope}, "gelu": {"hidden_act": "gelu"}}
    for message, overrides in refused.items():
        model = tiny_model("llama", **overrides)
        with pytest.raises(ValueError, match=message):
            forward(model.state_dict(), model.config, random_ids(8))


@pytest.mark.parametrize("family", FAMILIES)
def test_removed_neurons_equal_rows_and_columns_cut_out(family: str) -> None:
    model, ids = tiny_model(family), random_ids(16)
    alive = torch.rand(3, 96, generator=torch.Generator().manual_seed(1)) > 0.3
    cut = dict(model.state_dict())
    for layer in range(3):
        name = f"model.layers.{layer}.mlp"
        for projection in ("gate_proj", "up_proj"):
            cut[f"{name}.{projection}.weight"] = cut[f"{name}.{projection}.weight"][alive[layer]]
        cut[f"{name}.down_proj.weight"] = cut[f"{name}.down_proj.weight"][:, alive[layer]]
    removed = forward(model.state_dict(), model.config, ids, alive=alive)
    assert all((act[:, ~live] == 0).all() for act, live in zip(removed.acts, alive, strict=True))
    torch.testing.assert_close(removed.logits, forward(cut, model.config, ids).logits)


# Central differences of step e miss x by e^2 / 6 times a third derivative: with e = 1e-4, 1e-8 of
# the scale of x times a factor that depends on the model (measured: 6), and roundoff of 1e-15 / e.
STEP = 1e-4
DIFFERENCE_RTOL = 1e-6


def mean_entropy(
    state_dict: dict[str, Tensor], config: Any, ids: Tensor, alive: Tensor | None = None
) -> float:
    return entropy(forward(state_dict, config, ids, alive=alive).logits).mean().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_statistic_follows_from_finite_differences_of_single_acts(family: str) -> None:
    overrides: dict[str, Any] = {"head_dim": 6} if family == "qwen3" else {}
    model = tiny_model(
        family, hidden_size=16, intermediate_size=6, num_hidden_layers=2, vocab_size=31, **overrides
    )
    state_dict, config = model.state_dict(), model.config
    sequences = random_ids(2, 5, vocab_size=31)
    x = torch.zeros(2, 2, 5, 6, dtype=torch.float64)  # sequence, layer, position, neuron
    a = torch.stack([torch.stack(forward(state_dict, config, ids).acts) for ids in sequences])
    for index in torch.cartesian_prod(*(torch.arange(size) for size in x.shape)).tolist():
        bump = torch.zeros_like(x[0])
        bump[tuple(index[1:])] = STEP
        ids = sequences[index[0]]
        rise = mean_entropy(state_dict, config, ids, 1 + bump)
        x[tuple(index)] = (rise - mean_entropy(state_dict, config, ids, 1 - bump)) / (2 * STEP)
    measured = {
        "l1": x.abs().sum((0, 2)),
        "l2": x.pow(2).sum((0, 2)),
        "fisher_mask": x.sum(2).pow(2).sum(0),
        "act": a.detach().pow(2).sum((0, 2)),
    }
    exact = scores(state_dict, config, sequences)
    for statistic, value in measured.items():
        assert relative_error(value, exact[statistic]).max() < DIFFERENCE_RTOL, statistic
    for ids, loss in zip(sequences, exact["loss"], strict=True):
        assert mean_entropy(state_dict, config, ids) == pytest.approx(loss.item(), rel=1e-14)


def test_tiny_models_are_peaked_and_depend_on_every_layers_acts() -> None:
    # A model near the uniform output, or deaf to its acts, would pass almost any test.
    for family in FAMILIES:
        model, ids = tiny_model(family), random_ids(32)
        dense = forward(model.state_dict(), model.config, ids).logits.detach()
        assert entropy(dense).mean() < 0.7 * math.log(127)
        for layer in range(3):
            alive = torch.ones(3, 96, dtype=torch.bool)
            alive[layer] = False
            pruned = forward(model.state_dict(), model.config, ids, alive=alive).logits.detach()
            assert kl_nats(dense, pruned).mean() > 0.05
        constant = [n for n, p in model.named_parameters() if (p == p.flatten()[0]).all()]
        assert constant == []


def test_tiny_model_draws_the_same_weights_for_every_dtype() -> None:
    double, half = tiny_model("qwen2"), tiny_model("qwen2", dtype=torch.bfloat16)
    for name, tensor in half.state_dict().items():
        assert torch.equal(tensor, double.state_dict()[name].to(torch.bfloat16)), name
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    other = tiny_model("qwen2", seed=1).state_dict()
    assert not torch.equal(other["lm_head.weight"], double.state_dict()["lm_head.weight"])


def test_entropy_by_hand() -> None:
    inf = math.inf
    rows = torch.tensor(
        [
            [3.0, 3.0, 3.0, 3.0],  # uniform
            [0.0, -inf, -inf, -inf],  # certain
            [1e4, 0.0, 0.0, 0.0],  # certain: the others underflow
            [5.0, -inf, 5.0, -inf],  # a fair coin
            [math.log(3.0), 0.0, -inf, -inf],  # 3/4, 1/4
        ],
        dtype=torch.float64,
        requires_grad=True,
    )
    biased = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    expected = torch.tensor([math.log(4), 0.0, 0.0, math.log(2), biased], dtype=torch.float64)
    torch.testing.assert_close(entropy(rows), expected, rtol=1e-15, atol=1e-15)
    (grad,) = torch.autograd.grad(entropy(rows).sum(), rows)
    p, log_p = rows.softmax(-1).detach(), rows.log_softmax(-1).detach()
    formula = torch.where(p == 0, 0.0, -p * (log_p + expected[:, None]))
    torch.testing.assert_close(grad, formula, rtol=0, atol=1e-15)
    assert entropy(torch.randn(3, 1, dtype=torch.float64)).tolist() == [0, 0, 0]


def test_kl_by_hand() -> None:
    inf = math.inf
    log_3 = math.log(3.0)
    # (1/2, 1/2) against (3/4, 1/4); certainty against uniform; a shift; an event ruled out.
    dense = torch.tensor([[0, 0, -inf], [0, -inf, -inf], [1, 2, 3], [0, 0, 0]])
    pruned = torch.tensor([[log_3, 0, -inf], [1, 1, 1], [2, 3, 4], [0, 0, -inf]])
    expected = torch.tensor([0.5 * math.log(4 / 3), math.log(3.0), 0.0, inf], dtype=torch.float64)
    torch.testing.assert_close(kl_nats(dense, pruned), expected, rtol=1e-7, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_errors_are_of_the_size_of_its_dtype(dtype: torch.dtype) -> None:
    # In units of eps: rounding must show (or the baseline is not of this dtype) and not explode.
    model, sequences = tiny_model("qwen3", dtype=dtype), random_ids(2, 32)
    exact = scores(model.state_dict(), model.config, sequences)["l1"]
    error = relative_error(eager_scores(model, sequences)["l1"], exact)
    eps = torch.finfo(dtype).eps
    assert (error > 0.1 * eps).all()
    assert (error < 20 * eps).all()


@pytest.fixture
def truth() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(3, 96, generator=generator, dtype=torch.float64) + 0.1


def off_by(truth: Tensor, relative: float) -> Tensor:
    """truth with a random error of exactly this relative size in every layer."""
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(4), dtype=truth.dtype)
    noise /= torch.linalg.vector_norm(noise, dim=-1, keepdim=True)
    noise *= torch.linalg.vector_norm(truth, dim=-1, keepdim=True)
    return truth + relative * noise


def test_no_worse_accepts_twice_the_eager_error_plus_the_floor(truth: Tensor) -> None:
    assert_no_worse(off_by(truth, 1.9e-3), off_by(truth, 1e-3), truth, floor=0.0)
    assert_no_worse(off_by(truth, 2.5e-3), off_by(truth, 1e-3), truth, floor=1e-3)
    assert_no_worse(truth, truth, truth, floor=0.0)
    dead = truth * torch.tensor([[1.0], [0.0], [1.0]])
    assert_no_worse(dead, dead, dead, floor=0.0)


def test_no_worse_rejects(truth: Tensor) -> None:
    eager = off_by(truth, 1e-3)
    one_bad_layer = off_by(truth, 1e-4)
    one_bad_layer[1] = off_by(truth, 2.1e-3)[1]
    one_lost_neuron, nan, infinite = truth.clone(), truth.clone(), truth.clone()
    one_lost_neuron[2, 95] = 0.0
    nan[0, 0], infinite[0, 0] = math.nan, math.inf
    for ours in (off_by(truth, 2.1e-3), one_bad_layer, one_lost_neuron, nan, infinite, truth[:1]):
        with pytest.raises(AssertionError):
            assert_no_worse(ours, eager, truth, floor=0.0)
    with pytest.raises(AssertionError):
        assert_no_worse(off_by(truth, 3.5e-3), eager, truth, floor=1e-3)
    same = truth[:1].expand(3, -1)
    with pytest.raises(AssertionError, match="shapes"):
        assert_no_worse(truth[:1], same, same, floor=0.0)
    # A broken baseline or a broken truth excuses nothing.
    for baseline, target in ((nan, truth), (infinite, truth), (eager, nan), (eager, truth * 0)):
        with pytest.raises(AssertionError):
            assert_no_worse(truth, baseline, target, floor=0.0)


def test_no_worse_names_the_layer_and_the_numbers(truth: Tensor) -> None:
    ours = truth.clone()
    ours[1] *= 1.5
    with pytest.raises(AssertionError, match=r"layer 1: error 5\.000e-01.* 2 \* .*1 of 3 layers"):
        assert_no_worse(ours, off_by(truth, 1e-3), truth, floor=1e-6)


def test_band_accepts_what_rounding_explains(truth: Tensor) -> None:
    exact, noisy = truth[0], off_by(truth, 0.05)[0]
    kept, kept_noisy = top(exact, 48), top(noisy, 48)
    n_different = len(set(kept.tolist()) ^ set(kept_noisy.tolist()))
    assert n_different > 0
    assert keep_differences_inside_band(noisy, exact, kept_noisy, kept) == n_different
    assert keep_differences_inside_band(exact, exact, kept, kept) == 0
    tie = torch.tensor([2.0, 1.0, 1.0, 0.0])
    first, second = torch.tensor([0, 1]), torch.tensor([0, 2])
    assert keep_differences_inside_band(tie, tie, first, second) == 2


def test_band_is_the_sum_of_the_two_errors() -> None:
    exact, first, second = torch.tensor([9.0, 2.0, 1.0]), torch.tensor([0, 1]), torch.tensor([0, 2])
    crossed, short_of_crossing = torch.tensor([9.0, 1.4, 1.6]), torch.tensor([9.0, 1.51, 1.49])
    assert keep_differences_inside_band(crossed, exact, second, first) == 2
    with pytest.raises(AssertionError, match="1 swaps"):
        keep_differences_inside_band(short_of_crossing, exact, second, first)


def test_band_rejects_a_selection_that_rounding_does_not_explain(truth: Tensor) -> None:
    exact = truth[0]
    nearly = off_by(truth, 1e-6)[0]
    order = exact.argsort(descending=True)
    kept = order[:48].sort().values
    second_best = torch.cat((order[:47], order[48:49]))  # one swap, of the two nearest to the cut
    one_for_the_worst = torch.cat((order[1:48], order[95:]))
    rejected = [
        ("1 swaps, not all by rounding", (nearly, exact, second_best, kept)),
        ("1 swaps, not all by rounding", (nearly, exact, one_for_the_worst, kept)),
        ("48 swaps, not all by rounding", (nearly, exact, order[48:], kept)),
        ("kept 47 neurons, not 48", (nearly, exact, order[:47], kept)),
        ("keep_ours must hold distinct", (nearly, exact, torch.cat((kept, kept[:1])), kept)),
        ("keep_ours must hold distinct", (nearly, exact, kept + 96, kept)),
        ("keep_truth does not hold the best", (nearly, exact, kept, second_best)),
        ("not finite", (nearly * math.nan, exact, kept, kept)),
        ("scores must be", (nearly[:95], exact, kept, kept)),
    ]
    for message, arguments in rejected:
        with pytest.raises(AssertionError, match=message):
            keep_differences_inside_band(*arguments)
