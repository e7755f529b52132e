"""A dense copy and the vendor's dense product, for matrices that are hardly sparse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import Csr, Packed, SpmmKernel, Way

MOST_BYTES = 4 << 30
LEAST_DENSITY = 1 / 256  # a dense product of a thinner matrix has never been worth a try


class Dense(SpmmKernel):
    """Matrices that are dense enough, and not too large."""

    name: ClassVar[str] = "dense"

    @classmethod
    def refuses(cls, a: Csr) -> str | None:
        if a.shape[0] * a.shape[1] * a.values.element_size() > MOST_BYTES:
            return f"a dense copy of at most {MOST_BYTES >> 30} GB"
        return None

    @classmethod
    def ways(cls, a: Csr, tf32: bool) -> list[Way]:
        return [Way(cls.name)] if a.nnz >= LEAST_DENSITY * a.shape[0] * a.shape[1] else []

    @classmethod
    def pack(cls, a: Csr, n: int, **knobs: Any) -> Packed:
        dense = torch.zeros(a.shape, dtype=a.dtype, device=a.device)
        dense[a.rows, a.cols.long()] = a.values
        return Packed((dense,), {})

    @classmethod
    def run(cls, b: Tensor, packed: Sequence[Tensor], meta: dict[str, Any]) -> Tensor:
        return packed[0] @ b
