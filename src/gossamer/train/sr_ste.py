"""SR-STE: STE whose masked weights decay (Zhou et al., 2102.04010), the decay placed as the caller names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .method import check_decay
from .ste import STE


@dataclass(frozen=True)
class SRSTE(STE):
    """STE with masked decay: `decay` * (1 - mask) * w.

    `decay_on="gradients"`: added to the gradient before Adam, as the authors' code does and FST argues for; small
    gradients feel it most. `decay_on="weights"`: taken off the weight times the learning rate, decoupled as in AdamW.
    Both happen after clipping, once per optimizer step.
    """

    name = "sr_ste"
    decay: float = 2e-4
    decay_on: Literal["gradients", "weights"] = "gradients"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay(self.decay)
        if self.decay_on not in ("gradients", "weights"):
            raise ValueError(f"decay_on={self.decay_on!r} is unknown; fix: gradients or weights")
