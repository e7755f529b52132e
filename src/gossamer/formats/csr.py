"""`csr`: compressed sparse rows; matrices of any size that are mostly zeros, graphs and meshes.

Stored bytes: nnz * (itemsize + 4) + 8 * (M + 1). Cheaper than `bitmask` below a density of about 1/32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from . import Format, FormatError, Layout, Spec, _coo, dtype_name, dtype_of

MOST_COLS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class CsrFormat(Format):
    """`weight` [nnz] the non-zeros in row-major order, `cols` [nnz] int32, `rows` [M + 1] int64 where each begins."""

    weight: Tensor
    cols: Tensor
    rows: Tensor

    name: ClassVar[str] = "csr"

    @classmethod
    def encode(cls, a: Any) -> Self:
        found = _coo.coo(a)
        if found.shape[1] > MOST_COLS:
            raise FormatError(f"csr: {found.shape[1]} columns, at most 2^31 - 1; fix: cut the matrix into parts")
        rows = torch.zeros(found.shape[0] + 1, dtype=torch.int64, device=found.rows.device)
        rows[1:] = torch.bincount(found.rows, minlength=found.shape[0]).cumsum(0)
        return cls(found.shape, found.values, found.cols.to(torch.int32), rows)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        dense = self.weight.new_zeros(self.shape, dtype=dtype or self.weight.dtype)
        owner = torch.arange(self.shape[0], device=self.rows.device)
        owner = torch.repeat_interleave(owner, self.rows.diff(), output_size=self.weight.numel())
        dense[owner, self.cols.long()] = self.weight.to(dense.dtype)
        return dense

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "cols": self.cols, "rows": self.rows}

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

    @classmethod
    def build(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tuple(spec["shape"]), tensors["weight"], tensors["cols"], tensors["rows"])

    def validate(self) -> None:
        steps = self.rows.diff()
        if int(self.rows[0]) or int(self.rows[-1]) != self.weight.numel() or bool((steps < 0).any()):
            raise FormatError(f"csr: row starts must ascend from 0 to {self.weight.numel()}")
        if self.cols.numel() and not bool(((self.cols >= 0) & (self.cols < self.shape[1])).all()):
            raise FormatError(f"csr: a column lies outside 0 to {self.shape[1] - 1}")
        within = self.cols.diff() <= 0
        starts = self.rows[1:-1]
        starts = starts[(starts > 0) & (starts < self.cols.numel())]
        within[starts - 1] = False
        if bool(within.any()):
            raise FormatError("csr: columns must ascend within a row")

    @property
    def density(self) -> float:
        return self.weight.numel() / max(1, self.shape[0] * self.shape[1])
