"""Whose shapes are measured, and at which of three scales.

full    8192 tokens, for a GPU
small   the same widths and vocabularies, few tokens: a CPU has seconds for each
tiny    nobody's shape: a rehearsal, whose times mean nothing
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hfprune_fast.kernels import slow_on_this_cpu

DTYPES = ("bfloat16", "float32")
MODELS = {  # D, F, V
    "Llama-2-7B": (4096, 11008, 32000),
    "Llama-3.1-8B": (4096, 14336, 128256),
    "Qwen2.5-7B": (3584, 18944, 152064),
    "Qwen3-0.6B": (1024, 3072, 151936),
}


@dataclass(frozen=True)
class Spec:
    """What a case is made from: an operation, whose shape, and in which dtype."""

    op: str
    model: str
    dtype: str
    sizes: dict[str, int] = field(hash=False)

    def __str__(self) -> str:
        shape = self.model or " ".join(f"{name}{size}" for name, size in self.sizes.items())
        return f"{self.op}, {shape}, {self.dtype}"


def product_dtypes(dtypes: tuple[str, ...] = DTYPES) -> tuple[str, ...]:
    """Return those in which this machine multiplies fast enough to be measured.

    A CPU without instructions for bfloat16 takes a minute for a product that takes it a second in
    float32 (`slow_on_this_cpu`).
    """
    if torch.cuda.is_available():
        return dtypes
    return tuple(name for name in dtypes if not slow_on_this_cpu(getattr(torch, name)))


def specs_of(cases: dict[str, Any], scale: str) -> Iterator[Spec]:
    """Specs of every operation, for the models, dtypes and sizes that its case names.

    Small ones are in float32 for the first of their models alone, tiny ones never; cases of
    products are small in the dtypes that this machine multiplies in.
    """
    for op, case in cases.items():
        names = {"full": tuple(MODELS), "small": case.small, "tiny": ("",)}[scale]
        tokens = {"full": 8192, "small": case.small_tokens, "tiny": 12}[scale]
        products = scale == "small" and case.floor_name == "products"
        dtypes = product_dtypes(case.dtypes) if products else case.dtypes
        for dtype in dtypes:
            some = {"full": names, "small": names[:1], "tiny": ()}[scale]
            for name in names if dtype == dtypes[0] else some:
                sizes = dict(zip("TDFV", (tokens, *MODELS.get(name, (16, 48, 500))), strict=True))
                yield Spec(op, name, dtype, {letter: sizes[letter] for letter in case.letters})
