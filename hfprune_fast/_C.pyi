from typing_extensions import Buffer

def instructions() -> str:
    """The best of "avx512_vbmi2", "avx512f" and "portable" on this CPU."""

def compact(
    source: Buffer,
    out: Buffer,
    *,
    rows: int,
    columns: int,
    item_bytes: int,
    axis: int,
    keep: Buffer,
    threads: int,
    portable: bool = False,
) -> None:
    """Move the kept rows (axis 0) or columns (axis 1) of source to the front of out.

    In place where out is source. keep: sorted int64. Raises ValueError before anything is moved.
    """

def write(
    file: int,
    offset: int,
    source: Buffer,
    *,
    rows: int,
    columns: int,
    item_bytes: int,
    exponent: int,
    axis: int = 0,
    keep: Buffer | None = None,
) -> bool:
    """Write source, or its kept rows or columns, at an offset of a file descriptor.

    Returns False if a value written has all bits of exponent set; 0: values are not looked at.
    Raises ValueError before anything is written, OSError.
    """
