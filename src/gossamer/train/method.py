"""What a 2:4 training method decides: the weights that the layer multiplies with, and what decays.

A method is data and pure functions. What it must remember of a layer, a mask or a scale, are tensors that it makes
once and the layer keeps (`state`), so that one method serves every layer, rank and checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..patterns import hard24
from .products import Products

State = Mapping[str, Tensor]


class Method(ABC):
    """The base: weights [out_features, in_features], groups of four along in_features, straight-through gradients.

    Subclasses are frozen dataclasses; which of the attributes they make fields is what a caller may set.
    """

    name: ClassVar[str]
    tiles: ClassVar[bool] = False  # masks of whole 4x4 tiles, 2:4 both ways
    refresh: int = 0  # steps between new states; 0: never
    decay: float = 0.0  # pulls the weights that are masked away to zero
    decay_on: Literal["gradients", "weights"] = "gradients"
    shardwise: bool = True  # is the projection of a shard the shard of the projection?
    dense_tail: float = 0.0  # the share of all steps that is dense, at the end; then the final model is dense

    def products(self) -> Products:
        """What computes the three GEMMs of a layer unless the caller brings another."""
        return Products()

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        """What is kept with a layer, made from its whole weight when its sparse phase begins and at each refresh."""
        return {}

    @abstractmethod
    def project(self, weight: Tensor, state: State) -> Tensor:
        """The 2:4 weight that the forward pass multiplies with, of `weight`'s shape and dtype; a shard if shardwise."""

    def mask(self, weight: Tensor, state: State) -> Tensor:
        """Bool: which weights survive now, for the decay of the others."""
        return hard24(weight)


@dataclass(frozen=True)
class Dense(Method):
    """No sparsity: the reference run, whose virtual mask is measured like that of the others."""

    name = "dense"

    def project(self, weight: Tensor, state: State) -> Tensor:
        return weight


def check_share(name: str, value: float) -> None:
    """ValueError unless `value` is a share of the steps."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} is no share of the steps; fix: 0 <= {name} < 1")


def check_decay(value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"decay={value}; fix: 0 <= decay < 1, usually 1e-6 to 1e-3 (suggest_decay finds it)")
