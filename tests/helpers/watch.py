"""What an operation does beneath its result."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Seeing(TorchDispatchMode):
    """Sees the operations that do the work: of those made of others, and of ours, what is in them.

    To torch ours are one operation each, and what runs inside them is below autograd, where those
    made of others, such as matmul, come to a mode as they are.
    """

    def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        raise NotImplementedError

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        with self:
            if func.namespace == "hfprune_fast":
                return OPDEFS[func.name()]._init_fn(*args, **kwargs)
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self.see(func, args, kwargs, result)
        return result


class Watch(Seeing):
    """Notes of every operation its name, the bytes of what it makes, what it multiplies."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.live: list[tuple[StorageWeakRef, int]] = []
        self.names: set[str] = set()
        self.largest = self.peak = 0
        self.products: list[tuple[Tensor, Tensor]] = []
        self.trained: set[torch.Size] = set()  # shapes of parameters used that require a gradient

    def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        self.names.add(func.name())
        factors: tuple[Tensor, ...] = ()
        if func.name().partition(".")[0].rstrip("_").endswith("mm"):
            factors = args[-2:]
        elif "linear_pointwise" in func.name():  # oneDNN's x · wᵀ
            factors = args[0], args[1].t()
        if factors:
            left, right = (
                torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
                for a in factors
            )
            self.products.append((left, right))
        self.live = [(ref, size) for ref, size in self.live if not ref.expired()]
        known = {ref.cdata for ref, _ in self.live}
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        # Neither taken out of the graph nor, as a model is built, replaced by one without values.
        if func.name() != "aten::detach" and not any(tensor.is_meta for tensor in made):
            used = (tensor for tensor in tree_leaves(args) if isinstance(tensor, nn.Parameter))
            self.trained |= {tensor.shape for tensor in used if tensor.requires_grad}
        for tensor in made:
            storage = tensor.untyped_storage()
            ref = StorageWeakRef(storage)
            if storage.data_ptr() not in self.given and ref.cdata not in known:
                known.add(ref.cdata)
                self.live.append((ref, storage.nbytes()))
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live))

    @property
    def flops(self) -> int:
        """Of all products of matrices, one addition and one multiplication a term."""
        return sum(2 * left.shape.numel() * right.shape[-1] for left, right in self.products)
