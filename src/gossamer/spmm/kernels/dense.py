"""A dense copy and the vendor's dense product, for matrices that are hardly sparse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
    def ways(cls, a: Csr, tf32: bool, deterministic: bool = True) -> list[Way]:
        knobs = (("tf32", True),) if tf32 else ()
        return [Way(cls.name, knobs)] if a.nnz >= LEAST_DENSITY * a.shape[0] * a.shape[1] else []

    @classmethod
    def pack(cls, a: Csr, n: int, **knobs: Any) -> Packed:
        dense = torch.zeros(a.shape, dtype=a.dtype, device=a.device)
        dense[a.rows, a.cols.long()] = a.values
        return Packed((dense,), {"tf32": knobs.get("tf32", False)})

    @classmethod
    def run(cls, b: Tensor, packed: Sequence[Tensor], meta: dict[str, Any]) -> Tensor:
        with _tf32() if meta["tf32"] else nullcontext():
            return packed[0] @ b


@contextmanager
def _tf32() -> Iterator[None]:
    """Float32 products may be rounded within."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
