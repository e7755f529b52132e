"""The torch.library ops. The layout string carries spec and choices, so a new format or kernel adds no op.

`gossamer::linear(x, parts, layout, bias)` is y = x A^T + bias; `gossamer::decode(parts, layout, dtype)` is A, dense.
Both have fakes, so torch.compile(fullgraph=True) keeps them whole; the gradient flows to x and to bias.
`parts` are the stored tensors in the order of `Format.tensors()`, then what the layer's kernels packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import route

_library = torch.library.Library("gossamer", "DEF")
_library.define("linear(Tensor x, Tensor[] parts, str layout, Tensor? bias) -> Tensor")
_library.define("decode(Tensor[] parts, str layout, ScalarType dtype) -> Tensor")


def _linear(x: Tensor, parts: Sequence[Tensor], layout: str, bias: Tensor | None = None) -> Tensor:
    return route(layout).linear(x, parts, bias)


def linear(x: Tensor, parts: Sequence[Tensor], layout: str, bias: Tensor | None) -> Tensor:
    """`torch.ops.gossamer.linear`, past the dispatcher where that has nothing to do.

    A decode step of a small model makes hundreds of these calls, and the way through the dispatcher into Python takes
    as long as a small product. Under compilation, with gradients, in any mode or transform the op itself is called.
    """
    if plain(x):
        return route(layout).linear(x, parts, bias)
    return torch.ops.gossamer.linear(x, parts, layout, bias)


is_compiling, _grad = torch.compiler.is_compiling, torch.is_grad_enabled
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform = torch._C._functorch.maybe_current_level  # type: ignore[attr-defined]


def plain(x: Tensor) -> bool:
    """Is there nobody who would have to see an op: no compiler, gradient, mode, transform or kind of tensor?"""
    if is_compiling() or _grad() or type(x) is not Tensor:
        return False
    return not (_dispatch_modes() or _function_modes()) and _transform() is None


def _decode(parts: Sequence[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    # An op may not return one of its inputs, which is what a dense format decodes to.
    dense = route(layout).assemble(parts).decode(dtype)
    return dense.clone() if any(dense.data_ptr() == p.data_ptr() for p in parts) else dense.contiguous()


def _linear_fake(x: Tensor, parts: Sequence[Tensor], layout: str, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], route(layout).spec["shape"][0])


def _decode_fake(parts: Sequence[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty(route(layout).spec["shape"], dtype=dtype)


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, parts, ctx.layout, bias = inputs
    found = route(ctx.layout)
    ctx.stored = len(parts) if found.source else len(found.names)
    ctx.packed = len(parts) - ctx.stored
    ctx.save_for_backward(*parts[: ctx.stored])
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    parts = list(ctx.saved_tensors)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.gossamer.decode(parts, ctx.layout, grad.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, [None] * (ctx.stored + ctx.packed), None, grad_bias


_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("decode", _decode, "CompositeExplicitAutograd")
torch.library.register_fake("gossamer::linear", _linear_fake, lib=_library)
torch.library.register_fake("gossamer::decode", _decode_fake, lib=_library)
torch.library.register_autograd("gossamer::linear", _linear_backward, setup_context=_remember, lib=_library)
