"""Whose shapes are measured, and at which of three scales.

full    8192 tokens, for a GPU
small   the same widths and vocabularies, few tokens: a CPU has seconds for each
tiny    nobody's shape: a rehearsal, whose times mean nothing
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

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


def of_models(
    op: str, scale: str, letters: str, small_tokens: int, small: tuple[str, ...] = tuple(MODELS)
) -> Iterator[Spec]:
    """Specs of an operation for every model and dtype; letters are of T, D, F and V.

    Small ones are in float32 for the first of their models alone.
    """
    names = {"full": tuple(MODELS), "small": small, "tiny": ("",)}[scale]
    tokens = {"full": 8192, "small": small_tokens, "tiny": 24}[scale]
    for dtype in DTYPES if scale != "tiny" else DTYPES[:1]:
        for name in names if scale != "small" or dtype == DTYPES[0] else names[:1]:
            sizes = dict(zip("TDFV", (tokens, *MODELS.get(name, (16, 48, 500))), strict=True))
            yield Spec(op, name, dtype, {letter: sizes[letter] for letter in letters})
