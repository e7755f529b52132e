"""Layers that read the same input, run by one call: q, k and v, or gate and up, at decode sizes.

Small layers drown in the cost of a call. The matrices of a stack lie row after row in one stored matrix (the layers'
own tensors become views of it, so nothing is stored twice). Whichever layer is called first computes for all, and the
others take their rows if they are called with the very same tensor. What is not fetched is dropped at the next call.
On a GPU, the layers that run alone for more tokens read their rows from the one packed matrix.
A tensor that was changed in place in between is noticed by its version, which tensors made in inference mode, and those
inside a compiled graph, do not have: there a model must not change the input of q before it calls k. Compiled inference
on the CPU does the same by an op, `gossamer::part`, so that a graph need not look after what a stack holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import dispatch, ops
from .formats import Format, dtype_name
from .formats.bitmask import Bitmask

MOST_TOKENS = {"cpu": 16, "cuda": 64}  # beyond, a call costs little beside its work


class Member(Protocol):
    """A layer of a stack; what it watches has changed when the versions of both no longer add up to what was `seen`."""

    watched: tuple[Tensor, Tensor] | None
    seen: int

    def run(self, x: Tensor) -> Tensor: ...


class Stack:
    """One matrix for several layers: `rows` of each, layout and operands of the whole, for up to `tokens` tokens.

    On a GPU a layer gets a view of the product, since a copy would take as long as a small product does.
    """

    def __init__(
        self,
        rows: Sequence[int],
        dtype: torch.dtype,
        ways: dispatch.Ways,
        a: Format,
        operands: Sequence[Tensor],
        bias: Tensor | None,
    ) -> None:
        self.rows, self.bias = list(rows), bias
        self.layout = dispatch.to_layout(a.spec(), dtype, ways)
        self.operands = list(operands)
        self.dtype, self.tokens = dtype, ways[-1][0]
        self._width = a.shape[1]
        self.most = self.tokens * self._width  # elements of x
        self.held: tuple[Tensor, int, dict[int, Tensor]] | None = None
        self._bound: dispatch.Bound | None = None
        self._number = ops.number(self)
        self.members: dict[int, weakref.ref[Member]] = {}  # by place
        self._watched: list[Tensor] = []
        self._seen = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"held": None, "_bound": None, "members": {}, "_watched": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._number = ops.number(self)

    def takes(self, x: Tensor) -> bool:
        """Is x of the dtype and size that the stack is for? Gradients go through the layers themselves."""
        return x.numel() <= self.most and x.dtype == self.dtype and not torch.is_grad_enabled()

    def shared(self, i: int) -> ops.Shared:
        """Where layer i's rows are in the product, and of which x it is made."""
        begin, kind = sum(self.rows[:i]), dtype_name(self.dtype)
        return ops.Shared(self._number, sum(self.rows), begin, self.most, kind)

    def part(self, i: int, x: Tensor) -> Tensor:
        """Layer i's rows of the product with x. A layer never gets the same answer twice, so none is out of date."""
        held, version = self.held, 0 if ops.is_compiling() else ops.version(x)
        if held is None or held[0] is not x or held[1] != version or i not in held[2]:
            y = self._product(x)
            held = (x, version, dict(enumerate(y.split_with_sizes(self.rows, -1))))
            self.held = held
        left = held[2]
        found = left.pop(i)
        if not left:
            self.held = None
        return found if found.is_cuda else found.contiguous()

    def _product(self, x: Tensor) -> Tensor:
        if ops.plain(x):
            return self.run(x)
        return ops.linear(x, self.operands, self.layout, self.bias)

    def run(self, x: Tensor) -> Tensor:
        """The whole product, without gradient."""
        if x.ndim and x.shape[-1] == self._width:
            bound = self._bound or self._bind()
            versions = 0
            for t in self._watched:
                versions += t._version
            if versions != self._seen:
                return self._apart(x)
            size = x.numel()
            for most, call, _ in bound:
                if size <= most:
                    return call(x)
        return dispatch.route(self.layout).linear(x, self.operands, self.bias)

    def _bind(self) -> dispatch.Bound:
        layers = [layer for held in self.members.values() if (layer := held()) is not None]
        self._watched = [t for layer in layers for t in layer.watched or ()]
        self._seen = sum(layer.seen for layer in layers)
        self._bound = dispatch.route(self.layout).bind(self.operands, self.bias)
        return self._bound

    def _apart(self, x: Tensor) -> Tensor:
        """The product, by each layer for itself; zeros for those that are gone, for which nobody asks."""
        layers = [self.members[i]() for i in range(len(self.rows))]
        empty = [x.new_zeros(*x.shape[:-1], rows) for rows in self.rows]
        return torch.cat([e if layer is None else layer.run(x) for e, layer in zip(empty, layers, strict=True)], -1)


def stacked(parts: Sequence[Bitmask]) -> Bitmask:
    """The matrices on top of each other, in memory of their own."""
    shape = (sum(p.shape[0] for p in parts), parts[0].shape[1])
    return Bitmask(shape, torch.cat([p.weight for p in parts]), torch.cat([p.mask for p in parts]))


def views(a: Bitmask, parts: Sequence[Bitmask]) -> list[dict[str, Tensor]]:
    """Where the tensors of each part lie in the stacked matrix."""
    values = a.weight.split([p.weight.numel() for p in parts])
    masks = a.mask.split([p.shape[0] for p in parts])
    return [{"weight": v, "mask": m} for v, m in zip(values, masks, strict=True)]
