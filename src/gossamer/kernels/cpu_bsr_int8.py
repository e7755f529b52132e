"""`bsr_int8` on the CPU: int8 by int8, activations quantised per token on the way in.

The work is proportional to the blocks that are stored. Lanes are tokens: four surviving channels are interleaved so
that one dot-product instruction multiplies 16 tokens by four weights (arXiv 2306.16601; docs/kernels/bsr_int8.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..formats import Format
from ..formats.bsr_int8 import BsrInt8
from . import Case, Kernel, KernelError, Packed, _bsr


class CpuBsrInt8(Kernel):
    """float32 and bfloat16 x, any number of tokens, any shape up to 65,536 inputs."""

    name: ClassVar[str] = "cpu_bsr_int8"
    device: ClassVar[str] = "cpu"
    formats: ClassVar[tuple[str, ...]] = ("bsr_int8",)

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        if not _bsr.available():
            return "the compiled core; fix: pip install . in the repository, with g++ >= 11"
        if case.device.type != "cpu":
            return "x on the CPU"
        if case.dtype not in (torch.float32, torch.bfloat16):
            return "x in float32 or bfloat16"
        if case.spec["shape"][1] > _bsr.MOST:
            return f"at most {_bsr.MOST} inputs, beyond which int32 sums could overflow"
        return None

    @classmethod
    def pack(cls, a: Format, dtype: torch.dtype) -> Packed:
        if not isinstance(a, BsrInt8):
            raise KernelError(f"cpu_bsr_int8 runs the format bsr_int8, not {a.name}; fix: choose another kernel")
        return _bsr.pack(a)

    @classmethod
    def run(cls, x: Tensor, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Tensor:
        return _bsr.linear(x, packed, meta, bias)

    @classmethod
    def bind(cls, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        return _bsr.bound(packed, meta, bias)
