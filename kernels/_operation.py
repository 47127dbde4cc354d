"""How each operation is registered with torch: as a custom op that refuses what it cannot derive.

torch drops the tangents of forward mode (torch.func.jvp, jacfwd, forward_ad) at a custom op and at
detach, and torch.func.grad gives 0 through detach: without a check, a derivative would be 0 without
a word.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hfprune_fast.kernels._arguments import check_devices

Function = TypeVar("Function", bound=Callable[..., Any])


class Operation(Protocol):
    """A registered operation: called with positional arguments, and extended as torch's own."""

    def __call__(self, *args: Any) -> Any: ...

    def register_fake(self, fake: Function, /) -> Function: ...

    def register_autograd(self, backward: Any, /, *, setup_context: Any) -> None: ...


def operation(
    name: str, *, mutates_args: Sequence[str] = (), differentiable: bool = False
) -> Callable[[Callable[..., Any]], Operation]:
    """Return a decorator that registers a function of torch.library's types as an operation.

    Args:
        name: of the op in torch.ops.hfprune_fast.
        mutates_args: the arguments that it overwrites.
        differentiable: leave the inputs in autograd's graph, where an op without a formula raises
            in the backward; otherwise they are detached.
    """

    def decorate(function: Callable[..., Any]) -> Operation:
        signature = inspect.signature(function)
        op = torch.library.custom_op(f"hfprune_fast::{name}", function, mutates_args=mutates_args)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            tensors = [a for a in args if isinstance(a, Tensor)]
            if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
                raise RuntimeError(
                    f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd); "
                    "differentiate backward where it can be, or the plain torch reference"
                )
            if not differentiable:
                if not torch.compiler.is_compiling() and any(map(_in_torch_func, tensors)):
                    raise RuntimeError(f"{name} cannot be differentiated by torch.func.grad or vjp")
                args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
            return op(*args)

        def register_fake(fake: Function, /) -> Function:
            @functools.wraps(fake)
            def checked(*args: Any) -> Any:
                # torch runs the fake where one tensor alone is on meta too: without a check, the
                # result would be memory that nothing has written.
                named = signature.bind(*args).arguments.items()
                tensors = {name: a for name, a in named if isinstance(a, Tensor)}
                check_devices(next(iter(tensors.values())), **tensors)
                return fake(*args)

            op.register_fake(checked)
            return fake

        call.register_fake = register_fake  # type: ignore[attr-defined]
        call.register_autograd = op.register_autograd  # type: ignore[attr-defined]
        return cast(Operation, call)

    return decorate


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def _in_torch_func(tensor: Tensor) -> bool:
    """Return whether torch.func.grad, or the like, differentiates by the tensor."""
    return bool(torch._C._functorch.is_gradtrackingtensor(tensor)) and tensor.requires_grad
