"""The three GEMMs of a 2:4 layer: the one seam where sparse kernels replace dense ones.

Dense products are right on any device. A kernel overrides what it makes faster and leaves the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..patterns import mvue24

_fast = import_module(f"{__package__}.mvue") if find_spec("triton") else None  # it comes with torch for CUDA


@dataclass(frozen=True)
class Products:
    """x [T, K], w [N, K] 2:4 along K (along N, too, for methods with `tiles`), dz [T, N]; all of one dtype.

    `mvue`: dz^T is sampled to 2:4 along T for the gradient of the weight, with torch's generator of the device. Give
    every data-parallel rank its own seed, and keep the generators' states in checkpoints to resume to the bit.
    """

    mvue: bool = False

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x w^T [T, N]"""
        return x @ w.mT

    def grad_input(self, dz: Tensor, w: Tensor) -> Tensor:
        """dz w [T, K]"""
        return dz @ w

    def grad_weight(self, dz: Tensor, x: Tensor) -> Tensor:
        """dz^T x [N, K]"""
        return (self.sampled(dz) if self.mvue else dz.mT) @ x

    @staticmethod
    def sampled(dz: Tensor) -> Tensor:
        """An unbiased estimate of dz^T [N, T], 2:4 along T; a last short group is padded with zeros."""
        tokens = dz.shape[0]
        padded = F.pad(dz, (0, 0, 0, -tokens % 4))
        if _fast is None or not dz.is_cuda or dz.dtype not in _fast.DTYPES:
            return mvue24(padded.mT)[:, :tokens]
        seed = torch.randint(1 << 62, (1,), device=dz.device)
        return _fast.estimate(padded.unflatten(0, (-1, 4)), seed).flatten(0, 1)[:tokens].mT

    @property
    def plain(self) -> bool:
        """Are these torch's own products, so that autograd needs no help?"""
        return type(self) is Products and not self.mvue

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """y = x w^T + bias, x of any number of dimensions, under autocast in its dtype."""
        if self.plain:
            return F.linear(x, w, bias)
        x, w, bias = _autocast(x, w, bias)
        y = _Linear.apply(x, w, self)
        return y if bias is None else y + bias


def _autocast(x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if not torch.is_autocast_enabled(x.device.type):
        return x, w, bias
    kind = torch.get_autocast_dtype(x.device.type)
    return x.to(kind), w.to(kind), bias if bias is None else bias.to(kind)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, products: Products) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.products = products
        return products.forward(x.flatten(0, -2), w).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        dz = grads[0].flatten(0, -2)
        dx = ctx.products.grad_input(dz, w).view_as(x) if ctx.needs_input_grad[0] else None
        dw = ctx.products.grad_weight(dz, x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return dx, dw, None
