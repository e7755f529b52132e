"""C = A B for a sparse A: kernels, and what chooses among them. `gossamer.SparseMatrix` is the user's side of it.

These kernels are a registry of their own, beside `gossamer.kernels`: there x [N, K] is what a layer gets and y what it
gives, here B [K, N] is what A is multiplied with, and what is fast depends on A's pattern and not on its shape. One
file in `gossamer/spmm/kernels` is one kernel; packages outside register under the entry-point group of that name.

A `Csr` is what every kernel packs. Its values are the precision: float32, float16 or bfloat16; float32 values with the
knob `tf32` are multiplied as tf32. A *way* is a kernel's name with its knobs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels import KernelError, Packed
from ..registry import Registry
from .csr import Csr

KIND = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # what the device sources call TYPE
__all__ = ["KIND", "Csr", "KernelError", "Packed", "SpmmKernel", "Way", "registry"]


@dataclass(frozen=True)
class Way:
    """A kernel and its knobs, JSON-able."""

    kernel: str
    knobs: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        knobs = ",".join(n if v is True else f"{n}={v}" for n, v in self.knobs if v is not False)
        return f"{self.kernel}[{knobs}]" if knobs else self.kernel

    @property
    def own(self) -> type[SpmmKernel]:
        return registry[self.kernel]


class SpmmKernel(ABC):
    """One way to multiply a sparse matrix; all class methods, there is nothing to instantiate."""

    name: ClassVar[str]
    live: ClassVar[bool] = False  # it reads A's values where they lie, see `revalued`

    @classmethod
    @abstractmethod
    def refuses(cls, a: Csr) -> str | None:
        """Why it cannot run this matrix (a phrase that completes "it needs ..."), or None if it can."""

    @classmethod
    @abstractmethod
    def ways(cls, a: Csr, tf32: bool, deterministic: bool = True) -> list[Way]:
        """Every setting of the knobs that may be the fastest for some matrix.

        tf32: may it round float32 values? deterministic: must two runs agree to the bit?
        """

    @classmethod
    @abstractmethod
    def pack(cls, a: Csr, n: int, **knobs: Any) -> Packed:
        """The run-time layout of `a`, where it lies, for B of about n columns."""

    @classmethod
    @abstractmethod
    def run(cls, b: Tensor, packed: Sequence[Tensor], meta: dict[str, Any]) -> Tensor:
        """C [M, N] = A B in B's dtype, contiguous, a new tensor; B [K, N] of A's dtype and of any strides."""

    @classmethod
    def refit(cls, packed: Packed, n: int) -> Packed:
        """What was packed, for B of about n columns instead."""
        return packed

    @classmethod
    def revalued(cls, packed: Sequence[Tensor], values: Tensor) -> Sequence[Tensor]:
        """What was packed, with other values of the same pattern; of a kernel that is `live`."""
        raise KernelError(f"{cls.name} packs values; fix: choose a kernel that reads them where they lie")


registry: Registry[SpmmKernel] = Registry("gossamer.spmm.kernels", SpmmKernel)
