"""How a product of `cuda_lscd` is shared out over a GPU: every way there is, and the time that each is thought to take.

The numbers are those of cuda/lscd.cuh; docs/kernels/lscd.md says what the words mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from ._lscd_pack import DEPTH

TILES = (1, 2, 4, 8, 16)  # of 8 tokens; 16 with wgmma alone
# Threads of the largest block, those for x included, by (warps that multiply together, stages that a warp takes at
# once) and tiles: what lets the registers suffice.
THREADS = {
    (1, 1): {1: 768, 2: 768, 4: 768, 8: 640},
    (1, 2): {1: 640, 2: 640, 4: 512, 8: 384},
    (4, 1): {1: 1024, 2: 1024, 4: 1024, 8: 768, 16: 512},
}
# As in lscd.cuh: bytes of barriers and of a token's 16 sums; slots of x that a stage needs.
BARRIERS, SUMS, X_PER_STAGE = {1: 2048, 4: 3072}, 80, {1: 1, 4: 2}
MAX_RING, MAX_WEIGHT_BARRIERS, MAX_X_RING = 8, 191, 32


class Gpu(NamedTuple):
    """What of a GPU decides how a launch is cut."""

    processors: int
    shared: int  # bytes that a block may have
    clusters: bool
    wgmma: bool

    @property
    def tokens(self) -> int:
        """The most of one launch."""
        return 8 * TILES[-1 if self.wgmma else -2]

    def blocks(self, cluster: int) -> int:
        """How many run at once: of clusters of 4, some do not find 4 processors side by side."""
        return self.processors if cluster < 4 else self.processors * 10 // 11 // 4 * 4


class Cut(NamedTuple):
    """How the work of a launch is shared out; as the parameters of the kernel."""

    team: int  # warps that multiply together: 1 (mma.sync) or 4 (wgmma)
    pair: int  # stages that a warp takes at once, one below the other
    high: int  # blocks of 16 * pair rows per block of threads
    split: int  # warps that share a block of rows
    cluster: int  # blocks of threads that share a panel
    ring: int  # stages of weights in flight per warp
    x_ring: int  # slots of x in shared memory

    @property
    def warps(self) -> int:
        return -(-self.high // self.team) * self.team * self.split


class Work(NamedTuple):
    """A product, as far as the cut depends on it."""

    rows: int
    deep: int  # stages per block of rows
    room: tuple[int, int]  # bytes of the largest stage and of the largest pair
    mean: int  # bytes of a stage, on average
    tiles: int
    words: bool

    def slot(self, team: int) -> int:
        """Bytes of x."""
        return 8 * self.tiles * 2 * DEPTH // X_PER_STAGE[team]

    def shared(self, cut: Cut) -> int:
        """Dynamic shared memory in bytes: x and stages, whose place the sums take."""
        stages = cut.x_ring * self.slot(cut.team) + cut.warps * cut.ring * self.room[cut.pair - 1]
        received = 4 * 8 * self.tiles * 16 * cut.pair * cut.high * (cut.cluster - 1) // cut.cluster
        return BARRIERS[cut.team] + max(stages, cut.warps * cut.pair * 8 * self.tiles * SUMS + received)

    def panels(self, cut: Cut) -> int:
        return -(-self.rows // (16 * cut.pair * cut.high))


def kinds(work: Work, device: Gpu) -> Iterator[tuple[int, int, int]]:
    """(team, pair, cluster) that this GPU has; where it has wgmma, mma.sync is worth it for up to 16 tokens."""
    for team, pair in THREADS:
        if work.tiles in THREADS[team, pair] and (device.wgmma if team > 1 else work.tiles <= 2 or not device.wgmma):
            for cluster in (1, 2, 4) if team > 1 else (1, 2) if device.clusters else (1,):
                if cluster <= work.deep:
                    yield team, pair, cluster


def cuts(work: Work, device: Gpu) -> Iterator[Cut]:
    """Every cut that fits the GPU, each with as many stages in flight as there is room for."""
    for team, pair, cluster in kinds(work, device):
        most, per = (THREADS[team, pair][work.tiles] // 32 - 1) // team, X_PER_STAGE[team]
        count = -(-work.deep // cluster)
        for split in range(1, min(most, count) + 1):
            for high in range(1, min(most // split * team, -(-work.rows // (16 * pair))) + 1):
                slots = {min(max(count, split) * per, split * per * n // 2, MAX_X_RING) for n in (2, 3, 4, 6)}
                for x_ring in sorted(slots):
                    yield from _deepest(work, device, Cut(team, pair, high, split, cluster, 0, x_ring), count)


def _deepest(work: Work, device: Gpu, cut: Cut, count: int) -> Iterator[Cut]:
    """The cut with as many stages in flight as there is room for, if there is for one."""
    for ring in range(min(-(-count // cut.split), MAX_RING, MAX_WEIGHT_BARRIERS // cut.warps), 0, -1):
        if work.shared(found := cut._replace(ring=ring)) <= device.shared:
            yield found
            return


@lru_cache(maxsize=4096)
def best_cut(work: Work, device: Gpu) -> Cut:
    """The cut with the least predicted time."""
    return min(cuts(work, device), key=lambda cut: predict(work, cut, device))


class Costs(NamedTuple):
    """What the time of a launch is made of: microseconds, and bytes per microsecond and processor."""

    launch: float
    wave: float  # of blocks of threads
    load_rate: float
    latency: float
    x_rate: float
    overlap: float  # how much of the shorter of loading and multiplying does not hide behind the longer, in 1 / turns
    no_overlap: float
    cluster: dict[int, float]
    per_split: float
    # Per turn, if x has room for no stage ahead of those in use; per tile of the stages in use; if for no second stage.
    exposed: tuple[float, float, float]
    sums: float  # per tile, block of rows and part of its sum
    turn: dict[bool, float]  # a turn of a processor's warps, by words
    idle: float  # what a warp of a team without rows costs, to one that has some
    stage: dict[tuple[bool, int], tuple[float, ...]]  # by (words, pair) and log2 of tiles
    turn_tile: dict[tuple[bool, int], float]


# Fitted to 2,000 measured cuts of 200 products on an H100, those of mma.sync once more to 57 since tensor maps copy x:
# the cut with the least prediction was 1 % slower than the best that was measured, on average.
COSTS = {
    1: Costs(
        launch=1.12,
        wave=2.74,
        load_rate=25900.0,
        latency=2.56,
        x_rate=531000.0,
        overlap=0.494,
        no_overlap=0.5,  # fitted: 0.229, with which 4096 x 4096 at 70 % took 11.5 us instead of 9.8
        cluster={1: 0, 2: 0.969},
        per_split=0.0115,
        exposed=(0.241, 0.0228, 0.0399),
        sums=0.0156,
        turn={False: 0.84, True: 0.742},
        idle=0.6,
        stage={
            (False, 1): (0.0581, 0.0752, 0.0904, 0.153),
            (False, 2): (0.147, 0.178, 0.233, 0.352),
            (True, 1): (0.0149, 0.0235, 0.0315, 0.0491),
            (True, 2): (0.0586, 0.0862, 0.116, 0.237),
        },
        turn_tile={(False, 1): 0.0197, (False, 2): 0.114, (True, 1): 0.113, (True, 2): 0.108},
    ),
    4: Costs(
        launch=0.724,
        wave=3.08,
        load_rate=27400.0,
        latency=2.25,
        x_rate=1070000.0,
        overlap=0.587,
        no_overlap=0.345,
        cluster={1: 0, 2: 1.43, 4: 1.75},
        per_split=0.0837,
        exposed=(0.433, 0.00466, 0.075),
        sums=0.0104,
        turn={False: 0.686, True: 0.727},
        idle=0.834,
        stage={(False, 1): (0.0751, 0.0751, 0.0766, 0.0802, 0.103), (True, 1): (0.036, 0.036, 0.0476, 0.0521, 0.0793)},
        turn_tile={(False, 1): 0.0193, (True, 1): 0.0151},
    ),
}


def predict(work: Work, cut: Cut, device: Gpu) -> float:
    """Microseconds, roughly: only the order of the cuts of one product matters."""
    cost, kind = COSTS[cut.team], (work.words, cut.pair)
    waves = -(-work.panels(cut) * cut.cluster // device.blocks(cut.cluster))
    count = -(-work.deep // cut.cluster)
    turns, busy = -(-count // cut.split), cut.high * cut.split
    rate = min(cost.load_rate, busy * cut.ring * cut.pair * work.mean / cost.latency)
    load = count * cut.high * cut.pair * work.mean / rate + count * work.tiles * 16 * DEPTH / cost.x_rate
    stage = (busy + cost.idle * (cut.warps - busy)) * cost.stage[kind][TILES.index(work.tiles)]
    multiply = turns * (stage + cost.turn[work.words] + cost.turn_tile[kind] * work.tiles)
    ahead = cut.x_ring / X_PER_STAGE[cut.team] / cut.split - 1  # stages of x, per warp
    if cut.x_ring >= count * X_PER_STAGE[cut.team]:
        ahead = 2.0
    one, tile, two = cost.exposed
    exposed = _within(1 - ahead) * (one + tile * work.tiles * cut.split) + _within(2 - ahead) * two
    overlap = cost.no_overlap if cut.ring < min(2, turns) else cost.overlap / min(turns, 4)
    sums = cost.sums * work.tiles * cut.high * cut.pair * (cut.split + cut.cluster)
    wave = cost.wave + max(load, multiply) + overlap * min(load, multiply) + exposed * (turns - 1) + sums
    return cost.launch + waves * wave + cost.cluster[cut.cluster] + cost.per_split * cut.split


def _within(x: float) -> float:
    return min(1.0, max(0.0, x))
