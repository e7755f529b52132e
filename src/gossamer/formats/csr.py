"""`csr`: compressed sparse rows; matrices of any size that are mostly zeros, graphs and meshes.

Stored bytes: nnz * (itemsize + 4) + 8 * (M + 1). Cheaper than `bitmask` below a density of about 1/32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from . import FormatError, Layout, Spec, _coo, dtype_name, dtype_of
from ._rows import Rows, starts_of

MOST_COLS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class CsrFormat(Rows):
    """`weight` [nnz] the non-zeros in row-major order, `cols` [nnz] int32, `rows` [M + 1] int64 where each begins."""

    name: ClassVar[str] = "csr"

    @classmethod
    def encode(cls, a: Any) -> Self:
        found = _coo.coo(a)
        if found.shape[1] > MOST_COLS:
            raise FormatError(f"csr: {found.shape[1]} columns, at most 2^31 - 1; fix: cut the matrix into parts")
        return cls(found.shape, found.values, found.cols.to(torch.int32), starts_of(found.rows, found.shape[0]))

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        dense = self.weight.new_zeros(self.shape, dtype=dtype or self.weight.dtype)
        dense[self.owners(), self.cols.long()] = self.weight.to(dense.dtype)
        return dense

    def spec(self) -> Spec:
        return super().spec() | {"dtype": dtype_name(self.weight.dtype), "nnz": self.weight.numel()}

    @classmethod
    def layout(cls, spec: Spec) -> Layout:
        nnz = (spec["nnz"],)
        return {
            "weight": (nnz, dtype_of(spec["dtype"])),
            "cols": (nnz, torch.int32),
            "rows": ((spec["shape"][0] + 1,), torch.int64),
        }

    def validate(self) -> None:
        self.check(self.shape[1])

    @property
    def density(self) -> float:
        return self.weight.numel() / max(1, self.shape[0] * self.shape[1])
