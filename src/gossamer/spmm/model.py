"""How long a way takes, predicted from what is counted in the pattern.

A time is a sum of what moves and of what waits, each with a cost: rows of B gathered (at least a sector of 32 bytes
each), A's bytes, C's bytes, tiles of C, and the longest chain of rounds that one warp goes through. The costs were
fitted to the times of 25 matrices at 4 widths on an H100; docs/spmm.md says how well that goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import Way
from .csr import Csr
from .kernels.cuda_rows import UNROLL, WARP, longest_segment, shape_of
from .kernels.cuda_windows import lane_columns

SECTOR = 32  # bytes that the L2 cache hands out at least
MANY = 800  # tiles of C from which on no warp's chain is waited for
# By (rows, masked, bytes of a number): us per launch, MB of B, of A and of C, 10^4 tiles, doubling of groups.
WINDOWS = {
    (8, False, 2): (2.087, 0.157, 0.136, 0.235, 3.521, 0.538),
    (16, False, 2): (3.374, 0.149, 0.066, 0.331, 5.956, 0.415),
    (32, False, 2): (3.268, 0.172, 0.140, 0.381, 16.289, 0.534),
    (8, True, 2): (2.216, 0.167, 0.393, 0.0, 7.874, 0.707),
    (8, False, 4): (1.813, 0.132, 0.159, 0.228, 4.955, 0.608),
    (16, False, 4): (3.115, 0.115, 0.231, 0.294, 12.665, 0.350),
    (32, False, 4): (4.338, 0.061, 0.362, 0.724, 5.850, 0.183),
    (8, True, 4): (2.160, 0.149, 0.357, 0.0, 9.273, 0.702),
}
# By bytes of a number: us per launch, MB of B, of A and of C, round, for rows that are cut, per 10^6 lanes.
ROWS = {
    2: (2.714, 0.067, 0.093, 0.413, 0.350, 3.831, 4.601),
    4: (2.115, 0.044, 0.367, 0.690, 0.345, 3.040, 1.493),
}
# By bytes of a number: us per launch, MB of A, 10^9 products (of 64 columns at least), MB of B and C, for few rows.
DENSE = {2: (2.778, 0.254, 1.083, 0.373, 2.447), 4: (6.616, 0.0, 33.586, 1.005, 4.572)}
VENDOR = 3.0  # torch's choice among cuSPARSE's algorithms against our rows, seldom better than this
VENDOR_CPU = 10.0  # what an entry costs a sparse product on the CPU, against one of a dense product


@dataclass(frozen=True)
class Stats:
    """What the prediction knows of a matrix.

    `filled`: rows that have entries; `gathered`: per height of a window (rows of B, groups of 16 of them).
    """

    shape: tuple[int, int]
    nnz: int
    longest: int
    filled: int
    gathered: dict[int, tuple[int, int]]
    gpu: bool = True

    @classmethod
    def of(cls, a: Csr, gathered: dict[int, tuple[int, int]]) -> Stats:
        longest = int(a.lengths.max()) if a.shape[0] else 0
        return cls(a.shape, a.nnz, longest, int((a.lengths > 0).sum()), gathered, a.device.type == "cuda")

    @property
    def mean(self) -> float:
        """Entries of a row that has some."""
        return self.nnz / max(1, self.filled)

    def __str__(self) -> str:
        m, k = self.shape
        text = f"{m} x {k}, {self.nnz} entries, {self.nnz / max(1, m):.1f} a row, {self.longest} in the longest"
        shares = ", ".join(f"{h}: {v / max(1, self.nnz):.2f}" for h, (v, _) in self.gathered.items())
        return f"{text}; rows of B fetched per entry, by height of a window: {shares}" if shares else text


def microseconds(way: Way, stats: Stats, n: int, size: int) -> float:
    """Predicted time of C = A B for B of n columns of numbers of `size` bytes."""
    if not stats.gpu:
        return _on_cpu(way, stats, n)
    knobs, size = dict(way.knobs), min(size, 4)
    if way.kernel == "cuda_windows":
        return _windows(stats, n, size, knobs["rows"], knobs["masked"])
    if way.kernel == "cuda_rows":
        return _rows(stats, n, size)
    return _dense(stats, n, size) if way.kernel == "dense" else VENDOR * _rows(stats, n, size)


def _windows(stats: Stats, n: int, size: int, rows: int, masked: bool) -> float:
    vectors, groups = stats.gathered.get(rows, (0, 0))
    tiles = -(-n // (8 * lane_columns(n, 2 if size == 4 else 0, rows)))
    windows = -(-stats.shape[0] // rows)
    packed = groups * 20 + stats.nnz * size if masked else groups * rows * 16 * size
    chain = math.log2(1 + groups / max(1, windows) / 2) / (1 + windows * tiles / MANY)
    amounts = 1, vectors * max(n * size, SECTOR) / 1e6, (groups * 64 + packed) * tiles / 1e6
    return _sum(WINDOWS[rows, masked, size], (*amounts, _result(stats, n, size), windows * tiles / 1e4, chain))


def _rows(stats: Stats, n: int, size: int) -> float:
    team, par, loads = shape_of(-(-n * size // 16) * 16 // size, size, stats.mean)
    tiles = -(-n * size // (16 * team * loads))
    limit = longest_segment(stats.nnz, team, tiles, None)
    chain = min(stats.longest, limit) * team / (UNROLL * WARP)
    amounts = 1, stats.nnz * max(n * size, SECTOR) / 1e6, stats.nnz * (size + 4) * tiles / 1e6
    lanes = stats.shape[0] * tiles * team * par / 1e6
    return _sum(ROWS[size], (*amounts, _result(stats, n, size), chain, float(stats.longest > limit), lanes))


def _dense(stats: Stats, n: int, size: int) -> float:
    m, k = stats.shape
    few = float(m < 4096 and k > 1024)
    return _sum(DENSE[size], (1, m * k * size / 1e6, m * k * max(n, 64) / 1e9, (m + k) * n * size / 1e6, few))


def _on_cpu(way: Way, stats: Stats, n: int) -> float:
    entries = VENDOR_CPU * stats.nnz if way.kernel == "vendor" else stats.shape[0] * stats.shape[1]
    return 5 + entries * n / 2e4


def _result(stats: Stats, n: int, size: int) -> float:
    return stats.shape[0] * n * size / 1e6


def _sum(costs: tuple[float, ...], amounts: tuple[float, ...]) -> float:
    return sum(c * a for c, a in zip(costs, amounts, strict=True))
