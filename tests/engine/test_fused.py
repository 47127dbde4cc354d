"""A model's norms and rotary embeddings are fused where they are plain, and only meanwhile.

In Triton's interpreter on a CPU, where backend "triton" must be named.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import tiny_family_model
from fused_names import like, llama, replaced
from interpreted import rounding_as_a_gpu
from paths import needs_triton
from tolerances import assert_no_worse, relative_error
from transformers.models.llama import modeling_llama
from truth import tiny_model

import hfprune_fast as hf
from hfprune_fast.config import STATISTICS
from hfprune_fast.engine import fused, layerwise
from hfprune_fast.engine.fused import fused_modules

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")]
FP32, BF16 = torch.float32, torch.bfloat16
# Modules a layer that are fused, by name, beside the final norm.
LLAMA = ["input_layernorm", "post_attention_layernorm", "self_attn"]
GEMMA = [*LLAMA, "pre_feedforward_layernorm", "post_feedforward_layernorm"]
FAMILIES = {
    "llama": LLAMA,
    "qwen3": [*LLAMA, "q_norm", "k_norm"],
    "gemma2": GEMMA,
    "gemma3_text": [*GEMMA, "q_norm", "k_norm"],
    "olmo2": [n for n in GEMMA if n[0] != "i" and n[:2] != "pr"] + ["q_norm", "k_norm"],
    "phi3": LLAMA,
    "glm": LLAMA[:2],  # turns neighbours, not halves
    "gpt_oss": LLAMA[:2],
    "olmo": ["self_attn"],  # norms without weights
    "cohere": [],
}


@pytest.fixture(autouse=True)
def _rounding() -> Iterator[None]:
    with rounding_as_a_gpu():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was called."""
    counter: Counter[str] = Counter()
    for name in ("rms_norm", "rotary"):
        kernel: Callable[..., Any] = getattr(fused, name)

        def counted(*args: Any, _name: str = name, _kernel: Any = kernel, **kwargs: Any) -> Any:
            counter[_name] += kwargs["backend"] == "triton"
            return _kernel(*args, **kwargs)

        monkeypatch.setattr(fused, name, counted)
    return counter


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_modules_of_a_family_and_its_logits(family: str, dtype: torch.dtype) -> None:
    """Logits are off by a rounding of each norm's sum, which later layers carry on."""
    model = tiny_family_model(family, dtype=dtype)
    ids = torch.arange(12).view(2, 6)
    expected = model(ids, use_cache=False).logits
    with fused_modules(model, "triton", like(dtype)):
        names = [name.rpartition(".")[2] for name in replaced(model)]
        logits = model(ids, use_cache=False).logits
    layers = model.config.num_hidden_layers
    final = [] if family in ("olmo", "cohere") else ["norm"]
    assert Counter(names) == Counter(FAMILIES[family] * layers + final)
    assert replaced(model) == []
    truth = tiny_family_model(family, dtype=torch.float64)(ids, use_cache=False).logits
    floor = 8 * torch.finfo(dtype).eps
    assert_no_worse(
        logits.flatten()[None], expected.flatten()[None], truth.flatten()[None], floor=floor
    )


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_scores_of_a_fused_llama(
    dtype: torch.dtype, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error rule, against float64, is `test_triton_kernels_score_within_the_error_rule`'s."""
    model = tiny_model("llama", dtype=dtype, num_hidden_layers=2)
    ids = torch.randint(127, (2, 12), generator=torch.Generator().manual_seed(0))
    table = hf.score(model, ids, batch_size=2, backend="triton")
    # Two norms and an attention a layer, and the final norm, for one micro-batch.
    assert calls == {"rms_norm": 5, "rotary": 2}
    assert replaced(model) == []
    monkeypatch.setattr(layerwise, "fused_modules", lambda *_: nullcontext())
    unfused = hf.score(model, ids, batch_size=2, backend="triton")
    for name in STATISTICS:  # about 30 roundings in a row, each relative to a layer's norm
        error = relative_error(getattr(table, name), getattr(unfused, name))
        assert error.max() < 32 * torch.finfo(dtype).eps, name


def test_streamed_weights_are_those_of_the_moment(
    save_checkpoint: Callable[..., Path], calls: Counter[str]
) -> None:
    folder = save_checkpoint(tiny_model("llama", dtype=FP32))  # a layer more than buffers
    ids = torch.arange(10).view(2, 5)
    run: dict[str, Any] = {"backend": "triton", "batch_size": 2, "device": "cpu"}
    resident = hf.score(folder, ids, offload="none", **run)
    for offload in ("disk", "cpu"):
        calls.clear()
        streamed = hf.score(folder, ids, offload=offload, **run)
        assert calls["rms_norm"] >= 7
        assert calls["rotary"] >= 3
        for name in STATISTICS:
            assert relative_error(getattr(streamed, name), getattr(resident, name)).max() < 1e-5


def test_refits_and_evaluates_with_it(calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFPRUNE_BACKEND", "triton")
    dense, pruned = llama(), llama()
    ids, keep = torch.arange(24).view(2, 12), {layer: torch.arange(0, 96, 2) for layer in range(2)}
    weights = hf.refit_down_proj(dense, [ids], keep)
    assert calls["rms_norm"] > 0
    hf.prune(pruned, keep, down_proj=weights)
    calls.clear()
    assert hf.evaluate(dense, pruned, [ids]).kl_nats > 0
    assert calls["rms_norm"] == 2 * 5
    assert replaced(dense) == replaced(pruned) == []


@pytest.mark.parametrize("run", [FP32, torch.float16])
def test_a_dtype_that_was_not_compared_takes_the_own_forward(
    run: torch.dtype, calls: Counter[str]
) -> None:
    """Llama's form and OLMo 2's are one in fp32, and differ in bf16."""
    model = tiny_family_model("olmo2", dtype=BF16).requires_grad_(False)
    norm, attention = model.model.norm, model.model.layers[0].self_attn
    norm.weight.copy_(torch.randn(len(norm.weight)))
    x = torch.randn(64, len(norm.weight)).bfloat16()
    expected, ids = norm(x), torch.arange(6)[None]
    logits = model(ids, use_cache=False).logits
    with fused_modules(model, "triton", like(run)):
        assert {norm, attention} <= {m for m in model.modules() if "forward" in vars(m)}
        calls.clear()
        assert torch.equal(norm(x), expected)
        assert torch.equal(model(ids, use_cache=False).logits, logits)
    assert not calls


@pytest.mark.parametrize(
    ("q", "k", "tables"),
    [
        ((3, 5, 8), (3, 5, 8), ((1, 5, 8), (1, 5, 8))),
        ((2, 3, 5, 8), (1, 1, 5, 8), ((1, 5, 8), (1, 5, 8))),
        ((2, 3, 5, 8), (2, 1, 5, 8), ((2, 5, 8), (1, 5, 8))),
        ((2, 3, 1, 8), (2, 1, 1, 8), ((1, 8), (1, 8))),
        ((2, 2, 1, 8), (2, 2, 1, 8), ((1, 5, 8), (1, 5, 8))),
    ],
)
def test_shapes_that_transformers_broadcasts_take_its_own_function(
    q: tuple[int, ...], k: tuple[int, ...], tables: Any, calls: Counter[str]
) -> None:
    model = llama()
    given = [torch.randn(shape) for shape in (q, k, *tables)]
    expected = modeling_llama.apply_rotary_pos_emb(*given)
    with fused_modules(model, "triton", like()):
        turn = model.model.layers[0].self_attn.forward.__func__.__globals__["apply_rotary_pos_emb"]
        calls.clear()
        assert all(map(torch.equal, turn(*given), expected))
        double = [t.double() for t in given]
        assert turn(*double)[0].dtype == torch.float64
    assert not calls


def test_what_the_kernels_do_not_compute_takes_the_own_forward(calls: Counter[str]) -> None:
    model, x = llama(BF16), torch.ones(2, 64)
    norm = model.model.norm
    with fused_modules(model, "triton", like(BF16)):
        width = len(norm.weight)
        calls.clear()
        assert norm(x[:, :width]).dtype == FP32  # fp32 activations of a bf16 model
        assert norm(hidden_states=x[:, :width].bfloat16()).dtype == BF16
        norm.weight.requires_grad_()
        norm(x[:, :width].bfloat16()).sum().backward()
        assert norm.weight.grad is not None
        assert not calls
        norm.weight.requires_grad_(False)
        norm(x[:, :width].bfloat16())
        assert calls == {"rms_norm": 1}


def test_partial_rotary_takes_the_own_function(calls: Counter[str]) -> None:
    model = tiny_family_model("phi3", dtype=FP32, partial_rotary_factor=0.5)
    ids = torch.arange(6)[None]
    expected = model(ids, use_cache=False).logits
    with fused_modules(model, "triton", like()):
        logits = model(ids, use_cache=False).logits
    assert calls["rotary"] == 0
    assert calls["rms_norm"] > 0
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
