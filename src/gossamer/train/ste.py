"""STE: the forward pass sees the two largest of four, the gradient goes to all four as if none were missing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..patterns import hard24
from .method import Method, State, check_share


@dataclass(frozen=True)
class STE(Method):
    """Hard 2:4 masks anew in every forward pass, gradients straight through (Bengio et al., 1308.3432)."""

    name = "ste"
    dense_tail: float = 0.0

    def __post_init__(self) -> None:
        check_share("dense_tail", self.dense_tail)

    def project(self, weight: Tensor, state: State) -> Tensor:
        return weight.masked_fill(~hard24(weight), 0)
