"""What an operation does beneath its result."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Sees every operation: its name, the bytes of what it makes, what it multiplies."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.live: list[tuple[StorageWeakRef, int]] = []
        self.names: set[str] = set()
        self.largest = self.peak = 0
        self.products: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.names.add(func.name())
        factors: tuple[Tensor, ...] = ()
        if "mm" in func.name():
            factors = args[-2:]
        elif "linear_pointwise" in func.name():  # oneDNN's x · wᵀ
            factors = args[0], args[1].t()
        if factors:
            left, right = (torch.empty_strided(a.shape, a.stride(), device="meta") for a in factors)
            self.products.append((left, right))
        self.live = [(ref, size) for ref, size in self.live if not ref.expired()]
        known = {ref.cdata for ref, _ in self.live}
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            ref = StorageWeakRef(storage)
            if storage.data_ptr() not in self.given and ref.cdata not in known:
                known.add(ref.cdata)
                self.live.append((ref, storage.nbytes()))
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live))
        return result
