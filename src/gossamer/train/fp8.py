"""FP8 products of S-STE: e4m3 forward, on the GPU's own units where it has them, e5m2 backward, simulated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .products import Products

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Fp8Products(Products):
    """Every operand scaled by its own largest magnitude to the range of its 8 bits.

    The forward product is `torch._scaled_mm` on GPUs of compute capability 8.9 or more where sizes are multiples of 16;
    elsewhere, and in the backward pass as in the authors' release, operands are rounded to 8 bits and multiplied in
    their own dtype: the numbers of FP8 without its speed.
    """

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        if not _has_units(x, w):
            return rounded(x, E4M3) @ rounded(w, E4M3).mT
        (x8, x_scale), (w8, w_scale) = quantise(x, E4M3), quantise(w, E4M3)
        return torch._scaled_mm(x8, w8.mT, scale_a=x_scale, scale_b=w_scale, out_dtype=x.dtype)

    def grad_input(self, dz: Tensor, w: Tensor) -> Tensor:
        return rounded(dz, E5M2) @ rounded(w, E5M2)

    def grad_weight(self, dz: Tensor, x: Tensor) -> Tensor:
        dzt = self.sampled(dz) if self.mvue else dz.mT
        return rounded(dzt, E5M2) @ rounded(x, E5M2)


def quantise(a: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """`a` in 8 bits and the float32 scalar to multiply it with."""
    scale = a.abs().amax().float().clamp_min(1e-30) / torch.finfo(kind).max
    return (a.float() / scale).to(kind), scale


def rounded(a: Tensor, kind: torch.dtype) -> Tensor:
    """`a` with the values that its 8 bits hold, in its own dtype."""
    bits, scale = quantise(a, kind)
    return (bits.float() * scale).to(a.dtype)


def _has_units(x: Tensor, w: Tensor) -> bool:
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or any(n % 16 for n in (*x.shape, *w.shape)):
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 9)
