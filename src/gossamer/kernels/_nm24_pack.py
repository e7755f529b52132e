"""The layout of `cuda_nm24`: what each lane of a warp holds of a 2:4 weight, in the order of use.

A stage is 16 rows by 256 columns: 512 bytes of metadata, then 512 bytes for each of 8 steps of 32 columns; 16 bytes a
lane. Lane 4 g + t has, of a step, the pairs of kept values in the groups t and then t + 4 of four columns, each of rows
g and g + 8, and of every second step the metadata of 16 columns, 4 bits a group: the stored indices, as they are. That
is what mma.sp.m16n8k32 takes (PTX ISA, "Matrix fragments for sparse mma.m16n8k32"; metadata selectors 0 and 1 in
turns). 32 rows are two stages one below the other, then come the next 256 columns, then the next 32 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats.nm24 import NM

DEPTH, BLOCK = 256, 32  # columns of a stage; rows of two
STEPS = DEPTH // 32
STAGE = 512 * (1 + STEPS)  # bytes
EMPTY = 0b01000100  # the indices 0 and 1, of two groups


def pack_matrix(a: NM, dtype: torch.dtype) -> Tensor:
    """uint8 [stages * STAGE] of a 2:4 matrix with values in `dtype`, one of 16 bits; rows and columns are padded."""
    rows, groups = a.shape[0], -(-a.shape[1] // 4)
    more_rows, more_groups = -rows % BLOCK, -groups % (DEPTH // 4)
    values = pad(a.weight.detach().to(dtype).view(torch.int16), (0, 2 * more_groups, 0, more_rows))
    values = values.view(-1, 2, 2, 8, (groups + more_groups) * 4 // DEPTH, STEPS, 2, 4, 2)
    values = values.permute(0, 4, 1, 5, 3, 7, 6, 2, 8).contiguous().view(torch.uint8)  # block, stage, half, step, ...
    index = pad(_whole(a.index, groups), (0, more_groups // 2, 0, more_rows), value=EMPTY)
    index = index.view(torch.int16).view(-1, 2, 2, 8, (groups + more_groups) * 4 // DEPTH, STEPS // 2, 2, 2)
    index = index.permute(0, 4, 1, 3, 6, 7, 5, 2).contiguous().view(torch.uint8)
    stages = values.shape[:3]
    return torch.cat([index.reshape(*stages, 512), values.reshape(*stages, STAGE - 512)], -1).flatten()


def unpack_matrix(packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> NM:
    """The matrix that was packed, its values in `dtype`, the one it was packed in."""
    groups = -(-shape[1] // 4)
    deep = -(-shape[1] // DEPTH)
    stages = packed.view(-1, deep, 2, STAGE)
    index = stages[..., :512].contiguous().view(torch.int16).view(-1, deep, 2, 8, 2, 2, STEPS // 2, 2)
    index = index.permute(0, 2, 7, 3, 1, 6, 4, 5).contiguous().view(torch.uint8)
    index = index.reshape(-1, deep * DEPTH // 8)[: shape[0], : -(-groups // 2)].contiguous()
    if groups % 2:
        index[:, -1] &= 15
    values = stages[..., 512:].contiguous().view(torch.int16).view(-1, deep, 2, STEPS, 8, 4, 2, 2, 2)
    values = values.permute(0, 2, 7, 4, 1, 3, 6, 5, 8).reshape(-1, deep * DEPTH // 2)
    return NM(shape, values[: shape[0], : 2 * groups].contiguous().view(dtype), index)


def _whole(index: Tensor, groups: int) -> Tensor:
    """The stored indices, with those of an empty group where the last byte of a row holds one group only."""
    if groups % 2:
        index = index.clone()
        index[:, -1] |= EMPTY & 0xF0
    return index
