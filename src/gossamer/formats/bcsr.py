"""`bcsr`: compressed sparse rows of dense 16 x 16 blocks; matrices whose non-zeros come in blocks or bands.

Stored bytes: blocks * (256 * itemsize + 4) + 8 * (ceil(M / 16) + 1). Cheaper than `csr` where a block is more than
about a third full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from . import Format, FormatError, Layout, Spec, _coo, dtype_name, dtype_of

SIDE = 16


@dataclass(frozen=True, eq=False)
class Bcsr(Format):
    """`weight` [blocks, 16, 16], `cols` [blocks] int32 block columns, `rows` [ceil(M/16) + 1] int64 the starts."""

    weight: Tensor
    cols: Tensor
    rows: Tensor

    name: ClassVar[str] = "bcsr"

    @classmethod
    def encode(cls, a: Any) -> Self:
        found = _coo.coo(a)
        high, wide = _blocks(found.shape)
        keys, block = torch.unique(found.rows // SIDE * max(1, wide) + found.cols // SIDE, return_inverse=True)
        weight = found.values.new_zeros(len(keys), SIDE, SIDE)
        weight[block, found.rows % SIDE, found.cols % SIDE] = found.values
        rows = torch.zeros(high + 1, dtype=torch.int64, device=keys.device)
        rows[1:] = torch.bincount(keys // max(1, wide), minlength=high).cumsum(0)
        return cls(found.shape, weight, (keys % max(1, wide)).to(torch.int32), rows)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        high, wide = _blocks(self.shape)
        dense = self.weight.new_zeros(high, wide, SIDE, SIDE, dtype=dtype or self.weight.dtype)
        dense[self._block_rows(), self.cols.long()] = self.weight.to(dense.dtype)
        return dense.transpose(1, 2).reshape(high * SIDE, wide * SIDE)[: self.shape[0], : self.shape[1]].contiguous()

    def _block_rows(self) -> Tensor:
        steps = self.rows.diff()
        return torch.repeat_interleave(torch.arange(len(steps), device=steps.device), steps, output_size=len(self.cols))

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "cols": self.cols, "rows": self.rows}

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

    @classmethod
    def build(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tuple(spec["shape"]), tensors["weight"], tensors["cols"], tensors["rows"])

    def validate(self) -> None:
        high, wide = _blocks(self.shape)
        if int(self.rows[0]) or int(self.rows[-1]) != len(self.cols) or bool((self.rows.diff() < 0).any()):
            raise FormatError(f"bcsr: block row starts must ascend from 0 to {len(self.cols)}")
        if len(self.cols) and not bool(((self.cols >= 0) & (self.cols < wide)).all()):
            raise FormatError(f"bcsr: a block column lies outside 0 to {wide - 1}")
        if bool(((self._block_rows() * wide + self.cols).diff() <= 0).any()):
            raise FormatError("bcsr: block columns must ascend within a block row")
        edge = torch.zeros(1, dtype=torch.bool, device=self.weight.device)
        if self.shape[0] % SIDE:
            edge = edge | (self.weight[self._block_rows() == high - 1, self.shape[0] % SIDE :] != 0).any()
        if self.shape[1] % SIDE:
            edge = edge | (self.weight[self.cols == wide - 1, :, self.shape[1] % SIDE :] != 0).any()
        if bool(edge):
            raise FormatError("bcsr: a value lies past the last row or column")

    @property
    def density(self) -> float:
        return float((self.weight != 0).sum()) / max(1, self.shape[0] * self.shape[1])


def _blocks(shape: tuple[int, int] | list[int]) -> tuple[int, int]:
    return -(-shape[0] // SIDE), -(-shape[1] // SIDE)
