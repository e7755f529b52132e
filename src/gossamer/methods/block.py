"""`block`: prune whole blocks of 4 outputs by 1 or 4 inputs, the pattern that int8 CPU kernels run (arXiv 2306.16601).

`score` says what a block is worth: the squares of its weights (`magnitude`), times the energy of their inputs
(`wanda`), or the loss of the layer's output when what is left makes up for it (`obs`). With the Gram H of the input,
a weight costs w_ij^2 / [H^-1]_jj (optimal brain surgeon; oBERT, arXiv 2203.07259, sums it over blocks). Survivors are
then not stepped towards the optimum, as SparseGPT's sweep over columns does, but solved for: in a few rounds blocks
are removed, and each row's least squares on its support is found by conjugate gradients. All of it is matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import patterns
from ..formats import Format, dtype_of
from ..formats.bitmask import Bitmask
from ..formats.bsr_int8 import ROWS, WIDTHS, BsrInt8
from ..stats import Stats
from . import Method, RatioError, Shape, check_dtype, dense_bytes
from ._dictionary import masked_cg

SCORES = ("obs", "wanda", "magnitude")
FORMATS = ("bitmask", "bsr_int8")


@dataclass(frozen=True)
class Block(Method):
    """`format`: "bsr_int8" (int8 with a scale per output) or "bitmask" (values of `dtype`); both pay for their masks.

    `width`: 1 or 4 inputs a block. `rounds`: of removing and solving, `steps`: of conjugate gradients in each, `damp`:
    ridge on the Gram as a share of its mean diagonal; all three of `obs`.
    """

    score: str = "obs"
    format: str = "bitmask"
    width: int = 1
    dtype: str = "bfloat16"
    rounds: int = 8
    steps: int = 12
    damp: float = 0.01

    name: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"block: score is {', '.join(SCORES)}, not '{self.score}'")
        if self.format not in FORMATS:
            raise ValueError(f"block: format is {' or '.join(FORMATS)}, not '{self.format}'")
        if self.width not in WIDTHS:
            raise ValueError(f"block: width is 1 or 4, not {self.width}")
        if min(self.rounds, self.steps) < 1 or self.damp <= 0:
            raise ValueError("block: rounds and steps are at least 1, damp is above 0")
        check_dtype(self.name, self.dtype)

    def size(self, shapes: Sequence[Shape], ratio: float) -> list[int]:
        """At most: blocks over the edge of a matrix, and such as round to zero in int8, take less."""
        return [self._bytes(shape, self._keep(shape, ratio)) for shape in shapes]

    def fit(self, group: Sequence[Tensor], stats: Stats | None, ratio: float) -> list[Format]:
        keeps = [self._keep((w.shape[0], w.shape[1]), ratio) for w in group]
        return [self._store(self.prune(w, stats, keep)) for w, keep in zip(group, keeps, strict=True)]

    def prune(self, weight: Tensor, stats: Stats | None, keep: int) -> Tensor:
        """float32 [M, K] with `keep` blocks that are not zero."""
        w = weight.detach().float()
        if self.score == "magnitude":
            return torch.where(self._mask(w.square(), keep), w, 0)
        if stats is None:
            raise ValueError(f"block: score '{self.score}' needs calibration statistics; fix: give a calibration text")
        if self.score == "wanda":
            return torch.where(self._mask(w.square() * stats.gram.diagonal().clamp_min(0).to(w), keep), w, 0)
        return self._solve(w, stats.damped(self.damp), keep)

    def ratio(self, shape: Shape, sparsity: float) -> float:
        """The compression ratio at which this share of the blocks of a matrix is removed; in reach if a block is left.

        ValueError unless 0 <= sparsity < 1.
        """
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"block: a sparsity is at least 0 and below 1, not {sparsity}; 0.8 removes four of five blocks"
            )
        blocks = -(-shape[0] // ROWS) * -(-shape[1] // self.width)
        return 1 - self._bytes(shape, max(1, round((1 - sparsity) * blocks))) / dense_bytes(shape)

    def flops(self, shapes: Sequence[Shape], ratio: float) -> float:
        products = 2.0 * self.rounds * (self.steps + 1) if self.score == "obs" else 0.0
        return super().flops(shapes, ratio) + sum(products * m * k * k + 3.0 * k**3 for m, k in shapes)

    def _solve(self, w: Tensor, gram: Tensor, keep: int) -> Tensor:
        """Down to `keep` blocks in rounds that each remove the same share of what is left."""
        worth = torch.cholesky_inverse(torch.linalg.cholesky(gram)).diagonal().reciprocal().to(w)
        gram = (gram / gram.diagonal().mean()).to(w)
        count, pruned = patterns.block_sums(w, ROWS, self.width).numel(), w
        mask = torch.ones_like(w, dtype=torch.bool)
        for left in _counts(count, keep, self.rounds):
            scores = (pruned.square() * worth).masked_fill(~mask, -1)  # what is gone stays gone
            mask = self._mask(scores, left)
            pruned = refit(w, mask, gram, pruned, self.steps)
        return pruned

    def _mask(self, scores: Tensor, keep: int) -> Tensor:
        chosen = patterns.top(patterns.block_sums(scores, ROWS, self.width), keep)
        return patterns.spread(chosen, (scores.shape[0], scores.shape[1]), ROWS, self.width)

    def _store(self, pruned: Tensor) -> Format:
        if self.format == "bsr_int8":
            return BsrInt8.encode(pruned, (ROWS, self.width))
        return Bitmask.encode(pruned.to(dtype_of(self.dtype)))

    def _bytes(self, shape: Shape, blocks: int) -> int:
        if self.format == "bsr_int8":
            return BsrInt8.size(shape, blocks, self.width)
        nonzero = min(blocks * ROWS * self.width, shape[0] * shape[1])
        return Bitmask.size(shape, nonzero, dtype_of(self.dtype).itemsize)

    def _keep(self, shape: Shape, ratio: float) -> int:
        """Blocks that fill the budget after the mask is paid."""
        budget, count = int((1 - ratio) * dense_bytes(shape)), -(-shape[0] // ROWS) * -(-shape[1] // self.width)
        if self._bytes(shape, count) <= budget:
            return count
        item = 1 if self.format == "bsr_int8" else dtype_of(self.dtype).itemsize
        keep = (budget - self._bytes(shape, 0)) // (ROWS * self.width * item)
        if keep < 1:
            most = 1 - self._bytes(shape, 1) / dense_bytes(shape)
            raise RatioError(f"block: ratio {ratio} is out of reach for {shape}; at most {most:.4f}")
        return keep


def refit(weight: Tensor, mask: Tensor, gram: Tensor, start: Tensor, steps: int) -> Tensor:
    """[M, K], zero off the mask; on it each row is the least of (s - w) H (s - w)^T, by conjugate gradients."""
    target, begin = (weight @ gram).unsqueeze(0), torch.where(mask, start, 0).unsqueeze(0)
    return masked_cg(gram.unsqueeze(0), target, begin, mask.to(weight).unsqueeze(0), steps)[0]


def _counts(total: int, keep: int, rounds: int) -> list[int]:
    """Blocks left after each round, the last `keep`."""
    return [max(keep, round(total * (keep / total) ** (i / rounds))) for i in range(1, rounds)] + [keep]
