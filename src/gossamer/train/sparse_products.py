"""The GEMMs of a 2:4 layer on the sparse tensor cores of an NVIDIA GPU, each where that is faster than dense."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import cslt, cuda_patterns
from ..cslt import Problem
from .ffn24 import uncompiled, worth
from .products import Products


@dataclass(frozen=True)
class SparseProducts(Products):
    """Products with the weight, and with `mvue` the estimate of dz^T, compressed; what does not pay stays dense.

    The estimate is that of least variance, which costs less here than the papers' approximation of it.

    `tiles`: weights are 2:4 along both of their dimensions, so that the gradient of x can be sparse, too. A weight is
    compressed in every product that reads it: a pass over it. bfloat16 and float16; anything else runs dense.
    """

    tiles: bool = False

    @uncompiled
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return _product(w, x) if _fits(x, w) else super().forward(x, w)

    @uncompiled
    def grad_input(self, dz: Tensor, w: Tensor) -> Tensor:
        if self.tiles and _fits(dz, w.mT):
            return _product(w.mT.contiguous(), dz)
        return super().grad_input(dz, w)

    @uncompiled
    def grad_weight(self, dz: Tensor, x: Tensor) -> Tensor:
        if self.mvue and cuda_patterns.refusal(dz) is None and x.dtype == dz.dtype:
            problem = Problem(dz.shape[1], x.shape[0], x.shape[1], x.dtype, x.dtype, b_rows=False, d_rows=False)
            if algorithm := worth(problem, x.get_device()):
                return cslt.matmul(cuda_patterns.estimate_t(dz), problem, cslt.aligned(x), algorithm)
        return super().grad_weight(dz, x)


def _problem(x: Tensor, w: Tensor) -> Problem:
    return Problem(w.shape[0], w.shape[1], x.shape[0], x.dtype, x.dtype)


def _fits(x: Tensor, w: Tensor) -> bool:
    if not x.is_cuda or x.dtype != w.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return worth(_problem(x, w), x.get_device()) is not None


def _product(w: Tensor, x: Tensor) -> Tensor:
    """x w^T for a 2:4 `w`."""
    algorithm = worth(_problem(x, w), x.get_device())
    assert algorithm is not None  # `_fits` said so
    return cslt.matmul(cuda_patterns.compressed(w), _problem(x, w), cslt.aligned(x), algorithm)
