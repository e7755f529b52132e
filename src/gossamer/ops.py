"""The torch.library ops. The layout string carries the spec, so a new format or kernel adds no op.

`gossamer::linear(x, parts, layout, bias)` is y = x A^T + bias; `gossamer::decode(parts, layout, dtype)` is A, dense.
Both have fakes, so torch.compile(fullgraph=True) keeps them whole; the gradient flows to x and to bias.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .formats import Format, Spec, from_spec
from .formats import layout as tensors_of
from .kernels import reference

_library = torch.library.Library("gossamer", "DEF")
_library.define("linear(Tensor x, Tensor[] parts, str layout, Tensor? bias) -> Tensor")
_library.define("decode(Tensor[] parts, str layout, ScalarType dtype) -> Tensor")


def to_layout(spec: Spec) -> str:
    """The spec as the string that the ops take."""
    return json.dumps(spec, separators=(",", ":"), sort_keys=True)


@cache
def spec_of(layout: str) -> Spec:
    return json.loads(layout)


def assemble(parts: Sequence[Tensor], layout: str) -> Format:
    """The format that parts, in the order of `Format.tensors()`, and a layout string describe."""
    spec = spec_of(layout)
    return from_spec(spec, dict(zip(tensors_of(spec), parts, strict=True)))


def _linear(x: Tensor, parts: Sequence[Tensor], layout: str, bias: Tensor | None = None) -> Tensor:
    k = spec_of(layout)["shape"][1]
    if x.shape[-1] != k:
        raise ValueError(f"gossamer::linear: x has {x.shape[-1]} features in its last dimension, the weight takes {k}")
    return reference.linear(x, assemble(parts, layout), bias)


def _decode(parts: Sequence[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    # An op may not return one of its inputs, which is what a dense format decodes to.
    dense = assemble(parts, layout).decode(dtype)
    return dense.clone() if any(dense.data_ptr() == p.data_ptr() for p in parts) else dense.contiguous()


def _linear_fake(x: Tensor, parts: Sequence[Tensor], layout: str, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], spec_of(layout)["shape"][0])


def _decode_fake(parts: Sequence[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty(spec_of(layout)["shape"], dtype=dtype)


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, parts, ctx.layout, bias = inputs
    ctx.save_for_backward(*parts)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    parts = list(ctx.saved_tensors)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.gossamer.decode(parts, ctx.layout, grad.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, [None] * len(parts), None, grad_bias


_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("decode", _decode, "CompositeExplicitAutograd")
torch.library.register_fake("gossamer::linear", _linear_fake, lib=_library)
torch.library.register_fake("gossamer::decode", _decode_fake, lib=_library)
torch.library.register_autograd("gossamer::linear", _linear_backward, setup_context=_remember, lib=_library)
