"""`sparsegpt`: prune column by column, let the later columns make up for the error.

Frantar & Alistarh 2023 (arXiv 2301.00774), algorithm 1: with H^-1 = U^T U, the score of w_ij is (w_ij / U_jj)^2, and
what a removed weight cost is spread over the columns after it by row j of U. The mask is chosen per block of columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import patterns
from ..stats import Stats
from . import Shape
from ._pruning import Pruning


@dataclass(frozen=True)
class SparseGPT(Pruning):
    """`damp`: ridge on the Gram, as a share of its mean diagonal; `block`: columns per mask choice."""

    damp: float = 0.01
    block: int = 128

    name: ClassVar[str] = "sparsegpt"

    def prune(self, weight: Tensor, stats: Stats | None, ratio: float) -> Tensor:
        if stats is None:
            raise ValueError("sparsegpt needs calibration statistics")
        upper = _inverse_root(stats.damped(self.damp)).float()
        w = weight.detach().float().clone()
        for start, stop, keep in self._blocks((w.shape[0], w.shape[1]), ratio):
            w[:, start:stop], error = self._prune_block(w[:, start:stop], upper[start:stop, start:stop], keep)
            w[:, stop:] -= error @ upper[start:stop, stop:]
        return w

    def flops(self, shapes: Sequence[Shape], ratio: float) -> float:
        return super().flops(shapes, ratio) + sum(4.0 * k**3 + 60.0 * m * k * self.block + m * k * k for m, k in shapes)

    def _blocks(self, shape: tuple[int, int], ratio: float) -> Iterator[tuple[int, int, int]]:
        """(first column, end, weights to keep): the budget of the matrix, shared out by width without a rest."""
        k = shape[1]
        total = 0 if self.format == "nm24" else self._keep(shape, ratio)
        step = -(-self.block // self.m) * self.m if self.format == "nm24" else self.block
        for start in range(0, k, step):
            stop = min(k, start + step)
            yield start, stop, total * stop // k - total * start // k

    def _prune_block(self, w: Tensor, upper: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        w, diagonal, error = w.clone(), upper.diagonal(), torch.empty_like(w)
        mask = torch.zeros_like(w, dtype=torch.bool)
        if self.format == "bitmask":
            mask = patterns.top((w / diagonal).square(), keep)
        for j in range(w.shape[1]):
            if self.format == "nm24" and j % self.m == 0:
                group = slice(j, j + self.m)
                mask[:, group] = patterns.nm((w[:, group] / diagonal[group]).square(), self.n, self.m)
            kept = torch.where(mask[:, j], w[:, j], 0)
            error[:, j] = (w[:, j] - kept) / diagonal[j]
            w[:, j + 1 :] -= torch.outer(error[:, j], upper[j, j + 1 :])
            w[:, j] = kept
        return w, error


def _inverse_root(gram: Tensor) -> Tensor:
    """Upper U with U^T U = gram^-1, float64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True)
