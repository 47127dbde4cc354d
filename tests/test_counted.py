"""What the whole job never does and how much it multiplies, counted, in every way that it runs."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eager import eager_scores
from paths import PATHS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from traffic import allocations
from transformers import PreTrainedModel
from truth import tiny_model
from watch import Watch

import hfprune_fast as hf
from hfprune_fast.engine import layerwise
from hfprune_fast.engine.plan import Plan
from hfprune_fast.evaluation import fidelity
from hfprune_fast.scoring import job

BF16, FP32 = torch.bfloat16, torch.float32
# No two widths are alike, and none is a number of tokens: a product's shape tells what it is.
L, D, F, V = 3, 40, 56, 4096
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
SEQUENCES, B, S = 4, 2, 50
CHUNK_ROWS = 16
# A CPU's fp32 products of the head are another library's; Triton's interpreter is slow.
TRIED = [("torch", FP32), ("torch", BF16), ("cpp", BF16), ("triton", BF16)]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
ALL = ["stored", "recomputed", "disk", "cpu"]
# Where the weights are is nothing to a kernel: of the others, each way once or twice.
WAYS = {("torch", FP32): ["recomputed", "cpu"], ("torch", BF16): ALL}
every_path_and_way = pytest.mark.parametrize(
    ("backend", "dtype", "way"),
    [
        pytest.param(*path.values, way, marks=[*path.marks, pytest.mark.slow])
        if path.values[0] == "triton"
        else pytest.param(*path.values, way, marks=path.marks)
        for path in PATHS
        if path.values in TRIED
        for way in WAYS.get(path.values, ["stored", "disk"])
    ],
)


@pytest.fixture(autouse=True)
def _own_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused ones, which tests/engine/test_fused.py has, take the interpreter minutes."""
    monkeypatch.setattr(layerwise, "fused_modules", lambda *_: nullcontext())


@pytest.fixture
def model(dtype: torch.dtype) -> PreTrainedModel:
    sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "vocab_size": V}
    return tiny_model("qwen3", dtype=dtype, **sizes, **HEADS)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(V, (SEQUENCES, S), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def score(
    way: str,
    backend: str,
    model: PreTrainedModel,
    ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], hf.ImportanceTable]:
    """The whole job in one of its ways, with logits of a few rows at a time."""
    plan_run = job.plan_run

    def plan(*args: object, **kwargs: object) -> Plan:
        chosen = plan_run(*args, **kwargs)  # type: ignore[arg-type]
        budget = CHUNK_ROWS * V * model.dtype.itemsize
        return replace(chosen, recompute=way != "stored", logits_budget_bytes=budget)

    monkeypatch.setattr(job, "plan_run", plan)
    options = {"backend": backend, "batch_size": B}
    if way in ("stored", "recomputed"):
        model.requires_grad_(True)  # as it is loaded by transformers, for training
        return lambda: hf.score(model, ids, **options)
    model.save_pretrained(tmp_path)
    dtype = str(model.dtype).removeprefix("torch.")
    return lambda: hf.score(tmp_path, ids, offload=way, dtype=dtype, **options)


@every_path_and_way
def test_the_logits_are_never_whole(
    score: Callable[[], hf.ImportanceTable], dtype: torch.dtype
) -> None:
    with allocations() as sizes:
        table = score()
    assert table.provenance["tokens"] == SEQUENCES * S
    # A chunk's logits, of which plain torch makes some in fp32, or norm and head as one piece, each
    # from the beginning of a cache line.
    most = max(CHUNK_ROWS * V * 4, (V + 1) * D * dtype.itemsize + 2 * 64)
    assert max(sizes) <= most < B * S * V * dtype.itemsize / 2


@every_path_and_way
def test_products_are_those_documented_and_none_makes_a_gradient_of_a_weight(
    score: Callable[[], hf.ImportanceTable], way: str, model: PreTrainedModel
) -> None:
    """4 FLOPs a token and weight, 2 of them in the backward, of which the first layer has little.

    A layer that is recomputed runs forward once more, but for down_proj. Once, each MLP's formula
    is compared over 3 invented rows: 6 products more.
    """
    layer = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)
    forward = L * layer + V * D
    backward = forward - layer + F * D  # in the first layer, the gradient at down_proj's input
    again = 0 if way == "stored" else L * (layer - F * D)
    compared = 3 * L * 6 * F * D
    # torch's counter uses linear_entropy's registered formula; Watch counts its products.
    with Watch() as watch, FlopCounterMode(display=False) as counter:
        score()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in counts.items() if "scaled_dot_product" not in str(op))
    assert counted == watch.flops == 2 * (SEQUENCES * S * (forward + backward + again) + compared)
    assert not made_shapes(watch) & weight_shapes(model)
    assert not watch.trained


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_evaluation_never_has_whole_logits(
    model: PreTrainedModel, ids: Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "_CHUNK_ELEMENTS", CHUNK_ROWS * V)
    with allocations() as sizes:
        hf.evaluate(model, model, ids.split(B))
    assert max(sizes) == CHUNK_ROWS * V * 4 < S * V * dtype.itemsize


@pytest.mark.parametrize("dtype", [FP32])
def test_plain_autograd_is_seen_to_do_all_that(model: PreTrainedModel, ids: Tensor) -> None:
    with allocations() as sizes:
        eager_scores(model, ids[:1])
    assert max(sizes) >= S * V * 4
    model.requires_grad_(True)
    with Watch() as watch:
        model(ids, use_cache=False).logits.sum().backward()
    assert made_shapes(watch) >= weight_shapes(model)
    assert watch.trained >= weight_shapes(model)


def weight_shapes(model: PreTrainedModel) -> set[torch.Size]:
    return {p.shape for p in model.parameters() if p.ndim == 2}


def made_shapes(watch: Watch) -> set[torch.Size]:
    """Shapes of the products, and of their transposes."""
    shapes = [(*left.shape[:-1], right.shape[-1]) for left, right in watch.products]
    return {torch.Size(shape) for made in shapes for shape in (made, made[::-1])}
