"""`nm24` (2:4) on NVIDIA GPUs at decode: read compressed, straight into the sparse tensor cores.

For few tokens, where the time of a product is the time of reading the weight: 9/16 of the bytes, and no decoding at
all. See docs/kernels/nm24.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import nvrtc
from ..driver import STATIC_SHARED
from ..formats import Format
from ..formats.nm24 import NM
from . import Case, Kernel, KernelError, Packed
from ._cuda_operands import DTYPES, bias_of, by_shape, dtype_of, rows_of
from ._nm24_cut import TILES, WARPS, X_WARPS, Cut, Gpu, Work, best_cut
from ._nm24_pack import BLOCK, DEPTH, STAGE, pack_matrix, unpack_matrix

MAX_TOKENS = 256
AT_ONCE = 8 * TILES[-1]  # tokens of a launch


@cache
def function(tiles: int, bf16: bool, pair: int, cluster: int, shared: int) -> nvrtc.Function:
    """The kernel for these; `shared` is the most shared memory that a block of the GPU may have."""
    threads = 32 * (WARPS[pair][tiles] + X_WARPS[tiles])
    macros = {"TILES": tiles, "BF16": int(bf16), "PAIR": pair, "CLUSTER": cluster}
    macros |= {"X_WARPS": X_WARPS[tiles], "THREADS": threads}
    return nvrtc.Function("nm24.cuh", "nm24", "PPPPiiiiiii", macros, shared)


# For the tests: every number of tiles with both kinds of warps, every value of the rest.
VARIANTS = tuple(
    function(tiles, tiles in (1, 4), pair, cluster, STATIC_SHARED)
    for pair in WARPS
    for tiles, cluster in zip(TILES, (1, 2, 4, 1), strict=True)
)


@cache
def gpu(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    tiles = TILES if found.major < 10 else tuple(t for t in TILES if t != 2)
    return Gpu(found.multi_processor_count, found.shared_memory_per_block_optin, found.major >= 9, tiles)


class CudaNm24(Kernel):
    """bfloat16 and float16 x, 1 to 256 tokens, 2:4 weights of any shape."""

    name: ClassVar[str] = "cuda_nm24"
    device: ClassVar[str] = "cuda"
    formats: ClassVar[tuple[str, ...]] = ("nm24",)

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        if reason := nvrtc.refusal(case.device):
            return reason
        if case.tokens > MAX_TOKENS:
            return f"at most {MAX_TOKENS} tokens"
        return unfit(case)

    @classmethod
    def pack(cls, a: Format, dtype: torch.dtype) -> Packed:
        check(cls.name, a, dtype)
        assert isinstance(a, NM)
        meta = {"rows": a.shape[0], "cols": a.shape[1], "bf16": dtype == torch.bfloat16}
        return Packed((pack_matrix(a, dtype),), meta)

    @classmethod
    def run(cls, x: Tensor, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Tensor:
        flat = rows_of(cls.name, x, meta, packed[0].device)
        y = x.new_empty(flat.shape[0], meta["rows"])
        for begin in range(0, flat.shape[0], AT_ONCE):
            part = slice(begin, begin + AT_ONCE)
            launch(flat[part], packed[0], meta, bias, y[part])
        return y.view(*x.shape[:-1], meta["rows"])

    @classmethod
    def bind(cls, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        plan = partial(planned, width=meta["cols"], meta=meta, device=gpu(packed[0].get_device()))
        return by_shape(super().bind(packed, meta, bias), plan, packed, meta, bias, AT_ONCE, columns=8)

    @classmethod
    def unpack(cls, packed: Sequence[Tensor], meta: dict[str, Any]) -> Tensor:
        return unpack_matrix(packed[0], (meta["rows"], meta["cols"]), dtype_of(meta)).decode()

    @classmethod
    def rows(cls, packed: Packed, begin: int, end: int) -> Packed | None:
        whole = packed.meta["rows"]
        if begin % BLOCK or (end % BLOCK and end != whole):
            return None
        per_block = 2 * STAGE * -(-packed.meta["cols"] // DEPTH)
        own = packed.tensors[0][begin // BLOCK * per_block : -(-end // BLOCK) * per_block]
        return Packed((own,), packed.meta | {"rows": end - begin})


def unfit(case: Case) -> str | None:
    """What of the weight or of x no kernel for 2:4 on a GPU takes."""
    if case.dtype not in DTYPES:
        return "x in bfloat16 or float16"
    if (case.spec["n"], case.spec["m"]) != (2, 4):
        return f"a weight that is 2:4, not {case.spec['n']}:{case.spec['m']}"
    if not all(case.spec["shape"]):
        return "a weight with at least one entry"
    return None


def check(name: str, a: Format, dtype: torch.dtype) -> None:
    """KernelError if `a` is not a 2:4 matrix or `dtype` not one of 16 bits."""
    if not isinstance(a, NM) or (a.n, a.m) != (2, 4):
        raise KernelError(f"{name} runs the format nm24 with 2 of 4, not {a.spec()}; fix: choose another kernel")
    if dtype not in DTYPES:
        raise KernelError(f"{name} takes x in bfloat16 or float16, not {dtype}; fix: convert the model")


def launch(
    x: Tensor, stages: Tensor, meta: dict[str, Any], bias: Tensor | None, y: Tensor, cut: Cut | None = None
) -> None:
    """y [N, M] = x [N, K] A^T + bias, for at most 64 rows of x, as `rows_of` leaves them."""
    index, held = x.get_device(), bias_of(bias, x)
    call = planned(x.shape[0], x.shape[1], meta, gpu(index), cut)
    call.run(index, (stages.data_ptr(),), x.data_ptr(), held.data_ptr(), y.data_ptr())


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch, all but its tensors."""

    kernel: nvrtc.Function
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    sizes: tuple[int, ...]
    shared: int  # bytes

    def run(self, device: int, packed: tuple[int, ...], x: int, bias: int, y: int) -> None:
        self.kernel.start(device, self.grid, self.block, self.shared, (*packed, x, bias, y, *self.sizes))


def planned(tokens: int, width: int, meta: dict[str, Any], device: Gpu, cut: Cut | None = None) -> Launch:
    """The launch for x [tokens, width], as `rows_of` leaves it; by default cut as is thought best."""
    work = work_of(tokens, meta, device)
    cut = cut or best_cut(work, device)
    grid, block = (work.panels(cut) * cut.cluster, 1, 1), (32 * (cut.warps + X_WARPS[work.tiles]), 1, 1)
    kernel = function(work.tiles, meta["bf16"], cut.pair, cut.cluster, device.shared)
    sizes = work.rows, width, tokens, work.deep, cut.high, cut.split, cut.x_ring
    return Launch(kernel, grid, block, sizes, work.shared(cut))


def work_of(tokens: int, meta: dict[str, Any], device: Gpu) -> Work:
    return Work(meta["rows"], -(-meta["cols"] // DEPTH), next(t for t in device.tiles if tokens <= 8 * t))
