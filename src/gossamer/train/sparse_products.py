"""The GEMMs of a 2:4 layer on the sparse tensor cores of an NVIDIA GPU, each where that is faster than dense.

`gossamer::product24(x, w)` is x w^T for a `w` that is 2:4 along its rows, `gossamer::estimated24(dz, x)` an unbiased
estimate of dz^T x. As ops with fakes they stay whole under torch.compile(fullgraph=True). The first call for a shape
times sparse against dense, so a step runs once before a CUDA graph captures it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import cslt, cuda_patterns
from ..cslt import Algorithm, Problem
from .ffn24 import worth
from .products import Products
from .sharding import is_sharded

_library = torch.library.Library("gossamer", "FRAGMENT")
_library.define("product24(Tensor x, Tensor w) -> Tensor")
_library.define("estimated24(Tensor dz, Tensor x) -> Tensor", tags=torch.Tag.nondeterministic_seeded)


@dataclass(frozen=True)
class SparseProducts(Products):
    """Products with the weight, and with `mvue` the estimate of dz^T, compressed; what does not pay stays dense.

    The estimate is that of least variance, which costs less here than the papers' approximation of it.

    `tiles`: weights are 2:4 along both of their dimensions, so that the gradient of x can be sparse, too. A weight is
    compressed in every product that reads it: a pass over it. bfloat16 and float16; anything else runs dense, and so do
    weights that are DTensors in the forward pass, as tensor parallelism makes them (FSDP2 does not).
    """

    tiles: bool = False

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return super().forward(x, w) if is_sharded(w) else torch.ops.gossamer.product24(x, w)

    def grad_input(self, dz: Tensor, w: Tensor) -> Tensor:
        if not self.tiles or is_sharded(w):
            return super().grad_input(dz, w)
        return torch.ops.gossamer.product24(dz, w.mT)

    def grad_weight(self, dz: Tensor, x: Tensor) -> Tensor:
        if not self.mvue or is_sharded(dz) or is_sharded(x):
            return super().grad_weight(dz, x)
        return torch.ops.gossamer.estimated24(dz, x)


def _product(x: Tensor, w: Tensor) -> Tensor:
    problem = Problem(w.shape[0], w.shape[1], x.shape[0], x.dtype, x.dtype)
    if algorithm := _worth(problem, x, w):
        return cslt.matmul(cuda_patterns.compressed(w), problem, cslt.aligned(x), algorithm)
    return x @ w.mT


def _estimated(dz: Tensor, x: Tensor) -> Tensor:
    problem = Problem(dz.shape[1], x.shape[0], x.shape[1], x.dtype, x.dtype, b_rows=False, d_rows=False)
    if cuda_patterns.refusal(dz := cslt.aligned(dz)) is None and (algorithm := _worth(problem, dz, x)):
        return cslt.matmul(cuda_patterns.estimate_t(dz), problem, cslt.aligned(x), algorithm)
    return Products.sampled(dz) @ x


def _worth(problem: Problem, a: Tensor, b: Tensor) -> Algorithm | None:
    if not a.is_cuda or a.dtype != b.dtype or a.dtype not in (torch.bfloat16, torch.float16) or not a.numel():
        return None
    return worth(problem, a.get_device())


_library.impl("product24", _product, "CompositeExplicitAutograd")
_library.impl("estimated24", _estimated, "CompositeExplicitAutograd")
torch.library.register_fake("gossamer::product24", lambda x, w: x.new_empty(x.shape[0], w.shape[0]), lib=_library)
torch.library.register_fake("gossamer::estimated24", lambda dz, x: x.new_empty(dz.shape[1], x.shape[1]), lib=_library)
