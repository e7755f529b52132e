"""Kernels: how a format runs. One file is one kernel; `reference` is the oracle of all of them and the last resort.

A kernel declares its domain and works in two steps: `pack` turns a stored format into its own run-time layout (a few
tensors and constants, never saved; stored tensors are used where they lie if they will do), `run` computes with it.
`run` is called from inside an op: it never times, never synchronises and allocates through torch only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..formats import Format, Spec
from ..registry import Registry


class KernelError(RuntimeError):
    """A kernel asked for by name cannot run; the message says why and what to do."""


@dataclass(frozen=True)
class Case:
    """What is to run: y [.., M] = x [.., K] A^T + bias, for A of `spec`, `tokens` rows of x, `dtype` that of x."""

    spec: Spec
    device: torch.device
    dtype: torch.dtype
    tokens: int


@dataclass(frozen=True, eq=False)
class Packed:
    """A run-time layout: tensors on one device, and JSON-able constants."""

    tensors: tuple[Tensor, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


class Kernel(ABC):
    """One way to run a format on one kind of device; all class methods, there is nothing to instantiate."""

    name: ClassVar[str]
    device: ClassVar[str]  # torch's device type, or "any"
    formats: ClassVar[tuple[str, ...]]  # what `pack` takes as it is stored; a kernel of "dense" takes a dense copy, too
    transparent: ClassVar[bool] = False  # `bind` is an op of torch's own, which its modes and tracers see by itself

    @classmethod
    @abstractmethod
    def refuses(cls, case: Case) -> str | None:
        """Why it cannot run this case (a phrase that completes "it needs ..."), or None if it can."""

    @classmethod
    def immediate(cls, case: Case) -> bool:
        """Does `pack` cost so little that a layer which was never prepared can do it on every call?"""
        return False

    @classmethod
    @abstractmethod
    def pack(cls, a: Format, dtype: torch.dtype) -> Packed:
        """The run-time layout of `a`, on the device where `a` lies, for x of `dtype`."""

    @classmethod
    @abstractmethod
    def run(cls, x: Tensor, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Tensor:
        """y [.., M] in the dtype of x, a new tensor; x [.., K] of any strides, any number of leading dimensions."""

    @classmethod
    def bind(cls, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """`run` as a function of x alone, of the dtype it was packed for: what does not change is looked up once."""
        return lambda x: cls.run(x, packed, meta, bias)

    @classmethod
    def fits(cls, meta: dict[str, Any], device: torch.device) -> bool:
        """May what was packed with these constants, perhaps on another machine, run on this device of the same type?"""
        return True

    @classmethod
    def unpack(cls, packed: Sequence[Tensor], meta: dict[str, Any]) -> Tensor | None:
        """A, dense, exactly as it was packed: then the stored tensors need not stay beside it. None: they must."""
        return None

    @classmethod
    def rows(cls, packed: Packed, begin: int, end: int) -> Packed | None:
        """The layout of these rows, in the same memory; None if it cannot be cut there."""
        return None


registry: Registry[Kernel] = Registry("gossamer.kernels", Kernel)
