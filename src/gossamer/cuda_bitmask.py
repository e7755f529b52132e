"""Bitmask encode and decode on the GPU, bit for bit what `gossamer.native` does on the CPU.

A matrix is cut into tiles of up to 1,024 columns of one row; `offsets` [tiles + 1] int64 says where the values of each
tile start, and where the last end. Rows of whole mask bytes join into one long row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, nvrtc

DTYPES = native.DTYPES
TILE, WARPS, COUNTED = 1024, 4, 8  # as in bitmask.cuh
_ARGS = {"count": "PPqq", "unpack": "PPPPqqq", "mark": "PPPQqqq", "pack": "PPPPqqq"}


def _functions(size: int, vec: int) -> dict[str, nvrtc.Function]:
    macros = {"BYTES": size, "VEC": vec}
    return {entry: nvrtc.Function("bitmask.cuh", entry, args, macros) for entry, args in _ARGS.items()}


_FUNCTIONS = {(size, vec): _functions(size, vec) for size in (1, 2, 4, 8) for vec in (1, 16 // size)}
VARIANTS = tuple(f for functions in _FUNCTIONS.values() for f in functions.values())


def runs_on(tensor: Tensor) -> bool:
    """Can this tensor's bitmask be packed or unpacked here?"""
    return tensor.is_cuda and tensor.dtype in DTYPES and nvrtc.refusal(tensor.device) is None


def pack_bitmask(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Dense [M, K] on a GPU -> (values [nnz] of its dtype, mask [M, ceil(K / 8)] uint8). -0.0 counts as zero.

    Waits for the GPU once, to learn nnz, so a CUDA graph cannot capture it.
    """
    if dense.dim() != 2:
        raise ValueError(f"expected a matrix, got {dense.dim()} dimensions")
    dense = dense.detach()
    dense = dense if dense.stride(1) == 1 or dense.shape[1] <= 1 else dense.contiguous()
    mask = torch.empty(dense.shape[0], -(-dense.shape[1] // 8), dtype=torch.uint8, device=dense.device)
    if not dense.numel():
        return dense.new_empty(0), mask
    rows, cols = _joined(dense.shape) if dense.is_contiguous() else dense.shape
    stride = dense.stride(0) if rows > 1 else cols
    functions, grid = _chosen(dense, stride), _grid(rows, cols)
    offsets = mask.new_empty(_tiles(rows, cols) + 1, dtype=torch.int64)
    magnitude = (1 << 8 * dense.itemsize - dense.is_floating_point()) - 1
    functions["mark"].launch(grid, _BLOCK, dense, mask, offsets, magnitude, rows, cols, stride)
    offsets.cumsum_(0)
    values = dense.new_empty(int(offsets[-1]))
    if values.numel():
        functions["pack"].launch(grid, _BLOCK, dense, mask, offsets, values, rows, cols, stride)
    return values, mask


def unpack_bitmask(
    values: Tensor,
    mask: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """The inverse of `pack_bitmask`: dense [M, K], of `dtype` if given; `offsets` as from `tile_offsets`, if at hand.

    Never waits for the GPU. So it trusts the mask to have as many bits as there are values (`Format.validate` checks):
    one with more reads as if zeros followed the values.
    """
    dense = values.new_empty(tuple(shape))
    if dense.numel():
        rows, cols = _joined(dense.shape)
        offsets = tile_offsets(mask, shape) if offsets is None else offsets
        args = values.detach().contiguous(), mask.contiguous(), offsets, dense, values.numel(), rows, cols
        _chosen(dense, cols)["unpack"].launch(_grid(rows, cols), _BLOCK, *args)
    return dense if dtype is None else dense.to(dtype)


def tile_offsets(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Where the values of each tile start, int64 [tiles + 1]: counted from the mask, without waiting for the GPU."""
    rows, cols = _joined(shape)
    offsets = mask.new_empty(_tiles(rows, cols) + 1, dtype=torch.int64)
    if not rows * cols:
        return offsets.zero_()
    _FUNCTIONS[1, 1]["count"].launch(_grid(rows, cols, COUNTED), _BLOCK, mask.contiguous(), offsets, rows, cols)
    return offsets.cumsum_(0)


def _joined(shape: Sequence[int]) -> tuple[int, int]:
    """Rows that leave no spare bits in their masks lie end to end, as one row."""
    rows, cols = shape
    return (rows, cols) if cols % 8 else (1, rows * cols)


def _chosen(dense: Tensor, stride: int) -> dict[str, nvrtc.Function]:
    size = dense.itemsize
    wide = dense.data_ptr() % 16 == 0 and stride * size % 16 == 0
    return _FUNCTIONS[size, 16 // size if wide else 1]


_BLOCK = (32 * WARPS, 1, 1)


def _tiles(rows: int, cols: int) -> int:
    return rows * -(-cols // TILE)


def _grid(rows: int, cols: int, per_warp: int = 1) -> tuple[int, int, int]:
    return -(-_tiles(rows, cols) // (WARPS * per_warp)), 1, 1
