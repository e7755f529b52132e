"""`bitmask` on NVIDIA GPUs at decode: read compressed, expanded in registers, multiplied by the tensor cores.

For few tokens, where the time of a product is the time of reading the weight. See docs/kernels/lscd.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import nvrtc
from ..driver import STATIC_SHARED
from ..formats import Format
from ..formats.bitmask import Bitmask
from . import Case, Kernel, KernelError, Packed
from ._cuda_operands import DTYPES, bias_of, by_shape, rows_of
from ._lscd_cut import THREADS, TILES, X_PER_STAGE, Cut, Gpu, Work, best_cut
from ._lscd_map import COLUMNS, NO_MAP, tensor_map
from ._lscd_pack import DEPTH, LINE, STEPS, head_bytes, pack_matrix, share_of_items

MAX_TOKENS = 256
LOAD_RATE = 28000  # bytes per microsecond and processor, as NOT_HIDDEN was measured
MAX_MAPS = 64  # of a launch
ROOM = 256  # bytes that the largest stage is rounded to, so that layers alike share a cut
# How much of the time to multiply a stage does not hide behind its loading, on the largest matrices; by words.
NOT_HIDDEN = {False: 0.044, True: 0.0245}


@cache
def function(tiles: int, bf16: bool, words: bool, team: int, pair: int, cluster: int, shared: int) -> nvrtc.Function:
    """The kernel for these; `shared` is the most shared memory that a block of the GPU may have."""
    macros = {"STEPS": STEPS, "TILES": tiles, "BF16": int(bf16), "WORDS": int(words), "TEAM": team, "PAIR": pair}
    macros |= {"CLUSTER": cluster, "THREADS": THREADS[team, pair][tiles], "UNROLL": 1 if words else 2 // pair}
    return nvrtc.Function("lscd.cuh", "lscd", "PPPPPiiiiiiiiiiT", macros, shared)


# For the tests: every number of tiles with every kind of team, every value of the rest. All would take a minute.
VARIANTS = tuple(
    function(tiles, tiles in (1, 4), tiles in (1, 8), team, pair, cluster, STATIC_SHARED)
    for (team, pair), threads in THREADS.items()
    for tiles, cluster in zip(threads, (1, 2, 1, 2, 4), strict=False)
)


@cache
def gpu(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    hopper = (found.major, found.minor) == (9, 0)
    return Gpu(found.multi_processor_count, found.shared_memory_per_block_optin, found.major >= 9, hopper)


class CudaLscd(Kernel):
    """bfloat16 and float16 x, 1 to 256 tokens, any shape and density."""

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
        dense = a.decode(dtype).detach()
        return pack_dense(dense, words_pay(dense))

    @classmethod
    def run(cls, x: Tensor, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Tensor:
        flat = rows_of(cls.name, x, meta, packed[0].device, COLUMNS)
        y = x.new_empty(flat.shape[0], meta["rows"])
        most = gpu(x.get_device()).tokens
        for begin in range(0, flat.shape[0], most):
            part = slice(begin, begin + most)
            launch(flat[part], packed, meta, bias, y[part])
        return y.view(*x.shape[:-1], meta["rows"])

    @classmethod
    def bind(cls, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        device = gpu(packed[0].get_device())
        plan = partial(planned, cols=meta["cols"], meta=meta, lines=packed[0].numel() // LINE, device=device)
        return by_shape(super().bind(packed, meta, bias), plan, packed, meta, bias, device.tokens, COLUMNS)


def words_pay(dense: Tensor) -> bool:
    """Whether whole registers are the better items of a matrix: more bytes, but half of the work; for 8 tokens."""
    values, registers = share_of_items(dense)
    stage_times = []
    for words, share, padding in ((False, values, 2.5), (True, registers, 2)):  # padding: rows, measured
        load = (head_bytes(words) + padding * LINE + 32 * DEPTH * share) / LOAD_RATE
        stage_times.append(load + NOT_HIDDEN[words])
    return stage_times[1] < stage_times[0]


def pack_dense(dense: Tensor, words: bool) -> Packed:
    """A dense [M, K] of one of DTYPES, packed with values or whole registers as items."""
    stages, offsets, room = pack_matrix(dense, words)
    (rows, cols), mean = dense.shape, stages.numel() // (offsets.numel() - 1)
    meta = {"rows": rows, "cols": cols, "bf16": dense.dtype == torch.bfloat16, "words": words}
    meta |= {"mean": _rounded(mean, LINE), "room": [_rounded(bytes, ROOM) for bytes in room]}
    return Packed((stages, offsets), meta)


def launch(
    x: Tensor, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None, y: Tensor, cut: Cut | None = None
) -> None:
    """y [N, M] = x [N, K] A^T + bias, for as many rows of x as one launch takes, whole COLUMNS long (`rows_of`)."""
    tokens, cols = x.shape
    index, held = x.get_device(), bias_of(bias, x)
    call = planned(tokens, cols, meta, packed[0].numel() // LINE, gpu(index), cut)
    call.run(index, tuple(t.data_ptr() for t in packed), x.data_ptr(), held.data_ptr(), y.data_ptr())


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch, all but its tensors."""

    kernel: nvrtc.Function
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    sizes: tuple[int, ...]
    shared: int  # bytes
    x_map: tuple[int, int, int, int, bool] | None  # what `tensor_map` asks for; no GPU before Hopper has it
    maps: dict[int, bytes] = field(default_factory=dict)  # by the address of x, which comes back

    def run(self, device: int, packed: tuple[int, ...], x: int, bias: int, y: int) -> None:
        x_map = self.maps.get(x) or self._map(device, x)
        self.kernel.start(device, self.grid, self.block, self.shared, (*packed, x, bias, y, *self.sizes, x_map))

    def _map(self, device: int, x: int) -> bytes:
        if len(self.maps) >= MAX_MAPS:
            self.maps.clear()
        return self.maps.setdefault(x, tensor_map(device, x, *self.x_map) if self.x_map else NO_MAP)


def planned(tokens: int, cols: int, meta: dict[str, Any], lines: int, device: Gpu, cut: Cut | None = None) -> Launch:
    """The launch for x [tokens, cols], as `rows_of` leaves it, and `lines` of stages; cut as is thought best."""
    work = work_of(tokens, meta)
    cut = cut or best_cut(work, device)
    grid, block = (work.panels(cut) * cut.cluster, 1, 1), (32 * (cut.warps + 1), 1, 1)
    shares = cut.high, cut.split, cut.ring, cut.x_ring, work.room[cut.pair - 1]
    kernel = function(work.tiles, meta["bf16"], meta["words"], cut.team, cut.pair, cut.cluster, device.shared)
    # What has clusters has the engine that copies by maps.
    box = (tokens, cols, 8 * work.tiles, DEPTH // X_PER_STAGE[cut.team], meta["bf16"]) if device.clusters else None
    return Launch(kernel, grid, block, (work.rows, cols, tokens, work.deep, *shares, lines), work.shared(cut), box)


def work_of(tokens: int, meta: dict[str, Any]) -> Work:
    tiles = next(t for t in TILES if tokens <= 8 * t)
    return Work(meta["rows"], -(-meta["cols"] // DEPTH), tuple(meta["room"]), meta["mean"], tiles, meta["words"])


def _rounded(number: int, unit: int) -> int:
    return -(-number // unit) * unit
