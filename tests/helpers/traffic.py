"""What is read, written and allocated, counted: by Triton kernels and by torch's operations."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from watch import Seeing

_MOVES_NOTHING = ("aten::new_empty", "aten::empty_like", "aten::set_")
_ONLY_WRITES_FIRST = ("aten::copy_", "aten::fill_")


@dataclass
class Traffic:
    """Bytes by the name of the tensor they are in, or else by their type, such as "fp32"."""

    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)

    def of(self, *names: str) -> int:
        return sum(self.read[name] + self.written[name] for name in names)


@contextmanager
def kernel_traffic(**tensors: Tensor) -> Iterator[Traffic]:
    """Count what Triton kernels load and store inside, in the interpreter; masked-off lanes not."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic()
    starts = {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items()}
    ends = {name: starts[name] + t.untyped_storage().nbytes() for name, t in tensors.items()}

    def count(into: Counter[str], pointers: Any, mask: Any) -> None:
        # The interpreter spreads one bit over a tile as integers.
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        dtype = pointers.get_element_ty()
        if not at.size:
            return
        names = (n for n in tensors if starts[n] <= at.flat[0] < ends[n])
        into[next(names, str(dtype))] += at.size * dtype.primitive_bitwidth // 8

    def counted(name: str, into: Counter[str], mask_at: int) -> None:
        run = getattr(InterpreterBuilder, name)

        def call(self: Any, pointers: Any, *rest: Any) -> Any:
            count(into, pointers, rest[mask_at])
            return run(self, pointers, *rest)

        patch.setattr(InterpreterBuilder, name, call)

    with pytest.MonkeyPatch.context() as patch:
        counted("create_masked_load", traffic.read, 0)
        counted("create_masked_store", traffic.written, 1)
        yield traffic


class Touched(Seeing):
    """Counts the elements of tensors of some kind that torch's operations read and write."""

    def __init__(self, which: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.which = which
        self.read = self.written = 0

    def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        formal = func._schema.arguments
        aliases = [argument.alias_info for argument in formal]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if is_view or func.name().startswith(_MOVES_NOTHING):
            return
        for i, argument in enumerate(formal):
            actual = args[i] if i < len(args) else kwargs.get(argument.name)
            if not isinstance(actual, Tensor) or not self.which(actual):
                continue
            writes = argument.alias_info is not None
            is_first = i == 0 and func.name().startswith(_ONLY_WRITES_FIRST)
            self.written += actual.numel() * writes
            self.read += actual.numel() * (not (is_first or (writes and argument.kwarg_only)))


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Bytes of all that torch allocates on the CPU inside, within its operations and ours too."""
    sizes: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield sizes
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes += [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
