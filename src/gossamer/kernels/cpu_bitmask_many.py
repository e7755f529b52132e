"""`bitmask` by many tokens on the CPU: what is not stored is not multiplied.

x is transposed once a call, so that one weight meets up to 64 tokens as whole registers. That takes float32 arithmetic
whatever the dtypes: against float32 products it wins nearly everywhere, against the CPU's bfloat16 ones (AMX) only
where next to nothing is stored. Layouts are those of `cpu_bitmask`, which also runs 16 tokens and fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from .. import native
from . import Case
from .cpu_bitmask import CpuBitmask


class CpuBitmaskMany(CpuBitmask):
    """float32 and bfloat16 values by float32 and bfloat16 x, any shape, made for more than 16 tokens."""

    name: ClassVar[str] = "cpu_bitmask_many"

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        few = case.tokens <= native.MAX_TOKENS
        return f"more than {native.MAX_TOKENS} tokens" if few else super().refuses(case)

    @classmethod
    def run(cls, x: Tensor, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Tensor:
        if x.shape[:-1].numel() > native.MAX_TOKENS:
            values, mask, offsets = packed
            y = native.bitmask_many(x, values, mask, offsets, meta["cols"], bias)
            if y is not None:
                return y
        # Few tokens, or x holds Inf or NaN, which meet the zeros there.
        return super().run(x, packed, meta, bias)

    @classmethod
    def bind(cls, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        few, most = super().bind(packed, meta, bias), native.MAX_TOKENS * meta["cols"]
        return lambda x: few(x) if x.numel() <= most else cls.run(x, packed, meta, bias)
