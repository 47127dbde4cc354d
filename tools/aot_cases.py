"""The launches of every kernel that `aot.py` compiles, and what it requires of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from hfprune_fast.kernels import _kl_rows, _rms_norm_triton, _rotary_triton, _rows, _statistics
from hfprune_fast.kernels._activations import ACTIVATIONS, Gated
from hfprune_fast.kernels._criterion import Criterion
from hfprune_fast.kernels._triton import cdiv

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case(NamedTuple):
    """A launch to compile, and what to require of it."""

    kernel: str
    name: str
    launch: Callable[[], object]
    wide: bool = True  # the data allow 16-byte loads and stores
    stores: bool = True  # rows are written, not only read
    looped: bool = True  # the hot path is a loop, not the whole kernel
    logit_bytes: float = 0.0  # of rows of logits, the mean of two; 0: not counted
    # Instructions a logit in the loops, at most, on NVIDIA's and AMD's.
    instructions: tuple[float, float] = (float("inf"), float("inf"))


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _rows_of(dtype: torch.dtype, vocab: int) -> Tensor:
    # As the buffers of the linear operations: 16-byte aligned for any vocab.
    return _meta(8192, cdiv(vocab, 16) * 16, dtype=dtype)[:, :vocab]


def _launch_rows(
    dtype: torch.dtype, grad_dtype: torch.dtype | None, vocab: int = 128_256, *,
    criterion: str = "entropy", softcap: float | None = None, logit_scale: float = 1.0,
) -> None:  # fmt: skip
    logits, row_scale, grad = _rows_of(dtype, vocab), None, None
    if grad_dtype is not None:
        row_scale = _meta(8192, dtype=torch.float32)
        grad = logits if grad_dtype == dtype else _rows_of(grad_dtype, vocab)
    keys = None if criterion == "entropy" else _meta(8192, dtype=torch.int64)
    _rows.rows_loss_and_grad(
        logits, row_scale, grad, Criterion(criterion, keys, alpha=0.4, temperature=0.5),
        softcap=softcap, logit_scale=logit_scale, backend=None,
    )  # fmt: skip


def _launch_kl(
    dtype: torch.dtype, grad_dtype: torch.dtype, vocab: int = 128_256, *,
    teacher_dtype: torch.dtype | None = None, transform: tuple[float | None, float] = (None, 1.0),
) -> None:  # fmt: skip
    logits, teacher_logits = _rows_of(dtype, vocab), _rows_of(teacher_dtype or dtype, vocab)
    grad = logits if grad_dtype == dtype else _rows_of(grad_dtype, vocab)
    row_scale = _meta(8192, dtype=torch.float32)
    _kl_rows.kl_rows_and_grad(logits, teacher_logits, row_scale, grad, transform, transform, None)


def _launch_taylor(
    dtype: torch.dtype, activation: str | None, masked: bool = False, *, layout: str = "separate",
    shape: tuple[int, int, int] = (8, 1024, 14_336),
) -> None:  # fmt: skip
    grad, gate, up = (_meta(*shape, dtype=dtype) for _ in range(3))
    if layout == "fused":
        gate, up = _meta(*shape[:2], 2 * shape[2], dtype=dtype).chunk(2, dim=2)
    gated = None if activation is None else Gated(gate, up, gate, up, activation)
    _statistics.taylor_sums(
        grad, gated or gate,
        token_mask=_meta(*shape[:2], dtype=torch.bool) if masked else None,
        parity=False, grad_scale=1.0, backend=None,
    )  # fmt: skip


def _launch_norm(dtype: torch.dtype, form: str, width: int) -> None:
    rows, weight = _meta(8192, width, dtype=dtype), _meta(width, dtype=dtype)
    _rms_norm_triton.rms_norm_triton(rows, weight, 1e-5, form)


def _launch_norm_backward(dtype: torch.dtype, form: str, width: int) -> None:
    rows, weight = _meta(8192, width, dtype=dtype), _meta(width, dtype=dtype)
    rstd = _meta(8192, dtype=torch.float32)
    _rms_norm_triton.rms_norm_backward_triton(rows, rows, weight, rstd, form)


def _launch_rotary(dtype: torch.dtype, heads: int, width: int, transposed: bool) -> None:
    x = _meta(8, 1024, heads, width, dtype=dtype).transpose(1, 2)  # as a projection's view
    table = _meta(1, 1024, width, dtype=dtype)
    _rotary_triton.rotary_triton(x, table, table, transposed, torch.empty_like(x))


# Instructions a logit in the loops of a kernel, on NVIDIA's and on AMD's: what triton 3.7 makes,
# rounded up to leave room for another version's.
_ALLOWED = {
    "forward": (10.5, 11.5), "entropy": (20.0, 22.5), "cross_entropy": (15.5, 19.0),
    "fisher": (15.5, 19.0), "self_distillation": (25.0, 28.0), "kl": (20.5, 19.0),
    "capped": (68.0, 84.0), "capped label": (72.5, 91.0),
}  # fmt: skip


def _cases() -> Iterator[Case]:
    yield from _rows_cases()
    yield from _kl_cases()
    yield from _taylor_cases()
    yield from _norm_cases()


def _rows_cases() -> Iterator[Case]:
    def case(name: str, launch: partial[None], kind: str = "entropy") -> Case:
        return Case(
            "_rows_kernel", name, launch, stores=kind != "forward",
            logit_bytes=launch.args[0].itemsize, instructions=_ALLOWED[kind],
        )  # fmt: skip

    for name, dtype in _DTYPES.items():
        yield case(f"{name} forward", partial(_launch_rows, dtype, None), "forward")
        yield case(f"{name} gradient in place", partial(_launch_rows, dtype, dtype))
    bf16, fp16, fp32 = _DTYPES.values()
    yield case("fp32 logits, bf16 gradient", partial(_launch_rows, fp32, bf16))
    yield case("fp32 logits, fp16 gradient", partial(_launch_rows, fp32, fp16))
    transform = {"softcap": 30.0, "logit_scale": 0.5}
    yield case("bf16 softcap, scale", partial(_launch_rows, bf16, bf16, **transform), "capped")
    yield case("bf16 odd V", partial(_launch_rows, bf16, bf16, 32_001))
    yield case("fp32 odd V, bf16 gradient", partial(_launch_rows, fp32, bf16, 32_001))
    for criterion in ("cross_entropy", "fisher", "self_distillation"):
        launch = partial(_launch_rows, criterion=criterion)
        for name, dtype in _DTYPES.items():
            yield case(f"{name} {criterion}", partial(launch, dtype, dtype), criterion)
        yield case(f"fp32 {criterion}, bf16 gradient", partial(launch, fp32, bf16), criterion)
        capped = partial(launch, bf16, bf16, **transform)
        yield case(f"bf16 {criterion} softcap, scale", capped, "capped label")
        yield case(f"bf16 {criterion} odd V", partial(launch, bf16, bf16, 32_001), criterion)


def _kl_cases() -> Iterator[Case]:
    def case(name: str, launch: partial[None], kind: str = "kl") -> Case:
        both = launch.args[0], launch.keywords.get("teacher_dtype", launch.args[0])
        mean_bytes = sum(dtype.itemsize for dtype in both) / 2
        return Case(
            "_kl_rows_kernel", name, launch, wide=both[0] == both[1],
            logit_bytes=mean_bytes, instructions=_ALLOWED[kind],
        )  # fmt: skip

    bf16, _, fp32 = _DTYPES.values()
    for name, dtype in _DTYPES.items():
        yield case(f"{name} kl", partial(_launch_kl, dtype, dtype))
    yield case("fp32 kl, bf16 gradient", partial(_launch_kl, fp32, bf16))
    capped = partial(_launch_kl, bf16, bf16, transform=(30.0, 0.5))
    yield case("bf16 kl softcap, scale", capped, "capped")
    yield case("bf16 kl odd V", partial(_launch_kl, bf16, bf16, 32_001))
    mixed = partial(_launch_kl, fp32, fp32, teacher_dtype=bf16)
    yield case("fp32 kl, bf16 teacher", mixed)


def _taylor_cases() -> Iterator[Case]:
    case = partial(Case, "_taylor_kernel")
    bf16 = _DTYPES["bf16"]
    for (name, dtype), masked in product(_DTYPES.items(), (False, True)):
        suffix = " token_mask" if masked else ""
        yield case(f"{name}{suffix}", partial(_launch_taylor, dtype, None, masked), stores=False)
        for activation in ACTIVATIONS:
            launch = partial(_launch_taylor, dtype, activation, masked)
            yield case(f"{name} gated {activation}{suffix}", launch)
    gated = partial(_launch_taylor, bf16, "silu")
    yield case("bf16 gated silu fused", partial(gated, layout="fused"))
    odd = partial(gated, shape=(8, 1024, 7581))  # as pruned without rounding
    yield case("bf16 gated silu odd F", odd, wide=False)

    case = partial(Case, "_add_partials_kernel", stores=False)
    yield case("partials", gated)
    yield case("partials of one sequence", partial(gated, shape=(1, 1024, 14_336)))
    yield case("partials odd F", odd, wide=False)


# Each configuration of heads of 64, 128 (and 80) and 256.
_ROTARY_HEADS = ((2, 80), (4, 64), (16, 64), (32, 64), (8, 128), (2, 256), (4, 256), (8, 256))


def _norm_cases() -> Iterator[Case]:
    """Rows of a program of their own, those of several (heads), and those of several blocks."""
    kernels = {
        "": ("_rms_norm_kernel", _launch_norm),
        " backward": ("_rms_norm_backward_kernel", _launch_norm_backward),
    }
    for suffix, (kernel, launch) in kernels.items():
        for name, dtype in _DTYPES.items():
            yield Case(
                kernel, f"{name} norm{suffix}", partial(launch, dtype, "llama", 4096), looped=False
            )
        bf16 = partial(launch, _DTYPES["bf16"])
        for form in ("gemma", "olmo2"):
            yield Case(kernel, f"{form} norm{suffix}", partial(bf16, form, 3584), looped=False)
        for width in (*(1 << n for n in range(6, 12)), 8192, 16_384):
            named = f"norm of {width}{suffix}"
            # The weight of a row that is a part of a program's is loaded in fewer bytes a thread.
            wide = not 512 <= width <= 1024
            launch_it = partial(bf16, "llama", width)
            yield Case(kernel, named, launch_it, looped=False, wide=wide)
        yield Case(kernel, f"norm of 18432{suffix}", partial(bf16, "llama", 18_432))
    for name, dtype in _DTYPES.items():
        for transposed in (False, True):
            suffix = " backward" if transposed else ""
            launch = partial(_launch_rotary, dtype, 32, 128, transposed)
            yield Case("_rotary_kernel", f"{name} rotary{suffix}", launch)
    for heads, width in _ROTARY_HEADS:
        launch = partial(_launch_rotary, _DTYPES["bf16"], heads, width, False)
        yield Case("_rotary_kernel", f"rotary of {heads} heads of {width}", launch)


CASES = tuple(_cases())
