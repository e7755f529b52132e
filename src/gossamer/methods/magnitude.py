"""`magnitude`: the largest |w| of each matrix survive (Han et al. 2015). Needs no calibration; the honest floor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..stats import Stats
from ._pruning import Pruning


@dataclass(frozen=True)
class Magnitude(Pruning):
    name: ClassVar[str] = "magnitude"
    needs_stats: ClassVar[bool] = False

    def scores(self, weight: Tensor, stats: Stats | None) -> Tensor:
        return weight.abs()
