"""How long a way takes, predicted from what is counted in the pattern.

A time is a sum of amounts, each with a cost: what moves (rows of B, at least a sector of 32 bytes each; A; C) and what
waits (launches, the longest chain of rounds that one warp goes through). `benchmarks/fit_spmm.py` fits the costs to
measured times; docs/spmm.md says how well that goes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from . import Way
from .costs import COSTS, Costs
from .csr import Csr
from .kernels.cuda_rows import Cut, shape_of
from .kernels.cuda_windows import lane_columns

SECTOR = 32  # bytes that the L2 cache hands out at least
CACHE = 40.0  # MB of A that stay in the L2 cache from one tile of C to the next
MANY = 800  # tiles of C from which on no warp's chain is waited for
VENDOR = 4.0  # torch's choice among cuSPARSE's algorithms, against the one that fits rows of every kind
LIBRARY = ("cusparse", "dense", "vendor")
CAUTION = 1.1  # predictions err, and a doubtful win is worth less than a loss
VENDOR_CPU = 10.0  # what an entry costs a sparse product on the CPU, against one of a dense product


@dataclass(frozen=True)
class Stats:
    """What the prediction knows of a matrix.

    `filled`: rows that have entries; `gathered`: per height of a window (rows of B, groups of 16 of them); `shared`:
    what rows beside each other have in common, see `reorder.shared`; `blocks`: blocks that a row of blocks of
    Blocked-ELL has.
    """

    shape: tuple[int, int]
    nnz: int
    longest: int
    filled: int
    gathered: dict[int, tuple[int, int]]
    shared: float = 0.0
    blocks: int = 0
    gpu: bool = True

    @classmethod
    def of(cls, a: Csr, gathered: dict[int, tuple[int, int]], shared: float = 0.0, blocks: int = 0) -> Stats:
        longest = int(a.lengths.max()) if a.shape[0] else 0
        filled = int((a.lengths > 0).sum())
        return cls(a.shape, a.nnz, longest, filled, gathered, shared, blocks, a.device.type == "cuda")

    @property
    def mean(self) -> float:
        """Entries of a row that has some."""
        return self.nnz / max(1, self.filled)

    def __str__(self) -> str:
        m, k = self.shape
        text = f"{m} x {k}, {self.nnz} entries, {self.nnz / max(1, m):.1f} a row, {self.longest} in the longest"
        shares = ", ".join(f"{h}: {v / max(1, self.nnz):.2f}" for h, (v, _) in self.gathered.items())
        return f"{text}; rows of B fetched per entry, by height of a window: {shares}" if shares else text


def ranked(
    ways: Iterable[Way], stats: Stats, n: int, size: int, costs: Costs | None = None, caution: float = CAUTION
) -> dict[Way, float]:
    """Predicted times, the one to choose first: of ours only where it should be ahead of the library by `caution`."""
    found = {w: microseconds(w, stats, n, size, costs) for w in ways}
    return dict(sorted(found.items(), key=lambda item: item[1] * (1 if item[0].kernel in LIBRARY else caution)))


def microseconds(way: Way, stats: Stats, n: int, size: int, costs: Costs | None = None) -> float:
    """Predicted time of C = A B for B of n columns of numbers of `size` bytes; `costs`: others than the fitted ones."""
    if not stats.gpu:
        return _on_cpu(way, stats, n)
    if way.kernel == "vendor":
        return VENDOR * microseconds(Way("cusparse", (("alg", 3),)), stats, n, size, costs)
    key, amounts = described(way, stats, n, min(size, 4))
    return sum(c * a for c, a in zip((costs or COSTS)[key], amounts, strict=True))


def described(way: Way, stats: Stats, n: int, size: int) -> tuple[Hashable, tuple[float, ...]]:
    """Under which key of COSTS a way is found, and what it is charged for."""
    knobs = dict(way.knobs)
    if way.kernel == "cuda_windows":
        return (way.kernel, knobs["rows"], knobs["masked"], size), _windows(stats, n, size, **knobs)
    if way.kernel == "cuda_rows":
        return (way.kernel, *knobs.values(), size), _rows(stats, n, size, **knobs)
    if way.kernel == "dense":
        return (way.kernel, knobs.get("tf32", False), size), _dense(stats, n, size)
    if "ell" in knobs:
        return (way.kernel, "ell", size), _ell(stats, n, size, knobs["ell"])
    return (way.kernel, knobs["alg"], size), _csr(stats, n, size)


def _windows(stats: Stats, n: int, size: int, rows: int, masked: bool) -> tuple[float, ...]:
    """Launch, MB of B, of A, of C, 10^4 tiles, doublings of the groups that follow each other."""
    vectors, groups = stats.gathered.get(rows, (0, 0))
    tiles = -(-n // (8 * lane_columns(n, 2 if size == 4 else 0, rows)))
    windows = -(-stats.shape[0] // rows)
    packed = groups * 20 + stats.nnz * size if masked else groups * rows * 16 * size
    chain = math.log2(1 + groups / max(1, windows) / 2) / (1 + windows * tiles / MANY)
    moved = vectors * max(n * size, SECTOR) / 1e6, (groups * 64 + packed) * tiles / 1e6, _result(stats, n, size)
    return 1, *moved, windows * tiles / 1e4, chain


def _rows(stats: Stats, n: int, size: int, **knobs: Any) -> tuple[float, ...]:
    """Launch, MB of B far and near, of A, of C, rounds of the longest chain, a launch for cut rows, 10^6 lanes."""
    shape = shape_of(n, size, knobs["team"], knobs["double"])
    tiles, step = -(-n * size // shape.bytes), knobs["unroll"] // shape.loads
    cut = Cut.of(n, size, stats.nnz, knobs, None)
    longest = min(stats.longest, cut.limit)
    chain = longest * shape.team / step / cut.lanes(longest)
    a = stats.nnz * (size + 4) / 1e6
    moved = *_gathered(stats, n, size), a + max(0.0, a - CACHE) * (tiles - 1)
    lanes = (stats.filled * cut.lanes(round(stats.mean)) + (stats.shape[0] - stats.filled) * shape.team) * tiles / 1e6
    return 1, *moved, _result(stats, n, size), chain, float(stats.longest > cut.limit), lanes


def _csr(stats: Stats, n: int, size: int) -> tuple[float, ...]:
    """Launch, MB of B far and near, and as it lies, of A, of C, doublings of the longest row, 10^6 rows."""
    moved = *_gathered(stats, n, size), stats.shape[1] * n * size / 1e6
    rest = stats.nnz * (size + 4) / 1e6, _result(stats, n, size)
    return 1, *moved, *rest, math.log2(1 + stats.longest), stats.shape[0] / 1e6


def _gathered(stats: Stats, n: int, size: int) -> tuple[float, float]:
    """MB of B's rows fetched one by one, from the L2 cache and from L1, where a row finds what those beside it had."""
    moved = stats.nnz * max(n * size, SECTOR) / 1e6
    return moved * (1 - stats.shared), moved * stats.shared


def _ell(stats: Stats, n: int, size: int, block: int) -> tuple[float, ...]:
    """Launch, MB of A, 10^9 products."""
    stored = -(-stats.shape[0] // block) * stats.blocks * block * block
    return 1, stored * size / 1e6, stored * n / 1e9


def _dense(stats: Stats, n: int, size: int) -> tuple[float, ...]:
    """Launch, MB of A, 10^9 products of 64 columns at least, MB of B and C, 10^3 columns that follow each other."""
    m, k = stats.shape
    return 1, m * k * size / 1e6, m * k * max(n, 64) / 1e9, (m + k) * n * size / 1e6, k / 1e3


def _on_cpu(way: Way, stats: Stats, n: int) -> float:
    entries = VENDOR_CPU * stats.nnz if way.kernel == "vendor" else stats.shape[0] * stats.shape[1]
    return 5 + entries * n / 2e4


def _result(stats: Stats, n: int, size: int) -> float:
    return stats.shape[0] * n * size / 1e6
