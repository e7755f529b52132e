"""patterns.mvue24 for groups along the first dimension, written so that torch.compile makes two passes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..patterns import LAST

TINY = torch.finfo(torch.float32).tiny


def estimate(g: Tensor, uniforms: Tensor) -> Tensor:
    """An unbiased estimate of `g` [G, 4, N] with two of every four along dim 1; `uniforms` [2, G, N] in [0, 1).

    Drawn as patterns.mvue24 draws (Chmiel et al., 2203.10991). Which two and their values are found in one pass and
    spread in a second: in one, a compiler would find them anew for each of the four entries, or write all in between.
    """
    a = [entry.abs().float() for entry in g.unbind(1)]
    most = torch.maximum(torch.maximum(a[0], a[1]), torch.maximum(a[2], a[3])).clamp_min(TINY)
    a = [entry / most for entry in a]  # so that sums neither over- nor underflow
    u, v = uniforms.float().clamp_max(LAST)
    first = _draw(a, u)
    second = _draw([entry.masked_fill(first == i, 0) for i, entry in enumerate(a)], v)
    total = sum(a[1:], a[0]).clamp_min(TINY)
    share = [entry / total for entry in a]
    odds = [s / _others(share, i).clamp_min(TINY) for i, s in enumerate(share)]
    p = [s * (1 + _others(odds, i)) for i, s in enumerate(share)]
    values = [torch.where(q > 0, e / q.clamp_min(TINY), 0.0).to(g.dtype) for q, e in zip(p, g.unbind(1), strict=True)]
    return _spread(first, second, _pick(values, first), _pick(values, second))


def _draw(a: list[Tensor], u: Tensor) -> Tensor:
    """Which of four, with probability a_i / sum a; int8."""
    one, two, three = a[0], a[0] + a[1], a[0] + a[1] + a[2]
    x = u * (three + a[3])
    return (x >= one).to(torch.int8) + (x >= two) + (x >= three)


def _others(a: list[Tensor], i: int) -> Tensor:
    p, q, r = a[:i] + a[i + 1 :]
    return p + q + r


def _pick(values: list[Tensor], which: Tensor) -> Tensor:
    low = torch.where(which == 0, values[0], values[1])
    return torch.where(which < 2, low, torch.where(which == 2, values[2], values[3]))


def _spread(first: Tensor, second: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[G, N] -> [G, 4, N]: `a` at `first`, `b` at `second`, zeros elsewhere."""
    rows = [torch.where(first == i, a, torch.where(second == i, b, torch.zeros_like(b))) for i in range(4)]
    return torch.stack(rows, 1)
