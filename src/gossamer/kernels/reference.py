"""Plain torch for every format on every device: decode, then the vendor's dense product.

Accumulates in float32 or better: on the CPU, where a bf16 product may round between blocks, in float32 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Format
from ..formats.product import Product


def linear(x: Tensor, a: Format, bias: Tensor | None = None) -> Tensor:
    """y [..., M] = x [..., K] A^T + bias, in the dtype of x."""
    y = _matmul(x.to(_wide(x)), a)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def _matmul(x: Tensor, a: Format) -> Tensor:
    if isinstance(a, Product):
        return _matmul(_matmul(x, a.right), a.left)
    return x @ a.decode(x.dtype).mT


def _wide(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_cuda or x.dtype == torch.float64 else torch.float32
