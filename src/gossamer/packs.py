"""What kernels pack of a matrix: made once per layout, found again among the operands of a layer, and undone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import formats, native
from .dispatch import Step
from .explain import dense_spec
from .formats import Format, dtype_of
from .formats.dense import Dense
from .kernels import Kernel, Packed, registry


class Packs:
    """What kernels pack of one matrix; those that share a layout share what was packed. `made`: layout -> that."""

    def __init__(self, a: Format, dtype: torch.dtype, made: Mapping[object, Packed] | None = None) -> None:
        self.a, self.dtype, self._made = a, dtype, dict(made or {})

    def of(self, kernel: type[Kernel]) -> Packed:
        layout = layout_of(kernel)
        if layout not in self._made:
            self._made[layout] = settled(kernel, self.a, self.dtype)
        return self._made[layout]

    def source(self, kernel: type[Kernel]) -> type[Kernel] | None:
        """The kernel that gives the matrix back, bit for bit, from what this one packs; None if there is none."""
        packed = self.of(kernel)
        others = (registry[n] for n in registry if layout_of(registry[n]) is layout_of(kernel))
        return next((k for k in others if exact(k.unpack(packed.tensors, packed.meta), self.a)), None)


def layout_of(kernel: type[Kernel]) -> object:
    """The same for kernels that pack alike, because one inherits it from the other."""
    return kernel.pack.__func__  # type: ignore[attr-defined]


def reversible(kernel: type[Kernel]) -> bool:
    """Can it give back what it packed, other than a dense copy?"""
    return Dense.name not in kernel.formats and kernel.unpack.__func__ is not Kernel.unpack.__func__  # type: ignore[attr-defined]


def exact(dense: Tensor | None, a: Format) -> bool:
    """Does `dense` encode to the very bits of `a`?"""
    if dense is None:
        return False
    try:
        found = type(a).encode(dense)
    except formats.FormatError:
        return False
    pairs = zip(found.tensors().values(), a.tensors().values(), strict=True)
    return found.spec() == a.spec() and all(torch.equal(_bits(one), _bits(other)) for one, other in pairs)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.uint8)


def settled(kernel: type[Kernel], a: Format, dtype: torch.dtype) -> Packed:
    """Packed, and on the CPU moved onto huge pages: dense copies, too, or the comparison would flatter us."""
    packed = kernel.pack(a, dtype)
    if native.available():
        for tensor in packed.tensors:
            if tensor.device.type == "cpu":
                native.move_to_huge_pages(tensor)
    return packed


def dense_copy(a: Format, dtype: torch.dtype) -> Dense:
    """In the matrix's own dtype, of a product in `dtype`."""
    kind = dtype_of(dense_spec(a.spec(), dtype)["dtype"])
    return Dense(a.shape, a.decode(kind).contiguous())


def step(name: str, packs: Packs, operands: list[Tensor]) -> Step:
    """The kernel of this name on what it packs, which is appended to the operands if it is not among them."""
    packed = packs.of(registry[name])
    at = [_place(t, operands) for t in packed.tensors]
    return Step(name, tuple(at), packed.meta)


def _place(tensor: Tensor, operands: list[Tensor]) -> int:
    """Where the tensor is among the operands; appended if it is new."""
    for i, known in enumerate(operands):
        if (
            known.data_ptr() == tensor.data_ptr()
            and known.shape == tensor.shape
            and known.dtype == tensor.dtype
            and known.stride() == tensor.stride()
        ):
            return i
    operands.append(tensor)
    return len(operands) - 1
