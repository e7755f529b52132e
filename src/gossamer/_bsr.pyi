"""
Block-sparse int8 products over raw pointers; gossamer.kernels.cpu_bsr_int8 is the typed, checked way in.
"""

def isas() -> list[str]:
    """The instruction sets this CPU can run, best first."""

def isa() -> str:
    """The instruction set in use: GOSSAMER_ISA, else the best."""

def set_isa(name: str) -> None:
    """Use this instruction set from now on, in every thread."""

def amx() -> bool:
    """Can this process use AMX for int8?"""

def count(block_rows: int, cols: int, block: int, starts: int, columns: int, groups: int, windows: int) -> int:
    """
    Checks the columns; writes where the groups and windows of each block row start, int64; gives the bytes of panels.
    """

def fill(
    block_rows: int,
    cols: int,
    block: int,
    starts: int,
    columns: int,
    data: int,
    panels: int,
    groups: int,
    group_data: int,
    offsets: int,
    wide: bool,
    windows: int,
    window_data: int,
    index: int,
    base: int,
    sums: int,
) -> None:
    """
    Writes the groups, or where `panels` is not 0 those, the windows and the sums of the rows.
    """

class Weights:
    """Packed weights; whoever has one keeps the memory behind it."""

def weights(
    rows: int,
    cols: int,
    block: int,
    panels: int,
    groups: int,
    group_data: int,
    offsets: int,
    wide: bool,
    windows: int,
    window_data: int,
    index: int,
    base: int,
    scale: int,
    sums: int,
) -> Weights:
    """What `count` and `fill` made, together; panels 0: groups."""

def quantise(
    x: int,
    type: int,
    tokens: int,
    channels: int,
    stride: int,
    layout: int,
    inverse: float,
    zero: int,
    out: int,
    out_stride: int,
    scales: int,
    threads: int,
) -> None:
    """
    Row-major floats to uint8 in a layout (0 = t, 1 = q, 2 = rows); inverse 0: per token, scales are written.
    """

def run(
    weights: Weights,
    x: int,
    layout: int,
    tokens: int,
    stride: int,
    zero: int,
    scale: float,
    token_scale: int,
    out: int,
    type: int,
    out_layout: int,
    out_stride: int,
    inverse: float,
    out_zero: int,
    bias: int,
    residual: int,
    residual_type: int,
    residual_stride: int,
    function: int,
    threads: int,
) -> None:
    """The product of quantised activations with an epilogue."""

def linear(
    weights: Weights,
    x: int,
    type: int,
    tokens: int,
    stride: int,
    bias: int,
    y: int,
    threads: int,
) -> None:
    """y [tokens, rows] = x A^T + bias, x quantised per token on the way."""
