"""How long a way takes, predicted from what is counted in the pattern; constants fitted on an H100, see docs/spmm.md."""

from __future__ import annotations

from dataclasses import dataclass

from . import Way
from .csr import Csr


@dataclass(frozen=True)
class Stats:
    """What the prediction knows of a matrix. `gathered`: per height of a window (rows of B, groups of 16 of them)."""

    shape: tuple[int, int]
    nnz: int
    longest: int
    gathered: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, a: Csr, gathered: dict[int, tuple[int, int]]) -> Stats:
        longest = int(a.lengths.max()) if a.shape[0] else 0
        return cls(a.shape, a.nnz, longest, gathered)

    def __str__(self) -> str:
        m, k = self.shape
        text = f"{m} x {k}, {self.nnz} entries, {self.nnz / max(1, m):.1f} a row, {self.longest} in the longest"
        shares = ", ".join(f"{h}: {v / max(1, self.nnz):.2f}" for h, (v, _) in self.gathered.items())
        return f"{text}; rows of B fetched per entry, by height of a window: {shares}" if shares else text


def microseconds(way: Way, stats: Stats, n: int, size: int) -> float:
    """Predicted time of C = A B for B of n columns of numbers of `size` bytes."""
    m, k = stats.shape
    knobs = dict(way.knobs)
    if way.kernel == "cuda_windows":
        vectors, groups = stats.gathered.get(knobs["rows"], (0, 0))
        return 2 + vectors * n * size / 3e6
    if way.kernel == "cuda_rows":
        return 2 + stats.nnz * n * size / 3e6
    if way.kernel == "dense":
        return 4 + 2 * m * k * n / 3e8
    return 5 + stats.nnz * n * size / 1.5e6
