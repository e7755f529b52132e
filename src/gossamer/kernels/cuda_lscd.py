"""`bitmask` on NVIDIA GPUs at decode: read compressed, expanded in registers, multiplied by the tensor cores.

For up to 64 tokens, where the time of a product is the time of reading the weight. See docs/kernels/lscd.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import nvrtc
from ..formats import Format
from ..formats.bitmask import Bitmask
from . import Case, Kernel, KernelError, Packed
from ._lscd_pack import DEPTH, LINE, STEPS, pack_matrix

DTYPES = (torch.bfloat16, torch.float16)
MAX_TOKENS = 64  # of one launch; more go in several
TILES = (1, 2, 4, 8)  # of 8 tokens
# Threads of the largest block, a warp for x included, by stages that a warp takes at once and tiles: what lets the
# registers suffice.
THREADS = {1: {1: 768, 2: 768, 4: 768, 8: 640}, 2: {1: 640, 2: 640, 4: 512, 8: 384}}
# As in lscd.cuh: bytes of barriers, of a token's row of x in a stage, and of its 16 sums.
BARRIERS, PITCH, SUMS = 2048, 2 * DEPTH + 64, 80
MAX_RING, MAX_WEIGHT_BARRIERS, MAX_X_RING = 8, 192, 32
ROOM = 256  # bytes that the largest stage is rounded to, so that layers alike share a cut


@cache
def function(tiles: int, bf16: bool, pair: int, cluster: int, shared: int) -> nvrtc.Function:
    """The kernel for these; `shared` is the most shared memory that a block of the GPU may have."""
    macros = {"STEPS": STEPS, "TILES": tiles, "BF16": int(bf16), "PAIR": pair, "CLUSTER": cluster}
    macros |= {"THREADS": THREADS[pair][tiles], "UNROLL": 2 // pair}
    return nvrtc.Function("lscd.cuh", "lscd", "PPPPPiiiiiiiiii", macros, shared)


# For the tests: every pair of tiles and stages, every value of the rest. All 32 would take a minute to compile.
VARIANTS = tuple(
    function(tiles, (tiles > 2) == (pair > 1), pair, 1 + (tiles in (2, 8)), nvrtc.STATIC_SHARED)
    for tiles, pair in itertools.product(TILES, (1, 2))
)


class Gpu(NamedTuple):
    """What of a GPU decides how a launch is cut."""

    processors: int
    shared: int  # bytes that a block may have
    clusters: bool


@cache
def gpu(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    return Gpu(found.multi_processor_count, found.shared_memory_per_block_optin, found.major >= 9)


class Cut(NamedTuple):
    """How the work of a launch is shared out; as the parameters of the kernel."""

    pair: int  # stages that a warp takes at once, one below the other
    high: int  # blocks of 16 * pair rows per block of threads
    split: int  # warps that share a block of rows
    cluster: int  # blocks of threads that share a panel
    ring: int  # stages of weights in flight per warp
    x_ring: int  # stages of x in shared memory

    @property
    def warps(self) -> int:
        return self.high * self.split


class Work(NamedTuple):
    """A product, as far as the cut depends on it."""

    rows: int
    deep: int  # stages per block of rows
    room: tuple[int, int]  # bytes of the largest stage and of the largest pair
    mean: int  # bytes of a stage, on average
    tiles: int

    def held(self, cut: Cut) -> int:
        """Bytes of x and of stages in shared memory; the sums take their place."""
        stages = cut.x_ring * 8 * self.tiles * PITCH + cut.warps * cut.ring * self.room[cut.pair - 1]
        return max(stages, cut.warps * cut.pair * 8 * self.tiles * SUMS)

    def shared(self, cut: Cut) -> int:
        """Dynamic shared memory in bytes."""
        received = 4 * 8 * self.tiles * 8 * cut.pair * cut.high if cut.cluster > 1 else 0
        return BARRIERS + self.held(cut) + received

    def panels(self, cut: Cut) -> int:
        return -(-self.rows // (16 * cut.pair * cut.high))


def cuts(work: Work, device: Gpu) -> Iterator[Cut]:
    """Every cut that fits the GPU, each with as many stages in flight as there is room for."""
    for pair, cluster in itertools.product((1, 2), (1, 2) if device.clusters and work.deep > 1 else (1,)):
        most, count = THREADS[pair][work.tiles] // 32 - 1, -(-work.deep // cluster)
        for split in range(1, min(most, count) + 1):
            for high in range(1, min(most // split, -(-work.rows // (16 * pair))) + 1):
                for x_ring in sorted({min(max(count, split), split * n, MAX_X_RING) for n in (1, 2, 3)}):
                    rings = range(min(-(-count // split), MAX_RING, MAX_WEIGHT_BARRIERS // (high * split)), 0, -1)
                    all_rings = (Cut(pair, high, split, cluster, ring, x_ring) for ring in rings)
                    yield from itertools.islice((c for c in all_rings if work.shared(c) <= device.shared), 1)


@lru_cache(maxsize=4096)
def best_cut(work: Work, device: Gpu) -> Cut:
    """The cut with the least predicted time."""
    return min(cuts(work, device), key=lambda cut: predict(work, cut, device))


# Fitted to 2,100 measured cuts of 140 products on an H100: off by 7 %, and the cut with the least prediction was 2 %
# slower than the best that was measured. Microseconds, and bytes per microsecond and processor.
LAUNCH, WAVE, CLUSTERED, PER_SPLIT = 1.52, 2.927, 1.623, 0.03559
LOAD_RATE, LATENCY, X_RATE = 28720, 2.41, 341100
OVERLAP, NO_OVERLAP = 0.702, 0.3223
X_EXPOSED = {2: 0.8711, 3: 0.02792}  # per turn, if x has room for fewer stages ahead than so many per warp
STAGE = {1: {1: 0.09206, 2: 0.09719, 4: 0.1168, 8: 0.1748}, 2: {1: 0.1582, 2: 0.1898, 4: 0.2242, 8: 0.2981}}
TURN, TURN_TILE = {1: 0.499, 2: 0.6129}, {1: 0.06637, 2: 0.1594}


def predict(work: Work, cut: Cut, device: Gpu) -> float:
    """Microseconds, roughly: only the order of the cuts of one product matters."""
    waves = -(-work.panels(cut) * cut.cluster // device.processors)
    count = -(-work.deep // cut.cluster)
    turns = -(-count // cut.split)
    rate = min(LOAD_RATE, cut.warps * cut.ring * cut.pair * work.mean / LATENCY)
    load = count * cut.high * cut.pair * work.mean / rate + count * work.tiles * 16 * DEPTH / X_RATE
    turn = cut.warps * STAGE[cut.pair][work.tiles] + TURN[cut.pair] + TURN_TILE[cut.pair] * work.tiles
    exposed = sum(us for ahead, us in X_EXPOSED.items() if cut.x_ring < min(ahead * cut.split, count))
    overlap = NO_OVERLAP if cut.ring < min(2, turns) else OVERLAP / min(turns, 4)
    wave = WAVE + max(load, turns * turn) + overlap * min(load, turns * turn) + exposed * (turns - 1)
    return LAUNCH + waves * wave + CLUSTERED * (cut.cluster - 1) + PER_SPLIT * cut.split


class CudaLscd(Kernel):
    """bfloat16 and float16 x, 1 to 64 tokens, any shape and density."""

    name: ClassVar[str] = "cuda_lscd"
    device: ClassVar[str] = "cuda"
    formats: ClassVar[tuple[str, ...]] = ("bitmask",)

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        if reason := nvrtc.refusal(case.device):
            return reason
        if case.dtype not in DTYPES:
            return "x in bfloat16 or float16"
        if case.tokens > MAX_TOKENS:
            return f"at most {MAX_TOKENS} tokens"
        if not all(case.spec["shape"]):
            return "a weight with at least one entry"
        return None

    @classmethod
    def pack(cls, a: Format, dtype: torch.dtype) -> Packed:
        if not isinstance(a, Bitmask):
            raise KernelError(f"cuda_lscd runs the format bitmask, not {a.name}; fix: choose another kernel")
        if dtype not in DTYPES:
            raise KernelError(f"cuda_lscd takes x in bfloat16 or float16, not {dtype}; fix: convert the model")
        stages, offsets, room = pack_matrix(a.decode(dtype).detach())
        (rows, cols), mean = a.shape, stages.numel() // (offsets.numel() - 1)
        meta = {"rows": rows, "cols": cols, "bf16": dtype == torch.bfloat16, "mean": _rounded(mean, 128)}
        return Packed((stages, offsets), meta | {"room": [_rounded(bytes, ROOM) for bytes in room]})

    @classmethod
    def run(cls, x: Tensor, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Tensor:
        flat = _rows(x, meta)
        y = x.new_empty(flat.shape[0], meta["rows"])
        for begin in range(0, flat.shape[0], MAX_TOKENS):
            part = slice(begin, begin + MAX_TOKENS)
            launch(flat[part], packed, meta, bias, y[part])
        return y.view(*x.shape[:-1], meta["rows"])


def launch(
    x: Tensor, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None, y: Tensor, cut: Cut | None = None
) -> None:
    """y [N, M] = x [N, K] A^T + bias, for 1 to 64 rows of x as `_rows` leaves them."""
    tokens, cols = x.shape
    work, device = work_of(tokens, meta), gpu(x.get_device())
    cut = cut or best_cut(work, device)
    grid, block = (work.panels(cut) * cut.cluster, 1, 1), (32 * (cut.warps + 1), 1, 1)
    shares = cut.high, cut.split, cut.ring, cut.x_ring, work.room[cut.pair - 1]
    sizes = work.rows, cols, tokens, work.deep, *shares, packed[0].numel() // LINE
    kernel = function(work.tiles, meta["bf16"], cut.pair, cut.cluster, device.shared)
    bias = _none(x.device) if bias is None else bias.to(x.dtype).contiguous()
    kernel.launch(grid, block, *packed, x, bias, y, *sizes, shared=work.shared(cut))


def work_of(tokens: int, meta: dict[str, Any]) -> Work:
    tiles = next(t for t in TILES if tokens <= 8 * t)
    return Work(meta["rows"], -(-meta["cols"] // DEPTH), tuple(meta["room"]), meta["mean"], tiles)


def _rounded(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _rows(x: Tensor, meta: dict[str, Any]) -> Tensor:
    """x [N, K'], as the kernel copies it: rows end to end, each a multiple of 16 bytes at such an address."""
    if x.shape[-1] != meta["cols"]:
        raise KernelError(f"cuda_lscd: x has {x.shape[-1]} features, the weight takes {meta['cols']}; fix: pass that x")
    if x.dtype != (torch.bfloat16 if meta["bf16"] else torch.float16):
        raise KernelError(f"cuda_lscd: packed for another dtype than {x.dtype}; fix: gossamer.prepare the model again")
    flat = x.reshape(x.shape[:-1].numel(), meta["cols"])
    if meta["cols"] % 8:
        return pad(flat, (0, -meta["cols"] % 8))
    flat = flat.contiguous()
    return flat if flat.data_ptr() % 16 == 0 else flat.clone()


@cache
def _none(device: torch.device) -> Tensor:
    """No bias: an empty tensor passes a null pointer."""
    return torch.empty(0, device=device)
