"""The C++ backend alone: instruction sets, threads, the GIL, and what it refuses."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_inputs import normal, random, token_mask
from operations import OPERATIONS
from paths import needs_cpp
from rows_truth import (
    assert_drawn,
    assert_rows,
    kl_truth,
    rows_truth,
    self_distillation_truth,
)
from taylor_truth import ACTIVATIONS, assert_gated, statistics_bound, sums
from torch import Tensor
from traffic import allocations

from hfprune_fast.kernels import (
    CPP_INSTRUCTIONS,
    _cpp,
    gated_taylor,
    softmax_entropy,
    taylor_statistics,
)
from hfprune_fast.kernels._criterion import Criterion
from hfprune_fast.kernels._kl_rows import kl_rows_and_grad
from hfprune_fast.kernels._philox import uniform
from hfprune_fast.kernels._rows import rows_loss_and_grad

pytestmark = needs_cpp
INF, NAN = float("inf"), float("nan")
CAPPED: dict[str, float] = {"softcap": 5.0, "logit_scale": 1.7}
# Around a vector of each width, a tile and a period of fisher's lanes.
VOCABULARIES = [1, 3, 4, 7, 8, 9, 15, 16, 17, 33, 2047, 2048, 2049, 4095, 4097, 9001]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture(params=CPP_INSTRUCTIONS or ["none"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_cpp, "_chosen", (request.param,))
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows(logits: Tensor, criterion: Criterion, **transform: Any) -> tuple[Tensor, Tensor]:
    """Values and gradients; what lies between the rows of the gradient keeps its NaN."""
    memory = torch.full((len(logits), logits.shape[1] + 3), NAN, dtype=logits.dtype)
    grad = memory[:, : logits.shape[1]]
    options = {"softcap": None, "logit_scale": 1.0, "backend": "cpp"} | transform
    values = rows_loss_and_grad(logits, torch.ones(len(logits)), grad, criterion, **options)
    assert memory[:, logits.shape[1] :].isnan().all()
    return values, grad


@each_dtype
@pytest.mark.parametrize("transform", [{}, CAPPED])
def test_every_instruction_set_gives_the_rows_of_float64(
    instructions: str, dtype: torch.dtype, transform: dict[str, float]
) -> None:
    for vocab in VOCABULARIES:
        logits = normal(3, vocab, dtype)
        logits[1, 1::3] = -INF
        labels = torch.tensor([0, 0, vocab // 2])
        for criterion, truth in (
            (Criterion(), rows_truth(logits, **transform)),
            (Criterion("cross_entropy", labels), rows_truth(logits, labels, **transform)),
            (
                Criterion("self_distillation", labels, alpha=0.4, temperature=0.5),
                self_distillation_truth(logits, labels, 0.4, 0.5, **transform),
            ),
        ):
            assert_rows(*rows(logits, criterion, **transform), truth, "cpp")


@each_dtype
def test_every_instruction_set_draws_in_the_order_of_the_lanes(
    instructions: str, dtype: torch.dtype
) -> None:
    for vocab in VOCABULARIES:
        logits, ids = normal(20, vocab, dtype), torch.arange(20) + vocab
        logits[3:6, 1::3] = -INF
        values, grad = rows(logits, Criterion("fisher", ids, 7))
        y = grad.argmin(dim=1)
        assert_rows(values, grad, rows_truth(logits, y), "cpp")
        assert_drawn(y, logits, uniform(ids, 7, torch.float32))


@each_dtype
@pytest.mark.parametrize("capped", [False, True])
def test_every_instruction_set_gives_the_divergence_of_float64(
    instructions: str, dtype: torch.dtype, capped: bool
) -> None:
    own, teachers = ((5.0, 1.7), (8.0, 0.5)) if capped else ((None, 1.0), (None, 1.0))
    for vocab in VOCABULARIES:
        logits, teacher = normal(3, vocab, dtype), random(3, vocab, dtype=dtype)
        logits[1, 1::3] = teacher[1, 1::3] = -INF
        grad = torch.empty_like(logits)
        values = kl_rows_and_grad(logits, teacher, torch.ones(3), grad, own, teachers, "cpp")
        truth = kl_truth(
            logits, teacher, softcap=own[0], logit_scale=own[1],
            teacher_softcap=teachers[0], teacher_logit_scale=teachers[1],
        )  # fmt: skip
        assert_rows(values, grad, truth, "cpp")


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_instruction_set_gives_the_statistics_of_float64(
    instructions: str, dtype: torch.dtype, activation: str
) -> None:
    # Around a block of tokens, a vector, and what is activated at a time.
    for shape in ((1, 1, 1), (2, 63, 7), (2, 66, 17), (1, 129, 300)):
        grad, gate, up = (random(*shape, dtype=dtype, seed=i) for i in range(3))
        gate *= 4
        mask = token_mask([shape[1]] * (shape[0] - 1) + [shape[1] // 2], shape[1], "right")
        got = gated_taylor(
            grad, gate, up, activation=activation, token_mask=mask, backend="cpp"
        )  # fmt: skip
        assert_gated(got, (grad, gate, up), activation, mask, backend="cpp")
        alone = torch.stack(taylor_statistics(grad, up, backend="cpp"))
        truth = sums(grad.double() * up.double(), up)
        bound = statistics_bound(grad, up, "cpp") + statistics_bound(grad, up, "torch")
        assert ((alone - truth).abs() <= bound).all()


def test_exp_is_right_to_two_units_in_the_last_place(instructions: str) -> None:
    """Beside a logit of 0 the sum is 1 for x < -17, and the gradient of cross entropy exp(x)."""
    x = torch.cat([torch.linspace(-17.4, -104.5, 200_000), torch.tensor([-150.0, -INF])])
    logits = torch.stack([torch.zeros_like(x), x], dim=1)
    _, grad = rows(logits, Criterion("cross_entropy", torch.zeros(len(x), dtype=torch.int64)))
    truth = x.double().exp()
    unit = 2.0 ** (truth.clamp(min=2.0**-126).log2().floor() - 23)
    assert ((grad[:, 1] - truth).abs() <= 2 * unit).all()
    assert (grad[-2:, 1] == 0).all()


@pytest.mark.skipif(sys.platform != "linux", reason="lists threads as Linux does")
def test_few_pieces_do_not_end_threads_that_torch_would_start_again(threads: None) -> None:
    torch.set_num_threads(4)
    spread, few = torch.randn(4096, 512), torch.randn(2, 70_000)

    def running() -> set[str]:
        spread.exp()
        return {path.name for path in Path("/proc/self/task").iterdir()}

    before = running()
    softmax_entropy(few, backend="cpp")
    assert running() == before


def test_bits_do_not_depend_on_the_threads(instructions: str, threads: None) -> None:
    logits, labels = normal(40, 9001, torch.bfloat16), torch.arange(40)
    grad, gate, up = (random(3, 70, 900, dtype=torch.bfloat16, seed=i) for i in range(3))

    def results() -> list[Tensor]:
        found: list[Tensor] = []
        for name in ("entropy", "cross_entropy", "fisher", "self_distillation"):
            keys = None if name == "entropy" else labels
            found += rows(logits, Criterion(name, keys, alpha=0.3, temperature=0.5))
        d_logits, transform = torch.empty_like(logits), (None, 1.0)
        kl = kl_rows_and_grad(
            logits, logits.flip(1), torch.ones(40), d_logits, transform, transform, "cpp"
        )  # fmt: skip
        statistics, *gradients = gated_taylor(grad, gate, up, backend="cpp")
        small = [tensor for op in OPERATIONS.values() for tensor in op(backend="cpp")]
        alone = taylor_statistics(grad, up, backend="cpp")
        return [*found, kl, d_logits, *statistics, *gradients, *alone, *small]

    torch.set_num_threads(1)
    expected = results()
    for count in (2, 3):
        torch.set_num_threads(count)
        assert all(map(torch.equal, results(), expected))


def test_the_gil_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, Any]] = []
    logits, extension = torch.zeros(128, 200_000), _cpp._C
    recorder = SimpleNamespace(row_pass=lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(_cpp, "_C", recorder)
    values = rows_loss_and_grad(logits, softcap=3.0, logit_scale=1.0, backend="cpp")
    ((args, kwargs),) = calls
    kwargs["values"] = values.data_ptr()
    started, finished = threading.Event(), []

    def run() -> None:
        started.set()
        extension.row_pass(*args, **kwargs)  # nothing else in here gives the GIL to the test
        finished.append(True)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        worker = threading.Thread(target=run)
        worker.start()
        started.wait()
        while_it_ran = not finished
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert while_it_ran
    assert values.isfinite().all()


def test_nothing_is_allocated_but_the_results() -> None:
    logits, scale = normal(30, 5000, torch.bfloat16), torch.ones(30)
    with allocations() as of_rows:
        rows_loss_and_grad(
            logits, scale, logits, softcap=None, logit_scale=1.0, backend="cpp"
        )  # fmt: skip
    assert sum(of_rows) == 4 * 30
    grad, gate, up = (random(2, 70, 90, dtype=torch.bfloat16, seed=i) for i in range(3))
    transposed = up.transpose(0, 1).contiguous().transpose(0, 1)  # tokens first: not copied
    with allocations() as of_statistics:
        gated_taylor(grad, gate, transposed, out=(grad, gate), backend="cpp")
    assert sum(of_statistics) == 4 * 8 * 90


def row_arguments(**changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    logits, values = torch.zeros(2, 5), torch.zeros(2)
    keep = {
        "rows": 2, "columns": 5, "values": values.data_ptr(), "grad": None, "row_scale": 0,
        "keys": 0, "criterion": "entropy", "alpha": 0.0, "temperature": 1.0,
        "transform": (None, 1.0), "threads": 1, "instructions": "portable",
    }  # fmt: skip
    first = changes.pop("logits", (logits.data_ptr(), 5, "float32"))
    return (first,), keep | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instructions": "avx1024"}, "no instructions named avx1024"),
        ({"criterion": "loss"}, "unknown criterion loss"),
        ({"logits": (64, 5, "float64")}, "unknown dtype float64"),
        ({"logits": (0, 5, "float32")}, "logits must be data aligned to 4 bytes"),
        ({"logits": (65, 5, "bfloat16")}, "logits must be data aligned to 2 bytes"),
        ({"logits": (64, -5, "float32")}, "logits has a stride or a size out of range"),
        ({"logits": (64, 2**62, "float32")}, "logits has a stride or a size out of range"),
        ({"values": 0}, "values must be data"),
        ({"grad": (64, 4, "float32")}, "rows of grad overlap"),
        ({"grad": (64, 5, "float32")}, "row_scale must be data"),
        ({"criterion": "fisher"}, "uniform must be data"),
        ({"criterion": "cross_entropy"}, "label must be data"),
        ({"transform": (-1.0, 1.0)}, "softcap must be at least 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_arguments_are_checked_before_anything_is_written(
    changes: dict[str, Any], message: str
) -> None:
    args, kwargs = row_arguments(**changes)
    with pytest.raises(ValueError, match=message):
        _cpp._C.row_pass(*args, **kwargs)


def test_rows_of_another_stride_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unit stride along V, got strides \(10, 2\)"):
        rows_loss_and_grad(
            torch.zeros(3, 10)[:, ::2], softcap=None, logit_scale=1.0, backend="cpp"
        )  # fmt: skip
