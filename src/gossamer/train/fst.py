"""FST: fully sparse training (2404.01847): all three GEMMs sparse, then a dense tail."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..patterns import transposable24
from .method import Method, State, check_decay, check_share
from .products import Products


@dataclass(frozen=True)
class FST(Method):
    """Transposable masks chosen anew every `refresh` steps, masked decay on gradients, MVUE, a dense tail.

    The masks serve W along in_features (forward) and along out_features (gradient of the input); `mvue` samples dZ^T
    for the gradient of the weight. With its tail the final model is dense: `dense_tail=0` for one that can be deployed
    2:4. suggest_decay() finds `decay`; no constant fits all models.
    """

    name = "fst"
    tiles = True
    decay: float = 6e-5
    refresh: int = 40
    mvue: bool = True
    dense_tail: float = 1 / 6

    def __post_init__(self) -> None:
        check_decay(self.decay)
        check_share("dense_tail", self.dense_tail)
        if self.refresh < 1:
            raise ValueError(f"refresh={self.refresh}; fix: 1 or more steps between new masks, 40 in the paper")

    def products(self) -> Products:
        return Products(mvue=self.mvue)

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"mask": transposable24(weight)}

    def project(self, weight: Tensor, state: State) -> Tensor:
        return weight.masked_fill(~state["mask"], 0)

    def mask(self, weight: Tensor, state: State) -> Tensor:
        return state["mask"]
