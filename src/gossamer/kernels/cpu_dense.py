"""A dense weight on the CPU for up to 16 tokens: one read of the weight, float32 sums, no copy. The honest baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import native
from ..formats import Format
from . import Case, Kernel, Packed


class CpuDense(Kernel):
    """float32 and bfloat16 weights by float32 and bfloat16 x, any shape, at most 16 tokens."""

    name: ClassVar[str] = "cpu_dense"
    device: ClassVar[str] = "cpu"
    formats: ClassVar[tuple[str, ...]] = ("dense",)

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        if reason := native.refusal(case.device, case.dtype):
            return reason
        if case.tokens > native.MAX_TOKENS:
            return f"at most {native.MAX_TOKENS} tokens"
        return None

    @classmethod
    def immediate(cls, case: Case) -> bool:
        return True

    @classmethod
    def pack(cls, a: Format, dtype: torch.dtype) -> Packed:
        """Any format, decoded. float32 and bfloat16 stay as they are stored, anything else becomes float32."""
        dense = a.decode()
        if dense.dtype not in native.FLOATS:
            dense = a.decode(torch.float32)
        return Packed((dense.detach().contiguous(),))

    @classmethod
    def run(cls, x: Tensor, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Tensor:
        few = 0 < x.numel() <= native.MAX_TOKENS * packed[0].shape[1] or x.shape[:-1].numel() <= native.MAX_TOKENS
        return native.dense_linear(x, packed[0], bias) if few else _many(x, packed[0], bias)

    @classmethod
    def bind(cls, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        few, most = native.bound_dense_linear(packed[0], bias), native.MAX_TOKENS * packed[0].shape[1]
        return lambda x: few(x) if x.numel() <= most else _many(x, packed[0], bias)


def _many(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """More tokens than `refuses` admits to: of a layer that was prepared for few. Right, and no faster than torch."""
    wide = torch.promote_types(x.dtype, weight.dtype)
    return linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)
