"""`svd`: low rank in the whitened space (SVD-LLM, Wang et al. 2024, arXiv 2403.07378, section 3.1).

With C C^T the Gram of the input, the best rank-r product under ||X (W - U V)^T||_F is the truncated SVD of W C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..formats import Format, dtype_of
from ..formats.dense import Dense
from ..formats.product import Product
from ..stats import Stats
from . import Method, RatioError, Shape, check_dtype, dense_bytes


@dataclass(frozen=True)
class SVD(Method):
    dtype: str = "bfloat16"

    name: ClassVar[str] = "svd"

    def __post_init__(self) -> None:
        check_dtype(self.name, self.dtype)

    def size(self, shapes: Sequence[Shape], ratio: float) -> list[int]:
        itemsize = dtype_of(self.dtype).itemsize
        return [self._rank(shape, ratio) * sum(shape) * itemsize for shape in shapes]

    def fit(self, group: Sequence[Tensor], stats: Stats | None, ratio: float) -> list[Format]:
        if stats is None:
            raise ValueError("svd needs calibration statistics")
        return [self._fit(w, stats, self._rank((w.shape[0], w.shape[1]), ratio)) for w in group]

    def flops(self, shapes: Sequence[Shape], ratio: float) -> float:
        return sum(50.0 * min(m, k) ** 3 + 4.0 * k**3 + 6.0 * m * k * k for m, k in shapes)

    def _fit(self, weight: Tensor, stats: Stats, rank: int) -> Format:
        root, inverse = stats.root
        left, right = truncated(weight.double() @ root, rank)
        factors = [Dense.encode(f.to(dtype_of(self.dtype))) for f in (left, right @ inverse)]
        return Product.of(*factors)

    def _rank(self, shape: Shape, ratio: float) -> int:
        itemsize = dtype_of(self.dtype).itemsize
        rank = int((1 - ratio) * dense_bytes(shape)) // (sum(shape) * itemsize)
        if rank < 1:
            most = 1 - sum(shape) * itemsize / dense_bytes(shape)
            raise RatioError(f"svd: ratio {ratio} is out of reach for {shape}; at most {most:.4f}")
        return min(rank, *shape)


def truncated(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(L [..., M, r], R [..., r, K]), L R the best rank-r approximation of `a`; from the Gram of the short side.

    float64 in: squaring the singular values costs half of the digits, which leaves more than a stored bf16 needs.
    """
    m, k = a.shape[-2:]
    if k <= m:
        right = torch.linalg.eigh(a.mT @ a).eigenvectors[..., -rank:].mT
        return a @ right.mT, right
    left = torch.linalg.eigh(a @ a.mT).eigenvectors[..., -rank:]
    return left, left.mT @ a
