"""`wanda`: |w_ij| ||x_j||_2, compared within each output row (Sun et al. 2023, arXiv 2306.11695, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import patterns
from ..stats import Stats
from ._pruning import Pruning


@dataclass(frozen=True)
class Wanda(Pruning):
    name: ClassVar[str] = "wanda"

    def scores(self, weight: Tensor, stats: Stats | None) -> Tensor:
        if stats is None:
            raise ValueError("wanda needs calibration statistics")
        return weight.abs() * stats.gram.diagonal().clamp_min(0).sqrt().to(weight.dtype)

    def _select(self, scores: Tensor, ratio: float) -> Tensor:
        if self.format == "nm24":
            return patterns.nm(scores, self.n, self.m)
        return patterns.balanced(scores, self._keep((scores.shape[0], scores.shape[1]), ratio))
