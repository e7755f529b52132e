"""The unbiased 2:4 estimate of patterns.mvue24 for groups along the first dimension, in one pass on a GPU.

Random numbers are made where they are used. Plain torch, compiled, makes several passes of it and writes all between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..patterns import LAST as _LAST

LAST, TINY = tl.constexpr(_LAST), tl.constexpr(torch.finfo(torch.float32).tiny)
ROWS, COLUMNS = 8, 128  # groups x columns of a program
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _which(a, b, c, d, u):
    """Which of four, with probability a_i / sum a."""
    x = tl.minimum(u, LAST) * (a + b + c + d)
    return (x >= a).to(tl.int32) + (x >= a + b).to(tl.int32) + (x >= a + b + c).to(tl.int32)


@triton.jit
def _odds(share, x, y, z):
    return share / tl.maximum(x + y + z, TINY)


@triton.jit
def _scaled(kept, g, p):
    return tl.where(kept & (p > 0), g / tl.maximum(p, TINY), 0.0)


@triton.jit
def _kernel(g, out, seed, groups, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < groups) & (column < columns)
    at = row.to(tl.int64) * (4 * columns) + column
    g0 = tl.load(g + at, inside, 0.0).to(tl.float32)
    g1 = tl.load(g + at + columns, inside, 0.0).to(tl.float32)
    g2 = tl.load(g + at + 2 * columns, inside, 0.0).to(tl.float32)
    g3 = tl.load(g + at + 3 * columns, inside, 0.0).to(tl.float32)
    a0, a1, a2, a3 = tl.abs(g0), tl.abs(g1), tl.abs(g2), tl.abs(g3)
    most = tl.maximum(tl.maximum(tl.maximum(a0, a1), tl.maximum(a2, a3)), TINY)  # no sum over- or underflows
    a0, a1, a2, a3 = a0 / most, a1 / most, a2 / most, a3 / most
    u, v, _, _ = tl.rand4x(tl.load(seed), row * columns + column)
    i = _which(a0, a1, a2, a3, u)
    b0, b1 = tl.where(i == 0, 0.0, a0), tl.where(i == 1, 0.0, a1)
    b2, b3 = tl.where(i == 2, 0.0, a2), tl.where(i == 3, 0.0, a3)
    j = _which(b0, b1, b2, b3, v)
    total = tl.maximum(a0 + a1 + a2 + a3, TINY)
    s0, s1, s2, s3 = a0 / total, a1 / total, a2 / total, a3 / total
    o0, o1 = _odds(s0, s1, s2, s3), _odds(s1, s0, s2, s3)
    o2, o3 = _odds(s2, s0, s1, s3), _odds(s3, s0, s1, s2)
    kind = out.dtype.element_ty
    tl.store(out + at, _scaled((i == 0) | (j == 0), g0, s0 * (1 + (o1 + o2 + o3))).to(kind), inside)
    tl.store(out + at + columns, _scaled((i == 1) | (j == 1), g1, s1 * (1 + (o0 + o2 + o3))).to(kind), inside)
    tl.store(out + at + 2 * columns, _scaled((i == 2) | (j == 2), g2, s2 * (1 + (o0 + o1 + o3))).to(kind), inside)
    tl.store(out + at + 3 * columns, _scaled((i == 3) | (j == 3), g3, s3 * (1 + (o0 + o1 + o2))).to(kind), inside)


@torch.library.custom_op("gossamer::mvue24_groups", mutates_args=(), device_types="cuda")
def estimate(g: Tensor, seed: Tensor) -> Tensor:
    """An unbiased estimate of `g` [G, 4, N], two of every four along dim 1; `seed`: one int64 on the same GPU."""
    g = g.contiguous()
    out = torch.empty_like(g)
    groups, _, columns = g.shape
    with torch.cuda.device(g.device):
        grid = triton.cdiv(groups, ROWS), triton.cdiv(columns, COLUMNS)
        _kernel[grid](g, out, seed, groups, columns, ROWS, COLUMNS)  # pyright: ignore[reportIndexIssue]
    return out


@estimate.register_fake
def _(g: Tensor, seed: Tensor) -> Tensor:
    return torch.empty_like(g, memory_format=torch.contiguous_format)
