"""`bsr_int8` on CPUs with AMX: zeros are multiplied, too, by a matrix unit that is eight times as fast.

For weights that are not sparse enough for `cpu_bsr_int8` to win: they are stored without zeros and expanded to dense
int8 tiles in the cache, once for up to 512 tokens. Activations are quantised in the same way, so both kernels give the
same bits; gossamer.prepare measures which is faster.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from ..formats import Format
from ..formats.bsr_int8 import BsrInt8
from . import Case, KernelError, Packed, _bsr
from .cpu_bsr_int8 import CpuBsrInt8 as _CpuBsrInt8


class CpuAmxInt8(_CpuBsrInt8):
    """float32 and bfloat16 x, any number of tokens, any shape up to 65,536 inputs."""

    name: ClassVar[str] = "cpu_amx_int8"

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        if reason := super().refuses(case):
            return reason
        return None if _bsr.amx() else "a CPU with AMX, and a kernel that lets processes use it (Linux 5.16 or later)"

    @classmethod
    def pack(cls, a: Format, dtype: torch.dtype) -> Packed:
        if not isinstance(a, BsrInt8):
            raise KernelError(f"cpu_amx_int8 runs the format bsr_int8, not {a.name}; fix: choose another kernel")
        return _bsr.pack(a, panels=True)
