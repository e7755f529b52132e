"""`product`: A = L R, two formats in a row. CoSpaDi's codes times dictionary, low rank's U times V.

y = x A^T is (x R^T) L^T. In CoSpaDi's words, for W^T = D S: L = S^T holds the codes and R = D^T the atoms. Several
products may hold the same R (one dictionary for q, k and v): the same tensors, which are stored and counted once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from . import Format, FormatError, Layout, Spec, class_of, from_spec, layout
from .bitmask import Bitmask

RIGHT = "right_"  # prefix of the right factor's tensors; the left factor's keep their names


@dataclass(frozen=True, eq=False)
class Product(Format):
    """`left` [M, R] and `right` [R, K], any formats but products."""

    left: Format
    right: Format

    name: ClassVar[str] = "product"

    @classmethod
    def of(cls, left: Format, right: Format) -> Self:
        """The product of two stored matrices; FormatError where they do not fit."""
        if left.shape[1] != right.shape[0]:
            raise FormatError(f"product: {left.shape} times {right.shape} do not fit")
        if isinstance(left, Product) or isinstance(right, Product):
            raise FormatError("product: a factor cannot be a product itself (nesting depth is one)")
        return cls((left.shape[0], right.shape[1]), left, right)

    @classmethod
    def encode(cls, a: Any) -> Self:
        """A times the identity: exact, for finite matrices. Methods call `of` with the factors they found."""
        left = Bitmask.encode(a)
        if not torch.isfinite(left.weight).all():
            raise FormatError("product: a product of two matrices cannot hold single NaN or Inf entries")
        k = left.shape[1]
        index = torch.arange(k, device=left.weight.device).expand(2, -1)
        ones = torch.ones(k, dtype=left.weight.dtype, device=index.device)
        return cls.of(left, Bitmask.encode(torch.sparse_coo_tensor(index, ones, (k, k), check_invariants=False)))

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        stored = torch.promote_types(_value_dtype(self.left), _value_dtype(self.right))
        wide = torch.promote_types(stored, torch.float32)
        return (self.left.decode(wide) @ self.right.decode(wide)).to(dtype or stored)

    def tensors(self) -> dict[str, Tensor]:
        return self.left.tensors() | {RIGHT + n: t for n, t in self.right.tensors().items()}

    def spec(self) -> Spec:
        return super().spec() | {"left": self.left.spec(), "right": self.right.spec()}

    @classmethod
    def layout(cls, spec: Spec) -> Layout:
        if "product" in (spec["left"]["format"], spec["right"]["format"]):
            raise FormatError("product: a factor cannot be a product itself (nesting depth is one)")
        return layout(spec["left"]) | {RIGHT + n: v for n, v in layout(spec["right"]).items()}

    @classmethod
    def build(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Self:
        left = {n: tensors[n] for n in layout(spec["left"])}
        right = {n: tensors[RIGHT + n] for n in layout(spec["right"])}
        product = cls.of(from_spec(spec["left"], left), from_spec(spec["right"], right))
        if list(product.shape) != list(spec["shape"]):
            raise FormatError(f"product: the factors make {product.shape}, the spec says {tuple(spec['shape'])}")
        return product

    def validate(self) -> None:
        self.left.validate()
        self.right.validate()


def _value_dtype(factor: Format) -> torch.dtype:
    return class_of(factor.spec()).layout(factor.spec())["weight"][1]
