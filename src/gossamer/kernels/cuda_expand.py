"""`bitmask` on NVIDIA GPUs for many tokens: the layout of `cuda_lscd`, dense for the time of a product.

It shares that layout, so a layer that runs `cuda_lscd` at decode and this one at prefill keeps its weight once; and
since the layout holds the matrix exactly, the stored tensors need not stay beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import nvrtc
from . import Case, KernelError, Packed
from ._cuda_operands import dtype_of
from ._lscd_pack import DEPTH, LINE, STEPS, unpack_matrix
from .cuda_lscd import CudaLscd

WARPS = 4
BLOCK = 32  # rows; the layout can be cut between blocks
_FUNCTIONS = {
    words: nvrtc.Function("expand.cuh", "expand", "PPPiiii", {"STEPS": STEPS, "WORDS": int(words), "WARPS": WARPS})
    for words in (False, True)
}
VARIANTS = tuple(_FUNCTIONS.values())


class CudaExpand(CudaLscd):
    """bfloat16 and float16 x, any number of tokens, any shape and density."""

    name: ClassVar[str] = "cuda_expand"

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        return super().refuses(replace(case, tokens=1))

    @classmethod
    def run(cls, x: Tensor, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Tensor:
        if x.dtype != dtype_of(meta):
            wanted = dtype_of(meta)
            raise KernelError(f"cuda_expand: packed for {wanted}, not {x.dtype}; fix: gossamer.prepare it again")
        return linear(x, cls.unpack(packed, meta), None if bias is None else bias.to(x.dtype))

    @classmethod
    def bind(cls, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        return partial(cls.run, packed=packed, meta=meta, bias=bias)

    @classmethod
    def unpack(cls, packed: Sequence[Tensor], meta: dict[str, Any]) -> Tensor:
        stages, offsets = packed
        rows, cols = meta["rows"], meta["cols"]
        if not stages.is_cuda:
            return unpack_matrix(stages, offsets, (rows, cols), dtype_of(meta), meta["words"])
        dense = torch.empty(rows, cols, dtype=dtype_of(meta), device=stages.device)
        room, grid = meta["room"][0], (-(-(offsets.numel() - 1) // WARPS), 1, 1)
        sizes = rows, cols, -(-cols // DEPTH), room
        _FUNCTIONS[meta["words"]].launch(grid, (32 * WARPS, 1, 1), stages, offsets, dense, *sizes, shared=WARPS * room)
        return dense

    @classmethod
    def rows(cls, packed: Packed, begin: int, end: int) -> Packed | None:
        stages, offsets = packed.tensors
        whole = packed.meta["rows"]
        if begin % BLOCK or (end % BLOCK and end != whole):
            return None
        per_block = 2 * -(-packed.meta["cols"] // DEPTH)
        own = offsets[begin // BLOCK * per_block : -(-end // BLOCK) * per_block + 1]
        first, last = int(own[0]) * LINE, int(own[-1]) * LINE
        return Packed((stages[first:last], own - own[0]), packed.meta | {"rows": end - begin})
