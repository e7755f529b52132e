"""Sampled dense products: of x y^T only the entries that a pattern has; the gradient of a sparse matrix' values."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import nvrtc
from . import KIND
from ._columns import padded
from .csr import Csr
from .kernels.cuda_rows import THREADS, function

CHUNK = 1 << 24  # numbers that the plain version gathers at a time


def sddmm(a: Csr, x: Tensor, y: Tensor) -> Tensor:
    """out[e] = x[row of e] . y[column of e] in float32 (float64 of such), for x [M, N] and y [K, N] of one dtype."""
    if x.is_cuda and x.dtype in KIND and nvrtc.refusal(x.device) is None:
        return _cuda(a, x, y)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(a.nnz, dtype=wide, device=x.device)
    step = max(1, CHUNK // max(1, x.shape[1]))
    for begin in range(0, a.nnz, step):
        part = slice(begin, begin + step)
        out[part] = (x[a.rows[part]].to(wide) * y[a.cols[part].long()].to(wide)).sum(1)
    return out


def _cuda(a: Csr, x: Tensor, y: Tensor) -> Tensor:
    (x, n), (y, _) = padded(x), padded(y)
    out = torch.empty(a.nnz, dtype=torch.float32, device=x.device)
    vectors = n * x.element_size() // 16
    team = min(32, 1 << max(0, vectors - 1).bit_length())
    if a.nnz and n:
        grid = -(-a.nnz * team // THREADS), 1, 1
        kernel = function(KIND[x.dtype], team, 1, 1, "sddmm")
        kernel.launch(grid, (THREADS, 1, 1), a.rows32, a.cols, x, y, out, a.nnz, n, x.stride(0), y.stride(0))
    return out if n else out.zero_()
