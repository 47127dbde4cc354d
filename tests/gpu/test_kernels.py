"""Every kernel on a GPU, at the sizes of real models, against float64 made on the same GPU.

The rule is that of `tests/helpers/tolerances.py`: error <= 2 x plain torch's in the same dtype + a
stated floor. It is asked of whole rows or sums and, so that no single entry can hide in a row, of
every entry. Memory that an operation allocates holds NaN before a kernel writes it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from tolerances import assert_no_worse
from torch import Tensor

from hfprune_fast.kernels import (
    gated_taylor,
    linear_entropy,
    softmax_entropy,
    softmax_entropy_grad_,
    taylor_statistics,
)
from hfprune_fast.kernels._dispatch import resolve_backend
from hfprune_fast.kernels._triton import INTERPRETED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here; set TRITON_INTERPRET=0"),
    pytest.mark.filterwarnings("ignore:.*[Dd]eterministic"),
]
DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS_32 = torch.finfo(FP32).eps
VOCABS = (32000, 128256, 151936, 152064, 32001)
WIDTHS = (11008, 14336, 18944, 7581)


@pytest.fixture(autouse=True)
def _fresh_device() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()


def need_gib(gib: float) -> None:
    free_gib = torch.cuda.mem_get_info()[0] / 2**30
    if free_gib < gib:
        pytest.skip(f"needs {gib} GiB of device memory, {free_gib:.0f} GiB are free")


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(64, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def randn(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE).mul_(scale)


def blocks(rows: int, size: int = 256) -> Iterator[slice]:
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def smallest_step(dtype: torch.dtype) -> float:
    """Distance of the smallest numbers of dtype that fp32 maths may not flush to 0."""
    info = torch.finfo(dtype)
    return max(info.smallest_normal * info.eps, torch.finfo(FP32).smallest_normal)


# Rows of logits


def definition(
    logits: Tensor, row_scale: Tensor, softcap: float | None = None, logit_scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(H, row_scale · dH/dlogits, p), in the dtype of logits; 0 · log 0 = 0."""
    z, slope = logits * logit_scale, torch.tensor(logit_scale, device=logits.device)
    if softcap is not None:
        tanh = torch.tanh(z / softcap)
        z = (softcap * tanh).masked_fill(logits == -torch.inf, -torch.inf)
        slope = logit_scale * (1 - tanh.square())
    log_p = torch.log_softmax(z, dim=1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    p = log_p.exp()
    log_p.masked_fill_(p == 0, 0)
    entropy = -(p * log_p).sum(dim=1)
    scale = row_scale[:, None].to(z.dtype)
    return entropy, -p * (log_p + entropy[:, None]) * slope * scale, p


def check_rows(
    entropy: Tensor, grad: Tensor, logits: Tensor, row_scale: Tensor,
    softcap: float | None = None, logit_scale: float = 1.0,
) -> None:  # fmt: skip
    stored = torch.finfo(grad.dtype).eps
    for rows in blocks(len(logits)):
        z, scale = logits[rows], row_scale[rows]
        true_h, true_grad, p = definition(z.double(), scale, softcap, logit_scale)
        eager_h, eager_grad, _ = definition(z.float(), scale, softcap, logit_scale)
        eager_grad = eager_grad.to(grad.dtype)
        # An exponent of the size of the logits is rounded before each exp, and so is a softcap.
        largest = float(z.float().masked_fill(z == -torch.inf, 0).abs().max())
        floor = EPS_32 * (8 + 2 * max(largest, softcap or 0))
        assert_no_worse(entropy[rows], eager_h, true_h, floor=floor)
        assert_no_worse(grad[rows], eager_grad, true_grad, floor=floor)
        # Entry by entry, with 4 √V eps for each of the sums s and u (Higham and Mary 2019); the
        # slope of the transform is at most 1 here.
        sums = EPS_32 * (8 * largest + 2 * z.shape[1] ** 0.5 * (1 + true_h)) * scale.double()
        allowed = 2 * (eager_grad.double() - true_grad).abs() + stored * true_grad.abs()
        allowed += sums[:, None] * p + smallest_step(grad.dtype)
        wrong = ~((grad[rows].double() - true_grad).abs() <= allowed)
        assert not wrong.any(), f"{int(wrong.sum())} entries, first {wrong.nonzero()[0].tolist()}"


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_rows(vocab: int, dtype: torch.dtype) -> None:
    need_gib(20)
    logits = randn(8192 if dtype == BF16 else 1024, vocab, dtype=dtype, scale=3)
    row_scale = torch.rand(len(logits), device=DEVICE) + 0.5
    grad = logits.clone()
    with poisoned():
        entropy = softmax_entropy_grad_(grad, row_scale)
        leaf = logits.requires_grad_()
        functional = softmax_entropy(leaf)
        (functional_grad,) = torch.autograd.grad(functional, leaf, row_scale)
    logits = logits.detach()
    check_rows(entropy, grad, logits, row_scale)
    del grad
    check_rows(functional.detach(), functional_grad, logits, row_scale)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("vocab", [128256, 32001])
def test_masked_logits_and_transforms(
    vocab: int, softcap: float | None, dtype: torch.dtype
) -> None:
    logits = randn(300, vocab, dtype=dtype, scale=3)
    logits[:, vocab - 300 :] = -torch.inf
    logits[torch.rand(300, vocab, device=DEVICE) < 0.3] = -torch.inf
    logits[0] = -torch.inf
    logits[1], logits[1, 77] = -torch.inf, 2.0
    logits[2, : vocab // 2] = -torch.inf  # the first steps of the pass see no finite logit
    row_scale = torch.rand(300, device=DEVICE) + 0.5
    row_scale[3] = 0
    options = {} if softcap is None else {"softcap": softcap, "logit_scale": 0.5}
    grad = logits.clone()
    entropy = softmax_entropy_grad_(grad, row_scale, **options)
    assert entropy[:2].tolist() == [0, 0]
    assert (grad[logits == -torch.inf] == 0).all()
    assert (grad[3] == 0).all()
    check_rows(entropy, grad, logits, row_scale, **options)


def test_rows_past_two_to_the_31_elements() -> None:
    need_gib(12)
    tokens, vocab = 17_000, 152_064
    logits = randn(tokens, vocab, scale=3)
    row_scale = torch.rand(tokens, device=DEVICE) + 0.5
    boundary = 2**31 // vocab
    some = [slice(0, 8), slice(boundary - 8, boundary + 8), slice(tokens - 8, tokens)]
    before = [logits[rows].clone() for rows in some]
    entropy = softmax_entropy_grad_(logits, row_scale)
    assert entropy.isfinite().all()
    assert all(logits[rows].isfinite().all() for rows in blocks(tokens))
    for rows, z in zip(some, before, strict=True):
        check_rows(entropy[rows], logits[rows], z, row_scale[rows])


def test_rows_at_an_odd_address() -> None:
    """A slice that starts 2 bytes off 16: narrow loads, and the same result bit for bit."""
    logits = randn(16, 32_000, scale=3)
    row_scale = torch.rand(16, device=DEVICE)
    shifted = torch.empty(logits.numel() + 1, dtype=BF16, device=DEVICE)[1:].view_as(logits)
    shifted.copy_(logits)
    entropy = softmax_entropy_grad_(logits, row_scale)
    assert torch.equal(softmax_entropy_grad_(shifted, row_scale), entropy)
    assert torch.equal(shifted, logits)


def test_vocabulary_masked_with_the_least_finite_number() -> None:
    logits = randn(16, 128_256, scale=3)
    masked = logits.clone()
    logits[:, :100_000], masked[:, :100_000] = torch.finfo(BF16).min, -torch.inf
    assert torch.equal(softmax_entropy(logits), softmax_entropy(masked))


def test_kernels_run_on_the_current_stream() -> None:
    logits = randn(64, 128_256, scale=3)
    expected = softmax_entropy(logits)
    stream, late = torch.cuda.Stream(), torch.zeros_like(logits)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(logits)
        entropy = softmax_entropy(late)
    stream.synchronize()
    assert torch.equal(entropy, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors() -> None:
    hidden, weight = randn(64, 256), randn(32_000, 256, scale=0.2)
    expected = linear_entropy(hidden, weight)
    got = linear_entropy(hidden.to("cuda:1"), weight.to("cuda:1"))
    assert got[1].device == torch.device("cuda:1")
    assert torch.equal(got[0].cpu(), expected[0].cpu())
    assert torch.equal(got[1].cpu(), expected[1].cpu())


# The head


@pytest.mark.parametrize(
    ("tokens", "width", "vocab", "dtype", "options"),
    [
        (8192, 4096, 128256, BF16, {}),
        (2048, 4096, 128256, BF16, {"fp32_logits": True}),
        (1111, 3584, 152064, BF16, {}),
        (1111, 2048, 151936, FP16, {"grad_scale": 8.0}),
        (1111, 2048, 151936, FP16, {"fp32_logits": True}),
        (2000, 4096, 32000, BF16, {"bias": True, "softcap": 30.0, "logit_scale": 0.5}),
        (777, 1024, 32001, BF16, {"bias": True, "logits_budget_bytes": 10 << 20}),
        (777, 1024, 32001, FP32, {}),
    ],
)
def test_linear_entropy(
    tokens: int, width: int, vocab: int, dtype: torch.dtype, options: dict[str, object]
) -> None:
    need_gib(24)
    hidden = randn(tokens, width, dtype=dtype)
    weight = randn(vocab, width, dtype=dtype, scale=3 / width**0.5)
    bias = randn(vocab, dtype=dtype) if options.get("bias") else None
    row_weight = torch.rand(tokens, device=DEVICE) + 0.5
    row_weight[-3:] = 0  # padding
    clean = hidden.clone()
    clean[-3:] = 0
    hidden[-3:] = torch.nan
    with poisoned():
        loss, d_hidden = linear_entropy(hidden, weight, row_weight, **{**options, "bias": bias})
    transform = {k: v for k, v in options.items() if k in ("softcap", "logit_scale")}
    logits_dtype = FP32 if options.get("fp32_logits") else dtype

    def head(h: Tensor, w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(Σ scale · H, its gradient at h) of logits in the dtype of h and w, as float64."""
        z = torch.nn.functional.linear(h, w, None if bias is None else bias.to(h.dtype))
        maths = z if z.dtype == torch.float64 else z.float()
        entropy, grad, _ = definition(maths, scale, **transform)
        back = w if w.dtype == torch.float64 else weight
        return (entropy.double() * scale).sum(), (grad.to(back.dtype) @ back).double()

    true_weight, eager_weight = weight.double(), weight.to(logits_dtype)
    true_loss, eager_loss = torch.zeros(2, 1, dtype=torch.float64, device=DEVICE)
    exponents = EPS_32 * 64  # they are at most 32 here, and are rounded before each exp
    for rows in blocks(tokens, 512):
        true, true_grad = head(clean[rows].double(), true_weight, row_weight[rows])
        eager, eager_grad = head(clean[rows].to(logits_dtype), eager_weight, row_weight[rows])
        true_loss += true
        eager_loss += eager
        got = d_hidden[rows].double() / float(options.get("grad_scale", 1))
        rounding = torch.finfo(dtype).eps
        assert_no_worse(got, eager_grad, true_grad, floor=rounding + exponents)
    # The rounding of logits moves each row's H by less than eps of it, in either direction.
    floor = 4 * torch.finfo(logits_dtype).eps / tokens**0.5 + exponents
    assert_no_worse(loss[None], eager_loss, true_loss, floor=floor)
    assert (d_hidden[-3:] == 0).all()


@pytest.mark.parametrize("fp32_logits", [False, True])
def test_linear_entropy_memory(fp32_logits: bool, measured: Callable[[str], None]) -> None:
    need_gib(6)
    hidden, weight = randn(8192, 4096), randn(128_256, 4096, scale=3 / 64)
    row_weight = torch.rand(8192, device=DEVICE)
    for _ in range(2):  # the first call compiles, and makes cuBLAS take its workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, d_hidden = linear_entropy(hidden, weight, row_weight, fp32_logits=fp32_logits)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
    row_bytes = 128_256 * (6 if fp32_logits else 2)
    budget = max(256 << 20, 512 * row_bytes)
    rest = extra - d_hidden.nbytes - min(budget, 8192 * row_bytes)
    name = "linear_entropy, fp32 logits" if fp32_logits else "linear_entropy"
    measured(
        f"{name}: {extra / 2**20:.1f} MiB beside its input, {rest / 2**20:+.1f} on its promise"
    )
    # A workspace of cuBLAS that is taken anew in each call, and 64 bytes a token.
    assert rest <= (64 << 20) + 64 * 8192


# The MLP


def gated_definition(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(act, d_gate, d_up) in the dtype given, through autograd."""
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    if activation == "silu":
        act = torch.nn.functional.silu(gate) * up
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        act = torch.nn.functional.gelu(gate, approximate=approximate) * up
    return act.detach(), *torch.autograd.grad(act, (gate, up), grad)


def statistics(grad: Tensor, act: Tensor) -> Tensor:
    """l1, l2, mask, act of one sequence (S, F), as (4, F) in the dtype given."""
    x = grad * act
    return torch.stack(
        [x.abs().sum(0), x.square().sum(0), x.sum(0).square(), act.square().sum(0)]
    )  # fmt: skip


# A program adds 16 terms in a row and then 8 in a tree, in fp32.
STATISTICS_FLOOR = 16 * EPS_32


def check_gated(
    got: tuple[tuple[Tensor, ...], Tensor, Tensor], inputs: tuple[Tensor, Tensor, Tensor],
    activation: str, token_mask: Tensor | None = None,
) -> None:  # fmt: skip
    dtype, width = inputs[0].dtype, inputs[0].shape[2]
    stored = torch.finfo(dtype).eps
    true_sums, eager_sums = torch.zeros(2, 4, width, dtype=torch.float64, device=DEVICE)
    for b in range(len(inputs[0])):
        sequence = tuple(tensor[b] for tensor in inputs)
        if token_mask is not None:
            sequence = tuple(t.masked_fill(~token_mask[b][:, None], 0) for t in sequence)
        grad, gate, up = (t.double() for t in sequence)
        true_act, *true = gated_definition(grad, gate, up, activation)
        eager_act, *eager = gated_definition(*sequence, activation)
        true_sums += statistics(grad, true_act)
        eager_sums += statistics(grad, eager_act.double())
        # The derivatives have zeros where their terms of size up to 1 + |gate| cancel.
        size = (16 * EPS_32 * grad * (1 + gate.abs())).abs()
        for i, terms in enumerate((size * up.abs(), size)):
            allowed = 2 * (eager[i].double() - true[i]).abs() + stored * true[i].abs()
            allowed += terms + smallest_step(dtype)
            assert ((got[1 + i][b].double() - true[i]).abs() <= allowed).all(), f"sequence {b}"
    assert_no_worse(torch.stack(got[0]), eager_sums, true_sums, floor=STATISTICS_FLOOR)


def gated_inputs(
    shape: tuple[int, int, int], dtype: torch.dtype = BF16, *, fused: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    grad = randn(*shape, dtype=dtype, scale=0.01)
    if not fused:
        return grad, randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    return grad, *randn(*shape[:2], 2 * shape[2], dtype=dtype).chunk(2, dim=2)


@pytest.mark.parametrize("width", WIDTHS)
def test_gated_taylor_widths(width: int) -> None:
    inputs = gated_inputs((8, 1024, width))
    with poisoned():
        got = gated_taylor(*inputs)
    check_gated(got, inputs, "silu")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_taylor_activations(activation: str, dtype: torch.dtype) -> None:
    inputs = gated_inputs((2, 1000, 11008), dtype)
    with poisoned():
        got = gated_taylor(*inputs, activation=activation)
    check_gated(got, inputs, activation)


@pytest.mark.parametrize("width", [14336, 7581])
@pytest.mark.parametrize("fused", [False, True])
def test_gated_taylor_over_padded_inputs(fused: bool, width: int) -> None:
    grad, gate, up = gated_inputs((3, 1001, width), fused=fused)
    token_mask = torch.rand(3, 1001, device=DEVICE) < 0.8
    token_mask[1] = False
    for tensor in (grad, gate, up):
        tensor[~token_mask] = torch.nan
    before = grad.clone(), gate.clone(), up.clone()
    got = gated_taylor(grad, gate, up, overwrite=True, token_mask=token_mask)
    assert [t.data_ptr() for t in got[1:]] == [gate.data_ptr(), up.data_ptr()]
    check_gated(got, before, "silu", token_mask)
    assert torch.equal(grad.nan_to_num(), before[0].nan_to_num())


def test_gated_taylor_past_two_to_the_31_elements() -> None:
    need_gib(16)
    grad, gate, up = gated_inputs((56, 1024, 18944), fused=True)  # rows are 37888 apart
    before = grad, gate.clone(), up.clone()
    check_gated(gated_taylor(grad, gate, up, overwrite=True), before, "silu")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("width", [14336, 7581])
def test_taylor_statistics(width: int, dtype: torch.dtype) -> None:
    shape = (8, 1000, width)
    grad, act = randn(*shape, dtype=dtype, scale=0.01), randn(*shape, dtype=dtype)
    with poisoned():
        got = taylor_statistics(grad, act)
    true, eager = torch.zeros(2, 4, width, dtype=torch.float64, device=DEVICE)
    for b in range(8):
        true += statistics(grad[b].double(), act[b].double())
        eager += statistics(grad[b].float(), act[b].float())
    assert_no_worse(torch.stack(got), eager, true, floor=STATISTICS_FLOOR)


# Every operation as its caller sees it


def differentiate(logits: Tensor, row_scale: Tensor) -> tuple[Tensor, ...]:
    return (softmax_entropy(logits),)


def overwrite_logits(logits: Tensor, row_scale: Tensor) -> tuple[Tensor, ...]:
    grad = logits.clone()
    return softmax_entropy_grad_(grad, row_scale), grad


def overwrite_gated(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    sums, d_gate, d_up = gated_taylor(grad, gate.clone(), up.clone(), overwrite=True)
    return *sums, d_gate, d_up


def new_gated(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    sums, d_gate, d_up = gated_taylor(grad, gate, up)
    return *sums, d_gate, d_up


def head_in_fp32(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return linear_entropy(hidden, weight, fp32_logits=True)


CALLS: list[tuple[Callable[..., tuple[Tensor, ...]], str]] = [
    (differentiate, "rows"),
    (overwrite_logits, "rows"),
    (linear_entropy, "head"),
    (head_in_fp32, "head"),
    (taylor_statistics, "act"),
    (new_gated, "mlp"),
    (overwrite_gated, "mlp"),
]
every_call = pytest.mark.parametrize(
    ("function", "kind"), CALLS, ids=[function.__name__ for function, _ in CALLS]
)


def inputs_of(kind: str) -> tuple[Tensor, ...]:
    if kind == "rows":
        return randn(2048, 32000, scale=3).requires_grad_(), torch.rand(2048, device=DEVICE)
    if kind == "head":
        return randn(2048, 2048), randn(128_256, 2048, scale=3 / 45)
    return gated_inputs((4, 512, 11008))[: 2 if kind == "act" else 3]


def results(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> list[Tensor]:
    """What a call returns, and the gradient of what can be differentiated."""
    out = list(function(*inputs))
    if out[0].requires_grad and out[0].grad_fn is not None:
        out += torch.autograd.grad(out[0], inputs[0], inputs[1])
    return [tensor.detach() for tensor in out]


@every_call
def test_repeats_bit_for_bit(function: Callable[..., tuple[Tensor, ...]], kind: str) -> None:
    inputs = inputs_of(kind)
    first = results(function, *inputs)
    for _ in range(2):
        assert all(map(torch.equal, results(function, *inputs), first))


@every_call
def test_never_waits_for_the_device(function: Callable[..., tuple[Tensor, ...]], kind: str) -> None:
    inputs = inputs_of(kind)
    results(function, *inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(function, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_call
def test_compiles_whole(function: Callable[..., tuple[Tensor, ...]], kind: str) -> None:
    inputs = inputs_of(kind)
    compiled = results(torch.compile(function, fullgraph=True), *inputs)
    assert all(map(torch.equal, compiled, results(function, *inputs)))


def test_a_gpu_tensor_goes_to_triton() -> None:
    for dtype in (BF16, FP16, FP32):
        assert resolve_backend(None, torch.empty(1, dtype=dtype, device=DEVICE)) == "triton"


def test_opcheck() -> None:
    ops = torch.ops.hfprune_fast
    logits, scale = randn(5, 97), torch.rand(5, device=DEVICE)
    gated = gated_inputs((2, 7, 65))
    leaf = logits.clone().requires_grad_()
    mask = torch.rand(2, 7, device=DEVICE) < 0.8
    new = torch.empty_like(gated[1]), torch.empty_like(gated[2])
    head = randn(6, 64), randn(97, 64), torch.rand(6, device=DEVICE), None
    for operation, arguments in [
        (ops.softmax_entropy, (leaf, None, 1.0, None)),
        (ops.softmax_entropy_backward, (logits, scale, 30.0, 1.0, None)),
        (ops.softmax_entropy_grad_, (logits, scale, None, 1.0, None)),
        (ops.linear_entropy, (*head, None, 1.0, False, 1.0, None, None)),
        (ops.linear_entropy, (*head, None, 1.0, True, 1.0, None, None)),
        (ops.taylor_statistics, (*gated[:2], mask, False, 1.0, None)),
        (ops.gated_taylor_, (*gated, "silu", None, False, 1.0, None)),
        (ops.gated_taylor_out, (*gated, *new, "gelu", mask, False, 1.0, None)),
    ]:
        torch.library.opcheck(operation.default, arguments)
