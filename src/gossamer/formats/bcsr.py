"""`bcsr`: compressed sparse rows of dense 16 x 16 blocks; matrices whose non-zeros come in blocks or bands.

Stored bytes: blocks * (256 * itemsize + 4) + 8 * (ceil(M / 16) + 1). Cheaper than `csr` where a block is more than
about a third full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from . import FormatError, Layout, Spec, _coo, dtype_name, dtype_of
from ._rows import DAMAGED, Rows, starts_of

SIDE = 16


@dataclass(frozen=True, eq=False)
class Bcsr(Rows):
    """`weight` [blocks, 16, 16], `cols` [blocks] int32 block columns, `rows` [ceil(M/16) + 1] int64 the starts."""

    name: ClassVar[str] = "bcsr"

    @classmethod
    def encode(cls, a: Any) -> Self:
        found = _coo.coo(a)
        high, wide = _blocks(found.shape)
        keys, block = torch.unique(found.rows // SIDE * max(1, wide) + found.cols // SIDE, return_inverse=True)
        weight = found.values.new_zeros(len(keys), SIDE, SIDE)
        weight[block, found.rows % SIDE, found.cols % SIDE] = found.values
        cols, rows = (keys % max(1, wide)).to(torch.int32), starts_of(keys // max(1, wide), high)
        return cls(found.shape, weight, cols, rows)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        high, wide = _blocks(self.shape)
        dense = self.weight.new_zeros(high, wide, SIDE, SIDE, dtype=dtype or self.weight.dtype)
        dense[self.owners(), self.cols.long()] = self.weight.to(dense.dtype)
        return dense.transpose(1, 2).reshape(high * SIDE, wide * SIDE)[: self.shape[0], : self.shape[1]].contiguous()

    def spec(self) -> Spec:
        return super().spec() | {"dtype": dtype_name(self.weight.dtype), "blocks": len(self.weight)}

    @classmethod
    def layout(cls, spec: Spec) -> Layout:
        blocks = spec["blocks"]
        return {
            "weight": ((blocks, SIDE, SIDE), dtype_of(spec["dtype"])),
            "cols": ((blocks,), torch.int32),
            "rows": ((_blocks(spec["shape"])[0] + 1,), torch.int64),
        }

    def validate(self) -> None:
        high, wide = _blocks(self.shape)
        self.check(wide)
        edge = torch.zeros(1, dtype=torch.bool, device=self.weight.device)
        if self.shape[0] % SIDE:
            edge = edge | (self.weight[self.owners() == high - 1, self.shape[0] % SIDE :] != 0).any()
        if self.shape[1] % SIDE:
            edge = edge | (self.weight[self.cols == wide - 1, :, self.shape[1] % SIDE :] != 0).any()
        if bool(edge):
            raise FormatError(f"bcsr: a value lies past the last row or column; {DAMAGED}")

    @property
    def density(self) -> float:
        return float((self.weight != 0).sum()) / max(1, self.shape[0] * self.shape[1])


def _blocks(shape: tuple[int, int] | list[int]) -> tuple[int, int]:
    return -(-shape[0] // SIDE), -(-shape[1] // SIDE)
