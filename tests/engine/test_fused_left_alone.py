"""Modules that compute something else than the kernels do are not fused, nor are other models.

In Triton's interpreter on a CPU, where backend "triton" must be named.
"""

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import pytest
import torch
from fused_names import fused_names, like, llama, replaced
from interpreted import rounding_as_a_gpu
from paths import needs_triton
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

from hfprune_fast.engine.fused import fused_modules

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")]
FP32 = torch.float32


@pytest.fixture(autouse=True)
def _rounding() -> Iterator[None]:
    with rounding_as_a_gpu():
        yield


@pytest.mark.parametrize(
    ("backend", "environment", "dtype"),
    [("torch", None, FP32), (None, "torch", FP32), (None, None, FP32), (None, None, torch.float64),
     ("triton", None, torch.float64), ("triton", "torch", FP32)],
)  # fmt: skip
def test_off_but_with_triton(
    backend: str | None, environment: str | None, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A CPU's default is another backend; a name wins over the environment, as everywhere."""
    monkeypatch.delenv("HFPRUNE_BACKEND", raising=False)
    if environment is not None:
        monkeypatch.setenv("HFPRUNE_BACKEND", environment)
    on = backend == "triton" and dtype == FP32
    assert bool(fused_names(llama(dtype), backend, dtype)) == on


class _OwnNorm(LlamaRMSNorm):  # type: ignore[misc]
    """A user's, of code that is not transformers'."""


def _hooked(norm: nn.Module) -> None:
    norm.register_forward_hook(lambda *_: None)


def _patched(norm: nn.Module) -> None:
    norm.forward = LlamaRMSNorm.forward.__get__(norm)


def _of_another_class(norm: nn.Module) -> None:
    norm.__class__ = _OwnNorm


def _with_a_bias(norm: nn.Module) -> None:
    norm.register_parameter("bias", nn.Parameter(torch.zeros(1)))


@pytest.mark.parametrize("change", [_hooked, _patched, _of_another_class, _with_a_bias])
def test_a_changed_norm_is_left_alone(change: Callable[[nn.Module], None]) -> None:
    model = llama()
    norm = model.model.layers[1].input_layernorm
    everything = fused_names(model)
    change(norm)
    own = vars(norm).get("forward")
    with fused_modules(model, "triton", like()):
        names = set(replaced(model))
        assert vars(norm).get("forward") is own
    assert vars(norm).get("forward") is own
    left = {"model.layers.1.input_layernorm"}
    assert names - left == set(everything) - left
    assert (own is None) == (not left & names)


def as_llamas(function: Any, **names: Any) -> FunctionType:
    """Return a function as if it were written among Llama's own, which its globals are."""
    return FunctionType(function.__code__, {**vars(modeling_llama), **names}, function.__name__)


@pytest.mark.parametrize("size", [1.0, 1 + 2.0**-20])
def test_what_computes_something_else_is_left_alone(
    size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its class is transformers' own: the forward and the function are compared."""
    norm, turn = LlamaRMSNorm.forward, modeling_llama.apply_rotary_pos_emb

    def turned(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return turn_(q * size_, k, cos, sin)  # type: ignore[name-defined]  # noqa: F821

    def normed(self: Any, x: Any) -> Any:
        return norm_(self, x) * size_  # type: ignore[name-defined]  # noqa: F821

    turned = as_llamas(turned, turn_=turn, size_=size)
    turned.__module__ = turn.__module__
    monkeypatch.setattr(LlamaRMSNorm, "forward", as_llamas(normed, norm_=norm, size_=size))
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turned)
    assert bool(fused_names(llama())) == (size == 1)


_own = {kind: kind.forward for kind in (LlamaRMSNorm, LlamaAttention)}
_calls = 0


def _counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A user's, in the place of a class's own; it computes the same, and more."""
    global _calls
    _calls += apply_rotary_pos_emb is modeling_llama.apply_rotary_pos_emb
    return _own[type(self)](self, *args, **kwargs)


@pytest.mark.parametrize(("kind", "expected"), [(LlamaRMSNorm, 5), (LlamaAttention, 2)])
def test_another_forward_of_a_class_is_called(
    kind: type[nn.Module], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, before = llama(), _calls
    monkeypatch.setattr(kind, "forward", _counting)
    with fused_modules(model, "triton", like()):
        assert not any("forward" in vars(m) for m in model.modules() if type(m) is kind)
        model(torch.arange(4)[None], use_cache=False)
    assert _calls - before == expected


def test_a_helper_that_was_replaced_since_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "model.layers.0.self_attn" in fused_names(llama())
    own = modeling_llama.rotate_half
    monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: -own(x))
    assert "model.layers.0.self_attn" not in fused_names(llama())


def test_the_comparison_leaves_no_trace() -> None:
    """Hooks of all modules are not called, and it is on the CPU whatever the default device."""
    model, seen = llama(), list[str]()
    everything = fused_names(model)
    hook = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with torch.device("meta"):
            assert fused_names(model) == everything
    finally:
        hook.remove()
    assert seen == []


def test_no_other_model_is_touched_and_an_error_restores() -> None:
    model, other = llama(), llama()
    own = modeling_llama.apply_rotary_pos_emb

    def fail_inside() -> None:
        with fused_modules(model, "triton", like()):
            assert replaced(model)
            assert replaced(other) == []
            assert modeling_llama.apply_rotary_pos_emb is own
            with fused_modules(model, "triton", like()):  # nothing is left to replace
                pass
            assert replaced(model)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert replaced(model) == []
