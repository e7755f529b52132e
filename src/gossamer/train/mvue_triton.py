"""`mvue.estimate` in one pass on a GPU, with random numbers made where they are used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 8, 128  # groups x columns of a program


@triton.jit
def _odds(x, y, z):
    return tl.maximum(x + y + z, 1.1754943508222875e-38)


@triton.jit
def _which(a, b, c, d, u):
    """Which of four, with probability a_i / sum a."""
    x = tl.minimum(u, 0.9999998807907104) * (a + b + c + d)
    return (x >= a).to(tl.int32) + (x >= a + b).to(tl.int32) + (x >= a + b + c).to(tl.int32)


@triton.jit
def _keep(kept, g, p):
    return tl.where(kept & (p > 0), g / tl.maximum(p, 1.1754943508222875e-38), 0.0)


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
    most = tl.maximum(tl.maximum(tl.maximum(a0, a1), tl.maximum(a2, a3)), 1.1754943508222875e-38)
    a0, a1, a2, a3 = a0 / most, a1 / most, a2 / most, a3 / most
    u, v, _, _ = tl.rand4x(tl.load(seed), row * columns + column)
    first = _which(a0, a1, a2, a3, u)
    second = _which(
        tl.where(first == 0, 0.0, a0), tl.where(first == 1, 0.0, a1), tl.where(first == 2, 0.0, a2),
        tl.where(first == 3, 0.0, a3), v,
    )
    total = tl.maximum(a0 + a1 + a2 + a3, 1.1754943508222875e-38)
    s0, s1, s2, s3 = a0 / total, a1 / total, a2 / total, a3 / total
    o0, o1, o2, o3 = s0 / _odds(s1, s2, s3), s1 / _odds(s0, s2, s3), s2 / _odds(s0, s1, s3), s3 / _odds(s0, s1, s2)
    kind = out.dtype.element_ty
    tl.store(out + at, _keep((first == 0) | (second == 0), g0, s0 * (1 + o1 + o2 + o3)).to(kind), inside)
    tl.store(out + at + columns, _keep((first == 1) | (second == 1), g1, s1 * (1 + o0 + o2 + o3)).to(kind), inside)
    tl.store(out + at + 2 * columns, _keep((first == 2) | (second == 2), g2, s2 * (1 + o0 + o1 + o3)).to(kind), inside)
    tl.store(out + at + 3 * columns, _keep((first == 3) | (second == 3), g3, s3 * (1 + o0 + o1 + o2)).to(kind), inside)


@torch.library.custom_op("gossamer::mvue24_groups", mutates_args=(), device_types="cuda")
def estimate(g: Tensor, seed: Tensor) -> Tensor:
    """`g` [G, 4, N] contiguous -> its estimate; `seed`: one int64 on the device."""
    out = torch.empty_like(g)
    groups, _, columns = g.shape
    _kernel[triton.cdiv(groups, ROWS), triton.cdiv(columns, COLUMNS)](g, out, seed, groups, columns, ROWS, COLUMNS)
    return out


@estimate.register_fake
def _(g: Tensor, seed: Tensor) -> Tensor:
    return torch.empty_like(g)
