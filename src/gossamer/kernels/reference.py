"""Plain torch for every format on every device: decode, then the vendor's dense product.

Accumulates in float32 or better: on the CPU, where a bf16 product may round between blocks, in float32 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..formats import Format, from_spec, layout
from ..formats.product import Product
from . import Case, Kernel, Packed


class Reference(Kernel):
    """Everything; the dense matrix exists for the time of the call."""

    name: ClassVar[str] = "reference"
    device: ClassVar[str] = "any"
    formats: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        return None

    @classmethod
    def immediate(cls, case: Case) -> bool:
        return True

    @classmethod
    def pack(cls, a: Format, dtype: torch.dtype) -> Packed:
        return Packed(tuple(a.tensors().values()), a.spec())

    @classmethod
    def run(cls, x: Tensor, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Tensor:
        return linear(x, from_spec(meta, dict(zip(layout(meta), packed, strict=True))), bias)


def linear(x: Tensor, a: Format, bias: Tensor | None = None) -> Tensor:
    """y [..., M] = x [..., K] A^T + bias, in the dtype of x."""
    y = _matmul(x.to(wide(x)), a)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def _matmul(x: Tensor, a: Format) -> Tensor:
    if isinstance(a, Product):
        return _matmul(_matmul(x, a.right), a.left)
    return x @ a.decode(x.dtype).mT


def wide(x: Tensor) -> torch.dtype:
    """What x is computed in. TypeError for integers and complex numbers: a result in their dtype would lose much."""
    if not x.is_floating_point():
        raise TypeError(f"a layer multiplies real floating numbers, not {x.dtype}; fix: pass x.float()")
    return x.dtype if x.is_cuda or x.dtype == torch.float64 else torch.float32
