"""`bitmask`: one bit per entry and the non-zeros in row-major order; any density.

Stored bytes: nnz * itemsize + M * ceil(K / 8). Cheaper than dense bf16 below density 15/16, and cheaper than any index
list above density ~1/12.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .. import cuda_bitmask, native
from . import Format, FormatError, Layout, Spec, _coo, dtype_name, dtype_of


@dataclass(frozen=True, eq=False)
class Bitmask(Format):
    """`weight` [nnz] the non-zeros; `mask` [M, ceil(K/8)] uint8, bit j of byte b stands for column 8 b + j."""

    weight: Tensor
    mask: Tensor

    name: ClassVar[str] = "bitmask"

    @classmethod
    def encode(cls, a: Any) -> Self:
        found = _coo.matrix(a)
        if isinstance(found, _coo.Coo):
            return cls(found.shape, found.values, _mask_of(found))
        shape = (found.shape[0], found.shape[1])
        if _compiled(found):
            return cls(shape, *native.pack_bitmask(found))
        if cuda_bitmask.runs_on(found):
            return cls(shape, *cuda_bitmask.pack_bitmask(found))
        return cls(shape, found[found != 0], pack_bits(found != 0))

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.weight.dtype
        if _compiled(self.weight):
            return native.unpack_bitmask(self.weight, self.mask, self.shape, dtype)
        if cuda_bitmask.runs_on(self.weight):
            return cuda_bitmask.unpack_bitmask(self.weight, self.mask, self.shape, dtype)
        dense = self.weight.new_zeros(self.shape)
        dense[unpack_bits(self.mask, self.shape[1])] = self.weight
        return dense.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "mask": self.mask}

    def spec(self) -> Spec:
        return super().spec() | {"dtype": dtype_name(self.weight.dtype), "nnz": self.weight.numel()}

    @classmethod
    def layout(cls, spec: Spec) -> Layout:
        m, k = spec["shape"]
        return {"weight": ((spec["nnz"],), dtype_of(spec["dtype"])), "mask": ((m, -(-k // 8)), torch.uint8)}

    @classmethod
    def build(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tuple(spec["shape"]), tensors["weight"], tensors["mask"])

    def validate(self) -> None:
        spare = self.shape[1] % 8
        if spare and (self.mask[:, -1] >> spare).any():
            raise FormatError("bitmask: a padding bit past the last column is set")
        if (found := _popcount(self.mask)) != self.weight.numel():
            raise FormatError(f"bitmask: the mask has {found} bits set for {self.weight.numel()} values")

    @property
    def density(self) -> float:
        return self.weight.numel() / max(1, self.shape[0] * self.shape[1])

    @staticmethod
    def size(shape: tuple[int, int], nnz: int, itemsize: int = 2) -> int:
        """Stored bytes of `nnz` values in a matrix of `shape`."""
        return nnz * itemsize + shape[0] * -(-shape[1] // 8)


def pack_bits(bits: Tensor) -> Tensor:
    """Bool [M, K] -> uint8 [M, ceil(K/8)], the first column in the lowest bit."""
    m, k = bits.shape
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -k % 8)).view(m, -(-k // 8), 8)
    return (padded << _shifts(bits.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, k: int) -> Tensor:
    """The inverse of `pack_bits`: bool [M, k]."""
    bits = (mask.unsqueeze(-1) >> _shifts(mask.device)) & 1
    return bits.view(mask.shape[0], mask.shape[1] * 8)[:, :k].bool()


def _popcount(mask: Tensor) -> int:
    if mask.device.type == "cpu" and native.available():
        return int(native.popcount_rows(mask).sum())
    return int(unpack_bits(mask, mask.shape[1] * 8).sum())


def _compiled(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in native.DTYPES and native.available()


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, device=device, dtype=torch.uint8)


def _mask_of(a: _coo.Coo) -> Tensor:
    mask = torch.zeros(a.shape[0], -(-a.shape[1] // 8), dtype=torch.uint8, device=a.values.device)
    # Without duplicates each bit is added once, so adding is the same as or-ing.
    bits = (torch.ones_like(a.cols) << (a.cols % 8)).to(torch.uint8)
    return mask.index_put_((a.rows, a.cols // 8), bits, accumulate=True)
