"""
CPU kernels of Gossamer over raw pointers; gossamer.native is the typed, checked way in.
"""

def isas() -> list[str]:
    """The instruction sets this CPU can run, best first."""

def isa() -> str:
    """The instruction set in use: GOSSAMER_ISA, else the best."""

def set_isa(name: str) -> None:
    """Use this instruction set from now on, in every thread."""

def bitmask_count(
    src: int, rows: int, cols: int, row_stride_bytes: int, itemsize: int, is_float: bool, counts: int, threads: int
) -> None:
    """Non-zeros per row, int64."""

def bitmask_pack(
    src: int,
    rows: int,
    cols: int,
    row_stride_bytes: int,
    itemsize: int,
    is_float: bool,
    mask: int,
    offsets: int,
    values: int,
    threads: int,
) -> None:
    """
    Writes mask [rows, ceil(cols / 8)] and values; offsets [rows + 1] are where each row's values start.
    """

def bitmask_unpack(
    mask: int,
    values: int,
    offsets: int,
    rows: int,
    cols: int,
    itemsize: int,
    dst: int,
    dst_row_stride_bytes: int,
    threads: int,
) -> None:
    """The inverse of bitmask_pack, with zeros elsewhere."""

def bitmask_unpack_bf16_f32(
    mask: int, values: int, offsets: int, rows: int, cols: int, dst: int, dst_row_stride_bytes: int, threads: int
) -> None:
    """bitmask_unpack of bfloat16 values into float32."""

def popcount_rows(mask: int, rows: int, row_bytes: int, counts: int, threads: int) -> None:
    """Set bits per row, int64."""

def bitmask_linear(
    mask: int,
    values: int,
    offsets: int,
    type: int,
    rows: int,
    cols: int,
    x: int,
    x_type: int,
    x_row_stride_bytes: int,
    tokens: int,
    bias: int,
    bias_type: int,
    y: int,
    threads: int,
) -> None:
    """
    y [tokens, rows] = x A^T + bias; tokens 1 to 16, types 0 = float32, 1 = bfloat16, y's that of x.
    """

def bitmask_many(
    mask: int,
    values: int,
    offsets: int,
    type: int,
    rows: int,
    cols: int,
    x: int,
    x_type: int,
    x_row_stride_bytes: int,
    tokens: int,
    bias: int,
    bias_type: int,
    y: int,
    threads: int,
) -> bool:
    """
    bitmask_linear of any number of tokens that multiplies no zeros; False, and no y, where x is not finite.
    """

def dense_linear(
    weight: int,
    type: int,
    rows: int,
    cols: int,
    x: int,
    x_type: int,
    x_row_stride_bytes: int,
    tokens: int,
    bias: int,
    bias_type: int,
    y: int,
    threads: int,
) -> None:
    """bitmask_linear of a dense [rows, cols]."""

def sum_words(buffer: int, bytes: int, threads: int) -> int:
    """The sum of the 64-bit words of a buffer of whole cache lines, modulo 2^64."""

def move_to_huge_pages(begin: int, bytes: int) -> bool:
    """Moves memory onto huge pages without changing its address; False where the system would not."""

def cuda_launch(
    launch: int,
    function: int,
    kinds: str,
    stream: int,
    shared: int,
    grid: tuple,
    block: tuple,
    *values,
) -> int:
    """cuLaunchKernel, which lies at the address `launch`; its error, 0 if none."""

def cslt_matmul(
    matmul: int, handle: int, plan: int, numbers: int, a: int, b: int, d: int, space: int, stream: int
) -> int:
    """
    cusparseLtMatmul, which lies at the address `matmul`, with C = D; its status, 0 if all is well.
    """

def threads_of() -> str:
    """
    Whose threads do the work: openmp (those of torch) or threads (made for the call).
    """
