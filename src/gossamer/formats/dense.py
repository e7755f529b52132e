"""`dense`: the matrix as it is; the fallback, and the right factor of most products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from . import Format, Layout, Spec, _coo, dtype_name, dtype_of


@dataclass(frozen=True, eq=False)
class Dense(Format):
    """`weight` [M, K] in any dtype."""

    weight: Tensor

    name: ClassVar[str] = "dense"

    @classmethod
    def encode(cls, a: Any) -> Self:
        found = _coo.matrix(a)
        if isinstance(found, _coo.Coo):
            dense = found.values.new_zeros(found.shape)
            dense[found.rows, found.cols] = found.values
            found = dense
        zeroed = torch.where(found == 0, torch.zeros_like(found), found)  # -0.0 is a zero
        return cls((found.shape[0], found.shape[1]), zeroed.contiguous())

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight.to(dtype or self.weight.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def spec(self) -> Spec:
        return super().spec() | {"dtype": dtype_name(self.weight.dtype)}

    @classmethod
    def layout(cls, spec: Spec) -> Layout:
        return {"weight": (tuple(spec["shape"]), dtype_of(spec["dtype"]))}

    @classmethod
    def build(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tuple(spec["shape"]), tensors["weight"])

    def validate(self) -> None:
        """Every tensor is a valid dense matrix."""
