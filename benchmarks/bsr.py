"""cuSPARSE's BSR format, a baseline only."""

from __future__ import annotations

import torch

from gossamer import cusparse
from gossamer.spmm import Csr


def bsr(a: Csr, size: int) -> cusparse.Sparse:
    """Blocks of size x size, row after row; the shape is rounded up to whole blocks."""
    high, wide = -(-a.shape[0] // size), -(-a.shape[1] // size)
    keys, index = torch.unique(a.rows // size * wide + a.cols // size, return_inverse=True)
    blocks = torch.zeros(len(keys), size, size, dtype=a.dtype, device=a.device)
    blocks[index, a.rows % size, a.cols.long() % size] = a.values
    pointers = torch.zeros(high + 1, dtype=torch.int32, device=a.device)
    pointers[1:] = torch.bincount(keys // wide, minlength=high).cumsum(0)
    cols = (keys % wide).to(torch.int32)
    arrays = cusparse.address(pointers), cusparse.address(cols), cusparse.address(blocks)
    kinds = cusparse.INT32, cusparse.INT32, 0, cusparse.TYPES[a.dtype], cusparse.ROW_ORDER
    args = *cusparse.sizes(high, wide, len(cols), size, size), *arrays, *kinds
    return cusparse.Sparse("cusparseCreateBsr", (high * size, wide * size), (pointers, cols, blocks), *args)
