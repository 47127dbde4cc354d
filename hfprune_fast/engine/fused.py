"""A model's own norms and rotary embeddings, each computed by one kernel while the model is in use.

In eager transformers a norm is half a dozen operations that pass over memory. Inside
`fused_modules` a norm's forward is `kernels.rms_norm`, and an attention's calls `kernels.rotary`
where it called `apply_rotary_pos_emb`: a copy of the attention's own forward, in which that one
global name stands for another function, so no other model and no module is touched.

What is replaced is transformers' own, as it is written, without hooks, and computes to the bit what
our plain torch path does for a few invented inputs, forward and backward, in fp32 and in the dtype
of the run. All else keeps its forward. So does, at each call, what the kernels do not compute or
was not compared: other dtypes, arguments or shapes, or a weight that is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from types import FunctionType, MethodType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from hfprune_fast.kernels import resolve_backend, rms_norm, rotary
from hfprune_fast.kernels.rms_norm import FORMS
from hfprune_fast.models.plain import is_patched

_ROTARY = "apply_rotary_pos_emb"
_PROBES = (1e-3, 1.0, 1e3)  # sizes of the inputs by which a norm is compared; eps counts in one
_NOT_PLAIN = (TypeError, ValueError, RuntimeError, AttributeError)  # what other modules raise


@contextmanager
def fused_modules(model: nn.Module, backend: str | None, like: Tensor) -> Iterator[None]:
    """Inside, plain norms and attentions run fused, if the backend for `like` is triton."""
    try:
        fused = resolve_backend(backend, like) == "triton"
    except ValueError:  # is reported where a kernel of the job needs it
        fused = False
    replaced: list[nn.Module] = []
    try:
        for module, forward in _fused_forwards(model, like.dtype) if fused else ():
            replaced.append(module)
            module.forward = forward
        yield
    finally:
        for module in replaced:
            vars(module).pop("forward", None)


def _fused_forwards(
    model: nn.Module, dtype: torch.dtype
) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Yield the modules that are plain, with what computes the same."""
    forms: dict[tuple[Any, ...], str | None] = {}  # of each kind of norm
    rotaries: dict[FunctionType, bool] = {}  # whether each function is plain
    dtypes = {torch.float32, dtype}
    for module in model.modules():
        if not _is_untouched(module):
            continue
        forward = type(module).forward
        if not _is_transformers(forward):
            continue
        if _ROTARY in forward.__code__.co_names:
            own = forward.__globals__.get(_ROTARY)
            if not isinstance(own, FunctionType):
                continue
            if own not in rotaries:
                rotaries[own] = _is_plain_rotary(own, dtypes)
            if rotaries[own]:
                yield module, MethodType(_calling_ours(forward, own, dtypes), module)
        elif list(module._parameters) == ["weight"] and not (module._buffers or module._modules):
            weight, eps = module._parameters["weight"], _eps(module)
            if weight is None or weight.dim() != 1 or eps is None:
                continue
            options = {name: value for name, value in vars(module).items() if name[0] != "_"}
            kind = type(module), len(weight), repr({**options, "training": None})
            if kind not in forms:
                forms[kind] = _form(module, len(weight), eps, dtypes)
            if (form := forms[kind]) is not None:
                yield module, partial(_norm, module, forward, dtypes, eps, form)


def _is_untouched(module: nn.Module) -> bool:
    ours = type(module).__module__.startswith("transformers.models.")
    return ours and not is_patched(module)


def _is_transformers(function: Any) -> TypeGuard[FunctionType]:
    """Return whether a function's code is a model's own: another might do more than compute."""
    if not isinstance(function, FunctionType):
        return False
    return str(function.__globals__.get("__name__")).startswith("transformers.models.")


def _eps(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def _norm(
    module: nn.Module,
    own: Callable[..., Tensor],
    dtypes: Collection[torch.dtype],
    eps: float,
    form: str,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    weight: Any = module.weight
    x = args[0] if len(args) == 1 and not kwargs else None
    if (
        x is None
        or (x.dtype, x.device, x.shape[-1:]) != (weight.dtype, weight.device, weight.shape)
        or x.dtype not in dtypes
        or weight.requires_grad
    ):
        return own(module, *args, **kwargs)
    return rms_norm(x, weight, eps=eps, form=form, backend="triton")


def _calling_ours(
    forward: FunctionType, own: Callable[..., Any], dtypes: Collection[torch.dtype]
) -> FunctionType:
    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        each = {tensor.dtype for tensor in (q, k, cos, sin)}
        if (
            args
            or kwargs
            or not _is_plain_shape(q, k, cos, sin)
            or len(each) > 1
            or q.dtype not in dtypes
            or cos.requires_grad
            or sin.requires_grad
        ):
            return own(q, k, cos, sin, *args, **kwargs)
        return rotary(q, k, cos, sin, backend="triton")

    made = FunctionType(
        forward.__code__,
        {**forward.__globals__, _ROTARY: turned},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _is_plain_shape(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    batch, _, *others = q.shape
    of_k, tables = (k.shape[0], *k.shape[2:]), (cos.shape[0], *cos.shape[1:])
    return of_k == (batch, *others) and tables in ((batch, *others), (1, *others))


def _form(module: nn.Module, width: int, eps: float, dtypes: Iterable[torch.dtype]) -> str | None:
    """Return the form of `rms_norm` that a norm computes, whatever its weight; None if none."""
    rows = torch.cat([size * _random(2, width) for size in _PROBES])
    other, own = copy.copy(module), type(module).forward  # no hooks are called, nor weights changed

    def agree(form: str, of: torch.dtype) -> bool:
        x, weight = rows.to(of), _random(width, seed=1).to(of)
        other._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
        return _agree(
            lambda x: (own(other, x),),
            lambda x: (rms_norm(x, weight, eps=eps, form=form, backend="torch"),),
            x,
        )

    return next((form for form in FORMS if all(agree(form, of) for of in dtypes)), None)


def _is_plain_rotary(own: FunctionType, dtypes: Iterable[torch.dtype]) -> bool:
    """Return whether a function turns queries and keys as `rotary` does."""
    if not own.__module__.startswith("transformers.models."):
        return False
    for of, batch in product(dtypes, (1, 2)):
        q, k, cos, sin = (
            _random(*shape, seed=seed).to(of)
            for seed, shape in enumerate(((2, 3, 5, 8), (2, 1, 5, 8), (batch, 5, 8), (batch, 5, 8)))
        )
        ours = partial(rotary, cos=cos, sin=sin, backend="torch")
        if not _agree(partial(own, cos=cos, sin=sin), ours, q, k):
            return False
    return True


def _agree(theirs: Callable[..., Any], ours: Callable[..., Any], *inputs: Tensor) -> bool:
    """Return whether two functions have the same results and gradients, to the bit."""
    results = []
    try:
        for function in (theirs, ours):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            with torch.enable_grad():
                outputs = function(*leaves)
            gradients = [_random(*output.shape, seed=9).to(output.dtype) for output in outputs]
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, gradients)])
    except _NOT_PLAIN:
        return False
    mine, own = results[1], results[0]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(own, mine, strict=True))


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
