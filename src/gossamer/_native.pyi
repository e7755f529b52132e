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
