"""A dense copy of the weight and torch's own product: what every sparse kernel has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..formats import Format, dtype_name
from . import Case, Kernel, Packed


class Vendor(Kernel):
    """Any device, any dtype, any number of tokens; the copy has the dtype of x."""

    name: ClassVar[str] = "vendor"
    device: ClassVar[str] = "any"
    formats: ClassVar[tuple[str, ...]] = ("dense",)
    transparent: ClassVar[bool] = True

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        return None

    @classmethod
    def immediate(cls, case: Case) -> bool:
        return case.spec["dtype"] == dtype_name(case.dtype)  # else the copy is made on every call

    @classmethod
    def pack(cls, a: Format, dtype: torch.dtype) -> Packed:
        return Packed((a.decode(dtype).detach().contiguous(),))

    @classmethod
    def run(cls, x: Tensor, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Tensor:
        return linear(x, packed[0], None if bias is None else bias.to(x.dtype))

    @classmethod
    def bind(cls, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        weight = packed[0]
        if bias is None:
            return lambda x: linear(x, weight)
        if bias.dtype != weight.dtype:
            return super().bind(packed, meta, bias)  # a copy would not see the bias change
        return lambda x: linear(x, weight, bias)

    @classmethod
    def unpack(cls, packed: Sequence[Tensor], meta: dict[str, Any]) -> Tensor | None:
        # On the CPU a dense copy comes beside the stored tensors: memory is less dear there than encoding again.
        return packed[0] if packed[0].is_cuda else None
