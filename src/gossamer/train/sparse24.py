"""Sparse24Linear: an nn.Linear that multiplies with a 2:4 projection of its weight.

A linear layer becomes one in place, by its class: the parameters, their names, the optimizer's references to them and
ties between them stay what they were. What a method keeps (a mask, a scale) are buffers that are not in the state dict.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .method import Method
from .products import Products
from .sharding import check_groups, is_sharded, like, local, part, whole

STATE = "sparse24_"  # before the names of the buffers


class Sparse24Linear(nn.Linear):
    """y = x P(weight)^T + bias with P the method's projection, or plain nn.Linear while `dense`.

    The gradient reaches `weight` straight through P. Made by `sparsify`; the forward pass changes nothing, so that
    recomputation, evaluation and compilation are free to repeat it.
    """

    method: Method
    products: Products
    dense: bool
    label: str

    def forward(self, input: Tensor) -> Tensor:
        if self.dense:
            return F.linear(input, self.weight, self.bias)
        return self.products.linear(input, _Straight.apply(self.weight, self.projected()), self.bias)

    @torch.no_grad()
    def projected(self) -> Tensor:
        """P(weight), without gradient; sharded as the weight is."""
        if is_sharded(self.weight):  # else the label stays untouched: compiled blocks that differ in it are one
            check_groups(self.label, self.weight)
        if self.method.shardwise:
            return like(self.method.project(local(self.weight), self.local_state()), self.weight)
        return like(part(self.method.project(whole(self.weight), self.state()), self.weight), self.weight)

    @torch.no_grad()
    def renew(self) -> None:
        """The method's state anew, from the whole weight as it is now."""
        for name, tensor in self.method.state(whole(self.weight)).items():
            if STATE + name in self._buffers:
                local(self.get_buffer(STATE + name)).copy_(tensor)  # in place: compiled graphs hold its address
            else:
                self.register_buffer(STATE + name, tensor, persistent=False)

    def state(self) -> dict[str, Tensor]:
        """What the method keeps, of the whole weight, on every rank; parallelize_module made DTensors of it."""
        return {
            n.removeprefix(STATE): local(b) for n, b in self._buffers.items() if n.startswith(STATE) and b is not None
        }

    def local_state(self) -> dict[str, Tensor]:
        return {name: part(tensor, self.weight) for name, tensor in self.state().items()}


class _Straight(torch.autograd.Function):
    """The projected weight forward, the gradient of the weight backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, projected: Tensor) -> Tensor:
        return projected.view_as(projected)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def swap(layer: nn.Linear, label: str, method: Method, products: Products) -> Sparse24Linear:
    """Make `layer` a Sparse24Linear, in place; dense until its phase begins."""
    layer.__class__ = Sparse24Linear
    assert isinstance(layer, Sparse24Linear)
    layer.label, layer.method, layer.products, layer.dense = label, method, products, True
    return layer


def restore(layer: Sparse24Linear) -> None:
    """Make it an nn.Linear again; where FSDP2 made a class of its own from ours, it stays and acts like one."""
    for name in [n for n in layer._buffers if n.startswith(STATE)]:
        delattr(layer, name)
    layer.dense = True
    if type(layer) is Sparse24Linear:
        del layer.label, layer.method, layer.products, layer.dense
        layer.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
