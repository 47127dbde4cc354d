from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from operations import OPERATIONS
from paths import CPU_DEFAULT, needs_cpp, needs_triton

from hfprune_fast.kernels import _dispatch
from hfprune_fast.kernels._arguments import check_devices
from hfprune_fast.kernels._dispatch import architecture, resolve_backend

ROWS = torch.ones(2, 3)
each_operation = pytest.mark.parametrize("operation", OPERATIONS)


def gpu_tensor(dtype: torch.dtype) -> Any:
    return SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda:0")


@pytest.fixture(autouse=True)
def _no_choice_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HFPRUNE_BACKEND", raising=False)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The implementations that were called."""
    names: list[str] = []
    for module in ("_rows", "_kl_rows", "_statistics", "rms_norm", "rotary"):
        table: dict[str, Any] = import_module(f"hfprune_fast.kernels.{module}").IMPLEMENTATIONS
        for name, implementation in table.items():

            def record(*args: Any, _name: str = name, _run: Any = implementation) -> Any:
                names.append(_name)
                return _run(*args)

            monkeypatch.setitem(table, name, record)
    return names


@each_operation
def test_the_requested_implementation_runs(operation: str, backend: str, ran: list[str]) -> None:
    OPERATIONS[operation](backend=backend)
    assert set(ran) == {backend}
    ran.clear()
    OPERATIONS[operation]()
    assert set(ran) == {CPU_DEFAULT}


def test_the_environment_chooses(
    backend: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFPRUNE_BACKEND", backend)
    for operation in ("softmax_entropy_grad_", "taylor_statistics"):
        ran.clear()
        OPERATIONS[operation]()
        assert set(ran) == {backend}


@needs_triton
def test_a_name_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for environment, name in (("triton", "torch"), ("torch", "triton"), ("cuda", "torch")):
        monkeypatch.setenv("HFPRUNE_BACKEND", environment)
        assert resolve_backend(name, ROWS) == name
    monkeypatch.setenv("HFPRUNE_BACKEND", "")  # as good as unset
    assert resolve_backend(None, ROWS) == CPU_DEFAULT


@needs_triton
def test_default_on_a_gpu() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert resolve_backend(None, gpu_tensor(dtype)) == "triton"
    assert resolve_backend(None, gpu_tensor(torch.float64)) == "torch"


@each_operation
def test_what_is_no_backend_or_not_installed_is_refused(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=r"^backend must be one of torch, triton, cpp, got 'cuda'$"
    ):
        OPERATIONS[operation](backend="cuda")
    monkeypatch.setattr(_dispatch, "CPP_INSTRUCTIONS", ())
    monkeypatch.setattr(_dispatch, "CPP_UNUSED_REASON", "not built")
    with pytest.raises(ValueError, match=r"^backend is cpp, but the C\+\+ .* \(not built\); back"):
        OPERATIONS[operation](backend="cpp")
    monkeypatch.setattr(_dispatch, "TRITON_VERSION", None)
    with pytest.raises(ValueError, match=r"triton is not installed; backend='torch' runs every"):
        OPERATIONS[operation](backend="triton")
    with pytest.raises(ValueError, match=r"^the default for a GPU tensor is triton, but triton is"):
        resolve_backend(None, gpu_tensor(torch.float32))  # no silent torch
    monkeypatch.setenv("HFPRUNE_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"^HFPRUNE_BACKEND must be one of .*, got 'cuda'$"):
        OPERATIONS[operation]()


def test_default_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert resolve_backend(None, ROWS.to(dtype)) == CPU_DEFAULT
    assert resolve_backend(None, ROWS.double()) == "torch"
    assert resolve_backend(None, ROWS.to("meta")) == "torch"
    monkeypatch.setattr(_dispatch, "CPP_INSTRUCTIONS", ())  # not built
    assert resolve_backend(None, ROWS) == "torch"


@needs_cpp
def test_cpp_is_refused_on_another_device() -> None:
    with pytest.raises(ValueError, match=r"^backend is cpp, but it needs a CPU, got .* on meta"):
        resolve_backend("cpp", ROWS.to("meta"))


@pytest.mark.parametrize(
    "backend", [pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=needs_triton)]
)
def test_float64_is_refused_by_kernels(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"the kernels take float32, .* got torch.float64; backend='torch'"
    message = rf"is {backend}, but {message}"
    with pytest.raises(ValueError, match="^backend " + message):
        resolve_backend(backend, ROWS.double())
    monkeypatch.setenv("HFPRUNE_BACKEND", backend)
    with pytest.raises(ValueError, match="^HFPRUNE_BACKEND " + message):
        resolve_backend(None, ROWS.double())


@needs_triton
def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    assert resolve_backend(None, ROWS) == CPU_DEFAULT
    message = r"^backend is triton, but it needs a GPU \(or TRITON_INTERPRET=1\), got a tensor"
    with pytest.raises(ValueError, match=message):
        resolve_backend("triton", ROWS)


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
