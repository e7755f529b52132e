"""The op `gossamer::spmm(values, b, handle, transposed)`: C = A B or A^T B, differentiable in B and in A's values.

A handle stands for a live `SparseMatrix`, which holds pattern, packed layouts and choices: what runs depends on the
pattern, and a compiled graph need not know it. `values` is there for the gradient and for the device. Also
`gossamer::sddmm(x, y, handle)`: of x y^T the entries that A stores.
"""

from __future__ import annotations

from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Operand(Protocol):
    """What stands behind a handle."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nnz(self) -> int: ...

    def multiply(self, values: Tensor, b: Tensor, transposed: bool) -> Tensor: ...

    def sample(self, x: Tensor, y: Tensor) -> Tensor: ...


_library = torch.library.Library("gossamer", "FRAGMENT")
_library.define("spmm(Tensor values, Tensor b, int handle, bool transposed) -> Tensor")
_library.define("sddmm(Tensor x, Tensor y, int handle) -> Tensor")
_handles = count()
_live: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register(operand: Operand) -> int:
    """A handle, good as long as `operand` lives."""
    handle = next(_handles)
    _live[handle] = operand
    return handle


def _operand(handle: int) -> Operand:
    try:
        return _live[handle]
    except KeyError:
        raise RuntimeError(
            "gossamer::spmm: the SparseMatrix is gone; fix: keep it as long as what was compiled or captured with it"
        ) from None


def _spmm(values: Tensor, b: Tensor, handle: int, transposed: bool) -> Tensor:
    return _operand(handle).multiply(values, b, transposed)


def _spmm_fake(values: Tensor, b: Tensor, handle: int, transposed: bool) -> Tensor:
    return b.new_empty(_operand(handle).shape[1 if transposed else 0], b.shape[1])


def _sddmm(x: Tensor, y: Tensor, handle: int) -> Tensor:
    return _operand(handle).sample(x, y)


def _sddmm_fake(x: Tensor, y: Tensor, handle: int) -> Tensor:
    return x.new_empty(_operand(handle).nnz, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    values, b, ctx.handle, ctx.transposed = inputs
    ctx.operand = _live.get(ctx.handle)  # lives until the backward pass
    ctx.save_for_backward(values, b if values.requires_grad else None)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    values, b = ctx.saved_tensors
    grad_values = grad_b = None
    if ctx.needs_input_grad[1]:
        grad_b = torch.ops.gossamer.spmm(values, grad, ctx.handle, not ctx.transposed)
    if ctx.needs_input_grad[0]:
        x, y = (b, grad) if ctx.transposed else (grad, b)
        grad_values = torch.ops.gossamer.sddmm(x, y, ctx.handle).to(values.dtype)
    return grad_values, grad_b, None, None


_library.impl("spmm", _spmm, "CompositeExplicitAutograd")
_library.impl("sddmm", _sddmm, "CompositeExplicitAutograd")
torch.library.register_fake("gossamer::spmm", _spmm_fake, lib=_library)
torch.library.register_fake("gossamer::sddmm", _sddmm_fake, lib=_library)
torch.library.register_autograd("gossamer::spmm", _backward, setup_context=_remember, lib=_library)
