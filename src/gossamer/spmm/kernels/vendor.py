"""The vendor's sparse product: cuSPARSE on NVIDIA GPUs, MKL or torch's own on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import nvrtc
from .. import KIND, Csr, Packed, SpmmKernel, Way


class Vendor(SpmmKernel):
    """Whatever torch multiplies."""

    name: ClassVar[str] = "vendor"
    live: ClassVar[bool] = True

    @classmethod
    def refuses(cls, a: Csr) -> str | None:
        if a.device.type == "cpu" and a.dtype not in (torch.float32, torch.float64):
            return "float32 or float64 values on the CPU"
        return None

    @classmethod
    def ways(cls, a: Csr, tf32: bool, deterministic: bool = True) -> list[Way]:
        # What torch takes of cuSPARSE does not repeat itself to the bit; where our kernels run, nobody needs it.
        return [] if deterministic and a.dtype in KIND and nvrtc.refusal(a.device) is None else [Way(cls.name)]

    @classmethod
    def pack(cls, a: Csr, n: int, **knobs: Any) -> Packed:
        return Packed((a.pointers.to(torch.int32), a.cols, a.values), {"shape": list(a.shape)})

    @classmethod
    def run(cls, b: Tensor, packed: Sequence[Tensor], meta: dict[str, Any]) -> Tensor:
        if not packed[2].numel() or not b.shape[1]:
            return b.new_zeros(meta["shape"][0], b.shape[1])
        pointers, cols, values = packed
        return torch.sparse_csr_tensor(pointers, cols, values, meta["shape"], check_invariants=False) @ b

    @classmethod
    def revalued(cls, packed: Sequence[Tensor], values: Tensor) -> Sequence[Tensor]:
        return *packed[:2], values
