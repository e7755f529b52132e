"""S-STE: continuous 2:4 pre-training (2409.09099)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..patterns import mse_scale, soft24
from .fp8 import Fp8Products
from .method import Method, State, check_share
from .products import Products


@dataclass(frozen=True)
class SSTE(Method):
    """beta * soft24(w): each group of four less its second smallest magnitude, so that no mask change is a jump.

    beta minimises |w - beta soft24(w)|^2 when the sparse phase begins and is then frozen. No decay, no refresh; what it
    ends with is 2:4. `mvue` samples dZ^T for the gradient of the weight; `fp8` multiplies as Fp8Products does.
    Ablations: `beta="dynamic"` solves for it in every pass, `beta="one"` leaves it out.
    """

    name = "s_ste"
    beta: Literal["frozen", "dynamic", "one"] = "frozen"
    mvue: bool = False
    fp8: bool = False
    dense_tail: float = 0.0

    def __post_init__(self) -> None:
        check_share("dense_tail", self.dense_tail)
        if self.beta not in ("frozen", "dynamic", "one"):
            raise ValueError(f"beta={self.beta!r} is unknown; fix: frozen, dynamic or one")

    @property
    def shardwise(self) -> bool:  # type: ignore[override]
        return self.beta != "dynamic"

    def products(self) -> Products:
        return Fp8Products(mvue=self.mvue) if self.fp8 else Products(mvue=self.mvue)

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"beta": mse_scale(weight, soft24(weight))} if self.beta == "frozen" else {}

    def project(self, weight: Tensor, state: State) -> Tensor:
        soft = soft24(weight)
        if self.beta == "one":
            return soft
        beta = state["beta"] if self.beta == "frozen" else mse_scale(weight, soft)
        return soft * beta.to(soft.dtype)
