"""The torch.library ops. The layout string carries spec and choices, so a new format or kernel adds no op.

`gossamer::linear(x, parts, layout, bias)` is y = x A^T + bias; `gossamer::decode(parts, layout, dtype)` is A, dense.
Both have fakes, so torch.compile(fullgraph=True) keeps them whole; the gradient flows to x and to bias.
`parts` are the stored tensors in the order of `Format.tensors()`, then what the layer's kernels packed.

`gossamer::call(x, layer, rows)` is the same of a layer of this process by its number, for compiled inference on the
CPU: a graph that takes every tensor of every layer as an input checks each of them before every token. Layers call
`gossamer::part(x, address)`, which while a graph is traced becomes `call`: one for each x and stack. Whatever a layer
reads while it is traced is checked before every token, too, so all that is read is one string.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.utils.weak import WeakIdKeyDictionary

from .dispatch import route
from .formats import dtype_of
from .kernels import reference

_library = torch.library.Library("gossamer", "DEF")
_library.define("linear(Tensor x, Tensor[] parts, str layout, Tensor? bias) -> Tensor")
_library.define("decode(Tensor[] parts, str layout, ScalarType dtype) -> Tensor")
_library.define("call(Tensor x, int layer, int rows) -> Tensor")
_library.define("part(Tensor x, str address) -> Tensor")


class Callee(Protocol):
    """What has a number: computes y [.., rows] in the dtype of x as it stands now."""

    def run(self, x: Tensor) -> Tensor: ...


_numbers = itertools.count()
_callees: dict[int, weakref.ref[Callee]] = {}


def number(callee: Callee) -> int:
    """A number for `gossamer::call`, good for as long as the callee lives and never given again."""
    found = next(_numbers)
    _callees[found] = weakref.ref(callee, lambda _: _callees.pop(found, None))
    return found


class Shared(NamedTuple):
    """A product that several layers take their rows from: the stack's number, all rows, and what x may be."""

    number: int
    rows: int
    begin: int  # the layer's own rows
    most: int  # elements of x
    dtype: str  # of x


@cache
def _read(address: str) -> tuple[int, int, Shared | None]:
    layer, rows, *shared = json.loads(address)
    return layer, rows, Shared(*shared) if shared else None


def to_address(layer: int, rows: int, shared: Shared | None = None) -> str:
    """What `gossamer::part` needs to know: the layer by its number, and whose product it takes its rows from."""
    return json.dumps([layer, rows, *(shared or ())])


def _linear(x: Tensor, parts: Sequence[Tensor], layout: str, bias: Tensor | None = None) -> Tensor:
    return route(layout).linear(x, parts, bias)


def linear(x: Tensor, parts: Sequence[Tensor], layout: str, bias: Tensor | None) -> Tensor:
    """`torch.ops.gossamer.linear`, past the dispatcher where that has nothing to do.

    A decode step of a small model makes hundreds of these calls, and the way through the dispatcher into Python takes
    as long as a small product. Under compilation, with gradients or in any mode the op itself is called. It knows no
    other derivatives than `backward`: for those of `torch.func` and forward mode, and for vmap, the weight is decoded.
    """
    if plain(x):
        return route(layout).linear(x, parts, bias)
    if not is_compiling() and transformed():
        wide = reference.wide(x)
        added = None if bias is None else bias.to(wide)
        return torch.nn.functional.linear(x.to(wide), torch.ops.gossamer.decode(parts, layout, wide), added).to(x.dtype)
    return torch.ops.gossamer.linear(x, parts, layout, bias)


# Not `is_compiling`, which takes longer: what it knows besides, an export that is not traced, has modes of its own.
is_compiling = torch.compiler.is_dynamo_compiling
grad = torch.is_grad_enabled
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform = torch._C._functorch.maybe_current_level  # type: ignore[attr-defined]
_tracing = torch._C._is_tracing


def inference(x: Tensor) -> bool:
    """Does the compiler work on inference on the CPU, for this process (no export, which others are to run)?"""
    # Not `is_exporting()`, which up to torch 2.12 says yes to every compiler.
    return not torch.compiler._is_exporting_flag and not torch.is_grad_enabled() and x.device.type == "cpu"


def plain(x: Tensor) -> bool:
    """Is there nobody who would have to see an op: no compiler, tracer, gradient, mode, transform or kind of tensor?"""
    return type(x) is Tensor and not (is_compiling() or grad()) and unobserved()


def unobserved() -> bool:
    """Is no mode, tracer or transform at work here?"""
    if _dispatch_modes() or _function_modes() or _tracing():
        return False
    return _transform() is None and forward_ad._current_level < 0  # `transformed`, written out


def transformed() -> bool:
    """Is a transform of `torch.func` at work here, or forward-mode differentiation?"""
    return _transform() is not None or forward_ad._current_level >= 0


def differentiated() -> bool:
    """Is one of these at work that takes derivatives?"""
    if is_compiling() or not transformed():
        return False
    kinds = {i.key() for i in torch._C._functorch.get_interpreter_stack() or ()}  # type: ignore[attr-defined]
    return forward_ad._current_level >= 0 or bool(kinds & {TransformType.Grad, TransformType.Jvp})


def _decode(parts: Sequence[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    # An op may not return one of its inputs, which is what a dense format decodes to.
    dense = route(layout).assemble(parts).decode(dtype)
    return dense.clone() if any(dense.data_ptr() == p.data_ptr() for p in parts) else dense.contiguous()


def _call(x: Tensor, layer: int, rows: int) -> Tensor:
    callee = _callees[layer]() if layer in _callees else None
    if callee is None:
        raise RuntimeError("a compiled model calls a layer that is gone; fix: keep the model, or compile it again")
    return callee.run(x)


def _call_fake(x: Tensor, layer: int, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@dataclass
class _Product:
    y: Tensor
    version: int
    taken: dict[int, int] = field(default_factory=dict)  # where rows begin that were asked for -> how many


_products = WeakIdKeyDictionary()  # x -> {number of a stack: what not all of its layers have asked for yet}


def version(x: Tensor) -> int:
    """What changes when x is changed in place; of a tensor made in inference mode nothing does."""
    return 0 if x.is_inference() else x._version


def _part(x: Tensor, address: str) -> Tensor:
    """Composite: what a compiler records is `call`. No layer gets the same answer twice, so none is out of date."""
    layer, rows, shared = _read(address)
    if shared is None or x.numel() > shared.most or x.dtype != dtype_of(shared.dtype):
        return torch.ops.gossamer.call(x, layer, rows)
    products: dict[int, _Product] = _products.setdefault(x, {})  # type: ignore[assignment]
    found = products.get(shared.number)
    if found is None or found.version != version(x) or shared.begin in found.taken:
        found = _Product(torch.ops.gossamer.call(x, shared.number, shared.rows), version(x))
        products[shared.number] = found
    found.taken[shared.begin] = rows
    if sum(found.taken.values()) == shared.rows:
        del products[shared.number]
    if not products:
        del _products[x]
    return found.y.narrow(-1, shared.begin, rows).contiguous()


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
_library.impl("call", _call, "CompositeExplicitAutograd")
_library.impl("part", _part, "CompositeImplicitAutograd")
torch.library.register_fake("gossamer::linear", _linear_fake, lib=_library)
torch.library.register_fake("gossamer::decode", _decode_fake, lib=_library)
torch.library.register_fake("gossamer::call", _call_fake, lib=_library)
torch.library.register_autograd("gossamer::linear", _linear_backward, setup_context=_remember, lib=_library)
