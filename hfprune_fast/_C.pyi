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

# Of a tensor: address, stride of the rows and dtype; the last stride is 1.
_Rows = tuple[int, int, str]
# Address, stride of the sequences and of the tokens.
_Tokens = tuple[int, int, int]
# softcap and logit_scale.
_Transform = tuple[float | None, float]

def kernel_instructions() -> list[str]:
    """Of "avx512", "avx2" and "portable", what was built and this CPU has, best first."""

def row_pass(
    logits: _Rows,
    *,
    rows: int,
    columns: int,
    values: int,
    grad: _Rows | None,
    row_scale: int,
    keys: int,
    criterion: str,
    alpha: float,
    temperature: float,
    transform: _Transform,
    threads: int,
    instructions: str,
) -> None:
    """Write the value of each row of logits and, if given, row_scale times its gradient to grad.

    Addresses are of contiguous fp32 values and row_scale, and of keys: int64 labels or, for fisher,
    fp32 uniform numbers. Raises ValueError before anything is written. Releases the GIL.
    """

def kl_pass(
    logits: _Rows,
    teacher: _Rows,
    *,
    rows: int,
    columns: int,
    values: int,
    grad: _Rows,
    row_scale: int,
    transform: _Transform,
    teacher_transform: _Transform,
    threads: int,
    instructions: str,
) -> None:
    """Write the KL divergence of each row from the teacher's, and row_scale times its gradient.

    Raises ValueError before anything is written. Releases the GIL.
    """

def taylor_pass(
    dtype: str,
    *,
    sequences: int,
    tokens: int,
    width: int,
    activation: str,
    grad: _Tokens,
    gate: _Tokens,
    up: _Tokens = ...,
    d_gate: _Tokens = ...,
    d_up: _Tokens = ...,
    is_token: int,
    sums: int,
    threads: int,
    instructions: str,
) -> None:
    """Write the (4, width) fp64 sums and, unless activation is "none", the gradients.

    With "none", gate is act itself. is_token is the address of a byte a token, or 0. Raises
    ValueError before anything is written. Releases the GIL.
    """
