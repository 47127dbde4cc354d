import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hfprune_fast.kernels import (
    TRITON_VERSION,
    _dispatch,
    gated_taylor,
    linear_cross_entropy,
    linear_entropy,
    linear_fisher,
    softmax_entropy,
    softmax_entropy_grad_,
    taylor_statistics,
)
from hfprune_fast.kernels._arguments import check_devices
from hfprune_fast.kernels._dispatch import architecture, resolve_backend

needs_triton = pytest.mark.skipif(TRITON_VERSION is None, reason="triton is not installed")
ROWS, TOKENS = torch.ones(2, 3), torch.ones(1, 2, 3)
OPERATIONS: dict[str, Callable[..., Any]] = {
    "softmax_entropy": lambda **kw: softmax_entropy(ROWS, **kw),
    "softmax_entropy_grad_": lambda **kw: softmax_entropy_grad_(ROWS.clone(), ROWS[:, 0], **kw),
    "linear_entropy": lambda **kw: linear_entropy(ROWS, torch.ones(5, 3), **kw),
    "linear_cross_entropy": lambda **kw: linear_cross_entropy(
        ROWS, torch.ones(5, 3), torch.arange(2), **kw
    ),
    "linear_fisher": lambda **kw: linear_fisher(ROWS, torch.ones(5, 3), torch.arange(2), **kw),
    "taylor_statistics": lambda **kw: taylor_statistics(TOKENS, TOKENS, **kw),
    "gated_taylor": lambda **kw: gated_taylor(TOKENS, TOKENS, TOKENS, **kw),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS)


@pytest.fixture(autouse=True)
def _no_choice_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HFPRUNE_BACKEND", raising=False)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launchers that were called."""
    names: list[str] = []
    for module, kind in (("_rows", "_rows"), ("taylor", "_statistics")):
        for path in ("torch", "triton"):
            where = f"hfprune_fast.kernels.{module}"
            launcher = getattr(sys.modules[where], f"{kind}_{path}")

            def record(*args: Any, _path: str = path, _launcher: Any = launcher) -> Tensor:
                names.append(_path)
                result: Tensor = _launcher(*args)
                return result

            monkeypatch.setattr(sys.modules[where], f"{kind}_{path}", record)
    return names


@each_operation
def test_runs_what_was_asked_for_by_name(operation: str, backend: str, ran: list[str]) -> None:
    OPERATIONS[operation](backend=backend)
    assert set(ran) == {backend}


@each_operation
def test_torch_is_the_default_on_a_cpu(operation: str, ran: list[str]) -> None:
    OPERATIONS[operation]()
    assert set(ran) == {"torch"}


@each_operation
def test_the_environment_chooses_for_a_whole_run(
    operation: str, backend: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFPRUNE_BACKEND", backend)
    OPERATIONS[operation]()
    assert set(ran) == {backend}


@needs_triton
def test_a_name_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for environment, name in (("triton", "torch"), ("torch", "triton"), ("cuda", "torch")):
        monkeypatch.setenv("HFPRUNE_BACKEND", environment)
        assert resolve_backend(name, ROWS) == name
    monkeypatch.setenv("HFPRUNE_BACKEND", "")  # as good as unset
    assert resolve_backend(None, ROWS) == "torch"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, "triton"),
        (torch.bfloat16, "triton"),
        (torch.float16, "triton"),
        (torch.float64, "torch"),
    ],
)
@needs_triton
def test_default_on_a_gpu(dtype: torch.dtype, expected: str) -> None:
    gpu_tensor: Any = SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda:0")
    assert resolve_backend(None, gpu_tensor) == expected


@each_operation
def test_a_wrong_name_is_refused(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^backend must be one of torch, triton, got 'cuda'$"):
        OPERATIONS[operation](backend="cuda")
    monkeypatch.setenv("HFPRUNE_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"^HFPRUNE_BACKEND must be one of .*, got 'cuda'$"):
        OPERATIONS[operation]()


@needs_triton
def test_float64_is_refused_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        r"asks for triton, but the kernels take float32, .* got torch.float64; backend='torch'"
    )
    with pytest.raises(ValueError, match="^backend " + message):
        softmax_entropy(ROWS.double(), backend="triton")
    monkeypatch.setenv("HFPRUNE_BACKEND", "triton")
    with pytest.raises(ValueError, match="^HFPRUNE_BACKEND " + message):
        taylor_statistics(TOKENS.double(), TOKENS.double())


@each_operation
def test_triton_that_is_not_installed_is_refused(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "TRITON_VERSION", None)
    with pytest.raises(ValueError, match=r"triton is not installed; backend='torch' runs every"):
        OPERATIONS[operation](backend="triton")
    gpu_tensor: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, device="cuda:0")
    with pytest.raises(ValueError, match=r"^a GPU tensor asks for triton, but triton is not"):
        resolve_backend(None, gpu_tensor)  # no silent torch


@needs_triton
def test_a_cpu_without_the_interpreter_is_refused() -> None:
    # In a process of its own, as a user has it.
    code = (
        "import torch; from hfprune_fast.kernels import softmax_entropy as f; z = torch.ones(2, 3);"
        "print(f(z)); f(z, backend='triton')"
    )
    assert "TRITON_INTERPRET" not in os.environ  # conftest.py hides it from processes
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert "1.0986" in done.stdout
    assert done.stderr.splitlines()[-1] == (
        "ValueError: backend asks for triton, but it needs a GPU (or TRITON_INTERPRET=1), got a "
        "tensor on cpu; backend='torch' runs everywhere"
    )


def test_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert architecture(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index % 10))
    assert architecture(torch.device("cuda:70")) == "sm_90"  # a GPU that no machine has cached
    monkeypatch.setattr(torch.version, "hip", "6.4")
    mi300 = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: mi300)
    assert architecture(torch.device("cuda:71")) == "gfx942"


def test_tensors_on_two_devices_are_refused() -> None:
    on_cpu = torch.zeros(2)
    check_devices(on_cpu, weight=on_cpu, bias=None)
    with pytest.raises(ValueError, match="weight must be on cpu, got meta"):
        check_devices(on_cpu, weight=torch.zeros(2, device="meta"), bias=None)
