"""How a product of `cuda_nm24` is shared out over a GPU: every way there is, and the time that each is thought to take.

The numbers are those of cuda/nm24.cuh; docs/kernels/nm24.md says what the words mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from ._nm24_pack import DEPTH, STAGE

TILES = (1, 2, 4, 8)  # of 8 tokens
# Warps that multiply in the largest block, by stages that a warp takes at once and tiles: what lets the registers do.
WARPS = {1: {1: 23, 2: 23, 4: 18, 8: 14}, 2: {1: 15, 2: 15, 4: 10, 8: 10}}
X_WARPS = {1: 1, 2: 1, 4: 2, 8: 2}
BARRIERS, PITCH, SUMS = 512, 2 * DEPTH + 16, 80  # bytes: of barriers, of 256 columns of a token, of its 16 sums
MAX_X_RING = 16


class Gpu(NamedTuple):
    """What of a GPU decides how a launch is cut."""

    processors: int
    shared: int  # bytes that a block may have
    clusters: bool
    tiles: tuple[int, ...] = TILES  # that the kernel compiles for

    def blocks(self, cluster: int) -> int:
        """How many run at once: of clusters of 4, some do not find 4 processors side by side."""
        return self.processors if cluster < 4 else self.processors * 10 // 11 // 4 * 4


class Cut(NamedTuple):
    """How the work of a launch is shared out; as the parameters of the kernel."""

    pair: int  # stages that a warp takes at once, one below the other
    high: int  # blocks of 16 * pair rows per block of threads
    split: int  # warps that share a block of rows
    cluster: int  # blocks of threads that share a panel
    x_ring: int  # slots of x in shared memory

    @property
    def warps(self) -> int:
        return self.high * self.split


class Work(NamedTuple):
    """A product, as far as the cut depends on it."""

    rows: int
    deep: int  # stages per block of rows
    tiles: int

    def shared(self, cut: Cut) -> int:
        """Dynamic shared memory in bytes: x, whose place the sums take."""
        tokens = 8 * self.tiles
        received = 4 * tokens * 16 * cut.pair * cut.high * (cut.cluster - 1) // cut.cluster
        return BARRIERS + max(cut.x_ring * tokens * PITCH, cut.warps * cut.pair * tokens * SUMS + received)

    def panels(self, cut: Cut) -> int:
        return -(-self.rows // (16 * cut.pair * cut.high))


def cuts(work: Work, device: Gpu) -> Iterator[Cut]:
    """Every cut that fits the GPU."""
    for pair in WARPS:
        most = WARPS[pair][work.tiles]
        for cluster in (1, 2, 4) if device.clusters else (1,):
            count = -(-work.deep // cluster)
            for split in range(1, min(most, count) + 1 if cluster <= work.deep else 1):
                for high in range(1, min(most // split, -(-work.rows // (16 * pair))) + 1):
                    yield from _widest(work, device, Cut(pair, high, split, cluster, 0), count)


def _widest(work: Work, device: Gpu, cut: Cut, count: int) -> Iterator[Cut]:
    """The cut with the most slots of x that are of use, if there is room for enough."""
    for slots in range(min(count, 4 * cut.split, MAX_X_RING), cut.split - 1, -1):
        if work.shared(found := cut._replace(x_ring=slots)) <= device.shared:
            yield found
            return


# Fitted to 748 timings on an H100: microseconds, and bytes per microsecond and processor.
FIXED, CLUSTER = 3.7, {1: 0.0, 2: 0.1, 4: 0.5}
READ, READ_X, WRITE_SUMS = 23_700, 31_000, 7_900
PER_TILE, PER_TURN = 0.11, 0.5  # a stage times 8 tokens, and what a warp waits for one stage


def predict(work: Work, cut: Cut, device: Gpu) -> float:
    """Microseconds."""
    blocks = work.panels(cut) * cut.cluster
    waves, busy = -(-blocks // device.blocks(cut.cluster)), min(1.0, blocks / device.processors)
    count = -(-work.deep // cut.cluster)
    turns = -(-count // cut.split)
    parts = (
        count * cut.high * cut.pair * STAGE / (READ / max(busy, 0.5)),
        count * 8 * work.tiles * 2 * DEPTH / READ_X,
        turns * (cut.pair * work.tiles * PER_TILE + PER_TURN),
    )
    overlapped = sum(t**4 for t in parts) ** 0.25
    sums = cut.warps * cut.pair * work.tiles * 512 / WRITE_SUMS
    return FIXED + CLUSTER[cut.cluster] + waves * (overlapped + sums)


@lru_cache(maxsize=4096)
def best_cut(work: Work, device: Gpu) -> Cut:
    """The cut with the least predicted time."""
    return min(cuts(work, device), key=lambda cut: predict(work, cut, device))
