"""What the pruning methods have in common: how many weights survive, and how the survivors are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import patterns
from ..formats import Format, dtype_of
from ..formats.bitmask import Bitmask
from ..formats.nm24 import NM
from ..stats import Stats
from . import Method, RatioError, Shape, check_dtype, dense_bytes


@dataclass(frozen=True)
class Pruning(Method):
    """`format`: "bitmask" (the ratio decides the density) or "nm24" (`n` of `m` survive, the ratio follows).

    `dtype`: how values are stored.
    """

    format: str = "bitmask"
    n: int = 2
    m: int = 4
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.format not in ("bitmask", "nm24"):
            raise ValueError(f"{self.name}: format is 'bitmask' or 'nm24', not '{self.format}'")
        if not 1 <= self.n <= self.m <= 16:
            raise ValueError(f"{self.name}: n of m is 1 <= n <= m <= 16, not {self.n}:{self.m}")
        check_dtype(self.name, self.dtype)

    def size(self, shapes: Sequence[Shape], ratio: float) -> list[int]:
        if self.format == "nm24":
            return [self._nm_size(shape, ratio) for shape in shapes]
        return [Bitmask.size(shape, self._keep(shape, ratio), self._itemsize) for shape in shapes]

    def fit(self, group: Sequence[Tensor], stats: Stats | None, ratio: float) -> list[Format]:
        self.size([(w.shape[0], w.shape[1]) for w in group], ratio)
        return [self._store(self.prune(w, stats, ratio)) for w in group]

    def prune(self, weight: Tensor, stats: Stats | None, ratio: float) -> Tensor:
        """The weight with what does not survive set to zero; methods with better ideas override this."""
        scores = self.scores(weight.float(), stats)
        return torch.where(self._select(scores, ratio), weight, 0)

    def scores(self, weight: Tensor, stats: Stats | None) -> Tensor:
        """[out, in]: the higher, the more worth keeping."""
        raise TypeError(f"{type(self).__name__} defines neither scores nor prune")

    def _select(self, scores: Tensor, ratio: float) -> Tensor:
        if self.format == "nm24":
            return patterns.nm(scores, self.n, self.m)
        return patterns.top(scores, self._keep((scores.shape[0], scores.shape[1]), ratio))

    def _store(self, pruned: Tensor) -> Format:
        values = pruned.to(dtype_of(self.dtype))
        return NM.encode(values, self.n, self.m) if self.format == "nm24" else Bitmask.encode(values)

    def _keep(self, shape: Shape, ratio: float) -> int:
        """Non-zeros that fill the budget after the mask is paid."""
        budget = int((1 - ratio) * dense_bytes(shape)) - Bitmask.size(shape, 0)
        keep = budget // self._itemsize
        if keep < 1:
            most = 1 - Bitmask.size(shape, 1, self._itemsize) / dense_bytes(shape)
            raise RatioError(f"{self.name}: ratio {ratio} is out of reach for {shape}; at most {most:.4f}")
        return min(keep, shape[0] * shape[1])

    def _nm_size(self, shape: Shape, ratio: float) -> int:
        size = NM.size(shape, self.n, self.m, self._itemsize)
        stored = 1 - size / dense_bytes(shape)
        if abs(stored - ratio) > 0.01:
            raise RatioError(
                f"{self.name}: {self.n}:{self.m} in {self.dtype} stores {shape} at ratio {stored:.4f}, not {ratio}; "
                f"fix: ask for ratio {stored:.4f} or for format='bitmask'"
            )
        return size

    @property
    def _itemsize(self) -> int:
        return dtype_of(self.dtype).itemsize
